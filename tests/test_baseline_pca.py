"""The real command with few components, and which numbers of components it takes."""

import json
from pathlib import Path

import pytest
from commands import interrupt_at_row, kill_at_row, redraw, rows

import baseline_pca
from experiment.command_line import run_command

ROOT = Path(__file__).resolve().parent.parent
KS = ["--components", "4", "1", "20", "4"]
TINY = ["--dataset", "mnist5k", "--threads", "1", "--quiet"]


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    baseline_pca.main([*map(str, flags)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run_with_figures(*TINY, *KS, "--out", out)
    return out


def test_a_run_leaves_a_table_of_accuracies_that_rise_with_the_components(plain):
    results = json.loads((plain / "results.json").read_text())
    assert "embedded" in results["data"]
    table = results["table"]
    assert [row["components"] for row in table] == [1, 4, 20]
    for name in ("variance_share", "train_accuracy", "test_accuracy"):
        values = [row[name] for row in table]
        assert values == sorted(values) and values[0] > 0.05 and values[-1] < 1
        assert values == [float(row[name]) for row in rows(plain)]
    assert table[-1]["test_accuracy"] > 0.8
    assert (plain / "figures" / "accuracy.png").stat().st_size > 1000
    redraw(plain)


def test_the_table_is_shown_also_when_the_run_was_at_its_end_already(capsys, plain, tmp_path):
    run("--dataset", "mnist5k", "--threads", 1, "--components", 1, "--out", tmp_path / "run")
    first = capsys.readouterr().out
    assert "test" in first and "training" in first
    run("--resume", tmp_path / "run")
    assert capsys.readouterr().out == first
    assert rows(tmp_path / "run") == rows(plain)[:1]


@pytest.mark.parametrize("flags", [["--pixelwise_normalization"], ["--C", "1e-3"]], ids=" ".join)
def test_every_flag_changes_the_numbers(tmp_path, plain, flags):
    run(*TINY, *KS, *flags, "--out", tmp_path / "run")
    assert rows(tmp_path / "run")[-1] != rows(plain)[-1]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--components", 1, 2, 80, 81]
    run(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(3, "baseline_pca.py", *flags, "--out", out)
    assert len(rows(tmp_path / "killed")) == 3
    run("--resume", tmp_path / "killed", "--quiet")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    results = [(tmp_path / name / "results.json").read_text() for name in ("killed", "whole")]
    assert results[0] == results[1]


def test_an_interrupted_run_ends_cleanly_with_its_table_and_status_130(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--components", *range(1, 700), "--out", out]
    interrupt_at_row(2, baseline_pca.main, *flags)
    table = json.loads((out / "results.json").read_text())["table"]
    assert len(table) == len(rows(out)) < 699
    assert (out / "figures" / "accuracy.png").exists()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [(784, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 784]), (4, [1, 2, 4]), (1, [1])],
)
def test_without_a_wish_the_numbers_are_powers_of_two_and_all(pixels, expected):
    assert baseline_pca.numbers_of_components(None, pixels) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--components", "785"], "784"),
        (["--components", "0"], "at least 1"),
        (["--components"], "argument"),
        (["--components", "few"], "whole number"),
        (["--C", "0"], "above 0"),
        (["32"], "32"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_command(baseline_pca.main, [*TINY, *flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()
