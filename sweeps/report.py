"""The results of a sweep: table and summary from the study, figures from the table.

    trials.csv        a row for each trial
    results.json      counts, the best trial and its command line, for each variant
    figures/best.png  the best value so far, over the trials
    figures/flags.png the value against each searched flag

Every file is written atomically, because processes that share a sweep may report simultaneously.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from experiment.errors import RunLogError
from experiment.files import finite_or_null, json_text, write_whole
from experiment.run_reader import read_config
from figures.style import (
    add_legend,
    colours,
    label_axes,
    new_figure,
    one_panel,
    plain_text,
    save_figure,
)
from sweeps.space import SearchedFlag, searched_flag
from sweeps.study import STATES, counted_trials, state_of

BEFORE_FLAGS = ("number", "variant", "draw", "state", "value")
AFTER_FLAGS = ("exit_status", "error", "seconds", "directory")
PANELS_A_ROW = 3

Table = Mapping[str, Sequence[Mapping[str, str]]]  # by variant


@dataclass(frozen=True)
class Report:
    """All trials of a sweep, by variant, at one moment.

    trials: the trials by variant, in order of their numbers; without variants, the only key is "".
    flags: the searched flags.
    metric: the name of the value.
    maximize: whether a higher value is better.
    """

    trials: Mapping[str, Sequence[FrozenTrial]]
    flags: Sequence[SearchedFlag]
    metric: str
    maximize: bool

    @classmethod
    def of(cls, studies: Mapping[str, Study], flags: Sequence[SearchedFlag], metric: str):
        """The report of the current state of the studies, which are given by variant."""
        trials = {name: counted_trials(study) for name, study in studies.items()}
        direction = next(iter(studies.values())).direction
        return cls(trials, flags, metric, direction == StudyDirection.MAXIMIZE)

    def counts(self, variant: str) -> dict[str, int]:
        """The number of trials in each state that occurs."""
        numbers = Counter(map(state_of, self.trials[variant]))
        return {state: numbers[state] for state in STATES if numbers[state]}

    def done(self, variant: str) -> list[FrozenTrial]:
        """The trials that ended by themselves with a finite value."""
        return [trial for trial in self.trials[variant] if state_of(trial) == "done"]

    def best(self, variant: str) -> FrozenTrial | None:
        """The first of the trials with the best value; None if no trial is done."""
        sign = -1 if self.maximize else 1
        return min(self.done(variant), key=lambda trial: sign * trial.value, default=None)

    def rows(self, variant: str) -> list[dict[str, Any]]:
        """The rows of the table, in order of the trials' numbers."""
        return [self.row(variant, trial) for trial in self.trials[variant]]

    def row(self, variant: str, trial: FrozenTrial) -> dict[str, Any]:
        """The row of a trial in the table."""
        attributes = trial.user_attrs
        return {
            "number": trial.number,
            "variant": variant,
            "draw": attributes.get("draw"),
            "state": state_of(trial),
            "value": trial.value,
            **{
                flag.name: flag.exact(trial.params[flag.name])
                for flag in self.flags
                if flag.name in trial.params
            },
            **{name: attributes.get(name) for name in AFTER_FLAGS},
        }

    def summary(self, variant: str) -> dict[str, Any]:
        """The counts, the mean and median value, and the best trial with its command line."""
        values = [trial.value for trial in self.done(variant)]
        best = self.best(variant)
        return {
            "trials": self.counts(variant),
            "mean": statistics.fmean(values) if values else None,
            "median": statistics.median(values) if values else None,
            "best": None
            if best is None
            else self.row(variant, best) | {"command": best.user_attrs["command"]},
        }


def write_table(report: Report, directory: Path) -> None:
    """Write trials.csv."""
    columns = [*BEFORE_FLAGS, *(flag.name for flag in report.flags), *AFTER_FLAGS]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for variant in report.trials:
        table.writerows(report.rows(variant))
    write_whole(directory / "trials.csv", text.getvalue())


def write_results(report: Report, directory: Path) -> None:
    """Write results.json."""
    summaries = {variant: report.summary(variant) for variant in report.trials}
    results = {
        "metric": report.metric,
        "direction": "maximize" if report.maximize else "minimize",
        **summaries.get("", {"variants": summaries}),
    }
    write_whole(directory / "results.json", json_text(finite_or_null(results)))


