"""Times hypergradients of an unrolled SGD and of a fixed point, and measures their memory.

    python benchmarks/hypergradients.py                   # one thread, under a minute
    python benchmarks/hypergradients.py --steps 200 --repeat 9
    pip install --no-deps -r benchmarks/requirements.txt  # adds the rows of torchopt

Unrolled: 100 steps on a 784-256-10 network, batches of 256, hyperparameters the step size and an L2
weight. Fixed point: multinomial logistic regression with an L2 weight for each pixel, 20 products.
The ways take turns in one process; times are CPU seconds, ratios medians over the repetitions of
ratios within each. MB: the most bytes in tensors alive at once, as torch.profiler counts them.

    inner run       the steps alone, with no graph: the unit of the first table
    limit           of a step, four of its large matrix products, 2 forward and 2 backward, of which
                    the inner run has 2; every way without the graph's memory needs one more or two
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler would announce itself

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import profile

from experiment.command_line import keep_freed_memory
from hypergradients.inner_optimizers import GradientDescent
from hypergradients.methods import CG, checkpointed_reverse, neumann, reverse, reverse_unroll

BATCH, PIXELS, UNITS, CLASSES, BATCHES = 256, 784, 256, 10, 20
PRODUCTS, ROWS = 20, 2000
HAS_TORCHOPT = importlib.util.find_spec("torchopt") is not None


class Unrolled:
    """SGD on a network of one hidden layer; each way returns d outer loss / d (step size, L2)."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(UNITS, PIXELS), (UNITS,), (CLASSES, UNITS), (CLASSES,)]
        self.start = [torch.randn(s, generator=generator) * s[-1] ** -0.5 for s in shapes]
        data = [
            (
                torch.rand(BATCH, PIXELS, generator=generator),
                torch.randint(CLASSES, (BATCH,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
        self.batches = [data[t % BATCHES] for t in range(steps)]
        self.hparams = [torch.tensor(value).requires_grad_() for value in (0.1, 1e-3)]

    def cross_entropy(self, params: list[Tensor], batch) -> Tensor:
        hidden = torch.relu(linear(batch[0], params[0], params[1]))
        return cross_entropy(linear(hidden, params[2], params[3]), batch[1])

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor], batch) -> Tensor:
        penalty = sum(p.square().sum() for p in params)
        return self.cross_entropy(params, batch) + hparams[1] * penalty

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return self.cross_entropy(params, self.batches[0])

    def maps(self, gradient: str = "graph") -> list[GradientDescent]:
        def step_size(hparams: list[Tensor]) -> Tensor:
            return hparams[0]

        return [
            GradientDescent(self.inner_loss, step_size, batch, gradient=gradient)
            for batch in self.batches
        ]

    def history(self) -> list[list[Tensor]]:
        states = [self.start]
        for update in self.maps():
            states.append(update(states[-1], self.hparams, create_graph=False))
        return states

    def inner_run(self) -> None:
        params = self.start
        for update in self.maps():
            params = update(params, self.hparams, create_graph=False)

    def unroll(self, gradient: str = "graph") -> list[Tensor]:
        params = self.start
        for update in self.maps(gradient):
            params = update(params, self.hparams)
        return reverse_unroll(params, self.hparams, self.outer_loss, set_grad=False)

    def mixed(self) -> list[Tensor]:
        return self.unroll("mixed")

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
            "mixed mode": self.mixed,
        }
        return ways | ({"torchopt unroll": self.torchopt} if HAS_TORCHOPT else {})


class FixedPoint:
    """Logistic regression; each way returns d outer loss / d L2 after PRODUCTS iterations."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.x_outer = (torch.rand(ROWS, PIXELS, generator=generator) for _ in range(2))
        self.y, self.y_outer = (
            torch.randint(CLASSES, (ROWS,), generator=generator) for _ in range(2)
        )
        self.hparams = [torch.full((PIXELS,), 1e-3).requires_grad_()]
        self.map = GradientDescent(self.inner_loss, 0.02)
        params = [torch.zeros(CLASSES, PIXELS)]
        for _ in range(30):
            params = self.map(params, self.hparams, create_graph=False)
        self.params = params

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        penalty = 0.5 * (hparams[0] * params[0].square()).sum()
        return cross_entropy(linear(self.x, params[0]), self.y) + penalty

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return cross_entropy(linear(self.x_outer, params[0]), self.y_outer)

    def products(self) -> None:
        """One graph of the map, PRODUCTS + 1 backward passes through it: the least of all."""
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


def timed(run: Callable) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def peak_megabytes(run: Callable) -> float:
    """The most bytes in tensors that were alive at once, beyond those alive before."""
    with profile(profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0) / 1e6


def table(problem: str, ways: dict[str, Callable], repeat: int) -> None:
    """Prints a row per way: seconds, ratios, memory, and how far its result is from another's."""
    results = {name: run() for name, run in ways.items()}
    rounds = [{n: timed(run) for n, run in ways.items()} for _ in range(repeat)]
    unit, plain = list(ways)[:2]
    print(f"{problem:>21} {'seconds':>8} {'of ' + unit:>18} {'of ' + plain:>18} {'MB':>6} "
          f"{'difference':>11}")  # fmt: skip
    for name, run in ways.items():
        seconds = statistics.median(r[name] for r in rounds)
        ratios = [statistics.median(r[name] / r[n] for r in rounds) for n in (unit, plain)]
        of = name.removeprefix("torchopt ")
        off = difference(results[name], results[of if of in results else plain])
        print(f"{name:>21} {seconds:8.3f} {ratios[0]:18.2f} {ratios[1]:18.2f} "
              f"{peak_megabytes(run):6.1f} {off:>11}")  # fmt: skip


def difference(result: list[Tensor] | None, other: list[Tensor]) -> str:
    """The largest relative distance of a hyperparameter's gradient from another's."""
    if result is None:
        return ""
    pairs = zip(result, other, strict=True)
    return f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.0e}"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    size = f"{arguments.steps} steps of {PIXELS}-{UNITS}-{CLASSES}, batch {BATCH}"
    print(f"{size}; {PRODUCTS} products; {arguments.threads} thread(s), median of "
          f"{arguments.repeat}, torch {torch.__version__}, "
          f"torchopt {'beside it' if HAS_TORCHOPT else 'is not installed'}")  # fmt: skip
    table("unrolled", Unrolled(arguments.steps).ways(), arguments.repeat)
    table("fixed point", FixedPoint().ways(), arguments.repeat)


if __name__ == "__main__":
    main()
