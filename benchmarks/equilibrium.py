"""Times lateral inhibition, forward and backward: unrolled steps and the equilibrium.

    python benchmarks/equilibrium.py                       # one thread, under a minute
    python benchmarks/equilibrium.py --strength 10 --units 32

Preactivations s are random. Lateral weights m resemble those that main.py learns: units inhibit
each other by the correlation of eight random patterns, with a tenth of noise that is neither
symmetric nor inhibitory; their spectral norm, 2 to 13 in main.py, is --strength. The sigmoid has
slope 4, steps have size 0.2. Times are those of y and of its gradients by s and m.

    obvious     100 unrolled steps, about as close to the limit as the equilibrium at 1e-5
    kept KB     kilobytes that the graph keeps for the backward pass
    from limit  the largest distance of an activation from the limit, solved in float64
    gradient    relative distance of m's gradient from that of the limit
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_float, positive_int, run_command
from kernels.equilibrium import equilibrium
from models_fully_local import Activation, lateral_dynamics
from train import graph_bytes

SIGMA, FACTOR = Activation("sigmoid", 4.0), 0.2
STEPS, TOLERANCES = (10, 30, 100), (1e-3, 1e-5)
OBVIOUS = "100 steps"


class Problem:
    """Preactivations, lateral weights, and a gradient to pull back."""

    def __init__(self, batch: int, units: int, strength: float, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

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
        """y and the gradient with respect to m."""
        y = way()
        return y.detach(), torch.autograd.grad(y, self.leaves, self.grad)[1]

    def errors(self, way: Callable[[], Tensor]) -> tuple[float, float]:
        """The largest distance of y from the limit, and the relative distance of m's gradient."""
        (y, grad), (limit, limit_grad) = self.solved(way), self.limit
        return float((y - limit).abs().max()), float((grad - limit_grad).norm() / limit_grad.norm())


def of_norm(size: float, matrix: Tensor) -> Tensor:
    return size * matrix / torch.linalg.matrix_norm(matrix, 2)


def rows(problem: Problem, sizes: str, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each way to compute it."""
    ways = problem.ways()
    times = clock.in_turns({n: partial(problem.solved, way) for n, way in ways.items()}, repeat)
    for name, way in ways.items():
        activation, gradient = problem.errors(way)
        more = {
            "kept KB": f"{graph_bytes(way) / 1e3:.0f}",
            "from limit": f"{activation:.0e}",
            "gradient": f"{gradient:.0e}",
        }
        yield Row(name, sizes, times[name], obvious=times[OBVIOUS], more=more)


def main(argv: list[str] | None = None) -> None:
    """Print a row for each size and way."""
    parser = benchmark_parser(__doc__, repeat=9)
    parser.add_argument("--units", type=positive_int, nargs="+", default=[32, 256])
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[256, 1024])
    parser.add_argument("--strength", type=positive_float, default=3.0)
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    lines = (
        rows(
            Problem(batch, units, arguments.strength, clock.device),
            f"{units} units x {batch}", arguments.repeat, clock,
        )
        for units, batch in itertools.product(arguments.units, arguments.batches)
    )  # fmt: skip
    common = f"lateral strength {arguments.strength:g}"
    print_table(itertools.chain.from_iterable(lines), clock, common)


if __name__ == "__main__":
    run_command(main)
