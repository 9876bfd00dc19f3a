"""Figures of the baselines, drawn from the directories of their runs alone.

    plot_pca_run("runs/baseline_pca-...")        # writes into its figures/, returns the paths

Each `plot_..._run` draws what its command draws at its end.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from comparison.vicreg import TERMS
from experiment.run_reader import read_config, read_metrics
from figures.meta_learning import ACCURACIES, plot_run
from figures.style import (
    add_legend,
    label_axes,
    looks,
    one_panel,
    percent_axis,
    save_figure,
    tick_numbers,
)


def plot_pca_run(directory: str | Path) -> list[Path]:
    """Draw the accuracy over the number of components."""
    metrics, path = read_metrics(directory), Path(directory) / "figures" / "accuracy.png"
    accuracies = {label: metrics[name] for name, label in ACCURACIES.items()}
    plot_accuracy_over_size(metrics["step"], accuracies, path, "principal components")
    return [path]


def plot_mlp_run(directory: str | Path) -> list[Path]:
    """Draw the figures of any meta-learning run, and the numbers of the initial distribution."""
    drawn, metrics, prefix = plot_run(directory), read_metrics(directory), "initial/"
    numbers = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    if numbers:
        path = Path(directory) / "figures" / "initial.png"
        plot_initial_numbers(metrics["step"], numbers, path)
        drawn.append(path)
    return drawn


def plot_vicreg_run(directory: str | Path) -> list[Path]:
    """Draw accuracies and losses over epochs, and the weights of the first layer."""
    config, metrics = read_config(directory), read_metrics(directory)
    drawn = plot_run(directory, "epoch")
    if metrics:
        path = Path(directory) / "figures" / "loss.png"
        plot_loss(metrics, {name: config[name] for name in TERMS}, path)
        drawn.append(path)
    return drawn


def plot_accuracy_over_size(
    sizes: np.ndarray, accuracies: Mapping[str, np.ndarray], path: str | Path, x_label: str
) -> None:
    """Draw accuracies of the probe (fractions [sizes] by name) over a size on a log scale."""
    figure, axes = one_panel()
    for look, (name, values) in zip(looks(len(accuracies)), accuracies.items(), strict=True):
        axes.plot(sizes, values, marker="o", ms=3, label=name, **look)
    percent_axis(axes)
    label_axes(axes, "Accuracy of the linear probe", x_label, "images classified correctly")
    axes.set_xscale("log", base=2)  # after label_axes, whose ticks are for linear scales
    tick_numbers(axes, map(int, sizes), 1.4)
    add_legend(axes)
    save_figure(figure, path)


def plot_initial_numbers(
    step: np.ndarray, numbers: Mapping[str, np.ndarray], path: str | Path
) -> None:
    """Draw means and spreads of the initial parameters over meta-steps.

    numbers: values [steps] by names such as "mean_w".
    """
    figure, axes = one_panel()
    marker = "o" if len(step) == 1 else ""
    for look, (name, values) in zip(looks(len(numbers)), numbers.items(), strict=True):
        axes.plot(step, values, marker=marker, label=name.replace("_", " of "), **look)
    label_axes(axes, "Distribution of the initial parameters", "meta-step", "effective value")
    add_legend(axes)
    save_figure(figure, path)


def plot_loss(
    metrics: Mapping[str, np.ndarray], weights: Mapping[str, float], path: str | Path
) -> None:
    """Draw the loss over epochs, and its weighted terms, which add up to it."""
    figure, axes = one_panel()
    curves = {"loss": metrics["loss"]} | {name: weights[name] * metrics[name] for name in TERMS}
    for look, (name, values) in zip(looks(len(curves)), curves.items(), strict=True):
        axes.plot(metrics["step"], values, marker="o", ms=3, label=name, **look)
    axes.set_ylim(bottom=0)
    label_axes(axes, "Loss and its weighted terms", "epoch", "mean over the epoch")
    add_legend(axes)
    save_figure(figure, path)
