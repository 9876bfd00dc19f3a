"""Times hypergradients of unrolled SGD and of a fixed point, and measures their memory.

    python benchmarks/hypergradient_methods.py            # one thread, under a minute
    python benchmarks/hypergradient_methods.py --steps 200 --repeat 9
    pip install --no-deps -r benchmarks/requirements.txt  # adds the rows of torchopt

Unrolled: 100 steps on a 784-256-10 network, batches of 256, hyperparameters the step size and an L2
weight. Fixed point: multinomial logistic regression with an L2 weight for each pixel, 20 products.

    obvious     reverse_unroll, and CG at the fixed point
    limit       only the inner run, without a graph: of a step's four large matrix products (two
                forward, two backward) it needs two, and every method without the graph's memory
                needs one or two more; at the fixed point, one graph of the map and as many
                backward passes through it
    MB          the most megabytes in tensors alive at once; on a CPU, as torch.profiler counts them
    difference  relative difference of the result from that of the obvious way
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before importing torch: silences the profiler

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import profile

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_int, run_command
from hypergradients.inner_optimizers import GradientDescent
from hypergradients.methods import CG, checkpointed_reverse, neumann, reverse, reverse_unroll

BATCH, PIXELS, UNITS, CLASSES, BATCHES = 256, 784, 256, 10, 20
PRODUCTS, ROWS = 20, 2000
HAS_TORCHOPT = importlib.util.find_spec("torchopt") is not None


def _labelled(
    count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random pixels [count, PIXELS] and labels [count]."""
    pixels = torch.rand(count, PIXELS, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return pixels.to(device), labels.to(device)


class Unrolled:
    """SGD on a network with one hidden layer; each way returns d outer loss / d (step size, L2)."""

    def __init__(self, steps: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(UNITS, PIXELS), (UNITS,), (CLASSES, UNITS), (CLASSES,)]
        start = [torch.randn(s, generator=generator) * s[-1] ** -0.5 for s in shapes]
        self.start = [t.to(device) for t in start]
        data = [_labelled(BATCH, generator, device) for _ in range(BATCHES)]
        self.batches = [data[t % BATCHES] for t in range(steps)]
        self.hparams = [
            torch.tensor(value, device=device).requires_grad_() for value in (0.1, 1e-3)
        ]

    def cross_entropy(self, params: list[Tensor], batch) -> Tensor:
        hidden = torch.relu(linear(batch[0], params[0], params[1]))
        return cross_entropy(linear(hidden, params[2], params[3]), batch[1])

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor], batch) -> Tensor:
        penalty = sum(p.square().sum() for p in params)
        return self.cross_entropy(params, batch) + hparams[1] * penalty

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return self.cross_entropy(params, self.batches[0])

    def maps(self) -> list[GradientDescent]:
        def step_size(hparams: list[Tensor]) -> Tensor:
            return hparams[0]

        return [GradientDescent(self.inner_loss, step_size, batch) for batch in self.batches]

    def history(self) -> list[list[Tensor]]:
        states = [self.start]
        for update in self.maps():
            states.append(update(states[-1], self.hparams, create_graph=False))
        return states

    def inner_run(self) -> None:
        params = self.start
        for update in self.maps():
            params = update(params, self.hparams, create_graph=False)

    def unroll(self) -> list[Tensor]:
        params = self.start
        for update in self.maps():
            params = update(params, self.hparams)
        return reverse_unroll(params, self.hparams, self.outer_loss, set_grad=False)

    def reverse(self) -> list[Tensor]:
        return reverse(self.history(), self.hparams, self.maps(), self.outer_loss, set_grad=False)

    def checkpointed(self) -> list[Tensor]:
        return checkpointed_reverse(
            self.start, self.hparams, self.maps(), self.outer_loss, set_grad=False
        )

    def torchopt(self) -> list[Tensor]:
        import torchopt

        optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=self.hparams[0]))
        params = tuple(p.clone().requires_grad_() for p in self.start)
        for batch in self.batches:
            params = optimizer.step(self.inner_loss(params, self.hparams, batch), params)
        return list(torch.autograd.grad(self.outer_loss(params, self.hparams), self.hparams))

    def ways(self) -> dict[str, Callable]:
        ways = {
            "inner run": self.inner_run,
            "reverse_unroll": self.unroll,
            "reverse": self.reverse,
            "checkpointed_reverse": self.checkpointed,
        }
        return ways | ({"torchopt unroll": self.torchopt} if HAS_TORCHOPT else {})


