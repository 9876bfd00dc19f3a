"""The figure of evaluate.py, drawn from the directory of its run alone.

    plot_evaluation_run("runs/evaluate-...")        # writes into its figures/, returns the paths

A column of panels belongs to one data set and shares its vertical scale.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiment.run_reader import read_results
from figures.style import (
    FONT,
    label_axes,
    looks,
    new_figure,
    percent_axis,
    save_figure,
    without_formulas,
)

Row = Mapping[str, Any]


def plot_evaluation_run(directory: str | Path) -> list[Path]:
    """Draw the accuracies in results.json over inner steps, if there are any."""
    summary = read_results(directory)["summary"]
    if not summary:
        return []
    path = Path(directory) / "figures" / "accuracy_over_steps.png"
    plot_accuracy_over_steps(summary, path)
    return [path]


def plot_accuracy_over_steps(summary: Sequence[Row], path: str | Path) -> None:
    """Draw test accuracy over inner steps, in a panel for each data set and layer sizes.

    Error bars are standard deviations; methods without steps are dashed lines.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row in summary))
    sizes = list(dict.fromkeys(row["layers"] for row in summary))
    methods = list(dict.fromkeys(row["method"] for row in summary))
    figure = new_figure(3.6 * len(datasets) + 1.4, 3.2 * len(sizes))
    grid = figure.subplots(len(sizes), len(datasets), squeeze=False, sharey="col")
    for i, layers in enumerate(sizes):
        for j, dataset in enumerate(datasets):
            axes, bottom = grid[i, j], "inner steps" if i == len(sizes) - 1 else ""
            for look, method in zip(looks(len(methods)), methods, strict=True):
                place = {"method": method, "dataset": dataset, "layers": layers}
                rows = [row for row in summary if place.items() <= row.items() and row["finite"]]
                _plot_method(axes, method, rows, look)
            percent_axis(axes)
            y_label = "" if j else "test accuracy of the probe, ± one deviation"
            label_axes(axes, f"{dataset}, {layers}", bottom, y_label)
            _step_axis(axes, sorted({row["inner_steps"] for row in summary} - {0}))
            axes.margins(y=0.08)
    shown = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    names = [name for name in methods if name in handles]
    legend = figure.legend([handles[name] for name in names], names, loc="outside right upper",
                           frameon=False, fontsize=FONT - 1)  # fmt: skip
    without_formulas(legend)
    save_figure(figure, path)


def _step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Put ticks at these numbers of steps, on a log scale if they span a factor of ten."""
    if steps and steps[-1] >= 10 * steps[0]:
        axes.set_xscale("log")
    axes.set_xticks(steps, [f"{n:,}" for n in steps])
    axes.xaxis.set_minor_locator(NullLocator())


def _plot_method(axes: Axes, method: str, rows: Sequence[Row], look: Mapping[str, Any]) -> None:
    mean = [row["test_accuracy_mean"] for row in rows]
    deviation = [row["test_accuracy_standard_deviation"] or 0.0 for row in rows]
    steps = [row["inner_steps"] for row in rows]
    if steps == [0]:
        axes.axhline(mean[0], ls="--", label=method, **look)
    elif rows:
        axes.errorbar(steps, mean, deviation, marker="o", ms=3, capsize=2, label=method, **look)
