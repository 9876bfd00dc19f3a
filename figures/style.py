"""The style of all figures: colours, sizes, axes, legends, files.

Figures are matplotlib Figure objects with their own canvas; pyplot and its state are not used.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

from experiment.errors import RunLogError
from experiment.files import in_place

# The palette of Okabe and Ito, safe for the colour-blind, with a darker yellow for white paper
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b8a900")
GREY, FAINT = "#4d4d4d", "#bbbbbb"
DIVERGING = "RdBu_r"  # red above 0, blue below
DPI = 150
FONT = 9


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    return Figure((width, height), dpi=DPI, layout="constrained")


def one_panel() -> tuple[Figure, Axes]:
    """A figure with one panel, in the standard size."""
    figure = new_figure(6.4, 3.8)
    return figure, figure.subplots()


def label_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set title and labels, with a light grid and no frame except the two axes."""
    axes.set_title(title, fontsize=FONT + 1, loc="left", parse_math=False)
    axes.set_xlabel(x_label, fontsize=FONT, parse_math=False)
    axes.set_ylabel(y_label, fontsize=FONT, parse_math=False)
    axes.tick_params(labelsize=FONT - 1, colors=GREY)
    axes.yaxis.get_offset_text().set_fontsize(FONT - 1)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(whole_ticks())
    axes.grid(True, color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    left, right = axes.get_xlim()
    if axes.dataLim.width == 0 and axes.get_xscale() == "linear":  # a single step
        axes.set_xlim((left + right - 1) / 2, (left + right + 1) / 2)
    if not axes.has_data():
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=GREY)


def percent_axis(axes: Axes) -> None:
    """Label the vertical axis in percent, for fractions, with at most eight ticks."""
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], min_n_ticks=2))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def colours(count: int) -> list[str]:
    """A colour for each of `count` curves: COLOURS or, if those are too few, from dark to light."""
    if count <= len(COLOURS):
        return [*COLOURS[:count]]
    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 0.93, count))]


def looks(count: int) -> list[dict[str, Any]]:
    """Colour and width of `count` curves: each is narrower than those before, and hides none."""
    widths = np.linspace(2.2, 1.0, count) if count != 1 else [1.4]
    return [{"color": c, "lw": w} for c, w in zip(colours(count), widths, strict=True)]


def whole_ticks() -> MaxNLocator:
    """A locator for at most six ticks at whole numbers."""
    return MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def tick_numbers(axes: Axes, numbers: Iterable[int], apart: float) -> None:
    """Put ticks on a logarithmic x axis at those of the numbers that leave room for their labels.

    apart: the least factor between two labels.
    """
    labelled = []
    for number in sorted(numbers):
        if not labelled or number >= apart * labelled[-1]:
            labelled.append(number)
    axes.set_xticks(labelled, [str(number) for number in labelled])
    axes.xaxis.minorticks_off()


class PlainLogFormatter(LogFormatterSciNotation):
    """Numbers of a logarithmic axis: 0.02 or 300, and powers of ten where those would be long."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick, "" for ticks that get none."""
        label = super().__call__(x, pos)
        return f"{x:g}" if label and 1e-3 <= abs(x) < 1e5 else label


def add_legend(axes: Axes) -> None:
    """Add a legend if any curve has a label; outside the panel if there are more than six."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 6:
        axes.legend(fontsize=FONT - 1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    elif any(names):
        axes.legend(fontsize=FONT - 1, frameon=False, loc="best")
    if any(names):
        without_formulas(axes.get_legend())


def without_formulas(legend: Legend) -> None:
    """Turn off mathematical type in a legend, because a run may be called run_$a_$b."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def plain_text(name: str) -> str:
    """A name for the ticks of an axis, with each $ escaped."""
    return name.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG atomically, creating its folder; raises RunLogError if that fails."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            _label_plainly(axis)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with in_place(path) as new:
            FigureCanvasAgg(figure).print_png(str(new))
    except OSError as error:
        raise RunLogError(f"can't write {path}: {error.strerror or error}") from error


def _label_plainly(axis: Axis) -> None:
    """Give a logarithmic axis PlainLogFormatter in the place of matplotlib's own."""
    for which, formatter, put in (
        ("major", axis.get_major_formatter(), axis.set_major_formatter),
        ("minor", axis.get_minor_formatter(), axis.set_minor_formatter),
    ):
        if type(formatter) is LogFormatterSciNotation:
            put(PlainLogFormatter(minor_thresholds=formatter.minor_thresholds))
            axis.set_tick_params(which=which, labelsize=FONT - 1, labelcolor=GREY)
