"""Meta-learns a local learning rule for a network with lateral inhibition on images.

    python main.py 32                        one layer of 32 units
    python main.py 32 --rule unit_statistics      units that know statistics and the other view
    python main.py 256 32                    two layers, each with its own rule
    python main.py 32 --pair_inputs          a rule for pairs of augmented views
    python main.py 32 --views mixed --mask 0 0.7 --learn_views degrees      views and their strength
    python main.py 32 --rule krotov_hopfield --lr 0.02      the rate and delta of competing units
    python main.py --conv 16x5 32x3          convolutional layers, each position a sample
    python main.py 256 32 --start_from RUN   starts from the rule learned in another run
    python main.py 256 32 --layerwise --start_from RUN       the second layer's, on a fixed first
    python main.py 32 --rule unit_statistics --search tpe    a search without gradients
    python main.py --resume runs/main-...    continues an interrupted run
    torchrun --nproc_per_node 2 main.py 32 --tasks 4       tasks distributed over processes

The rule trains the network for --initial_inner_steps updates, a number that --raise_by increases up
to --max_inner_steps. The loss of a linear probe on the resulting features is differentiated through
all updates, to improve the rule and the initial distribution of the weights.
"""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from comparison.choices import BESIDE
from experiment.choices import HOST, RANDOM_NUMBERS, WITH_LATERAL_WEIGHTS
from experiment.command_line import (
    LARGEST_WHOLE,
    SwitchWithNumber,
    UserError,
    common_parser,
    fraction,
    nonnegative_float,
    nonnegative_int,
    parse,
    place_in_team,
    positive_float,
    positive_int,
    refuse_idle_flags,
    run_command,
    save_whole_paths,
)
from experiment.main_settings import (
    ProbeSettings,
    StatisticsSettings,
    UnitSettings,
    refuse_idle_temperature,
)
from experiment.meta_settings import Horizon, MetaSettings
from experiment.own_code import FORM, is_own_code, own_code_name
from experiment.search_settings import SearchSettings
from experiment.settings import add_settings, flags_of, settings_of
from experiment.view_flags import add_views, view_needs, views_of_flags
from krotov_hopfield.choices import gate_needs
from krotov_hopfield.recipes import LayerPlan, Recipe
from rules.choices import compete, have_currents, run_path

# Defaults of flags: for all rules, and for each --rule. Flags not listed here have the default of
# their field in the settings, or that of the add_... functions below.
FOR_ALL_RULES = {
    "warmup_steps": 100,
    "clip_norm": 100.0,  # with --clip_grads
    "sparsify_from": 0,  # with --sparsify
    "normalization": "matrix",
    "beside": list(BESIDE),
}
DEFAULTS = {
    "polynomial": {
        "lr": 1e-4,
        "decay": "cosine",
        "warmup_steps": 20,
        "metasteps": 900,
        "average": 0.98,
        "tasks": 2,
        "clip_grads": True,
        "initial_inner_steps": 50,
        "raise_by": 50,
        "raise_every": 60,
        "batch_size": 256,
    },
    "unit_statistics": {
        "lr": 0.1,
        "decay": "cosine",
        "warmup_steps": 10,
        "metasteps": 150,
        "tasks": 2,
        "clip_grads": True,
        "clip_norm": 1.0,
        "horizon": [40, 250],
        "adjoint_limit": 2.0,
        "lateral_power": -0.75,
        "batch_size": 256,
        "inhibition": "none",
        "views": "geometric",
        "degrees": 10.0,
        "crop": [0.75, 1.0],
        "crop_ratio": [0.8, 1.25],
        "crop_padding": 0,
        "shift": 1.0,
        "brightness": 0.8,
        "contrast": 0.1,
        "center": True,
        "probe": "sampled",
        "evaluation_steps": 250,
    },
    "krotov_hopfield": {},
}
RULES = tuple(DEFAULTS)
META_LEARNING = (
    "metasteps", "lr", "optimizer", "warmup_steps", "decay", "finetune_steps", "finetune_factor",
    "clip_norm", "tasks", "together", "average", "l1", "l2", "sparsify_from", "stop_below",
    "nonfinite",
)  # fmt: skip
INNER_TRAINING = (
    "ungraded_steps", "reinitialize_every", "accumulate", "method", "K", "sigma", "pairs",
    "loss_times", "memory", "memory_limit", "adjoint_limit", "products",
)  # fmt: skip


def make_parser(rule: str = "polynomial") -> argparse.ArgumentParser:
    """The command's flags, with the defaults for this family of rules."""
    parser = common_parser(
        "Meta-learn a local learning rule by hypergradient descent.", "main", several_datasets=True
    )
    parser.add_argument("layers", type=positive_int, nargs="*", help="units of each layer")
    for add_flags in (
        add_meta_learning,
        add_search,
        add_inner_training,
        add_views,
        add_network_and_rule,
        add_unit_statistics,
        add_competing_units,
        add_probe,
    ):
        add_flags(parser)
    parser.set_defaults(**FOR_ALL_RULES | DEFAULTS[rule])
    return parser


