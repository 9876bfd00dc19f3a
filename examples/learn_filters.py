"""Learn a rule for filters: a first layer of windows, judged behind an encoder of whole images.

    python examples/learn_filters.py --dataset cifar10 --out runs/filters
    python examples/first_layers.py --methods transfer32 runs/filters/filters.json --windows 16
    python examples/learn_filters.py --resume runs/filters

A rule of unit statistics begins with coefficients 0. In each task of a meta-step it trains units
from new initial weights, by windows from random places of images in two masked views. Their weights
are then filters: the hypergradient is that of ridge regression on what comparison/first_layers.py
makes of them on images, and goes back through all updates to the rule's coefficients, its rate and
the spread of the initial weights. filters.json, in the form of rules/zoo, holds what was learned.

`make_training` shows how units, batches and an outer loss of your own are meta-learned.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from comparison.first_layers import FilterLoss, RandomWindows
from data_sets.views import Views
from experiment.command_line import UserError, common_parser, parse, positive_int, run_command
from experiment.devices import set_up
from experiment.errors import NonFiniteError
from experiment.files import displayable
from experiment.main_settings import TERMS
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.settings import add_settings, settings_of
from experiment.view_strengths import ViewStrengths
from figures.meta_learning import plot_run
from hypgraddesc import MetaSettings, check_settings, hypgraddesc, random_steps
from initializers import SpreadInitializer
from learning_rules import PerLayerRule
from mnist_datasets import ImageData, hold_out, load_images, normalize_pixels
from models_fully_local import Activation, lateral_mlp
from rules.families import write_rule
from rules.unit_statistics import UnitStatisticsRule
from rules.zoo import Recipe, ZooEntry, save_zoo
from train import Training

ACTIVATION = Activation("sigmoid", 4.0)
META_LEARNING = ("metasteps", "lr", "warmup_steps", "decay", "clip_norm", "tasks", "adjoint_limit")


def make_parser():
    """The command's flags."""
    parser = common_parser("Learn a rule that finds filters of images.", "learn_filters")
    add = parser.add_argument_group("filters").add_argument
    add("--units", type=positive_int, default=96, help="filters")
    add("--kernel", type=positive_int, default=5, help="side of a filter, in pixels")
    add("--terms", nargs="+", default=list(TERMS), metavar="TERM",
        help="terms of the rule (see rules/unit_statistics_terms.py)")  # fmt: skip
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=positive_int, default=32, help="images of an update")
    add("--windows", type=positive_int, default=16, help="random windows of each of them")
    add("--mask", type=float, nargs=2, default=[0.3, 0.9], metavar=("LOW", "HIGH"),
        help="share of pixels that a view loses")  # fmt: skip
    add("--horizon", type=positive_int, nargs=2, default=[40, 150], metavar=("LOW", "HIGH"),
        help="updates of a task, drawn log-uniformly")  # fmt: skip
    add_settings(parser.add_argument_group("meta-learning"), MetaSettings, META_LEARNING)
    add = parser.add_argument_group("judgement").add_argument
    add("--fit_images", type=positive_int, default=1500, help="of ridge regression")
    add("--outer_images", type=positive_int, default=500, help="others, which judge it")
    add("--train_images", type=positive_int, metavar="N", help="use the first N (default: all)")
    add("--held_out", type=positive_int, metavar="IMAGES",
        help="leave so many training images to examples/first_layers.py")  # fmt: skip
    parser.set_defaults(
        dataset="cifar10", metasteps=80, lr=0.1, warmup_steps=10, decay="cosine", clip_norm=1.0,
        tasks=2, adjoint_limit=2.0,
    )  # fmt: skip
    return parser


