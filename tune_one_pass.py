"""Train many runs of SGD at once, each of which tunes its own hyperparameters meanwhile.

    python tune_one_pass.py -c configs/energy.yaml configs/ours_lr_momentum.yaml --draws 200
    python tune_one_pass.py -c configs/fashion.yaml configs/random.yaml --lr 0.05 --momentum 0.9
    python tune_one_pass.py -c runs/energy-ours/config.json             the same run again
    python plot.py one_pass runs/energy-ours runs/energy-random

-c takes one file for the problem and one for the algorithm. Every key is also a flag, and flags
take precedence. Each run is a draw of the initial hyperparameters; all draws are computed together.
The run's directory contains the medians over the draws in metrics.csv and the numbers of every draw
in draws.npz.
"""

import argparse
import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.choices import (
    ACTIVATIONS,
    HIDDEN_SIZES,
    IMAGES,
    MODELS,
    OWN_VALIDATION,
    PERCEPTRONS,
    PROBLEMS,
    STANDARDISED,
)
from comparison.published_settings import SHARED_KEYS, THEIR_KEYS, translated
from experiment.command_line import (
    UserError,
    computing_parser,
    device_name,
    fraction,
    fraction_below_1,
    new_directory,
    nonnegative_float,
    nonnegative_int,
    parse,
    positive_float,
    positive_int,
    run_command,
)
from experiment.yaml_settings import (
    Foreign,
    Key,
    add_flags,
    add_keys,
    keys_of,
    mapping,
    parse_settings,
    refuse_idle_settings,
)
from one_pass.settings import (
    NAMES,
    SMALLEST_POPULATION,
    TRANSFORM_KINDS,
    WITH_VALIDATION_BATCHES,
    Settings,
)

# the keys, as Clarke et al. call them, and their fields of Settings; the defaults that differ
FIELDS = {
    "method": "method",
    "optimised_hyperparameters": "optimised",
    "high_dimensional_hyperparameters": "high_dimensional",
    "network_weight_steps": "every",
    "hyperparameter_steps": "updates",
    "look_back": "look_back",
    "hyperparameter_optimiser": "optimizer",
    "hyperparameter_lr": "lr",
    "final_hyperparameter_lr": "final_lr",
    "chain_rule": "chain_rule",
    "recover": "recover",
    "hyperparameter_clipping": "bounds",
    "transformed_hyperparameters": "transforms",
    "reset_model_after_hyperparameter_update": "reset",
    "renew_model_reset_state_interval": "renew",
}
DEFAULTS = {"method": "fixed", "final_hyperparameter_lr": None}


def row_split(text: str) -> int | str:
    """The type of --split: a seed, or any other text."""
    return int(text) if text.isdecimal() else text