class FixedPoint:
    """Logistic regression; each way returns d outer loss / d L2 after PRODUCTS iterations."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = (_labelled(ROWS, generator, device) for _ in range(2))
        self.hparams = [torch.full((PIXELS,), 1e-3, device=device).requires_grad_()]
        self.map = GradientDescent(self.inner_loss, 0.02)
        params = [torch.zeros(CLASSES, PIXELS, device=device)]
        for _ in range(30):
            params = self.map(params, self.hparams, create_graph=False)
        self.params = params

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        penalty = 0.5 * (hparams[0] * params[0].square()).sum()
        x, labels = self.inner
        return cross_entropy(linear(x, params[0]), labels) + penalty

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        x, labels = self.outer
        return cross_entropy(linear(x, params[0]), labels)

    def products(self) -> None:
        """One graph of the map and PRODUCTS + 1 backward passes, which all methods need."""
        params = [p.detach().requires_grad_() for p in self.params]
        mapped = self.map(params, self.hparams)
        v = params
        for _ in range(PRODUCTS + 1):
            v = torch.autograd.grad(mapped, params, v, retain_graph=True)

    def arguments(self) -> dict:
        return {
            "params": self.params, "hparams": self.hparams, "K": PRODUCTS, "fp_map": self.map,
            "outer_loss": self.outer_loss, "tol": 0.0, "set_grad": False,
        }  # fmt: skip

    def conjugate_gradient(self) -> list[Tensor]:
        return CG(**self.arguments())

    def neumann(self) -> list[Tensor]:
        return neumann(**self.arguments())

    def of_torchopt(self, solve) -> Callable[[], list[Tensor]]:
        import torchopt

        def stationary(params, l2):
            updated = params[0] - 0.02 * torch.func.grad(self.inner_loss)(params, (l2,))[0]
            return (params[0] - updated,)

        @torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solve)
        def solver(params, l2):
            return params

        def run() -> list[Tensor]:
            params = solver(tuple(self.params), self.hparams[0])
            return list(torch.autograd.grad(self.outer_loss(params, None), self.hparams))

        return run

    def ways(self) -> dict[str, Callable]:
        ways = {
            "products alone": self.products,
            "CG": self.conjugate_gradient,
            "neumann": self.neumann,
        }
        if HAS_TORCHOPT:
            from torchopt.linear_solve import solve_cg, solve_inv

            exactly = {"maxiter": PRODUCTS}
            ways["torchopt CG"] = self.of_torchopt(solve_cg(rtol=0.0, atol=0.0, **exactly))
            ways["torchopt neumann"] = self.of_torchopt(solve_inv(ns=True, **exactly))
        return ways


def peak_megabytes(run: Callable, device: torch.device) -> float:
    """The most megabytes in tensors alive at once, beyond those alive before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0) / 1e6


def rows(sizes: str, ways: dict[str, Callable], repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each way; the first is the limit, the second the obvious way."""
    limit, obvious = list(ways)[:2]
    results = {name: run() for name, run in ways.items()}
    times = clock.in_turns(ways, repeat)
    for name, run in ways.items():
        alike = name.removeprefix("torchopt ")
        other = results[alike if alike in results else obvious]
        more = {
            "MB": f"{peak_megabytes(run, clock.device):.1f}",
            "difference": difference(results[name], other),
        }
        yield Row(name, sizes, times[name], times[obvious], times[limit], more)


def difference(result: list[Tensor] | None, other: list[Tensor]) -> str:
    """The largest relative difference between the two gradients of a hyperparameter."""
    if result is None:
        return "-"
    pairs = zip(result, other, strict=True)
    return f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.0e}"


def main(argv: list[str] | None = None) -> None:
    """Print a row for each method of the unrolled problem, then of the fixed point."""
    parser = benchmark_parser(__doc__, repeat=5)
    parser.add_argument("--steps", type=positive_int, default=100)
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    unrolled, fixed_point = Unrolled(arguments.steps, clock.device), FixedPoint(clock.device)
    lines = itertools.chain(
        rows(f"{arguments.steps} steps", unrolled.ways(), arguments.repeat, clock),
        rows(f"{PRODUCTS} products", fixed_point.ways(), arguments.repeat, clock),
    )
    beside = "beside it" if HAS_TORCHOPT else "is not installed"
    common = f"{PIXELS}-{UNITS}-{CLASSES}, batch {BATCH}; torchopt {beside}"
    print_table(lines, clock, common)


if __name__ == "__main__":
    run_command(main)
