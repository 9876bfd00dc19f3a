"""The command: what it leaves behind, resumed runs, wrong input, configurations."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import (
    ROOT,
    as_begun_before,
    interrupt_at_row,
    kill_at_row,
    outcome,
    redraw,
    refused,
    rows,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tune_one_pass
from comparison.one_pass_problems import Network
from experiment.run_reader import read_config, read_json
from experiment.yaml_settings import read_settings
from figures.one_pass_report import read_run

CONFIGS = ROOT / "configs"
SMALL = (
    "--threads", "1", "--quiet", "--dtype", "float64",
    "--total_step_limit", "60", "--log_every", "20",
)  # fmt: skip
ALGORITHMS = (
    "random", "random_validation", "random_stepped_lr", "lorraine", "baydin", "baydin_published",
    "ours_lr",
    "ours_lr_momentum", "ours_hdlr_momentum", "ours_guarded", "diff_through_opt", "population",
)  # fmt: skip


TUNED = ("--dataset", "boston", "--validation_proportion", "0.2")
OURS = (*TUNED, "--method", "look_back", "--optimised_hyperparameters", "lr", "momentum")


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


def filled_in(*flags):
    args, _ = tune_one_pass.parse_all([*map(str, flags)])
    tune_one_pass.fill_in(args)
    return args


def test_every_problem_goes_with_every_algorithm():
    paths = sorted(CONFIGS.glob("*.yaml"))
    problems = [path for path in paths if "dataset:" in path.read_text()]
    algorithms = [path for path in paths if path not in problems]
    assert len(problems) == 14 and len(algorithms) == 16
    for problem in problems:
        for algorithm in algorithms:
            args = filled_in("-c", problem, algorithm, "--draws", 5)
            assert args.steps >= args.network_weight_steps


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
    kill_at_row(3, "tune_one_pass.py", *flags, "--out", killed)
    run("--resume", killed, "--quiet")
    assert outcome(whole) == outcome(killed)


def test_an_interrupted_run_leaves_every_figure_and_they_are_drawn_again(tmp_path):
    out = tmp_path / "run"
    flags = [*config("boston", "ours_lr"), "--draws", 3, "--threads", 1, "--quiet"]
    flags += ["--hyperparameter_steps", 10**7, "--log_every", 50, "--data-dir", tmp_path]
    interrupt_at_row(2, tune_one_pass.main, *flags, "--out", out)
    assert len(list((out / "figures").glob("*.png"))) == 8
    assert read_json(out / "results.json")["draws"] == 3
    redraw(out)


def test_flags_win_over_files_and_are_saved(tmp_path):
    run = tune(tmp_path, *config("boston", "ours_lr"), "--look_back", 3, "--lr", 0.01)
    saved = read_config(run)
    assert saved["look_back"] == 3 and saved["optimised_hyperparameters"] == ["weight_decay", "lr"]
    assert read_run(run).columns["Hyperparameter/Lr"][0, 0] == pytest.approx(0.01)


def test_records_of_some_samples_leave_the_training_as_it_is(tmp_path, capsys):
    flags = [*config("boston", "ours_lr"), "--draws", 2, "--threads", 1, "--dtype", "float64"]
    flags += ["--total_step_limit", 20, "--data-dir", tmp_path]
    run(*flags, "--out", tmp_path / "all", "-S", tmp_path / "state.pt")
    run(*flags, "--out", tmp_path / "some", "--record_samples", 10)
    args, _ = tune_one_pass.parse_all([*map(str, flags)])
    tune_one_pass.fill_in(args)
    problem = tune_one_pass.make_problem(
        "boston", Network("mlp"), 0.2, args.split, tmp_path, torch.float64, torch.device("cpu")
    )
    weights = torch.load(tmp_path / "state.pt")["state"]["weights"]
    every, some = (read_run(tmp_path / name).columns for name in ("all", "some"))
    assert np.array_equal(every["Hyperparameter/Lr"], some["Hyperparameter/Lr"])
    for name in ("training", "validation", "test"):
        inputs, targets = (values[:10] for values in getattr(problem, name))
        expected = problem.objective.evaluate(weights, {}, inputs, targets).loss
        assert some[f"Loss/{name.title()}"][-1] == pytest.approx(expected.numpy(), rel=1e-12)
    said = capsys.readouterr().out
    assert "squared units of the target), 10 of " in said.splitlines()[-1]


def test_a_run_from_before_records_of_some_samples_goes_on(tmp_path):
    out = tune(tmp_path, *config("boston", "ours_lr"))
    before = read_run(out).columns["Loss/Test"]
    as_begun_before(out, "record_samples")
    run("--resume", out, "--quiet")
    assert np.array_equal(read_run(out).columns["Loss/Test"], before)


def test_of_a_text_the_last_perplexity_of_some_windows_is_told(tmp_path, capsys):
    (tmp_path / "ptb").mkdir()
    for part in ("train", "valid", "test"):
        words = " ".join(f"w{number * 7 % 30}" for number in range(9000))
        (tmp_path / "ptb" / f"ptb.{part}.txt").write_text(words)
    flags = ["--dataset", "ptb", "--hidden_sizes", 2, "--total_step_limit", 2, "--threads", 1]
    run(*flags, "--record_samples", 1, "--out", tmp_path / "run", "--data-dir", tmp_path)
    last = read_run(tmp_path / "run").columns["Loss/Test"][-1, 0]
    told = f"final test perplexity, 1 of 3 windows: median {math.exp(last):.4g}, "
    assert told in capsys.readouterr().out


def test_a_saved_state_is_gone_on_from(tmp_path):
    state = tmp_path / "state.pt"
    first = tune(tmp_path, *config("boston", "ours_lr"), "-S", state, out="first")
    second = tune(tmp_path, *config("boston", "ours_lr"), "-s", state, out="second")
    ended, started = (
        read_run(run).columns["Loss/Training"][row] for run, row in ((first, -1), (second, 0))
    )
    assert np.array_equal(ended, started)


def test_a_resumed_run_writes_its_state_outside_only_where_that_is_asked_for_again(
    tmp_path, capsys
):
    state, victim = tmp_path / "state.pt", tmp_path / "victim"
    run_of_another = tune(tmp_path, *config("boston", "random"), "-S", state)
    victim.write_text("precious")
    text = (run_of_another / "config.json").read_text()
    (run_of_another / "config.json").write_text(text.replace(str(state), str(victim)))
    again = ("--resume", run_of_another, "--quiet")
    line = refused(capsys, tune_one_pass.main, *again)
    assert "--save_state" in line and "give that again" in line
    assert victim.read_text() == "precious"
    state.unlink()
    run(*again, "-S", state)
    assert state.exists() and victim.read_text() == "precious"
    within = run_of_another / "state.pt"
    (run_of_another / "config.json").write_text(text.replace(str(state), str(within)))
    run(*again)
    assert within.exists()


def test_root_group_and_name_make_the_directory(tmp_path):
    run(
        *config("boston", "random"), *SMALL, "-l", tmp_path, "-g", "some", "-n", "one",
        "--data-dir", tmp_path,
    )  # fmt: skip
    assert (tmp_path / "some" / "one" / "draws.npz").exists()
    tune_one_pass.main([
        *config("boston", "random"), *SMALL, "-l", str(tmp_path), "-g", "other",
        "--data-dir", str(tmp_path), "--no_figures",
    ])  # fmt: skip
    (by_time,) = (tmp_path / "other").iterdir()
    assert by_time.name.startswith("tune_one_pass-") and (by_time / "draws.npz").exists()


def test_of_a_rate_for_every_weight_the_tenths_are_recorded(tmp_path):
    weights = torch.arange(11.0).repeat(2, 1) * torch.tensor([[1.0], [10.0]])
    assert tune_one_pass.deciles(weights).tolist() == [[1, 10], [9, 90]]
    flags = ("--first_draw", 3, "--hyperparameter_lr", 0.3)
    columns = read_run(tune(tmp_path, *config("boston", "ours_hdlr_momentum"), *flags)).columns
    low, mean, high = (columns[f"Hyperparameter/Lr{n}"] for n in ("_10_Percent", "", "_90_Percent"))
    assert (
        np.allclose(low[0], high[0]) and (low[-1] < mean[-1]).all() and (mean[-1] < high[-1]).all()
    )


def test_tensorboard_shows_the_distribution_of_a_rate_for_every_weight(tmp_path):
    run = tune(tmp_path, *config("boston", "ours_hdlr_momentum"), "--draws", 2, out="each")
    events = EventAccumulator(str(run), {"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["Raw_Hyperparameter/Lr"]
    first, *_, last = (e.histogram_value for e in events.Histograms("Raw_Hyperparameter/Lr"))
    weights = 50 * (13 + 1) + 51
    rates = read_run(run).columns["Hyperparameter/Lr"]  # geometric means, of two draws
    assert first.num == last.num == 2 * weights and sum(last.bucket) == last.num
    assert last.sum == pytest.approx(weights * np.log10(rates[-1]).sum(), rel=1e-5)
    one_for_all = tune(tmp_path, *config("boston", "ours_lr"), out="one")
    assert EventAccumulator(str(one_for_all)).Reload().Tags()["histograms"] == []


def test_the_factor_of_a_stepped_rate_may_be_given(tmp_path):
    tuning = built(tmp_path, *config("boston", "random_stepped_lr"), "--lr_multiplier", 0.5)
    assert (tuning.state.factor == 0.5).all()


def test_a_bound_is_taken_away_by_null(tmp_path):
    flags = ("--hyperparameter_clipping", "{lr: null}")
    args = filled_in(*config("boston", "ours_lr"), *flags)
    assert tune_one_pass.make_settings(args).bounds == {}


def test_a_run_goes_on_without_the_state_that_it_began_with(tmp_path):
    state = tmp_path / "state.pt"
    tune(tmp_path, *config("boston", "ours_lr"), "-S", state, out="first")
    run = tune(tmp_path, *config("boston", "ours_lr"), "-s", state, out="second")
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    assert read_config(run)["state_found"] == f"sha256 {digest[:16]}"
    state.unlink()
    tune_one_pass.main(["--resume", str(run), "--quiet", "--no_figures"])
    (run / "checkpoint.pt").unlink()  # then it goes on from the checkpoint before the last
    tune_one_pass.main(["--resume", str(run), "--quiet", "--no_figures"])


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
        (["--batch_size", "5000"], "batch_size 5000: there are 455 training samples"),
        (["--model", "lstm"], "model lstm is not for boston"),
        (["--draws", "0"], "--draws"),
        (["--method", "stepped_lr", "--total_step_limit", "9"], "ends before the first"),
        (["--optimised_hyperparameters", "rate"], "invalid choice: 'rate'"),
        (["-s", "none.pt"], "none.pt is not a saved state"),
        (["-c", "none.yaml"], "can't read none.yaml"),
        (["-S", "none/state.pt"], "there is no such folder"),
        (["-S", "."], "-S . is a folder"),
        (["--transformed_hyperparameters", "{lr: [1]}"], "exp, sigmoid, not [1]"),
        (["--validation_proportion", "1"], "validation_proportion 1 leaves no training samples"),
        ([*OURS, "--validation_proportion", "0.0001"], "leaves no validation samples"),
        (
            [*config("boston", "diff_through_opt"), "--look_back", "11"],
            "look_back 11 is more than the 10 weight steps",
        ),
        ([*config("boston", "baydin"), "--network_weight_steps", "10"], "weight_steps 1, not 10"),
        (["--momentum", "1"], "below 1, not '1'"),
        ([*OURS, "--momentum", "0"], "momentum begins with the raw value -inf under sigmoid"),
        (
            ["--lr", "2", "--transformed_hyperparameters", "{lr: sigmoid}"],
            "lr begins with the raw value nan under sigmoid: it can't be used",
        ),
        (
            ["--dataset", "mnist5k", "--model", "mlp_batch_norm", "--batch_size", "1"],
            "needs batches of at least 2",
        ),
        (["--model", "resnet18", "--dataset", "two_weights"], "model resnet18 is not for two_w"),
        (["--optimised_hyperparameters", "lr"], "needs a method out of look_back"),
        (["--look_back", "3"], "look_back needs method look_back or unrolled"),
        (["--recover", "true"], "recover needs a method out of"),
        (["--chain_rule", "false"], "chain_rule needs a method out of"),
        (["--final_hyperparameter_lr", "0.3"], "final_hyperparameter_lr needs a method out of"),
        (["--reset_model_after_hyperparameter_update", "true"], "needs a method other than fixed"),
        ([*OURS, "--high_dimensional_hyperparameters", "weight_decay"], "is not among those"),
        (["--dataset", "ptb", "--batch_size", "3"], "batch_size needs a dataset other than ptb"),
        (["--dataset", "ptb", "--split", "3"], "split needs a dataset other than ptb"),
        (["--dataset", "quadratic", "--validation_proportion", "1"], "needs a dataset other than"),
        (["--renew_model_reset_state_interval", "2"], "needs reset_model_after_hyper"),
        (["--lr_multiplier", "0.9"], "lr_multiplier needs method stepped_lr"),
        (["--standardise", "channels"], "standardise needs a dataset out of mnist"),
        (["--split", "none.txt"], "can't read the rows' order in none.txt"),
        (
            ["--dataset", "two_weights", "--hidden_sizes", "3"],
            "hidden_sizes needs a model out of mlp, mlp_batch_norm, lstm",
        ),
        (
            ["--dataset", "two_weights", "--activation", "Tanh"],
            "activation needs a model out of mlp, mlp_batch_norm",
        ),
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


def test_a_state_of_other_runs_is_refused(capsys, tmp_path):
    state = tmp_path / "state.pt"
    tune(tmp_path, *config("boston", "ours_hdlr_momentum"), "-S", state)
    other = ("--transformed_hyperparameters", "{lr: exp}")
    for algorithm, flags, message in (
        ("ours_hdlr_momentum", ("--draws", 2), "holds weights [1, 751] float64, this run has [2,"),
        ("ours_hdlr_momentum", (), "holds weights [1, 751] float64, this run has [1, 751] float32"),
        ("ours_lr", ("--dtype", "float64"), "holds raw lr [1, 751] float64, this run has [1, 1] f"),
        ("ours_hdlr_momentum", ("--dtype", "float64", *other), "holds raw values of {'lr': '10^'"),
    ):
        arguments = [*config("boston", algorithm), *flags, "-s", state, "--data-dir", tmp_path]
        assert message in refused(capsys, tune_one_pass.main, *arguments)


def built(tmp_path, *flags):
    """The runs, before their first step."""
    args = filled_in(*flags, "--dtype", "float64", "--data-dir", tmp_path)
    device, dtype = torch.device("cpu"), torch.float64
    problem = tune_one_pass.make_problem(
        args.dataset, tune_one_pass.Network(args.model), args.validation_proportion, args.split,
        args.data_dir, dtype, device,
    )  # fmt: skip
    return tune_one_pass.make_tuning(args, problem, device, dtype)


def test_a_run_from_a_state_begins_its_schedule_anew_and_keeps_what_adam_knows(tmp_path):
    guarded = config("boston", "ours_guarded")
    tune(tmp_path, *guarded, "-S", tmp_path / "guarded.pt", out="guarded")
    tune(tmp_path, *config("boston", "lorraine"), "-S", tmp_path / "decay.pt", out="decay")
    on = built(tmp_path, *guarded, "-s", tmp_path / "guarded.pt")
    assert on.state.updates.item() == 6 and on._hyperparameter_lr().item() == pytest.approx(0.1)
    assert all(moment.any() for moment in on.state.moments["lr"])
    assert on.state.step == 0 and on.state.sound_loss is None
    assert torch.equal(on.state.start[0], on.state.weights)
    assert torch.equal(on.state.good[0], on.state.weights)
    less = built(tmp_path, *config("boston", "lorraine"), "-s", tmp_path / "guarded.pt")
    assert list(less.state.moments) == ["weight_decay"] and less.state.updates.item() == 6
    more = built(tmp_path, *guarded, "-s", tmp_path / "decay.pt")
    assert more.state.updates.item() == 0, "of Adam's moments none, where some are missing"
    assert not any(moment.any() for pair in more.state.moments.values() for moment in pair)


def test_a_runs_configuration_starts_it_again(tmp_path):
    flags = ("--seed", 3, "--draws", 2, "--lr", "1e-5", "-S", tmp_path / "state.pt", "-n", "first")
    run(*config("boston", "ours_lr"), *flags, *SMALL, "-l", tmp_path, "--data-dir", tmp_path)
    out = tmp_path / "again"
    run("-c", tmp_path / "first" / "config.json", "--out", out, "--quiet")
    assert rows(tmp_path / "first") == rows(out)
    assert read_config(out)["seed"] == 3 and read_config(out)["dtype"] == "float64"


def test_batches_are_whole_where_few_samples_are_held_out_and_none_where_none_are_taken(tmp_path):
    flags = ("--batch_size", 60, "--validation_proportion", 0.1)
    tuned, fixed = built(tmp_path, *OURS, *flags), built(tmp_path, *TUNED, *flags)
    assert tuned.validation.next().inputs.shape == (46, 13)
    assert tuned.training.next().inputs.shape == (1, 60, 13)
    assert fixed.validation is None


def test_a_loss_that_is_not_a_number_is_infinite_and_one_that_is_not_there_is_nan(tmp_path):
    flags = ("--dataset", "boston", "--lr", 1e9, "--momentum", 0.5, "--weight_decay", 0)
    out = tune(tmp_path, *flags)
    columns = read_run(out).columns
    assert columns["Loss/Training"][-1] == np.inf and np.isnan(columns["Loss/Validation"]).all()
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["loss_test"] is results["median"] is None and "loss_validation" not in results
    assert (columns["Hyperparameter/Weight_Decay"] == 0).all()


def test_compiling_takes_no_batch_from_a_run(tmp_path):
    tuning = built(tmp_path, *OURS, "--batch_size", 50)
    before = tuning.training.state_dict()
    tune_one_pass.compile_loops(tuning)
    after = tuning.training.state_dict()
    assert after["position"] == before["position"] and torch.equal(
        after["orders"], before["orders"]
    )
    assert torch.equal(after["generators"], before["generators"])


def test_the_directory_of_configurations_has_every_algorithm_and_problem():
    assert {f"{name}.yaml" for name in (*ALGORITHMS, "energy", "fashion")} <= {
        path.name for path in Path(CONFIGS).iterdir()
    }
