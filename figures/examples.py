"""Figures of the programs under examples/, drawn from the directories of their runs alone.

    plot_imaml_run("runs/imaml-...")        # writes into its figures/, returns the paths

Each `plot_..._run` draws what its program draws at its end.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiment.run_reader import read_arrays, read_json, read_metrics, read_results
from figures.style import (
    COLOURS,
    FONT,
    GREY,
    add_legend,
    label_axes,
    new_figure,
    one_panel,
    percent_axis,
    save_figure,
)

NETWORKS = {"equilibrium": "equilibrium network", "ordinary": "ordinary network"}
# By panel: its hypergradient methods, and which method each theoretical rate belongs to
PANELS = {
    "Along the trajectory": (
        ("reverse", "checkpointed_reverse", "forward_mode", "truncated_reverse",
         "neumann_lookback"),
        {"contraction": "truncated_reverse"},
    ),
    "At the fixed point": (
        ("fixed_point", "neumann", "stoch_AID", "CG", "CG_normaleq", "nystrom"),
        {"contraction": "fixed_point", "CG": "CG", "CG_normaleq": "CG_normaleq"},
    ),
}  # fmt: skip


def plot_imaml_run(directory: str | Path) -> list[Path]:
    """Draw the meta-loss over meta-steps, and the scores of test tasks over steps."""
    scores = read_arrays(Path(directory) / "scores.npz")
    path = Path(directory) / "figures" / "meta_learning.png"
    plot_meta_learning(read_metrics(directory), scores, read_results(directory)["score"], path)
    return [path]


def plot_equilibrium_run(directory: str | Path) -> list[Path]:
    """Draw losses and accuracies of both networks over epochs."""
    path = Path(directory) / "figures" / "training.png"
    plot_both_networks(read_metrics(directory), path)
    return [path]


def plot_logistic_run(directory: str | Path) -> list[Path]:
    """Draw the methods' errors, and the validation loss over outer steps with published values."""
    directory = Path(directory)
    table, rates = read_arrays(directory / "errors.npz"), read_json(directory / "rates.json")
    ks, place = table.pop("k"), directory / "figures"
    plot_errors(ks, table, rates, place / "errors.png")
    published = {int(step): loss for step, loss in read_results(directory)["published"].items()}
    plot_losses(read_metrics(directory), published, place / "loss.png")
    return [place / "errors.png", place / "loss.png"]


def plot_first_layers_run(directory: str | Path) -> list[Path]:
    """Draw the filters of each method, and the accuracies behind them."""
    place, results = Path(directory) / "figures", read_results(directory)
    plot_filters(read_arrays(Path(directory) / "filters.npz"), place / "filters.png")
    plot_accuracies(results["trainings"], results["judged_on"], place / "accuracy.png")
    return [place / "filters.png", place / "accuracy.png"]


def plot_meta_learning(
    metrics: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    score: str,
    path: str | Path,
) -> None:
    """Draw the meta-loss over meta-steps, and scores over steps with two standard errors.

    scores: [tasks, steps + 1] by the name of the initial weights.
    score: what they measure, for the axis.
    """
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    left.plot(metrics["step"], metrics["meta_loss"], color=COLOURS[0], lw=1)
    label_axes(left, "Loss of the queries after adaptation", "meta-step", "mean over tasks")
    for colour, (name, values) in zip(COLOURS, scores.items(), strict=False):
        steps, mean = np.arange(values.shape[1]), values.mean(0)
        width = 2 * values.std(0) / math.sqrt(len(values))
        right.plot(steps, mean, color=colour, lw=1.3, label=f"{name} weights")
        right.fill_between(steps, mean - width, mean + width, color=colour, alpha=0.2, lw=0)
    label_axes(right, "Test tasks; band: two standard errors", "steps of gradient descent", score)
    add_legend(right)
    save_figure(figure, path)


