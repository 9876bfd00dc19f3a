"""Measures peak memory and time of an unrolled training under every memory policy.

    python benchmarks/memory.py                     # 50 steps, under a minute
    python benchmarks/memory.py --steps 250         # the sizes of `main.py 256 32`, some minutes

Each policy runs in a process of its own: forward and backward through all steps, batch 1024, MNIST
sized inputs, 784 -> 256 -> 32. Peak memory is the process's largest resident size, of which the
interpreter and torch alone take what the first row shows.
"""

import argparse
import itertools
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from experiment.command_line import keep_freed_memory
from initializers import TRAINABLE, GaussianInitializer
from learning_rules import PerLayerRule, PolynomialRule
from models_fully_local import Activation, lateral_mlp
from train import MEMORY, train

BATCH, BATCHES = 1024, 58  # as many as an epoch of MNIST has


def run(policy: str, steps: int, layers: list[int], threads: int) -> None:
    """One forward and backward pass; prints its seconds and the process's peak memory."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(BATCH, 784, generator=generator) for _ in range(min(BATCHES, steps))]
    model = lateral_mlp(784, layers, Activation("sigmoid", 4.0), inh_factor=0.2)
    rule = PerLayerRule([PolynomialRule.of_degree(3, bound="tanh") for _ in layers])
    initializer = GaussianInitializer({"b": TRAINABLE, "m": TRAINABLE}, {"w": TRAINABLE})
    begin = time.perf_counter()
    if policy != "none":
        start = initializer(model, generator)
        params = train(model, start, itertools.cycle(batches), rule, steps, memory=policy)
        loss = sum(p.square().sum() for layer in params for p in layer.values())
        loss.backward()
    seconds = time.perf_counter() - begin
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Prints one row per policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.policy:
        run(args.policy, args.steps, args.layers, args.threads)
        return
    print(f"784 -> {' -> '.join(map(str, args.layers))}, {args.steps} steps, batch {BATCH}, "
          f"{args.threads} thread(s)")  # fmt: skip
    print(f"{'policy':>10} {'seconds':>8} {'peak GB':>8}")
    for policy in ("none", *MEMORY):
        command = [sys.executable, __file__, "--policy", policy, *sys.argv[1:]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak = map(float, output.split())
        print(f"{policy:>10} {seconds:8.1f} {peak:8.2f}", flush=True)


if __name__ == "__main__":
    main()
