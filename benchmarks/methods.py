"""What each way to the hypergradient reaches on the main job in equal time, and its memory.

    python benchmarks/methods.py                     # 5 seconds of meta-learning each
    python benchmarks/methods.py --seconds 300       # a comparison worth the name, half an hour

Every method learns a rule for 32 lateral-inhibitory units on MNIST from nothing, with the same
settings (Adam, clipped, batches of 256), for so many seconds, in a process of its own. Methods that
do not reach the initial distribution leave it as it is at the start.

    meta-steps   made in that time
    accuracy     of the probe on test images: mean of the last quarter of the meta-steps; the best
    peak GB      the process's largest resident size; torch and images alone take the first row's
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from experiment.command_line import keep_freed_memory
from hypgraddesc import HypergradientDescent, MetaSettings
from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import PerLayerRule, PolynomialRule
from linear_probe import ProbeLoss
from meta_gradients import Implicit, LookBack, Reverse, Strategies, Truncated
from mnist_datasets import batches, load_images
from models_fully_local import Activation, lateral_mlp
from train import Training

METHODS = {
    "reverse, keep": Reverse("keep"),
    "reverse, segments": Reverse("segments"),
    "reverse, recompute": Reverse("recompute"),
    "truncated, K = 20": Truncated(K=20),
    "truncated, K = 5": Truncated(K=5),
    "look-back, K = 20": LookBack(20),
    "implicit, K = 20": Implicit(20),
    "es, 4 pairs": Strategies(1e-4, 4),
}


def descend(method, arguments) -> list[float]:
    """The test accuracies of all meta-steps that the time allows."""
    data = load_images("mnist", arguments.data_dir)
    mode = TRAINABLE if "initializer" in method.reaches else FIXED
    settings = MetaSettings(
        lr=arguments.lr,
        warmup_steps=20,
        clip_norm=100.0,
        inner_steps=arguments.steps,
        method=method,
    )
    training = Training(
        lateral_mlp(784, [32], Activation("sigmoid", 4.0), inh_factor=0.2),
        PerLayerRule([PolynomialRule.of_degree(3, bound="tanh", forward_weight_bound=1.0)]),
        GaussianInitializer({"b": mode, "m": mode}, {"w": mode}),
        lambda generator: batches(data[0], 256, generator),
        ProbeLoss(*data, 1000.0, outer_images=4096),
    )
    descent = HypergradientDescent(training, settings, warn=lambda text: None)
    accuracies, begin = [], time.perf_counter()
    while time.perf_counter() - begin < arguments.seconds:
        accuracies.append(descent.step()["test_accuracy"])
    return accuracies


def run(name: str, arguments) -> None:
    """One method; prints its numbers, then the process's peak memory."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if name == "none":
        accuracies = []
        load_images("mnist", arguments.data_dir)
    else:
        accuracies = [a for a in descend(METHODS[name], arguments) if not math.isnan(a)]
    last = accuracies[-max(1, len(accuracies) // 4) :] or [0.0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(len(accuracies), statistics.mean(last), max(accuracies, default=0.0), peak)


def main() -> None:
    """Prints one row per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=50, help="updates of each training")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--data-dir", default="./data")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        run(arguments.method, arguments)
        return
    print(f"{arguments.seconds:g} s each, {arguments.steps} inner steps, one thread, "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'method':>19} {'meta-steps':>11} {'accuracy':>9} {'best':>7} {'peak GB':>8}")
    for name in ("none", *METHODS):
        command = [sys.executable, __file__, "--method", name, *sys.argv[1:]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        count, last, best, peak = map(float, output.split())
        print(f"{name:>19} {count:11.0f} {last:9.2%} {best:7.2%} {peak:8.2f}", flush=True)


if __name__ == "__main__":
    main()
