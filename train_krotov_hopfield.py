"""Trains layers of competing hidden units without labels, and classifiers on their features.

    python train_krotov_hopfield.py --dataset cifar10 --depth 4           four layers
    python train_krotov_hopfield.py --dataset fashion --depth 5 --classify_after 1 2 3 4 5
    python train_krotov_hopfield.py --preset dense                        2,000 units, whole images
    python train_krotov_hopfield.py --preset softhebb                     three layers, soft gates
    python train_krotov_hopfield.py --evaluate RUN/classifier_4.pt --dataset cifar10
    python train_krotov_hopfield.py --resume runs/train_krotov_hopfield-...

A preset is a network with all settings of its training; flags change single values. Layers learn by
competition alone; the accuracy of the classifier shows what their features are worth. --evaluate
trains nothing: it evaluates a network saved by a run or by BioPyTorch.
"""

import argparse
import io
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from experiment.command_line import (
    UserError,
    common_parser,
    fraction,
    nonnegative_float,
    parse,
    positive_int,
    refuse_idle_flags,
    run_command,
    save_whole_paths,
)
from experiment.settings import add_settings
from krotov_hopfield.choices import gate_needs
from krotov_hopfield.recipes import DEEPEST, RECIPES, LayerPlan, Recipe

# Flags that change the preset: per layer (one value for all, or one for each), and as a whole
COMPETITION_OF_LAYERS = ("lebesgue_p", "ranking_param", "delta", "inverse_temperature")
RATES_OF_LAYERS = ("lr", "lr_end", "lr_speed")
OF_LAYERS = ("units", "power", *COMPETITION_OF_LAYERS, *RATES_OF_LAYERS)
COMPETITION = ("gate", "normalization", "rate_exponent")
TRAINING = (
    "schedule", "rate_waits_above", "epochs", "batch_size", "augmentation", "patience",
    "patience_epochs", "threshold",
)  # fmt: skip
CLASSIFIER = (
    "feature_norm", "dropout", "classifier_epochs", "classifier_lr", "classifier_batch_size",
)  # fmt: skip
ORDERS = ("one_by_one", "together")
DIGITS = ("mnist", "mnist5k")  # which a preset crops, but does not mirror
OF_BIOPYTORCH = {  # flags of its experiments, and their equivalents here
    "--layers": "--depth", "--random": "--epochs 0", "--data_augment": "--augmentation flip",
    "--restart_db": "another --out of sweep.py",
}  # fmt: skip


class Elsewhere(argparse.Action):
    """Refuses a flag of BioPyTorch and names the equivalent one."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string} is {OF_BIOPYTORCH[option_string]} here")


def existing_file(text: str) -> Path:
    """The type of --evaluate: the path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not there, or no file")
    return Path(text)


