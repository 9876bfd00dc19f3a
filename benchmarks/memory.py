"""Measures peak memory and time of an unrolled training with each memory policy.

    python benchmarks/memory.py                     # 50 steps, under a minute
    python benchmarks/memory.py --steps 250         # the sizes of `main.py 256 32`, some minutes

Each policy runs in its own process: forward and backward through all steps, batch 1024, inputs of
the size of MNIST's, 784 -> 256 -> 32.

    obvious     stores everything that the backward pass needs
    peak GB     the largest resident size of the process; the first row shows that of the
                interpreter and torch alone. On a GPU, the most memory of its tensors
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.table import (
    Clock,
    Row,
    benchmark_parser,
    numbers_of_process,
    peak_gigabytes,
    print_table,
    set_up,
)
from experiment.command_line import positive_int, run_command
from initializers import TRAINABLE, GaussianInitializer
from learning_rules import PerLayerRule, PolynomialRule
from models_fully_local import Activation, lateral_mlp
from train import MEMORY, train

BATCH, BATCHES = 1024, 58  # the number of batches in an epoch of MNIST
POLICIES = ("none", *MEMORY)


def unroll(policy: str, steps: int, layers: list[int], clock: Clock) -> None:
    """One forward and backward pass; prints its milliseconds and the peak memory in GB."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.rand(BATCH, 784, generator=generator).to(clock.device)
        for _ in range(min(BATCHES, steps))
    ]
    model = lateral_mlp(784, layers, Activation("sigmoid", 4.0), inh_factor=0.2)
    rules = [PolynomialRule.of_degree(3, bound="tanh") for _ in layers]
    initializer = GaussianInitializer({"b": TRAINABLE, "m": TRAINABLE}, {"w": TRAINABLE})
    rule, initializer = PerLayerRule(rules).to(clock.device), initializer.to(clock.device)

    def run() -> None:
        start = initializer(model, generator)
        params = train(model, start, itertools.cycle(batches), rule, steps, memory=policy)
        loss = sum(p.square().sum() for layer in params for p in layer.values())
        loss.backward()

    print(0.0 if policy == "none" else clock.milliseconds(run), peak_gigabytes(clock.device))


def rows(arguments: argparse.Namespace, flags: Sequence[str]) -> Iterator[Row]:
    """One row for each policy."""
    turns = [
        {p: numbers_of_process(__file__, [*flags, "--policy", p]) for p in POLICIES}
        for _ in range(arguments.repeat)
    ]
    obvious = [turn["keep"][0] for turn in turns]
    for policy in POLICIES:
        milliseconds, gigabytes = zip(*(turn[policy] for turn in turns), strict=True)
        more = {"peak GB": f"{statistics.median(gigabytes):.2f}"}
        if policy == "none":
            yield Row("nothing but imports", "-", None, more=more)
        else:
            yield Row(policy, f"{arguments.steps} steps", milliseconds, obvious, more=more)


def main(argv: list[str] | None = None) -> None:
    """Print one row per policy."""
    flags = sys.argv[1:] if argv is None else argv
    parser = benchmark_parser(__doc__, repeat=1)
    parser.add_argument("--steps", type=positive_int, default=50)
    parser.add_argument("--layers", type=positive_int, nargs="+", default=[256, 32])
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    arguments = parser.parse_args(flags)
    clock = set_up(arguments)
    if arguments.policy:
        unroll(arguments.policy, arguments.steps, arguments.layers, clock)
        return
    layers = " -> ".join(map(str, arguments.layers))
    print_table(rows(arguments, flags), clock, f"784 -> {layers}, batch {BATCH}")


if __name__ == "__main__":
    run_command(main)