def named_rule(argv: Sequence[str]) -> str:
    """The family of rules that the command line names, so that --help tells its defaults."""
    words = " ".join(argv).replace("--rule=", "--rule ").split()
    named = [value for flag, value in itertools.pairwise(words) if flag == "--rule"]
    return named[-1] if named and DEFAULTS.get(named[-1]) else RULES[0]


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The flags, with the defaults of the family of rules that they name, and their parser."""
    named = named_rule(sys.argv[1:] if argv is None else argv)
    parser = make_parser(named)
    args = parse(parser, argv)
    if args.rule != named and DEFAULTS.get(args.rule):  # named in a resumed run's config.json
        parser = make_parser(args.rule)
        args = parse(parser, argv)
    return args, parser


def add_meta_learning(parser) -> None:
    """Add the flags of the meta-steps."""
    group = parser.add_argument_group("meta-learning")
    add = group.add_argument
    add("--start_from", type=run_path, metavar="RUN",
        help="start from the rule and initial parameters of a run or zoo name")  # fmt: skip
    add_settings(group, MetaSettings, META_LEARNING)
    add("--sample_outputs", type=positive_int, metavar="IMAGES",
        help="record the outputs for the first IMAGES images at each meta-step")  # fmt: skip
    add("--clip_grads", action=SwitchWithNumber, number="clip_norm", type=positive_float,
        metavar="NORM",
        help="limit the norm of each task's hypergradient to NORM or --clip_norm")  # fmt: skip
    add("--no-clip_grads", dest="clip_grads", action="store_false", default=False,
        help="do not limit the norm of hypergradients")  # fmt: skip
    add("--sparsify", action=SwitchWithNumber, number="sparsify_from", type=nonnegative_int,
        metavar="METASTEP",
        help="remove coefficients that change sign (from METASTEP on)")  # fmt: skip


def add_search(parser) -> None:
    """Add the flags of a search without hypergradients."""
    add_settings(parser.add_argument_group("search in place of hypergradients"), SearchSettings)


def add_inner_training(parser) -> None:
    """Add the flags of the training that a meta-step differentiates."""
    group = parser.add_argument_group("inner training")
    add = group.add_argument
    add("--initial_inner_steps", type=positive_int, default=250,
        help="initial number of differentiated updates of a training")  # fmt: skip
    add("--max_inner_steps", type=positive_int, default=250,
        help="largest number of differentiated updates of a training")  # fmt: skip
    add("--raise_every", type=positive_int, default=100,
        help="meta-steps between raises of this number")  # fmt: skip
    add("--raise_by", type=nonnegative_int, default=0, help="updates that each raise adds")
    add("--horizon", type=positive_int, nargs=2, metavar=("LOW", "HIGH"),
        help="draw each task's number of updates from this range, log-uniformly")  # fmt: skip
    add("--layerwise", action="store_true",
        help="train layers one after the other, and learn the rule of the last")  # fmt: skip
    add("--steps_below", type=positive_int, nargs="+", default=[], metavar="N",
        help="updates of each layer before the last (default: as many as the last)")  # fmt: skip
    add("--trainings_below", type=positive_int, metavar="N",
        help="trainings of the layers before the last (default: one for each task)")  # fmt: skip
    add("--batch_size", type=positive_int, default=1024, help="images in a batch")
    add("--random_numbers", choices=RANDOM_NUMBERS, default=HOST,
        help="where random numbers of batches, views and probes are made; evaluations always "
             "take the host's")  # fmt: skip
    add_settings(group, MetaSettings, INNER_TRAINING)
    add("--compile", action="store_true",
        help="compile the rule's update (needs a C++ compiler, on a GPU Triton)")  # fmt: skip
    add("--pixelwise_normalization", action=PixelNormalization, number="center", type=mean_alone,
        metavar="mean",
        help="give each pixel mean 0 and variance 1; mean: mean 0 only")  # fmt: skip


def add_network_and_rule(parser) -> None:
    """Add the flags of the network and of the family of rules."""
    group = parser.add_argument_group("network and rule")
    add = group.add_argument
    add("--conv", type=convolution, nargs="+", default=[], metavar="CHANNELSxKERNEL",
        help="convolutional layers before the fully connected ones, such as 16x5")  # fmt: skip
    add("--units_range", type=positive_int, nargs=2, metavar=("LOW", "HIGH"),
        help="draw the last layer's units log-uniformly for each task of a meta-step")  # fmt: skip
    add("--pool", type=positive_int, default=2,
        help="side of the squares averaged after each --conv")  # fmt: skip
    add_settings(group, UnitSettings)
    add("--rule", type=rule_name, default="polynomial", metavar="FAMILY",
        help=f"family of rules: {', '.join(RULES)}, or a class of your own, as "
             f"{FORM}")  # fmt: skip
    add("--degree", type=positive_int, default=3, help="total degree of a polynomial rule")
    add("--bound", type=nonnegative_float, default=0.1,
        help="limit of a parameter's change in an update (by tanh); 0: none")  # fmt: skip
    add("--l2_reg", type=fraction, default=0.0,
        help="decay of the network's parameters in each update")  # fmt: skip


def add_unit_statistics(parser) -> None:
    """Add the flags of --rule unit_statistics."""
    group = parser.add_argument_group("rule of unit statistics (--rule unit_statistics)")
    add_settings(group, StatisticsSettings)


def add_competing_units(parser) -> None:
    """Add the flags of --rule krotov_hopfield, which are those of train_krotov_hopfield.py."""
    group = parser.add_argument_group("rule of competing units (--rule krotov_hopfield)")
    add_settings(group, Recipe, ["gate", "normalization"])
    add_settings(group, LayerPlan, ["ranking_param", "lebesgue_p", "delta", "inverse_temperature"])
    group.add_argument("--rate", type=positive_float, default=0.02, help="initial rate of the rule")


def add_probe(parser) -> None:
    """Add the flags of the probe and the evaluation."""
    group = parser.add_argument_group("probe")
    add = group.add_argument
    add_settings(group, ProbeSettings)
    add("--objective", type=own_code_name, metavar=FORM,
        help="a function (model, params, images, labels) whose loss replaces the probe's in "
             "meta-steps; evaluations stay the probe's")  # fmt: skip
    add("--evaluations", type=positive_int, default=5,
        help="trainings with the final rule that evaluate it")  # fmt: skip
    add("--evaluation_steps", type=positive_int, metavar="UPDATES",
        help="updates of an evaluation's training (default: as in the last meta-step)")  # fmt: skip
    add("--evaluation_batch_size", type=positive_int, metavar="IMAGES",
        help="images in a batch of an evaluation's training (default: --batch_size; of rules of "
             "unit statistics 512, or all)")  # fmt: skip
    add("--held_out", type=positive_int, metavar="IMAGES",
        help="judge on this many held-out training images instead of the test images")  # fmt: skip
    add("--beside", nargs="*", choices=BESIDE, metavar="FEATURES",
        help=f"other features to judge for comparison: {', '.join(BESIDE)}")  # fmt: skip


def rule_name(text: str) -> str:
    """A family of rules, or FILE.py:CLASS with an absolute path."""
    if is_own_code(text):
        return own_code_name(text)
    if text not in RULES:
        known = ", ".join(RULES)
        raise argparse.ArgumentTypeError(f"unknown rule {text!r}; known are {known}, {FORM}")
    return text


class PixelNormalization(SwitchWithNumber):
    """The switch --pixelwise_normalization, which means --center if "mean" follows."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest if values is None else self.number, True)


