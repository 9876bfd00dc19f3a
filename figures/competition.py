"""Figures of competing units, drawn from the directories of their runs alone.

    plot_competition_run("runs/train_krotov_hopfield-...")     # writes into its figures/

Each `plot_..._run` draws what its command draws at its end, and returns the paths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiment.run_reader import read_arrays, read_metrics, read_results
from figures.meta_learning import plot_features
from figures.style import (
    COLOURS,
    FONT,
    add_legend,
    label_axes,
    looks,
    new_figure,
    one_panel,
    percent_axis,
    save_figure,
)

WAYS = {
    "start": "random draw, where all begin",
    "hypergradients": "hypergradient descent",
    "random": "random search",
    "tpe": "TPE",
}


def plot_competition_run(directory: str | Path) -> list[Path]:
    """Draw filters, convergence, the classifiers' accuracy over epochs, and accuracy over depth."""
    directory = Path(directory)
    parameters, metrics = read_arrays(directory / "parameters.npz"), read_metrics(directory)
    rows, place = read_results(directory)["classifiers"], directory / "figures"
    weight = parameters["1.weight"]
    shape = weight.shape[1:] if weight.ndim == 4 else parameters["input_shape"]
    plot_features(weight, shape, place / "filters.png", "Weights of layer 1")
    drawn = [place / "filters.png"]
    if metrics:
        plot_convergence(metrics, place / "convergence.png")
        drawn.append(place / "convergence.png")
    if metrics and metrics["classifier"].any():
        plot_classifiers(metrics, place / "classifier.png")
        drawn.append(place / "classifier.png")
    if len(rows) > 1:
        plot_accuracy_over_depth(rows, place / "accuracy_over_depth.png")
        drawn.append(place / "accuracy_over_depth.png")
    return drawn


def plot_searches_run(directory: str | Path) -> list[Path]:
    """Draw the start and the end of each search of examples/tune_competition.py."""
    path = Path(directory) / "figures" / "searches.png"
    plot_searches(read_results(directory)["searches"], path)
    return [path]


def plot_convergence(metrics: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw each layer's largest distance of p-norms from 1 over the epochs of its training."""
    figure, axes = one_panel()
    axes.set_yscale("log")
    layers = [name for name in metrics if name.startswith("convergence/")]
    names = [name for name in layers if np.isfinite(metrics[name]).any()]  # layers that learned
    for look, name in zip(looks(len(names)), names, strict=True):
        finite = np.isfinite(metrics[name])
        axes.plot(metrics["epoch"][finite], metrics[name][finite],
                  label=f"layer {name.split('/')[1]}",
                  marker="o" if finite.sum() == 1 else "", **look)  # fmt: skip
    label_axes(axes, "Convergence", "epoch of the layer", "largest distance of p-norms from 1")
    add_legend(axes)
    save_figure(figure, path)


def plot_classifiers(metrics: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw the validation accuracy of each classifier over its epochs."""
    figure, axes = one_panel()
    of_classifier = metrics["classifier"] == 1
    layers = np.unique(metrics["layer"][of_classifier])
    for look, layer in zip(looks(len(layers)), layers, strict=True):
        shown = of_classifier & (metrics["layer"] == layer)
        axes.plot(metrics["epoch"][shown], metrics["validation_accuracy"][shown],
                  label=f"behind layer {layer:g}",
                  marker="o" if shown.sum() == 1 else "", **look)  # fmt: skip
    percent_axis(axes)
    label_axes(axes, "Classifier", "epoch", "validation images classified correctly")
    add_legend(axes)
    save_figure(figure, path)


def plot_accuracy_over_depth(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw test and validation accuracy over the number of layers before the classifier."""
    figure, axes = one_panel()
    depth = [row["layers"] for row in rows]
    for look, name in zip(looks(2), ("test", "validation"), strict=True):
        values = [row[f"{name}_accuracy"] for row in rows]
        axes.plot(depth, values, marker="o", ms=4, label=f"{name} images", **look)
    percent_axis(axes)
    label_axes(axes, "Accuracy over depth", "competing layers", "images classified correctly")
    add_legend(axes)
    save_figure(figure, path)


def plot_searches(rows: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw loss and test accuracy of each search, numbered from 1, and the mean of each method.

    A search that ends with a diverged training has no point and is left out of the mean.
    """
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    number = np.arange(1, len(rows) + 1)
    shifts = np.linspace(-0.15, 0.15, len(WAYS))
    for shift, colour, (way, label) in zip(shifts, COLOURS, WAYS.items(), strict=False):
        for axes, what in ((left, "meta_loss"), (right, "test_accuracy")):
            values = np.array([row[f"{way}/{what}"] for row in rows], dtype=float)  # None: nan
            finite = np.isfinite(values)
            axes.plot(
                (number + shift)[finite], values[finite], "o", color=colour, ms=5, label=label
            )
            if finite.any():
                axes.axhline(values[finite].mean(), color=colour, lw=0.9, ls="--")
    label_axes(
        left, "Loss from new initial weights; lines: means", "search", "cross-entropy of the probe"
    )
    label_axes(right, "Test accuracy; lines: means", "search", "test images, probe")
    percent_axis(right)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS),
        fontsize=FONT - 1, frameon=False,
    )  # fmt: skip
    save_figure(figure, path)