KEYS = (
    Key("dataset", str, "energy", "data set or toy problem", choices=PROBLEMS),
    Key("model", str, None, "network (default: the published one)", choices=MODELS),
    Key("hidden_sizes", positive_int, [], "units of each hidden layer; none: as published", True),
    Key("activation", str, "ReLU", "activation of a perceptron", choices=ACTIVATIONS),
    Key(
        "standardise",
        str,
        "pixels",
        "standardize pixels or channels of images",
        choices=STANDARDISED,
    ),
    *keys_of(Settings, FIELDS, DEFAULTS),
    Key(
        "network_weight_grad_clipping",
        mapping,
        {},
        "largest norm of the training gradient, as {norm: .25}",
    ),
    Key("total_step_limit", positive_int, None, "largest total number of weight steps"),
    Key("batch_size", positive_int, None, "training or validation samples in a batch; none: all"),
    Key("validation_proportion", fraction, 0.0, "fraction of the training data to hold out"),
    Key(
        "split",
        row_split,
        1,
        "order of rows: a permutation's seed, published, or a file of numbers",
    ),
    Key(
        "products",
        str,
        "float32",
        "precision of matrix products and convolutions; tf32 is for GPUs",
        choices=("float32", "tf32"),
    ),
    Key("lr", positive_float, None, "initial learning rate of every draw; none: drawn"),
    Key("weight_decay", nonnegative_float, None, "initial weight decay of every draw; none: drawn"),
    Key("momentum", fraction_below_1, None, "initial momentum of every draw; none: drawn"),
    Key("lr_multiplier", positive_float, None, "factor of every draw's stepped_lr; none: drawn"),
    Key("draws", positive_int, 1, "number of draws, each of which is a run of SGD"),
    Key("first_draw", nonnegative_int, 0, "number of the first draw"),
    Key(
        "log_every", positive_int, None, "weight steps between records; none: a fortieth of the run"
    ),
    Key(
        "record_samples",
        positive_int,
        None,
        "evaluate the first so many training, validation and test samples (of text: windows) "
        "only; none: all",
    ),
)


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = computing_parser(
        "Tune the hyperparameters of SGD in the one pass that trains the weights.", "tune_one_pass"
    )
    add = parser.add_argument
    add("--data-dir", "--data_dir", type=Path, default="data", metavar="DIR", help="data sets")
    add("-d", dest="device", type=device_name, default=argparse.SUPPRESS,
        help="the same as --device")  # fmt: skip
    add("-S", "--save_state", type=Path, metavar="FILE", help="also write the last state to FILE")
    add("-s", "--load_state", type=Path, metavar="FILE", help="start from a state that -S wrote")
    add("-l", "--log_root", type=Path, metavar="DIR", help="folder of the runs (default: runs)")
    add("-g", "--group", "--run_group_name", metavar="NAME",
        help="folder in log_root, for runs that belong together")  # fmt: skip
    add("-n", "--name", "--run_name", metavar="NAME",
        help="name of the run's directory (default: made from the time)")  # fmt: skip
    add_keys(parser, KEYS)
    group = parser.add_argument_group("flags and keys of Clarke et al., translated line by line")
    add_flags(group, THEIR_KEYS)
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import numpy as np
import torch
from torch import Generator

from comparison.one_pass_problems import (
    Network,
    Part,
    Problem,
    default_model,
    make_problem,
    make_samples,
)
from experiment.checkpoints import has_checkpoint
from experiment.devices import set_up
from experiment.files import digest, write_whole
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.precision import Products
from experiment.run_log import RunLog
from experiment.run_reader import read_config
from figures.one_pass_report import (
    Columns,
    final_losses,
    median_of_draws,
    plot_one_pass_run,
    summary,
)
from kernels.recorded_training import recordings
from one_pass import (
    ModuleObjective,
    OnePassError,
    ReplayedTuning,
    Samples,
    State,
    Tuning,
    check_start,
    initial_hyperparameters,
    initial_state,
)

# the purposes of a draw's random numbers, each of which has its own stream
HYPERPARAMETERS, WEIGHTS, TRAINING, VALIDATION = range(4)

# methods that use validation samples; hypergradients
VALIDATED = (*WITH_VALIDATION_BATCHES, "population")
BY_HYPERGRADIENTS = (*WITH_VALIDATION_BATCHES, "successive_gradients")