def mean_alone(text: str) -> str:
    """The type of the word that may follow --pixelwise_normalization."""
    if text != "mean":
        raise argparse.ArgumentTypeError(
            f"must be mean, or nothing, not {text!r}; layers stand before it"
        )
    return text


def convolution(text: str | list) -> tuple[int, int]:
    """Channels and kernel size of a convolutional layer, from 16x5 or, as saved, [16, 5]."""
    text = "x".join(map(str, text)) if isinstance(text, list) else text
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(
            f"must be channels and kernel size, such as 16x5, not {text!r}"
        )
    channels, kernel = text.split("x")
    return int(channels), int(kernel)


if __name__ == "__main__":
    parse_flags(None)  # answers --help and wrong flags before torch is loaded

import numpy as np
import torch
from torch import Generator, Tensor, nn

from comparison.kept_references import KeptReferences
from comparison.learned_run import LearnedRun, load_run, steps_to_judge, write_for_use
from comparison.references import beside
from comparison.references import trainings as count_trainings
from comparison.rule_comparison import Setting
from data_sets.views import Views
from experiment.checkpoints import has_checkpoint
from experiment.data_names import data_titles
from experiment.devices import set_up
from experiment.opening import open_run
from experiment.own_code import FLAGS as CODE_FLAGS
from experiment.own_code import OwnCode, load_own_code
from experiment.precision import Products
from experiment.processes import Team, join_team
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, log_uniform_integer, seeded_generator
from experiment.statistics import accuracy_text, counted_trainings, mean_and_deviation
from figures.meta_learning import plot_run
from hypergradients import HypergradientError
from hypgraddesc import check_settings, evaluate_draws, hypgraddesc, random_steps, rising_steps
from initializers import (
    FIXED,
    TRAINABLE,
    GaussianInitializer,
    PerLayerInitializer,
    SpreadInitializer,
)
from learning_rules import (
    LearningRule,
    PerLayerRule,
    PolynomialPairRule,
    PolynomialRule,
    term_effects,
    term_grams,
)
from linear_probe import (
    FunctionLoss,
    ProbeLoss,
    RidgeLoss,
    SampledProbeLoss,
    extract_features,
)
from meta_gradients import METHODS
from mnist_datasets import (
    ImageData,
    ImageSets,
    batches,
    hold_out,
    load_images,
    normalize_pixels,
)
from models_fully_local import network_of_flags
from rules import write_rule
from rules.competing_units import KrotovHopfieldRule
from rules.layerwise import Inputs, LayerwiseRule, LayerwiseTraining, image_inputs
from rules.unit_statistics import UnitStatisticsRule
from train import Draw, OuterLoss, Training

NUMBERS_TO_FIT = 16 * 10**6  # images x features of a meta-step, unless --probe_images is given
# --probe_images of the other probes; with fewer per feature, fits are perfect and say nothing
SAMPLED_IMAGES, SAMPLED_FOR_A_FEATURE, RIDGE_IMAGES = 8192, 256, 2000
OUTER_IMAGES = {"logistic": 4096, "sampled": 1024, "ridge": 2000}  # sampled: of evaluations alone
EVALUATION_BATCH_SIZE = 512  # of rules of unit statistics, or all images where there are fewer
LAYER_UPDATES = ("update_layer", "respond_and_update")  # a rule of one's own has one of them
OUTER_IMAGES_IMPLICIT = 1024  # these are excluded from the fit


