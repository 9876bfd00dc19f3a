"""Figures of learned optimisers, drawn from the directories of their runs alone.

    plot_optimizer_run("runs/learn_to_optimize-...")       # writes into its figures/

The arrays of comparison.npz are named "<optimizee>/<optimiser>/<what>"; those of validation.npz
have a row for each epoch. Panels to be compared share their scale.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator

from experiment.errors import RunLogError
from experiment.run_reader import path_within, read_arrays, read_config, read_metrics, read_results
from figures.meta_learning import plot_meta_loss
from figures.style import (
    COLOURS,
    FONT,
    GREY,
    add_legend,
    label_axes,
    looks,
    new_figure,
    one_panel,
    percent_axis,
    plain_text,
    save_figure,
    without_formulas,
)
from learned_optimizer import CONTROL

SHOWN_EPOCHS = 4  # curves of a short meta-training: the first, the last, and two between
EVERY = 20  # epochs between curves, if there are more than twice as many
MOST_TENSORS = 8  # whose norms are drawn
SMOOTHED = 5  # steps in the running mean of losses
LEAST, CUT = 1e-9, 1e-12  # smaller deviations, smaller covariances are drawn at these heights

Arrays = Mapping[str, np.ndarray]


def plot_optimizer_run(directory: str | Path) -> list[Path]:
    """Draw all that metrics.csv and the run's other files allow, and return the paths.

    The other files are comparison.npz, results.json and validation.npz.
    """
    directory = Path(directory)
    place = directory / "figures"
    figure = partial(path_within, place)  # names of optimizees may come from untrusted files
    drawn = []
    metrics = read_metrics(directory)
    if metrics:
        path = place / "meta_loss.png"
        plot_meta_loss(metrics["step"], metrics["meta_loss"], path, "run", "mean over its windows")
        drawn.append(path)
    compared = read_arrays(directory / "comparison.npz")
    for name in dict.fromkeys(key.split("/")[0] for key in compared if "/" in key):
        optimizers = of_optimizee(compared, name)
        plot_training(
            name,
            {k: a["losses"] for k, a in optimizers.items()},
            figure(f"{name}_loss.png"),
        )
        drawn.append(figure(f"{name}_loss.png"))
        shown = one_of_each_kind(optimizers)
        if len(shown.get("learned", {}).get("test_steps", ())):  # runs of before lack them
            plot_generalisation(name, shown, figure(f"{name}_curves.png"))
            drawn.append(figure(f"{name}_curves.png"))
        tensors = compared_optimizees(directory).get(name, {}).get("tensors")
        if tensors and len(shown.get("learned", {}).get("norms/update", ())):
            plot_norms(name, tensors, shown, figure(f"{name}_norms.png"))
            drawn.append(figure(f"{name}_norms.png"))
        for kind in kinds_of(optimizers):
            path = figure(f"{name}_{kind}.png")
            plot_symmetry(name, kind, shown, path)
            drawn.append(path)
        steps = histogram_steps(directory, optimizers)
        if steps:
            plot_histograms(name, shown, compared["edges"], steps, figure(f"{name}_updates.png"))
            drawn.append(figure(f"{name}_updates.png"))
    for name, results in compared_optimizees(directory).items():
        if "noise" in results:  # missing if Ctrl-C ended the comparison before it was measured
            plot_noise(name, results["noise"], figure(f"{name}_noise.png"))
            drawn.append(figure(f"{name}_noise.png"))
    validation = read_arrays(directory / "validation.npz")
    if "losses" in validation:
        plot_meta_training(validation, place / "meta_training.png")
        drawn.append(place / "meta_training.png")
    return drawn


def plot_training(optimizee: str, losses: Arrays, path: Path) -> None:
    """Draw training losses [runs, steps] of each optimiser: running mean over SMOOTHED steps.

    Curves are means over runs, bands are one standard deviation.
    """
    figure, axes = one_panel()
    for look, (name, values) in zip(looks(len(losses)), losses.items(), strict=True):
        smooth = np.apply_along_axis(
            _running_mean, 1, np.where(np.isfinite(values), values, np.nan)
        )
        _mean_and_band(axes, np.arange(values.shape[1]), smooth, label=name, **look)
    axes.set_yscale("log")
    label_axes(axes, f"{optimizee}: training loss", "step", "mean over runs, band: one deviation")
    add_legend(axes)
    save_figure(figure, path)


def plot_generalisation(optimizee: str, optimizers: Mapping[str, Arrays], path: Path) -> None:
    """Loss and accuracy, of training batches and of test images: means over runs, and spread."""
    figure = new_figure(8.4, 5.6)
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, what in zip(grid, ("losses", "accuracies"), strict=True):
        for axes, of in zip(row, ("", "test_"), strict=True):
            for look, (name, arrays) in zip(
                looks(len(optimizers)), optimizers.items(), strict=True
            ):
                values = arrays[of + what]
                values = np.where(np.isfinite(values), values, np.nan)
                steps = arrays["test_steps"] if of else np.arange(values.shape[1])
                if not of:
                    values = np.apply_along_axis(_running_mean, 1, values)
                _mean_and_band(axes, steps, values, label=name, **look)
            if what == "losses":
                axes.set_yscale("log")
            title = f"{'test images' if of else 'training batches'}: {what}"
            y_label = "" if of else "mean over runs, band: one deviation"
            label_axes(axes, title, "step" if what == "accuracies" else "", y_label)
            if what == "accuracies":
                percent_axis(axes)
    add_legend(grid[1, 1])
    figure.suptitle(optimizee, fontsize=FONT + 2, parse_math=False)
    save_figure(figure, path)


def plot_norms(
    optimizee: str, tensors: Sequence[str], optimizers: Mapping[str, Arrays], path: Path
) -> None:
    """Norms of parameters, gradients and updates along the first run, a row for each tensor."""
    shown = tensors[:MOST_TENSORS]
    figure = new_figure(8.4, 1.5 * len(shown) + 1.1)
    grid = figure.subplots(len(shown), 3, sharex=True, squeeze=False)
    for number, (row, tensor) in enumerate(zip(grid, shown, strict=True)):
        for axes, what in zip(row, ("parameter", "gradient", "update"), strict=True):
            for look, (name, arrays) in zip(
                looks(len(optimizers)), optimizers.items(), strict=True
            ):
                norms = arrays[f"norms/{what}"][:, number]
                finite = np.isfinite(norms) & (norms > 0)
                axes.plot(np.flatnonzero(finite), norms[finite], label=name, **look)
            axes.set_yscale("log")
            bottom = "step" if number == len(shown) - 1 else ""
            label_axes(axes, f"{tensor}: {what}", bottom, "")
    legend = figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center",
        ncols=len(optimizers), fontsize=FONT - 1, frameon=False,
    )  # fmt: skip
    without_formulas(legend)
    figure.suptitle(f"{optimizee}: norms", fontsize=FONT + 2, parse_math=False)
    save_figure(figure, path)


def plot_symmetry(optimizee: str, kind: str, optimizers: Mapping[str, Arrays], path: Path) -> None:
    """Draw the relative deviations of updates (left) and gradients (right), a row per optimiser.

    All panels share a log scale; deviations below LEAST, also 0, are on the dashed line.
    """
    figure = new_figure(7.6, 1.35 * len(optimizers) + 0.9)
    grid = figure.subplots(len(optimizers), 2, sharex=True, sharey=True, squeeze=False)
    for row, (name, arrays) in enumerate(optimizers.items()):
        for axes, what, colour in zip(grid[row], ("update", "gradient"), COLOURS, strict=False):
            values = arrays.get(f"{what}/{kind}", np.empty(0))
            axes.axhline(LEAST, color=GREY, ls="--", lw=0.8)
            axes.plot(np.arange(len(values)), np.maximum(values, LEAST), color=colour, lw=1.1)
            axes.set_yscale("log")
            axes.set_ylim(LEAST / 3, 2)
            bottom = "step" if row == len(optimizers) - 1 else ""
            title = f"{name}: {what}s"
            label_axes(axes, title, bottom, "")
    figure.supylabel(
        f"mean over units of |<v, xi>| / (|v| |xi|); dashed: {LEAST:g} or less", fontsize=FONT
    )
    title = f"{optimizee}: departure from the {kind.removesuffix(CONTROL)} symmetry"
    if kind.endswith(CONTROL):
        title += " that it lacks (negative control)"
    figure.suptitle(title, fontsize=FONT + 2, parse_math=False)
    save_figure(figure, path)


def plot_histograms(
    optimizee: str,
    optimizers: Mapping[str, Arrays],
    edges: np.ndarray,
    steps: Sequence[int],
    path: Path,
) -> None:
    """Draw the distribution of |u|, the sizes of parameter changes, in a panel per optimiser.

    Each curve belongs to one step and gives shares of all parameters; the share of parameters that
    don't change at all is written below each panel.
    """
    figure = new_figure(2.6 * len(optimizers), 2.9)
    grid = figure.subplots(1, len(optimizers), sharex=True, sharey=True, squeeze=False)[0]
    middles = np.sqrt(edges[1:] * edges[:-1])
    for axes, (name, arrays) in zip(grid, optimizers.items(), strict=True):
        counts = arrays["histograms"]
        total = arrays.get("parameters", counts.sum(1).max(initial=1))  # older runs lack it
        for number, (step, row) in enumerate(zip(steps, counts, strict=False)):
            opacity = (number + 1) / len(counts)
            axes.plot(
                middles, row / total, color=COLOURS[0], alpha=opacity, lw=1.2, label=f"step {step}"
            )
        axes.set_xscale("log")
        still = arrays.get("still", np.zeros(1)) / total
        bottom = f"|u|; of 0: {still.min():.0%} to {still.max():.0%}"
        label_axes(axes, name, bottom, "share of parameters" if axes is grid[0] else "")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
    add_legend(grid[0])
    figure.suptitle(f"{optimizee}: sizes of updates", fontsize=FONT + 2, parse_math=False)
    save_figure(figure, path)


def plot_noise(optimizee: str, noise: Mapping[str, Mapping], path: Path) -> None:
    """Draw tail index and covariance over minibatches, for gradients and updates, by layer."""
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for colour, (what, statistics) in zip(COLOURS, noise.items(), strict=False):
        layers = np.arange(1, len(statistics["trace"]) + 1)
        for style, (block, values) in zip(
            (":", "--", "-"), statistics["tail_index"].items(), strict=False
        ):
            values = np.array(values, dtype=float)
            left.plot(layers, values, style, color=colour, marker="o", ms=3, lw=1,
                      label=f"{what}s, m = {block}")  # fmt: skip
        for style, name in (("-", "trace"), ("--", "largest_eigenvalue")):
            sizes = np.maximum(np.array(statistics[name], dtype=float), CUT)
            label = f"{what}s, {name.replace('_', ' ')}"
            right.plot(layers, sizes, style, color=colour, marker="o", ms=3, lw=1, label=label)
    left.axhline(2, color=GREY, lw=0.8, ls="--")
    right.set_yscale("log")
    label_axes(left, f"{optimizee}: tail index (2: normal)", "layer", "alpha")
    label_axes(right, "Covariance over minibatches", "layer", "")
    for axes in (left, right):
        legend = axes.legend(
            fontsize=FONT - 2,
            frameon=False,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
        )
        without_formulas(legend)
    save_figure(figure, path)


def plot_meta_training(validation: Arrays, path: Path) -> None:
    """Draw the losses of validation runs, a curve for each of some epochs of meta-training.

    A row for each kind of symmetry shows the deviations of updates (left) and gradients (right).
    Later epochs are darker.
    """
    kinds = kinds_of({"learned": validation})
    epochs = shown_epochs(len(validation["losses"]) - 1)
    rows = max(len(kinds), 1)
    figure = new_figure(11.4 if kinds else 4.2, 2.4 * rows + 0.6)
    grid = figure.add_gridspec(rows, 3 if kinds else 1)
    first = figure.add_subplot(grid[:, 0])
    _epoch_curves(first, validation["losses"], epochs, COLOURS[0])
    label_axes(first, "Losses of validation runs", "step", "mean over runs")
    for row, kind in enumerate(kinds):
        for column, what in enumerate(("update", "gradient")):
            axes = figure.add_subplot(grid[row, column + 1])
            values = np.maximum(validation[f"{what}/{kind}"], LEAST)
            _epoch_curves(axes, values, epochs, COLOURS[column])
            axes.axhline(LEAST, color=GREY, ls="--", lw=0.8)
            axes.set_ylim(LEAST / 3, 2)
            left = "" if column else "relative |deviation|, mean"
            bottom = "step" if row == rows - 1 else ""
            label_axes(axes, f"{kind.replace(CONTROL, ' (control)')}: {what}s", bottom, left)
    add_legend(first)
    save_figure(figure, path)


def plot_loss_grid(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw a heat map of training losses, with optimisers in rows and optimizees in columns.

    losses: by optimiser, then optimizee; None for a loss that was not finite.
    """
    rows = list(losses)
    columns = list(dict.fromkeys(name for row in losses.values() for name in row))
    known = [[losses[row].get(name, np.nan) for name in columns] for row in rows]
    table = np.array([[np.inf if loss is None else loss for loss in row] for row in known])
    figure = new_figure(1.1 * len(columns) + 2.6, 0.42 * len(rows) + 1.6)
    axes = figure.subplots()
    finite = table[np.isfinite(table)] if np.isfinite(table).any() else np.ones(1)
    norm = LogNorm(finite.min(), max(finite.max(), 1.001 * finite.min()))
    image = axes.imshow(table, cmap="viridis_r", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            colour = "white" if np.isfinite(value) and norm(value) > 0.5 else "black"
            axes.text(
                j, i, f"{value:.3g}", ha="center", va="center", fontsize=FONT - 1, color=colour
            )
    axes.set_xticks(
        range(len(columns)), map(plain_text, columns), rotation=30, ha="right", fontsize=FONT - 1
    )
    axes.set_yticks(range(len(rows)), map(plain_text, rows), fontsize=FONT - 1)
    axes.set_title(
        "Training loss of optimisers (rows) on optimizees", fontsize=FONT + 1, loc="left"
    )
    figure.colorbar(image, ax=axes).ax.tick_params(which="both", labelsize=FONT - 1)
    save_figure(figure, path)


# ---- from a run's files ----


def compared_optimizees(directory: Path) -> dict[str, dict]:
    """The "optimizees" of results.json, or {} without them; raises RunLogError if damaged."""
    optimizees = read_results(directory).get("optimizees", {})
    if not isinstance(optimizees, dict) or not all(
        isinstance(results, dict) for results in optimizees.values()
    ):
        raise RunLogError(f"{directory}/results.json is damaged: not the results of a comparison")
    return optimizees


def shown_epochs(last: int) -> list[int]:
    """The epochs out of 0, ..., last whose curves are drawn: every EVERY-th, or SHOWN_EPOCHS."""
    if last > 2 * EVERY:
        return list(range(0, last + 1, EVERY))
    return sorted(set(np.linspace(0, last, SHOWN_EPOCHS).round().astype(int).tolist()))


def of_optimizee(arrays: Arrays, name: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of one optimizee, by optimiser and then by name."""
    optimizers: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        if key.startswith(f"{name}/"):
            _, optimizer, what = key.split("/", 2)
            optimizers.setdefault(optimizer, {})[what] = values
    return optimizers


def one_of_each_kind(optimizers: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Each optimiser once: of several rates the last, which is the best."""
    return {name: optimizers[name] for name in {n.split()[0]: n for n in optimizers}.values()}


def kinds_of(optimizers: Mapping[str, Arrays]) -> list[str]:
    """The kinds of symmetry that were measured."""
    keys = (key for arrays in optimizers.values() for key in arrays)
    return list(dict.fromkeys(k.split("/")[1] for k in keys if k.startswith("update/")))


def histogram_steps(directory: Path, optimizers: Mapping[str, Arrays]) -> list[int]:
    """The steps of the rows of the histograms; [] if an optimiser has another number of rows."""
    config = read_config(directory)
    steps = sorted({s for s in config["histogram_steps"] if s <= config["test_steps"]})
    return steps if all(len(a["histograms"]) == len(steps) for a in optimizers.values()) else []


def _epoch_curves(axes: Axes, rows: np.ndarray, epochs: Sequence[int], colour: str) -> None:
    for number, epoch in enumerate(epochs):
        opacity = (number + 1) / len(epochs)
        axes.plot(rows[epoch], color=colour, alpha=opacity, lw=1.3, label=f"epoch {epoch}")
    axes.set_yscale("log")


def _mean_and_band(
    axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, color: str, lw: float
) -> None:
    """Draw the mean of values [runs, steps] over runs, in a band of one standard deviation."""
    mean, deviation = values.mean(0), values.std(0)
    axes.plot(steps, mean, color=color, lw=lw, label=label)
    axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each value and up to SMOOTHED - 1 before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(total))
    begin = np.maximum(0, stop - SMOOTHED)
    return (total[stop] - total[begin]) / (stop - begin)
