"""Times meta-training and meta-testing of the LSTM optimiser on a 784-20-10 network, batch 128.

    python benchmarks/learned_optimizer.py                  # one thread, under a minute
    python benchmarks/learned_optimizer.py --repeat 9 --units 20 128

window: 20 steps with their meta-gradient.
    published: one torch.nn.LSTMCell pair per tensor and step, and at each step loss.backward(),
        which runs through the graph of all steps before it, as in public implementations.
    one graph: the same, but each gradient only of the parameters it is of, and one backward pass
        through all steps at the end.
    limit: the 20 gradients, and one forward and backward pass of torch.nn.LSTM over the sequence;
        "own" is the same with this program's pass in the place of torch's.
step: one update under no_grad.
    obvious: the modules of "published" without a graph. adam: torch.optim.Adam's step, fused.
    limit: the matrix products of the two layers alone, 80 x 23 and 80 x 41 per parameter.
All take turns; times and ratios are medians over the repetitions.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from experiment.command_line import keep_freed_memory
from experiment.seeds import seeded_generator
from learned_optimizer.coordinate_lstm import STEP_CHUNK, Weights, sequence_gradient
from learned_optimizer.networks import CoordinateLSTM, log_and_sign, make_network
from learned_optimizer.optimizees import Optimizee, image_optimizee
from learned_optimizer.optimizer import LearnedOptimizer
from learned_optimizer.window_gradients import Objective, start, suffix_sum_gradient

STEPS, BATCH = 20, 128
SAMPLED = 3000  # coordinates of the last row: what meta-training may sample


class ObviousOptimizer:
    """Two LSTM cells and a linear layer, called once per tensor."""

    def __init__(self, network: CoordinateLSTM, tensors: list) -> None:
        self.cells = [nn.LSTMCell(2, 20), nn.LSTMCell(20, 20)]
        for cell, own in zip(self.cells, network.lstm.all_weights, strict=True):
            cell.load_state_dict(dict(zip(cell.state_dict(), own, strict=True)))
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
    """The ways through one window."""

    def __init__(self, network: CoordinateLSTM, optimizee: Optimizee, batches: list) -> None:
        self.network, self.optimizee, self.batches = network, optimizee, batches
        self.params = optimizee.initial(seeded_generator(0))
        self.theta = optimizee.flat(self.params)[None]
        n = self.theta.numel()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(STEPS, 2, n, generator=generator)
        self.du = torch.randn(STEPS, n, generator=generator)

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
            self.network, self.optimizee, trainings, STEPS, Objective(),
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

    def own_limit(self) -> None:
        self.gradients_only()
        weights = Weights.of(self.network.lstm, self.network.output)
        state = self.network.memory(self.inputs.shape[2], self.inputs)
        sequence_gradient(weights, self.inputs, state, self.du)


class Steps:
    """The ways to one update."""

    def __init__(self, network: CoordinateLSTM, optimizee: Optimizee) -> None:
        params = optimizee.initial(seeded_generator(0))
        self.tensors = [t.requires_grad_() for layer in params for t in layer.values()]
        generator = torch.Generator().manual_seed(0)
        for t in self.tensors:
            t.grad = 0.1 * torch.randn(t.shape, generator=generator)
        self.learned = LearnedOptimizer(self.tensors, network)
        self.torch_adam = torch.optim.Adam(self.tensors, 1e-3, fused=True)
        self.slow = ObviousOptimizer(network, self.tensors)
        chunk, n = STEP_CHUNK["cpu"], sum(optimizee.sizes())
        self.columns = [min(chunk, n - first) for first in range(0, n, chunk)]
        weights = Weights.of(network.lstm, network.output)
        self.products = [
            (w, torch.randn(w.shape[1], chunk, generator=generator), torch.empty(80, chunk))
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


def ways(units: int) -> tuple[Windows, Steps]:
    """Both, for a network of so many hidden units."""
    network, optimizee = make_network("lstm", 0), image_optimizee(f"sigmoid{units}")
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.rand(BATCH, 1, 28, 28, generator=generator),
         torch.randint(10, (BATCH,), generator=generator))
        for _ in range(STEPS + 1)
    ]  # fmt: skip
    return Windows(network, optimizee, batches), Steps(network, optimizee)


def measure(timed: dict, repeat: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, after one run that is not counted."""
    for run in timed.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeat):
        for name, run in timed.items():
            begin = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - begin))
    return found


def ratio(found: dict[str, list[float]], above: str, below: str) -> float:
    """The median of the ratios of paired runs."""
    pairs = zip(found[above], found[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    """Prints a table for windows, one for steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[20])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"ms, {args.threads} thread(s), median of {args.repeat}")
    for units in args.units:
        windows, steps = ways(units)
        names = (
            "published",
            "one_graph",
            "ours",
            "sampled",
            "limit",
            "own_limit",
            "gradients_only",
        )
        found = measure({name: getattr(windows, name) for name in names}, args.repeat)
        print(f"window of {STEPS} steps, 784-{units}-10")
        _print_times(found)
        print(f"  published/ours {ratio(found, 'published', 'ours'):.1f}, "
              f"one_graph/ours {ratio(found, 'one_graph', 'ours'):.1f}, "
              f"ours/limit {ratio(found, 'ours', 'limit'):.2f}, "
              f"ours/own_limit {ratio(found, 'ours', 'own_limit'):.2f}")  # fmt: skip
        names = ("obvious", "ours", "adam", "limit")
        found = measure({name: getattr(steps, name) for name in names}, 10 * args.repeat)
        print(f"step, 784-{units}-10")
        _print_times(found)
        print(f"  obvious/ours {ratio(found, 'obvious', 'ours'):.1f}, "
              f"ours/limit {ratio(found, 'ours', 'limit'):.2f}, "
              f"ours/adam {ratio(found, 'ours', 'adam'):.0f}, "
              f"limit/adam {ratio(found, 'limit', 'adam'):.0f}")  # fmt: skip


def _print_times(found: dict[str, list[float]]) -> None:
    for name, times in found.items():
        print(f"  {name:>15} {statistics.median(times):9.2f}")


if __name__ == "__main__":
    main()
