"""Times one update of competing units, beside the forward pass and beside formulations by products.

    python benchmarks/krotov_hopfield.py                  # one thread, under a minute
    python benchmarks/krotov_hopfield.py --repeat 15 --delta 0.1 --k 5

Convolutions: the layers of the CIFAR-10 architecture, on batches of 64.
obvious: a gate for each channel and position, and a convolution with the gates for its weights,
    whose gradient is g^T x.
limit: the forward pass of nn.Conv2d; no update can do without it.
Fully connected: 784 inputs, 2000 units, batch 100. obvious: both products, c = f(W) x and g^T x,
    and whole matrices in between; limit: the product c alone, f(W) given.
The three take turns; times are the processor's, which other processes disturb less than the clock;
times and ratios are medians over the repetitions. What the largest tensor of
an update holds is compared with input and output together.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.command_line import (
    OneLineParser,
    keep_freed_memory,
    nonnegative_float,
    positive_float,
    positive_int,
    run_command,
)
from krotov_hopfield.layers import BioConv2d, BioLinear

LAYERS = ((3, 96, 5, 32), (96, 128, 3, 14), (128, 192, 3, 12), (192, 256, 3, 5))
INPUTS, UNITS, BATCH, IMAGES, RATE = 784, 2000, 100, 64, 1e-3


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes, views apart."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.numbers, self.weight = 0, weight.data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() != self.weight:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@torch.no_grad()
def by_products(layer: BioConv2d | BioLinear, x: Tensor) -> None:
    """The update with dense gates, as the formulas stand; inputs are normalised as by the layer."""
    convolution = isinstance(layer, BioConv2d)
    norm = nn.functional.batch_norm(x, None, None, training=True)
    weight, p = layer.weight, layer.lebesgue_p
    power = weight.sign() * weight.abs() ** (p - 1)
    currents = nn.functional.conv2d(norm, power) if convolution else norm @ power.t()
    order = currents.topk(layer.competition.ranking_param, 1).indices
    g = torch.zeros_like(currents).scatter_(1, order[:, :1], 1)
    g.scatter_(1, order[:, -1:], -layer.competition.delta)
    if convolution:
        hebbian = nn.functional.conv2d(norm.transpose(0, 1), g.transpose(0, 1)).transpose(0, 1)
    else:
        hebbian = g.t() @ norm
    pull = (g * currents).transpose(0, 1).flatten(1).sum(1)
    change = hebbian - pull.view(-1, *[1] * (weight.dim() - 1)) * weight
    over = (1, 2, 3) if convolution else (0, 1)
    weight += RATE * change / (change.abs().amax(over, keepdim=True) + 1e-5)
    ((weight.abs() ** p).flatten(1).sum(1) - 1).abs().max()


def cases(args) -> list[tuple]:
    """Name, layer, input, and the forward pass, of each row."""
    options = {"lebesgue_p": args.p, "ranking_param": args.k, "delta": args.delta}
    rows = []
    for inputs, units, kernel, size in LAYERS:
        layer = BioConv2d(inputs, units, kernel, **options)
        x = torch.randn(IMAGES, inputs, size, size)
        plain = nn.Conv2d(inputs, units, kernel, bias=False)
        rows.append((f"{inputs} -> {units}, {kernel}x{kernel}, {size}x{size}", layer, x, plain))
    layer = BioLinear(INPUTS, UNITS, **options)
    plain = nn.Linear(INPUTS, UNITS, bias=False)
    rows.append((f"{INPUTS} -> {UNITS}, batch {BATCH}", layer, torch.randn(BATCH, INPUTS), plain))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints one row per layer."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=positive_int, default=9)
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--p", type=positive_float, default=3)
    parser.add_argument("--k", type=positive_int, default=2)
    parser.add_argument("--delta", type=nonnegative_float, default=0.05)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rows = cases(args)
    print(f"ms per update, p {args.p:g}, k {args.k}, batch {IMAGES}, {args.threads} thread(s), "
          f"median of {args.repeat}")  # fmt: skip
    print(f"{'layer':>24} {'obvious':>9} {'ours':>8} {'limit':>8} {'obvious/ours':>13} "
          f"{'ours/limit':>11} {'largest tensor / (in + out)':>28}")  # fmt: skip
    ratios = []
    for name, layer, x, plain in rows:
        obvious, ours, limit, faster, above = timed(layer, x, plain, args.repeat)
        with LargestTensor(layer.weight) as largest:
            layer.training_step(x, RATE)
        room = largest.numbers / (x.numel() + plain(x).numel())
        print(f"{name:>24} {obvious:9.1f} {ours:8.2f} {limit:8.2f} {faster:13.1f} {above:11.2f} "
              f"{room:28.2f}")  # fmt: skip
        ratios.append(faster)
    print(f"convolutions: {statistics.mean(ratios[:-1]):.1f} times faster on average")


@torch.no_grad()
def timed(layer, x: Tensor, plain: nn.Module, repeat: int) -> tuple[float, ...]:
    """Median milliseconds of the three, and the medians of both ratios."""
    runs = (
        lambda: by_products(layer, x),
        lambda: layer.training_step(x, RATE),
        lambda: plain(x),
    )
    for run in runs:
        run()
    rows = [[_milliseconds(run) for run in runs] for _ in range(repeat)]
    times = [statistics.median(column) for column in zip(*rows, strict=True)]
    faster = statistics.median(row[0] / row[1] for row in rows)
    above = statistics.median(row[1] / row[2] for row in rows)
    return *times, faster, above


def _milliseconds(run) -> float:
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


if __name__ == "__main__":
    run_command(main)
