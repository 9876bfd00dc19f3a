"""The real command, with a tiny budget: what it writes, how it resumes, what it refuses."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import interrupt_at_row, kill_at_row, outcome, redraw, refused, rows
from torch import nn

import learn_to_optimize
import plot
from comparison import optimizer_comparison
from comparison.optimizer_comparison import OptimizerComparison
from figures import optimizers
from figures.optimizers import plot_optimizer_run
from learned_optimizer import (
    CoordinateLSTM,
    CoordinateMLP,
    LearnedOptimizer,
    load_network,
    save_network,
)

NO_TRAINING = [
    "relu3", "--dataset", "mnist5k", "--hidden", "3", "--epochs", "0", "--test_runs", "2",
    "--test_steps", "3", "--tuning_runs", "1", "--threads", "1", "--quiet",
]  # fmt: skip
TINY = [
    *NO_TRAINING, "--epochs", "2", "--runs_per_epoch", "2", "--inner_steps", "6", "--unroll", "3",
    "--validation_runs", "1",
]  # fmt: skip


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    learn_to_optimize.main([*map(str, flags), "--no_figures"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags, complete."""
    out = tmp_path_factory.mktemp("plain") / "run"
    learn_to_optimize.main([*map(str, (*TINY, "--out", out))])
    return out


def test_a_run_leaves_its_files_and_an_optimizer_for_any_model(plain):
    assert [row["step"] for row in rows(plain)] == ["1", "2", "3", "4"]
    results = json.loads((plain / "results.json").read_text())
    compared = results["optimizees"]["relu3"]["optimizers"]
    assert {name.split()[0] for name in compared} == {"learned", "adam", "sgd", "lion"}
    assert "embedded" in results["data"] and results["best_epoch"] in (0, 1, 2)
    seen = [float(row["validation_loss"]) for row in rows(plain)]
    assert results["best_validation_loss"] <= np.nanmin(seen)
    with np.load(plain / "comparison.npz") as arrays:
        assert arrays["relu3/learned/losses"].shape == (2, 4)
    for name in (
        "relu3_loss",
        "relu3_curves",
        "relu3_norms",
        "relu3_rescale",
        "relu3_updates",
        "relu3_noise",
        "meta_training",
    ):
        assert (plain / "figures" / f"{name}.png").stat().st_size > 1000
    model = nn.Linear(4, 2)
    optimizer = LearnedOptimizer(model.parameters(), load_network(plain / "optimizer.json"))
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()


