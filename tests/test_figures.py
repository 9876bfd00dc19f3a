"""Every figure comes out, whatever the run recorded."""

import json

import numpy as np
import pytest
from PIL import Image

from experiment.errors import RunLogError
from experiment.run_log import RunLog
from figures import meta_learning
from figures.meta_learning import (
    _looks_of_terms,
    _panels,
    _scaled_to_effects,
    cosines,
    plot_accuracy,
    plot_coefficients,
    plot_features,
    plot_pruning,
    plot_rules,
    plot_run,
    running_median,
    table_of_terms,
)
from figures.style import COLOURS, colours, looks

COLUMNS = (
    "meta_loss",
    "train_accuracy",
    "test_accuracy",
    "hypergradient_norm",
    "coefficient/1/w/x y",
    "coefficient/1/m/diagonal",
    "coefficient/2/b/y1_j^2",
)


def run_of(directory, rows, parameters=None, columns=COLUMNS):
    """A run with these rows (numbers, one for all columns)."""
    with RunLog.create(directory, {}, quiet=True) as log:
        for step, value in enumerate(rows):
            log._show = lambda *_: None
            log.record(step, dict.fromkeys(columns, value))
        if parameters is not None:
            log.write_arrays("parameters.npz", parameters)
    return directory


def parameters_of(units=5, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "1.w": generator.normal(size=(units, 12)),
        "1.b": np.zeros(units),
        "1.m": generator.normal(size=(units, units)),
        "2.w": generator.normal(size=(3, units)),
        "2.m": np.zeros((3, 3)),
        "input_shape": np.array([1, 3, 4]),
    }


def names(paths):
    return {path.name for path in paths}


@pytest.mark.parametrize(
    "rows",
    [
        [0.5],
        [np.nan, 0.5, np.inf, 0.4],
        [np.nan],
        [0.0, -0.1, 0.0],
        [0.3 + 1 / (step + 1) for step in range(300)],
    ],
    ids=["one", "some failed", "all failed", "none positive", "many"],
)
def test_every_figure_is_drawn_for_any_number_of_rows(tmp_path, rows):
    parameters = parameters_of() if len(rows) == 1 else None  # their figures are the same for all
    drawn = plot_run(run_of(tmp_path / "run", rows, parameters))
    of_rows = {"meta_loss.png", "accuracy.png", "coefficients.png", "hypergradient.png"}
    assert names(drawn) == of_rows | ({"features.png", "lateral.png"} if parameters else set())
    for path in drawn:
        assert path.parent == tmp_path / "run" / "figures"
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(1 << 20)) > 2


def test_a_run_that_recorded_nothing_has_no_figures(tmp_path):
    assert plot_run(run_of(tmp_path / "run", [])) == []


def test_a_file_with_a_header_only_gives_figures_that_say_so(tmp_path):
    directory = run_of(tmp_path / "run", [])
    (directory / "metrics.csv").write_text("step,meta_loss,hypergradient_norm,coefficient/w/x\n")
    expected = {"meta_loss.png", "hypergradient.png", "coefficients.png"}
    assert names(plot_run(directory)) == expected


def test_figures_whose_columns_are_missing_are_left_out(tmp_path):
    directory = run_of(tmp_path / "run", [1.0, 2.0], columns=["meta_loss", "test_accuracy"])
    assert names(plot_run(directory)) == {"meta_loss.png", "accuracy.png"}


def test_weights_that_are_no_images_are_left_out(tmp_path):
    parameters = parameters_of()
    del parameters["input_shape"]
    assert names(plot_run(run_of(tmp_path / "run", [], parameters))) == {"lateral.png"}


def test_damaged_parameters_are_one_line(tmp_path):
    directory = run_of(tmp_path / "run", [], parameters_of())
    path = directory / "parameters.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunLogError, match=r"parameters\.npz is damaged"):
        plot_run(directory)