# what -c takes from a run's config.json besides the settings, and what it ignores: where that run
# wrote, and what it found
RUN_FLAGS = ("seed", "device", "threads", "dtype", "data_dir", "load_state")
OF_ONE_RUN = (
    "command", "config", "steps", "data_found", "state_found", "save_state", "log_root", "group",
    "name",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Data; objective and settings; the loop over records; the report."""
    args, notes = parse_all(argv)
    fill_in(args)
    device, dtype = set_up(args)
    products = Products(args.products)
    problem = make_problem(
        args.dataset,
        Network(args.model, tuple(args.hidden_sizes), args.activation),
        args.validation_proportion,
        args.split,
        args.data_dir,
        dtype,
        device,
        args.standardise,
    )
    tuning = make_tuning(args, problem, device, dtype)
    if args.load_state is not None:
        args.state_found = state_digest(args)
    name_directory(args)  # makes the directory, now that all settings have been checked
    with open_run(args, "tune_one_pass", problem) as log:
        for note in notes:
            log.say(note)
        log.say(f"{problem.source}; {args.draws} runs of {args.steps:,} steps")
        with products:
            columns, finished = train_draws(args, evaluated(args, problem), tuning, log)
        if args.save_state is not None:
            save_state(args.save_state, tuning)
        report(args, problem, columns, log)
    if not finished:
        raise KeyboardInterrupt


def parse_all(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and a line for each key of Clarke et al. that was translated to one of ours."""
    notes: list[str] = []

    def translate(given: dict[str, Any]) -> dict[str, Any]:
        settings, lines = translated(given)
        notes.extend(lines)
        return settings

    foreign = Foreign(THEIR_KEYS, translate, SHARED_KEYS)
    args = parse_settings(make_parser(), KEYS, argv, RUN_FLAGS, OF_ONE_RUN, foreign)
    return args, notes


def fill_in(args: argparse.Namespace) -> None:
    """Set values that follow from others; raises UserError if settings contradict each other."""
    args.model = args.model or default_model(args.dataset)
    every = 1 if args.method == "fixed" else args.network_weight_steps
    steps = args.network_weight_steps * args.hyperparameter_steps
    args.steps = min(steps, args.total_step_limit or steps) // every * every
    if args.steps == 0:
        raise UserError(
            f"total_step_limit {args.total_step_limit} ends before the first hyperparameter step, "
            f"after {every} weight steps"
        )
    wanted = args.log_every or args.steps // 40
    args.log_every = max(wanted // every, 1) * every
    check_tables(args)
    check_method(args)
    check_idle_settings(args)
    if args.save_state is not None and not args.save_state.resolve().parent.is_dir():
        raise UserError(f"-S {args.save_state}: there is no such folder")
    if args.save_state is not None and args.save_state.is_dir():
        raise UserError(f"-S {args.save_state} is a folder: name a file in it")


def check_method(args: argparse.Namespace) -> None:
    """Raises UserError if the method does not work with its settings."""
    method, tuned, every = args.method, args.optimised_hyperparameters, args.network_weight_steps
    if method in (*BY_HYPERGRADIENTS, "population") and not tuned:
        raise UserError(f"method {method} needs optimised_hyperparameters, such as lr")
    held_out = args.validation_proportion or args.dataset in OWN_VALIDATION
    if method in VALIDATED and not held_out:
        raise UserError(f"method {method} needs a validation_proportion above 0")
    if method == "successive_gradients" and tuned != ["lr"]:
        raise UserError("successive_gradients tunes lr, nothing else")
    if method == "successive_gradients" and every != 1:
        raise UserError(
            f"successive_gradients compares each gradient with the one before it: take "
            f"network_weight_steps 1, not {every}"
        )
    if method == "unrolled" and args.look_back > every:
        raise UserError(
            f"look_back {args.look_back} is more than the {every} weight steps between two "
            f"hyperparameter steps: take a larger network_weight_steps, or look back less"
        )
    if method == "population" and args.draws < SMALLEST_POPULATION:
        raise UserError(f"a population needs --draws {SMALLEST_POPULATION} or more")


def check_idle_settings(args: argparse.Namespace) -> None:
    """Raises SettingsError or UserError if a setting would have no effect."""
    method, has_validation = args.method, args.dataset in OWN_VALIDATION
    by_hypergradients = f"a method out of {', '.join(BY_HYPERGRADIENTS)}"
    refuse_idle_settings(
        args,
        KEYS,
        [
            ("optimised_hyperparameters", method in (*BY_HYPERGRADIENTS, "population"),
             f"{by_hypergradients}, population"),
            ("high_dimensional_hyperparameters hyperparameter_lr final_hyperparameter_lr "
             "hyperparameter_optimiser chain_rule recover", method in BY_HYPERGRADIENTS,
             by_hypergradients),
            ("look_back", method in WITH_VALIDATION_BATCHES, "method look_back or unrolled"),
            ("hyperparameter_clipping", method != "fixed", "a method other than fixed"),
            ("reset_model_after_hyperparameter_update",
             method not in ("fixed", "successive_gradients"),
             "a method other than fixed and successive_gradients"),
            ("validation_proportion split", not has_validation,
             f"a dataset other than {', '.join(OWN_VALIDATION)}"),
            ("batch_size", args.dataset != "ptb", "a dataset other than ptb"),
            ("renew_model_reset_state_interval", args.reset_model_after_hyperparameter_update,
             "reset_model_after_hyperparameter_update true"),
            ("lr_multiplier", method == "stepped_lr", "method stepped_lr"),
            ("hidden_sizes", args.model in HIDDEN_SIZES,
             f"a model out of {', '.join(HIDDEN_SIZES)}"),
            ("activation", args.model in PERCEPTRONS, f"a model out of {', '.join(PERCEPTRONS)}"),
            ("standardise", args.dataset in IMAGES, f"a dataset out of {', '.join(IMAGES)}"),
        ],
    )  # fmt: skip
    for name in args.high_dimensional_hyperparameters:
        if name not in args.optimised_hyperparameters:
            raise UserError(
                f"high_dimensional_hyperparameters: {name} is not among those that are tuned"
            )


def name_directory(args: argparse.Namespace) -> None:
    """Make --out from -l, -g and -n if any of these is given."""
    parts = (args.log_root, args.group, args.name)
    if parts == (None, None, None) or args.resume is not None:
        return
    if args.out is not None:
        raise UserError("--out names the whole directory: leave out -l, -g and -n")
    folder = (args.log_root or Path("runs")) / (args.group or "")
    args.out = folder / args.name if args.name else new_directory("tune_one_pass", folder)


def check_tables(args: argparse.Namespace) -> None:
    """Raises UserError if a setting that is a table has a wrong entry."""
    for key, known in (
        ("network_weight_grad_clipping", ("norm",)),
        ("hyperparameter_clipping", NAMES),
        ("transformed_hyperparameters", NAMES),
    ):
        for name in getattr(args, key):
            if name not in known:
                raise UserError(f"{key} knows {', '.join(known)}, not {name!r}")
    norm = args.network_weight_grad_clipping.get("norm", 1.0)
    if not is_number(norm) or norm <= 0:
        raise UserError(f"network_weight_grad_clipping: norm is a number above 0, not {norm!r}")
    for name, pair in args.hyperparameter_clipping.items():
        two = isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))
        if pair is not None and not (two and pair[0] <= pair[1]):
            raise UserError(
                f"hyperparameter_clipping: {name} needs two raw values such as [-10, 0], or null "
                f"for none, not {pair!r}"
            )
    for name, kind in args.transformed_hyperparameters.items():
        if kind not in TRANSFORM_KINDS:  # any value of YAML
            raise UserError(
                f"{name} can be transformed by {', '.join(TRANSFORM_KINDS)}, not {kind!r}"
            )


