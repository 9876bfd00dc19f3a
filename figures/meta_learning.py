"""The figures of a meta-learning run, drawn from its directory alone.

    plot_run("runs/main-20260101-120000")      # writes into its figures/, returns the paths

Each other `plot_...` function takes arrays and the path of the PNG to write. Values that are not
finite (failed steps) are left out of the curves and marked on the step axis. Nothing here keeps
state: figures are matplotlib Figure objects, pyplot is not used.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import AutoLocator, PercentFormatter
from numpy.lib.stride_tricks import sliding_window_view

from experiment.run_reader import path_within, read_arrays, read_metrics, read_results
from figures.style import (
    COLOURS,
    DIVERGING,
    DPI,
    FAINT,
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
    tick_numbers,
    whole_ticks,
)

LABELLED = 8  # the most coefficients of a panel named in the legend
LARGEST_GRID = 64  # the most units shown as images
MATRICES_A_ROW = 4
FEW_LAYERS = 6  # panels of more are flatter
SHOWN_TERMS, SHOWN_FROM = 24, 0.05  # the most terms that get a row; their least relative size
NUMBERED = 12  # the most rules whose similarities are written out, beside their colours
ACCURACIES = {"train_accuracy": "training images", "test_accuracy": "test images"}
HELD_OUT = {"held_out_accuracy": "held-out training images"}
GROUPS = {"w": "forward weights w", "b": "biases b", "m": "lateral weights m"}
OWN = "rule"  # the group of the hyperparameters of a rule of one's own, such as "rule/rates 0"
OWN_PANELS = 5  # the most of its nn.Parameters that get a panel each
COMPETITION = {  # the hyperparameters of competing units: they have no scale in common
    "w/rate": "learning rate",
    "w/delta": "delta, strength of unlearning",
    "w/inverse_temperature": "inverse temperature of the gate",
}
FACTOR = re.compile(r"([a-z])(\d*)_?([ij]?)\^?(\d*)")  # a factor of a monomial: x, y^2, y1_j^2

Rules = Mapping[str, Mapping[str, float]]
Curves = Mapping[str, np.ndarray]
Parameters = Mapping[str, np.ndarray]


def plot_run(directory: str | Path, x_label: str = "meta-step") -> list[Path]:
    """Draw what metrics.csv, parameters.npz and results.json allow, and return the paths.

    x_label: what a row of metrics.csv stands for, such as a meta-step or an epoch.
    """
    directory = Path(directory)
    metrics = read_metrics(directory)
    parameters = read_arrays(directory / "parameters.npz")
    results, place = read_results(directory), directory / "figures"
    stages = results.get("pruning", [])
    return [
        *_plot_metrics(metrics, results.get("term_effects") or {}, place, x_label),
        *_plot_parameters(parameters, place),
        *_plot_stages(stages, place),
        *_plot_references(results, place),
    ]


def plot_oja_run(directory: str | Path) -> list[Path]:
    """Draw what `plot_run` draws, and the weights in directions.npz if there are any."""
    drawn, compared = plot_run(directory), read_arrays(Path(directory) / "directions.npz")
    if compared:
        path = Path(directory) / "figures" / "directions.png"
        title = "Weights of the learned rule, of Oja's rule; first principal direction"
        plot_features(compared["weights"], compared["input_shape"], path, title)
        drawn.append(path)
    return drawn


def plot_meta_loss(
    step: np.ndarray,
    loss: np.ndarray,
    path: str | Path,
    x_label: str = "meta-step",
    y_label: str = "outer loss after the inner steps",
) -> None:
    """Draw the meta-loss over meta-steps, faint, and its running median."""
    figure, axes = one_panel()
    _raw_and_median(axes, step, loss)
    _mark_failed(axes, step, loss)
    label_axes(axes, "Meta-loss", x_label, y_label)
    add_legend(axes)
    save_figure(figure, path)


def plot_accuracy(
    step: np.ndarray, accuracies: Curves, path: str | Path, x_label: str = "meta-step"
) -> None:
    """Draw accuracies of the probe (fractions [steps] by name) over meta-steps."""
    figure, axes = one_panel()
    for look, (name, values) in zip(looks(len(accuracies)), accuracies.items(), strict=True):
        _raw_and_median(axes, step, values, name, **look)
    percent_axis(axes)
    label_axes(axes, "Accuracy of the linear probe", x_label, "images classified correctly")
    add_legend(axes)
    save_figure(figure, path)


def plot_hypergradient(
    step: np.ndarray, norm: np.ndarray, path: str | Path, x_label: str = "meta-step"
) -> None:
    """Draw the norm of the hypergradient over meta-steps on a logarithmic scale."""
    figure, axes = one_panel()
    axes.set_yscale("log")
    _raw_and_median(axes, step, np.where(norm > 0, norm, np.nan))
    _mark_failed(axes, step, norm)
    label_axes(axes, "Norm of the hypergradient", x_label, "Euclidean norm before clipping")
    add_legend(axes)
    save_figure(figure, path)


def plot_coefficients(
    step: np.ndarray,
    coefficients: Curves,
    path: str | Path,
    x_label: str = "meta-step",
    effects: Mapping[str, float] | None = None,
) -> None:
    """Draw the coefficients of the rules over meta-steps, in a panel for each layer and group.

    A term has the same colour in all panels. Each nn.Parameter of a rule of one's own has a panel,
    since they have no scale in common; where there are many, they share one.

    coefficients: values [steps] by "<layer>/<group>/<term>", or by "<group>/<term>" if all layers
        share one rule.
    effects: by the same names, the size of the change that each term makes at the end, relative to
        the whole change. Each curve is scaled to end at its effect, so that terms can be compared.
        None: the coefficients are drawn as they are.
    """
    scaled = _scaled_to_effects(coefficients, effects or {})
    panels = _panels(_own_by_parameter(scaled or coefficients))
    y_label = "coefficient × effect of one" if scaled else "coefficient"
    looks_of = _looks_of_terms(panels)
    layers = list(dict.fromkeys(layer for layer, _ in panels))
    found = dict.fromkeys(group for _, group in panels)
    groups = [*filter(found.__contains__, GROUPS), *(g for g in found if g not in GROUPS)]
    rows, columns = max(len(layers), 1), max(len(groups), 1)
    figure = new_figure(4.6 * columns, (3.0 if rows <= FEW_LAYERS else 2.0) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, layer in enumerate(layers):
        for column, group in enumerate(groups):
            axes = grid[row, column]
            _coefficient_curves(axes, step, panels.get((layer, group), {}), looks_of)
            if group in GROUPS:  # numbers of one's own, such as logarithms, may be far from 0
                axes.axhline(0, color=GREY, lw=0.6, zorder=1)
            bottom = x_label if row == rows - 1 else ""
            what = GROUPS.get(group, group.removeprefix(OWN).strip() or "hyperparameters")
            label_axes(
                axes, f"Layer {layer}: {what}" if layer else what, bottom, "" if column else y_label
            )
    figure.suptitle("Coefficients of the learning rule", fontsize=FONT + 3)
    save_figure(figure, path)


def plot_hyperparameters(
    step: np.ndarray, values: Curves, path: str | Path, x_label: str = "meta-step"
) -> None:
    """Draw hyperparameters of competing units over meta-steps, each on axes of its own.

    values: [steps] by "<layer>/<name>", with the names in COMPETITION.
    """
    names = [name for name in COMPETITION if any(key.endswith(name) for key in values)]
    figure = new_figure(0.6 + 4.2 * len(names), 3.4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curves = {k.split("/")[0]: v for k, v in values.items() if k.endswith(name)}
        for look, (layer, curve) in zip(looks(len(curves)), curves.items(), strict=True):
            label = f"layer {layer}" if len(curves) > 1 else ""
            _raw_and_median(axes, step, curve, label, **look)
        label_axes(axes, COMPETITION[name], x_label, "")
        axes.ticklabel_format(axis="y", useOffset=False)
    add_legend(axes)
    save_figure(figure, path)


def plot_features(
    weights: np.ndarray, input_shape: Sequence[int], path: str | Path, title: str
) -> None:
    """Draw the weights of each unit as an image, all on one scale that is symmetric around 0.

    Channels are shown side by side. Each weight is a square of whole pixels.

    weights: [units, ...] with C*H*W numbers for each unit.
    input_shape: [C, H, W].
    """
    channels, height, width = (int(size) for size in input_shape)
    images = weights.reshape(len(weights), channels, height, width)[:LARGEST_GRID]
    images = np.concatenate(list(images.transpose(1, 0, 2, 3)), axis=2)
    mosaic = _mosaic(images)
    scale = max(1, round(900 / mosaic.shape[1]))
    limit = _limit(images)
    if len(images) < len(weights):
        title = f"{title}: {len(images)} of {len(weights)} units"
    _save_mosaic(np.repeat(np.repeat(mosaic, scale, 0), scale, 1), limit, title, path)


def plot_lateral(lateral: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw the lateral matrices (m [out, out] by the layer's name), each on its scale around 0.

    The scale is that of the off-diagonal entries, because those on the diagonal are often of
    another size.
    """
    across = min(max(len(lateral), 1), MATRICES_A_ROW)
    down = -(-len(lateral) // across)
    figure = new_figure(4.4 * across, 3.8 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(lateral) :]:
        axes.set_visible(False)
    for axes, (layer, matrix) in zip(grid.flat, lateral.items(), strict=False):
        off_diagonal = matrix[~np.eye(len(matrix), dtype=bool)]
        norm = Normalize(-(limit := _limit(off_diagonal)), limit)
        image = axes.imshow(matrix, cmap=DIVERGING, norm=norm, interpolation="nearest")
        above, below = matrix.max() > limit, matrix.min() < -limit
        beyond = "both" if above and below else "max" if above else "min" if below else "neither"
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=beyond)
        bar.ax.tick_params(labelsize=FONT - 1)
        bar.outline.set_visible(False)
        label_axes(axes, f"Layer {layer}: lateral weights m", "from unit", "to unit")
        axes.grid(False)
        axes.yaxis.set_major_locator(whole_ticks())
    save_figure(figure, path)


