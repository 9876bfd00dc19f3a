"""Times lateral inhibition, forward and backward: unrolled steps beside the equilibrium.

    python benchmarks/equilibrium.py                       # one thread, under a minute
    python benchmarks/equilibrium.py --strength 10 --units 32

Preactivations s are random. Lateral weights m resemble those that main.py learns: units inhibit
each other by the correlation of eight random patterns, apart from a tenth of noise that is neither
symmetric nor inhibition; their spectral norm, there 2 to 13, is --strength. Sigmoid of slope 4,
steps of 0.2. The ways take turns; ratios are medians over the repetitions of those within each.

    ms          CPU time of y and of its gradients by s and m
    of 10       this time relative to that of 10 unrolled steps, and so on
    kept KB     bytes that the graph keeps for the backward pass
    from limit  the largest distance of an activation from the limit, solved in float64
    gradient    distance of m's gradient from the limit's, relative
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from experiment.command_line import keep_freed_memory
from kernels.equilibrium import equilibrium
from models_fully_local import Activation, lateral_dynamics
from train import graph_bytes

SIGMA, FACTOR = Activation("sigmoid", 4.0), 0.2
STEPS, TOLERANCES = (10, 30, 100), (1e-3, 1e-5)


class Problem:
    """Preactivations and lateral weights, and a gradient to pull back."""

    def __init__(self, batch: int, units: int, strength: float) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator)
        patterns = normal(units, 8)
        m = of_norm(1.0, -patterns @ patterns.T) + of_norm(0.1, normal(units, units))
        m = of_norm(strength, m)
        self.leaves = [(0.5 * normal(batch, units)).requires_grad_(), m.requires_grad_()]
        self.grad = normal(batch, units)
        exact = Problem.__new__(Problem)
        exact.leaves = [t.detach().double().requires_grad_() for t in self.leaves]
        exact.grad = self.grad.double()
        self.limit = exact.solved(partial(exact.equilibrium, 1e-12))

    def unrolled(self, steps: int) -> Tensor:
        return lateral_dynamics(*self.leaves, SIGMA, steps, FACTOR)

    def equilibrium(self, tolerance: float) -> Tensor:
        return equilibrium(*self.leaves, SIGMA, tolerance=tolerance, max_steps=1000)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        ways = {f"{k} steps": partial(self.unrolled, k) for k in STEPS}
        return ways | {f"equilibrium {t:.0e}": partial(self.equilibrium, t) for t in TOLERANCES}

    def solved(self, way: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """y and the gradient by m."""
        y = way()
        return y.detach(), torch.autograd.grad(y, self.leaves, self.grad)[1]

    def errors(self, way: Callable[[], Tensor]) -> tuple[float, float]:
        """Largest distance of y from the limit, and the relative one of m's gradient."""
        (y, grad), (limit, limit_grad) = self.solved(way), self.limit
        return float((y - limit).abs().max()), float((grad - limit_grad).norm() / limit_grad.norm())

    def milliseconds(self, way: Callable[[], Tensor]) -> float:
        begin = time.process_time()
        self.solved(way)
        return 1e3 * (time.process_time() - begin)


def of_norm(size: float, matrix: Tensor) -> Tensor:
    return size * matrix / torch.linalg.matrix_norm(matrix, 2)


def table(problem: Problem, repeat: int) -> None:
    """Prints a row per way."""
    ways = problem.ways()
    errors = {name: problem.errors(way) for name, way in ways.items()}
    rounds = [{n: problem.milliseconds(w) for n, w in ways.items()} for _ in range(repeat)]
    for name, way in ways.items():
        median = statistics.median(r[name] for r in rounds)
        ratios = [statistics.median(r[name] / r[f"{k} steps"] for r in rounds) for k in STEPS]
        print(f"{name:>17} {median:8.2f} " + " ".join(f"{ratio:7.2f}" for ratio in ratios)
              + f" {graph_bytes(way) / 1e3:8.0f} {errors[name][0]:11.0e} "
              f"{errors[name][1]:9.0e}")  # fmt: skip


def main() -> None:
    """Prints a table per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--strength", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"strength {arguments.strength:g}, {arguments.threads} thread(s), median of "
          f"{arguments.repeat}, torch {torch.__version__}")  # fmt: skip
    for units, batch in itertools.product(arguments.units, arguments.batches):
        print(f"{f'{units} units x {batch}':>17} {'ms':>8} "
              + " ".join(f"{f'of {k}':>7}" for k in STEPS)
              + f" {'kept KB':>8} {'from limit':>11} {'gradient':>9}")  # fmt: skip
        table(Problem(batch, units, arguments.strength), arguments.repeat)


if __name__ == "__main__":
    main()
