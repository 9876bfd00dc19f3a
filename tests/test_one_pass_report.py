"""Tables and figures from draws.npz alone."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.contour import ContourSet

import plot
from experiment.errors import RunLogError
from experiment.tables import markdown
from figures import one_pass_report
from figures.one_pass_report import (
    Columns,
    Recorded,
    best_of_groups,
    final_losses,
    median_of_draws,
    plot_hypergradient_errors,
    plot_report,
    read_run,
    read_runs,
    summary,
    table,
)
from figures.style import save_figure


def recorded(title="run", draws=6, method="fixed", seed=0, **config):
    generator = np.random.default_rng(seed)
    columns = {
        "step": np.arange(4) * 10.0,
        "seconds": np.arange(4) * 1.0,
        "evaluation_seconds": np.ones(4),
    }
    for name in ("Loss/Training", "Loss/Validation", "Loss/Test", "Unnormalised_Loss/Test"):
        columns[name] = np.exp(-np.arange(4))[:, None] * generator.uniform(1, 2, (4, draws))
    for name in ("Lr", "Weight_Decay", "Momentum"):
        columns[f"Hyperparameter/{name}"] = generator.uniform(0.1, 0.9, (4, draws))
    settings = {"dataset": "toy", "method": method, "network_weight_steps": 10, "look_back": 5}
    return Recorded(title, settings | config, columns)


def test_a_draw_diverges_when_its_loss_is_not_finite_or_has_grown_tenfold():
    run = recorded()
    run.columns["Unnormalised_Loss/Test"][-1, :3] = [math.nan, math.inf, 30.0]
    losses = final_losses(run.columns)
    assert np.isinf(losses[:3]).all() and np.isfinite(losses[3:]).all()


def test_the_mean_is_of_draws_that_did_not_diverge_and_their_share_is_told():
    losses = np.array([1.0, 2.0, 3.0, math.inf])
    found = summary(losses)
    assert found["mean"] == pytest.approx(2, abs=0.1)
    assert found["diverged"] == 0.25 and found["best"] == 1
    assert summary(np.full(4, math.inf))["median"] == math.inf


def test_the_deviation_of_a_mean_is_that_of_the_bootstrap():
    losses = np.random.default_rng(0).normal(5, 1, 400)
    found = summary(losses)
    assert found["mean"] == pytest.approx(losses.mean(), abs=0.01)
    assert found["mean_deviation"] == pytest.approx(losses.std() / 20, rel=0.15)


def test_a_draw_that_is_not_a_number_does_not_hide_the_median():
    assert median_of_draws(np.array([1.0, math.nan, 3.0])) == 3
    assert median_of_draws(np.array([1.0, math.nan, math.nan])) == math.inf
    assert math.isnan(median_of_draws(np.full(2, math.nan)))


def test_of_each_three_draws_the_best_on_validation_is_taken():
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    validation = np.array([3.0, 1.0, 2.0, math.nan, 9.0, 8.0, 0.0])
    assert best_of_groups(losses, validation, 3).tolist() == [2.0, 6.0]


def test_columns_come_back_as_they_were():
    columns = Columns()
    for step in range(3):
        columns.append(step, 0.5 * step, 0.1, {"Loss/Test": np.arange(2.0) + step})
    again = Columns({n: torch.clone(t) for n, t in columns.to_tensors().items()})
    again.append(3, 1.5, 0.1, {"Loss/Test": np.zeros(2)})
    assert again.last("seconds") == 1.5
    assert np.array_equal(again.arrays()["Loss/Test"][:3], columns.arrays()["Loss/Test"])


def test_the_table_has_a_line_for_each_run_and_one_for_triples():
    text = markdown(table([recorded("a"), recorded("b", method="look_back")]))
    lines = text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["a", "a, 3-batched", "b"]
    assert "0.0%" in lines[2]


def test_every_figure_is_drawn(monkeypatch, tmp_path):
    runs = [
        recorded(f"T{T} i{i}", method="look_back", network_weight_steps=T, look_back=i)
        for T in (5, 10)
        for i in (1, 5)
    ]
    paths = plot_report(runs, tmp_path / "figures")
    assert len(paths) == 10 and all(path.stat().st_size > 1000 for path in paths)
    assert len(drawn(monkeypatch, tmp_path, *runs[:1])) == 8  # no heat map, no single bar
    runs[0].columns["Unnormalised_Loss/Test"][-1] = math.nan
    some = drawn(monkeypatch, tmp_path, *runs[:3])  # one cell is infinite, one empty
    assert len(some) == 10
    save_figure(some["sensitivity.png"], tmp_path / "some.png")


def drawn(monkeypatch, tmp_path, *runs):
    """The figures of a report by their names; nothing is written."""
    figures = {}
    monkeypatch.setattr(
        one_pass_report, "save_figure", lambda figure, path: figures.update({path.name: figure})
    )
    plot_report(runs, tmp_path)
    return figures


def grid_run(every, terms, title="run", **config):
    settings = {"method": "look_back", "network_weight_steps": every, "look_back": terms}
    return recorded(title, **settings | config)


def test_the_heat_map_is_of_runs_that_differ_in_its_two_settings_alone(monkeypatch, tmp_path):
    runs = [grid_run(every, terms) for every in (5, 10) for terms in (1, 5)]
    again = grid_run(5, 1, seed=1)
    again.columns["Unnormalised_Loss/Test"][-1] = 1.5
    first = final_losses(runs[0].columns)
    together = np.median([*first, *final_losses(again.columns)])
    fixed = recorded(network_weight_steps=7, look_back=2)
    axes = drawn(monkeypatch, tmp_path, *runs, again, fixed)["sensitivity.png"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "10"]
    assert axes.texts[0].get_text() == f"{together:.3g}"
    exact = [grid_run(every, terms, method="unrolled") for every in (5, 10) for terms in (1, 5)]
    assert "sensitivity.png" in drawn(monkeypatch, tmp_path, *exact)
    assert len(drawn(monkeypatch, tmp_path, *runs, *exact)["sensitivity.png"].axes[0].texts) == 4
    other = grid_run(10, 5, hyperparameter_lr=0.1)
    assert "sensitivity.png" not in drawn(monkeypatch, tmp_path, *runs[:3], other)


def test_errors_of_hypergradients_have_a_panel_for_each_hyperparameter(monkeypatch, tmp_path):
    figures = {}
    monkeypatch.setattr(
        one_pass_report, "save_figure", lambda figure, path: figures.update({path.name: figure})
    )
    errors = {name: np.array([[1e-17, 0.5], [4.0, math.inf]]) for name in ("lr", "weight_decay")}
    plot_hypergradient_errors(errors, (1, 2), (1, 5), tmp_path / "errors.png")
    rate, decay, *_ = figures["errors.png"].axes
    assert [text.get_text() for text in rate.texts] == ["0", "0.5", "4", "inf"]
    assert rate.get_title("left") != decay.get_title("left")
    assert rate.images[0].get_array().count() == 2
    save_figure(figures["errors.png"], tmp_path / "errors.png")


def test_a_figure_chosen_on_validation_is_of_runs_with_validation_samples(monkeypatch, tmp_path):
    with_, without = recorded("with"), recorded("without", method="look_back")
    without.columns["Loss/Validation"][:] = math.nan
    figures = drawn(monkeypatch, tmp_path, with_, without)
    lines = figures["best_so_far.png"].axes[0].lines
    assert [line.get_label() for line in lines] == ["with"]
    assert figures["trajectories.png"].axes[1].get_ylabel() == "log10 of the last test loss"
    figures = drawn(monkeypatch, tmp_path, with_)
    assert figures["trajectories.png"].axes[1].get_ylabel() == "log10 of the last validation loss"
    assert "best_so_far.png" not in drawn(monkeypatch, tmp_path, without)


def test_figures_of_draws_that_all_diverged_or_have_no_weight_decay_draw_without_a_warning(
    tmp_path,
):
    run = recorded(draws=1)
    run.columns["Hyperparameter/Weight_Decay"][:] = 0
    run.columns["Hyperparameter/Lr"][:] = 100000000.00000018
    for name in ("Loss/Training", "Loss/Validation", "Loss/Test", "Unnormalised_Loss/Test"):
        run.columns[name][1:] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_report([run], tmp_path)
        run.columns["Unnormalised_Loss/Test"][:] = math.inf
        plot_report([run], tmp_path)


def test_trajectories_are_drawn_also_where_fixed_draws_span_no_surface(monkeypatch, tmp_path):
    varied, tuned = recorded("varied"), recorded("tuned", method="look_back")
    single, diverged = recorded("single"), recorded("diverged", method="look_back")
    for name in ("Lr", "Momentum"):
        single.columns[f"Hyperparameter/{name}"][:] = 0.1
    diverged.columns["Unnormalised_Loss/Test"][-1] = math.nan
    for runs in ([varied, tuned], [varied], [tuned], [single, tuned], [single], [diverged]):
        path = tmp_path / "trajectories.png"
        save_figure(drawn(monkeypatch, tmp_path, *runs)[path.name], path)
        assert path.stat().st_size > 1000
        path.unlink()


@pytest.mark.parametrize(("draws", "surface"), [(20, False), (150, True)])
def test_a_surface_is_interpolated_only_between_many_draws(monkeypatch, tmp_path, draws, surface):
    runs = recorded(draws=draws), recorded(method="look_back", seed=1)
    axes = drawn(monkeypatch, tmp_path, *runs)["trajectories.png"].axes[0]
    points = [shown for shown in axes.collections if isinstance(shown, PathCollection)]
    assert [len(shown.get_offsets()) for shown in points] == [draws, 6]
    assert any(isinstance(shown, ContourSet) for shown in axes.collections) == surface


def test_a_run_of_another_command_is_refused(tmp_path, capsys):
    with pytest.raises(RunLogError, match=r"no config\.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunLogError, match=r"holds no draws\.npz"):
        read_run(tmp_path)
    (tmp_path / "draws.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(RunLogError, match=r"draws\.npz is damaged"):
        plot.main(["one_pass", str(tmp_path), "--out", str(tmp_path / "out")])
    np.savez(tmp_path / "draws.npz", **{"step": np.zeros(1), "Loss/Test": np.zeros((1, 1))})
    with pytest.raises(RunLogError, match=r"it lacks dataset, method, .*seconds, Loss/Validation"):
        plot.main(["one_pass", str(tmp_path), "--out", str(tmp_path / "out")])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    directories = [tmp_path / "a" / "one", tmp_path / "b" / "one", tmp_path / "a" / "two"]
    for directory in directories:
        run = recorded()
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(run.config))
        np.savez(directory / "draws.npz", **run.columns)
    titles = [run.title for run in read_runs(directories)]
    assert titles == [str(directories[0]), str(directories[1]), "two"]
