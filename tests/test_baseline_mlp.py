"""The hypergradient of the four numbers by finite differences, and the real command, tiny."""

import json
from pathlib import Path

import pytest
import torch
from commands import interrupt_at_row, kill_at_row, outcome, redraw, rows

import baseline_mlp
from experiment.command_line import parse, run_command
from kernels.logistic_regression import fit_logistic
from linear_probe import extract_features
from mnist_datasets import load_images

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "12", "--dataset", "mnist5k", "--metasteps", "4", "--probe_images", "200", "--evaluations", "2",
    "--threads", "1", "--quiet",
]  # fmt: skip
NUMBERS = ("mean_w", "mean_b", "spread_w", "spread_b")


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    baseline_mlp.main([*map(str, flags)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_images("mnist5k", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run_with_figures(*TINY, "--out", out)
    return out


def with_numbers(initializer, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(initializer, name).fill_(value)
    return initializer


def test_the_formula_of_the_random_layer_holds():
    initializer = with_numbers(
        baseline_mlp.make_initializer().double(),
        mean_w=0.2, mean_b=0.7, spread_w=3.0, spread_b=0.5,
    )  # fmt: skip
    _, layer = initializer(baseline_mlp.make_model(9, 4), seeded(5))
    noise = seeded(5)
    n_w, n_b = (torch.randn(shape, generator=noise, dtype=torch.float64) for shape in ((4, 9), 4))
    torch.testing.assert_close(layer["w"], (0.2 + 3 * n_w) / 3)
    torch.testing.assert_close(layer["b"], 0.7 + 0.5 * n_b)
    assert initializer.effective() == {n: getattr(initializer, n).item() for n in NUMBERS}


def test_numbers_start_at_mean_zero_and_spread_one():
    effective = baseline_mlp.make_initializer().effective()
    assert effective == {"mean_w": 0.0, "mean_b": 0.0, "spread_w": 1.0, "spread_b": 1.0}


def test_the_hypergradient_is_that_of_the_penalised_loss_with_the_probe_fitted_anew(digits):
    """With the outer images those of the fit, the envelope theorem is exact.

    What the probe minimises, per image, is CE + |W|^2 / (2 C N); its minimum has the hypergradient
    of the mean CE through the frozen probe. Differences of the minimum need no gradient at all.
    """
    flags = ["5", "--probe_images", "120", "--outer_images", "120", "--C", "0.5"]
    args = parse(baseline_mlp.make_parser(), flags)
    training = baseline_mlp.make_training(args, *digits)
    start = {"mean_w": 0.3, "mean_b": -0.2, "spread_w": 2.0, "spread_b": 0.8}
    initializer = with_numbers(training.initializer.double(), **start)
    model, data = training.model, digits[0].subset(slice(120))

    def minimum() -> float:
        features = extract_features(model, initializer(model, seeded()), data)
        fit = fit_logistic(features, data.labels, data.classes, args.C, tolerance=1e-15)
        return fit.objective / (args.C * len(data))

    loss, _ = training.outer_loss(model, initializer(model, seeded()), seeded(1))
    loss.backward()
    h = 1e-3
    for name, value in start.items():
        ahead = (with_numbers(initializer, **{name: value + h}), minimum())[1]
        behind = (with_numbers(initializer, **{name: value - h}), minimum())[1]
        with_numbers(initializer, **{name: value})
        expected = (ahead - behind) / (2 * h)
        assert getattr(initializer, name).grad.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_each_number_moves_by_the_learning_rate_at_the_first_step_of_adam(plain):
    first, second, *_ = rows(plain)
    for name in NUMBERS:
        before, after = (float(row[f"initial/{name}"]) for row in (first, second))
        assert abs(after - before) == pytest.approx(0.1, rel=1e-3)


def test_a_run_leaves_metrics_results_and_figures(plain):
    assert [row["step"] for row in rows(plain)] == ["1", "2", "3", "4"]
    assert all(row["inner_steps"] == "0.0" for row in rows(plain))
    results = json.loads((plain / "results.json").read_text())
    assert "embedded" in results["data"] and len(results["evaluations"]) == 2
    assert 0.2 < results["test_accuracy_mean"] < 1
    assert set(results["initializer"]) == set(NUMBERS)
    for name in ("meta_loss", "accuracy", "hypergradient", "initial"):
        assert (plain / "figures" / f"{name}.png").stat().st_size > 1000
    redraw(plain)
    assert (plain / "checkpoint.pt").exists()


def test_evaluations_are_of_new_draws_on_all_images(plain):
    one, other = json.loads((plain / "results.json").read_text())["evaluations"]
    assert one["train_accuracy"] != other["train_accuracy"]
    for row in (one, other):
        assert row["train_accuracy"] * 4000 == pytest.approx(round(row["train_accuracy"] * 4000))
        assert row["train_accuracy"] * 200 != pytest.approx(round(row["train_accuracy"] * 200))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        run(*TINY, "--seed", seed, "--out", tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(plain) != outcome(tmp_path / "other")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.2"],
        ["--C", "0.01"],
        ["--probe_images", "150"],
        ["--outer_images", "50"],
        ["--pixelwise_normalization"],
        ["--warmup_steps", "2", "--finetune_steps", "1"],
        ["--dtype", "float64"],
    ],
    ids=" ".join,
)
def test_every_flag_changes_the_course_of_a_run(tmp_path, plain, flags):
    run(*TINY, *flags, "--out", tmp_path / "run")
    assert outcome(tmp_path / "run") != outcome(plain)


def test_without_meta_steps_the_untrained_distribution_is_evaluated(tmp_path):
    run(*TINY, "--metasteps", 0, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["initializer"] == baseline_mlp.make_initializer().effective()
    assert len(results["evaluations"]) == 2


def test_more_probe_images_than_there_are_mean_all_of_them(digits):
    assert len(digits[1].subset(slice(5000))) == 1000


@pytest.mark.parametrize(("features", "images"), [(10_000, 1000), (20_000, 500), (5, 4000)])
def test_unless_told_a_meta_step_sees_fewer_images_the_more_features_there_are(
    digits, features, images
):
    args = parse(baseline_mlp.make_parser(), [str(features)])
    seen, _ = baseline_mlp.make_training(args, *digits).outer_loss.data
    assert len(seen) == images


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--metasteps", 13]
    run(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(12, "baseline_mlp.py", *flags, "--out", out)
    run("--resume", tmp_path / "killed", "--quiet")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_an_interrupted_run_ends_cleanly_with_figures_and_status_130(tmp_path):
    out = tmp_path / "run"
    interrupt_at_row(2, baseline_mlp.main, *TINY, "--metasteps", 100_000, "--out", out)
    assert json.loads((out / "results.json").read_text())["evaluations"] == []
    assert (out / "figures" / "initial.png").exists() and (out / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["0"], "at least 1"),
        (["many"], "whole number"),
        (["--metasteps", "-1"], "at least 0"),
        (["--lr", "0"], "above 0"),
        (["--probe_images", "0"], "at least 1"),
        (["--evaluations", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_command(baseline_mlp.main, [*flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()
