"""What each hypergradient method achieves on the main job in equal time, and its memory.

    python benchmarks/methods.py                     # 2 seconds of meta-learning each
    python benchmarks/methods.py --seconds 300       # a serious comparison, half an hour

Every method learns a rule for 32 lateral-inhibitory units on MNIST from scratch, with the same
settings (Adam, clipping, batches of 256), for --seconds, in its own process. Methods that do not
reach the initial distribution keep it as it is at the start. Times are those of a meta-step, as a
mean within a process; obvious: reverse mode with all updates kept.

    meta-steps   made in that time
    accuracy     of the probe on test images: mean of the last quarter of the meta-steps; the best
    peak GB      the largest resident size of the process; the first row shows that of torch and
                 images alone. On a GPU, the most memory of its tensors
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.table import (
    Clock,
    Row,
    benchmark_parser,
    numbers_of_process,
    peak_gigabytes,
    print_table,
    set_up,
)
from experiment.command_line import positive_float, positive_int, run_command
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
OBVIOUS = "reverse, keep"


def descend(method, arguments: argparse.Namespace, clock: Clock) -> tuple[list[float], float]:
    """The test accuracies of all meta-steps that the time allows, and their milliseconds."""
    data = [d.to(clock.device) for d in load_images("mnist", arguments.data_dir)]
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
    for module in training.modules.values():
        module.to(clock.device)
    descent = HypergradientDescent(training, settings, warn=lambda text: None)
    accuracies, begin = [], clock.now()
    while clock.now() - begin < 1e3 * arguments.seconds:
        accuracies.append(descent.step()["test_accuracy"])
    return accuracies, clock.now() - begin


def measure(name: str, arguments: argparse.Namespace, clock: Clock) -> None:
    """Print the numbers of one method, and its process's peak memory in GB."""
    if name == "none":
        load_images("mnist", arguments.data_dir)
        accuracies, milliseconds = [], 0.0
    else:
        accuracies, milliseconds = descend(METHODS[name], arguments, clock)
    sound = [a for a in accuracies if not math.isnan(a)]
    last = sound[-max(1, len(sound) // 4) :] or [0.0]
    print(milliseconds / max(1, len(accuracies)), len(sound), statistics.mean(last),
          max(sound, default=0.0), peak_gigabytes(clock.device))  # fmt: skip


def rows(arguments: argparse.Namespace, flags: Sequence[str]) -> Iterator[Row]:
    """One row for each method."""
    names = ("none", *METHODS)
    turns = [
        {name: numbers_of_process(__file__, [*flags, "--method", name]) for name in names}
        for _ in range(arguments.repeat)
    ]
    obvious = [turn[OBVIOUS][0] for turn in turns]
    for name in names:
        milliseconds, *others = zip(*(turn[name] for turn in turns), strict=True)
        count, last, best, peak = map(statistics.median, others)
        more = {
            "meta-steps": f"{count:.0f}",
            "accuracy": f"{last:.2%}",
            "best": f"{best:.2%}",
            "peak GB": f"{peak:.2f}",
        }
        if name == "none":
            yield Row("nothing but images", "-", None, more=more)
        else:
            yield Row(name, f"{arguments.steps} inner steps", milliseconds, obvious, more=more)


def main(argv: list[str] | None = None) -> None:
    """Print one row per method."""
    flags = sys.argv[1:] if argv is None else argv
    parser = benchmark_parser(__doc__, repeat=1)
    parser.add_argument("--seconds", type=positive_float, default=2.0)
    parser.add_argument("--steps", type=positive_int, default=50, help="updates of each training")
    parser.add_argument("--lr", type=positive_float, default=1e-4)
    parser.add_argument("--data-dir", default="./data")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args(flags)
    clock = set_up(arguments, wall=True)
    if arguments.method:
        measure(arguments.method, arguments, clock)
        return
    print_table(rows(arguments, flags), clock, f"784-32, {arguments.seconds:g} s each")


if __name__ == "__main__":
    run_command(main)
