"""Train many runs of SGD at once, each tuning its own hyperparameters as it goes.

    python tune_one_pass.py -c configs/energy.yaml configs/ours_lr_momentum.yaml --draws 200
    python tune_one_pass.py -c configs/fashion.yaml configs/random.yaml --lr 0.05 --momentum 0.9
    python plot.py one_pass runs/energy-ours runs/energy-random

-c takes one file for the problem and one for the algorithm; every key is also a flag, and flags
win. A run is one draw of the initial hyperparameters; all draws are computed together. The run's
directory holds the medians over the draws in metrics.csv and every draw's numbers in draws.npz.
"""

import argparse
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from command_line import (
    computing_parser,
    device_name,
    fraction,
    new_directory,
    nonnegative_int,
    open_run,
    parse,
    positive_float,
    positive_int,
    run_command,
    set_up,
)
from files import write_whole
from one_pass import (
    DEFAULT_TRANSFORMS,
    METHODS,
    NAMES,
    SMALLEST_POPULATION,
    TRANSFORMS,
    OnePassError,
    Settings,
    State,
    Tuning,
    initial_hyperparameters,
    initial_state,
)
from one_pass_problems import MODELS, PROBLEMS, Problem, default_model, make_problem, make_samples
from one_pass_report import (
    Columns,
    draw_one_pass_run,
    final_losses,
    median_of_draws,
    summary,
)
from run_log import RunLog, run_to_end
from yaml_settings import Key, add_settings, complete, mapping, truth

# what a draw's random numbers are for; each has a stream of its own
HYPERPARAMETERS, WEIGHTS, TRAINING, VALIDATION = range(4)

