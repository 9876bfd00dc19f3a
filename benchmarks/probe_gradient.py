"""What the exact gradient through the probe's optimum changes, and what it costs.

    python benchmarks/probe_gradient.py              # Oja's rule, under a minute
    python benchmarks/probe_gradient.py --run RUN    # the rule that a run of main.py has learned

Each turn draws a start, batches and outer images, trains 32 units on MNIST and differentiates the
probe's loss through all updates, with respect to every coefficient of the rule and every number of
the initial distribution, in both ways of linear_probe on the same draw. Times are those of
everything; limit: the updates and the backward pass through them, without the probe.

    outer ms     probe, loss and the backward pass down to the parameters; median over draws
    loss         mean over draws; on images that the fit has seen (envelope) or not (implicit)
    norm         of the mean hypergradient
    noise        of one draw: root mean square distance from the mean, relative to the norm
    cosine       between the means of both ways
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.table import Clock, Row, benchmark_parser, median_text, print_table, set_up
from comparison.learned_run import load_run
from comparison.rule_comparison import Setting, learned
from experiment.command_line import positive_float, positive_int, run_command
from initializers import GaussianInitializer
from learning_rules import PerLayerRule, classical_rule
from linear_probe import PROBE_GRADIENTS, ProbeLoss
from mnist_datasets import batches, load_images
from models_fully_local import Activation, lateral_network
from train import OUTER, Draw, Training, detached, train


class Outcome(NamedTuple):
    """The results of one way for one draw; outer and total in milliseconds."""

    loss: float
    hypergradient: Tensor
    outer: float
    total: float


def oja(setting: Setting) -> Training:
    """Units that do not interact, trained by Oja's rule."""
    options = {"inhibition": "none"}
    return Training(
        lateral_network(setting.train.shape, setting.layers, Activation("sigmoid", 4.0), **options),
        PerLayerRule([classical_rule("oja", 1e-3)]),
        GaussianInitializer.with_values({"spread_w": 1.0, "mean_b": 0.0}),
        lambda generator: batches(setting.train, setting.batch_size, generator, setting.dtype),
        setting.probe((setting.train, setting.test)),
    )


def measure(
    training: Training, setting: Setting, steps: int, number: int, clock: Clock
) -> dict[str, Outcome]:
    """Both ways, which share the updates; each has its own backward pass through them."""
    draw, begin = Draw((number,), steps), clock.now()
    params, stream = training.begin(draw)
    theta = train(training.model, params, stream, training.rule, steps)
    unrolled = clock.now() - begin
    trained = list(training.hyperparameters.values())
    ends = [t for layer in theta for t in layer.values()]
    outcomes = {}
    for way in PROBE_GRADIENTS:
        loss_of = ProbeLoss(
            setting.train, setting.test, setting.C,
            outer_images=setting.outer_images, probe_gradient=way,
        )  # fmt: skip
        begin = clock.now()
        leaves = [{n: t.requires_grad_() for n, t in d.items()} for d in detached(theta)]
        loss, _ = loss_of(training.model, leaves, draw.generator(OUTER))
        flat = [t for layer in leaves for t in layer.values()]
        adjoint = torch.autograd.grad(loss, flat)
        outer = clock.now() - begin
        gradient = torch.autograd.grad(
            ends, trained, adjoint, allow_unused=True, retain_graph=way != PROBE_GRADIENTS[-1]
        )
        total = unrolled + clock.now() - begin
        vector = torch.cat([g.flatten() for g in gradient if g is not None])
        outcomes[way] = Outcome(loss.item(), vector.double(), outer, total)
    return outcomes


def row(way: str, sizes: str, draws: list[Outcome], other: Tensor) -> Row:
    """A row of the table.

    other: the mean hypergradient of the other way.
    """
    losses, vectors, outer, total = zip(*draws, strict=True)
    vectors = torch.stack(vectors)
    mean = vectors.mean(0)
    noise = (vectors - mean).square().sum(1).mean().sqrt() / mean.norm()
    more = {
        "outer ms": median_text(outer),
        "loss": f"{statistics.mean(losses):.4f}",
        "norm": f"{mean.norm():.3g}",
        "noise": f"{noise:.2f}",
        "cosine": f"{torch.cosine_similarity(mean, other, dim=0):.3f}",
    }
    return Row(
        way, sizes, total, limit=[t - o for t, o in zip(total, outer, strict=True)], more=more
    )


def rows(
    arguments: argparse.Namespace, training: Training, setting: Setting, clock: Clock
) -> Iterator[Row]:
    """One row for each way."""
    turns = [
        measure(training, setting, arguments.steps, number, clock)
        for number in range(arguments.repeat)
    ]
    draws = {way: [turn[way] for turn in turns] for way in PROBE_GRADIENTS}
    means = {w: torch.stack([d.hypergradient for d in draws[w]]).mean(0) for w in PROBE_GRADIENTS}
    for way, other in zip(PROBE_GRADIENTS, reversed(PROBE_GRADIENTS), strict=True):
        yield row(way, f"{arguments.steps} steps", draws[way], means[other])


def main(argv: list[str] | None = None) -> None:
    """Print a row for each way."""
    parser = benchmark_parser(__doc__, repeat=8)
    parser.add_argument("--run", type=Path, help="run of main.py whose rule is used")
    parser.add_argument("--steps", type=positive_int, default=50)
    parser.add_argument("--outer-images", type=positive_int, default=4096)
    parser.add_argument("--C", type=positive_float, default=1000.0)
    parser.add_argument("--data-dir", default="./data")
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    images = [data.to(clock.device) for data in load_images("mnist", arguments.data_dir)]
    setting = Setting(
        "mnist", *images, layers=(32,), C=arguments.C, outer_images=arguments.outer_images,
        batch_size=256,
    )  # fmt: skip
    training = learned(load_run(arguments.run), setting) if arguments.run else oja(setting)
    for module in training.modules.values():
        module.to(clock.device, setting.dtype)
    common = (f"{setting.train.source}; {arguments.outer_images} outer images, "
              f"C = {arguments.C:g}")  # fmt: skip
    print_table(rows(arguments, training, setting, clock), clock, common)


if __name__ == "__main__":
    run_command(main)
