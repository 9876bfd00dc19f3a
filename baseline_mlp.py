"""Baseline: a linear probe on one wide layer of random features whose distribution is learned.

    python baseline_mlp.py                       10,000 features
    python baseline_mlp.py 1000                  fewer
    python baseline_mlp.py 1000 --metasteps 0    drawn from the initial distribution
    python baseline_mlp.py --C 0.3 --pixelwise_normalization --metasteps 100 --finetune_steps 100
    python baseline_mlp.py --resume runs/baseline_mlp-...

    y = sigmoid(w x + b);   w = (mu_w + sd_w N(0, 1)) / sqrt(pixels),   b = mu_b + sd_b N(0, 1)

Means and spreads, four numbers, are learned by the hypergradient of the probe's loss; w and b
themselves are never trained. Each meta-step draws all features anew and fits the probe on
--probe_images images; by default there are fewer images for more features, to limit the cost. The
final evaluations use all images. The sign of a spread has no meaning.
"""

import math
from dataclasses import replace

from experiment.command_line import (
    common_parser,
    parse,
    positive_float,
    positive_int,
    run_command,
)
from experiment.meta_settings import MetaSettings
from experiment.settings import add_settings, settings_of

DEFAULTS = {"metasteps": 200, "lr": 0.1}  # that differ from those of MetaSettings


def make_parser():
    """The command's flags."""
    parser = common_parser("Meta-learn the distribution of random features.", "baseline_mlp")
    parser.add_argument("features", type=positive_int, nargs="?", default=10_000,
        help="number of random features, the units of the layer")  # fmt: skip
    group = parser.add_argument_group("meta-learning of the four numbers")
    add_settings(group, MetaSettings, [*DEFAULTS, "warmup_steps", "finetune_steps"], **DEFAULTS)
    add = group.add_argument
    add("--pixelwise_normalization", action="store_true",
        help="give each pixel mean 0 and variance 1")  # fmt: skip
    add = parser.add_argument_group("probe").add_argument
    add("--C", type=positive_float, default=1.0, help="inverse strength of the probe's penalty")
    add("--probe_images", type=positive_int, metavar="N",
        help="images that a meta-step's probe uses (default: 10 million / features)")  # fmt: skip
    add("--outer_images", type=positive_int, default=1024,
        help="images of the outer loss in a meta-step")  # fmt: skip
    add("--evaluations", type=positive_int, default=3,
        help="final draws, each probed on all images")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

from torch import nn

from experiment.devices import set_up
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION
from experiment.statistics import accuracy_text, mean_and_deviation
from figures.baselines import plot_mlp_run
from hypergradients import HypergradientError
from hypgraddesc import evaluate_draws, hypgraddesc
from initializers import TRAINABLE, GaussianInitializer
from learning_rules import LearningRule
from linear_probe import ProbeLoss
from mnist_datasets import ImageData, load_images, normalize_pixels
from models_fully_local import Activation, lateral_mlp
from train import Draw, Training

NUMBERS_TO_FIT = 10**7  # images x features of a meta-step, unless --probe_images is given


def make_initializer() -> GaussianInitializer:
    """Means and spreads of w and b, all trained, in units of their effect.

    There are no scalers: Adam changes each of them by about the learning rate.
    """
    trained = dict.fromkeys("wb", TRAINABLE)
    return GaussianInitializer(trained, trained, scalers=dict.fromkeys("wb", 1.0))


def make_model(inputs: int, features: int) -> nn.Module:
    """One sigmoid layer whose units do not interact."""
    return lateral_mlp(inputs, [features], Activation("sigmoid"), inhibition="none")


def make_training(args, train_data: ImageData, test_data: ImageData) -> Training:
    """The network and its distribution, without rule and batches, with the probe on few images."""
    count = args.probe_images or max(1, NUMBERS_TO_FIT // args.features)
    return Training(
        make_model(math.prod(train_data.shape), args.features),
        LearningRule(),
        make_initializer(),
        lambda generator: iter(()),
        make_outer_loss(args, *(data.subset(slice(count)) for data in (train_data, test_data))),
    )


def make_outer_loss(args, train_data: ImageData, test_data: ImageData) -> ProbeLoss:
    """The probe on these training and test images."""
    return ProbeLoss(train_data, test_data, args.C, outer_images=args.outer_images)


def report(log: RunLog, source: str, initializer, rows: list[dict[str, float]]) -> None:
    """Print and write the four numbers and the accuracies; draw the figures."""
    accuracies = mean_and_deviation("test_accuracy", [row["test_accuracy"] for row in rows])
    log.write_results({
        "data": source,
        "initializer": initializer.effective(),
        "evaluations": rows,
        **accuracies,
    })  # fmt: skip
    values = initializer.effective().items()
    log.say(", ".join(f"{name.replace('_', ' of ')} {value:.3g}" for name, value in values))
    if rows:
        log.say(f"{accuracy_text(accuracies)} over {len(rows)} draws")
    log.plot(plot_mlp_run)
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Data; network, distribution and loss; the loop; the report."""
    args = parse(make_parser(), argv)
    device, dtype = set_up(args)
    data = [part.to(device) for part in load_images(args.dataset, args.data_dir)]
    if args.pixelwise_normalization:
        data = normalize_pixels(*data)
    training = make_training(args, *data)
    initializer = training.initializer.to(device, dtype)
    settings = settings_of(args, MetaSettings, inner_steps=0)

    def numbers() -> dict[str, float]:
        return {f"initial/{name}": value for name, value in initializer.effective().items()}

    with open_run(args, "baseline_mlp", data[0]) as log:
        log.say(data[0].source)
        history = hypgraddesc(training, settings, log, hyperparameters=numbers)
        finished, rows = history.finished, []
        if finished:
            whole = replace(training, outer_loss=make_outer_loss(args, *data))
            draws = [Draw((args.seed, EVALUATION, k), 0) for k in range(args.evaluations)]
            rows, _, finished = evaluate_draws(log, whole, draws)
        report(log, data[0].source, initializer, rows)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
