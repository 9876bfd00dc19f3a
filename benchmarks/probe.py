"""Times the linear probe's solver and scikit-learn's lbfgs on the same features.

    python benchmarks/probe.py                    # one thread, under a minute
    python benchmarks/probe.py --full             # also 256 features; minutes of scikit-learn
    python benchmarks/probe.py --data-dir ./data --repeat 5

Features are sigmoid(4 x w), where x are the images and w random directions of length one, drawn
anew in every turn. obvious: scikit-learn, on the CPU.

    difference   (our objective - scikit-learn's) / scikit-learn's; negative if ours is lower
    their steps, our steps   of the solvers
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_float, run_command
from kernels.logistic_regression import LogisticFit, fit_logistic
from mnist_datasets import load_images

# rows, features, dtype
QUICK = [(10_000, 32, torch.float32), (60_000, 32, torch.float32), (60_000, 32, torch.float64)]
FULL = [*QUICK, (60_000, 256, torch.float32)]


def random_features(images: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """sigmoid(4 x w) for `width` random directions w."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(width, images.shape[1], generator=generator)
    return torch.sigmoid(4 * images @ (w / w.norm(dim=1, keepdim=True)).T)


def scikit_learn(features: torch.Tensor, labels: torch.Tensor, C: float, tol: float) -> LogisticFit:
    """scikit-learn's fit; its objective is recomputed in float64 by the same code as ours."""
    model = LogisticRegression(C=C, tol=tol, max_iter=5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence, which the difference shows
        model.fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    return LogisticFit(weight.double(), bias.double(), 0.0, 0.0, int(model.n_iter_[0]), True)


def objective(fit: LogisticFit, features: torch.Tensor, labels: torch.Tensor, C: float) -> float:
    """C * summed cross-entropy + 1/2 |weight|^2 in float64."""
    loss = torch.nn.functional.cross_entropy(fit.logits(features), labels, reduction="sum")
    return float(C * loss + 0.5 * fit.weight.square().sum())


def compare(
    images: torch.Tensor,
    labels: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    arguments: argparse.Namespace,
    clock: Clock,
) -> Row:
    """Time both solvers in turns, with new features each time."""
    C, turns = arguments.C, []
    for seed in range(arguments.repeat):
        features = random_features(images, width, seed).to(dtype)
        fits: dict[str, LogisticFit] = {}
        moved, moved_labels = features.to(clock.device), labels.to(clock.device)

        def ours(fits=fits, moved=moved, labels=moved_labels) -> None:
            fits["ours"] = fit_logistic(moved, labels, 10, C)

        def theirs(fits=fits, features=features) -> None:
            fits["theirs"] = scikit_learn(features, labels, C, arguments.tol)

        times = clock.milliseconds(theirs), clock.milliseconds(ours)
        best = objective(fits["theirs"], features, labels, C)
        difference = objective(fits["ours"], moved, moved_labels, C) / best - 1
        turns.append((*times, difference, fits["theirs"].iterations, fits["ours"].iterations))
    obvious, ours_ms, *others = zip(*turns, strict=True)
    difference, their_steps, our_steps = map(statistics.median, others)
    more = {
        "difference": f"{difference:.1e}",
        "their steps": f"{their_steps:g}",
        "our steps": f"{our_steps:g}",
    }
    return Row("probe", f"{len(images)} x {width} {str(dtype)[6:]}", ours_ms, obvious, more=more)


def rows(arguments: argparse.Namespace, data, clock: Clock) -> Iterator[Row]:
    """One row for each size."""
    images, labels = data.floats().flatten(1), data.labels
    for count, width, dtype in FULL if arguments.full else QUICK:
        yield compare(images[:count], labels[:count], width, dtype, arguments, clock)


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each size."""
    parser = benchmark_parser(__doc__, repeat=3)
    parser.add_argument("--data-dir", default="./data", help="where the images are")
    parser.add_argument("--full", action="store_true", help="also 256 features")
    parser.add_argument("--C", type=positive_float, default=1000.0,
        help="inverse strength of the penalty")  # fmt: skip
    parser.add_argument("--tol", type=positive_float, default=1e-6,
        help="tolerance of scikit-learn")  # fmt: skip
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    train, _ = load_images("mnist", arguments.data_dir)
    print_table(rows(arguments, train, clock), clock, f"{train.source}; C = {arguments.C:g}")


if __name__ == "__main__":
    run_command(main)