def plot_pruning(
    terms: np.ndarray, mean: np.ndarray, deviation: np.ndarray, path: str | Path
) -> None:
    """Draw the accuracy of shortened rules over their numbers of terms.

    The one with the most terms is taken to be the whole rule.

    mean, deviation: fractions [rules] and their standard deviations.
    """
    figure, axes = one_panel()
    colour, whole = COLOURS[0], mean[np.argmax(terms)]
    axes.axhline(whole, color=GREY, lw=0.8, ls="--", label=f"whole rule, {terms.max()} terms")
    axes.errorbar(terms, mean, deviation, color=colour, marker="o", ms=4, lw=1.3, capsize=2)
    axes.set_xscale("log")
    percent_axis(axes)
    label_axes(
        axes,
        "Accuracy of shortened rules",
        "terms of the rule",
        "test images, probe, ± one deviation",
    )
    tick_numbers(axes, terms, 1.12)
    add_legend(axes)
    save_figure(figure, path)


def plot_rules(rules: Rules, path: str | Path, what: str) -> None:
    """Draw the terms of several rules and the rules' similarity, in two panels for each parameter.

    At the left, a row for each term, relative to the largest term of each rule; at the right, the
    cosines between rules. Terms that are small in all rules are not shown but count in the cosines.

    rules: by a rule's name, the signed sizes of its terms ("w/x y").
    what: what these sizes are, for the colour bar.
    """
    given = {name[0] for sizes in rules.values() for name, size in sizes.items() if size}
    groups = [group for group in GROUPS if group in given]
    tables = [table_of_terms(rules, group) for group in groups]
    rows = [max(len(terms), len(rules), 8) for terms, _, _ in tables]
    cell, names = 0.24, 0.075 * max(map(len, rules))
    width, height = 2 * cell * max(len(rules), 6) + names + 3.2, cell * sum(rows)
    figure = new_figure(width, height + (names + 0.6) * len(groups) + 0.5)
    grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=rows)
    for (left, right), group, (terms, values, left_out) in zip(grid, groups, tables, strict=True):
        image = _matrix(left, values[: len(terms)], GROUPS[group])
        left.set_xlabel(f"small terms left out: {left_out}" if left_out else "", fontsize=FONT - 2)
        left.set_yticks(range(len(terms)), [_typeset(term) for term in terms])
        similarity = cosines(values)
        _matrix(right, similarity, "cosine between rules", numbered=len(rules) <= NUMBERED)
        run_names = [plain_text(name) for name in rules]
        right.set_yticks(range(len(rules)), run_names)
        right.set_aspect("equal", anchor="NW")
        for axes in (left, right):
            axes.set_xticks(range(len(rules)), run_names, rotation=90)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=30, panchor=False)
    bar.set_label(f"{what}, relative to the rule's largest\ncosine", fontsize=FONT - 1)
    bar.ax.tick_params(labelsize=FONT - 1)
    bar.outline.set_visible(False)
    save_figure(figure, path)


