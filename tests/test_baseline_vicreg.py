"""The real command, with a tiny budget: what it writes, how it resumes, what it refuses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import as_begun_before, interrupt_at_row, kill_at_row, outcome, redraw, refused, rows

import baseline_vicreg
from experiment.command_line import run_command
from kernels.logistic_regression import fit_logistic
from mnist_datasets import load_images

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--dataset", "mnist5k", "--epochs", "3", "--probe_every", "2", "--batch_size", "256",
    "--threads", "1", "--quiet",
]  # fmt: skip


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    baseline_vicreg.main([*map(str, flags)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(4, *TINY, "--out", out)
    return out


def test_a_run_without_sizes_is_of_256_and_32_units_and_leaves_all_its_files(tmp_path):
    out = tmp_path / "run"
    run_with_figures(*TINY, "--out", out)
    assert [row["step"] for row in rows(out)] == ["1", "2", "3"]
    assert json.loads((out / "config.json").read_text())["layers"] == [256, 32]
    results = json.loads((out / "results.json").read_text())
    assert "embedded" in results["data"] and 0.8 < results["test_accuracy"] < 1
    with np.load(out / "parameters.npz") as arrays:
        assert arrays["1.w"].shape == (256, 784) and arrays["2.b"].shape == (32,)
    for name in ("loss", "accuracy", "features"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000
    redraw(out)
    assert (out / "checkpoint.pt").exists()


def test_the_accuracy_is_that_of_a_classifier_fitted_to_features_of_unchanged_images(plain):
    train, test = load_images("mnist5k", plain)
    with np.load(plain / "parameters.npz") as arrays:
        w, b = (torch.from_numpy(arrays[name]) for name in ("1.w", "1.b"))
    seen, unseen = (torch.sigmoid(d.floats().flatten(1) @ w.T + b) for d in (train, test))
    fit = fit_logistic(seen, train.labels, 10, C=1e6)
    expected = (fit.logits(unseen).argmax(1) == test.labels).double().mean().item()
    accuracy = json.loads((plain / "results.json").read_text())["test_accuracy"]
    assert abs(accuracy - expected) <= 0.002


def test_accuracies_are_recorded_where_probed_and_last_and_the_loss_is_the_weighted_sum(plain):
    probed = [not math.isnan(float(row["test_accuracy"])) for row in rows(plain)]
    assert probed == [False, True, True]
    results = json.loads((plain / "results.json").read_text())
    assert float(rows(plain)[-1]["test_accuracy"]) == results["test_accuracy"]
    for row in rows(plain):
        loss, *terms = (
            float(row[name]) for name in ("loss", "invariance", "variance", "covariance")
        )
        weighted = zip((250, 25, 1000), terms, strict=True)
        assert loss == pytest.approx(sum(weight * term for weight, term in weighted), rel=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        run(4, *TINY, "--seed", seed, "--out", tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(plain) != outcome(tmp_path / "other")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.01"],
        ["--weight_decay", "0.1"],
        ["--batch_size", "128"],
        ["--epochs", "1"],
        ["--invariance", "100"],
        ["--variance", "100"],
        ["--covariance", "100"],
        ["--hinge", "0.2"],
        ["--C", "0.1"],
        ["--probe_every", "0"],
        ["--pixelwise_normalization"],
        ["--dtype", "float64"],
    ],
    ids=" ".join,
)
def test_every_flag_changes_the_numbers_of_a_run(tmp_path, plain, flags):
    run(4, *TINY, *flags, "--out", tmp_path / "run")
    assert outcome(plain) != outcome(tmp_path / "run")


def test_no_epoch_judges_the_random_start(tmp_path):
    run(4, *TINY, "--epochs", 0, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["epochs"] == 0 and 0.1 < results["test_accuracy"] < 1


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--epochs", "5"]
    run(4, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(3, "baseline_vicreg.py", 4, *flags, "--out", out)
    assert len(rows(tmp_path / "killed")) == 3
    run("--resume", tmp_path / "killed", "--quiet")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_an_interrupted_run_ends_cleanly_with_figures_and_status_130(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--epochs", "100000", "--out", out]
    interrupt_at_row(2, baseline_vicreg.main, 4, *flags)
    results = json.loads((out / "results.json").read_text())
    assert results["epochs"] == len(rows(out)) and (out / "figures" / "loss.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["0"], "at least 1"),
        (["--batch_size", "1"], "from 2"),
        (["--batch_size", "5000"], "4000"),
        (["--hinge", "0"], "above 0"),
        (["--covariance", "-1"], "at least 0"),
        (["--lr", "fast"], "above 0"),
        (["--crop", "0.9", "0.5"], "0 < LOW <= HIGH <= 1"),
        (["--epochs", "1.5"], "whole number"),
        (["--no_such_flag"], "no_such_flag"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_no_directory(
    capsys, tmp_path, flags, message
):
    out = tmp_path / "run"
    flags = [*flags, "--dataset", "mnist5k", "--out", out]
    assert message in refused(capsys, baseline_vicreg.main, *flags)
    assert not out.exists()


def test_a_run_that_diverges_stops_with_its_epoch_and_status_1(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(
            baseline_vicreg.main, ["4", *TINY, "--lr", "1e30", "--out", str(tmp_path / "run")]
        )
    assert stop.value.code == 1
    assert "epoch 1, loss nan" in capsys.readouterr().err


def test_resuming_with_other_flags_is_refused(capsys, plain):
    line = refused(capsys, baseline_vicreg.main, "--resume", plain, "--hinge", "0.5", "--quiet")
    assert "hinge" in line and "0.5" in line
    assert "layers" in refused(capsys, baseline_vicreg.main, 5, "--resume", plain, "--quiet")


def test_views_are_those_of_the_flags_and_older_runs_have_the_default_ones(tmp_path, plain):
    given = ("--degrees", 25, "--crop", 0.7, 1.0, "--shift", 0)
    run(4, *TINY, *given, "--out", tmp_path / "same")
    run(4, *TINY, "--shift", 2, "--out", tmp_path / "shifted")
    losses = [[row["loss"] for row in rows(out)] for out in (plain, tmp_path / "same")]
    assert losses[0] == losses[1] != [row["loss"] for row in rows(tmp_path / "shifted")]
    older = tmp_path / "older"
    shutil.copytree(plain, older)
    views = ("degrees", "crop", "crop_ratio", "crop_padding", "shift", "brightness", "contrast")
    as_begun_before(older, *views)
    run("--resume", older, "--quiet")
    assert [row["loss"] for row in rows(older)] == losses[0]


@pytest.mark.slow
def test_the_whole_run_of_one_layer_reaches_the_published_accuracy(tmp_path):
    run(32, "--threads", 1, "--quiet", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test_accuracy"] > 0.90
