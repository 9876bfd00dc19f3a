"""The real command, with a tiny budget: what it writes, how it resumes, what it refuses."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import as_begun_before, interrupt_at_row, kill_at_row, outcome, refused, rows
from forked import Command

import baseline_pca
import main
from comparison.learned_run import load_run
from experiment.errors import RunLogError
from experiment.processes import ALONE
from mnist_datasets import load_images
from rules import load_rule, load_zoo, zoo

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--dataset", "mnist5k", "--metasteps", "3", "--initial_inner_steps", "2", "--batch_size", "64",
    "--max_inner_steps", "4", "--evaluations", "1", "--warmup_steps", "1", "--lr", "1e-3",
    "--threads", "1", "--beside", "--quiet", "--tasks", "1", "--decay", "none", "--average", "0",
    "--no-clip_grads", "--outer_images", "1024",
]  # fmt: skip
FIGURES = ("meta_loss", "accuracy", "coefficients", "hypergradient", "features", "lateral")


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    main.main([*map(str, flags), "--no_figures"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(4, *TINY, "--out", out)
    return out


def test_a_run_leaves_configuration_metrics_checkpoint_rule_and_figures(tmp_path):
    out = tmp_path / "run"
    main.main(["6", "5", *TINY, "--out", str(out)])
    assert [row["step"] for row in rows(out)] == ["1", "2", "3"]
    assert json.loads((out / "config.json").read_text())["layers"] == [6, 5]
    results = json.loads((out / "results.json").read_text())
    assert "embedded" in results["data"] and 0 < results["test_accuracy_mean"] < 1
    assert len(load_rule(out / "rule.json").rules) == 2
    assert "Δw" in (out / "rule.txt").read_text()
    for name in FIGURES:
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000
    assert any(path.name.startswith("events.out.tfevents") for path in out.iterdir())
    kept = load_zoo(out)
    written = json.loads((out / "rule.json").read_text())
    assert kept.layers == (6, 5) and kept.recipe.rule.to_dict() == written
    assert "--out" not in kept.command and str(tmp_path) not in kept.command


def test_a_rule_that_is_too_large_for_the_zoo_ends_its_run_as_others_do(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.LARGEST, "layers", 1)
    run(4, 3, *TINY, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "zoo.json").exists()
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "not to be kept in the zoo: its rule is not one for each of 1 to 1 layers" in said


STATISTICS = [
    "--rule", "unit_statistics", "--dataset", "mnist5k", "--metasteps", "3", "--horizon", "2", "4",
    "--batch_size", "64", "--evaluations", "2", "--evaluation_steps", "3", "--threads", "1",
    "--evaluation_batch_size", "32",
    "--probe_images", "500", "--quiet",
]  # fmt: skip


def test_rules_of_unit_statistics_have_defaults_of_their_own_and_end_beside_references(
    tmp_path, capsys
):
    out = tmp_path / "run"
    main.main(["6", *STATISTICS, "--beside", "random", "oja", "--out", str(out)])
    config = json.loads((out / "config.json").read_text())
    assert (config["views"], config["inhibition"], config["adjoint_limit"]) == (
        "geometric", "none", 2.0,
    )  # fmt: skip
    of_pairs = vars(main.make_parser("polynomial").parse_args([]))
    assert [(c["degrees"], c["crop_padding"]) for c in (config, of_pairs)] == [(10.0, 0), (25.0, 2)]
    results = json.loads((out / "results.json").read_text())
    assert main.make_parser("unit_statistics").parse_args([]).beside == list(main.BESIDE)
    assert list(results["beside"]["mnist5k"]) == ["random", "oja"]
    assert all(len(values) == 2 for values in results["beside"]["mnist5k"].values())
    assert (out / "figures" / "beside_mnist5k.png").stat().st_size > 1000
    last = (out / "log.txt").read_text().splitlines()[-1]
    assert "test accuracy" in last and "+-" in last and "3 steps each" in last


@pytest.mark.parametrize(
    ("flags", "degrees"),
    [([], "25.0"), (["--rule", "unit_statistics"], "10.0"), (["--rule=unit_statistics"], "10.0")],
)
def test_help_tells_the_defaults_of_the_rule_that_is_named(capsys, flags, degrees):
    with pytest.raises(SystemExit):
        main.main([*flags, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"largest rotation of a view, in degrees (default: {degrees})" in text


@pytest.mark.parametrize("flags, said, not_said", [
    (["--rule", "krotov_hopfield"], "the rule\n", "in brackets"),
    (["--inhibition", "none"], "the rule; in brackets, the size of a term", "Δm"),
    ([], "Δm = ", "the rule\n"),
])  # fmt: skip
def test_the_rule_is_told_without_lines_that_say_nothing(tmp_path, flags, said, not_said):
    run(4, *TINY, *flags, "--out", tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert said in log and not_said not in log


def test_a_killed_run_of_unit_statistics_goes_on_to_the_same_numbers(tmp_path):
    flags = [*STATISTICS, "--metasteps", "12", "--start_from", "mnist32", "--beside"]
    run(6, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(11, "main.py", 6, *flags, "--out", out)
    assert (out / "checkpoint.pt").exists()
    run("--resume", tmp_path / "killed", "--quiet")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_from_before_lateral_powers_has_none(tmp_path, capsys):
    flags = [6, *STATISTICS, "--metasteps", "2", "--beside", "--lr", 1]
    rows_of = {}
    for power in (0, -0.75):
        run(*flags, "--lateral_power", power, "--out", tmp_path / str(power))
        rows_of[power] = rows(tmp_path / str(power))
    run(*flags, "--out", tmp_path / "default")
    assert rows(tmp_path / "default") == rows_of[-0.75] != rows_of[0]
    line = refused(capsys, main.main, *flags, "--terms", "w", "--lateral_power", 1)
    assert "--lateral_power needs a term with a lateral current" in line
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "0", old)
    as_begun_before(old, "lateral_power")
    run("--resume", old, "--quiet")
    assert outcome(old) == outcome(tmp_path / "0")


@pytest.mark.parametrize("value", ["9", "-3", "nan", "1e300"])
def test_how_long_evaluations_are_is_not_read_from_the_log(tmp_path, plain, capsys, value):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    lines = (out / "metrics.csv").read_text().splitlines()
    cells = lines[-1].split(",")
    cells[lines[0].split(",").index("inner_steps")] = value
    (out / "metrics.csv").write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    assert load_run(plain).steps == 2
    assert "metrics.csv is damaged" in refused(capsys, main.main, "--resume", out, "--quiet")
    (out / "metrics.csv").unlink()
    run("--resume", out, "--quiet")
    assert (out / "results.json").read_text() == (plain / "results.json").read_text()


def test_a_run_goes_on_neither_with_changed_flags_nor_with_another_runs_checkpoint(
    tmp_path, plain, capsys
):
    out, other = tmp_path / "run", tmp_path / "pca"
    shutil.copytree(plain, out)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"C": 1000.0', '"C": 10.0'))
    assert "of another run" in refused(capsys, main.main, "--resume", out, "--quiet")
    (out / "config.json").write_text(config)
    baseline_pca.main(["--dataset", "mnist5k", "--components", "2", "4", "--out", str(other),
                       "--quiet", "--no_figures"])  # fmt: skip
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        shutil.copy(other / name, out)
    assert "of another run" in refused(capsys, main.main, "--resume", out, "--quiet")


def test_flags_of_another_family_are_refused(capsys, tmp_path):
    for flags, said in (
        (["--rule", "unit_statistics", "--degree", "2"], "--rule polynomial"),
        (["--eps", "0.2"], "--rule unit_statistics"),
        (["--rule", "unit_statistics", "--terms", "x gain q"], "q"),
        (["--rule", "unit_statistics", "--beta", "3"], "--beta needs a term with share or won"),
        (["--rule", "unit_statistics", "--learn", "beta"], "--learn beta needs a term with share"),
    ):
        assert said in refused(
            capsys, main.main, 4, "--dataset", "mnist5k", *flags, "--out", tmp_path / "run"
        )


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, plain):
    for name, seed in (("same", 0), ("other", 1)):
        run(4, *TINY, "--seed", seed, "--out", tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(plain) != outcome(tmp_path / "other")


def test_a_search_learns_a_rule_in_place_of_hypergradients(tmp_path):
    rule = ["--rule", "unit_statistics", "--dataset", "mnist5k", "--horizon", "2", "4"]
    small = ["--metasteps", "3", "--finalists", "1", "--final_trainings", "1", "--batch_size", "64",
             "--evaluations", "1", "--evaluation_steps", "3", "--probe_images", "500", "--beside",
             "--threads", "1", "--quiet"]  # fmt: skip
    run(4, *rule, "--search", "random", *small, "--out", tmp_path / "run")
    tried = rows(tmp_path / "run")
    assert len(tried) == 4 and len({row["coefficient/1/w/x gain y"] for row in tried[:3]}) == 3
    best = min(tried[:3], key=lambda row: float(row["meta_loss"]))
    learned = load_rule(tmp_path / "run" / "rule.json").coefficients()
    assert learned["1/w/x gain y"] == pytest.approx(float(best["coefficient/1/w/x gain y"]))


def test_coefficients_are_recorded_as_they_were_when_the_loss_was_seen(plain):
    first, *later = rows(plain)
    coefficients = [name for name in first if name.startswith("coefficient/")]
    assert len(coefficients) == 35 + 10 + 20 + 1
    assert all(float(first[name]) == 0 for name in coefficients)
    assert all(any(float(row[name]) for name in coefficients) for row in later)


@pytest.mark.parametrize(
    "flags",
    [
        ["--pair_inputs"],
        ["--views", "masks", "--mask", "0.1", "0.5"],
        ["--center"],
        ["--conv", "2x9", "2x9"],
        ["--conv", "2x9", "--pool", "4"],
        ["--pixelwise_normalization"],
        ["--l1_reg", "1"],
        ["--sparsify"],
        ["--sparsify", "--sparsify_from", "1"],
        ["--raise_by", "1", "--raise_every", "1"],
        ["--C", "10"],
        ["--bound", "0"],
        ["--finetune_steps", "1"],
        ["--finetune_steps", "1", "--finetune_factor", "0.5"],
        ["--l2_coefficients", "10"],
        ["--ungraded_steps", "2"],
        ["--reinitialize_every", "2"],
        ["--reinitialize_every", "2", "--accumulate"],
        ["--products", "bfloat16"],
        ["--clip_grads"],
        ["--stop_below", "0.99"],
        ["--sample_outputs", "2"],
        ["--clip_grads", "--clip_norm", "5"],
        ["--inh_steps", "3", "--inh_factor", "0.5"],
        ["--inhibition", "l2"],
        ["--inhibition", "l1_image", "--conv", "3x5"],
        ["--inhibition", "equilibrium"],
        ["--l2_reg", "0.01"],
        ["--optimizer", "rmsprop"],
        ["--tasks", "2", "--decay", "cosine", "--average", "0.5"],
        ["--memory", "segments"],
        ["--forbid_self_inhibition", "--forbid_excitation"],
        ["--degree", "2"],
        ["--dtype", "float64"],
        ["--outer_images", "100"],
        ["--probe_images", "900"],
        ["--probe_gradient", "implicit"],
        ["--method", "truncated", "--K", "1"],
        ["--adjoint_limit", "0.5"],
        ["--loss_times", "2"],
        ["--units_range", "3", "9"],
        ["--probe", "sampled"],
        ["--probe", "sampled", "--probe_images", "100"],
        ["--probe", "ridge"],
        ["--probe", "ridge", "--probe_images", "100", "--outer_images", "50"],
        ["--method", "lookback", "--K", "2"],
        ["--method", "implicit", "--K", "1"],
        ["--method", "es", "--sigma", "1e-3", "--pairs", "1"],
        ["--method", "pes", "--K", "1", "--sigma", "1e-3", "--pairs", "1"],
        ["--held_out", "500"],
        ["--random_numbers", "device"],
    ],
    ids=" ".join,
)
def test_every_flag_changes_the_course_of_a_run(tmp_path, plain, flags):
    run(4, *TINY, *flags, "--out", tmp_path / "run")
    before, after = outcome(plain), outcome(tmp_path / "run")
    assert (before == after) == (flags[0] == "--memory")


def test_a_run_goes_on_with_the_random_numbers_that_it_began_with(tmp_path, plain, capsys):
    assert json.loads((plain / "config.json").read_text())["random_numbers"] == "host"
    flags = [*TINY, "--views", "mixed", "--random_numbers", "device", "--metasteps", 12]
    run(4, *flags, "--out", tmp_path / "whole")
    kill_at_row(11, "main.py", 4, *flags, "--out", tmp_path / "killed")
    run("--resume", tmp_path / "killed", "--quiet")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    line = refused(capsys, main.main, "--resume", tmp_path / "whole", "--random_numbers", "host")
    assert "random_numbers 'device' there, 'host' now" in line


def test_a_run_from_before_the_flag_has_random_numbers_of_the_host(tmp_path, plain, capsys):
    old = tmp_path / "old"
    shutil.copytree(plain, old)
    as_begun_before(old, "random_numbers", "beta", "lateral_power")
    line = refused(capsys, main.main, "--resume", old, "--random_numbers", "device")
    assert "random_numbers 'host' there, 'device' now" in line
    run("--resume", old, "--quiet")
    assert outcome(old) == outcome(plain)


def test_learned_views_are_recorded_saved_gone_on_with_and_the_same_when_resumed(tmp_path):
    flags = [*TINY, "--views", "mixed", "--noise", "0.1", "--center", "--lr", "0.1"]
    learn = ["--learn_views", "degrees", "noise"]
    run(4, *flags, *learn, "--out", tmp_path / "run")
    first, *_, last = rows(tmp_path / "run")
    assert (float(first["views/degrees"]), float(first["views/noise"])) == (25.0, 0.1)
    assert float(last["views/noise"]) != 0.1 and float(last["views/degrees"]) != 25.0
    saved = json.loads((tmp_path / "run" / "results.json").read_text())["views"]
    assert (saved["kind"], saved["mask"], saved["center"]) == ("mixed", [0.0, 0.7], True)
    assert saved["noise"] not in (0.1, float(last["views/noise"])) and saved["brightness"] == 0.5
    again = [4, *flags, *learn, "--start_from", tmp_path / "run", "--metasteps", 1]
    run(*again, "--out", tmp_path / "next")
    (going_on,) = rows(tmp_path / "next")
    assert float(going_on["views/noise"]) == pytest.approx(saved["noise"], rel=1e-6)
    before = outcome(tmp_path / "next")
    run("--resume", tmp_path / "next", "--quiet")
    assert outcome(tmp_path / "next") == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mask 0 0.5", "--mask needs --views masks or mixed"),
        ("--views masks --degrees 5", "--degrees needs --views geometric or mixed"),
        ("--pair_inputs --views masks", "--pair_inputs is --views geometric"),
        ("--views masks --mask 0.5 0.1", "mask must be LOW HIGH"),
        ("--views mixed --learn_views noise", "start above 0"),
        ("--learn_views noise", "--learn_views needs --views"),
        ("--views mixed --learn_views degrees --method lookback", "does not reach"),
        ("--rule krotov_hopfield --views masks", "--views needs --rule polynomial"),
        ("--center --pixelwise_normalization", "--center needs no --pixelwise_normalization"),
    ],
)
def test_views_that_there_are_not_are_refused_in_one_line(capsys, tmp_path, flags, said):
    assert said in refused(capsys, main.main, 4, *TINY, *flags.split(), "--out", tmp_path / "run")


def test_a_run_of_random_horizons_is_judged_at_the_longest(tmp_path):
    flags = [flag for flag in TINY if flag not in ("--initial_inner_steps", "--max_inner_steps")]
    flags = [flag for flag in flags if flag not in ("2", "4")]
    run(4, *flags, "--horizon", 2, 6, "--tasks", 2, "--out", tmp_path / "run")
    horizons = [float(row["inner_steps"]) for row in rows(tmp_path / "run")]
    assert len(set(horizons)) > 1 and all(2 <= n <= 6 for n in horizons)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["inner_steps"] for row in results["evaluations"]] == [6]
    assert load_run(tmp_path / "run").steps == 6


@pytest.fixture
def two_sets(monkeypatch):
    """mnist5k, and under the name of fashion the same images upside down."""

    def load(name, data_dir):
        data = load_images("mnist5k", data_dir)
        if name == "fashion":
            data = [
                replace(part, images=part.images.flip(2), source="upside down") for part in data
            ]
        return data

    monkeypatch.setattr(main, "load_images", load)


def test_a_run_on_two_data_sets_reports_each_and_their_mean(tmp_path, two_sets):
    out = tmp_path / "run"
    flags = ["--dataset", "mnist5k", "--dataset", "fashion", "--tasks", 2, "--evaluations", 2]
    run(4, *TINY[2:], *flags, "--out", out)
    assert json.loads((out / "config.json").read_text())["dataset"] == ["mnist5k", "fashion"]
    for row in rows(out):
        for name in ("meta_loss", "train_accuracy", "test_accuracy"):
            parts = [float(row[f"{name}/{part}"]) for part in ("mnist5k", "fashion")]
            assert float(row[name]) == pytest.approx(sum(parts) / 2)
    results = json.loads((out / "results.json").read_text())
    assert [row["dataset"] for row in results["evaluations"]] == ["mnist5k"] * 2 + ["fashion"] * 2
    each = [results["by_dataset"][n]["test_accuracy_mean"] for n in ("mnist5k", "fashion")]
    assert results["test_accuracy_mean"] == pytest.approx(sum(each) / 2)
    assert "upside down" in results["data"]
    assert load_run(out).datasets == ["mnist5k", "fashion"]
    before = outcome(out)
    run("--resume", out, "--quiet")
    assert outcome(out) == before


def test_learned_views_are_shared_by_two_data_sets(tmp_path, two_sets):
    flags = ["--dataset", "mnist5k", "--dataset", "fashion", "--tasks", 2, "--lr", 0.1]
    views = ["--views", "masks", "--noise", 0.1, "--learn_views", "noise"]
    run(4, *TINY[2:], *flags, *views, "--out", tmp_path / "run")
    assert float(rows(tmp_path / "run")[-1]["views/noise"]) != 0.1


def test_two_data_sets_need_two_tasks(capsys, tmp_path, two_sets):
    flags = [4, *TINY, "--dataset", "fashion", "--out", tmp_path / "run"]
    assert "2 data sets need 2 tasks" in refused(capsys, main.main, *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_of_windows_is_judged_at_the_length_of_its_trainings(tmp_path):
    flags = ["--method", "pes", "--K", 2, "--max_inner_steps", 5, "--initial_inner_steps", 5]
    run(4, *TINY, *flags, "--metasteps", 4, "--out", tmp_path / "run")
    assert {row["inner_steps"] for row in rows(tmp_path / "run")} == {"2.0"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["inner_steps"] for row in results["evaluations"]] == [5]
    assert load_run(tmp_path / "run").steps == 5


def test_a_run_can_start_from_what_another_has_learned(tmp_path, plain):
    run(4, 3, *TINY, "--start_from", plain, "--metasteps", "1", "--out", tmp_path / "run")
    learned = load_rule(plain / "rule.json").rules[0].coefficients()
    initial = json.loads((plain / "results.json").read_text())["initializer"]
    (first,) = rows(tmp_path / "run")
    for name, value in learned.items():
        for layer in (1, 2):
            assert float(first[f"coefficient/{layer}/{name}"]) == pytest.approx(value, abs=1e-12)
    for name, value in initial.items():
        assert float(first[f"initial/{name}"]) == pytest.approx(value, rel=1e-6)


def test_a_started_run_is_resumed_from_another_folder_and_without_the_run_it_began_with(
    tmp_path, plain, monkeypatch
):
    shutil.copytree(plain, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    run(4, *TINY, "--start_from", "other", "--metasteps", "1", "--out", "run")
    before = outcome(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["start_from"] == str(tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    monkeypatch.chdir(ROOT)
    run("--resume", tmp_path / "run", "--quiet")
    assert outcome(tmp_path / "run") == before


def test_a_start_that_does_not_fit_is_refused_in_one_line(capsys, tmp_path, plain):
    out = ["--out", tmp_path / "run"]
    start = [4, *TINY, "--start_from", plain]
    assert "degree" in refused(capsys, main.main, *start, "--degree", 2, *out)
    assert "views" in refused(capsys, main.main, *start, "--pair_inputs", *out)
    nowhere = ["--start_from", tmp_path / "none", *out]
    assert "rules of the zoo are" in refused(capsys, main.main, 4, *TINY, *nowhere)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--metasteps", "22", "--sparsify", "--sparsify_from", "10", "--average", "0.9"]
    run(4, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(7, "main.py", 4, *flags, "--out", out)  # before the first checkpoint
    kill_at_row(18, "main.py", "--resume", out, "--quiet")  # after one, without some terms
    run("--resume", tmp_path / "killed", "--quiet")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for name in ("results.json", "rule.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("kilobytes", [8, 24])  # within metrics.csv; within a later, larger file
def test_a_run_whose_disk_fills_up_is_one_line_and_goes_on_when_there_is_room(tmp_path, kilobytes):
    flags = [*TINY, "--metasteps", 8]
    run(4, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "full"
    size = 1024 * kilobytes
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "runpy.run_path('main.py', run_name='__main__')\n"
    )
    process = Command(script, 4, *flags, "--out", out, stderr=tmp_path / "stderr.txt")
    assert process.wait(120) == 2
    said = (tmp_path / "stderr.txt").read_text()
    assert said.startswith("error: can't write") and said.count("\n") == 1
    run("--resume", out, "--quiet")
    assert outcome(out) == outcome(tmp_path / "whole")


def test_an_interrupted_run_ends_cleanly_with_figures_and_status_130(tmp_path):
    out = tmp_path / "run"
    interrupt_at_row(3, main.main, 4, *TINY, "--metasteps", "100000", "--out", out)
    assert (out / "figures" / "meta_loss.png").exists() and (out / "checkpoint.pt").exists()
    assert (out / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["0"], "at least 1"),
        (["32", "--no_such_flag"], "no_such_flag"),
        (["32", "--optimizer", "sgd"], "adam"),
        (["32", "--lr", "fast"], "above 0"),
        (["32", "--device", "cuda:7"], "cuda:7"),
        (["32", "--batch_size", "5000", "--dataset", "mnist5k"], "4000"),
        (["32", "--threads", "0"], "at least 1"),
        (["32", "--bound", "-1"], "at least 0"),
        ([], "no layer"),
        (["--conv", "16*5"], "16x5"),
        (["--conv", "4x20", "4x20", "--dataset", "mnist5k"], "smaller kernels"),
        (["32", "--pool", "3"], "--conv"),
        (["32", "--K", "3"], "--method truncated"),
        (["32", "--pairs", "3"], "--method es"),
        (["32", "--method", "pes", "--reinitialize_every", "2"], "another method than pes"),
        (["32", "--method", "pes", "--horizon", "20", "40"], "another method than pes"),
        (["32", "--method", "pes", "--sparsify", "--dataset", "mnist5k"], "keep all coefficients"),
        (["32", "--method", "pes", "--units_range", "3", "9", "--dataset", "mnist5k"], "width"),
        (["32", "--method", "es", "--memory", "keep"], "--method reverse"),
        (["32", "--method", "implicit", "--compile"], "--method reverse"),
        (
            [
                "32",
                "--dataset",
                "mnist5k",
                "--probe_gradient",
                "implicit",
                "--outer_images",
                "4000",
            ],
            "holds out 4000",
        ),
        (["32", "--threads", "99999999999"], "cores"),
        (["32", "--initial_inner_steps", "300"], "--max_inner_steps"),
        (["32", "--raise_by", "40", "--initial_inner_steps", "250"], "--initial_inner_steps"),
        (["32", "--compile", "--sparsify"], "leave one out"),
        (["32", "--average", "1", "--dataset", "mnist5k"], "average 1: a decay must be"),
        (["32", "--no-clip_grads", "--clip_norm", "3"], "needs --clip_grads"),
        (["32", "--search", "tpe", "--lr", "1"], "without --search"),
        (["32", "--finalists", "2"], "needs --search"),
        (["4", "3", "--layerwise", "--trainings_below", "2"], "--steps_below"),
        (["32", "--held_out", "4000", "--dataset", "mnist5k"], "cannot hold out 4000"),
        (["32", "--raise_by", "0", "--raise_every", "3"], "needs --raise_by"),
        (["32", "--accumulate"], "--reinitialize_every"),
        (["32", "--memory_limit", "1", "--memory", "keep"], "--memory fit"),
        (["32", "--adjoint_limit", "2", "--method", "es"], "--method reverse or truncated"),
        (["32", "--loss_times", "2", "--method", "forward"], "--method reverse or truncated"),
        (["32", "--horizon", "21", "20"], "a smaller and a larger number"),
        (["32", "--horizon", "20", "40", "--initial_inner_steps", "30"], "needs no --horizon"),
        (["32", "--horizon", "20", "40", "--raise_by", "5"], "needs no --horizon"),
        (
            ["32", "--rule", "unit_statistics", "--initial_inner_steps", "10"],
            "is 40 250 by default with --rule unit_statistics: give --horizon 10 10 in its place",
        ),
        (
            ["32", "--rule", "unit_statistics", "--raise_by", "10"],
            "give --horizon LOW HIGH in its place",
        ),
        (["32", "--method", "implicit", "--dataset", "mnist5k"], "all coefficients 0 does not"),
        (
            ["32", "--inhibition", "equilibrium", "--method", "forward"],
            "--inhibition equilibrium has no forward mode",
        ),
        (["32", "--probe", "ridge", "--probe_gradient", "implicit"], "--probe logistic"),
        (["32", "--probe", "ridge", "--probe_images", "3000", "--dataset", "mnist5k"], "of 4000"),
        (["32", "--units_range", "9", "3"], "a smaller and a larger number"),
        (["--conv", "4x5", "--units_range", "3", "9"], "needs a layer of units"),
        (["32", "--units_range", "3", "9", "--compile"], "leave one out"),
        (["32", "--adjoint_limit", "0"], "a number above 0"),
        (["32", "--delta", "0.1"], "--rule krotov_hopfield"),
        (["32", "--rule", "krotov_hopfield", "--degree", "2"], "--rule polynomial"),
        (["32", "--products", "bfloat16", "--dtype", "float64"], "--dtype float32"),
        (["32", "--inhibition", "none", "--forbid_excitation"], "lateral"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    where = ["--out", tmp_path / "run"]
    assert message in refused(capsys, main.main, *flags, *where)


def test_a_refused_batch_size_leaves_no_directory_behind(capsys, tmp_path):
    refused(capsys, main.main, 4, *TINY, "--batch_size", 5000, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_other_images(capsys, tmp_path, plain, monkeypatch):
    other = [data.__class__(data.images[1:], data.labels[1:], "other")
             for data in load_images("mnist5k", tmp_path)]  # fmt: skip
    monkeypatch.setattr(main, "load_images", lambda *_: other)
    assert "other data: " in refused(capsys, main.main, "--resume", plain, "--quiet")


def test_a_rule_that_trains_nothing_finite_is_saved_all_the_same(tmp_path):
    run(4, *TINY, "--bound", 0, "--lr", 1e30, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "rule.json").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["evaluations"] == [] and results["test_accuracy_mean"] is None


def test_evaluations_take_as_many_steps_as_the_last_meta_step(plain):
    results = json.loads((plain / "results.json").read_text())
    assert [row["inner_steps"] for row in results["evaluations"]] == [2]


def test_an_output_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, main.main, 4, *TINY, "--out", tmp_path / "file" / "run")


def test_resuming_with_another_configuration_is_refused(capsys, tmp_path, plain):
    line = refused(capsys, main.main, "--resume", plain, "--lr", "0.5", "--quiet")
    assert "lr" in line and "0.5" in line
    assert "no" in refused(capsys, main.main, "--resume", tmp_path / "nothing")


def test_a_new_rule_changes_nothing_but_clamps_the_weights(tmp_path):
    args = main.parse(main.make_parser(), ["16", *TINY])
    rule = main.make_rule(args, {})
    assert all(torch.equal(p, torch.zeros_like(p)) for p in rule.parameters())
    train_data, _ = load_images("mnist5k", tmp_path)
    network = main.make_model(args, (1, 28, 28))
    params = main.make_initializer(args)(network, torch.Generator().manual_seed(0))
    x = train_data.floats(slice(0, 8))
    after = rule.update(network, params, x)
    for old, new in zip(params[1].values(), after[1].values(), strict=True):
        assert torch.equal(old.clamp(-1, 1), new)


@pytest.mark.slow
def test_a_compiled_run_sees_the_same_numbers_up_to_rounding(tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        run(8, 5, *TINY, "--dtype", "float64", *flags, "--out", tmp_path / name)
    for eager, compiled in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        numbers = [[float(value) for value in row.values()] for row in (eager, compiled)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_two_hundred_meta_steps_teach_more_than_random_features_know(tmp_path):
    flags = [
        "--lr", "1e-4", "--clip_grads", "--decay", "cosine", "--warmup_steps", "10",
        "--batch_size", "256", "--initial_inner_steps", "50", "--max_inner_steps", "50",
        "--metasteps", "200", "--evaluations", "3", "--quiet",
    ]  # fmt: skip
    run(32, *flags, "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    first = float(rows(tmp_path / "run")[0]["test_accuracy"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test_accuracy_mean"] > max(first + 0.05, 0.84)


@pytest.mark.parametrize("saved", [[[4, 1e9]], [[4, 10**9]], [[4]], [["a", "b"]], 5, [5]])
def test_convolutions_of_a_damaged_configuration_are_refused(tmp_path, capsys, plain, saved):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    config = json.loads((out / "config.json").read_text()) | {"conv": saved}
    (out / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged: conv" in refused(capsys, main.main, "--resume", out)


# ---- command lines of the original ----


@pytest.mark.parametrize(
    "line",
    [
        "32 --lr 1e-5 --metasteps 2000",
        "256 32 --lr 1e-5 --metasteps 2000",
        "32 --pair_inputs --lr 1e-5 --metasteps 1000",
        "256 32 --pair_inputs --lr 1e-5 --metasteps 1000",
    ],
)
def test_the_examples_of_the_original_run_literally(tmp_path, line):
    out = tmp_path / "run"
    here = ["--dataset", "mnist5k", "--initial_inner_steps", "1", "--evaluations", "1"]
    few = ["--probe_images", "100", "--outer_images", "50", "--batch_size", "64"]
    tiny = ["--max_inner_steps", "1", "--metasteps", "1", "--beside", "--quiet"]
    run(*line.split(), *here, *few, *tiny, "--out", out)
    assert len(rows(out)) == 1 and (out / "results.json").exists()


@pytest.mark.parametrize(
    ("line", "layers", "clip", "sparsify"),
    [
        ("--clip_grads 5 32", [32], 5, None),
        ("32 --clip_grads 5", [32], 5, None),
        ("--clip_grads=5 32", [32], 5, None),
        ("--clip_grads=32 --conv 3x5", [], 32, None),
        ("32 --clip_grads", [32], 100, None),
        ("--clip_grads --lr 1e-3 32", [32], 100, None),
        ("--rule unit_statistics --no-clip_grads 32", [32], None, None),
        ("--rule unit_statistics --clip_grads 5 32", [32], 5, None),
        ("--sparsify 100 32", [32], 100, 100),
        ("32 --sparsify", [32], 100, 0),
        ("--sparsify 100 --clip_grads 5 256 32", [256, 32], 5, 100),
    ],
)
def test_a_switch_of_the_original_takes_its_number_where_layers_stand_beside_it(
    line, layers, clip, sparsify
):
    args, _ = main.parse_flags(line.split())
    settings = main.make_settings(args)
    assert args.layers == layers
    assert (settings.clip_norm, settings.sparsify_from) == (clip, sparsify)


@pytest.mark.parametrize(
    ("line", "variance", "center"),
    [
        ("32 --pixelwise_normalization", True, False),
        ("--pixelwise_normalization mean 32", False, True),
        ("32 --rule unit_statistics --pixelwise_normalization", True, True),
    ],
)
def test_pixels_are_normalised_or_centred_alone(line, variance, center):
    args, parser = main.parse_flags([*line.split(), "--dataset", "mnist5k"])
    main.refuse_flags_without_effect(args, parser)
    assert (args.pixelwise_normalization, args.center) == (variance, center)
    train, _ = main.make_data(args, "mnist5k", ALONE, torch.device("cpu"))
    assert train.shift is not None and (train.scale is not None) == variance


def test_a_switch_with_its_number_is_resumed(tmp_path):
    out = tmp_path / "run"
    run(4, *TINY, "--clip_grads", 5, "--sparsify", 1, "--out", out)
    run("--resume", out, "--quiet")
    run("--clip_grads", 5, "--resume", out, "--quiet")
    config = json.loads((out / "config.json").read_text())
    assert config["clip_grads"] is True and config["clip_norm"] == 5.0
    assert config["sparsify"] is True and config["sparsify_from"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--clip_grads 32", "write 32 --clip_grads, or --clip_grads=5 32"),
        ("--conv 3x5 --clip_grads 32", "write 32 --clip_grads, or --clip_grads=5 32"),
        ("--sparsify 32 --conv 3x5", "write 32 --sparsify, or --sparsify=5 32"),
        ("--sparsify 100 --clip_grads 32", "write 32 --clip_grads, or --clip_grads=5 32"),
        ("--clip_grads 0 32", "a number above 0"),
        ("--sparsify 1.5 32", "a whole number"),
        ("--conv 3x5 32", "layers stand before --conv"),
        ("--rule unit_statistics --conv 3x5 --terms x 32", "layers stand before --terms"),
        ("--rule unit_statistics --learn eta 32", "layers stand before --learn"),
        ("--beside 32", "layers stand before --beside"),
        ("--views mixed --learn_views degrees 32", "layers stand before --learn_views"),
        ("--layerwise --steps_below 250 32", "before flags that take several numbers"),
        ("--pixelwise_normalization 32", "must be mean, or nothing, not '32'; layers stand before"),
        ("32 --clip_grads 5 16", "unrecognized arguments: 16"),
    ],
)
def test_a_layer_is_never_lost_to_a_flag(capsys, line, said):
    assert said in refused(capsys, main.main, *line.split())


def test_a_run_that_holds_no_ordinary_file_is_refused_and_not_waited_for(tmp_path, plain):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    (out / "checkpoint.pt").unlink()
    os.mkfifo(out / "checkpoint.pt")
    with pytest.raises(RunLogError, match="no ordinary file"):
        load_run(out)