def refuse_flags_without_effect(args, parser) -> None:
    """Raise UserError if a flag would have no effect, or if there is no network."""
    if not args.layers and not args.conv:
        raise UserError("the network has no layer: give units, such as 32, before flags that take "
                        "several numbers, or --conv 16x5, or both")  # fmt: skip
    if args.horizon and args.horizon[0] > args.horizon[1]:
        raise UserError("--horizon takes a smaller and a larger number of updates, such as 50 250")
    below = len(args.conv) + len(args.layers) - 1
    if len(args.steps_below) not in (0, below):
        raise UserError(f"--steps_below takes {below} numbers, one for each layer before the last")
    first, most = args.initial_inner_steps, args.max_inner_steps
    windows_of_one, drawn = args.method == "pes", args.method != "pes" and args.horizon
    if first > most and not drawn:
        raise UserError(
            f"--initial_inner_steps {first} is above --max_inner_steps {most}: raise it"
        )
    raise_asked_for = args.raise_by and args.raise_by != parser.get_default("raise_by")
    if raise_asked_for and first == most and not drawn:
        raise UserError(f"--raise_by needs --initial_inner_steps below --max_inner_steps {most}")
    Products(args.products)  # raises an error if they are not available here
    if args.products != "float32" and (args.compile or args.dtype != "float32"):
        raise UserError("--products needs --dtype float32, and goes without --compile")
    if args.compile and args.sparsify:
        raise UserError("--compile does not go with --sparsify, whose rule changes: leave one out")
    if args.units_range and args.units_range[0] > args.units_range[1]:
        raise UserError("--units_range takes a smaller and a larger number of units, such as 16 64")
    if args.compile and args.units_range:
        raise UserError("--compile does not go with --units_range, whose sizes change: "
                        "leave one out")  # fmt: skip
    if args.compile and args.inhibition == "equilibrium":
        raise UserError("--compile does not go with --inhibition equilibrium: leave one out")
    if args.method == "forward" and args.inhibition == "equilibrium":
        raise UserError("--inhibition equilibrium has no forward mode: take another --method")
    unrolls = args.method in ("reverse", "truncated")
    searches, takes_gradients = args.search, not args.search
    own_objective = bool(args.objective)
    polynomial, lateral = args.rule == "polynomial", args.inhibition in WITH_LATERAL_WEIGHTS
    competing, statistics = args.rule == "krotov_hopfield", args.rule == "unit_statistics"
    refuse_idle_flags(args, parser, [
        ("lr optimizer warmup_steps decay finetune_steps finetune_factor clip_grads clip_norm "
         "average l1_reg l2_coefficients sparsify sparsify_from stop_below sample_outputs "
         "nonfinite products together method reinitialize_every ungraded_steps memory "
         "adjoint_limit compile",
         takes_gradients, "hypergradients, without --search"),
        (" ".join(n for n in flags_of(SearchSettings) if n != "search"), searches, "--search"),
        ("K", args.method in ("truncated", "lookback", "implicit", "pes"),
         "--method truncated, lookback, implicit or pes"),
        ("sigma pairs", args.method in ("es", "pes"), "--method es or pes"),
        ("horizon raise_by reinitialize_every", not windows_of_one,
         "another method than pes, whose trainings begin anew after --initial_inner_steps"),
        ("initial_inner_steps max_inner_steps raise_by raise_every", not drawn,
         needed_without_horizon(args, parser)),
        ("memory compile adjoint_limit loss_times", unrolls, "--method reverse or truncated"),
        ("memory_limit", unrolls and args.memory == "fit", "--memory fit"),
        ("probe probe_images probe_gradient", not own_objective, "the probe, without --objective"),
        ("probe_gradient", args.probe == "logistic", "--probe logistic"),
        ("clip_norm", args.clip_grads, "--clip_grads"),
        ("sparsify_from", args.sparsify, "--sparsify"),
        ("raise_every", args.raise_by, "--raise_by"),
        ("finetune_factor", args.finetune_steps, "--finetune_steps"),
        ("accumulate", args.reinitialize_every > 1 or windows_of_one,
         "--reinitialize_every of at least 2"),
        ("sample_outputs", not args.units_range and args.method != "pes",
         "networks of one width, each trained to its end: no --units_range, no --method pes"),
        ("units_range", args.layers, "a layer of units, such as 32, that evaluations have"),
        ("steps_below trainings_below", args.layerwise, "--layerwise"),
        ("trainings_below", args.steps_below, "--steps_below, the same for all tasks"),
        ("pool", args.conv, "--conv, whose output it averages"),
        ("inh_steps inh_factor", args.inhibition == "lateral", "--inhibition lateral"),
        ("forbid_self_inhibition forbid_excitation", lateral,
         "--inhibition lateral, or equilibrium"),
        ("pair_inputs views l1_reg l2_coefficients sparsify", not competing,
         "--rule polynomial or unit_statistics"),
        ("compile l2_reg degree bound", polynomial, "--rule polynomial"),
        (" ".join(flags_of(StatisticsSettings)), statistics, "--rule unit_statistics"),
        ("gate ranking_param lebesgue_p normalization rate delta inverse_temperature",
         competing, "--rule krotov_hopfield"),
        *gate_needs(args.gate),
        ("center", not args.pixelwise_normalization, "no --pixelwise_normalization, which centres"),
        *view_needs(args),
    ])  # fmt: skip
    refuse_idle_temperature(args, parser, compete(args.terms))
    needs = "a term with a lateral current, such as r"
    acts = have_currents(args.terms) or not args.lateral_power
    refuse_idle_flags(args, parser, [("lateral_power", acts, needs)])


def needed_without_horizon(args, parser) -> str:
    """What flags of a rising number of updates need, for the message: no --horizon."""
    needed = "no --horizon, which draws the number of updates"
    if not args.horizon or args.horizon != parser.get_default("horizon"):
        return needed
    low, high = args.horizon
    asked, default = args.initial_inner_steps, parser.get_default("initial_inner_steps")
    instead = f"{asked} {asked}" if asked != default else "LOW HIGH"
    return (f"{needed} and is {low} {high} by default with --rule {args.rule}: "
            f"give --horizon {instead} in its place")  # fmt: skip


# ---- data, model, rule, loss ----


def dataset_names(args) -> list[str]:
    """The names of the data sets."""
    return args.dataset if isinstance(args.dataset, list) else [args.dataset]


def load_judged(args, name: str) -> tuple[ImageData, ImageData]:
    """Training images, and the images to judge on: the test images or held-out training images."""
    train_data, test_data = load_images(name, args.data_dir)
    return hold_out(train_data, args.held_out) if args.held_out else (train_data, test_data)


