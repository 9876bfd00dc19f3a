"""How products in less than float32 change the hypergradient, and its time.

    python benchmarks/precision.py                           # Oja's rule, under a minute
    python benchmarks/precision.py --run RUN --steps 50 250  # the rule that main.py has learned

Each turn draws a start and batches, trains 32 units on MNIST and differentiates the probe's loss
through all updates, with respect to every coefficient of the rule and every number of the initial
distribution. The reference is float64, with the same draw. The probe itself is exact in all rows.
Times are those of the updates and of the backward pass through them; obvious: float32.

    tf32         emulated without CUDA: factors rounded to 10 bits, products in float32
    error        distance from the reference, relative to its norm; mean over draws
    cosine       with the reference; the smallest over draws
    loss         change of the loss; the largest over draws
    other draw   distance between two draws, relative to their norm: the noise of a meta-step
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from comparison.learned_run import load_run
from comparison.rule_comparison import Setting, learned
from experiment.command_line import positive_int, run_command
from experiment.precision import Products
from initializers import GaussianInitializer
from learning_rules import PerLayerRule, classical_rule
from mnist_datasets import batches, load_images
from models_fully_local import Activation, lateral_network
from train import Draw, Training, detached, train

KINDS = ("float64", "float32", "tf32", "bfloat16")
aten = torch.ops.aten
FACTORS = {  # the positions of an operation's factors among its arguments
    aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2),
    aten.baddbmm: (1, 2), aten.convolution: (0, 1), aten.convolution_backward: (0, 1, 2),
}  # fmt: skip


class TensorCores(TorchDispatchMode):
    """Rounds the factors of products to 10 bits, to nearest even, as tensor cores do."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        arguments = list(arguments)
        for place in FACTORS.get(function.overloadpacket, ()):
            arguments[place] = rounded(arguments[place])
        return function(*arguments, **(options or {}))


def rounded(x: Tensor, dropped: int = 13) -> Tensor:
    """x rounded to nearest even, with the last `dropped` of its 23 mantissa bits 0."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits + half) >> dropped << dropped).view(torch.float32)


def as_told(kind: str, device: torch.device):
    """A context in which products are of this kind."""
    if kind == "tf32" and device.type != "cuda":
        return TensorCores()
    return Products("float32" if kind == "float64" else kind)


def oja(setting: Setting) -> Training:
    """Units that inhibit each other, trained by Oja's rule."""
    return Training(
        lateral_network(setting.train.shape, setting.layers, Activation("sigmoid", 4.0)),
        PerLayerRule([classical_rule("oja", 1e-3)]),
        GaussianInitializer.with_values({"spread_w": 1.0, "mean_b": 0.0, "mean_m": 0.0}),
        lambda generator: batches(setting.train, setting.batch_size, generator, setting.dtype),
        setting.probe((setting.train, setting.test)),
    )


def measure(
    training: Training, kind: str, steps: int, number: int, clock: Clock
) -> tuple[Tensor, float, float]:
    """The hypergradient as a vector, the loss, and milliseconds of updates and backward pass."""
    trained, draw = list(training.hyperparameters.values()), Draw((number,), steps)
    begin = clock.now()
    with as_told(kind, clock.device):
        params, stream = training.begin(draw)
        theta = train(training.model, params, stream, training.rule, steps)
    forward = clock.now() - begin
    leaves = [{n: t.requires_grad_() for n, t in layer.items()} for layer in detached(theta)]
    loss, _ = training.checked_outer_loss(leaves, draw)
    adjoint = torch.autograd.grad(loss, [t for layer in leaves for t in layer.values()])
    begin = clock.now()
    with as_told(kind, clock.device):
        ends = [t for layer in theta for t in layer.values()]
        gradient = torch.autograd.grad(ends, trained, adjoint, allow_unused=True)
    milliseconds = forward + clock.now() - begin
    vector = torch.cat([g.flatten().double() for g in gradient if g is not None])
    return vector, loss.item(), milliseconds


def trainings(
    arguments: argparse.Namespace, setting: Setting, device: torch.device
) -> dict[str, Training]:
    """A training for each kind of products."""
    made = {}
    for kind in KINDS:
        dtype = torch.float64 if kind == "float64" else torch.float32
        typed = replace(setting, dtype=dtype)
        made[kind] = learned(load_run(arguments.run), typed) if arguments.run else oja(typed)
        for module in made[kind].modules.values():
            module.to(device, dtype)
    return made


def rows(
    arguments: argparse.Namespace, setting: Setting, steps: int, clock: Clock
) -> Iterator[Row]:
    """One row for each kind of products, after this many steps."""
    made = trainings(arguments, setting, clock.device)
    turns = [
        {kind: measure(training, kind, steps, number, clock) for kind, training in made.items()}
        for number in range(arguments.repeat)
    ]
    exact = [turn["float64"] for turn in turns]
    obvious = [turn["float32"][2] for turn in turns]
    apart = distance_of_draws(torch.stack([vector for vector, _, _ in exact]))
    for kind in KINDS:
        draws = [turn[kind] for turn in turns]
        pairs = list(zip(draws, exact, strict=True))
        errors = [((a[0] - b[0]).norm() / b[0].norm()).item() for a, b in pairs]
        cosines = [torch.cosine_similarity(a[0], b[0], dim=0).item() for a, b in pairs]
        more = {
            "error": f"{statistics.mean(errors):.1e}",
            "cosine": f"{min(cosines):.6f}",
            "loss": f"{max(abs(a[1] - b[1]) for a, b in pairs):.1e}",
            "other draw": apart,
        }
        yield Row(kind, f"{steps} steps", [draw[2] for draw in draws], obvious, more=more)


def distance_of_draws(vectors: Tensor) -> str:
    """The mean distance between two rows, relative to their mean norm; "-" for a single row."""
    if len(vectors) == 1:
        return "-"
    return f"{torch.pdist(vectors).mean() / vectors.norm(dim=1).mean():.2f}"


def main(argv: list[str] | None = None) -> None:
    """Print a row for each number of steps and kind of products."""
    parser = benchmark_parser(__doc__, repeat=3)
    parser.add_argument("--run", type=Path, help="run of main.py whose rule is used")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[20])
    parser.add_argument("--units", type=positive_int, nargs="+", default=[32])
    parser.add_argument("--batch-size", type=positive_int, default=256)
    parser.add_argument("--data-dir", default="./data")
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    images = [data.to(clock.device) for data in load_images("mnist", arguments.data_dir)]
    setting = Setting(
        "mnist", *images, layers=tuple(arguments.units), C=1000.0, outer_images=4096,
        batch_size=arguments.batch_size,
    )  # fmt: skip
    lines = (rows(arguments, setting, steps, clock) for steps in arguments.steps)
    common = f"{setting.train.source}; batches of {arguments.batch_size}"
    print_table(itertools.chain.from_iterable(lines), clock, common)


if __name__ == "__main__":
    run_command(main)
