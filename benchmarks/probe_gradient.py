"""What the exact gradient through the probe's optimum brings, and what it costs.

    python benchmarks/probe_gradient.py              # Oja's rule, under a minute
    python benchmarks/probe_gradient.py --run RUN    # the rule that a run of main.py has learned

Each draw trains 32 units on MNIST and differentiates the probe's loss through all updates, by every
coefficient of the rule and every number of the initial distribution, in both ways of linear_probe
on the same draw. The outer images are drawn anew each time.

    loss         mean over draws; of images that the fit has seen (envelope) or not (implicit)
    norm         of the mean hypergradient
    noise        of one draw: root mean square distance from the mean, relative to the norm
    cosine       of the mean with the mean of the other way
    outer s      probe, loss and the backward pass down to the parameters; medians over draws
    total s      with the updates and the backward pass through them
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy starts its threads

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from comparison.learned_run import load_run
from comparison.rule_comparison import Setting, learned
from experiment.command_line import keep_freed_memory
from initializers import GaussianInitializer
from learning_rules import PerLayerRule, classical_rule
from linear_probe import PROBE_GRADIENTS, ProbeLoss
from mnist_datasets import batches, load_images
from models_fully_local import Activation, lateral_network
from train import OUTER, Draw, Training, detached, train


def oja(setting: Setting) -> Training:
    """Units that do not see each other, trained by Oja's rule."""
    options = {"inhibition": "none"}
    return Training(
        lateral_network(setting.train.shape, setting.layers, Activation("sigmoid", 4.0), **options),
        PerLayerRule([classical_rule("oja", 1e-3)]).to(setting.dtype),
        GaussianInitializer.with_values({"spread_w": 1.0, "mean_b": 0.0}).to(setting.dtype),
        lambda generator: batches(setting.train, setting.batch_size, generator, setting.dtype),
        setting.probe((setting.train, setting.test)),
    )


def measure(training: Training, setting: Setting, steps: int, number: int) -> dict[str, tuple]:
    """For each way: the loss, the hypergradient as a vector, seconds of the loss, seconds of all.

    Both ways share the updates; each has its own backward pass through them.
    """
    draw, begin = Draw((number,), steps), time.perf_counter()
    params, stream = training.begin(draw)
    theta = train(training.model, params, stream, training.rule, steps)
    unrolled = time.perf_counter() - begin
    trained = list(training.hyperparameters.values())
    ends = [t for layer in theta for t in layer.values()]
    found = {}
    for way in PROBE_GRADIENTS:
        loss_of = ProbeLoss(
            setting.train, setting.test, setting.C,
            outer_images=setting.outer_images, probe_gradient=way,
        )  # fmt: skip
        begin = time.perf_counter()
        leaves = [{n: t.requires_grad_() for n, t in d.items()} for d in detached(theta)]
        loss, _ = loss_of(training.model, leaves, draw.generator(OUTER))
        flat = [t for layer in leaves for t in layer.values()]
        adjoint = torch.autograd.grad(loss, flat)
        outer = time.perf_counter() - begin
        gradient = torch.autograd.grad(
            ends, trained, adjoint, allow_unused=True, retain_graph=way != PROBE_GRADIENTS[-1]
        )
        vector = torch.cat([g.flatten() for g in gradient if g is not None])
        total = unrolled + time.perf_counter() - begin
        found[way] = loss.item(), vector.double(), outer, total
    return found


def row(name: str, draws: list[tuple], other: Tensor) -> str:
    """A line of the table; other: the mean hypergradient of the other way."""
    losses, vectors, outer, total = zip(*draws, strict=True)
    vectors = torch.stack(vectors)
    mean = vectors.mean(0)
    noise = (vectors - mean).square().sum(1).mean().sqrt() / mean.norm()
    cosine = torch.nn.functional.cosine_similarity(mean, other, dim=0)
    return (
        f"{name:>9} {statistics.mean(losses):7.4f} {mean.norm():9.3g} {noise:6.2f} {cosine:7.3f} "
        f"{statistics.median(outer):8.3f} {statistics.median(total):8.3f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="of main.py, whose rule is differentiated")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--outer-images", type=int, default=4096)
    parser.add_argument("--C", type=float, default=1000.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default="./data")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    setting = Setting(
        "mnist", *load_images("mnist", arguments.data_dir), layers=(32,), C=arguments.C,
        outer_images=arguments.outer_images, batch_size=256,
    )  # fmt: skip
    training = learned(load_run(arguments.run), setting) if arguments.run else oja(setting)
    draws = [measure(training, setting, arguments.steps, draw) for draw in range(arguments.draws)]
    means = {way: torch.stack([d[way][1] for d in draws]).mean(0) for way in PROBE_GRADIENTS}
    print(f"{setting.train.source}; {arguments.draws} draws of {arguments.steps} steps, "
          f"{arguments.outer_images} outer images, C = {arguments.C:g}, "
          f"{arguments.threads} thread(s), torch {torch.__version__}")  # fmt: skip
    print(f"{'way':>9} {'loss':>7} {'norm':>9} {'noise':>6} {'cosine':>7} {'outer s':>8} "
          f"{'total s':>8}")  # fmt: skip
    for way, other in zip(PROBE_GRADIENTS, reversed(PROBE_GRADIENTS), strict=True):
        print(row(way, [d[way] for d in draws], means[other]))


if __name__ == "__main__":
    main()