# ---- from a run's files to the functions above ----


def _plot_metrics(
    metrics: Curves, effects: Mapping[str, float], place: Path, x_label: str
) -> list[Path]:
    """Draw the figures for which there are columns."""
    drawn = []

    def plot(function, values, name: str) -> None:
        function(metrics["step"], values, place / name, x_label)
        drawn.append(place / name)

    named = ACCURACIES | HELD_OUT
    accuracies = {label: metrics[n] for n, label in named.items() if n in metrics}
    prefix = "coefficient/"
    coefficients = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    if "meta_loss" in metrics:
        plot(plot_meta_loss, metrics["meta_loss"], "meta_loss.png")
    if accuracies:
        plot(plot_accuracy, accuracies, "accuracy.png")
    if any(name.endswith(tuple(COMPETITION)) for name in coefficients):
        plot(plot_hyperparameters, coefficients, "coefficients.png")
    elif coefficients:
        plot(partial(plot_coefficients, effects=effects), coefficients, "coefficients.png")
    if "hypergradient_norm" in metrics:
        plot(plot_hypergradient, metrics["hypergradient_norm"], "hypergradient.png")
    return drawn


def _plot_parameters(parameters: Parameters, place: Path) -> list[Path]:
    """Draw the first layer's weights and all lateral matrices, if there are any."""
    drawn = []
    weights = [(name[:-2], value) for name, value in parameters.items() if name.endswith(".w")]
    lateral = {name[:-2]: value for name, value in parameters.items() if name.endswith(".m")}
    if weights:
        layer, w = weights[0]
        shape = w.shape[1:] if w.ndim == 4 else parameters.get("input_shape", ())
        if len(shape) == 3 and w[0].size == np.prod(shape):
            title = f"Forward weights of layer {layer}"
            plot_features(w, shape, place / "features.png", title)
            drawn.append(place / "features.png")
    if lateral:
        plot_lateral(lateral, place / "lateral.png")
        drawn.append(place / "lateral.png")
    return drawn