def is_number(value: Any) -> bool:
    """Whether a value from YAML is a number; infinities are, nan is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


# ---- building ----


def make_settings(args: argparse.Namespace) -> Settings:
    """The tuner's settings."""
    values = {field: getattr(args, key) for key, field in FIELDS.items()}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    bounds = {name: tuple(pair) for name, pair in args.hyperparameter_clipping.items() if pair}
    return Settings(**values | {
        "final_lr": args.final_hyperparameter_lr or args.hyperparameter_lr,
        "updates": args.steps // args.network_weight_steps,
        "clip_norm": args.network_weight_grad_clipping.get("norm"),
        "bounds": bounds,
        "seed": args.seed,
    })  # fmt: skip


def make_tuning(
    args: argparse.Namespace, problem: Problem, device: torch.device, dtype: torch.dtype
) -> ReplayedTuning:
    """All draws at their start; the numbers of a draw do not depend on the other draws."""
    settings = make_settings(args)
    check_parts(args, problem)
    hyperparameters = initial_hyperparameters(generators(args, HYPERPARAMETERS))
    for name in NAMES:
        if getattr(args, name) is not None:
            hyperparameters[name].fill_(getattr(args, name))
    if args.lr_multiplier is not None:
        hyperparameters["factor"].fill_(args.lr_multiplier)
    weights, buffers = problem.objective.initial(generators(args, WEIGHTS))
    buffers = {
        name: buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
        for name, buffer in buffers.items()
    }
    state = initial_state(weights.to(device, dtype), buffers, hyperparameters, settings)
    if args.load_state is not None and not goes_on(args):
        state = read_state(args.load_state, state, settings)
    check_start(state, settings)

    def samples(part: Part, size: int | None, purpose: int) -> Samples:
        return make_samples(part, size, problem.sequential, generators(args, purpose))

    training, validation = samples(problem.training, args.batch_size, TRAINING), None
    if args.method in VALIDATED:
        few = len(problem.validation[0]) < (args.batch_size or math.inf)
        size = None if few or args.method == "population" else args.batch_size
        validation = samples(problem.validation, size, VALIDATION)
    return ReplayedTuning(problem.objective, training, validation, settings, state)