def make_data(args, name: str, team: Team, device: torch.device) -> tuple[ImageData, ImageData]:
    """Training and test images of one data set."""
    data = team.first_then_others(partial(load_judged, args, name))
    train_data, test_data = (part.to(device) for part in data)
    if args.pixelwise_normalization or args.center:
        return normalize_pixels(train_data, test_data, unit_variance=args.pixelwise_normalization)
    return train_data, test_data


def make_model(args, input_shape: tuple[int, int, int], last_units: int | None = None) -> nn.Module:
    """The network, without parameters.

    Raises UserError if its convolutions do not fit the images.

    last_units: the units of its last layer, if not those of the flags.
    """
    layers = args.layers if last_units is None else [*args.layers[:-1], last_units]
    try:
        return network_of_flags(vars(args), input_shape, layers)
    except ValueError as problem:
        raise UserError(f"{problem}: take smaller kernels or squares") from problem


def make_models(args, input_shape: tuple[int, int, int]) -> Callable[[Generator], nn.Module] | None:
    """A function that draws the network of each task, or None without --units_range."""
    if not args.units_range:
        return None
    low, high = args.units_range
    return lambda generator: make_model(
        args, input_shape, log_uniform_integer(low, high, generator)
    )


def make_rule(args, own: Mapping[str, OwnCode]) -> PerLayerRule:
    """One rule per layer, of which --layerwise learns the last."""
    per_layer = LayerwiseRule if args.layerwise else PerLayerRule
    return per_layer([make_layer_rule(args, own) for _ in (*args.conv, *args.layers)])


def make_layer_rule(args, own: Mapping[str, OwnCode]) -> LearningRule:
    """The rule of a layer: a sum of terms with coefficients 0, competition, or your own."""
    if args.rule == "krotov_hopfield":
        return make_competing_rule(args)
    if args.rule == "unit_statistics":
        return make_statistics_rule(args)
    if "rule" in own:
        return make_own_rule(args, own["rule"].value)
    kind = PolynomialPairRule if views_of_flags(args) else PolynomialRule
    return kind.of_degree(
        args.degree,
        lateral=args.inhibition in WITH_LATERAL_WEIGHTS,
        bound="tanh" if args.bound else "none",
        bound_size=args.bound or 1.0,
        l2=args.l2_reg,
        forward_weight_bound=1.0,
    )


def make_statistics_rule(args) -> UnitStatisticsRule:
    """A rule with the terms of the flags, whose coefficients are 0."""
    settings = settings_of(args, StatisticsSettings)
    return UnitStatisticsRule.of_terms(
        settings.terms,
        views=2 if views_of_flags(args) else 1,
        eta=settings.eta,
        eps=settings.eps,
        tau=settings.tau,
        beta=settings.beta,
        lateral_power=settings.lateral_power,
        learn=settings.learn,
    )


def make_competing_rule(args) -> KrotovHopfieldRule:
    """The rule of competing units, with the rate, delta and temperature that learning starts from.

    Raises RuleError if a layer has fewer units than are ranked.
    """
    names = ("delta", "inverse_temperature", "gate", "ranking_param", "lebesgue_p", "normalization")
    rule = KrotovHopfieldRule(args.rate, **{name: getattr(args, name) for name in names})
    channels, last = [channels for channels, _ in args.conv], args.units_range or ()
    rule.check_units(min(*channels, *args.layers, *last, LARGEST_WHOLE))
    return rule


def make_own_rule(args, kind: type) -> LearningRule:
    """A rule of the user's own class, which is called without arguments."""
    if not (isinstance(kind, type) and issubclass(kind, LearningRule)):
        raise UserError(f"{args.rule} is no class of learning_rules.LearningRule")
    if all(getattr(kind, name) is getattr(LearningRule, name) for name in LAYER_UPDATES):
        raise UserError(f"{kind.__name__} has no update_layer(layer, old, x, s, y), which says "
                        "what a layer's parameters become")  # fmt: skip
    try:
        rule, views = kind(), 2 if views_of_flags(args) else 1
    except TypeError as error:
        raise UserError(f"{kind.__name__} must be made without arguments: {error}") from error
    if rule.views != views:
        other = f", or write views = {views} in the class"
        raise UserError(
            f"{kind.__name__} takes {rule.views} view(s) of each input, not {views}: "
            f"give --views {'geometric' if rule.views == 2 else 'none'}{other}"
        )
    if args.sparsify and kind.keep is LearningRule.keep:
        raise UserError(f"--sparsify needs a rule with a method keep, which {kind.__name__} lacks")
    return rule


def refuse_rule_that_stands_still(args, rule: PerLayerRule) -> None:
    """Raise UserError for --method implicit with terms whose coefficients are all 0.

    Without a decay every point is then a fixed point: there is no equation to solve in K steps.
    """
    values = rule.term_coefficients().values()
    solves = args.method == "implicit" and args.K > 1 and args.metasteps
    if solves and not args.l2_reg and values and not any(values):
        raise UserError("--method implicit needs a training that settles, which one with all "
                        "coefficients 0 does not: begin from a rule, --start_from RUN, or take "
                        "--method reverse")  # fmt: skip


def make_initializer(args) -> nn.Module:
    """The initial distribution, trained if the method allows it.

    With --layerwise each layer has its own, of which only the last is trained.
    """
    from_start = args.reinitialize_every == 1 and not args.ungraded_steps
    trainable = from_start and "initializer" in METHODS[args.method].reaches
    if not args.layerwise:
        return make_layer_initializer(args, trainable)
    below = [make_layer_initializer(args, False) for _ in (*args.conv, *args.layers)][1:]
    return PerLayerInitializer([*below, make_layer_initializer(args, trainable)])


