"""Judges learned rules in other settings, and compares them with classical rules and references.

    python evaluate.py runs/main-...                    does it generalise? other images, four times
                                                        the updates, twice the units, references
    python evaluate.py runs/main-... --steps 250        as it was trained, from new draws
    python evaluate.py runs/main-... --datasets mnist fashion rotated --layers 32 --layers 256 32 \\
        --steps 250 500 1000                            other images, sizes and numbers of steps
    python evaluate.py latent-predictive                a rule of the zoo, rules/zoo/NAME.json
    python evaluate.py runs/main-... --datasets mnist fashion --evaluations 10 --to_zoo NAME
    python evaluate.py runs/a runs/b --rules oja sanger instar foldiak --references random pca

With any flag that says what is compared, --datasets, --layers and --steps default to those of the
first RUN, and rules and references are those that are asked for. One training is probed after each
of the --steps. In a network deeper than the one that a rule was learned on, further layers use
the rule of its last layer. "rotated" stands for MNIST's digits, each rotated by a fixed angle of up
to 45 degrees.

Layers are trained like those of the run, all at once or one after the other; with --layerwise, one
after the other, each by --steps updates.

Classical rules have their own networks, on pixel-centred images: linear units for oja and sanger
and rectified units for krotov_hopfield (p = k = 2, Delta = 0.4), without inhibition; sigmoid units
that inhibit each other for instar and foldiak. For each data set and layer sizes their rate is
chosen from 1e-4 to 1 in half powers of ten, by the accuracy after the last step on a sixth of the
training images, which is held out meanwhile. References without steps are random features (the
first RUN's initial network), pca (as many components as the last layer has units), and vicreg,
trained by backpropagation for 100 epochs, many minutes each. Two see labels: class_pairs is the
first RUN's rule on views of two images of one class, in the place of two views of one image;
supervised is a network of such units, and a classifier, trained by backpropagation for 30 epochs.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from comparison.choices import CLASSICAL_NAMES, REFERENCES
from experiment.command_line import (
    Once,
    UserError,
    common_parser,
    parse,
    positive_int,
    run_command,
    save_whole_paths,
)
from experiment.data_names import DATASETS, OWN, data_name, data_titles, is_path
from experiment.own_code import FORM, is_own_code, own_code_name
from rules.choices import run_path, zoo_path

ROTATED = "rotated"
OTHER = {"mnist": "fashion", "fashion": "mnist"}  # data of the same shape, to generalise to


def make_parser():
    """The command's flags; --datasets replaces the common --dataset."""
    parser = common_parser("Judge learned rules beyond their training.", "evaluate")
    parser.add_argument("runs", type=run_path, nargs="+", metavar="RUN",
                        help="directories of runs of main.py, or names in the zoo")  # fmt: skip
    parser.add_argument("--rule", type=own_code_name, metavar=FORM,
                        help="the class of the runs' rules, if it is your own")  # fmt: skip
    group = parser.add_argument_group("what is compared", conflict_handler="resolve")
    add = group.add_argument
    known = (*DATASETS, ROTATED)
    add("--datasets", "--dataset", nargs="+", action=Once,
        type=partial(data_name, known=known), metavar="DATA",
        help=f"images to compare on: {', '.join(known)}, {OWN}")  # fmt: skip
    add("--layers", type=positive_int, nargs="+", action="append", metavar="UNITS",
        help="units of each layer of a network; may be given several times")  # fmt: skip
    add("--steps", type=positive_int, nargs="+", help="numbers of updates of a training")
    add("--to_zoo", metavar="NAME", help="put RUN's rule into the zoo, with its results")
    add("--layerwise", action="store_true", help="train layers one after the other")
    add("--evaluations", "--seeds", dest="seeds", type=positive_int, default=3, metavar="N",
        help="trainings with each method, data set, network and number of updates")  # fmt: skip
    add("--held_out", type=positive_int, metavar="IMAGES",
        help="judge on this many held-out training images instead of the test images")  # fmt: skip
    add("--rules", nargs="*", choices=CLASSICAL_NAMES, help="classical rules to compare with")
    add("--references", nargs="*", choices=REFERENCES, help="other methods to compare with")
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import numpy as np

