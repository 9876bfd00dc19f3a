"""The real command on a tiny run of main.py: its table, how it resumes, what it refuses."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import interrupt_at_row, kill_at_row, redraw, refused, rows

import evaluate
import main
from comparison.learned_run import load_run
from mnist_datasets import load_images

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with three runs: on single inputs, on pairs, on views of which one is learned."""
    place = tmp_path_factory.mktemp("runs")
    tiny = [
        "--dataset", "mnist5k", "--metasteps", "2", "--initial_inner_steps", "2", "--lr", "1e-3",
        "--max_inner_steps", "2", "--batch_size", "64", "--evaluations", "2", "--beside", *COMMON,
        "--no_figures",
    ]  # fmt: skip
    main.main(["5", *tiny, "--out", str(place / "single")])
    main.main(["5", *tiny, "--pair_inputs", "--inhibition", "none", "--out", str(place / "pairs")])
    views = ["--views", "mixed", "--mask", "0", "0.5", "--center", "--learn_views", "contrast"]
    main.main(["5", *tiny, *views, "--lr", "1e-2", "--out", str(place / "views")])
    return place


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    evaluate.main([*map(str, flags), *COMMON, "--no_figures"])


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("name", ["single", "pairs", "views"])
def test_a_run_is_judged_as_it_was_trained(runs, tmp_path, name):
    run(runs / name, "--steps", 2, "--evaluations", 2, "--out", tmp_path / "out")
    trainings = results(tmp_path / "out")["trainings"]
    names = ("inner_steps", "meta_loss", "train_accuracy", "test_accuracy")
    own = results(runs / name)["evaluations"]
    assert [{key: row[key] for key in names} for row in trainings] == own
    assert {(row["dataset"], row["layers"]) for row in trainings} == {("mnist5k", "5")}


def test_without_flags_the_question_is_whether_a_rule_generalises(runs):
    learned = load_run(runs / "single")
    on_mnist = replace(learned, config=learned.config | {"dataset": "mnist", "layers": [7, 5]})
    args = evaluate.make_parser().parse_args(["RUN"])
    evaluate.fill_in(args, [on_mnist])
    assert args.datasets == ["mnist", "fashion"] and args.layers == [[7, 5], [7, 10]]
    assert args.steps == [2, 8]
    assert (args.rules, args.references) == (["oja"], ["random", "pca"])
    for flags, datasets, steps in (([], ["mnist5k"], [2, 8]), (["--steps", "3"], ["mnist5k"], [3]),
                                   (["--references"], ["mnist5k"], [2])):  # fmt: skip
        args = evaluate.make_parser().parse_args(["RUN", *flags])
        evaluate.fill_in(args, [learned])
        assert args.datasets == datasets and args.steps == steps
    assert args.layers == [[5]] and (args.rules, args.references) == ([], [])


def test_a_comparison_leaves_a_table_all_numbers_and_a_figure(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "RATES", (1e-3, 1e-2))
    out = tmp_path / "out"
    flags = ["--layers", 6, "--layers", 6, 5, "--steps", 3, 1, 3, "--seeds", 2, "--out", out]
    several = ["--rules", "oja", "foldiak", "--references", "random", "pca"]
    evaluate.main([*map(str, [runs / "single", runs / "pairs", *flags, *several])])
    shown = capsys.readouterr().out
    found = results(out)
    assert found["methods"] == ["single", "pairs", "oja", "foldiak", "random", "pca"]
    assert "embedded" in found["data"]["mnist5k"]
    assert len(found["summary"]) == 2 * (4 * 2 + 2)
    assert len(found["trainings"]) == 2 * len(found["summary"])
    assert len(found["trials_of_rates"]) == 2 * 2 * 2
    assert all("test_accuracy" not in row for row in found["trials_of_rates"])
    table = (out / "table.md").read_text().splitlines()
    assert table[0] == "| method | layers | steps | mnist5k |"
    assert len(table) == 2 + len(found["summary"])
    for name in found["methods"]:
        assert f"\n{name} " in shown
    assert (out / "figures" / "accuracy_over_steps.png").stat().st_size > 10_000
    redraw(out)
    numbers = rows(out)
    assert len(numbers) == len(found["trainings"]) + len(found["trials_of_rates"])
    chosen = next(row["rate"] for row in found["summary"] if row["method"] == "oja")
    assert chosen in (1e-3, 1e-2)