def make_parser():
    """The command's flags; those that change the preset have the default None."""
    parser = common_parser("Train layers of competing hidden units.", "train_krotov_hopfield")
    group = parser.add_argument_group("network (default: the preset's)")
    add = group.add_argument
    add("--preset", choices=list(RECIPES), default="deep",
        help="the network and its training, which the other flags change")  # fmt: skip
    add("--depth", type=positive_int, metavar="LAYERS",
        help="number of layers (default: all of the preset's)")  # fmt: skip
    add_changes(group, LayerPlan, ("units", "power"))
    group = parser.add_argument_group("competition (default: the preset's)")
    add_changes(group, Recipe, COMPETITION)
    add_changes(group, LayerPlan, COMPETITION_OF_LAYERS)
    group = parser.add_argument_group("training of the layers (default: the preset's)")
    add_changes(group, LayerPlan, RATES_OF_LAYERS)
    add_changes(group, Recipe, TRAINING)
    group.add_argument("--order", choices=ORDERS,
        help="train layers one by one, or all of them together")  # fmt: skip
    add_changes(parser.add_argument_group("classifier (default: the preset's)"), Recipe, CLASSIFIER)
    add = parser.add_argument_group("images and rounds").add_argument
    add("--train_images", type=positive_int, metavar="N",
        help="use only the first N training images (default: all)")  # fmt: skip
    add("--validation", type=fraction, default=0.2,
        help="fraction of the images held out to select a classifier's epoch")  # fmt: skip
    add("--classify_after", type=positive_int, nargs="+", metavar="LAYER",
        help="layers after which a classifier is trained (default: the last)")  # fmt: skip
    add("--round_batches", type=positive_int, default=100,
        help="batches of a layer in a round, which is a row of metrics.csv")  # fmt: skip
    add(
        "--evaluate",
        type=existing_file,
        metavar="FILE",
        help="only evaluate the network saved in FILE",
    )
    add("--cache", type=nonnegative_float, metavar="GB",
        help="most memory for features that are kept (default: 4; on a GPU half of its own)",
    )  # fmt: skip
    for flag in OF_BIOPYTORCH:
        add(flag, nargs="*", action=Elsewhere, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def add_changes(group, settings: type, names: Sequence[str]) -> None:
    """Add flags that change these values of the preset."""
    each_layer = settings is LayerPlan
    add_settings(group, settings, names, each_layer=each_layer, **dict.fromkeys(names))


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import torch
from torch import nn

from data_sets.image_data import ImageData
from experiment.devices import set_up
from experiment.files import write_whole
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import seeded_generator
from experiment.tables import aligned
from figures.competition import plot_competition_run
from kernels.recorded_updates import CudaRecording
from krotov_hopfield import (
    BioConv2d,
    BioLinear,
    CompetitionError,
    KrotovHopfieldNetwork,
    LayerwiseTraining,
    load_network,
    network_to_dict,
    parameter_table,
    split_validation,
)
from mnist_datasets import load_images

EVALUATED_AT_ONCE = 256  # images


def make_recipe(args) -> Recipe:
    """The preset with the changes of the flags; raises UserError if they do not suit it."""
    deepest = DEEPEST[args.preset]
    depth = args.depth or deepest
    if depth > deepest:
        raise UserError(f"--depth {depth} is above that of --preset {args.preset}, {deepest}")
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
    if recipe.augmentation == "flip" and args.dataset in DIGITS:
        given.setdefault("augmentation", "crop")
    if args.order is not None:
        given["together"] = args.order == "together"
    return replace(recipe, layers=tuple(layers), **given)


def refuse_flags_without_effect(args, parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """Raise UserError if a flag would have no effect."""
    powers = any(plan.activation != "relu" for plan in recipe.layers)
    refuse_idle_flags(args, parser, [
        ("power", powers, "--preset dense or softhebb, whose activations have one"),
        *gate_needs(recipe.gate),
        ("lr_end lr_speed", recipe.schedule == "exponential", "--schedule exponential"),
        ("rate_waits_above", recipe.schedule != "constant", "--schedule linear or exponential"),
        ("classify_after feature_norm dropout classifier_lr classifier_batch_size",
         recipe.classifier_epochs, "--classifier_epochs of at least 1"),
    ])  # fmt: skip


class SteppedTraining(LayerwiseTraining):
    """A LayerwiseTraining whose step is a round; see `run_steps`."""

    step = LayerwiseTraining.train_round


def make_training(args, recipe: Recipe, data, classes: int, dtype) -> SteppedTraining:
    """The untrained network with its images; raises an error if they don't suit each other."""
    depth = len(recipe.layers)
    after = sorted(set(args.classify_after or [depth]))
    if after[-1] > depth:
        raise UserError(f"--classify_after {after[-1]}: the network has {depth} layers")
    train_data, validation = split_validation((data.images, data.labels), args.validation)
    network = KrotovHopfieldNetwork(data.shape, recipe, seeded_generator(args.seed), dtype=dtype)
    return SteppedTraining(
        network.to(data.images.device),
        train_data,
        validation,
        after,
        args.seed,
        classes=classes,
        round_batches=args.round_batches,
        cache_bytes=cache_bytes(args.cache, data.images.device),
        record=CudaRecording if data.images.is_cuda else None,
    )


def cache_bytes(gigabytes: float | None, device: torch.device) -> int:
    """The most memory for features that are kept; by default 4 GB, or half of a GPU's own."""
    if gigabytes is None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return int((4.0 if gigabytes is None else gigabytes) * 2**30)


def report(training: LayerwiseTraining, recipe: Recipe, test_data, log: RunLog) -> None:
    """Print the accuracies of all classifiers; write weights, results and figures."""
    params = [block.layer.state_dict() for block in training.network.blocks]
    log.write_parameters(params, test_data.shape)
    rows, convergence = [], [training.reached.get(k + 1) for k in range(len(params))]
    for depth, outcome in sorted(training.outcomes.items()):
        network = training.classifying_network(depth)
        write_whole(log.path(f"classifier_{depth}.pt"), file_of(network))
        row = {name: v for name, v in outcome.items() if name != "state"}
        rows.append({"layers": depth} | row | {
            "test_accuracy": training.test_accuracy(depth, test_data.images, test_data.labels),
            "parameters": parameters_of(network),
        })  # fmt: skip
    last = rows[-1] if rows and rows[-1]["layers"] == training.stages[-1][1][0] else {}
    log.write_results({
        "data": test_data.source,
        "recipe": asdict(recipe),
        "convergence": convergence[-1],
        "convergences": convergence,
        "classifiers": rows,
        "validation_accuracy": last.get("validation_accuracy"),
        "test_accuracy": last.get("test_accuracy"),
    })  # fmt: skip
    log.plot(plot_competition_run)
    say_parameters(training.network if not rows else network, log)
    for row in rows:
        log.say(
            f"depth {row['layers']}: test accuracy {row['test_accuracy']:.2%}, validation "
            f"{row['validation_accuracy']:.2%} in epoch {row['epoch']} of the classifier; "
            f"{row['parameters']:,} parameters"
        )
    if None not in convergence:
        values = ", ".join(f"{value:.3g}" for value in convergence)
        log.say(f"convergence by layer, of the unit farthest from rest: {values}")


def file_of(network: nn.Sequential) -> bytes:
    """The bytes of a saved network, as `load_network` reads it."""
    file = io.BytesIO()
    torch.save(network_to_dict(network), file)
    return file.getvalue()


def parameters_of(network: nn.Module) -> int:
    """The number of parameters, including those of the classifier."""
    return sum(count for _, _, count in parameter_table(network))


def say_parameters(network: nn.Module, log: RunLog) -> None:
    """Print a table with each layer, the shape of its weights, its parameters, and their sum."""
    rows = [(name, " x ".join(map(str, shape)), f"{count:,}")
            for name, shape, count in parameter_table(network)]  # fmt: skip
    total = ("all", "", f"{parameters_of(network):,}")
    for line in aligned([("layer", "weights", "parameters"), *rows, total]):
        log.say(line)


def evaluate(args, parser: argparse.ArgumentParser) -> None:
    """Evaluate a saved network on the test images.

    Raises UserError if it does not accept these images.
    """
    common = {action.dest for action in common_parser("", "train_krotov_hopfield")._actions}
    own = [name for name in vars(args) if name not in {*common, "evaluate"}]
    refuse_idle_flags(args, parser, [(" ".join(own), False, "a training: leave out --evaluate")])
    save_whole_paths(args, "evaluate")
    device, dtype = set_up(args)
    network = load_network(args.evaluate).to(dtype)
    _, test_data = load_images(args.dataset, args.data_dir)
    try:
        network(test_data.floats(slice(1), dtype))
    except (CompetitionError, RuntimeError) as problem:
        reason = str(problem).split("\n")[0]
        message = f"{args.evaluate} takes no images {list(test_data.shape)}: {reason}"
        raise UserError(message) from problem
    with open_run(args, "train_krotov_hopfield", test_data) as log:
        accuracy = accuracy_of(network.to(device), test_data.to(device), dtype)
        layers = [m for m in network.modules() if isinstance(m, BioConv2d | BioLinear)]
        log.write_parameters([layer.state_dict() for layer in layers], test_data.shape)
        row = {"layers": len(layers), "test_accuracy": accuracy,
               "parameters": parameters_of(network)}  # fmt: skip
        log.write_results({
            "data": test_data.source, "classifiers": [row], "test_accuracy": accuracy
        })  # fmt: skip
        log.plot(plot_competition_run)
        say_parameters(network, log)
        log.say(f"{test_data.source}\ntest accuracy {accuracy:.2%}")
        log.say(f"everything is in {log.directory}")


@torch.no_grad()
def accuracy_of(network: nn.Module, data: ImageData, dtype: torch.dtype) -> float:
    """The fraction of images that the network classifies as labelled."""
    right = 0
    for rows in torch.arange(len(data), device=data.images.device).split(EVALUATED_AT_ONCE):
        right += (network(data.floats(rows, dtype)).argmax(1) == data.labels[rows]).sum()
    return int(right) / len(data)


def main(argv: list[str] | None = None) -> None:
    """Data; network and its training; the loop over rounds; the report."""
    parser = make_parser()
    args = parse(parser, argv)
    if args.evaluate is not None:
        return evaluate(args, parser)
    recipe = make_recipe(args)
    refuse_flags_without_effect(args, parser, recipe)
    device, dtype = set_up(args)
    data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    used = data.subset(slice(args.train_images))
    training = make_training(args, recipe, used, data.classes, dtype)
    with open_run(args, "train_krotov_hopfield", used) as log:
        log.say(data.source)
        training.warn = log.warn
        finished = run_steps(log, training, "round", training.rounds)
        report(training, recipe, test_data, log)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(CompetitionError,))