from comparison.learned_run import LearnedRun, load_run, zoo_entry
from comparison.rule_comparison import (
    HELD_OUT,
    RATES,
    Method,
    Row,
    RuleComparison,
    Setting,
    classical,
    learned,
    reference_methods,
    rotated,
    run_comparison,
)
from experiment.devices import set_up
from experiment.opening import open_run
from experiment.own_code import load_own_code
from experiment.run_log import RunLog
from experiment.seeds import seeded_generator
from experiment.statistics import counted_trainings, mean_and_deviation
from experiment.tables import aligned, markdown
from figures.evaluation import plot_evaluation_run
from mnist_datasets import ImageData, hold_out, load_images
from rules import save_zoo


def ask_whether_it_generalises(args, run: LearnedRun) -> None:
    """Where nothing is asked for, compare other images, more updates and units, and references."""
    asked = (args.datasets, args.layers, args.steps, args.rules, args.references, args.to_zoo)
    if any(value is not None for value in asked):
        return
    layers = run.config["layers"]
    args.datasets = [*run.datasets, *(OTHER[name] for name in run.datasets if name in OTHER)]
    args.layers = [layers, [*layers[:-1], 2 * layers[-1]]] if layers else None
    args.steps = [run.steps, 4 * run.steps]
    if layers:
        args.rules, args.references = ["oja"], ["random", "pca"]


def refuse_changed_images(args, runs: Sequence[LearnedRun], settings: Sequence[Setting]) -> None:
    """Raise UserError if images of the user's own are not those that a run has learned on."""
    titles = dict(zip(args.datasets, data_titles(args.datasets), strict=True))
    digests = {setting.dataset: setting.train.fingerprint() for setting in settings}
    for run in runs:
        learned_on = str(run.config.get("data_found")).split("; ")
        for name in filter(is_path, run.datasets):
            same_share = run.config.get("held_out") == args.held_out
            if name in titles and same_share and digests[titles[name]] not in learned_on:
                raise UserError(f"{name} has changed since {run.name} learned on it")


def fill_in(args, runs: Sequence[LearnedRun]) -> None:
    """Take missing flags from the first run, and remove repeated values."""
    ask_whether_it_generalises(args, runs[0])
    config = runs[0].config
    args.datasets = list(dict.fromkeys(args.datasets or runs[0].datasets))
    layers = args.layers or [config["layers"]]
    args.layers = [list(sizes) for sizes in dict.fromkeys(map(tuple, layers))]
    args.steps = sorted(set(args.steps or [runs[0].steps]))
    args.rules, args.references = args.rules or [], args.references or []


def refuse_what_cannot_be_compared(args, runs: Sequence[LearnedRun]) -> None:
    """Raise UserError if rows of the table would share a name, or probes would differ."""
    names = Counter([run.name for run in runs] + args.rules + args.references)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{twice[0]} would name several rows: give each run, rule, reference once")
    for run in runs[1:]:
        if run.config["C"] != runs[0].config["C"]:
            raise UserError(
                f"{runs[0].name} and {run.name} were judged with --C {runs[0].config['C']:g} and "
                f"{run.config['C']:g}: evaluate them one by one"
            )
    if "class_pairs" in args.references and runs[0].views is None:
        raise UserError(f"--references class_pairs: {runs[0].name} takes single images, not pairs")
    if [] in args.layers and (args.rules or args.references):
        raise UserError(f"{runs[0].name} has convolutions only: give --layers to compare with it")


def refuse_what_is_not_for_the_zoo(args) -> None:
    """Raise UserError if --to_zoo is given with several runs or an unsuitable name."""
    if args.to_zoo is None:
        return
    if len(args.runs) > 1:
        raise UserError(f"--to_zoo keeps one rule: give one RUN, not {len(args.runs)}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", args.to_zoo):
        raise UserError(f"--to_zoo {args.to_zoo!r}: take a name of a-z, 0-9, -, such as mnist32")
    if args.rule:
        raise UserError("--to_zoo keeps rules of the families here, not of a class of your own")
    if args.held_out:
        raise UserError("--to_zoo keeps accuracies on test images: leave out --held_out")


def make_methods(args, runs: Sequence[LearnedRun]) -> dict[str, Method]:
    """The methods to compare, by their names in the table."""
    references = reference_methods(runs[0])
    return {
        **{run.name: Method(lambda setting, run=run: learned(run, setting)) for run in runs},
        **{
            name: Method(lambda setting, rate, name=name: classical(name, setting, rate), RATES)
            for name in args.rules
        },
        **{name: references[name] for name in args.references},
    }