def test_rotated_digits_and_other_data_sets_stand_side_by_side(runs, tmp_path, monkeypatch):
    embedded = load_images("mnist5k", tmp_path)
    monkeypatch.setattr(evaluate, "load_images", lambda *_: embedded)
    out, flags = tmp_path / "out", ["--datasets", "mnist", "rotated", "--seeds", 1]
    run(runs / "single", *flags, "--out", out)
    heading, _, line = (out / "table.md").read_text().splitlines()
    assert heading == "| method | layers | steps | mnist | rotated |"
    upright, rotated = (float(cell.split(" %")[0]) for cell in line.split("|")[4:6])
    assert upright != rotated
    assert "rotated" in results(out)["data"]["rotated"]


def test_a_name_that_there_is_not_is_told_with_those_there_are(capsys, tmp_path):
    line = refused(capsys, evaluate.main, tmp_path / "nothing", *COMMON)
    assert f"there is no {tmp_path / 'nothing'}; rules of the zoo are competing" in line


def test_with_few_images_all_are_a_batch_and_a_line_says_so(runs, tmp_path):
    large = _altered(runs / "single", tmp_path / "large", batch_size=5000)
    run(large, "--rules", "oja", "--seeds", 1, "--out", tmp_path / "out")
    said = (tmp_path / "out" / "log.txt").read_text()
    assert "mnist5k: batches have all 4000 images, not 5000" in said
    assert all(0 < row["test_accuracy"] < 1 for row in results(tmp_path / "out")["trainings"])


def test_pairs_of_a_class_stand_beside_the_rule_of_pairs(runs, tmp_path, capsys):
    flags = ["--references", "class_pairs", "--seeds", 2, "--out", tmp_path / "out"]
    run(runs / "views", *flags)
    found = {row["method"]: row for row in results(tmp_path / "out")["trainings"]}
    assert set(found) == {"views", "class_pairs"}
    assert found["views"]["meta_loss"] != found["class_pairs"]["meta_loss"]
    message = refused(capsys, evaluate.main, runs / "single", *flags, *COMMON)
    assert "single takes single images, not pairs" in message


def _flags(runs, out, seeds) -> list:
    flags = ["--layers", 5, "--layers", 4, "--steps", 2, 4, "--references", "random", *COMMON]
    return [runs / "single", *flags, "--seeds", seeds, "--out", out]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(runs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*_flags(runs, whole, 3))
    kill_at_row(5, "evaluate.py", *_flags(runs, killed, 3), "--no_figures")
    assert not (killed / "results.json").exists()
    run("--resume", killed)
    assert rows(killed) == rows(whole)
    for name in ("results.json", "table.md"):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_an_interrupted_run_ends_cleanly_with_what_it_has_and_status_130(runs, tmp_path):
    out = tmp_path / "out"
    interrupt_at_row(3, evaluate.main, *_flags(runs, out, 100_000))
    assert len(results(out)["trainings"]) == len(rows(out)) < 100
    assert (out / "figures" / "accuracy_over_steps.png").exists()
    assert (out / "table.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "-5"], "at least 1"),
        (["--seeds", "0"], "at least 1"),
        (["--rules", "ojas"], "oja"),
        (["--references", "lda"], "pca"),
        (["--datasets", "svhn"], "mnist"),
        (["--datasets", "mnist", "--datasets", "fashion"], "give all values after one"),
        (["--rules", "oja", "oja"], "oja would name several rows"),
    ],
    ids=" ".join,
)
def test_wrong_flags_are_refused_in_one_line(runs, capsys, tmp_path, flags, message):
    out = tmp_path / "out"
    assert message in refused(capsys, evaluate.main, runs / "single", *flags, "--out", out, *COMMON)
    assert not out.exists()


def test_what_is_no_finished_run_is_refused_in_one_line(runs, capsys, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "single", unfinished)
    (unfinished / "rule.json").unlink()
    assert "main.py --resume" in refused(capsys, evaluate.main, unfinished, *COMMON)
    assert "config.json" in refused(capsys, evaluate.main, tmp_path, *COMMON)
    assert "RUN" in refused(capsys, evaluate.main, "--steps", 3, *COMMON)


