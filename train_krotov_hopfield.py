"""Trains layers of competing hidden units without labels, and a classifier on what they see.

    python train_krotov_hopfield.py --dataset cifar10 --depth 4           four layers
    python train_krotov_hopfield.py --dataset fashion --depth 5 --classify_after 1 2 3 4 5
    python train_krotov_hopfield.py --preset dense                        2,000 units, whole images
    python train_krotov_hopfield.py --preset softhebb                     three layers, soft gates
    python train_krotov_hopfield.py --resume runs/train_krotov_hopfield-...

A preset is a network and everything about its training; flags change single values of it. A layer
learns by competition alone; what the classifier gets from its features says what they are worth.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from experiment.command_line import (
    UserError,
    common_parser,
    fraction,
    nonnegative_float,
    parse,
    positive_int,
    refuse_idle_flags,
    run_command,
)
from experiment.settings import add_settings
from krotov_hopfield.choices import AUGMENTATIONS, gate_needs
from krotov_hopfield.recipes import DEEPEST, RECIPES, LayerPlan, Recipe

# what flags change in the preset: of each layer, a value for all or one for each; and of the whole
COMPETITION_OF_LAYERS = ("lebesgue_p", "ranking_param", "delta", "inverse_temperature")
RATES_OF_LAYERS = ("lr", "lr_end", "lr_speed")
OF_LAYERS = ("units", "power", *COMPETITION_OF_LAYERS, *RATES_OF_LAYERS)
COMPETITION = ("gate", "normalization", "rate_exponent")
TRAINING = ("schedule", "epochs", "batch_size", "patience", "threshold")
CLASSIFIER = (
    "feature_norm", "dropout", "classifier_epochs", "classifier_lr", "classifier_batch_size",
)  # fmt: skip


def make_parser():
    """The command's flags; those of the preset are None where they are not given."""
    parser = common_parser("Train layers of competing hidden units.", "train_krotov_hopfield")
    group = parser.add_argument_group("network (default: the preset's)")
    add = group.add_argument
    add("--preset", choices=list(RECIPES), default="deep", help="what the flags below change")
    add("--depth", type=positive_int, metavar="LAYERS", help="layers (default: all of the preset)")
    add_changes(group, LayerPlan, ("units", "power"))
    group = parser.add_argument_group("competition (default: the preset's)")
    add_changes(group, Recipe, COMPETITION)
    add_changes(group, LayerPlan, COMPETITION_OF_LAYERS)
    group = parser.add_argument_group("training of the layers (default: the preset's)")
    add_changes(group, LayerPlan, RATES_OF_LAYERS)
    add_changes(group, Recipe, TRAINING)
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--together", action="store_true", default=None, help="all layers at once")
    order.add_argument("--one_by_one", dest="together", action="store_false", default=None,
                       help="each after those before it")  # fmt: skip
    add_changes(parser.add_argument_group("classifier (default: the preset's)"), Recipe, CLASSIFIER)
    add = parser.add_argument_group("images and rounds").add_argument
    add("--augmentation", choices=AUGMENTATIONS, default="none", help="flip: crop and mirror")
    add("--train_images", type=positive_int, metavar="N", help="use so many (default: all)")
    add("--validation", type=fraction, default=0.2, help="share of them that chooses the epoch")
    add("--classify_after", type=positive_int, nargs="+", metavar="LAYER",
        help="classifiers behind these layers (default: the last)")  # fmt: skip
    add("--round_batches", type=positive_int, default=100, help="batches between two rows")
    add("--cache", type=nonnegative_float, default=4.0, metavar="GB", help="most for features")
    return parser


def add_changes(group, settings: type, names: Sequence[str]) -> None:
    """Flags that change these values of the preset."""
    each_layer = settings is LayerPlan
    add_settings(group, settings, names, each_layer=each_layer, **dict.fromkeys(names))


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import seeded_generator
from figures.competition import plot_competition_run
from krotov_hopfield import CompetitionError, HebbianNetwork, LayerwiseTraining, split_validation
from mnist_datasets import load_images