def load_data(name: str, data_dir: Path, held_out: int | None) -> tuple[ImageData, ImageData]:
    """The images for training and those for judging.

    The angles of rotated digits are the same in every run.

    held_out: judge on so many training images, held out; None: on the test images.
    """
    train_data, test_data = load_images("mnist" if name == ROTATED else name, data_dir)
    data = hold_out(train_data, held_out) if held_out else (train_data, test_data)
    if name != ROTATED:
        return data
    return tuple(rotated(images, seeded_generator(part)) for part, images in enumerate(data))


def make_settings(args, run: LearnedRun, device, dtype) -> list[Setting]:
    """A setting for each data set and network, with the probe and batch size of the first run."""
    settings = []
    for name, title in zip(args.datasets, data_titles(args.datasets), strict=True):
        train_data, test_data = (
            data.to(device) for data in load_data(name, args.data_dir, args.held_out)
        )
        settings += [
            Setting(
                dataset=title,
                train=train_data,
                test=test_data,
                layers=tuple(layers),
                C=run.config["C"],
                outer_images=run.config["outer_images"],
                batch_size=min(run.config["batch_size"], len(train_data)),
                dtype=dtype,
                layerwise=args.layerwise,
            )
            for layers in args.layers
        ]
    return settings


def refuse_too_few_images(args, settings: Sequence[Setting]) -> None:
    """Raise UserError if there are not enough images to choose the rates of --rules."""
    for setting in settings:
        if args.rules and len(setting.train) < HELD_OUT:
            raise UserError(f"--rules chooses rates on a sixth of the training images, of which "
                            f"{setting.dataset} has {len(setting.train)}")  # fmt: skip


def smaller_batches(runs: Sequence[LearnedRun], settings: Sequence[Setting]) -> list[str]:
    """A line for each data set that has fewer images than the largest batches of the runs."""
    largest = max(run.config["batch_size"] for run in runs)
    counts = {setting.dataset: len(setting.train) for setting in settings}
    return [
        f"{name}: batches have all {count} images, not {largest}, as where the rule was learned"
        for name, count in counts.items()
        if count < largest
    ]


def what_was_found(runs: Sequence[LearnedRun], settings: Sequence[Setting]) -> dict[str, str]:
    """The fingerprints of the rules and images, by name, which must not change for --resume."""
    images = {setting.dataset: setting.train for setting in settings}
    fingerprints = {name: data.fingerprint() for name, data in images.items()}
    return fingerprints | {run.name: run.fingerprint() for run in runs}


