"""Times an update of competing units, next to the forward pass and to formulations by products.

    python benchmarks/competing_layers.py                 # one thread, under a minute
    python benchmarks/competing_layers.py --repeat 15 --delta 0.1 --k 5

Convolutions: the layers of the CIFAR-10 architecture, on batches of 64.
obvious: a gate for each channel and position, and g^T x as the gradient of a convolution with the
    gates as weights.
limit: the forward pass of nn.Conv2d, which no update can do without.
Fully connected: 784 inputs, 2000 units, batch 100. obvious: both products, c = f(W) x and g^T x,
    with whole matrices in between; limit: only the product c, for a given f(W).

    largest     elements of the largest tensor in an update, relative to input plus output
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import (
    nonnegative_float,
    positive_float,
    positive_int,
    run_command,
)
from krotov_hopfield import BioConv2d, BioLinear, CompetitionError

LAYERS = ((3, 96, 5, 32), (96, 128, 3, 14), (128, 192, 3, 12), (192, 256, 3, 5))
INPUTS, UNITS, BATCH, IMAGES, RATE = 784, 2000, 100, 64, 1e-3


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation makes, except views."""

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
    """The update with dense gates, as in the formulas; inputs are normalized as in the layer."""
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


def cases(options: dict) -> Iterator[tuple[str, str, nn.Module, Tensor, nn.Module]]:
    """Name, sizes, layer, input and forward pass for each row."""
    for inputs, units, kernel, size in LAYERS:
        layer = BioConv2d(inputs, units, kernel, **options)
        x = torch.randn(IMAGES, inputs, size, size)
        plain = nn.Conv2d(inputs, units, kernel, bias=False)
        sizes = f"{inputs} -> {units}, on {size}x{size}"
        yield f"convolution {kernel}x{kernel}", sizes, layer, x, plain
    layer = BioLinear(INPUTS, UNITS, **options)
    plain = nn.Linear(INPUTS, UNITS, bias=False)
    yield "fully connected", f"{INPUTS} -> {UNITS}", layer, torch.randn(BATCH, INPUTS), plain


@torch.no_grad()
def row(case: tuple[str, str, nn.Module, Tensor, nn.Module], repeat: int, clock: Clock) -> Row:
    """The times of the three ways to compute an update."""
    what, sizes, *parts = case
    layer, x, plain = (part.to(clock.device) for part in parts)
    ways: dict[str, Callable] = {
        "obvious": lambda: by_products(layer, x),
        "ours": lambda: layer.training_step(x, RATE),
        "limit": lambda: plain(x),
    }
    times = clock.in_turns(ways, repeat)
    with LargestTensor(layer.weight) as largest:
        layer.training_step(x, RATE)
    relative = largest.numbers / (x.numel() + plain(x).numel())
    return Row(what, sizes, **times, more={"largest": f"{relative:.2f}"})


def main(argv: list[str] | None = None) -> None:
    """Print one row per layer."""
    parser = benchmark_parser(__doc__, repeat=9)
    parser.add_argument("--p", type=positive_float, default=3)
    parser.add_argument("--k", type=positive_int, default=2)
    parser.add_argument("--delta", type=nonnegative_float, default=0.05)
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    torch.manual_seed(0)
    options = {
        "lebesgue_p": arguments.p,
        "ranking_param": arguments.k,
        "delta": arguments.delta,
    }
    common = (f"p {arguments.p:g}, k {arguments.k}, batches of {IMAGES}, "
              f"fully connected of {BATCH}")  # fmt: skip
    lines = (row(case, arguments.repeat, clock) for case in cases(options))
    print_table(lines, clock, common)


if __name__ == "__main__":
    run_command(main, wrong_input=(CompetitionError,))
