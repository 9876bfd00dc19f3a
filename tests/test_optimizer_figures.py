"""Figures of learned optimisers: drawn also from odd numbers, and told what they hold."""

import json

import numpy as np
import pytest
from commands import refused

import plot
from experiment.errors import RunLogError
from figures.meta_learning import plot_run
from figures.optimizers import (
    histogram_steps,
    of_optimizee,
    one_of_each_kind,
    plot_loss_grid,
    plot_optimizer_run,
    plot_symmetry,
    plot_training,
    shown_epochs,
)


def drawn(path) -> bool:
    return path.stat().st_size > 1000


def test_losses_that_leave_the_finite_are_left_out(tmp_path):
    losses = np.ones((2, 12))
    losses[0, 5:] = np.inf
    plot_training("x", {"learned": losses, "sgd 1": losses[:1]}, tmp_path / "loss.png")
    assert drawn(tmp_path / "loss.png")


def test_deviations_of_0_and_missing_ones_are_drawn(tmp_path):
    curves = {"update/scale": np.zeros(5), "gradient/scale": np.full(5, 1e-20)}
    plot_symmetry("x", "scale", {"learned": curves, "adam 1": {}}, tmp_path / "scale.png")
    assert drawn(tmp_path / "scale.png")


def test_a_grid_may_have_holes_and_infinite_losses(tmp_path):
    infinite = {"y": float("inf")}
    for losses in ({"a": {"x": 0.3, **infinite}, "b": {"y": 1.0}}, {"a": infinite}):
        plot_loss_grid(losses, tmp_path / "grid.png")
        assert drawn(tmp_path / "grid.png")


def test_arrays_are_found_by_optimizee_and_optimiser():
    arrays = {"edges": 0, "relu3/adam 0.1/update/scale": 1, "relu3/adam 0.1/losses": 2,
              "relu31/learned/losses": 3}  # fmt: skip
    assert of_optimizee(arrays, "relu3") == {"adam 0.1": {"update/scale": 1, "losses": 2}}


def test_of_several_rates_the_last_is_shown():
    assert one_of_each_kind({"learned": 0, "adam 0.03": 1, "adam 0.1": 2, "sgd 0.1": 3}) == {
        "learned": 0, "adam 0.1": 2, "sgd 0.1": 3,
    }  # fmt: skip


def test_a_directory_without_the_files_gives_no_figures(tmp_path):
    assert plot_optimizer_run(tmp_path) == []


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "comparison.npz").write_bytes(b"nothing")
    with pytest.raises(RunLogError, match="damaged"):
        plot_optimizer_run(tmp_path)


def test_results_that_are_no_table_are_told(tmp_path):
    for content in ([1], {"optimizees": [1]}, {"optimizees": {"relu3": 1}}):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(RunLogError, match="damaged"):
            plot_optimizer_run(tmp_path)


def test_every_twentieth_epoch_is_shown_or_four_of_a_short_run():
    assert shown_epochs(75) == [0, 20, 40, 60] and shown_epochs(41) == [0, 20, 40]
    assert shown_epochs(40) == [0, 13, 27, 40] and shown_epochs(2) == [0, 1, 2]
    assert shown_epochs(0) == [0]


def test_a_step_that_is_asked_for_twice_is_one_row_of_the_histograms(tmp_path):
    config = {"histogram_steps": [3, 1, 1, 2, 9], "test_steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert histogram_steps(tmp_path, {"learned": {"histograms": np.ones((3, 5))}}) == [1, 2, 3]


def compared(directory, losses, steps=200, dataset="mnist"):
    """A run's directory with no more than losses of sigmoid20, by optimiser."""
    directory.mkdir(parents=True)
    config = {"dataset": dataset, "test_steps": steps}
    (directory / "config.json").write_text(json.dumps(config))
    of = {name: {"loss": loss} for name, loss in losses.items()}
    results = {"optimizees": {"sigmoid20": {"optimizers": of}}}
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def grid_of(monkeypatch, *runs):
    drawn = {}
    monkeypatch.setattr(plot, "plot_loss_grid", lambda losses, path: drawn.update(losses))
    plot.main(["losses", *map(str, runs)])
    return drawn


def test_the_grid_tells_equal_names_apart_and_the_mean_of_tuned_baselines(tmp_path, monkeypatch):
    one = compared(tmp_path / "a" / "run", {"learned": 0.2, "adam 0.03": 0.1, "adam 0.01": 0.3})
    two = compared(tmp_path / "b" / "run", {"learned": 0.4, "adam 0.03": 0.5})
    assert grid_of(monkeypatch, one, two) == {
        str(one): {"sigmoid20": 0.2},
        str(two): {"sigmoid20": 0.4},
        "adam, tuned rate": {"sigmoid20": 0.4},
    }


def test_the_grid_keeps_other_data_and_other_numbers_of_steps_apart(tmp_path, monkeypatch):
    runs = [
        compared(tmp_path / "a", {"learned": 0.2}),
        compared(tmp_path / "b", {"learned": 0.1}, 1000),
        compared(tmp_path / "c", {"learned": 0.5}, 200, "fashion"),
    ]
    assert grid_of(monkeypatch, *runs) == {
        "a": {"sigmoid20, step 200": 0.2},
        "b": {"sigmoid20, step 1000": 0.1},
        "c": {"fashion: sigmoid20, step 200": 0.5},
    }


def test_the_grid_of_a_run_that_lacks_something_is_refused(tmp_path, capsys):
    lacking = compared(tmp_path / "run", {"learned": 0.2})
    (lacking / "config.json").write_text("{}")
    assert "no whole run" in refused(capsys, plot.main, "losses", lacking)


def test_the_grid_of_runs_that_compare_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"epochs": 3}))
    assert "learn_to_optimize" in refused(capsys, plot.main, "losses", tmp_path)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../b", "a\0b"])
def test_a_name_in_a_strangers_results_leads_to_no_other_folder(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    noise = {"gradient": {"trace": [1.0], "largest_eigenvalue": [1.0], "tail_index": {"2": [2.0]}}}
    (run / "results.json").write_text(json.dumps({"optimizees": {name: {"noise": noise}}}))
    (run / "config.json").write_text("{}")
    with pytest.raises(RunLogError, match="is not the name of a file"):
        plot_optimizer_run(run)
    results = {"beside": {name: {"random": [0.5]}}, "evaluations": []}
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunLogError, match="is not the name of a file"):
        plot_run(run)
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "results.json", "config.json"}
