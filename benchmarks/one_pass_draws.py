"""Times one-pass tuning: many draws at once or one by one, and its cost relative to plain SGD.

    python benchmarks/one_pass_draws.py            # one thread, under a minute
    python benchmarks/one_pass_draws.py --draws 200 --steps 100

A draw's weight step: Energy's 8-50-1 network on 614 random rows with full batches; learning rate,
weight decay and momentum are tuned (T 10, i 5). All draws are one batched computation, or run one
by one; obvious: a loop of torch.optim.SGD with autograd for each.

A run's step: 784-50-10 on batches of 50 random images; one run with fixed hyperparameters, the same
run tuned, and the times of their parts. The limit of the tuned run is the time of the fixed one,
plus the matrix products that tuning needs: a gradient has two with the first layer and three with
the second, a product with the Hessian two and six.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from comparison.one_pass_problems import FullBatches, ShuffledBatches
from experiment.command_line import positive_int, run_command
from one_pass.compiled_mlp import CompiledMLPObjective
from one_pass.objectives import MLPObjective, Objective
from one_pass.tuning import NAMES, Settings, Tuning, initial_hyperparameters, initial_state

EVERY, LOOK_BACK = 10, 5


def generators(runs: int) -> list[torch.Generator]:
    """One generator for each run."""
    return [torch.Generator().manual_seed(number) for number in range(runs)]


def make_tuning(
    objective: Objective,
    samples: list,
    runs: int,
    device: torch.device,
    method: str = "look_back",
) -> Tuning:
    """Runs at their start, with small learning rates."""
    settings = Settings(method, optimised=NAMES, every=EVERY, look_back=LOOK_BACK)
    drawn = initial_hyperparameters(generators(runs))
    drawn["lr"].clamp_(max=1e-2)
    drawn = {name: values.to(device) for name, values in drawn.items()}
    weights, buffers = objective.initial(generators(runs))
    state = initial_state(weights.to(device, torch.float32), buffers, drawn, settings)
    return Tuning(objective, *samples, settings, state)


class AutogradLoop:
    """The obvious way to train one run: nn.Module, torch.optim.SGD, double backward."""

    def __init__(self, inputs: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor]) -> None:
        network = nn.Sequential(nn.Linear(inputs.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
        self.network = network.to(inputs.device)
        self.parameters = list(self.network.parameters())
        self.data, self.held_out = (inputs, targets), held_out
        self.optimizer = torch.optim.SGD(self.parameters, 1e-2, momentum=0.5, weight_decay=1e-5)
        self.raw = torch.tensor([-2.0, -5.0, 0.0], device=inputs.device)
        self.adam = torch.optim.Adam([self.raw], 0.05)

    def advance(self, steps: int) -> None:
        """Make weight steps, with a hyperparameter step after each tenth."""
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


def per_step(times: list[float], steps: int) -> list[float]:
    """The times per step of times for this many steps."""
    return [t / steps for t in times]


def many_draws(draws: int, steps: int, repeat: int, clock: Clock) -> Iterator[Row]:
    """The rows for a draw's weight step, of all draws at once and of one."""
    device = clock.device
    data = torch.randn(614, 8).to(device), torch.randn(614, 1).to(device)
    held_out = torch.randn(78, 8).to(device), torch.randn(78, 1).to(device)
    samples = [FullBatches(*data), FullBatches(*held_out)]
    objective = CompiledMLPObjective((8, 50, 1), "mse")
    together = make_tuning(objective, samples, draws, device)
    alone = make_tuning(objective, samples, 1, device)
    loop = AutogradLoop(*data, held_out)
    ways = {
        "together": lambda: together.advance(steps),
        "alone": lambda: alone.advance(steps),
        "loop": lambda: loop.advance(steps),
    }
    times = clock.in_turns(ways, repeat)
    obvious, sizes = per_step(times["loop"], steps), "8-50-1, 614 rows"
    yield Row(f"{draws} draws at once", sizes, per_step(times["together"], draws * steps), obvious)
    yield Row("one draw", sizes, per_step(times["alone"], steps), obvious)


def cost_of_tuning(steps: int, repeat: int, clock: Clock) -> Iterator[Row]:
    """The rows for a run's step, with fixed and with tuned hyperparameters, and its parts."""
    device = clock.device
    data = torch.randn(5000, 784).to(device), torch.randint(10, (5000,)).to(device)
    samples = [ShuffledBatches(*data, 50, generators(1)) for _ in range(2)]
    objective = MLPObjective((784, 50, 10), "cross_entropy")
    fixed = make_tuning(objective, samples, 1, device, "fixed")
    tuned = make_tuning(objective, samples, 1, device)
    batch, state = samples[0].next(), fixed.state
    linearization = objective.linearize(state.weights, state.buffers, batch)
    vectors = torch.randn_like(linearization.gradient)

    def repeated(part: Callable[[], object]) -> Callable[[], object]:
        return lambda: [part() for _ in range(steps)]

    ways = {
        "fixed": lambda: fixed.advance(steps),
        "tuned": lambda: tuned.advance(steps),
        "a batch": repeated(samples[0].next),
        "a gradient": repeated(lambda: objective.linearize(state.weights, state.buffers, batch)),
        "a Hessian product": repeated(lambda: linearization.hessian_product(vectors)),
    }
    times = {n: per_step(t, steps) for n, t in clock.in_turns(ways, repeat).items()}
    limits = {"tuned": [products_of_tuning() * t for t in times["fixed"]]}
    for name, each in times.items():
        yield Row(name, "784-50-10, batch 50", each, limit=limits.get(name))


def products_of_tuning() -> float:
    """Multiplications in the matrix products of a tuned run, relative to those of a fixed one."""
    wide, narrow = 784 * 50, 50 * 10
    gradient = 2 * wide + 3 * narrow
    hessian_product = 2 * wide + 6 * narrow
    return 1 + (gradient + (LOOK_BACK - 1) * hessian_product) / (EVERY * gradient)


def main(argv: list[str] | None = None) -> None:
    """Print the rows for a draw's weight step, then those for a run's step."""
    parser = benchmark_parser(__doc__, repeat=7)
    parser.add_argument("--draws", type=positive_int, default=200)
    parser.add_argument("--steps", type=positive_int, default=20, help="weight steps of a turn")
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    torch.manual_seed(0)
    lines = itertools.chain(
        many_draws(arguments.draws, arguments.steps, arguments.repeat, clock),
        cost_of_tuning(10 * arguments.steps, arguments.repeat, clock),
    )
    print_table(lines, clock, f"T {EVERY}, i {LOOK_BACK}; a step each")


if __name__ == "__main__":
    run_command(main)
