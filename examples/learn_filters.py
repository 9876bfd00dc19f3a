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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from comparison.first_layers import FilterLoss, RandomWindows, centred_images
from comparison.learned_run import command_text
from data_sets.views import Views
from experiment.command_line import UserError, common_parser, parse, positive_int, run_command
from experiment.devices import set_up
from experiment.errors import NonFiniteError
from experiment.files import displayable
from experiment.main_settings import StatisticsSettings, refuse_idle_temperature
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.run_reader import read_json
from experiment.settings import add_settings, settings_of
from experiment.view_strengths import ViewStrengths
from figures.meta_learning import plot_run
from hypgraddesc import MetaSettings, check_settings, hypgraddesc, random_steps
from initializers import SpreadInitializer
from learning_rules import PerLayerRule
from mnist_datasets import ImageData
from models_fully_local import Activation, lateral_mlp
from rules.choices import compete
from rules.families import write_rule
from rules.unit_statistics import UnitStatisticsRule
from rules.zoo import Recipe, ZooEntry, save_zoo
from train import Training

ACTIVATION = Activation("sigmoid", 4.0)
TERMS = (*StatisticsSettings().terms, "x won", "won s w")  # units also compete
META_LEARNING = ("metasteps", "lr", "warmup_steps", "decay", "clip_norm", "tasks", "adjoint_limit")


def make_parser():
    """The command's flags."""
    parser = common_parser("Learn a rule that finds filters of images.", "learn_filters")
    group = parser.add_argument_group("filters and rule")
    group.add_argument("--units", type=positive_int, default=96, help="filters")
    group.add_argument("--kernel", type=positive_int, default=5, help="side of a filter, in pixels")
    add_settings(group, StatisticsSettings, ["terms", "beta", "learn"])
    group = parser.add_argument_group("training")
    add_settings(group, ViewStrengths, ["mask"])
    add = group.add_argument
    add("--batch_size", type=positive_int, default=32, help="images of an update")
    add("--windows", type=positive_int, default=16, help="random windows of each of them")
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
        dataset="cifar10", metasteps=60, lr=0.015, warmup_steps=6, decay="cosine", clip_norm=1.0,
        tasks=2, adjoint_limit=2.0, mask=[0.0, 0.3], terms=TERMS, learn=("eta", "beta"),
    )  # fmt: skip
    return parser


def views(args, *, center: bool = False) -> ViewStrengths:
    """The views of the flags."""
    return settings_of(args, ViewStrengths, kind="masks", center=center)


def make_training(args, data: ImageData, dtype) -> Training:
    """Units that see windows in two views, and the loss of their weights as filters."""
    inputs = data.shape[0] * args.kernel**2
    chosen = settings_of(args, StatisticsSettings)
    rule = UnitStatisticsRule.of_terms(
        chosen.terms, eta=chosen.eta, eps=chosen.eps, tau=chosen.tau, beta=chosen.beta,
        learn=chosen.learn,
    )  # fmt: skip
    return Training(
        lateral_mlp(inputs, [args.units], ACTIVATION, inhibition="none"),
        PerLayerRule([rule]).to(data.images.device, dtype),
        SpreadInitializer(chosen.spread).to(data.images.device, dtype),
        RandomWindows(
            Views(data, args.batch_size, views(args), dtype=dtype), args.windows, args.kernel
        ),
        FilterLoss(data, args.kernel, fit_images=args.fit_images, outer_images=args.outer_images),
    )


def make_settings(args) -> MetaSettings:
    """The settings of the meta-loop."""
    return settings_of(args, MetaSettings, inner_steps=random_steps(*args.horizon))


def zoo_entry(args, log: RunLog, training: Training, data: ImageData) -> ZooEntry:
    """The rule as it is now with all that its use needs, in the form of rules/zoo."""
    first, *_ = read_json(log.directory / "environment.json")  # one entry for each start
    recipe = Recipe(
        training.rule,
        activation=ACTIVATION,
        conv=((args.units, args.kernel),),
        initial=training.initializer.effective(),
        views=views(args, center=True),
        batch_size=args.batch_size,
    )
    return ZooEntry(
        name="filters", recipe=recipe, layers=(), steps=args.horizon[1], layerwise=False,
        dataset=displayable(Path(args.dataset).name), data=data.source.split(" from ")[0],
        command=command_text(first["command_line"]),
        about=f"filters of {args.kernel} x {args.kernel} pixels, learned from zero coefficients",
    )  # fmt: skip


def report(args, log: RunLog, training: Training, data: ImageData) -> None:
    """The rule as files and on the screen, the figures.

    Raises NonFiniteError if the rule's numbers overflow; filters.json is then not written.
    """
    learned = training.hyperparameter_values()
    write_rule(log, training.rule)
    log.write_json("results.json", {"data": data.source, **learned})
    log.plot(plot_run)
    if overflown := [name for name, value in learned.items() if not math.isfinite(value)]:
        raise NonFiniteError(f"{overflown[0]} of the learned rule: not finite; lower --lr")
    save_zoo(zoo_entry(args, log, training, data), log.directory / "filters.json")
    log.say(training.rule.formula())
    log.say(f"everything is in {log.directory}; examples/first_layers.py --methods "
            f"{log.directory}/filters.json judges it")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse, load, learn, report."""
    parser = make_parser()
    args = parse(parser, argv)
    refuse_idle_temperature(args, parser, compete(args.terms))
    if args.horizon[0] > args.horizon[1]:
        raise UserError("--horizon takes a smaller and a larger number of updates, such as 40 150")
    device, dtype = set_up(args)
    data, _ = centred_images(args, device)
    if min(data.shape[1:]) < args.kernel:
        raise UserError(f"--kernel {args.kernel}: images have {data.shape[1:]} pixels")
    training, settings = make_training(args, data, dtype), make_settings(args)
    check_settings(settings, training)
    with open_run(args, "learn_filters", data) as log:
        log.say(f"{len(data):,} images to learn from; {data.source}")
        recorded = training.hyperparameter_values
        finished = hypgraddesc(training, settings, log, hyperparameters=recorded).finished
        report(args, log, training, data)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=())