def make_layer_initializer(args, trainable: bool) -> GaussianInitializer | SpreadInitializer:
    """The spread of w and the means of b and m, which have no spread.

    For rules of unit statistics, only the spread of w, on a logarithmic scale.
    """
    if args.rule == "unit_statistics":
        return SpreadInitializer(args.spread, trainable=trainable)
    mode = TRAINABLE if trainable else FIXED
    names = "bm" if args.inhibition in WITH_LATERAL_WEIGHTS else "b"
    return GaussianInitializer(dict.fromkeys(names, mode), {"w": mode})


def begin_with(
    run: LearnedRun, rule: PerLayerRule, initializer: nn.Module, batches: Callable
) -> None:
    """Take over the coefficients, initial distribution and learned views that a run ended with.

    Layers beyond that run's get the rule of its last layer. Raises UserError if it lacks a value.
    """
    layers = run.rule.rules
    for k, of_layer in enumerate(rule.rules):
        of_layer.start_from(layers[min(k, len(layers) - 1)])
    try:
        initializer.set_values(run.start)
    except KeyError as missing:
        raise UserError(f"{run.name} has learned with another inhibition: it lacks the initial "
                        f"{missing}") from missing  # fmt: skip
    if isinstance(batches, Views) and run.views is not None:
        batches.set_values(run.views)