def test_figures_are_drawn_again_from_the_files_alone(plain, tmp_path):
    redraw(plain)
    plot.main(["losses", str(plain), "--out", str(tmp_path / "losses.png")])
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        run(*TINY, "--seed", seed, "--out", tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(plain) != outcome(tmp_path / "other")


@pytest.mark.parametrize(
    "flags",
    [
        ["--network", "mlp"],
        ["--raw_gradients"],
        ["--preprocess_factor", "3"],
        ["--extra_inputs", "time"],
        ["--out_mul", "0.5"],
        ["--lr", "0.1"],
        ["--decay", "cosine"],
        ["--log_loss"],
        ["--estimator", "pes"],
        ["--coordinates", "20"],
        ["--tasks", "2"],
        ["--unroll", "2"],
        ["--penalty", "10"],
        ["--random_start"],
        ["--penalty", "1", "--penalty_kinds", "norm"],
        ["--classes", "0", "1"],
        ["--resize", "14"],
        ["--batch_size", "64"],
        ["--compare", "sigmoid2"],
        ["--test_steps", "4"],
        ["--test_images", "50"],
        ["--test_every", "2"],
        ["--lion_shares", "0.1"],
        ["--dtype", "float64"],
    ],
    ids=" ".join,
)
def test_every_flag_changes_the_numbers_of_a_run(tmp_path, plain, flags):
    run(*TINY, *flags, "--out", tmp_path / "run")
    assert outcome(plain) != outcome(tmp_path / "run")


def test_a_saved_optimizer_is_compared_without_training_and_on_other_optimizees(tmp_path, plain):
    out = tmp_path / "run"
    run(*NO_TRAINING, "--start_from", plain, "--compare", "relu3", "quadratic",
        "--out", out)  # fmt: skip
    results = [json.loads((d / "results.json").read_text())["optimizees"] for d in (plain, out)]
    assert results[0]["relu3"] == results[1]["relu3"] and "quadratic" in results[1]
    assert (out / "optimizer.json").read_text() == (plain / "optimizer.json").read_text()


def test_the_architecture_is_that_of_the_saved_optimizer_and_a_resumed_run_keeps_its_start(
    tmp_path, capsys
):
    source, out = tmp_path / "optimizer.json", tmp_path / "run"
    flags = ["relu3", "--dataset", "mnist5k", "--threads", 1, "--epochs", 0, "--compare", "--quiet"]
    save_network(CoordinateMLP(4), source)
    run(*flags, "--start_from", source, "--out", out)
    before = (out / "optimizer.json").read_text()
    assert load_network(out / "optimizer.json").kind == "mlp"
    save_network(CoordinateMLP(5), source)
    run("--resume", out, "--quiet")
    assert (out / "optimizer.json").read_text() == before
    save_network(CoordinateMLP(5), out / "start.json")
    assert "start_found" in refused(capsys, learn_to_optimize.main, "--resume", out, "--quiet")


def test_a_diverging_optimizer_leaves_its_curves(tmp_path):
    run("quadratic", *NO_TRAINING[1:], "--out_mul", "1e30", "--out", tmp_path / "run")
    with np.load(tmp_path / "run" / "comparison.npz") as arrays:
        assert np.isinf(arrays["quadratic/learned/losses"]).any()
    plot_optimizer_run(tmp_path / "run")


def test_ctrl_c_in_a_comparison_leaves_the_curves_of_the_optimisers_that_were_done(
    tmp_path, monkeypatch
):
    out, tune = tmp_path / "run", OptimizerComparison.at_default_and_best_rate

    def interrupted(self, name, task, interrupt):
        interrupt.requested = name == "sgd"
        return tune(self, name, task, interrupt)

    monkeypatch.setattr(OptimizerComparison, "at_default_and_best_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*NO_TRAINING, "--out", out)
    found = json.loads((out / "results.json").read_text())["optimizees"]["relu3"]["optimizers"]
    assert {name.split()[0] for name in found} == {"learned", "adam"}
    with np.load(out / "comparison.npz") as arrays:
        assert {key.split("/")[1] for key in arrays if "/" in key} == set(found)


def test_a_sigmoids_directions_are_recorded_as_negative_controls(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(optimizers, "save_figure", lambda figure, path: drawn.append(path.name))
    run(*NO_TRAINING, "--compare", "sigmoid2", "--out", tmp_path / "run")
    with np.load(tmp_path / "run" / "comparison.npz") as arrays:
        labels = {key.split("/")[-1] for key in arrays if "/update/" in key}
    assert labels == {"rescale_control", "translation"}
    plot_optimizer_run(tmp_path / "run")
    assert "sigmoid2_rescale_control.png" in drawn


def test_another_factor_of_the_steps_may_be_given_to_a_saved_optimizer(tmp_path, plain):
    flags = [*NO_TRAINING, "--start_from", plain, "--out_mul", 0.5]
    run(*flags, "--out", tmp_path / "run")
    network = load_network(tmp_path / "run" / "optimizer.json")
    assert network.out_mul == 0.5
    for p, q in zip(
        network.parameters(), load_network(plain / "optimizer.json").parameters(), strict=True
    ):
        assert torch.equal(p, q)


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--epochs", "3"]
    run(*flags, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_at_row(3, "learn_to_optimize.py", *flags, "--out", killed)
    run("--resume", killed, "--quiet")
    assert outcome(killed) == outcome(tmp_path / "whole")


def test_ctrl_c_ends_a_run_cleanly_with_figures_and_the_optimizer_so_far(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--epochs", "5000", "--out", out]
    interrupt_at_row(4, learn_to_optimize.main, *flags)
    assert (out / "figures" / "meta_training.png").exists()
    assert load_network(out / "optimizer.json").kind == "lstm"
    results = json.loads((out / "results.json").read_text())
    assert math.isfinite(results["best_validation_loss"]) and "optimizees" not in results


def test_without_a_comparison_the_results_tell_what_meta_training_has_reached(tmp_path, capsys):
    run(*TINY, "--compare", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"data", "best_validation_loss", "best_epoch"}
    assert "compares nothing" in refused(capsys, plot.main, "losses", tmp_path / "run")


@pytest.mark.parametrize("steps", [2, 3])
def test_losses_are_said_at_the_last_step_and_of_long_trainings_at_the_published_one(
    tmp_path, capsys, monkeypatch, steps
):
    monkeypatch.setattr(learn_to_optimize, "PUBLISHED", 2)  # 200 steps take long
    monkeypatch.setattr(optimizer_comparison, "PUBLISHED", 2)
    flags = [flag for flag in NO_TRAINING if flag != "--quiet"]
    run(*flags, "--test_steps", steps, "--test_runs", 1, "--out", tmp_path / "run")
    shown = capsys.readouterr().out
    assert f"at step {'2 and 3' if steps > 2 else '2'}, mean" in shown
    line = next(line for line in shown.splitlines() if line.startswith("  learned"))
    assert line.count("+-") == (2 if steps > 2 else 1)


@pytest.mark.parametrize("rates, told", [(("0.1",), False), (("0.1", "0.03"), True)])
def test_two_rates_of_an_optimiser_are_told_apart(rates, told):
    said, summary = [], {"loss": 0.5, "deviation": 0.1}
    summaries = dict.fromkeys(("learned", *(f"sgd {r}" for r in rates), "sgd-lion 0.5"), summary)
    args, log = SimpleNamespace(test_steps=50, test_runs=3), SimpleNamespace(say=said.append)
    learn_to_optimize.say_losses("relu20", summaries, args, log)
    assert ("the first is its default, the other the best tried" in said[0]) == told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gru20"], "gru20"),
        (["relu3", "--compare", "nothing"], "nothing"),
        (["--compare", "relu3", "relu4"], "before it, as in relu3 --compare relu3 relu4"),
        (["relu3", "--unroll", "0"], "at least 1"),
        (["relu3", "--estimator", "guess"], "guess"),
        (["relu3", "--network", "mlp", "--raw_gradients"], "lstm"),
        (["relu3", "--estimator", "autograd", "--coordinates", "5"], "suffix_sum"),
        (["relu3", "--batch_size", "5000"], "2000"),
        (["relu3", "--start_from", "nowhere"], "nowhere"),
        (["relu3", "--network", "mlp", "--extra_inputs", "time"], "lstm"),
        (["sigmoid3", "--penalty", "1"], "no rescale symmetry; it has translation"),
        (["relu3", "--penalty", "1", "--penalty_kinds", "scale"], "no scale symmetry"),
        (["quadratic", "--penalty", "1", "--estimator", "pes"], "it has none"),
        (["relu3", "--raw_gradients", "--preprocess_factor", "3"], "without --raw_gradients"),
        (["relu3", "--sigma", "0.1"], "--estimator es or pes"),
        (["relu3", "--penalty_relative"], "--penalty"),
        (["relu3", "--norm_eps", "0.1"], "relu20bn"),
        (["relu3", "--classes", "3", "10"], "no class 10: they are from 0 to 9"),
        (["relu3", "--running_statistics"], "with batch norm, such as relu20bn"),
        (["relu3", "--grey"], "--dataset cifar10"),
        (["lenet"], "resize them"),
        (["relu3", "--test_every", "0", "--test_images", "9"], "--test_every of at least 1"),
        (["relu3", "--lion_shares", "1.5"], "from 0 to 1"),
        (["relu3", "--epochs", "0", "--unroll", "5"], "--epochs of at least 1"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_no_directory(
    capsys, tmp_path, flags, message
):
    out = tmp_path / "run"
    flags = [*flags, "--dataset", "mnist5k", "--quiet", "--out", out]
    assert message in refused(capsys, learn_to_optimize.main, *flags)
    assert not out.exists()


def test_an_optimizer_of_another_architecture_is_refused(capsys, tmp_path):
    path = tmp_path / "optimizer.json"
    save_network(CoordinateLSTM(3), path)
    for flags in (["--network", "mlp"], ["--hidden", 4]):
        line = refused(
            capsys, learn_to_optimize.main, "relu3", "--dataset", "mnist5k", "--start_from", path,
            *flags,
        )  # fmt: skip
        assert "another architecture" in line
    path.write_text(path.read_text().replace('"hidden": 3', '"hidden": 4'))
    line = refused(
        capsys, learn_to_optimize.main, "relu3", "--dataset", "mnist5k", "--start_from", path
    )
    assert "another architecture" in line


def test_resuming_with_other_flags_is_refused(capsys, plain):
    line = refused(capsys, learn_to_optimize.main, "--resume", plain, "--unroll", "5", "--quiet")
    assert "unroll" in line


@pytest.mark.slow
def test_half_an_hours_training_beats_adam_at_its_default_rate(tmp_path):
    run("sigmoid20", "--epochs", 15, "--coordinates", 3000, "--log_loss", "--lr", 0.005, "--decay",
        "cosine", "--threads", 1, "--quiet", "--data-dir", tmp_path / "data",
        "--out", tmp_path / "run")  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    losses = {k: v["loss"] for k, v in results["optimizees"]["sigmoid20"]["optimizers"].items()}
    assert losses["learned"] < losses["adam 0.03"]