def plot_both_networks(metrics: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw losses and accuracies of both networks over epochs, those on training images dashed."""
    figure = new_figure(9.6, 3.8)
    panels = {"loss": "cross-entropy", "accuracy": "images classified correctly"}
    for axes, (what, y_label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for colour, (name, title) in zip(COLOURS, NETWORKS.items(), strict=False):
            for part, style in (("train", "--"), ("test", "-")):
                values = metrics[f"{name}/{part}_{what}"]
                axes.plot(metrics["step"], values, color=colour, ls=style, lw=1.3,
                          label=f"{title}, {part}")  # fmt: skip
        label_axes(axes, what.capitalize(), "epoch", y_label)
        if what == "accuracy":
            percent_axis(axes)
        add_legend(axes)
    save_figure(figure, path)


def plot_errors(
    ks: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    rates: Mapping[str, float],
    path: str | Path,
) -> None:
    """Draw errors over k on a log scale, and theoretical rates as lines from a curve's start.

    rates: the theoretical factor of the error from k to k + 1, by the names in PANELS.
    """
    figure = new_figure(9.6, 4.2)
    for axes, (title, (names, slopes)) in zip(
        figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True
    ):
        for number, name in enumerate(names):  # hollow markers, because several curves coincide
            axes.plot(ks, curves[name], color=COLOURS[number], lw=1, marker="o",
                      ms=9 - 1.4 * number, mfc="none", label=name)  # fmt: skip
        for rate, name in slopes.items():
            line = curves[name][0] * rates[rate] ** (np.array(ks) - ks[0])
            axes.plot(ks, line, color=COLOURS[names.index(name)], lw=0.9, ls="--")
        axes.plot([], [], color=GREY, lw=0.9, ls="--", label="theory, in the method's colour")
        label_axes(axes, title, "steps, terms or iterations k", "relative error")
        axes.set_yscale("log")
        axes.set_ylim(1e-12, 10)
        add_legend(axes)
    save_figure(figure, path)


def plot_losses(
    metrics: Mapping[str, np.ndarray], published: Mapping[int, float], path: str | Path
) -> None:
    """Draw the validation loss over outer steps, and published values if there are any."""
    figure, axes = one_panel()
    axes.plot(metrics["step"], metrics["validation_loss"], color=COLOURS[0], lw=1.3, label="here")
    if published:
        axes.plot(list(published), list(published.values()), color=COLOURS[1], ls="", marker="o",
                  ms=5, mfc="none", label="published")  # fmt: skip
    label_axes(axes, "L2 weights by hypergradient descent", "outer step", "validation loss")
    add_legend(axes)
    save_figure(figure, path)


def plot_filters(filters: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw the filters of each method in a panel, in colour where there are three channels.

    filters: [units, C, kernel, kernel]; each is scaled by its largest weight, grey is 0. Of other
        numbers of channels the mean is shown.
    """
    across = min(len(filters), 4)
    down = -(-len(filters) // across)
    figure = new_figure(2.6 * across, 2.0 * down)
    for axes in (grid := figure.subplots(down, across, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, (name, weights) in zip(grid.flat, filters.items(), strict=False):
        colour = weights if weights.shape[1] == 3 else weights.mean(1, keepdims=True)
        largest = np.abs(colour).max((1, 2, 3), keepdims=True)
        images = 0.5 + 0.5 * colour / np.where(largest > 0, largest, 1)
        axes.imshow(_tiles(images.transpose(0, 2, 3, 1)), cmap="gray", vmin=0, vmax=1,
                    interpolation="nearest")  # fmt: skip
        axes.set_title(name, fontsize=FONT, parse_math=False)
    save_figure(figure, path)


def _tiles(images: np.ndarray) -> np.ndarray:
    """Images [n, H, W, C] in [0, 1] side by side on white, about four columns to three rows."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n * 4 / 3))
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for k, image in enumerate(images):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def plot_accuracies(rows: Sequence[Mapping[str, Any]], judged_on: str, path: str | Path) -> None:
    """Draw the accuracy of every layer as a dot, by method, with a bar at each method's mean.

    rows: with method, "triangle/test_accuracy" and, where there is one, "own/test_accuracy".
    """
    figure, axes = one_panel()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    labels = {"triangle": "Triangle of filters at norm 1", "own": "the method's own response"}
    shifts = (-0.12, 0.12)
    for colour, shift, encoding in zip(COLOURS, shifts, labels, strict=False):
        name = f"{encoding}/test_accuracy"
        points = [(methods.index(row["method"]) + shift, row[name]) for row in rows if name in row]
        if not points:
            continue
        places, values = np.transpose(points)
        axes.plot(places, values, "o", color=colour, ms=4, alpha=0.7, label=labels[encoding])
        means = [(place, values[places == place].mean()) for place in np.unique(places)]
        axes.plot(*np.transpose(means), "_", color=colour, ms=14)
    percent_axis(axes)
    label_axes(axes, "Accuracy of a linear probe; bars: means", "", judged_on)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=FONT - 1)
    add_legend(axes)
    save_figure(figure, path)
