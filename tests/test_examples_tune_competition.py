"""The real command, with a tiny budget."""

import json
import math
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
def test_all_ways_begin_at_one_draw_and_are_judged_alike(tmp_path, gate):
    out = tmp_path / "run"
    run(*TINY, "--gate", gate, "--no_figures", "--out", out)
    assert len(rows(out)) == 2
    results = json.loads((out / "results.json").read_text())
    assert set(results["summary"]) == {"start", "hypergradients", "random", "tpe"}
    for row in results["searches"]:
        assert row["random/trials"] >= 1 <= row["tpe/trials"] and 1e-3 <= row["start/rate"] <= 1
        assert row["hypergradients/rate"] != row["start/rate"]


def test_so_many_trials_give_the_same_numbers_from_the_same_seed(tmp_path):
    results = []
    for name, trials in (("one", 3), ("again", 3), ("single", 1)):
        flags = [*TINY, "--searches", 1, "--trials", trials, "--no_figures"]
        run(*flags, "--out", tmp_path / name)
        results += json.loads((tmp_path / name / "results.json").read_text())["searches"]
        del results[-1]["processor_seconds"]
    first, again, single = results
    assert first == again and first["random/trials"] == first["tpe/trials"] == 3
    for way in ("random", "tpe"):  # the first of their draws is where all begin
        assert single[f"{way}/rate"] == pytest.approx(single["start/rate"], rel=1e-6)
        assert single[f"{way}/meta_loss"] == pytest.approx(single["start/meta_loss"], rel=1e-4)


def test_tpe_is_sent_the_loss_of_each_of_its_draws_and_stays_within_the_ranges():
    args = tune_competition.make_parser().parse_args(["--gate", "soft"])
    draws, loss = tune_competition.tpe_draws(args, 0), None
    found = []
    for _ in range(40):
        found.append(draws.send(loss))
        loss = abs(math.log(found[-1]["rate"] / 0.03))
    assert found[0] == tune_competition.first_draw(args, 0)
    assert {drawn["delta"] for drawn in found} == {found[0]["delta"]}  # not of soft gates
    for name, among in tune_competition.RANGES.items():
        assert all(among.low <= drawn[name] <= among.high for drawn in found)
    late = sorted(abs(math.log(drawn["rate"] / 0.03)) for drawn in found[-20:])
    assert late[10] < 1.2  # of half of them; at random 1.7


def test_a_search_that_diverges_is_recorded_and_those_after_it_go_on(tmp_path):
    flags = [*TINY, "--lr", 1000, "--trials", 1, "--out", tmp_path / "run"]
    with pytest.warns(UserWarning, match="left out"):
        run(*flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["hypergradients/meta_loss"] for row in results["searches"]] == [None] * 2
    assert results["summary"]["hypergradients"]["diverged"] == 2
    assert results["summary"]["random"]["diverged"] == 0
    assert (tmp_path / "run" / "figures" / "searches.png").exists()


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
    flags = [*TINY, "--units", 1, "--out", tmp_path / "run"]
    assert "to 1, the number of units" in refused(capsys, tune_competition.main, *flags)
    assert not (tmp_path / "run").exists()