KEYS = (
    Key("dataset", str, "energy", "the problem's data", choices=PROBLEMS),
    Key("model", str, None, "the network; by default the one published", choices=MODELS),
    Key("method", str, "fixed", "how hyperparameters are tuned", choices=METHODS),
    Key("optimised_hyperparameters", str, [], "those that are tuned", True, NAMES),
    Key("high_dimensional_hyperparameters", str, [], "with a value for each weight", True, NAMES),
    Key("network_weight_steps", positive_int, 10, "weight steps for each hyperparameter step, T"),
    Key("hyperparameter_steps", positive_int, 400, "hyperparameter steps"),
    Key("total_step_limit", positive_int, None, "weight steps in all, if fewer than both make"),
    Key("batch_size", positive_int, None, "training and validation samples a step; none: all"),
    Key("validation_proportion", fraction, 0.0, "of the training data, held out"),
    Key("split_seed", nonnegative_int, 1, "of the permutation of the rows before they are split"),
    Key("look_back", positive_int, 5, "terms of the series, i (odd is safer), or unrolled steps"),
    Key("hyperparameter_lr", positive_float, 0.05, "Adam's rate on the raw values"),
    Key("final_hyperparameter_lr", positive_float, None, "the rate falls to this; none: stays"),
    Key("chain_rule", truth, True, "false: Adam is fed the derivative for the natural value"),
    Key("recover", truth, False, "a run that diverges goes on from its last good weights, slower"),
    Key("network_weight_grad_clipping", mapping, {}, "of the training gradient: {norm: .25}"),
    Key(
        "hyperparameter_clipping", mapping, {"lr": [-10.0, 0.0]}, "bounds of raw values; null: none"
    ),
    Key("transformed_hyperparameters", mapping, DEFAULT_TRANSFORMS, "exp, 10^ or sigmoid"),
    Key("reset_model_after_hyperparameter_update", truth, False, "train from the start again"),
    Key("lr", positive_float, None, "of every draw at the start; none: drawn"),
    Key("weight_decay", positive_float, None, "of every draw at the start; none: drawn"),
    Key("momentum", fraction, None, "of every draw at the start; none: drawn"),
    Key("draws", positive_int, 1, "runs"),
    Key("first_draw", nonnegative_int, 0, "number of the first one"),
    Key("log_every", positive_int, None, "weight steps; none: a fortieth of the run"),
)


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = computing_parser(
        "Tune the hyperparameters of SGD in the one pass that trains the weights.", "tune_one_pass"
    )
    add = parser.add_argument
    add("--data-dir", "--data_dir", type=Path, default="data", metavar="DIR", help="data sets")
    add("-d", dest="device", type=device_name, default=argparse.SUPPRESS, help="as --device")
    add("-S", "--save_state", type=Path, metavar="FILE", help="write the last state here too")
    add("-s", "--load_state", type=Path, metavar="FILE", help="start from a state that -S wrote")
    add("-l", "--log_root", type=Path, metavar="DIR", help="runs are made in it (default: runs)")
    add("-g", "--group", metavar="NAME", help="of runs that belong together: a folder of log_root")
    add("-n", "--name", metavar="NAME", help="of the run's folder in it (default: by the time)")
    add_settings(parser, KEYS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, report."""
    args = parse(make_parser(), argv)
    complete(args, KEYS)
    fill_in(args)
    device, dtype = set_up(args)
    problem = make_problem(
        args.dataset,
        args.model,
        args.validation_proportion,
        args.split_seed,
        args.data_dir,
        dtype,
        device,
    )
    tuning = make_tuning(args, problem, device, dtype)
    with open_run(args, "tune_one_pass", problem) as log:
        log.say(f"{problem.source}; {args.draws} runs of {args.steps:,} steps")
        columns, finished = train(args, problem, tuning, log)
        report(args, problem, columns, log)
        if args.save_state is not None:
            save_state(args.save_state, tuning.state)
    if not finished:
        raise KeyboardInterrupt


def fill_in(args: argparse.Namespace) -> None:
    """Settings that follow from others; OnePassError where two contradict each other."""
    args.model = args.model or default_model(args.dataset)
    every = 1 if args.method == "fixed" else args.network_weight_steps
    steps = args.network_weight_steps * args.hyperparameter_steps
    args.steps = min(steps, args.total_step_limit or steps) // every * every
    if args.steps == 0:
        raise OnePassError(
            f"total_step_limit {args.total_step_limit} ends before the first hyperparameter step, "
            f"after {every} weight steps"
        )
    wanted = args.log_every or args.steps // 40
    args.log_every = max(wanted // every, 1) * every
    name_directory(args)
    tuned = args.method not in ("fixed", "stepped_lr")
    if tuned and not args.optimised_hyperparameters:
        raise OnePassError(f"method {args.method} needs optimised_hyperparameters, such as lr")
    if tuned and args.method != "successive_gradients" and not args.validation_proportion:
        raise OnePassError(f"method {args.method} needs a validation_proportion above 0")
    if args.method == "successive_gradients" and args.optimised_hyperparameters != ["lr"]:
        raise OnePassError("successive_gradients tunes lr, nothing else")
    if args.method == "population":
        if args.high_dimensional_hyperparameters:
            raise OnePassError("a population has one value of each hyperparameter for a run")
        if args.draws < SMALLEST_POPULATION:
            raise OnePassError(f"a population needs --draws {SMALLEST_POPULATION} or more")
    check_tables(args)
    if args.save_state is not None and not args.save_state.resolve().parent.is_dir():
        raise OnePassError(f"-S {args.save_state}: there is no such folder")


def name_directory(args: argparse.Namespace) -> None:
    """Make --out of -l, -g and -n, where one of them is given."""
    parts = (args.log_root, args.group, args.name)
    if parts == (None, None, None) or args.resume is not None:
        return
    if args.out is not None:
        raise OnePassError("--out names the whole directory: leave out -l, -g and -n")
    folder = (args.log_root or Path("runs")) / (args.group or "")
    args.out = folder / args.name if args.name else new_directory("tune_one_pass", folder)


def check_tables(args: argparse.Namespace) -> None:
    """OnePassError where a setting that is a table holds what it can't."""
    for key, known in (
        ("network_weight_grad_clipping", ("norm",)),
        ("hyperparameter_clipping", NAMES),
        ("transformed_hyperparameters", NAMES),
    ):
        for name in getattr(args, key):
            if name not in known:
                raise OnePassError(f"{key} knows {', '.join(known)}, not {name!r}")
    norm = args.network_weight_grad_clipping.get("norm", 1.0)
    if not is_number(norm) or norm <= 0:
        raise OnePassError(f"network_weight_grad_clipping: norm is a number above 0, not {norm!r}")
    for name, pair in args.hyperparameter_clipping.items():
        two = isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))
        if pair is not None and not (two and pair[0] <= pair[1]):
            raise OnePassError(
                f"hyperparameter_clipping: {name} needs two raw values such as [-10, 0], or null "
                f"for none, not {pair!r}"
            )
    for name, kind in args.transformed_hyperparameters.items():
        if kind not in TRANSFORMS:
            raise OnePassError(
                f"{name} can be transformed by {', '.join(TRANSFORMS)}, not {kind!r}"
            )