def _plot_stages(stages: Sequence[Mapping], place: Path) -> list[Path]:
    """Draw the accuracies of the rules that prune_rule.py judged, except those not finite."""
    names = ("terms", "test_accuracy_mean", "test_accuracy_standard_deviation")
    rows = [[stage[name] for name in names] for stage in stages]
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return []
    rows = [(terms, mean, deviation or 0.0) for terms, mean, deviation in rows]
    terms, mean, deviation = map(np.array, zip(*rows, strict=True))
    plot_pruning(terms, mean, deviation, place / "pruning.png")
    return [place / "pruning.png"]


def _plot_references(results: Mapping, place: Path) -> list[Path]:
    """Draw the accuracies of other features and of the learned rule, if they were judged."""
    drawn = []
    for dataset, others in results.get("beside", {}).items():
        rows = [r for r in results["evaluations"] if r.get("dataset", dataset) == dataset]
        judged = {name: values for name, values in others.items() if values}
        if rows:
            name = f"learned, {rows[0]['inner_steps']} updates"
            judged[name] = [row["test_accuracy"] for row in rows]
        if judged:
            drawn.append(path_within(place, f"beside_{dataset}.png"))
            plot_beside(judged, drawn[-1], dataset)
    return drawn


def plot_beside(accuracies: Mapping[str, Sequence[float]], path: str | Path, dataset: str) -> None:
    """Draw a line of dots for each kind of features, one dot for each training, and their mean.

    accuracies: at least one fraction for each name, in order from top to bottom.
    """
    rows = list(accuracies.items())
    figure = new_figure(6.4, 1.2 + 0.36 * len(rows))
    axes = figure.subplots()
    for height, (name, values) in enumerate(rows):
        colour = COLOURS[1] if name.startswith("learned") else COLOURS[0]
        axes.plot(values, [height] * len(values), "o", ms=4, color=colour, alpha=0.5)
        axes.plot([np.mean(values)], [height], "|", ms=16, mew=2, color=colour)
        axes.annotate(f"{100 * np.mean(values):.2f} %", (np.mean(values), height), (0, 9),
                      textcoords="offset points", ha="center", fontsize=FONT - 1)  # fmt: skip
    label_axes(axes, f"Probe on {dataset}: dots are trainings, bars means", "test accuracy", "")
    axes.set_yticks(range(len(rows)), [plain_text(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.8)
    shown = [value for _, values in rows for value in values]
    room = 0.08 * (max(shown) - min(shown)) + 0.005
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    save_figure(figure, path)


# ---- curves ----


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of an odd `window` of values around each; the window is cut off at the ends."""
    if not len(values):
        return values
    padded = np.pad(values.astype(float), window // 2, constant_values=np.nan)
    return np.nanmedian(sliding_window_view(padded, window), axis=1)


def _raw_and_median(
    axes: Axes,
    step: np.ndarray,
    values: np.ndarray,
    name: str = "",
    *,
    color: str = COLOURS[0],
    lw: float = 1.4,
) -> None:
    """Draw the finite values faint and their running median strong; if they are few, only them."""
    finite = np.isfinite(values)
    step, values = step[finite], values[finite]
    window = min(101, 2 * (len(values) // 50) + 1)
    if window == 1:
        axes.plot(step, values, color=color, marker="o", ms=3, lw=lw, label=name)
    else:
        axes.plot(step, values, color=color, lw=0.7, alpha=0.3)
        label = ", ".join(filter(None, (name, f"median of {window} steps")))
        axes.plot(step, running_median(values, window), color=color, lw=lw, label=label)


def _mark_failed(axes: Axes, step: np.ndarray, values: np.ndarray) -> None:
    """Mark the steps whose value is not finite on the step axis."""
    steps = step[~np.isfinite(values)]
    if len(steps):
        axes.plot(
            steps,
            np.zeros(len(steps)),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            ls="",
            marker="x",
            ms=4,
            color=COLOURS[1],
            label=f"not finite ({len(steps)})",
        )


def _own_by_parameter(coefficients: Curves) -> Curves:
    """The curves, where those of one's own rule have the nn.Parameter's name in their group's.

    "1/rule/rates 0" becomes "1/rule rates/rates 0", unless there are too many such groups.
    """
    named = {name: re.sub(rf"(^|/){OWN}/(\S+)", rf"\1{OWN} \2/\2", name) for name in coefficients}
    panels = {new.rsplit("/", 1)[0].split("/")[-1] for name, new in named.items() if new != name}
    if len(panels) > OWN_PANELS:
        return coefficients
    return {named[name]: values for name, values in coefficients.items()}


def _panels(coefficients: Curves) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """The curves by (layer, group), then by term."""
    panels: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, values in coefficients.items():
        group_first = name.split("/", 1)[0].split(" ")[0] in (*GROUPS, OWN)
        layer, group, term = ("/" + name if group_first else name).split("/", 2)
        panels.setdefault((layer, group), {})[term] = values
    return panels


def _scaled_to_effects(coefficients: Curves, effects: Mapping[str, float]) -> Curves:
    """The curves of the terms that have an effect, each times its effect / |its last value|."""
    return {
        name: values * (effects[name] / abs(_last_finite(values)))
        for name, values in coefficients.items()
        if effects.get(name) and _last_finite(values)
    }


def _looks_of_terms(panels: Mapping[tuple[str, str], Curves]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each term that is named in any panel.

    Where there are too few colours they come again, in another style.
    """
    named = [term for terms in panels.values() for term in _largest(terms)]
    styles = itertools.cycle(itertools.product(("-", "--", ":", "-."), COLOURS))
    looks = ((colour, style) for style, colour in styles)
    return dict(zip(dict.fromkeys(named), looks, strict=False))


def _largest(terms: Curves) -> list[str]:
    """At most LABELLED terms that end farthest from 0, the farthest first."""
    left = [term for term, values in terms.items() if _last_finite(values)]
    return sorted(left, key=lambda term: -abs(_last_finite(terms[term])))[:LABELLED]


def _coefficient_curves(
    axes: Axes, step: np.ndarray, terms: Curves, looks_of: Mapping[str, tuple[str, str]]
) -> None:
    """Draw the terms of `_largest`, named in the order of their last values, over grey others."""
    final, largest = {t: _last_finite(values) for t, values in terms.items()}, _largest(terms)
    marker = "o" if len(step) == 1 else ""
    for term, values in terms.items():
        if term not in largest:
            axes.plot(step, values, color=FAINT, lw=0.6, marker=marker, ms=2)
    for term in largest:
        colour, style = looks_of[term]
        axes.plot(
            step,
            terms[term],
            color=colour,
            ls=style,
            lw=1.4,
            marker=marker,
            ms=4,
            label=_typeset(term),
        )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        order = sorted(range(len(largest)), key=lambda i: -final[largest[i]])
        axes.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            fontsize=FONT - 1,
            frameon=False,
            handlelength=1.6,
        )


def _last_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else 0.0


def _typeset(term: str) -> str:
    """A monomial such as "x1 y2_j^2" as a formula; any other text unchanged."""
    factors = [FACTOR.fullmatch(factor) for factor in term.split()]
    if not all(factors):
        return term.replace("$", r"\$")
    written = [f"{f[1]}_{{{f[2]}{f[3]}}}^{{{f[4]}}}" for f in factors]
    return "$" + r"\,".join(written).replace("_{}", "").replace("^{}", "") + "$"


# ---- rules ----


def table_of_terms(rules: Rules, group: str) -> tuple[list[str], np.ndarray, int]:
    """The terms of a parameter that get a row, the values of all its terms, and how many get none.

    Terms are sorted by decreasing mean size. The values [all terms, rules] are first those of the
    terms with a row, then the others; each rule's are relative to its largest, and 0 for terms that
    it doesn't have. Each hyperparameter of competing units is relative to its largest in any rule.
    """
    names = dict.fromkeys(n for sizes in rules.values() for n in sizes if n[0] == group)
    values = np.array([[sizes.get(n, 0.0) for sizes in rules.values()] for n in names])
    own_scale = np.array([name in COMPETITION for name in names])
    largest = np.abs(np.where(own_scale[:, None], 0, values)).max(axis=0, keepdims=True)
    largest = np.where(own_scale[:, None], np.abs(values).max(axis=1, keepdims=True), largest)
    values = values / np.where(largest > 0, largest, 1.0)
    order = np.argsort(-np.abs(values).mean(axis=1), kind="stable")
    values, terms = values[order], [list(names)[i].split("/", 1)[1] for i in order]
    matter = np.flatnonzero(np.abs(values).max(axis=1) >= SHOWN_FROM)[:SHOWN_TERMS]
    rest = np.setdiff1d(np.arange(len(terms)), matter)
    return [terms[i] for i in matter], values[[*matter, *rest]], len(rest)


def cosines(values: np.ndarray) -> np.ndarray:
    """Cosines [rules, rules] between the columns of values [terms, rules]; nan for zero columns."""
    length = np.linalg.norm(values, axis=0)
    unit = values / np.where(length > 0, length, np.nan)
    return unit.T @ unit


def _matrix(axes: Axes, values: np.ndarray, title: str, numbered: bool = False) -> AxesImage:
    """Draw a heat map from -1 to 1 with white lines between its cells; nan is grey."""
    axes.set_facecolor("#eeeeee")
    norm = Normalize(-1, 1)
    image = axes.imshow(values, cmap=DIVERGING, norm=norm, interpolation="nearest", aspect="auto")
    rows, columns = values.shape
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", lw=0.8)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", lw=0.8)
    for (i, j), value in np.ndenumerate(values) if numbered else ():
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=5.5, color=colour)
    axes.set_title(title, fontsize=FONT, loc="left")
    axes.tick_params(labelsize=FONT - 1, length=0)
    axes.spines[:].set_visible(False)
    return image