def make_outer_loss(
    args, initializer: nn.Module, data: Sequence[ImageData], own: Mapping[str, OwnCode]
) -> OuterLoss:
    """The loss that judges a training in a meta-step.

    data: training and test images.
    """
    where = {"random_numbers": args.random_numbers}
    if "objective" in own:
        return FunctionLoss(own["objective"].value, data[0], images=args.outer_images, **where)
    if args.probe == "ridge":
        fit_images = args.probe_images or RIDGE_IMAGES
        return RidgeLoss(data[0], fit_images=fit_images, outer_images=args.outer_images, **where)
    widest = make_model(args, data[0].shape, args.units_range and args.units_range[1])
    features = count_features(widest, initializer, data[0])
    if args.probe == "sampled":
        enough = max(SAMPLED_IMAGES, SAMPLED_FOR_A_FEATURE * features)
        return SampledProbeLoss(data[0], args.C, images=args.probe_images or enough, **where)
    count = args.probe_images or max(1, NUMBERS_TO_FIT // features)
    return make_probe(args, *(images.subset(slice(count)) for images in data), **where)


def make_probe(
    args, train_data: ImageData, test_data: ImageData, random_numbers: str = HOST
) -> ProbeLoss:
    """The logistic probe on these training and test images."""
    return ProbeLoss(
        train_data,
        test_data,
        args.C,
        outer_images=args.outer_images,
        probe_gradient=args.probe_gradient,
        random_numbers=random_numbers,
    )


def default_outer_images(args) -> int:
    """The default of --outer_images."""
    implicit = args.probe == "logistic" and args.probe_gradient == "implicit"
    return OUTER_IMAGES_IMPLICIT if implicit else OUTER_IMAGES[args.probe]


def count_features(model: nn.Module, initializer, data: ImageData) -> int:
    """The number of features per image that the probe gets."""
    return extract_features(model, initializer(model), data.subset(slice(1))).shape[1]


def make_batches(
    args, data: ImageData, dtype: torch.dtype, size: int, random_numbers: str = HOST
) -> Callable[[Generator], Iterator]:
    """A function from a generator to batches, or pairs of batches, of this size in random order."""
    if size > len(data):
        raise UserError(
            f"batches of {size} of the {len(data)} images to train on: give --batch_size and "
            f"--evaluation_batch_size of at most {len(data)}"
        )
    strengths, options = views_of_flags(args), {"dtype": dtype, "random_numbers": random_numbers}
    if strengths is None:
        draw = partial(batches, data, size, **options)
    else:
        draw = Views(data, size, strengths, learn=args.learn_views, **options)
        draw.to(data.images.device, dtype)
    next(draw(seeded_generator(0)))  # raises an error for a wrong batch size
    return draw


def make_streams(
    args, sets: Sequence[ImageData], dtype: torch.dtype
) -> list[Callable[[Generator], Iterator]]:
    """`make_batches` for each data set; the learned strengths of views are shared."""
    for data in sets:  # raises errors before anything is learned
        make_batches(args, data, dtype, args.evaluation_batch_size or args.batch_size)
    streams = [
        make_batches(args, data, dtype, args.batch_size, args.random_numbers) for data in sets
    ]
    for stream in streams[1:]:
        if isinstance(stream, Views):
            stream.moved = streams[0].moved
    return streams


def make_training(args, parts: tuple, inputs: Inputs) -> Training:
    """A Training, of all layers at once or of one after the other.

    parts: the positional arguments of Training.
    """
    if args.layerwise:
        return LayerwiseTraining(
            *parts,
            inputs=inputs,
            steps_below=args.steps_below,
            trainings_below=args.trainings_below,
        )
    return Training(*parts)


def compile_update(trainings: Sequence[Training]) -> None:
    """Have the rule's update compiled when it is first called; results agree up to rounding.

    That takes from twenty seconds on. Pairs of views by counted numbers are compiled too. Raises
    UserError if there is no compiler.
    """
    training = trainings[0]
    rule, model = training.rule, training.model
    params, batch = training.initializer(model), next(training.batches(seeded_generator(0)))
    rule.update(model, params, batch)  # prepares its sums, which can't be traced
    try:
        torch.compile(torch.neg)(params[-1]["b"])
    except torch._dynamo.exc.BackendCompilerFailed as problem:
        raise UserError(
            "--compile needs a compiler that torch can use (C++, on a GPU Triton): leave it out"
        ) from problem
    rule.update = torch.compile(rule.update, dynamic=False)
    for views in (t.batches for t in trainings if isinstance(t.batches, Views)):
        if views.maker is not None:
            views.maker.make = torch.compile(views.maker.make, dynamic=False)


# ---- loop ----


def make_settings(args) -> MetaSettings:
    """The meta-loop's settings from the flags."""
    return settings_of(
        args,
        MetaSettings,
        inner_steps=make_horizon(args),
        reinitialize_every=windows(args) if args.method == "pes" else args.reinitialize_every,
        clip_norm=args.clip_norm if args.clip_grads else None,
        sparsify_from=args.sparsify_from if args.sparsify else None,
    )


def make_search_settings(args) -> SearchSettings:
    """The settings of a search from the flags."""
    return settings_of(args, SearchSettings, trials=args.metasteps, inner_steps=make_horizon(args))


def make_horizon(args) -> Horizon:
    """The number of updates of a task."""
    if args.method == "pes":
        return args.K
    if args.horizon:
        return random_steps(*args.horizon)
    return rising_steps(
        args.initial_inner_steps, args.raise_by, args.raise_every, args.max_inner_steps
    )


def windows(args) -> int:
    """For --method pes, the meta-steps of one training, whose length is rounded up to windows."""
    return math.ceil(args.initial_inner_steps / args.K)


def learn(
    args, trainings: Sequence[Training], log: RunLog, recorded, samples: Tensor | None, team: Team
) -> bool:
    """Learn the rule by hypergradients or a search; False if interrupted by Ctrl-C."""
    if args.search:
        from sweeps.rule_search import search_rule  # needs Optuna

        settings = make_search_settings(args)
        return search_rule(trainings, settings, log, hyperparameters=recorded, team=team)
    history = hypgraddesc(
        trainings, make_settings(args), log, hyperparameters=recorded, samples=samples, team=team
    )
    warn_if_nothing_is_learned(args, history.columns, log)
    return history.finished


def warn_if_nothing_is_learned(args, columns: Mapping[str, np.ndarray], log: RunLog) -> None:
    """Say in one line if no meta-step had a hypergradient, or none that was not 0."""
    skipped, norms = (columns.get(name, ()) for name in ("skipped_tasks", "hypergradient_norm"))
    if not len(skipped):
        return
    if all(skipped == args.tasks):
        log.warn("every hypergradient was left out: nothing has been learned")
    elif not any(norms > 0):
        log.warn("every hypergradient was 0: nothing has been learned from the loss, "
                 "as where units are silent or saturated")  # fmt: skip


def make_samples(args, data: ImageData, dtype: torch.dtype) -> Tensor | None:
    """The training images of --sample_outputs; None without it."""
    return data.floats(slice(args.sample_outputs), dtype) if args.sample_outputs else None


# ---- report ----


def evaluate_and_report(
    args,
    log: RunLog,
    trainings: Sequence[Training],
    sets: Sequence[tuple[ImageData, ImageData]],
    finished: bool,
) -> bool:
    """Write the rule, results of trainings with it, and figures; False if interrupted by Ctrl-C.

    If meta-training was interrupted, there is only one training. Parameters and effects are those
    of the first data set.

    sets: training and test images for each training, all of which are used by the probe.
    """
    first, steps = trainings[0], steps_to_judge(vars(args), log.step)
    write_rule(log, first.rule)  # even if no training with it is finite
    count = args.evaluations if finished else 1
    draws = [Draw((args.seed, EVALUATION, k), steps) for k in range(count)]
    rows, params, evaluated = [], [], True
    for training, data in zip(trainings, sets, strict=True):
        whole = judged_training(args, training, data)
        some, last, evaluated = evaluate_draws(log, whole, draws)
        place = {"dataset": training.name} if training.name else {}
        rows += [{"inner_steps": steps, **place, **row} for row in some]
        params = last if training is first else params
        if not evaluated:
            break
    has_terms = first.rule.term_coefficients()
    effects = measure_effects(first, draws[0]) if rows and has_terms else {}
    others = judge_references(args, log, trainings, sets, steps) if finished and evaluated else {}
    report(log, first, [data[0] for data in sets], steps, rows, params, effects, others)
    return evaluated


def judged_training(args, training: Training, data: tuple[ImageData, ImageData]) -> Training:
    """The training as it is evaluated: with the evaluation's batch size, probed on all images.

    All layers are drawn anew. Random numbers are the host's, as in every command that judges rules.
    """
    whole = replace(training, outer_loss=make_probe(args, *data))
    if isinstance(whole, LayerwiseTraining):
        whole = replace(whole, trainings_below=None)
    if args.evaluation_batch_size is None and args.random_numbers == HOST:
        return whole
    size = args.evaluation_batch_size or args.batch_size
    stream = make_batches(args, data[0], getattr(torch, args.dtype), size)
    if isinstance(stream, Views):
        stream.moved = training.batches.moved
    return replace(whole, batches=stream)


def judge_references(
    args,
    log: RunLog,
    trainings: Sequence[Training],
    sets: Sequence[tuple[ImageData, ImageData]],
    steps: int,
) -> dict[str, dict[str, list[float]]]:
    """Test accuracies of the features named by --beside, by data set and name.

    The dict is empty without --beside, or without layers of units.
    """
    if not args.beside or not args.layers:
        return {}
    judged, draws = {}, args.evaluations
    count = len(trainings) * count_trainings(args.beside, draws)
    with log.progress(count, description="reference") as progress:
        names = dataset_names(args)
        for name, title, training, data in zip(
            names, data_titles(names), trainings, sets, strict=True
        ):
            images = [part.to(data[0].images.device) for part in load_judged(args, name)]
            setting = Setting(
                title, *images, tuple(args.layers), args.C, args.outer_images,
                args.evaluation_batch_size or args.batch_size,
            )  # fmt: skip
            amount = {"draws": draws, "steps": steps, "seed": args.seed}
            kept = KeptReferences(setting, **amount)
            judged[title] = beside(
                args.beside, judged_training(args, training, data), setting, **amount,
                kept=kept, advance=lambda: progress.advance(None),
            )  # fmt: skip
            if kept.given:
                log.say(f"{title}: {', '.join(kept.given)} as an earlier run has found them")
    return judged


def measure_effects(training: Training, draw: Draw) -> dict[str, float]:
    """The effects of the rule's terms during a training with the final rule."""
    rule, (params, stream) = training.rule, training.begin(draw)
    return term_effects(rule, term_grams(rule, training.model, params, stream, steps=draw.steps))


def report(
    log: RunLog,
    training: Training,
    data: Sequence[ImageData],
    steps: int,
    rows: list[dict],
    params,
    effects: dict,
    others: dict,
) -> None:
    """Write rule, parameters, results and figures; print the formula and the accuracies.

    training, params: those of the first data set; params as the last evaluation ended.
    data: training images of each data set.
    steps: updates of each evaluation.
    rows: numbers of all evaluations.
    effects: by term; {} if there are none.
    others: the result of `judge_references`.
    """
    write_rule(log, training.rule, effects or None)
    log.write_parameters(params, data[0].shape)
    views = training.batches
    text = partial(accuracy_text, held_out=bool(log.config["held_out"]))
    by_dataset = accuracies_by_dataset(rows)
    # the mean over data sets of each draw
    means = [sum(some) / len(some) for some in zip(*by_dataset.values(), strict=False)]
    accuracies = mean_and_deviation("test_accuracy", means)
    each = {name: mean_and_deviation("test_accuracy", v) for name, v in by_dataset.items()}
    log.write_results({
        "data": "; ".join(images.source for images in data),
        "inner_steps": steps,
        "evaluations": rows,
        **accuracies,
        **({"by_dataset": each} if training.name else {}),
        "initializer": training.initializer.effective(),
        "views": views.strengths().to_dict() if isinstance(views, Views) else None,
        "term_effects": effects,
        "beside": others,
    })  # fmt: skip
    if why := write_for_use(log.directory):
        log.say(why)
    log.plot(plot_run)
    formula = training.rule.formula(effects or None, max_terms=6)
    brackets = "; in brackets, the size of a term relative to the whole change"
    log.say(f"the rule{brackets if '[' in formula else ''}")
    log.say(formula)
    log.say(f"everything is in {log.directory}")
    for dataset, features in others.items():
        for name, values in features.items():
            if values:
                told = text(mean_and_deviation("test_accuracy", values))
                log.say(f"{dataset}, {name}: {told}")
    for name, part in each.items() if training.name else ():
        log.say(f"{name}: {text(part)}")
    if means:
        count = counted_trainings(len(means))
        log.say(f"{text(accuracies)} over {count} with the final rule, {steps} steps each")


def accuracies_by_dataset(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Test accuracies by the name of the data set, which is "" if there is only one."""
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row.get("dataset", ""), []).append(row["test_accuracy"])
    return accuracies


def main(argv: list[str] | None = None) -> None:
    """Data, model, rule, loss; the loop; the report."""
    args, parser = parse_flags(argv)
    save_whole_paths(args, "start_from")
    own = {name: load_own_code(getattr(args, name)) for name in CODE_FLAGS
           if is_own_code(getattr(args, name))}  # fmt: skip
    if own:
        args.code_found = {name: code.digest for name, code in own.items()}
    refuse_flags_without_effect(args, parser)
    args.dataset = args.dataset or "mnist"
    args.outer_images = args.outer_images or default_outer_images(args)
    device, dtype = set_up(args)
    _, processes = place_in_team()
    if args.tasks < processes:
        raise UserError(f"{processes} processes need --tasks {processes} or more, one for each")
    team = join_team()
    names = dataset_names(args)
    sets = [make_data(args, name, team, device) for name in names]
    rule = make_rule(args, own).to(device, dtype)
    initializer = make_initializer(args).to(device, dtype)
    if args.rule == "unit_statistics" and args.evaluation_batch_size is None:
        fewest = min(len(data[0]) for data in sets)
        args.evaluation_batch_size = min(EVALUATION_BATCH_SIZE, fewest)
    streams = make_streams(args, [data[0] for data in sets], dtype)
    if args.start_from and not (args.resume and has_checkpoint(args.resume)):
        begin_with(load_run(args.start_from, own.get("rule")), rule, initializer, streams[0])
    elif not args.resume:
        refuse_rule_that_stands_still(args, rule)
    trainings = [
        make_training(
            args,
            (
                make_model(args, data[0].shape), rule, initializer, stream,
                make_outer_loss(args, initializer, data, own),
                title if len(sets) > 1 else "", make_models(args, data[0].shape),
            ),
            image_inputs(data[0], dtype),
        )
        for title, data, stream in zip(data_titles(names), sets, streams, strict=True)
    ]  # fmt: skip
    check_settings(make_settings(args), *trainings)
    if args.compile:
        compile_update(trainings)
    with open_run(args, "main", ImageSets(tuple(data[0] for data in sets)), team) as log:
        for data in sets:
            log.say(data[0].source)
        recorded = trainings[0].hyperparameter_values
        finished = learn(
            args, trainings, log, recorded, make_samples(args, sets[0][0], dtype), team
        )
        if not team.first:
            return
        evaluated = evaluate_and_report(args, log, trainings, sets, finished)
    if not (finished and evaluated):
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