def check_parts(args: argparse.Namespace, problem: Problem) -> None:
    """Raises UserError if there are too few samples for training or tuning."""
    training, validation = len(problem.training[0]), len(problem.validation[0])
    for count, name in ((training, "training"), (validation, "validation")):
        if count == 0 and (name == "training" or args.method in VALIDATED):
            raise UserError(
                f"validation_proportion {args.validation_proportion:g} leaves no {name} samples"
            )
    if not problem.sequential and (args.batch_size or 0) > training:
        raise UserError(
            f"batch_size {args.batch_size}: there are {training:,} training samples; take at most "
            f"that, or none"
        )
    if args.model == "mlp_batch_norm" and min(args.batch_size or training, training) == 1:
        raise UserError("model mlp_batch_norm needs batches of at least 2 training samples")


def generators(args: argparse.Namespace, purpose: int) -> list[Generator]:
    """One generator for each draw, seeded by the run's seed, the draw's number and the purpose."""
    numbers = range(args.first_draw, args.first_draw + args.draws)
    seeds = [np.random.SeedSequence([args.seed, number, purpose]) for number in numbers]
    return [Generator().manual_seed(int(seed.generate_state(1)[0])) for seed in seeds]


# ---- training ----


class RecordedTuning:
    """Trains and tunes all draws from one record to the next; see `run_steps`.

    records: the weight steps at which every draw is evaluated, increasing, from 0.

    Attributes:
        columns: the numbers of all records, as in draws.npz.
    """

    def __init__(
        self, problem: Problem, tuning: Tuning, records: Sequence[int], log: RunLog
    ) -> None:
        self.problem, self.tuning, self.log = problem, tuning, log
        self.records, self.columns = list(records), Columns()

    @property
    def finished(self) -> bool:
        """Whether the last record is done."""
        return not self.records

    def step(self) -> dict[str, float]:
        """Advance to the next record; returns the medians over the draws."""
        number, started = self.records.pop(0), time.perf_counter()
        if number == 0:
            return record(self.problem, self.tuning, self.columns, self.log, seconds=0.0)
        self.tuning.advance(number - self.tuning.state.step)
        seconds = self.columns.last("seconds") + time.perf_counter() - started
        return record(self.problem, self.tuning, self.columns, self.log, seconds)

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        return checkpoint(self.tuning, self.columns)

    def load_state_dict(self, state: dict) -> None:
        """Resume a run from the result of `state_dict`."""
        self.columns = Columns(state["columns"])
        load_tuning(self.tuning, state)
        self.records = [number for number in self.records if number > self.tuning.state.step]


def evaluated(args: argparse.Namespace, problem: Problem) -> Problem:
    """The problem with those samples only that records look at."""
    parts = {
        name: tuple(values[: args.record_samples] for values in getattr(problem, name))
        for name in ("training", "validation", "test")
    }
    return replace(problem, **parts)


def train_draws(
    args: argparse.Namespace, problem: Problem, tuning: ReplayedTuning, log: RunLog
) -> tuple[Columns, bool]:
    """Train, with a record every `log_every` steps; the second value is False after Ctrl-C."""
    records = [*range(0, args.steps, args.log_every), args.steps]
    recorded = RecordedTuning(problem, tuning, records, log)
    # of a large network single gradients are recorded: whole steps of one would take long to record
    large = isinstance(tuning.objective, ModuleObjective)
    calls = tuning.objective.calls if large else tuning.calls
    calls.record = recordings(tuning.state.weights.device, log.say)
    compile_loops(tuning)
    finished = run_steps(
        log, recorded, "record", len(records), numbers=records, shown=["Loss/Validation"]
    )
    return recorded.columns, finished