def _altered(run: Path, place: Path, **flags) -> Path:
    shutil.copytree(run, place)
    config = json.loads((place / "config.json").read_text()) | flags
    (place / "config.json").write_text(json.dumps(config))
    for checkpoint in place.glob("checkpoint*.pt"):  # which knows the flags as they were
        checkpoint.unlink()
    return place


def test_a_run_whose_files_do_not_belong_together_is_refused(runs, capsys, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(runs / "single", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"data_dir": "/elsewhere"}))
    run(place, "--seeds", 1, "--out", tmp_path / "fine")
    (place / "config.json").write_text(json.dumps(config | {"inh_factor": 0.3}))
    line = refused(capsys, evaluate.main, place, *COMMON)
    assert "config.json is not the one that checkpoint.pt was saved under" in line


def test_how_long_a_rule_is_judged_is_not_read_from_the_log(runs, tmp_path):
    copy = tmp_path / "single"
    shutil.copytree(runs / "single", copy)
    (copy / "metrics.csv").unlink()
    assert load_run(copy).steps == load_run(runs / "single").steps == 2


def test_runs_that_cannot_stand_in_one_table_are_refused(runs, capsys, tmp_path):
    single, other = runs / "single", _altered(runs / "single", tmp_path / "other", C=5.0)
    assert "1000 and 5" in refused(capsys, evaluate.main, single, other, *COMMON)
    assert "single would name" in refused(capsys, evaluate.main, single, single, *COMMON)
    convolutions = _altered(single, tmp_path / "convolutions", layers=[], conv=[[4, 5]])
    assert "--layers" in refused(capsys, evaluate.main, convolutions, "--rules", "oja", *COMMON)


def test_a_comparison_is_not_resumed_with_another_rule_or_other_flags(runs, capsys, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(runs / "single", copy)
    run(copy, "--seeds", 1, "--out", out)
    assert "seeds" in refused(capsys, evaluate.main, "--resume", out, "--seeds", 2, *COMMON)
    description = json.loads((copy / "rule.json").read_text())
    description["rules"][0]["terms"]["w"][0]["coefficient"] += 1e-6
    (copy / "rule.json").write_text(json.dumps(description))
    assert "found" in refused(capsys, evaluate.main, "--resume", out, *COMMON)


# ---- the table ----


def row(method: str, dataset: str, layers: str, steps: int, accuracy: float, draw: int = 0) -> dict:
    return {
        "method": method, "dataset": dataset, "layers": layers, "inner_steps": steps, "draw": draw,
        "rate": None, "held_out": False, "test_accuracy": accuracy,
    }  # fmt: skip


def test_a_summary_holds_mean_and_deviation_of_finite_test_accuracies():
    rows = [
        *(row("a", "d", "4", 5, accuracy, k) for k, accuracy in enumerate([0.5, 0.7, math.nan])),
        row("a", "d", "4", 5, 0.1) | {"held_out": True},
        row("b", "d", "4", 5, math.nan),
    ]
    first, second = evaluate.summarize(rows)
    assert first["test_accuracy_mean"] == pytest.approx(0.6)
    assert first["test_accuracy_standard_deviation"] == pytest.approx(0.2 / 2**0.5)
    assert (first["trainings"], first["finite"]) == (3, 2)
    assert evaluate.cell_text(first, 3) == "60.00 ± 14.14 % (2 of 3)"
    assert second["test_accuracy_mean"] is None
    assert evaluate.cell_text(second, 3) == "not finite"


def test_a_table_has_the_data_sets_side_by_side_and_gaps_where_nothing_is():
    rows = [row("a", d, n, s, 0.5) for d in ("d", "e") for n in ("4", "4-3") for s in (1, 2)]
    rows += [row("reference", "d", "4", 0, 0.25)]
    cells = evaluate.table_cells(evaluate.summarize(rows), 1)
    half, quarter = "50.00 %", "25.00 %"
    assert cells == [
        ["method", "layers", "steps", "d", "e"],
        ["a", "4", "1", half, half],
        ["a", "4", "2", half, half],
        ["reference", "4", "-", quarter, ""],
        ["a", "4-3", "1", half, half],
        ["a", "4-3", "2", half, half],
    ]
