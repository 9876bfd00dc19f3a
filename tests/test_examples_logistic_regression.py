"""The real command, small; its problem and its exact hypergradient against slow formulations."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import kill_at_row, redraw

from experiment.command_line import run_command
from hypergradients import reverse_unroll

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "logistic_regression.py"
TINY = ["--threads", "1", "--quiet"]


def load_script():
    """The script as a module; its name is that of another module of the project."""
    spec = importlib.util.spec_from_file_location("example_of_logistic_regression", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


example = load_script()


@pytest.fixture
def few_curves(monkeypatch):
    """Errors of two k only, and not of forward mode where it has many directions."""
    monkeypatch.setattr(example, "CURVE", (2, 3))
    monkeypatch.setattr(example, "FORWARD_STEPS", 100)


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    example.main([*map(str, flags)])


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def small_problem():
    """The synthetic problem with its first 60 points and 5 features."""
    whole = example.synthetic_problem(1, 0.1)
    inputs = (whole.inputs[:60, :5], whole.targets[:60])
    validation = (whole.validation_inputs[:40, :5], whole.validation_targets[:40])
    return example.Problem(*inputs, *validation, torch.zeros(5, dtype=torch.float64), 0.5)


def test_the_default_run_has_the_published_validation_losses(tmp_path, capsys, few_curves):
    out = tmp_path / "run"
    run_with_figures("--threads", 1, "--outer_steps", 31, "--out", out)
    table = json.loads((out / "results.json").read_text())["table"]
    published = [0.5744, 0.5338, 0.3615, 0.3225]
    assert [row["step"] for row in table] == list(range(0, 31, 10))
    assert [round(row["validation_loss"], 4) for row in table] == published
    assert [row["published_loss"] for row in table] == published
    assert "published" in capsys.readouterr().out
    for name in ("errors", "loss"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000
    redraw(out)


def test_the_synthetic_points_are_those_of_numpys_global_generator():
    np.random.seed(1)
    w, x = np.random.randn(20), np.random.randn(1000, 20)
    labels = x @ w + 0.1 * np.random.randn(1000) > 0
    order = np.random.permutation(1000)  # the validation set comes first in scikit-learn's split
    problem = example.synthetic_problem(1, 0.1)
    assert np.array_equal(problem.validation_inputs.numpy(), x[order[:500]])
    assert np.array_equal(problem.inputs.numpy(), x[order[500:]])
    assert np.array_equal(problem.targets.numpy() > 0.5, labels[order[500:]])


def test_the_solution_and_the_hypergradient_agree_with_differences_of_long_descents():
    problem = small_problem()
    l2 = torch.ones(5, dtype=torch.float64)

    def descended(l2):
        return example.advance([problem.start], [l2.requires_grad_()], [problem.step()] * 60)

    solution = problem.solution(l2)
    assert torch.allclose(descended(l2.clone())[0], solution, atol=1e-12)
    exact, width = problem.hypergradient(solution, l2), 1e-5
    for i in range(5):
        losses = []
        for sign in (1, -1):
            moved = l2.clone()
            moved[i] += sign * width
            losses.append(problem.outer_loss(descended(moved), None))
        assert float(losses[0] - losses[1]) / (2 * width) == pytest.approx(
            float(exact[i]), rel=1e-6
        )


@pytest.mark.parametrize("name", example.METHODS)
def test_every_method_gets_to_the_exact_hypergradient(name):
    problem = small_problem()
    hparams = problem.all_ones()
    l2 = hparams[0].detach()
    exact = problem.hypergradient(problem.solution(l2), l2)
    found = example.METHODS[name](problem, hparams, 60, 50)[0]
    assert torch.allclose(found, exact, rtol=1e-8, atol=1e-11)


def test_methods_that_follow_all_steps_agree_with_unrolling():
    problem = small_problem()
    hparams = problem.all_ones()
    params, step = [problem.start], problem.step()
    for _ in range(7):
        params = step(params, hparams)
    unrolled = reverse_unroll(params, hparams, problem.outer_loss)[0]
    for method in example.ALL_STEPS.values():
        assert torch.allclose(method(problem, hparams, 7, 1)[0], unrolled, rtol=1e-12)


def test_errors_fall_as_theory_says(tmp_path):
    problem = example.synthetic_problem(1, 0.1)
    rates = example.theoretical_rates(problem)
    ks = (1, 2, 4, 12)
    with (
        example.RunLog.create(tmp_path / "run", {}, quiet=True) as log,
        log.progress(1) as progress,
    ):
        curves = example.error_curves(problem, ks, progress)
    for name in ("truncated_reverse", "neumann_lookback", "fixed_point", "neumann", "stoch_AID"):
        assert curves[name][3] <= 1.01 * curves[name][1] * rates["contraction"] ** 10
    for name in ("CG", "CG_normaleq"):
        assert curves[name][2] <= 2 * rates[name] ** 4
    assert curves["CG"][2] < curves["CG_normaleq"][2] < 1e-3 * curves["fixed_point"][2]
    assert curves["reverse"] == pytest.approx(curves["forward_mode"], rel=1e-9)


def test_digits_are_told_apart_better_with_learned_weights(tmp_path, few_curves):
    out = tmp_path / "run"
    run(*TINY, "--data", "digits", "--classes", 3, 5, "--outer_steps", 8, "--steps", 30,
        "--out", out)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    first, last = results["table"][0], results["table"][-1]
    assert "images of 3 and 5" in results["data"]
    assert last["validation_loss"] < 0.7 * first["validation_loss"]
    assert "published_loss" not in first


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path, few_curves):
    flags = [*TINY, "--steps", 10, "--outer_steps", 14]
    run(*flags, "--out", tmp_path / "whole")
    script, killed = tmp_path / "script.py", tmp_path / "killed"
    script.write_text(
        "import runpy, sys\n"
        f"main = runpy.run_path({str(SCRIPT)!r})['main']\n"
        "main.__globals__['CURVE'] = (2, 3)\n"
        "main(sys.argv[1:])\n"
    )
    kill_at_row(12, script, *flags, "--no_figures", "--out", killed)
    assert len(rows(killed)) == 12
    run("--resume", tmp_path / "killed", "--quiet")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "guess"], "guess"),
        (["--K", "0"], "at least 1"),
        (["--rate", "0"], "above 0"),
        (["--momentum", "2"], "from 0 to 1"),
        (["--data", "digits", "--classes", "4", "11"], "no images"),
        (["--data", "digits", "--classes", "4", "4"], "no images"),
        (["--dataset", "mnist"], "--dataset needs --data digits"),
        (["--seed", "9" * 26], "below 2^32"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_command(example.main, [*TINY, *flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_with_status_1(capsys, tmp_path, few_curves):
    flags = [*TINY, "--rate", "100", "--outer_steps", "2", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        run_command(example.main, flags)
    assert stop.value.code == 1 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_whole_default_run_has_all_published_validation_losses(tmp_path):
    run(*TINY, "--out", tmp_path / "run")
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    told = [row for row in table if "published_loss" in row]
    assert len(told) == 7
    assert all(round(row["validation_loss"], 4) == row["published_loss"] for row in told)