def compile_loops(tuning: Tuning) -> None:
    """Compile now what would be compiled in the first step, to exclude it from the training time.

    The next batches stay the same.
    """
    state, training = tuning.state, tuning.training
    place = training.state_dict()
    linearization = tuning.objective.linearize(state.weights, state.buffers, training.next())
    training.load_state_dict(place)
    if tuning.settings.method in WITH_VALIDATION_BATCHES:
        linearization.hessian_product(torch.zeros_like(state.weights))


def record(
    problem: Problem, tuning: Tuning, columns: Columns, log: RunLog, seconds: float
) -> dict[str, float]:
    """Evaluate every draw, write its numbers to draws.npz, and return the medians over draws.

    TensorBoard shows the raw values of what each weight has of its own, all draws together.
    """
    started = time.perf_counter()
    row = measured(problem, tuning)
    evaluation = time.perf_counter() - started
    columns.append(tuning.state.step, seconds, evaluation, row)
    log.write_arrays("draws.npz", columns.arrays())
    if raw := {name: tuning.state.raw[name] for name in tuning.settings.high_dimensional}:
        arrays = {f"Raw_Hyperparameter/{n.title()}": v.numpy(force=True) for n, v in raw.items()}
        log.show_distributions(tuning.state.step, arrays)
    medians = {name: median_of_draws(values) for name, values in row.items()}
    return {**medians, "seconds": seconds}


@torch.no_grad()
def measured(problem: Problem, tuning: Tuning) -> dict[str, np.ndarray]:
    """Losses and hyperparameters of every draw, [D] each.

    A loss is nan if the problem lacks that part of the data; a measured loss of nan becomes inf.
    """
    state, numbers = tuning.state, {}
    for title in ("Training", "Validation", "Test"):
        inputs, targets = getattr(problem, title.lower())
        if len(inputs):
            means = tuning.objective.evaluate(state.weights, state.buffers, inputs, targets)
            loss = means.loss.double().cpu().numpy()
            loss = np.where(np.isnan(loss), math.inf, loss)
            accuracy = means.accuracy.double().cpu().numpy()
        else:
            loss = accuracy = np.full(len(state.weights), math.nan)
        numbers[f"Loss/{title}"] = loss
        if problem.sequential:
            with np.errstate(over="ignore"):
                numbers[f"Perplexity/{title}"] = np.exp(loss)
        elif tuning.objective.classifies:
            numbers[f"Accuracy/{title}"] = accuracy
        else:
            numbers[f"Unnormalised_Loss/{title}"] = loss * problem.unit
    for name, values in tuning.hyperparameters.items():
        title = {"lr": "Lr", "weight_decay": "Weight_Decay", "momentum": "Momentum"}[name]
        middle = values.double().log().mean(dim=1).exp()  # the geometric mean over weights
        numbers[f"Hyperparameter/{title}"] = middle.cpu().numpy()
        if name in tuning.settings.high_dimensional:
            for share, values_there in zip((10, 90), deciles(values), strict=True):
                numbers[f"Hyperparameter/{title}_{share}_Percent"] = values_there
    numbers["Skipped_Updates"] = state.skipped[:, 0].double().cpu().numpy()
    return numbers


def deciles(values: torch.Tensor) -> np.ndarray:
    """The first and the ninth decile of each draw's values [D, P], as [2, D]."""
    return np.quantile(values.double().cpu().numpy(), (0.1, 0.9), axis=1)


def report(args: argparse.Namespace, problem: Problem, columns: Columns, log: RunLog) -> None:
    """Write results.json and the figures, and print the final losses."""
    losses = final_losses(columns.arrays())
    results = {"data": problem.source, "draws": args.draws, **summary(losses, args.seed)}
    for name in ("Loss/Validation", "Loss/Test", "Accuracy/Test"):
        last = columns.arrays().get(name, np.full((1, 1), math.nan))[-1]
        if not np.isnan(last).all():
            results[name.replace("/", "_").lower()] = median_of_draws(last)
    log.write_results(results)
    log.plot(plot_one_pass_run)
    log.say(
        f"final test {measure(args, problem)}: median {results['median']:.4g}, mean "
        f"{results['mean']:.4g} of those that did not diverge, {results['diverged']:.1%} diverged; "
        f"in {log.directory}"
    )