def load_data(args, device) -> ImageData:
    """Centred training images, without those held out."""
    data, _ = load_images(args.dataset, args.data_dir)
    if args.held_out:
        data, _ = hold_out(data, args.held_out)
    if args.train_images:
        if args.train_images > len(data):
            raise UserError(f"--train_images {args.train_images}: there are {len(data)}")
        data = data.subset(slice(args.train_images))
    if min(data.shape[1:]) < args.kernel:
        raise UserError(f"--kernel {args.kernel}: images have {data.shape[1:]} pixels")
    return normalize_pixels(data, data, unit_variance=False)[0].to(device)


def make_training(args, data: ImageData, dtype) -> Training:
    """Units that see windows in two views, and the loss of their weights as filters."""
    inputs = data.shape[0] * args.kernel**2
    strengths = ViewStrengths(kind="masks", mask=tuple(args.mask))
    rule = UnitStatisticsRule.of_terms(args.terms, eps=0.1, tau=500.0)
    return Training(
        lateral_mlp(inputs, [args.units], ACTIVATION, inhibition="none"),
        PerLayerRule([rule]).to(data.images.device, dtype),
        SpreadInitializer().to(data.images.device, dtype),
        RandomWindows(
            Views(data, args.batch_size, strengths, dtype=dtype), args.windows, args.kernel
        ),
        FilterLoss(data, args.kernel, fit_images=args.fit_images, outer_images=args.outer_images),
    )


def make_settings(args) -> MetaSettings:
    """The settings of the meta-loop."""
    return settings_of(args, MetaSettings, inner_steps=random_steps(*args.horizon))


def hyperparameters(training: Training) -> dict[str, float]:
    """The rule's coefficients and the initial spread, as columns of metrics.csv."""
    groups = {
        "coefficient": training.rule.coefficients(),
        "initial": training.initializer.effective(),
    }
    return {f"{group}/{n}": v for group, values in groups.items() for n, v in values.items()}


def zoo_entry(args, training: Training, data: ImageData) -> ZooEntry:
    """The rule as it is now with all that its use needs, in the form of rules/zoo."""
    recipe = Recipe(
        training.rule,
        activation=ACTIVATION,
        conv=((args.units, args.kernel),),
        initial=training.initializer.effective(),
        views=ViewStrengths(kind="masks", mask=tuple(args.mask), center=True),
        batch_size=args.batch_size,
    )
    return ZooEntry(
        name="filters", recipe=recipe, layers=(), steps=args.horizon[1], layerwise=False,
        dataset=displayable(Path(args.dataset).name), data=data.source.split(" from ")[0],
        command=f"python examples/learn_filters.py --seed {args.seed}",
        about=f"filters of {args.kernel} x {args.kernel} pixels, learned from zero coefficients",
    )  # fmt: skip


def report(args, log: RunLog, training: Training, data: ImageData) -> None:
    """The rule as files and on the screen, the figures.

    Raises NonFiniteError if the rule's numbers overflow; filters.json is then not written.
    """
    learned = hyperparameters(training)
    write_rule(log, training.rule)
    log.write_json("results.json", {"data": data.source, **learned})
    log.plot(plot_run)
    if overflown := [name for name, value in learned.items() if not math.isfinite(value)]:
        raise NonFiniteError(f"{overflown[0]} of the learned rule: not finite; lower --lr")
    save_zoo(zoo_entry(args, training, data), log.directory / "filters.json")
    log.say(training.rule.formula())
    log.say(f"everything is in {log.directory}; examples/first_layers.py --methods "
            f"{log.directory}/filters.json judges it")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse, load, learn, report."""
    args = parse(make_parser(), argv)
    if args.horizon[0] > args.horizon[1]:
        raise UserError("--horizon takes a smaller and a larger number of updates, such as 40 150")
    device, dtype = set_up(args)
    data = load_data(args, device)
    training, settings = make_training(args, data, dtype), make_settings(args)
    check_settings(settings, training)
    with open_run(args, "learn_filters", data) as log:
        log.say(f"{len(data):,} images to learn from; {data.source}")
        recorded = partial(hyperparameters, training)
        finished = hypgraddesc(training, settings, log, hyperparameters=recorded).finished
        report(args, log, training, data)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=())