def is_number(value: Any) -> bool:
    """Whether a value from YAML is a number, infinities included."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


# ---- building ----


def make_settings(args: argparse.Namespace) -> Settings:
    """The tuner's settings."""
    return Settings(
        method=args.method,
        optimised=tuple(args.optimised_hyperparameters),
        high_dimensional=tuple(args.high_dimensional_hyperparameters),
        transforms=args.transformed_hyperparameters,
        every=args.network_weight_steps,
        look_back=args.look_back,
        lr=args.hyperparameter_lr,
        final_lr=args.final_hyperparameter_lr or args.hyperparameter_lr,
        updates=args.steps // args.network_weight_steps,
        chain_rule=args.chain_rule,
        recover=args.recover,
        clip_norm=args.network_weight_grad_clipping.get("norm"),
        bounds={n: tuple(pair) for n, pair in args.hyperparameter_clipping.items() if pair},
        reset=args.reset_model_after_hyperparameter_update,
    )


def make_tuning(
    args: argparse.Namespace, problem: Problem, device: torch.device, dtype: torch.dtype
) -> Tuning:
    """All draws at their start; a draw's numbers do not depend on which others run beside it."""
    settings = make_settings(args)
    hyperparameters = initial_hyperparameters(generators(args, HYPERPARAMETERS))
    for name in NAMES:
        if getattr(args, name) is not None:
            hyperparameters[name].fill_(getattr(args, name))
    weights, buffers = problem.objective.initial(generators(args, WEIGHTS))
    buffers = {
        name: buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
        for name, buffer in buffers.items()
    }
    state = initial_state(weights.to(device, dtype), buffers, hyperparameters, settings)
    going_on = args.resume is not None and (args.resume / "checkpoint.pt").exists()
    if args.load_state is not None and not going_on:
        state = read_state(args.load_state, state)
    samples = [
        make_samples(part, args.batch_size, problem.sequential, generators(args, purpose))
        if len(part[0])
        else None
        for part, purpose in ((problem.training, TRAINING), (problem.validation, VALIDATION))
    ]
    return Tuning(problem.objective, *samples, settings, state)


def generators(args: argparse.Namespace, purpose: int) -> list[Generator]:
    """One for each draw, seeded by the run's seed, the draw's number and what it is for."""
    numbers = range(args.first_draw, args.first_draw + args.draws)
    seeds = [np.random.SeedSequence([args.seed, number, purpose]) for number in numbers]
    return [Generator().manual_seed(int(seed.generate_state(1)[0])) for seed in seeds]


# ---- training ----


def train(
    args: argparse.Namespace, problem: Problem, tuning: Tuning, log: RunLog
) -> tuple[Columns, bool]:
    """Train, a record and a checkpoint every `log_every` steps; False where Ctrl-C ended it."""
    columns = Columns()
    saved = log.load_checkpoint()
    if saved is not None:
        columns = Columns(saved[1]["columns"])
        load_tuning(tuning, saved[1])
    else:
        log.record(0, record(problem, tuning, columns, log, seconds=0.0))

    def step(number: int) -> tuple[dict[str, float], dict[str, float]]:
        started = time.perf_counter()
        tuning.advance(number - tuning.state.step)
        seconds = columns.last("seconds") + time.perf_counter() - started
        row = record(problem, tuning, columns, log, seconds)
        return row, {"validation": row["Loss/Validation"]}

    records = [*range(args.log_every, args.steps, args.log_every), args.steps]
    left = [number for number in records if number > tuning.state.step]
    with log.progress(len(records), len(records) - len(left), "record") as progress:
        finished = run_to_end(log, progress, left, step, lambda: checkpoint(tuning, columns))
    return columns, finished


