"""Times meta-training and meta-testing of the LSTM optimiser on a 784-20-10 network, batch 128.

    python benchmarks/lstm_optimizer.py                  # one thread, under a minute
    python benchmarks/lstm_optimizer.py --repeat 9 --units 20 128

window: 20 steps with their meta-gradient.
    obvious: one pair of torch.nn.LSTMCell per tensor and step, and at each step loss.backward()
        through the graph of all steps before it, as in public implementations.
    limit: the 20 gradients, and one forward and backward pass of torch.nn.LSTM over the sequence.
window, one graph: obvious is the same, but each gradient is computed only with respect to its
    parameters, and one backward pass goes through all steps at the end; the limit has this
    program's LSTM pass instead of torch's.
window, sampled: 3,000 coordinates; the limit is only the 20 gradients.
step: one update under no_grad.
    obvious: the two cells without a graph. limit: only the matrix products of the two layers,
        80 x 23 and 80 x 41 per parameter.
step, Adam: the limit is the fused step of torch.optim.Adam.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_int, run_command
from experiment.seeds import seeded_generator
from learned_optimizer.coordinate_lstm import (
    LARGE_CHUNK,
    STEP_CHUNK,
    Weights,
    sequence_gradient,
)
from learned_optimizer.networks import CoordinateLSTM, log_and_sign, make_network
from learned_optimizer.optimizees import Optimizee, image_optimizee
from learned_optimizer.optimizer import LearnedOptimizer
from learned_optimizer.window_gradients import WindowLoss, start, suffix_sum_gradient

STEPS, BATCH = 20, 128
SAMPLED = 3000  # coordinates, as meta-training may sample


class ObviousOptimizer:
    """Two LSTM cells and a linear layer, called once per tensor."""

    def __init__(self, network: CoordinateLSTM, tensors: list) -> None:
        device = tensors[0].device
        self.cells = [nn.LSTMCell(2, 20, device=device), nn.LSTMCell(20, 20, device=device)]
        for cell, weights in zip(self.cells, network.lstm.all_weights, strict=True):
            cell.load_state_dict(dict(zip(cell.state_dict(), weights, strict=True)))
        self.output, self.out_mul = network.output, network.out_mul
        self.states: list = [[None, None] for _ in tensors]

    def __call__(self, tensors: list, gradients) -> list:
        moved = []
        for state, tensor, g in zip(self.states, tensors, gradients, strict=True):
            state[0] = self.cells[0](log_and_sign(g.detach().flatten()).t(), state[0])
            state[1] = self.cells[1](state[0][0], state[1])
            u = self.output(state[1][0])[:, 0]
            moved.append(tensor + self.out_mul * u.view_as(tensor))
        return moved

    def weights(self) -> list:
        return [p for m in (*self.cells, self.output) for p in m.parameters()]


class Windows:
    """The ways to compute one window."""

    def __init__(self, network: CoordinateLSTM, optimizee: Optimizee, batches: list) -> None:
        self.network, self.optimizee, self.batches = network, optimizee, batches
        device = batches[0][0].device
        self.params = optimizee.initial(seeded_generator(0), device=device)
        self.theta = optimizee.flat(self.params)[None]
        n = self.theta.numel()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(STEPS, 2, n, generator=generator).to(device)
        self.du = torch.randn(STEPS, n, generator=generator).to(device)

    def published(self) -> None:
        tensors = [t.requires_grad_() for layer in self.params for t in layer.values()]
        optimizer, total = ObviousOptimizer(self.network, tensors), 0
        loss = self._loss(tensors, self.batches[0])
        for batch in self.batches[1:]:
            for t in tensors:
                t.retain_grad()
                t.grad = None
            loss.backward(retain_graph=True)
            tensors = optimizer(tensors, [t.grad for t in tensors])
            loss = self._loss(tensors, batch)
            total = total + loss
        total.backward()

    def one_graph(self) -> None:
        tensors = [t.requires_grad_() for layer in self.params for t in layer.values()]
        optimizer, total = ObviousOptimizer(self.network, tensors), 0
        loss = self._loss(tensors, self.batches[0])
        for batch in self.batches[1:]:
            gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
            tensors = optimizer(tensors, gradients)
            loss = self._loss(tensors, batch)
            total = total + loss
        torch.autograd.grad(total, optimizer.weights())

    def _loss(self, tensors: list, batch):
        parts = iter(tensors)
        moved = [{n: next(parts) for n in layer} for layer in self.params]
        return self.optimizee.loss(moved, batch)

    def ours(self, coordinates: int | None = None) -> None:
        trainings, _ = start(self.network, self.optimizee, self.theta, [iter(self.batches)])
        generator = torch.Generator().manual_seed(0)
        suffix_sum_gradient(
            self.network, self.optimizee, trainings, STEPS, WindowLoss(),
            coordinates=coordinates, generator=generator,
        )  # fmt: skip

    def sampled(self) -> None:
        self.ours(SAMPLED)

    def gradients_only(self) -> None:
        for batch in self.batches[1:]:
            self.optimizee.gradients(self.theta, [batch])

    def limit(self) -> None:
        self.gradients_only()
        outputs, _ = self.network.lstm(self.inputs.transpose(1, 2))
        u = self.network.output(outputs)[..., 0]
        torch.autograd.grad((u * self.du).sum(), list(self.network.parameters()))

    def limit_with_our_pass(self) -> None:
        self.gradients_only()
        weights = Weights.of(self.network.lstm, self.network.output)
        state = self.network.memory(self.inputs.shape[2], self.inputs)
        sequence_gradient(weights, self.inputs, state, self.du)


class Steps:
    """The ways to compute one update."""

    def __init__(self, network: CoordinateLSTM, optimizee: Optimizee, device: torch.device) -> None:
        params = optimizee.initial(seeded_generator(0), device=device)
        self.tensors = [t.requires_grad_() for layer in params for t in layer.values()]
        generator = torch.Generator().manual_seed(0)
        for t in self.tensors:
            t.grad = 0.1 * torch.randn(t.shape, generator=generator).to(device)
        self.learned = LearnedOptimizer(self.tensors, network)
        self.torch_adam = torch.optim.Adam(self.tensors, 1e-3, fused=True)
        self.slow = ObviousOptimizer(network, self.tensors)
        n = sum(optimizee.sizes())
        chunk = min(n, STEP_CHUNK.get(device.type, LARGE_CHUNK))
        self.columns = [min(chunk, n - first) for first in range(0, n, chunk)]
        weights = Weights.of(network.lstm, network.output)
        self.products = [
            (
                w,
                torch.randn(w.shape[1], chunk, generator=generator).to(device),
                torch.empty(80, chunk, device=device),
            )
            for w in (weights.first, weights.second)
        ]

    def obvious(self) -> None:
        with torch.no_grad():
            self.slow(self.tensors, [t.grad for t in self.tensors])

    def ours(self) -> None:
        self.learned.step()

    def adam(self) -> None:
        self.torch_adam.step()

    def limit(self) -> None:
        for count, (w, x, out) in itertools.product(self.columns, self.products):
            torch.mm(w, x[:, :count], out=out[:, :count])


def problems(units: int, device: torch.device) -> tuple[Windows, Steps]:
    """The windows and the steps for a network with this many hidden units."""
    network, optimizee = make_network("lstm", 0), image_optimizee(f"sigmoid{units}")
    network, optimizee = network.to(device), optimizee.to(device)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.rand(BATCH, 1, 28, 28, generator=generator).to(device),
            torch.randint(10, (BATCH,), generator=generator).to(device),
        )
        for _ in range(STEPS + 1)
    ]
    return Windows(network, optimizee, batches), Steps(network, optimizee, device)


def rows(units: int, repeat: int, clock: Clock) -> Iterator[Row]:
    """The rows of a window and of a step, for a network with this many hidden units."""
    windows, steps = problems(units, clock.device)
    names = (
        "published", "one_graph", "ours", "sampled", "limit", "limit_with_our_pass",
        "gradients_only",
    )  # fmt: skip
    times = clock.in_turns({name: getattr(windows, name) for name in names}, repeat)
    sizes, ours = f"784-{units}-10", times["ours"]
    yield Row(f"window of {STEPS}", sizes, ours, times["published"], times["limit"])
    yield Row("window, one graph", sizes, ours, times["one_graph"], times["limit_with_our_pass"])
    yield Row(
        "window, sampled", sizes, times["sampled"], times["published"], times["gradients_only"]
    )
    names = ("obvious", "ours", "adam", "limit")
    times = clock.in_turns({name: getattr(steps, name) for name in names}, 10 * repeat)
    yield Row("step", sizes, times["ours"], times["obvious"], times["limit"])
    yield Row("step, Adam", sizes, times["ours"], limit=times["adam"])


def main(argv: list[str] | None = None) -> None:
    """Print the rows of each network."""
    parser = benchmark_parser(__doc__, repeat=5)
    parser.add_argument("--units", type=positive_int, nargs="+", default=[20])
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    lines = (rows(units, arguments.repeat, clock) for units in arguments.units)
    print_table(itertools.chain.from_iterable(lines), clock, f"batch {BATCH}")


if __name__ == "__main__":
    run_command(main)
