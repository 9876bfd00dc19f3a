"""Times one-pass tuning: many draws at once beside one by one, and its cost beside plain SGD.

    python benchmarks/one_pass.py                  # one thread, under a minute
    python benchmarks/one_pass.py --draws 200 --steps 100

First table, Energy's 8-50-1 network on 614 random rows, full batches, learning rate, weight decay
and momentum tuned (T 10, i 5): a draw's weight step, when all draws are one batched computation
here, when they run here one by one, and when each is a loop of torch.optim.SGD with autograd.

Second table, 784-50-10 on batches of 50 random images: one run of fixed hyperparameters, the same
run tuned, and what their parts take. The limit counts matrix products alone: a gradient has two
with the first layer and three with the second, a product with the Hessian two and six.
The ways take turns; times are medians, ratios medians of those within each turn.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from comparison.one_pass_problems import FullBatches, ShuffledBatches
from experiment.command_line import keep_freed_memory
from one_pass.compiled_mlp import CompiledMLPObjective
from one_pass.objectives import MLPObjective, Objective
from one_pass.tuning import NAMES, Settings, Tuning, initial_hyperparameters, initial_state

EVERY, LOOK_BACK = 10, 5


def generators(runs: int) -> list[torch.Generator]:
    """One for each run."""
    return [torch.Generator().manual_seed(number) for number in range(runs)]


def make_tuning(
    objective: Objective, samples: list, runs: int, method: str = "look_back"
) -> Tuning:
    """Runs at their start, with small learning rates."""
    settings = Settings(method, optimised=NAMES, every=EVERY, look_back=LOOK_BACK)
    drawn = initial_hyperparameters(generators(runs))
    drawn["lr"].clamp_(max=1e-2)
    weights, buffers = objective.initial(generators(runs))
    state = initial_state(weights.float(), buffers, drawn, settings)
    return Tuning(objective, *samples, settings, state)


class AutogradLoop:
    """The obvious way to train one run: nn.Module, torch.optim.SGD, double backward."""

    def __init__(self, inputs: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor]) -> None:
        self.network = nn.Sequential(nn.Linear(inputs.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
        self.parameters = list(self.network.parameters())
        self.data, self.held_out = (inputs, targets), held_out
        self.optimizer = torch.optim.SGD(self.parameters, 1e-2, momentum=0.5, weight_decay=1e-5)
        self.raw = torch.tensor([-2.0, -5.0, 0.0])
        self.adam = torch.optim.Adam([self.raw], 0.05)

    def advance(self, steps: int) -> None:
        """Weight steps, a hyperparameter step after each tenth."""
        for number in range(1, steps + 1):
            self.optimizer.zero_grad()
            self._loss(*self.data).backward()
            if number % EVERY == 0:
                self._tune()
            self.optimizer.step()

    def _tune(self) -> None:
        gradient = torch.autograd.grad(self._loss(*self.data), self.parameters, create_graph=True)
        vectors = torch.autograd.grad(self._loss(*self.held_out), self.parameters)
        lr, total = self.optimizer.param_groups[0]["lr"], [v.clone() for v in vectors]
        for _ in range(LOOK_BACK - 1):
            products = torch.autograd.grad(gradient, self.parameters, vectors, retain_graph=True)
            vectors = [v - lr * p for v, p in zip(vectors, products, strict=True)]
            for part, v in zip(total, vectors, strict=True):
                part.add_(v)
        dot = sum((p * g.detach()).sum() for p, g in zip(total, gradient, strict=True))
        self.raw.grad = torch.stack([-dot, dot, dot])
        self.adam.step()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.network(inputs), targets)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternately(ways: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Times of each way, in turns, after one call to warm up."""
    for way in ways.values():
        way()
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeat)]
    return {name: [turn[name] for turn in turns] for name in ways}


def report(times: dict[str, list[float]], unit: float, divisors: dict[str, int]) -> None:
    """A line for each way; the ratio is to the first."""
    first = next(iter(times))
    for name, values in times.items():
        each = [value / divisors[name] for value in values]
        ratios = [
            a / divisors[name] / (b / divisors[first])
            for a, b in zip(values, times[first], strict=True)
        ]
        middle, ratio = statistics.median(each) * unit, statistics.median(ratios)
        print(f"{name:<38}{middle:>12.1f}{ratio:>10.2f}")


def many_draws(draws: int, steps: int, repeat: int) -> None:
    """The first table."""
    data = torch.randn(614, 8), torch.randn(614, 1)
    held_out = torch.randn(78, 8), torch.randn(78, 1)
    samples = [FullBatches(*data), FullBatches(*held_out)]
    objective = CompiledMLPObjective((8, 50, 1), "mse")
    together = make_tuning(objective, samples, draws)
    alone = make_tuning(objective, samples, 1)
    loop = AutogradLoop(*data, held_out)
    ways = {
        f"here, {draws} draws at once": lambda: together.advance(steps),
        "here, one draw": lambda: alone.advance(steps),
        "torch.optim.SGD and autograd, one draw": lambda: loop.advance(steps),
    }
    divisors = dict(zip(ways, (draws * steps, steps, steps), strict=True))
    print(f"\n{'weight step of a draw, tuned':<38}{'us':>12}{'ratio':>10}")
    report(alternately(ways, repeat), 1e6, divisors)


def cost_of_tuning(steps: int, repeat: int) -> None:
    """The second table."""
    data = torch.randn(5000, 784), torch.randint(10, (5000,))
    samples = [ShuffledBatches(*data, 50, generators(1)) for _ in range(2)]
    objective = MLPObjective((784, 50, 10), "cross_entropy")
    fixed = make_tuning(objective, samples, 1, "fixed")
    tuned = make_tuning(objective, samples, 1)
    batch, state = samples[0].next(), fixed.state
    found = objective.linearize(state.weights, state.buffers, batch)
    vectors = torch.randn_like(found.gradient)
    ways = {
        "fixed hyperparameters, a step": lambda: fixed.advance(steps),
        "tuned, a step": lambda: tuned.advance(steps),
        "  a batch": lambda: [samples[0].next() for _ in range(steps)],
        "  a gradient": lambda: [
            objective.linearize(state.weights, state.buffers, batch) for _ in range(steps)
        ],
        "  a product with the Hessian": lambda: [
            found.hessian_product(vectors) for _ in range(steps)
        ],
    }
    print(f"\n{'one run, 784-50-10, batch 50':<38}{'us':>12}{'ratio':>10}")
    report(alternately(ways, repeat), 1e6, dict.fromkeys(ways, steps))
    wide, narrow = 784 * 50, 50 * 10
    gradient = 2 * wide + 3 * narrow
    product = 2 * wide + 6 * narrow
    limit = (EVERY * gradient + gradient + (LOOK_BACK - 1) * product) / (EVERY * gradient)
    print(f"{'limit of tuned to fixed, by products':<38}{'':>12}{limit:>10.2f}")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="weight steps of a turn")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    many_draws(args.draws, args.steps, args.repeat)
    cost_of_tuning(10 * args.steps, args.repeat)


if __name__ == "__main__":
    main()