# ---- images ----


def _limit(values: np.ndarray) -> float:
    """The largest size of the finite values, to end a scale around 0; 1 if it is 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0)) or 1.0


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Images [n, h, w] in a grid whose last row is as full as possible, with nan between them."""
    count, height, width = images.shape
    square = int(np.ceil(np.sqrt(count * height / width)))
    columns = min(range(square, 2 * square + 1), key=lambda number: -count % number)
    rows = -(-count // columns)
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def _save_mosaic(pixels: np.ndarray, limit: float, title: str, path: str | Path) -> None:
    """Write `pixels` at their own resolution, with a title above and a colour bar at the right."""
    height, width = pixels.shape
    margin, head, side = 20, 50, 110
    full_width, full_height = width + 2 * margin + side, height + margin + head
    figure = Figure((full_width / DPI, full_height / DPI), dpi=DPI)
    box = (margin / full_width, margin / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    norm = Normalize(-limit, limit)
    image = axes.imshow(pixels, cmap=DIVERGING, norm=norm, interpolation="none", aspect="auto")
    left = (margin + width + 25) / full_width
    bar_axes = figure.add_axes((left, box[1], 18 / full_width, box[3]))
    bar = figure.colorbar(image, cax=bar_axes)
    bar.ax.tick_params(labelsize=FONT - 1)
    bar.outline.set_visible(False)
    figure.text(box[0], 1 - 16 / full_height, title, va="top", fontsize=FONT + 1)
    save_figure(figure, path)