def record(
    problem: Problem, tuning: Tuning, columns: Columns, log: RunLog, seconds: float
) -> dict[str, float]:
    """Evaluate every draw and keep its numbers in draws.npz; the medians, for metrics.csv."""
    started = time.perf_counter()
    row = measured(problem, tuning)
    evaluation = time.perf_counter() - started
    columns.append(tuning.state.step, seconds, evaluation, row)
    log.write_arrays("draws.npz", columns.arrays())
    medians = {name: median_of_draws(values) for name, values in row.items()}
    return {**medians, "seconds": seconds}


@torch.no_grad()
def measured(problem: Problem, tuning: Tuning) -> dict[str, np.ndarray]:
    """Losses and hyperparameters of every draw, [D] each; nan where there is no such part."""
    state, found = tuning.state, {}
    for title in ("Training", "Validation", "Test"):
        inputs, targets = getattr(problem, title.lower())
        if len(inputs):
            means = tuning.objective.evaluate(state.weights, state.buffers, inputs, targets)
            loss, accuracy = (
                means.loss.double().cpu().numpy(),
                means.accuracy.double().cpu().numpy(),
            )
        else:
            loss = accuracy = np.full(len(state.weights), math.nan)
        found[f"Loss/{title}"] = loss
        if problem.sequential:
            with np.errstate(over="ignore"):
                found[f"Perplexity/{title}"] = np.exp(loss)
        elif tuning.objective.classifies:
            found[f"Accuracy/{title}"] = accuracy
        else:
            found[f"Unnormalised_Loss/{title}"] = loss * problem.unit
    for name, values in tuning.hyperparameters.items():
        title = {"lr": "Lr", "weight_decay": "Weight_Decay", "momentum": "Momentum"}[name]
        middle = values.double().log().mean(dim=1).exp()  # of many values the geometric mean
        found[f"Hyperparameter/{title}"] = middle.cpu().numpy()
    found["Skipped_Updates"] = state.skipped[:, 0].double().cpu().numpy()
    return found


def report(args: argparse.Namespace, problem: Problem, columns: Columns, log: RunLog) -> None:
    """results.json, the figures, and the final losses on the screen."""
    losses = final_losses(columns.arrays())
    results = {"data": problem.source, "draws": args.draws, **summary(losses, args.seed)}
    for name in ("Loss/Validation", "Loss/Test", "Accuracy/Test"):
        if name in columns.arrays():
            key = name.replace("/", "_").lower()
            results[key] = median_of_draws(columns.arrays()[name][-1])
    log.write_json("results.json", results)
    log.draw(draw_one_pass_run)
    log.say(
        f"final test loss: median {results['median']:.4g}, mean {results['mean']:.4g} of those "
        f"that did not diverge, {results['diverged']:.1%} diverged; in {log.directory}"
    )


# ---- saving ----


def checkpoint(tuning: Tuning, columns: Columns) -> dict[str, Any]:
    """All that goes on changing."""
    samples = [tuning.training, tuning.validation]
    return {
        "state": vars(tuning.state),
        "samples": [None if part is None else part.state_dict() for part in samples],
        "columns": columns.to_tensors(),
    }


def load_tuning(tuning: Tuning, saved: dict[str, Any]) -> None:
    """Go on from what `checkpoint` made."""
    tuning.restore(State(**_moved(saved["state"], tuning.state.weights.device)))
    for part, state in zip((tuning.training, tuning.validation), saved["samples"], strict=True):
        if part is not None:
            part.load_state_dict(state)


def save_state(path: Path, state: State) -> None:
    """Weights, hyperparameters and moments, for -s; in one piece, or not at all."""
    content = io.BytesIO()
    torch.save(vars(state), content)
    write_whole(path, content.getvalue())


def read_state(path: Path, expected: State) -> State:
    """A state that -S wrote, as the start of a run like `expected`."""
    try:
        found = torch.load(path, map_location=expected.weights.device, weights_only=True)
        state = State(**found)
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = " ".join(str(error).split())[:100]
        raise OnePassError(f"{path} is not a saved state: {reason}") from error
    for name in ("weights", "factor"):
        there, here = getattr(state, name).shape, getattr(expected, name).shape
        if there != here:
            raise OnePassError(f"{path} holds {name} {list(there)}, this run has {list(here)}")
    state.step = 0
    return state


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(element, device) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(element, device) for element in value)
    return value


if __name__ == "__main__":
    run_command(main)
