"""What products in less than float32 do to the hypergradient.

    python benchmarks/precision.py                           # Oja's rule, under a minute
    python benchmarks/precision.py --run RUN --steps 50 250  # the rule that main.py has learned

Each draw trains 32 units on MNIST and differentiates the probe's loss through all updates, by every
coefficient of the rule and every number of the initial distribution. The reference is float64, from
the same draw. The probe itself is exact in all rows.

    tf32         emulated where there is no CUDA: factors rounded to 10 bits, products in float32
    error        distance from the reference, relative to its norm; mean over draws
    cosine       with the reference; the smallest
    other draw   distance between two draws, relative to their norm: what a meta-step has to bear
    loss         change of the loss, largest
    seconds      of the updates and the backward pass through them, median
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy starts its threads

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from comparison.learned_run import load_run
from comparison.rule_comparison import Setting, learned
from experiment.command_line import keep_freed_memory
from experiment.precision import Products
from initializers import GaussianInitializer
from learning_rules import PerLayerRule, classical_rule
from mnist_datasets import batches, load_images
from models_fully_local import Activation, lateral_network
from train import Draw, Training, detached, train

KINDS = ("float64", "float32", "tf32", "bfloat16")
aten = torch.ops.aten
FACTORS = {  # where an operation's factors are among its arguments
    aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2),
    aten.baddbmm: (1, 2), aten.convolution: (0, 1), aten.convolution_backward: (0, 1, 2),
}  # fmt: skip


class TensorCores(TorchDispatchMode):
    """Rounds the factors of products to 10 bits, to the nearest even, as tensor cores do."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        arguments = list(arguments)
        for place in FACTORS.get(function.overloadpacket, ()):
            arguments[place] = rounded(arguments[place])
        return function(*arguments, **(options or {}))


def rounded(x: Tensor, dropped: int = 13) -> Tensor:
    """x without its last `dropped` bits of 23."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits + half) >> dropped << dropped).view(torch.float32)


def as_told(kind: str):
    """The context in which products are of this kind."""
    if kind == "tf32" and not torch.cuda.is_available():
        return TensorCores()
    return Products("float32" if kind == "float64" else kind)


def oja(setting: Setting) -> Training:
    """Units that inhibit each other, trained by Oja's rule."""
    return Training(
        lateral_network(setting.train.shape, setting.layers, Activation("sigmoid", 4.0)),
        PerLayerRule([classical_rule("oja", 1e-3)]).to(setting.dtype),
        GaussianInitializer.with_values({"spread_w": 1.0, "mean_b": 0.0, "mean_m": 0.0}).to(
            setting.dtype
        ),
        lambda generator: batches(setting.train, setting.batch_size, generator, setting.dtype),
        setting.probe((setting.train, setting.test)),
    )


def measure(training: Training, kind: str, steps: int, number: int) -> tuple[Tensor, float, float]:
    """The hypergradient as a vector, the loss, seconds of the updates and their backward pass."""
    trained, draw = list(training.hyperparameters.values()), Draw((number,), steps)
    begin = time.perf_counter()
    with as_told(kind):
        params, stream = training.begin(draw)
        theta = train(training.model, params, stream, training.rule, steps)
    forward = time.perf_counter() - begin
    leaves = [{n: t.requires_grad_() for n, t in layer.items()} for layer in detached(theta)]
    loss, _ = training.checked_outer_loss(leaves, draw)
    adjoint = torch.autograd.grad(loss, [t for layer in leaves for t in layer.values()])
    begin = time.perf_counter()
    with as_told(kind):
        ends = [t for layer in theta for t in layer.values()]
        gradient = torch.autograd.grad(ends, trained, adjoint, allow_unused=True)
    seconds = forward + time.perf_counter() - begin
    vector = torch.cat([g.flatten().double() for g in gradient if g is not None])
    return vector, loss.item(), seconds


def rows(arguments, setting: Setting, steps: int) -> None:
    """The lines of the table for so many steps."""
    found = {}
    for kind in KINDS:
        dtype = torch.float64 if kind == "float64" else torch.float32
        own = replace(setting, dtype=dtype)
        training = learned(load_run(arguments.run), own) if arguments.run else oja(own)
        found[kind] = [measure(training, kind, steps, draw) for draw in range(arguments.draws)]
    exact = [vector for vector, _, _ in found["float64"]]
    norm = statistics.mean(vector.norm().item() for vector in exact)
    between = torch.pdist(torch.stack(exact)).mean().item() / norm
    print(f"{steps} steps, other draw: {between:.2f}")
    for kind, draws in found.items():
        pairs = list(zip(draws, found["float64"], strict=True))
        errors = [((a[0] - b[0]).norm() / b[0].norm()).item() for a, b in pairs]
        cosines = [torch.cosine_similarity(a[0], b[0], dim=0).item() for a, b in pairs]
        change = max(abs(a[1] - b[1]) for a, b in pairs)
        seconds = statistics.median(draw[2] for draw in draws)
        print(f"{kind:>9} {statistics.mean(errors):9.1e} {min(cosines):10.6f} {change:9.1e} "
              f"{seconds:8.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="of main.py, whose rule is differentiated")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--units", type=int, nargs="+", default=[32])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default="./data")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    setting = Setting(
        "mnist", *load_images("mnist", arguments.data_dir), layers=tuple(arguments.units),
        C=1000.0, outer_images=4096, batch_size=arguments.batch_size,
    )  # fmt: skip
    print(f"{setting.train.source}; {arguments.draws} draws, batches of {arguments.batch_size}, "
          f"{arguments.threads} thread(s), torch {torch.__version__}")  # fmt: skip
    print(f"{'products':>9} {'error':>9} {'cosine':>10} {'loss':>9} {'seconds':>8}")
    for steps in arguments.steps:
        rows(arguments, setting, steps)


if __name__ == "__main__":
    main()