@pytest.mark.parametrize(("units", "shape"), [(1, (1, 3, 4)), (7, (3, 5, 5)), (70, (1, 28, 28))])
def test_each_weight_is_a_square_of_whole_pixels_of_one_colour(tmp_path, units, shape):
    weights = np.random.default_rng(0).normal(size=(units, int(np.prod(shape))))
    plot_features(weights, shape, tmp_path / "features.png", "Weights")
    with Image.open(tmp_path / "features.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    row = pixels[50]  # the first row of the images
    changes = np.flatnonzero(np.abs(np.diff(row, axis=0)).sum(axis=1)) + 1
    inside = changes[changes < len(row) - 130]
    assert inside[0] == 20
    sides = np.diff(inside)
    assert (sides % sides.min() == 0).all()


def test_convolutional_weights_are_shown_as_their_kernels(tmp_path):
    parameters = {"1.w": np.random.default_rng(0).normal(size=(8, 3, 5, 5))}
    assert names(plot_run(run_of(tmp_path / "run", [], parameters))) == {"features.png"}


def test_any_term_can_be_a_label(tmp_path):
    step = np.arange(3)
    curves = {f"2/w/{term}": step * 1.0 for term in ("1", "x1 y2_j^2 w", "a $ _ { ^", "x/y", "\\")}
    plot_coefficients(step, curves, tmp_path / "coefficients.png")
    assert (tmp_path / "coefficients.png").stat().st_size > 1000


def test_a_figure_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "folder" / "accuracy.png"
    plot_accuracy(np.arange(2), {"test": np.ones(2)}, path)
    assert path.stat().st_size > 1000 and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("count", [0, 1, len(COLOURS), 30])
def test_any_number_of_curves_has_as_many_colours_and_none_is_wider_than_those_before(count):
    assert len(set(colours(count))) == count
    shown = looks(count)
    assert [look["color"] for look in shown] == colours(count)
    widths = [look["lw"] for look in shown]
    assert widths == sorted(set(widths), reverse=True)


def test_numbers_of_a_rule_of_ones_own_are_drawn_in_a_panel_for_each_parameter(
    tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(meta_learning, "save_figure", lambda figure, path: figures.append(figure))
    names = ("rule/rate", "rule/shares 0", "rule/shares 1")
    columns = [f"coefficient/{layer}/{name}" for layer in (1, 2) for name in names]
    plot_run(run_of(tmp_path / "run", [0.5, 0.25], columns=columns))
    titles = [f"Layer {layer}: {name}" for layer in (1, 2) for name in ("rate", "shares")]
    assert [axes.get_title("left") for axes in figures[0].axes] == titles
    assert [len(axes.lines) for axes in figures[0].axes] == [1, 2, 1, 2]
    assert all(line.get_ydata().tolist() == [0.5, 0.25] for line in figures[0].axes[1].lines)

    many = [f"coefficient/rule/number_{k}" for k in range(9)]
    plot_run(run_of(tmp_path / "many", [0.5, 0.25], columns=many))
    (axes,) = figures[1].axes
    assert axes.get_title("left") == "hyperparameters" and len(axes.lines) == 9


def test_hyperparameters_of_competing_units_have_axes_of_their_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(meta_learning, "save_figure", lambda figure, path: figures.append(figure))
    columns = [f"coefficient/{layer}/w/{name}" for layer in (1, 2) for name in ("rate", "delta")]
    (path,) = plot_run(run_of(tmp_path / "run", [0.1, 0.2, np.nan], columns=columns))
    rate, delta = figures[0].axes
    assert path.name == "coefficients.png"
    assert rate.get_title("left") == "learning rate" and "delta" in delta.get_title("left")
    assert [line.get_ydata().tolist() for line in rate.lines] == [[0.1, 0.2]] * 2
    assert delta.get_legend_handles_labels()[1] == ["layer 1", "layer 2"]


def test_a_figure_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunLogError, match="can't write"):
        plot_accuracy(np.arange(2), {"test": np.ones(2)}, tmp_path / "file" / "accuracy.png")


def test_the_running_median_is_that_of_the_window_cut_at_the_ends():
    values = np.random.default_rng(0).normal(size=20)
    expected = [np.median(values[max(i - 3, 0) : i + 4]) for i in range(20)]
    np.testing.assert_array_equal(running_median(values, 7), expected)


# ---- rules ----


def stages_of(*accuracies):
    return [
        {
            "terms": 2**k,
            "test_accuracy_mean": value,
            "test_accuracy_standard_deviation": None if value is None else 0.01,
        }
        for k, value in enumerate(accuracies)
    ]


@pytest.mark.parametrize("accuracies", [(0.9,), (0.5, None, 0.9), (0.8, 0.8, 0.8, 0.9)])
def test_the_stages_of_a_pruning_are_drawn_where_they_are_finite(tmp_path, accuracies):
    directory = run_of(tmp_path / "run", [])
    (directory / "results.json").write_text(json.dumps({"pruning": stages_of(*accuracies)}))
    assert names(plot_run(directory)) == {"pruning.png"}
    (directory / "results.json").write_text(json.dumps({"pruning": stages_of(None)}))
    assert plot_run(directory) == []


def test_the_pruning_of_one_rule_is_drawn(tmp_path):
    plot_pruning(np.array([5]), np.array([0.9]), np.array([0.0]), tmp_path / "pruning.png")
    assert (tmp_path / "pruning.png").stat().st_size > 1000


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_rules_is_drawn_whatever_parameters_they_have(tmp_path, count):
    generator = np.random.default_rng(0)
    terms = [*(f"w/x^{k} y" for k in range(40)), "b/1", "m/diagonal", "m/y_j y_i"]
    rules = {
        f"a rule with a long name, {k}": {
            term: generator.normal() for term in terms if term[0] in "wbm"[: k + 1]
        }
        for k in range(count)
    }
    rules["silent"] = dict.fromkeys(terms, 0.0)
    plot_rules(rules, tmp_path / "rules.png", "effect")
    with Image.open(tmp_path / "rules.png") as image:
        assert min(image.size) > 300


def test_terms_that_matter_in_any_rule_have_rows_by_their_mean_size():
    rules = {
        "a": {"w/x": -4.0, "w/y": 1.0, "w/s": 0.02, "b/1": 9.0},
        "b": {"w/x": 0.1, "w/y^2": 0.2, "w/s": 0.0},
        "c": {"b/y": 1.0},
    }
    terms, values, left_out = table_of_terms(rules, "w")
    assert (terms, left_out) == (["x", "y^2", "y"], 1)
    expected = [[-1, 0.5, 0], [0, 1, 0], [0.25, 0, 0], [0.005, 0, 0]]
    np.testing.assert_allclose(values, expected)


def test_hyperparameters_of_competing_units_are_relative_to_their_largest_in_any_rule():
    rules = {"a": {"w/rate": 0.02, "w/delta": 0.4}, "b": {"w/rate": 0.01}, "c": {"w/x": 9.0}}
    terms, values, _ = table_of_terms(rules, "w")
    assert terms == ["rate", "delta", "x"]
    np.testing.assert_allclose(values, [[1, 0.5, 0], [1, 0, 0], [0, 0, 1]])


def test_cosines_are_between_columns_and_unknown_for_zeros():
    values = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, -2.0, 0.0, 3.0]])
    half = np.sqrt(0.5)
    expected = [
        [1, half, np.nan, 0],
        [half, 1, np.nan, -half],
        [np.nan] * 4,
        [0, -half, np.nan, 1],
    ]
    np.testing.assert_allclose(cosines(values), expected, atol=1e-15)


def test_coefficients_end_at_their_effects_and_a_term_has_one_colour_in_all_panels():
    curves = {"1/w/x": np.array([0.0, 4.0]), "1/w/y": np.array([1.0, -0.1]), "2/w/x": np.ones(2)}
    effects = {"1/w/x": 0.5, "1/w/y": 1.5, "2/w/x": 0.25}
    scaled = _scaled_to_effects(curves | {"1/w/z": np.ones(2)}, effects)
    assert {name: values[-1] for name, values in scaled.items()} == pytest.approx(
        {"1/w/x": 0.5, "1/w/y": -1.5, "2/w/x": 0.25}
    )
    looks_of = _looks_of_terms(_panels(scaled))
    assert list(looks_of) == ["y", "x"] and len(set(looks_of.values())) == 2
