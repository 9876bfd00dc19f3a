"""Figures of learned optimisers: drawn also from odd numbers, and told what they hold."""

import json

import numpy as np
import pytest
from commands import refused

import plot
from optimizer_figures import (
    draw_loss_grid,
    draw_optimizer_run,
    draw_symmetry,
    draw_training,
    of_optimizee,
    one_of_each_kind,
)
from run_log import RunLogError


def drawn(path) -> bool:
    return path.stat().st_size > 1000


def test_losses_that_leave_the_finite_are_left_out(tmp_path):
    losses = np.ones((2, 12))
    losses[0, 5:] = np.inf
    draw_training("x", {"learned": losses, "sgd 1": losses[:1]}, tmp_path / "loss.png")
    assert drawn(tmp_path / "loss.png")


def test_deviations_of_0_and_missing_ones_are_drawn(tmp_path):
    curves = {"update/scale": np.zeros(5), "gradient/scale": np.full(5, 1e-20)}
    draw_symmetry("x", "scale", {"learned": curves, "adam 1": {}}, tmp_path / "scale.png")
    assert drawn(tmp_path / "scale.png")


def test_a_grid_may_have_holes_and_infinite_losses(tmp_path):
    losses = {"a": {"x": 0.3, "y": float("inf")}, "b": {"y": 1.0}}
    draw_loss_grid(losses, tmp_path / "grid.png")
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
    assert draw_optimizer_run(tmp_path) == []


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "comparison.npz").write_bytes(b"nothing")
    with pytest.raises(RunLogError, match="damaged"):
        draw_optimizer_run(tmp_path)


def test_the_grid_of_runs_that_compare_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"epochs": 3}))
    assert "learn_to_optimize" in refused(capsys, plot.main, "losses", tmp_path)