def measure(args: argparse.Namespace, problem: Problem) -> str:
    """What the last numbers of a run are, and of how many samples if not of all."""
    name, kind = ("perplexity", "windows") if problem.sequential else ("loss", "samples")
    unit = " (squared units of the target)" if problem.unit != 1 else ""
    count, wanted = len(problem.test[0]), args.record_samples
    return name + unit + (f", {wanted:,} of {count:,} {kind}" if (wanted or count) < count else "")


# ---- saving ----


def checkpoint(tuning: Tuning, columns: Columns) -> dict[str, Any]:
    """Everything that changes during a run."""
    samples = [tuning.training, tuning.validation]
    return {
        "state": vars(tuning.state),
        "samples": [None if part is None else part.state_dict() for part in samples],
        "columns": columns.to_tensors(),
    }


def load_tuning(tuning: Tuning, saved: dict[str, Any]) -> None:
    """Continue from the result of `checkpoint`."""
    tuning.restore(State(**_moved(saved["state"], tuning.state.weights.device)))
    for part, state in zip((tuning.training, tuning.validation), saved["samples"], strict=True):
        if part is not None:
            part.load_state_dict(state)


def goes_on(args: argparse.Namespace) -> bool:
    """Whether the run is resumed from a checkpoint."""
    return args.resume is not None and has_checkpoint(args.resume)


def state_digest(args: argparse.Namespace) -> str | None:
    """The SHA-256 of the state that the run started from; a resumed run has recorded it."""
    if goes_on(args):
        return read_config(args.resume).get("state_found")
    return digest(args.load_state.read_bytes())


def save_state(path: Path, tuning: Tuning) -> None:
    """Write weights, hyperparameters and moments for -s; the file is complete or unchanged."""
    content = io.BytesIO()
    saved = {"state": vars(tuning.state), "transforms": tuning.settings.transforms}
    torch.save(saved, content)
    write_whole(path, content.getvalue())


def read_state(path: Path, expected: State, settings: Settings) -> State:
    """The start of a run like `expected` from a state written by -S.

    It takes weights, momentum and hyperparameters from the file, and Adam's moments if all tuned
    hyperparameters have them; everything else starts anew. Raises UserError if the file holds no
    state, or one of a run unlike `expected`.
    """
    try:
        saved = torch.load(path, map_location=expected.weights.device, weights_only=True)
        state, transforms = State(**saved["state"]), saved["transforms"]
        saved_shapes, here = _shapes(state), _shapes(expected)
    except Exception as error:  # a damaged file may raise any error
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not a saved state: {reason}") from error
    for name in {**here, **saved_shapes}:
        if saved_shapes.get(name) != here.get(name):
            has = here.get(name, "none")
            raise UserError(
                f"{path} holds {name} {saved_shapes.get(name, 'none')}, this run has {has}"
            )
    if transforms != settings.transforms:
        raise UserError(
            f"{path} holds raw values of {transforms}, this run has {settings.transforms}"
        )
    adam = state if set(settings.optimised) <= set(state.moments) else expected
    start = state.weights.clone(), {name: buffer.clone() for name, buffer in state.buffers.items()}
    return replace(
        expected,
        **{n: getattr(state, n) for n in ("weights", "buffers", "raw", "factor", "fresh")},
        momentum_buffer=state.momentum_buffer,
        moments={name: adam.moments[name] for name in settings.optimised},
        updates=adam.updates,
        begun=adam.updates,
        start=start,
        good=start,
    )


def _shapes(state: State) -> dict[str, str]:
    """Shape and type of everything that a run takes from a saved state."""
    tensors = {n: getattr(state, n) for n in ("weights", "momentum_buffer", "factor", "updates")}
    tensors |= {f"raw {name}": values for name, values in state.raw.items()}
    tensors |= {f"buffer {name}": values for name, values in state.buffers.items()}
    kinds = {name: str(values.dtype).removeprefix("torch.") for name, values in tensors.items()}
    return {name: f"{list(values.shape)} {kinds[name]}" for name, values in tensors.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(element, device) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(element, device) for element in value)
    return value


if __name__ == "__main__":
    run_command(main, wrong_input=(OnePassError,))
