"""The real command, with a tiny budget."""

import json
import sys
from pathlib import Path

import pytest
from commands import outcome, redraw, refused, rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import tune_competition

TINY = [
    "--dataset", "mnist5k", "--units", "6", "--inner_steps", "4", "--batch_size", "64",
    "--metasteps", "2", "--searches", "2", "--evaluations", "1", "--threads", "1", "--quiet",
]  # fmt: skip


def run(*flags) -> None:
    tune_competition.main([*map(str, flags)])


@pytest.mark.parametrize("gate", ["ranked", "soft"])
def test_both_ways_begin_at_one_draw_and_are_judged_alike(tmp_path, gate):
    out = tmp_path / "run"
    run(*TINY, "--gate", gate, "--out", out)
    assert len(rows(out)) == 2
    results = json.loads((out / "results.json").read_text())
    assert set(results["summary"]) == {"start", "hypergradients", "random"}
    for row in results["searches"]:
        assert row["trials"] >= 1 and 1e-3 <= row["start/rate"] <= 1
        assert row["hypergradients/rate"] != row["start/rate"]


def test_a_finished_run_is_reported_again_and_one_with_more_searches_refused(capsys, tmp_path):
    out = tmp_path / "run"
    run(*TINY, "--out", out)
    redraw(out)
    before = outcome(out)
    run("--resume", out, "--quiet")
    assert outcome(out) == before
    line = refused(capsys, tune_competition.main, "--resume", out, "--searches", 3, "--quiet")
    assert "searches" in line


def test_wrong_input_is_refused_in_one_line(capsys, tmp_path):
    flags = [*TINY, "--batch_size", 5000, "--out", tmp_path / "run"]
    assert "4000" in refused(capsys, tune_competition.main, *flags)
