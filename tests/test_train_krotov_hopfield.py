"""The real command, with a tiny budget: what it writes, how it resumes, what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import interrupt_at_row, kill_at_row, outcome, redraw, refused, rows

import train_krotov_hopfield
from experiment.command_line import run_command
from krotov_hopfield import RECIPES, Classifier, KrotovHopfieldNetwork, classifying, network_to_dict

SCRIPT = "train_krotov_hopfield.py"
TINY = [
    "--dataset", "mnist5k", "--train_images", "400", "--depth", "2", "--units", "8", "--epochs",
    "1", "--classifier_epochs", "2", "--round_batches", "3", "--threads", "1", "--quiet",
]  # fmt: skip


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    train_krotov_hopfield.main([*map(str, flags)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run_with_figures(*TINY, "--classify_after", 1, 2, "--out", out)
    return out


def test_a_run_leaves_all_its_files(plain):
    results = json.loads((plain / "results.json").read_text())
    assert [row["layers"] for row in results["classifiers"]] == [1, 2]
    assert results["validation_accuracy"] == results["classifiers"][1]["validation_accuracy"] > 0.3
    assert "embedded" in results["data"] and results["recipe"]["layers"][1]["units"] == 8
    with np.load(plain / "parameters.npz") as arrays:
        assert arrays["1.weight"].shape == (8, 1, 5, 5) and arrays["2.weight"].shape[1] == 8
    for name in ("filters", "convergence", "classifier", "accuracy_over_depth"):
        assert (plain / "figures" / f"{name}.png").stat().st_size > 1000
    redraw(plain)


def test_a_saved_network_is_judged_as_when_it_was_trained(plain, tmp_path):
    flags = ["--dataset", "mnist5k", "--threads", 1, "--quiet"]
    found = json.loads((plain / "results.json").read_text())["classifiers"]
    for row in found:
        out = tmp_path / str(row["layers"])
        saved = plain / f"classifier_{row['layers']}.pt"
        run_with_figures("--evaluate", saved, *flags, "--out", out)
        judged = json.loads((out / "results.json").read_text())["classifiers"]
        kept = ("layers", "test_accuracy", "parameters")
        assert judged == [{name: row[name] for name in kept}]
        assert (out / "figures" / "filters.png").exists()
    run("--resume", out, "--quiet")
    assert json.loads((out / "results.json").read_text())["classifiers"] == judged
    convolutions = 8 * 25, 8 * 9 * 8
    assert [row["parameters"] for row in found] == [
        200 + 8 * 12 * 12 * 10 + 10, sum(convolutions) + 8 * 10 * 10 * 10 + 10,
    ]  # fmt: skip


def test_without_a_classifier_the_results_are_how_near_the_layers_came_to_rest(tmp_path):
    flags = ["--dataset", "mnist5k", "--train_images", 400, "--depth", 2, "--units", 8, "--epochs",
             1, "--classifier_epochs", 0, "--threads", 1, "--quiet"]  # fmt: skip
    run_with_figures(*flags, "--out", tmp_path / "run")
    results, last = json.loads((tmp_path / "run" / "results.json").read_text()), rows(
        tmp_path / "run"
    )  # fmt: skip
    assert [float(row["classifier"]) for row in last] == [0, 0] and results["classifiers"] == []
    reached = [float(last[k][f"convergence/{k + 1}"]) for k in (0, 1)]
    assert results["convergences"] == reached and results["convergence"] == reached[1]
    with np.load(tmp_path / "run" / "parameters.npz") as arrays:
        norms = (np.abs(arrays["2.weight"].astype(float)) ** 8).sum((1, 2, 3))
    assert reached[1] == pytest.approx(np.abs(norms - 1).max(), rel=1e-4)
    redraw(tmp_path / "run")


def test_rows_tell_which_layer_learned_and_what_a_classifier_reached(plain):
    table = [{name: float(value) for name, value in row.items()} for row in rows(plain)]
    assert [row["layer"] for row in table] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [row["classifier"] for row in table] == [0, 0, 1, 1, 0, 0, 1, 1]
    for row in table:
        layer = int(row["layer"])
        assert math.isfinite(row[f"convergence/{layer}"]) == (not row["classifier"])
        assert math.isfinite(row["validation_accuracy"]) == bool(row["classifier"])


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        run(*TINY, "--classify_after", 1, 2, "--seed", seed, "--out", tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(plain) != outcome(tmp_path / "other")


@pytest.mark.parametrize(
    "flags",
    [
        ["--gate", "soft", "--inverse_temperature", "2"],
        ["--gate", "losers"],
        ["--lebesgue_p", "3"],
        ["--ranking_param", "2", "3"],
        ["--delta", "0.1"],
        ["--normalization", "clamp"],
        ["--rate_exponent", "0.5"],
        ["--lr", "0.02", "0.01"],
        ["--schedule", "linear"],
        ["--lr_end", "0.005"],
        ["--lr_speed", "3"],
        ["--epochs", "0.5"],
        ["--batch_size", "32"],
        ["--patience", "1"],
        ["--threshold", "1e9"],
        ["--order", "together"],
        ["--schedule", "linear", "--rate_waits_above", "1e-9"],
        ["--patience_epochs", "0.1"],
        ["--augmentation", "none"],
        ["--augmentation", "crop"],
        ["--train_images", "300"],
        ["--validation", "0.4"],
        ["--feature_norm", "image"],
        ["--dropout", "0.5"],
        ["--classifier_epochs", "1"],
        ["--classifier_lr", "0.01"],
        ["--classifier_batch_size", "32"],
        ["--units", "9", "8"],
        ["--depth", "1", "--ranking_param", "3"],
        ["--preset", "softhebb"],
        ["--dtype", "float64"],
    ],
    ids=" ".join,
)
def test_every_flag_changes_the_numbers_of_a_run(tmp_path, plain, flags):
    run(*TINY, *flags, "--out", tmp_path / "run")
    assert rows(plain) != rows(tmp_path / "run")


def test_the_dense_preset_takes_whole_images(tmp_path):
    flags = [*TINY, "--preset", "dense", "--depth", 1, "--units", 30, "--power", 3]
    flags += ["--classifier_lr", 0.1]  # there are few steps
    run(*flags, "--out", tmp_path / "run")
    with np.load(tmp_path / "run" / "parameters.npz") as arrays:
        assert arrays["1.weight"].shape == (30, 784)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test_accuracy"] > 0.15


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--classify_after", 1, 2, "--epochs", 4, "--round_batches", 1]
    run(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(7, SCRIPT, *flags, "--out", out)
    assert len(rows(out)) < len(rows(tmp_path / "whole"))
    run("--resume", out, "--quiet")
    assert outcome(out) == outcome(tmp_path / "whole")


def test_an_interrupted_run_ends_cleanly_with_figures_and_status_130(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--epochs", 100000, "--patience_epochs", 0, "--threshold", 0, "--out", out]
    interrupt_at_row(2, train_krotov_hopfield.main, *flags)
    results = json.loads((out / "results.json").read_text())
    assert results["classifiers"] == [] and results["validation_accuracy"] is None
    assert (out / "figures" / "convergence.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "6"], "--depth 6 is above that of --preset deep, 5"),
        (["--preset", "dense", "--depth", "2"], "--depth 2 is above that of --preset dense, 1"),
        (["--ranking_param", "1"], "from 2, the runner-up"),
        (["--ranking_param", "9"], "to 8, the number of units"),
        (["--lebesgue_p", "0.5"], "at least 1"),
        (["--lr", "1", "2", "3"], "one value, or 2"),
        (["--delta", "0.1", "0.2", "0.3"], "one value, or 2"),
        (["--power", "3"], "--power needs --preset dense or softhebb"),
        (["--inverse_temperature", "2"], "--inverse_temperature needs --gate soft"),
        (["--gate", "soft", "--delta", "0.1"], "--delta needs --gate ranked or losers"),
        (["--preset", "softhebb", "--ranking_param", "3"], "--ranking_param needs --gate ranked"),
        (["--schedule", "constant", "--lr_end", "0.1"], "--lr_end needs --schedule exponential"),
        (["--dropout", "1"], "must be a number from 0 to below 1"),
        (["--classify_after", "3"], "has 2 layers"),
        (["--validation", "1"], "between 0 and 1"),
        (["--batch_size", "400"], "above 320, the training images"),
        (["--gate", "loud"], "invalid choice"),
        (["--classifier_epochs", "0", "--dropout", "0.3"], "--dropout needs --classifier_epochs"),
        (["--schedule", "constant", "--rate_waits_above", "1"], "--schedule linear or exp"),
        (["--evaluate", "none.pt"], "none.pt is not there"),
        (["--evaluate", __file__], "--depth needs a training: leave out --evaluate"),
        (["--epochs", "-1"], "at least 0"),
        (["--layers", "3"], "--layers is --depth here"),
        (["--data_augment"], "--data_augment is --augmentation flip here"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_no_directory(
    capsys, tmp_path, flags, message
):
    out = tmp_path / "run"
    assert message in refused(capsys, train_krotov_hopfield.main, *TINY, *flags, "--out", out)
    assert not out.exists()


def test_what_is_no_saved_network_or_takes_other_images_is_refused(capsys, tmp_path):
    flags = ["--dataset", "mnist5k", "--out", tmp_path / "run"]
    (tmp_path / "text.pt").write_text("nothing")
    layers = KrotovHopfieldNetwork((3, 9, 9), RECIPES["deep"](1), torch.Generator())
    network = classifying(layers, Classifier((96, 2, 2), 10, 0.1, torch.Generator()), 1)
    torch.save(network_to_dict(network), tmp_path / "colours.pt")
    for name, message in (("text", "no network of"), ("colours", "takes no images [1, 28, 28]")):
        path = tmp_path / f"{name}.pt"
        assert message in refused(capsys, train_krotov_hopfield.main, "--evaluate", path, *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_with_its_layer_and_status_1(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(train_krotov_hopfield.main,
                    [*TINY, "--lr", "1e30", "--out", str(tmp_path / "run")])  # fmt: skip
    assert stop.value.code == 1
    assert "layers [1] diverged" in capsys.readouterr().err


def test_few_images_that_lack_classes_are_trained_on_like_any(tmp_path):
    flags = ["--train_images", 2, "--batch_size", 1, "--classifier_batch_size", 1]
    run(*TINY, *flags, "--validation", 0.4, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test_accuracy"] < 0.5


@pytest.mark.slow
def test_two_thousand_units_reach_a_good_accuracy_on_mnist_within_few_epochs(tmp_path):
    flags = ["--preset", "dense", "--epochs", 20, "--lr", 0.2, "--classifier_epochs", 30]
    run(*flags, "--data-dir", tmp_path / "data", "--quiet", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test_accuracy"] > 0.95


@pytest.mark.parametrize("flags, expected", [
    (["--dataset", "mnist5k"], "crop"), (["--dataset", "fashion"], "flip"),
    (["--dataset", "cifar10"], "flip"), (["--dataset", "mnist", "--augmentation", "flip"], "flip"),
    (["--dataset", "mnist", "--preset", "softhebb"], "none"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else value)  # fmt: skip
def test_a_preset_does_not_mirror_digits(flags, expected):
    args = train_krotov_hopfield.make_parser().parse_args(flags)
    assert train_krotov_hopfield.make_recipe(args).augmentation == expected