def write_report(report: Report, directory: Path, figures: bool) -> None:
    """Write trials.csv, results.json and, if `figures`, the figures."""
    write_table(report, directory)
    write_results(report, directory)
    if figures:
        plot_sweep_run(directory)


def plot_sweep_run(directory: str | Path) -> list[Path]:
    """Draw both figures from config.json and trials.csv, and return their paths."""
    directory = Path(directory)
    config, rows = read_config(directory), read_table(directory)
    flags = [searched_flag(text) for text in config["search"]]
    best, values = (directory / "figures" / f"{name}.png" for name in ("best", "flags"))
    plot_best_so_far(rows, config["metric"], config["direction"] == "maximize", best)
    plot_values_over_flags(rows, flags, config["metric"], values)
    return [best, values]


def read_table(directory: Path) -> Table:
    """The rows of trials.csv by variant, as texts; raises RunLogError if it can't be read."""
    path, table = directory / "trials.csv", {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                table.setdefault(row["variant"], []).append(row)
    except OSError as error:
        raise RunLogError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise RunLogError(f"{path} is damaged: {error}") from error
    return table


def plot_best_so_far(table: Table, metric: str, maximize: bool, path: Path) -> None:
    """Draw a dot for each trial, and the best value so far as a step curve for each variant."""
    figure, axes = one_panel()
    best_of = np.maximum if maximize else np.minimum
    for colour, (variant, rows) in zip(colours(len(table)), table.items(), strict=True):
        done = sorted(_in_state(rows, "done"), key=lambda row: int(row["draw"]))
        draws = [int(row["draw"]) for row in done]
        values = np.array([float(row["value"]) for row in done])
        axes.plot(draws, values, ".", color=colour, ms=4, alpha=0.45)
        if done:
            best = best_of.accumulate(values)
            axes.step(draws, best, color=colour, lw=1.4, where="post", label=variant or "best")
    label_axes(axes, "Best value so far", "draw", metric)
    add_legend(axes)
    save_figure(figure, path)


def plot_values_over_flags(
    table: Table, flags: Sequence[SearchedFlag], metric: str, path: Path
) -> None:
    """Draw the values against each searched flag in a panel; pruned trials are ticks below."""
    columns = min(PANELS_A_ROW, len(flags))
    lines = math.ceil(len(flags) / columns)
    figure = new_figure(3.6 * columns + 0.4, 3.0 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(flags) :]:
        axes.set_visible(False)
    for axes, flag in zip(panels, flags, strict=False):
        _plot_values_over_flag(table, flag, metric, axes)
    save_figure(figure, path)


def _plot_values_over_flag(table: Table, flag: SearchedFlag, metric: str, axes: Axes) -> None:
    for colour, (variant, rows) in zip(colours(len(table)), table.items(), strict=True):
        done, label = _in_state(rows, "done"), variant or None
        values = [float(row["value"]) for row in done]
        axes.plot(_places(done, flag), values, "o", color=colour, ms=4, alpha=0.6, label=label)
        # pruned trials have no value: they were compared by a column that may be another number
        bottom = axes.get_xaxis_transform()
        places = _places(_in_state(rows, "pruned"), flag)
        axes.plot(places, [0.01] * len(places), "|", color=colour, ms=6, transform=bottom)
    label_axes(axes, f"--{flag.name}", "", metric)
    _scale(axes, flag)
    add_legend(axes)


def _in_state(rows: Sequence[Mapping[str, str]], state: str) -> list[Mapping[str, str]]:
    return [row for row in rows if row["state"] == state]


def _places(rows: Sequence[Mapping[str, str]], flag: SearchedFlag) -> list[float]:
    """The positions of the trials' values on a flag's axis; choices are at 0, 1, 2, ..."""
    texts = [row[flag.name] for row in rows]
    return [*map(flag.choices.index if flag.choices else float, texts)]


def _scale(axes: Axes, flag: SearchedFlag) -> None:
    """Let the axis span a flag's range, on a log scale or with the names of choices if need be."""
    if flag.kind == "choice":
        axes.set_xticks(range(len(flag.choices)), map(plain_text, flag.choices))
        axes.set_xlim(-0.5, len(flag.choices) - 0.5)
        return
    if flag.kind == "log":
        axes.set_xscale("log")
        axes.set_xlim(flag.low, flag.high)
        return
    margin = 0.03 * (flag.high - flag.low)
    axes.set_xlim(flag.low - margin, flag.high + margin)
    axes.xaxis.get_major_locator().set_params(integer=flag.kind == "int")