def make_recipe(args) -> Recipe:
    """The preset with what the flags change; UserError where they do not fit it."""
    deepest = DEEPEST[args.preset]
    depth = args.depth or deepest
    if depth > deepest:
        raise UserError(f"--preset {args.preset} has {deepest} layers, not {depth}")
    recipe = RECIPES[args.preset](depth)
    layers = list(recipe.layers)
    for name in OF_LAYERS:
        values = getattr(args, name)
        if values is None:
            continue
        if len(values) not in (1, depth):
            raise UserError(f"--{name} takes one value, or {depth}: one for each layer")
        values = values * depth if len(values) == 1 else values
        layers = [replace(plan, **{name: v}) for plan, v in zip(layers, values, strict=True)]
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    given = {name: v for name, v in given.items() if v is not None and name != "layers"}
    return replace(recipe, layers=tuple(layers), **given)


def refuse_flags_without_effect(args, parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """UserError where a flag would silently do nothing."""
    powers = any(plan.activation != "relu" for plan in recipe.layers)
    refuse_idle_flags(args, parser, [
        ("power", powers, "--preset dense or softhebb, whose activations have one"),
        *gate_needs(recipe.gate),
        ("lr_end lr_speed", recipe.schedule == "exponential", "--schedule exponential"),
    ])  # fmt: skip


class SteppedTraining(LayerwiseTraining):
    """A step of the loop is a round; see `run_steps`."""

    step = LayerwiseTraining.train_round


def make_training(args, recipe: Recipe, data, classes: int, dtype) -> SteppedTraining:
    """The untrained network with its images; refuses what does not fit together."""
    depth = len(recipe.layers)
    after = sorted(set(args.classify_after or [depth]))
    if after[-1] > depth:
        raise UserError(f"--classify_after {after[-1]}: the network has {depth} layers")
    train_data, validation = split_validation((data.images, data.labels), args.validation)
    network = HebbianNetwork(data.shape, recipe, seeded_generator(args.seed), dtype=dtype)
    return SteppedTraining(
        network.to(data.images.device),
        train_data,
        validation,
        after,
        args.seed,
        classes=classes,
        augmentation=args.augmentation,
        round_batches=args.round_batches,
        cache_bytes=int(args.cache * 2**30),
    )


def report(training: LayerwiseTraining, recipe: Recipe, test_data, log: RunLog) -> None:
    """The accuracies of all classifiers; weights, results and figures as files."""
    params = [block.layer.state_dict() for block in training.network.blocks]
    log.write_parameters(params, test_data.shape)
    rows = []
    for depth, outcome in sorted(training.outcomes.items()):
        row = {name: v for name, v in outcome.items() if name != "state"}
        rows.append({"layers": depth} | row | {
            "test_accuracy": training.test_accuracy(depth, test_data.images, test_data.labels)
        })  # fmt: skip
    last = rows[-1] if rows and rows[-1]["layers"] == training.stages[-1][1][0] else {}
    log.write_json("results.json", {
        "data": test_data.source,
        "recipe": asdict(recipe),
        "classifiers": rows,
        "validation_accuracy": last.get("validation_accuracy"),
        "test_accuracy": last.get("test_accuracy"),
    })  # fmt: skip
    log.plot(plot_competition_run)
    for row in rows:
        log.say(
            f"{row['layers']} layers: test accuracy {row['test_accuracy']:.2%}, validation "
            f"{row['validation_accuracy']:.2%} in epoch {row['epoch']} of the classifier"
        )


def main(argv: list[str] | None = None) -> None:
    """Data; network and its training; the loop over rounds; the report."""
    parser = make_parser()
    args = parse(parser, argv)
    recipe = make_recipe(args)
    refuse_flags_without_effect(args, parser, recipe)
    device, dtype = set_up(args)
    data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    used = data.subset(slice(args.train_images))
    training = make_training(args, recipe, used, data.classes, dtype)
    with open_run(args, "train_krotov_hopfield", used) as log:
        log.say(data.source)
        finished = run_steps(log, training, "round", training.rounds)
        report(training, recipe, test_data, log)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(CompetitionError,))
