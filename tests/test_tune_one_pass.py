"""The command: what it leaves behind, resumed runs, wrong input, configurations."""

from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, interrupt_at_row, kill_at_row, outcome, redraw, refused

import tune_one_pass
from command_line import parse
from one_pass_report import read_run
from run_log import read_config, read_json
from yaml_settings import complete, read_settings

CONFIGS = ROOT / "configs"
SMALL = (
    "--threads", "1", "--quiet", "--dtype", "float64",
    "--total_step_limit", "60", "--log_every", "20",
)  # fmt: skip
ALGORITHMS = (
    "random", "random_validation", "random_stepped_lr", "lorraine", "baydin", "ours_lr",
    "ours_lr_momentum", "ours_hdlr_momentum", "ours_guarded", "diff_through_opt", "population",
)  # fmt: skip


def config(*names):
    return ["-c", *(str(CONFIGS / f"{name}.yaml") for name in names)]


def run(*flags):
    """The command without its figures, which take longer than all the rest."""
    tune_one_pass.main([*map(str, flags), "--no_figures"])


def tune(tmp_path, *flags, out="run"):
    where = tmp_path / out
    run(*flags, *SMALL, "--out", where, "--data-dir", tmp_path)
    return where


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_read(path):
    assert read_settings(path, tune_one_pass.KEYS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_and_leaves_every_draws_numbers(tmp_path, algorithm):
    every = ["--network_weight_steps", 20] if algorithm == "population" else []
    run = tune(tmp_path, *config("boston", algorithm), "--draws", 5, *every)
    columns = read_run(run).columns
    assert columns["step"].tolist() == [0, 20, 40, 60]
    for name in ("Loss/Training", "Unnormalised_Loss/Test", "Hyperparameter/Lr"):
        assert columns[name].shape == (4, 5)
    fixed = algorithm in ("random", "random_validation")
    assert np.array_equal(columns["Hyperparameter/Lr"][0], columns["Hyperparameter/Lr"][-1]) == (
        fixed or algorithm == "lorraine"
    )
    results = read_json(run / "results.json")
    assert results["draws"] == 5 and results["median"] > 0
    assert list((run / "tensorboard").glob("*")) or list(run.glob("events*"))


def test_a_draw_is_the_same_alone_and_among_others(tmp_path):
    together = tune(tmp_path, *config("boston", "ours_lr_momentum"), "--draws", 4, out="all")
    alone = tune(tmp_path, *config("boston", "ours_lr_momentum"), "--first_draw", 2, out="one")
    for name, values in read_run(together).columns.items():
        if values.ndim == 2:
            expected = read_run(alone).columns[name][:, 0]
            assert np.allclose(values[:, 2], expected, rtol=1e-9, equal_nan=True), name


@pytest.mark.parametrize("algorithm", ["ours_hdlr_momentum", "diff_through_opt", "baydin"])
def test_a_killed_run_ends_with_the_same_numbers(tmp_path, algorithm):
    files = [tmp_path / "problem.yaml", CONFIGS / f"{algorithm}.yaml"]
    flags = ["-c", *files, "--data-dir", tmp_path, "--draws", 2, *SMALL]
    (tmp_path / "problem.yaml").write_text(
        "dataset: mnist5k\nvalidation_proportion: 0.25\nbatch_size: 50\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*flags, "--out", whole)
    kill_at_row(3, killed, "tune_one_pass.py", *flags, "--out", killed)
    run("--resume", killed, "--quiet")
    assert outcome(whole) == outcome(killed)


def test_an_interrupted_run_leaves_every_figure_and_they_are_drawn_again(tmp_path):
    out = tmp_path / "run"
    flags = [*config("boston", "ours_lr"), "--draws", 3, "--threads", 1, "--quiet"]
    flags += ["--hyperparameter_steps", 10**7, "--log_every", 50, "--data-dir", tmp_path]
    interrupt_at_row(2, out, "tune_one_pass.py", *flags, "--out", out)
    assert len(list((out / "figures").glob("*.png"))) == 9
    assert read_json(out / "results.json")["draws"] == 3
    redraw(out)


def test_flags_win_over_files_and_are_saved(tmp_path):
    run = tune(tmp_path, *config("boston", "ours_lr"), "--look_back", 3, "--lr", 0.01)
    saved = read_config(run)
    assert saved["look_back"] == 3 and saved["optimised_hyperparameters"] == ["weight_decay", "lr"]
    assert read_run(run).columns["Hyperparameter/Lr"][0, 0] == pytest.approx(0.01)


def test_a_saved_state_is_gone_on_from(tmp_path):
    state = tmp_path / "state.pt"
    first = tune(tmp_path, *config("boston", "ours_lr"), "-S", state, out="first")
    second = tune(tmp_path, *config("boston", "ours_lr"), "-s", state, out="second")
    ended, started = (
        read_run(run).columns["Loss/Training"][row] for run, row in ((first, -1), (second, 0))
    )
    assert np.array_equal(ended, started)


def test_root_group_and_name_make_the_directory(tmp_path):
    run(
        *config("boston", "random"), *SMALL, "-l", tmp_path, "-g", "some", "-n", "one",
        "--data-dir", tmp_path,
    )  # fmt: skip
    assert (tmp_path / "some" / "one" / "draws.npz").exists()
    tune_one_pass.main([
        *config("boston", "random"), *SMALL, "-l", str(tmp_path), "-g", "other",
        "--data-dir", str(tmp_path),
    ])  # fmt: skip
    (by_time,) = (tmp_path / "other").iterdir()
    assert by_time.name.startswith("tune_one_pass-") and (by_time / "draws.npz").exists()


def test_a_bound_is_taken_away_by_null(tmp_path):
    flags = ("--hyperparameter_clipping", "{lr: null}")
    parser = tune_one_pass.make_parser()
    args = parse(parser, [*config("boston", "ours_lr"), *flags])
    complete(args, tune_one_pass.KEYS)
    tune_one_pass.fill_in(args)
    assert tune_one_pass.make_settings(args).bounds == {}


def test_a_run_goes_on_without_the_state_that_it_began_with(tmp_path):
    state = tmp_path / "state.pt"
    tune(tmp_path, *config("boston", "ours_lr"), "-S", state, out="first")
    run = tune(tmp_path, *config("boston", "ours_lr"), "-s", state, out="second")
    state.unlink()
    tune_one_pass.main(["--resume", str(run), "--quiet"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "look_back"], "needs optimised_hyperparameters"),
        (["--method", "look_back", "--optimised_hyperparameters", "lr"], "validation_proportion"),
        (
            ["--method", "successive_gradients", "--optimised_hyperparameters", "momentum"],
            "tunes lr, nothing else",
        ),
        (["--hyperparameter_clipping", "{rate: [0, 1]}"], "not 'rate'"),
        (["--transformed_hyperparameters", "{lr: log}"], "not 'log'"),
        (["--batch_size", "5000"], "batch_size 5000: there are 455 samples"),
        (["--model", "lstm"], "model lstm is not for boston"),
        (["--draws", "0"], "--draws"),
        (["--method", "stepped_lr", "--total_step_limit", "9"], "ends before the first"),
        (["--optimised_hyperparameters", "rate"], "invalid choice: 'rate'"),
        (["-s", "none.pt"], "none.pt is not a saved state"),
        (["-c", "none.yaml"], "can't read none.yaml"),
        (["-S", "none/state.pt"], "there is no such folder"),
        (["-g", "group"], "leave out -l, -g and -n"),
        (["--network_weight_grad_clipping", "{nrom: 1}"], "knows norm, not 'nrom'"),
        (["--network_weight_grad_clipping", "{norm: x}"], "a number above 0, not 'x'"),
        (["--hyperparameter_clipping", "{lr: 3}"], "two raw values such as [-10, 0]"),
        (["--hyperparameter_clipping", "{lr: [1]}"], "two raw values such as [-10, 0]"),
        (["--hyperparameter_clipping", "{lr: [a, b]}"], "two raw values such as [-10, 0]"),
        (["--hyperparameter_clipping", "{lr: [0, -1]}"], "two raw values such as [-10, 0]"),
        (
            ["-c", CONFIGS / "population.yaml", "--validation_proportion", "0.2", "--draws", "4"],
            "a population needs --draws 5 or more",
        ),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, flags, message):
    flags = ["--dataset", "boston", *flags, "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert message in refused(capsys, tune_one_pass.main, *flags)


def test_a_state_of_other_draws_is_refused(capsys, tmp_path):
    state = tmp_path / "state.pt"
    tune(tmp_path, *config("boston", "random"), "-S", state)
    flags = [*config("boston", "random"), "--draws", 2, "-s", state, "--data-dir", tmp_path]
    assert "this run has [2, 751]" in refused(capsys, tune_one_pass.main, *flags)


def test_the_directory_of_configurations_has_every_algorithm_and_problem():
    assert {f"{name}.yaml" for name in (*ALGORITHMS, "energy", "fashion")} <= {
        path.name for path in Path(CONFIGS).iterdir()
    }