# ---- results ----


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation (the sample's) of the test accuracy over the draws.

    There is one row for each method, data set, layer sizes and number of steps. Its `trainings`
    counts all trainings, its `finite` those with finite numbers, over which the statistics are
    taken.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if not row["held_out"]:
            key = tuple(row[name] for name in ("method", "dataset", "layers", "inner_steps"))
            groups.setdefault(key, []).append(row)
    summary = []
    for (method, dataset, layers, steps), group in groups.items():
        accuracies = [row["test_accuracy"] for row in group]
        finite = [value for value in accuracies if math.isfinite(value)]
        summary.append({
            "method": method,
            "dataset": dataset,
            "layers": layers,
            "inner_steps": steps,
            "rate": group[0]["rate"],
            "trainings": len(group),
            "finite": len(finite),
            **mean_and_deviation("test_accuracy", finite),
        })  # fmt: skip
    return summary


def table_cells(summary: Sequence[Row], draws: int) -> list[list[str]]:
    """A heading, then a row for each method, layer sizes and steps; data sets are columns.

    draws: the number of trainings; a cell with fewer finite ones says so.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row in summary))
    sizes = list(dict.fromkeys(row["layers"] for row in summary))
    lines: dict[tuple, dict[str, str]] = {}
    for row in sorted(summary, key=lambda row: sizes.index(row["layers"])):
        key = (row["method"], row["layers"], str(row["inner_steps"] or "-"))
        lines.setdefault(key, {})[row["dataset"]] = cell_text(row, draws)
    body = [[*key, *(cells.get(name, "") for name in datasets)] for key, cells in lines.items()]
    return [["method", "layers", "steps", *datasets], *body]


def cell_text(row: Row, draws: int) -> str:
    """Mean and sample deviation in percent, and the number of finite draws if not all are."""
    if not row["finite"]:
        return "not finite"
    mean, deviation = row["test_accuracy_mean"], row["test_accuracy_standard_deviation"]
    some = f" ({row['finite']} of {draws})" if row["finite"] < draws else ""
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return f"{100 * mean:.2f}{spread} %{some}"


def write_results(log: RunLog, comparison: RuleComparison) -> None:
    """Write results.json, and the table as table.md."""
    summary = summarize(comparison.rows)
    trainings, trials = [], []
    for row in comparison.rows:
        plain = {k: None if v != v else v for k, v in row.items() if k != "held_out"}
        if row["held_out"]:
            plain["held_out_accuracy"] = plain.pop("test_accuracy")
        (trials if row["held_out"] else trainings).append(plain)
    log.write_results({
        "data": {s.dataset: s.train.source for s in comparison.settings},
        "methods": list(comparison.methods),
        "summary": summary,
        "trainings": trainings,
        "trials_of_rates": trials,
    })  # fmt: skip
    if summary:
        log.write_text("table.md", markdown(table_cells(summary, comparison.draws)))


def report(log: RunLog, comparison: RuleComparison) -> None:
    """Draw the figure, and show the table."""
    summary = summarize(comparison.rows)
    if summary:
        log.plot(plot_evaluation_run)
        trainings = counted_trainings(comparison.draws)
        spread = ", mean ± sample deviation over" if comparison.draws > 1 else " of"
        log.say(f"test accuracy{spread} {trainings}")
        for line in aligned(table_cells(summary, comparison.draws)):
            log.say(line)


def accuracies_of(rows: Sequence[Row], method: str) -> list[Row]:
    """The test accuracies of a method, for the zoo: mean, sample deviation, number of trainings.

    There is one row for each data set, layer sizes and steps. Raises UserError if a training is not
    finite.
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["method"] == method and not row["held_out"]:
            key = tuple(row[name] for name in ("dataset", "layers", "inner_steps"))
            groups.setdefault(key, []).append(row["test_accuracy"])
    accuracies = []
    for (dataset, layers, steps), values in groups.items():
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"trainings on {dataset} by {steps} steps are not finite: not for the zoo"
            )
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        place = {"dataset": dataset, "layers": layers, "steps": steps}
        mean = float(np.mean(values))
        accuracies.append(place | {"mean": mean, "deviation": deviation, "trainings": len(values)})
    return accuracies


def keep_in_zoo(log: RunLog, run: LearnedRun, path: Path, name: str, rows: Sequence[Row]) -> None:
    """Write the rule of a run, which was read from `path`, and its accuracies to the zoo."""
    save_zoo(zoo_entry(run, path, name, accuracies_of(rows, run.name)), zoo_path(name))
    log.say(f"{name} is in the zoo: {zoo_path(name)}")


def main(argv: list[str] | None = None) -> None:
    """Read runs and data, make methods and settings, run the trainings, report."""
    args = parse(make_parser(), argv)
    save_whole_paths(args, "runs")
    refuse_what_is_not_for_the_zoo(args)
    device, dtype = set_up(args)
    own_rule = load_own_code(args.rule) if args.rule else None
    runs = [load_run(directory, own_rule) for directory in args.runs]
    if args.rule and not any(is_own_code(run.config.get("rule")) for run in runs):
        raise UserError("--rule needs a RUN whose rule is of a class of your own")
    fill_in(args, runs)
    refuse_what_cannot_be_compared(args, runs)
    settings = make_settings(args, runs[0], device, dtype)
    refuse_changed_images(args, runs, settings)
    refuse_too_few_images(args, settings)
    comparison = RuleComparison(
        make_methods(args, runs), settings, args.steps, args.seeds, args.seed
    )
    config = argparse.Namespace(**vars(args), found=what_was_found(runs, settings))
    with open_run(config, "evaluate", settings[0].train) as log:
        for source in dict.fromkeys(setting.train.source for setting in settings):
            log.say(source)
        for line in smaller_batches(runs, settings):
            log.say(line)
        finished = run_comparison(comparison, log)
        write_results(log, comparison)
        if args.to_zoo and finished:
            keep_in_zoo(log, runs[0], args.runs[0], args.to_zoo, comparison.rows)
        report(log, comparison)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
