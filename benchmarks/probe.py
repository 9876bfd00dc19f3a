"""Times the linear probe's solver against scikit-learn's lbfgs, on the same features in one thread.

    python benchmarks/probe.py                    # under a minute
    python benchmarks/probe.py --full             # also 256 features; minutes of scikit-learn
    python benchmarks/probe.py --data-dir ./data --repeat 5

Features are sigmoid(4 x w), x the images and w random directions of length one, new ones in every
repetition. The two solvers take turns; times, ratios and differences are medians over repetitions.
difference: (our objective - scikit-learn's) / scikit-learn's; negative where ours is lower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy starts its threads

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.logistic_regression import LogisticFit, fit_logistic
from mnist_datasets import load_images

# rows, features, dtype
QUICK = [(10_000, 32, torch.float32), (60_000, 32, torch.float32), (60_000, 32, torch.float64)]
FULL = [*QUICK, (60_000, 256, torch.float32)]


def images_and_labels(data_dir: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images [N, pixels] and labels [N] of MNIST, and where they come from."""
    train, _ = load_images("mnist", data_dir)
    return train.floats().flatten(1), train.labels, train.source


def random_features(images: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """sigmoid(4 x w) for `width` random directions w."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(width, images.shape[1], generator=generator)
    return torch.sigmoid(4 * images @ (w / w.norm(dim=1, keepdim=True)).T)


def scikit_learn(features: torch.Tensor, labels: torch.Tensor, C: float, tol: float) -> LogisticFit:
    """scikit-learn's fit; its objective is recomputed in float64 by the same code as ours."""
    model = LogisticRegression(C=C, tol=tol, max_iter=5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not converging: the difference tells
        model.fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    return LogisticFit(weight.double(), bias.double(), 0.0, 0.0, int(model.n_iter_[0]), True)


def objective(fit: LogisticFit, features: torch.Tensor, labels: torch.Tensor, C: float) -> float:
    """C * summed cross-entropy + 1/2 |weight|^2 in float64."""
    loss = torch.nn.functional.cross_entropy(fit.logits(features), labels, reduction="sum")
    return float(C * loss + 0.5 * fit.weight.square().sum())


def seconds(solve) -> tuple[float, LogisticFit]:
    start = time.perf_counter()
    fit = solve()
    return time.perf_counter() - start, fit


def compare(images, labels, width: int, dtype: torch.dtype, arguments) -> str:
    """One row of the table."""
    runs = []
    for seed in range(arguments.repeat):
        features = random_features(images, width, seed).to(dtype)
        ours, fit = seconds(lambda x=features: fit_logistic(x, labels, 10, arguments.C))
        theirs, oracle = seconds(
            lambda x=features: scikit_learn(x, labels, arguments.C, arguments.tol)
        )
        best = objective(oracle, features, labels, arguments.C)
        difference = objective(fit, features, labels, arguments.C) / best - 1
        runs.append((theirs, ours, theirs / ours, difference, oracle.iterations, fit.iterations))
    theirs, ours, ratio, difference, their_iterations, iterations = (
        statistics.median(column) for column in zip(*runs, strict=True)
    )
    size = f"{len(images)} x {width}"
    return (
        f"{size:>12} {str(dtype)[6:]:>8} {theirs:>15.2f} {ours:>9.3f} {ratio:>7.1f} "
        f"{difference:>11.1e} {their_iterations:>12g} {iterations:>12g}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="./data", help="where the images are (./data)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each size (3)")
    parser.add_argument("--full", action="store_true", help="also 256 and 784 features")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--C", type=float, default=1000.0, help="inverse penalty (1000)")
    parser.add_argument("--tol", type=float, default=1e-6, help="of scikit-learn (1e-6)")
    arguments = parser.parse_args(argv)
    if arguments.repeat < 1 or arguments.threads < 1:
        parser.error("--repeat and --threads must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    images, labels, source = images_and_labels(arguments.data_dir)
    print(
        f"{source}; C = {arguments.C:g}; {arguments.threads} thread(s); torch {torch.__version__}"
    )
    print(f"medians of {arguments.repeat} paired repetitions")
    print(
        f"{'size':>12} {'dtype':>8} {'scikit-learn s':>15} {'ours s':>9} {'ratio':>7} "
        f"{'difference':>11} {'their steps':>12} {'our steps':>12}"
    )
    for rows, width, dtype in FULL if arguments.full else QUICK:
        rows = min(rows, len(images))
        print(compare(images[:rows], labels[:rows], width, dtype, arguments), flush=True)


if __name__ == "__main__":
    main()
