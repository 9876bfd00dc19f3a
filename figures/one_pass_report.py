"""The records of tune_one_pass.py for every draw, and tables and figures of several runs.

draws.npz holds `step`, `seconds` (training alone) and `evaluation_seconds`, one value for each
record, and for every metric an array [records, draws].

A draw has diverged if its final test loss is not finite or above ten times the draws' median at the
start. Means are over draws that have not diverged; medians are over all, a diverged one counting as
infinite. Tables give the average of both over 1000 bootstraps of the draws +- their standard
deviation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator
from matplotlib.tri import Triangulation
from torch import Tensor

from experiment.errors import RunLogError
from experiment.run_reader import read_arrays, read_config, run_names
from figures.style import (
    FAINT,
    FONT,
    GREY,
    add_legend,
    colours,
    label_axes,
    looks,
    new_figure,
    one_panel,
    plain_text,
    save_figure,
)

BOOTSTRAPS = 1000
ENVELOPE = (10, 90)  # percentiles of the bootstrapped medians
DIVERGED = 10.0  # times the median loss at the start
LEAST_CORNERS = 100  # draws; between fewer, a surface would be more guess than data

# Flags and columns that every table and figure needs
CONFIG = ("dataset", "method", "network_weight_steps", "look_back")
COLUMNS = (
    "step", "seconds", "Loss/Validation", "Loss/Test", "Hyperparameter/Lr",
    "Hyperparameter/Momentum", "Hyperparameter/Weight_Decay",
)  # fmt: skip

# Flags in which the runs of one grid over T and i may differ: places, draws, what depends on T
FREE_IN_A_GRID = (
    "network_weight_steps", "look_back", "steps", "log_every", "seed", "draws", "first_draw",
    "config", "data_dir", "device", "threads", "save_state", "log_root", "group", "name",
)  # fmt: skip


class Columns:
    """The numbers of every draw, one row for each record; `saved` is a former `to_tensors()`."""

    def __init__(self, saved: Mapping[str, Tensor] | None = None) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}
        for name, values in (saved or {}).items():
            self._rows[name] = list(values.numpy())

    def append(
        self, step: int, seconds: float, evaluation: float, row: Mapping[str, np.ndarray]
    ) -> None:
        """Append a record: `row` has an array [draws] for each metric; times are in seconds."""
        times = {"step": step, "seconds": seconds, "evaluation_seconds": evaluation}
        for name, value in {**times, **row}.items():
            self._rows.setdefault(name, []).append(np.asarray(value, dtype=np.float64))

    def last(self, name: str) -> float:
        """The latest value of a column that has one value for each record."""
        return float(self._rows[name][-1])

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns, each [records] or [records, draws]."""
        return {name: np.stack(values) for name, values in self._rows.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """The columns as tensors, from which Columns(saved) restores them."""
        return {name: torch.from_numpy(values) for name, values in self.arrays().items()}


# ---- numbers ----


def final_losses(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The last test loss of each draw, [draws], inf if it has diverged.

    It is in the units of the data, or a perplexity, if the run recorded that.
    """
    losses = columns[_loss_name(columns)]
    start, end = np.nanmedian(losses[0]), losses[-1]
    with np.errstate(invalid="ignore"):
        diverged = ~np.isfinite(end) | (end > DIVERGED * start)
    return np.where(diverged, math.inf, end)


def summary(losses: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean and median of losses [draws], their bootstrap deviations, and the share that diverged.

    scipy.stats.bootstrap is not used: it would resample for each statistic, and resampling is a
    single line.
    """
    generator = np.random.default_rng(seed)
    samples = losses[generator.integers(len(losses), size=(BOOTSTRAPS, len(losses)))]
    medians = np.median(samples, axis=1)
    means = _means_of_finite(samples)
    return {
        "mean": _finite_or(means, np.mean),
        "mean_deviation": _finite_or(means, np.std),
        "median": _finite_or(medians, np.mean),
        "median_deviation": _finite_or(medians, np.std),
        "best": float(losses.min()),
        "diverged": float(np.mean(~np.isfinite(losses))),
    }


def median_of_draws(values: np.ndarray) -> float:
    """The median of values [draws], nan counting as infinite; nan if all values are nan."""
    missing = np.isnan(values)
    return math.nan if missing.all() else float(np.median(np.where(missing, math.inf, values)))


def best_of_groups(losses: np.ndarray, validation: np.ndarray, size: int) -> np.ndarray:
    """The test loss of the draw with the least validation loss in each `size` consecutive draws."""
    count = len(losses) // size
    order = np.where(np.isfinite(validation), validation, math.inf)[: count * size]
    chosen = order.reshape(count, size).argmin(axis=1)
    return losses[: count * size].reshape(count, size)[np.arange(count), chosen]


def _means_of_finite(samples: np.ndarray) -> np.ndarray:
    finite = np.isfinite(samples)
    totals = np.where(finite, samples, 0).sum(axis=1)
    counts = finite.sum(axis=1)
    return np.divide(totals, counts, out=np.full(len(samples), math.inf), where=counts > 0)


def _finite_or(values: np.ndarray, statistic) -> float:
    """`statistic` of the finite values; inf unless more than half of the values are finite."""
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if len(finite) > len(values) / 2 else math.inf


# ---- runs, read back ----


@dataclass(frozen=True)
class Recorded:
    """One run: its configuration, the columns of its draws.npz, and its title in tables."""

    title: str
    config: dict
    columns: dict[str, np.ndarray]


def read_run(directory: str | Path) -> Recorded:
    """The run in `directory`; raises RunLogError if it is not one of tune_one_pass.py."""
    directory = Path(directory)
    config = read_config(directory)
    columns = read_arrays(directory / "draws.npz")
    if not columns:
        raise RunLogError(f"{directory} holds no draws.npz: it is no run of tune_one_pass.py")
    lacking = [n for n in CONFIG if n not in config] + [n for n in COLUMNS if n not in columns]
    if lacking:
        raise RunLogError(
            f"{directory} is no whole run of tune_one_pass.py: it lacks {', '.join(lacking)}"
        )
    return Recorded(directory.resolve().name, config, columns)


def read_runs(directories: Sequence[str | Path]) -> list[Recorded]:
    """Several runs, read by `read_run`, with distinct titles."""
    named = zip(directories, run_names(directories), strict=True)
    return [replace(read_run(directory), title=name) for directory, name in named]


def has_validation(run: Recorded) -> bool:
    """Whether the run has validation samples."""
    return not np.isnan(run.columns["Loss/Validation"]).all()


def table(runs: Sequence[Recorded]) -> list[list[str]]:
    """Cells: mean and median of the final test loss of each run, and how many diverged.

    A run with fixed hyperparameters and a validation loss gets a second line, "3-batched", for the
    best of each three draws.
    """
    cells = [["run", "data", "draws", "mean", "median", "best", "diverged", "seconds"]]
    for run in runs:
        losses = final_losses(run.columns)
        cells.append(_cells(run, run.title, losses))
        validation = run.columns["Loss/Validation"][-1]
        if run.config["method"] == "fixed" and has_validation(run) and len(losses) > 2:
            best = best_of_groups(losses, validation, 3)
            cells.append(_cells(run, f"{run.title}, 3-batched", best))
    return cells


def _cells(run: Recorded, title: str, losses: np.ndarray) -> list[str]:
    statistics = summary(losses)
    return [
        title,
        run.config["dataset"],
        str(len(losses)),
        f"{statistics['mean']:.4g} ± {statistics['mean_deviation']:.2g}",
        f"{statistics['median']:.4g} ± {statistics['median_deviation']:.2g}",
        f"{statistics['best']:.4g}",
        f"{statistics['diverged']:.1%}",
        f"{run.columns['seconds'][-1]:.0f}",
    ]


# ---- figures ----


def plot_report(runs: Sequence[Recorded], directory: Path) -> list[Path]:
    """Draw every figure that `runs` allow into `directory`, and return the paths."""
    drawn = {
        "loss_over_steps.png": _envelopes(runs, "step", "weight steps"),
        "loss_over_seconds.png": _envelopes(runs, "seconds", "seconds of training, all draws"),
        "final_losses.png": _distributions(runs),
        "learning_rates.png": _hyperparameter_traces(runs, "Lr", "learning rate"),
        "momentum.png": _hyperparameter_traces(runs, "Momentum", "momentum"),
        "weight_decay.png": _hyperparameter_traces(runs, "Weight_Decay", "weight decay"),
        "trajectories.png": _trajectories(runs),
    }
    if len(runs) > 1:
        drawn["run_times.png"] = _run_times(runs)
    if validated := [run for run in runs if has_validation(run)]:
        drawn["best_so_far.png"] = _best_so_far(validated)
    if grid := _grid_over_steps_and_terms(runs):
        drawn["sensitivity.png"] = _sensitivity(grid)
    for name, figure in drawn.items():
        save_figure(figure, directory / name)
    return [directory / name for name in drawn]


def plot_one_pass_run(directory: str | Path) -> list[Path]:
    """Draw the figures of one run into its figures/, and return the paths."""
    return plot_report([read_run(directory)], Path(directory) / "figures")


def _test_losses(run: Recorded) -> np.ndarray:
    """The test losses [records, draws], as in `final_losses`; inf if not finite."""
    losses = run.columns[_loss_name(run.columns)]
    return np.where(np.isfinite(losses), losses, math.inf)


def _hyperparameters(run: Recorded, name: str) -> np.ndarray:
    """A hyperparameter [records, draws], rounded to nine digits.

    A logarithmic axis finds no limits if all values are 100000000.00000018.
    """
    rounded = np.vectorize(lambda value: float(f"{value:.9g}"), otypes=[float])
    return rounded(run.columns[f"Hyperparameter/{name}"])


def _loss_name(columns: Mapping[str, np.ndarray]) -> str:
    names = ("Unnormalised_Loss/Test", "Perplexity/Test", "Loss/Test")
    return next(name for name in names if name in columns)


def _envelopes(runs: Sequence[Recorded], column: str, label: str) -> Figure:
    """The median test loss of each run, with a band that holds 80 % of bootstrapped medians."""
    figure, axes = one_panel()
    axes.set_yscale("log")  # now, because later it would warn if nothing is drawn
    for look, run in zip(looks(len(runs)), runs, strict=True):
        losses = _test_losses(run)
        generator = np.random.default_rng(0)
        chosen = generator.integers(losses.shape[1], size=(200, losses.shape[1]))
        medians = np.median(losses[:, chosen], axis=2)
        low, high = np.percentile(medians, ENVELOPE, axis=1, method="nearest")
        x = run.columns[column]
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, np.median(losses, axis=1), marker=marker, label=run.title, **look)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
    title = "Median over draws; band: 80 % of medians of resampled draws"
    label_axes(axes, title, label, "test loss")
    if column == "seconds":
        axes.xaxis.set_major_locator(AutoLocator())
    add_legend(axes)
    return figure


def _distributions(runs: Sequence[Recorded]) -> Figure:
    """The share of draws that end below each loss."""
    figure, axes = one_panel()
    axes.set_xscale("log")  # now, because later it would warn if nothing is drawn
    for look, run in zip(looks(len(runs)), runs, strict=True):
        losses = np.sort(final_losses(run.columns))
        share = np.arange(1, len(losses) + 1) / len(losses)
        kept = np.isfinite(losses)
        marker = "o" if kept.sum() == 1 else ""
        axes.step(losses[kept], share[kept], where="post", marker=marker, label=run.title, **look)
    axes.set_ylim(0, 1.03)
    label_axes(axes, "Final losses", "test loss", "share of draws that end below")
    add_legend(axes)
    return figure


def _hyperparameter_traces(runs: Sequence[Recorded], name: str, label: str) -> Figure:
    """A hyperparameter over steps, for up to thirty draws of each run, in a panel for each run."""
    count = len(runs)
    figure = new_figure(2.6 * min(count, 4) + 0.6, 2.4 * -(-count // 4) + 0.3)
    panels = figure.subplots(-(-count // 4), min(count, 4), squeeze=False, sharey=True)
    for number, (axes, run, colour) in enumerate(
        zip(panels.flat, runs, colours(count), strict=False)
    ):
        values = _hyperparameters(run, name)[:, :30]
        if name != "Momentum":
            axes.set_yscale("log")
            values = np.where(values > 0, values, math.nan)  # a weight decay may be 0
        axes.plot(run.columns["step"], values, color=colour, lw=0.6, alpha=0.6)
        label_axes(axes, run.title, "weight steps", "" if number % 4 else label)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return figure


def _best_so_far(runs: Sequence[Recorded]) -> Figure:
    """The test loss of the draw with the least validation loss so far, over the number of draws.

    runs: runs with validation samples.
    """
    figure, axes = one_panel()
    axes.set(xscale="log", yscale="log")  # now, because later it would fail if nothing is drawn
    for look, run in zip(looks(len(runs)), runs, strict=True):
        validation = run.columns["Loss/Validation"][-1]
        judged = np.where(np.isfinite(validation), validation, math.inf)
        best = [int(judged[: count + 1].argmin()) for count in range(len(judged))]
        values = final_losses(run.columns)[best]
        kept = np.isfinite(values)
        draws = np.arange(1, len(best) + 1)[kept]
        marker = "o" if kept.sum() == 1 else ""
        axes.step(draws, values[kept], where="post", marker=marker, label=run.title, **look)
    label_axes(axes, "Best of so many draws, chosen on validation", "draws", "test loss")
    add_legend(axes)
    return figure


def _run_times(runs: Sequence[Recorded]) -> Figure:
    """Seconds of training for each draw, without evaluations."""
    figure, axes = one_panel()
    seconds = [run.columns["seconds"][-1] / run.columns["Loss/Test"].shape[1] for run in runs]
    axes.barh(range(len(runs)), seconds, color=colours(len(runs)))
    axes.set_yticks(range(len(runs)), [plain_text(run.title) for run in runs])
    axes.invert_yaxis()
    label_axes(axes, "Time of training", "seconds for each draw", "")
    axes.xaxis.set_major_locator(AutoLocator())
    return figure


def _trajectories(runs: Sequence[Recorded]) -> Figure:
    """The paths of draws in the plane of learning rate and momentum, coloured by their last loss.

    Draws with fixed hyperparameters have no paths. If they are many enough, a surface between them
    lies beneath the other draws' paths.
    """
    figure, axes = one_panel()
    axes.set_xscale("log")
    part = "Validation" if all(map(has_validation, runs)) else "Test"
    ends = [_ends(run, part) for run in runs]
    losses = np.concatenate([last for _, _, last in ends])
    colour_of = Normalize(*np.percentile(losses, (0, 98)) if len(losses) else (0, 1))
    staying = [run.config["method"] == "fixed" for run in runs]
    corners = [end for end, stays in zip(ends, staying, strict=True) if stays]
    surface = bool(corners) and _plot_surface(axes, np.concatenate(corners, axis=1), colour_of)
    for run, end, stays in zip(runs, ends, staying, strict=True):
        if stays:
            size, edge = (2, "none") if surface else (16, "white")
            axes.scatter(*end[:2], c=end[2], norm=colour_of, s=size, marker="s", ec=edge, lw=0.4)
            continue
        paths = [_hyperparameters(run, name)[:, :30] for name in ("Lr", "Momentum")]
        axes.plot(*paths, color="white" if surface else FAINT, lw=0.5, alpha=0.7)
        axes.scatter(*end[:2], c=end[2], norm=colour_of, s=12, ec="white", lw=0.4, zorder=3)
    label_axes(axes, "From the draw to the end", "learning rate", "momentum")
    mappable = ScalarMappable(colour_of, "viridis")
    _colour_bar(figure, axes, mappable, f"log10 of the last {part.lower()} loss")
    return figure


def _plot_surface(axes: Axes, corners: np.ndarray, colour_of: Normalize) -> bool:
    """Draw the loss interpolated between `corners` (as in `_ends`).

    Returns False if they are too few or span no area.
    """
    rates, momenta, losses = corners
    points = np.stack([np.log10(rates), momenta], axis=1)  # as they lie in the figure
    if len(points) < LEAST_CORNERS or np.linalg.matrix_rank(points - points[0]) < 2:
        return False
    triangles = Triangulation(*points.T).triangles
    axes.tricontourf(rates, momenta, triangles, losses, levels=20, norm=colour_of)
    return True


def _ends(run: Recorded, part: str) -> np.ndarray:
    """Last learning rate, momentum, and log10 of the last loss on `part`, [3, draws].

    Diverged draws are left out.
    """
    losses = run.columns[f"Loss/{part}"][-1]
    kept = np.isfinite(final_losses(run.columns)) & np.isfinite(losses) & (losses > 0)
    rates, momenta = (_hyperparameters(run, name)[-1] for name in ("Lr", "Momentum"))
    return np.stack([rates, momenta, np.log10(np.where(kept, losses, 1))])[:, kept]


def _grid_over_steps_and_terms(runs: Sequence[Recorded]) -> list[Recorded]:
    """The look-back runs, if they differ in T and in i and in no other setting; else [].

    Runs with exact derivatives, if there is no look-back run.
    """
    by_method = {
        method: [run for run in runs if run.config["method"] == method]
        for method in ("look_back", "unrolled")
    }
    grid = by_method["look_back"] or by_method["unrolled"]
    others = [{n: v for n, v in r.config.items() if n not in FREE_IN_A_GRID} for r in grid]
    several = (
        len({run.config[name] for run in grid}) > 1
        for name in ("network_weight_steps", "look_back")
    )
    return grid if all(several) and all(other == others[0] for other in others) else []


def _sensitivity(runs: Sequence[Recorded]) -> Figure:
    """The median final loss over T and i; runs that agree in both count as one."""
    every = sorted({run.config["network_weight_steps"] for run in runs})
    terms = sorted({run.config["look_back"] for run in runs})
    grid = np.full((len(terms), len(every)), math.nan)
    for row, column in np.ndindex(*grid.shape):
        place = terms[row], every[column]
        losses = [
            final_losses(run.columns)
            for run in runs
            if (run.config["look_back"], run.config["network_weight_steps"]) == place
        ]
        if losses:
            grid[row, column] = np.median(np.concatenate(losses))
    figure, axes = one_panel()
    _heat_map(axes, grid, every, terms, "Median final test loss")
    return figure


def plot_hypergradient_errors(
    errors: Mapping[str, np.ndarray], every: Sequence[int], terms: Sequence[int], path: Path
) -> None:
    """Draw the errors of hypergradients over T and i into `path`, a panel for each hyperparameter.

    errors: of each hyperparameter's h, relative, [terms, every].
    every, terms: the values of T and of i.
    """
    figure = new_figure(4.4 * len(errors), 3)
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, errors.items(), strict=True):
        _heat_map(axes, grid.round(3), every, terms, f"Relative error of h, {plain_text(name)}")
    save_figure(figure, path)


def _heat_map(
    axes: Axes, grid: np.ndarray, every: Sequence[int], terms: Sequence[int], title: str
) -> None:
    """Draw numbers [terms, every] over T and i; colours are logarithms, 0 and inf have none."""
    logarithm = np.log10(np.where(np.isfinite(grid) & (grid > 0), grid, math.nan))
    shown = axes.imshow(logarithm, cmap="viridis_r", aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if shown.norm(logarithm[row, column]) > 0.5 else "black"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
    label_axes(axes, title, "weight steps, T", "terms of the series, i")
    axes.grid(False)
    axes.set_xticks(range(len(every)), every)
    axes.set_yticks(range(len(terms)), terms)
    _colour_bar(axes.figure, axes, shown, "log10")


def _colour_bar(figure: Figure, axes: Axes, shown: ScalarMappable, label: str) -> None:
    bar = figure.colorbar(shown, ax=axes)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1, colors=GREY)
    bar.outline.set_visible(False)
