"""Real sweeps of a small command: what they record, how they end, are gone on with, are refused."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import redraw, refused
from forked import ROOT, Command

import sweep
from experiment.command_line import UserError
from sweeps.points import random_point
from sweeps.space import searched_flag

COMMAND = """
import argparse, json, os, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser(prog="command.py")
for name, kind in (("x", float), ("k", int), ("mode", str), ("steps", int), ("pause", float)):
    parser.add_argument("--" + name, type=kind)
parser.add_argument("--threads")
parser.add_argument("--out", type=Path)
parser.add_argument("--quiet", action="store_true")
parser.add_argument("--no_figures", action="store_true")
args = parser.parse_args()
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
if args.k == 7:
    parser.error("k must not be 7")
args.out.mkdir(parents=True)
with (args.out / "metrics.csv").open("w") as file:
    print("step,loss", file=file)
    for step in range(1, (args.steps or 1) + 1):
        print(f"{step},{args.x + 1 / step}", file=file, flush=True)
        time.sleep(args.pause or 0)
        if ended:
            (args.out / "cleanly").touch()
            sys.exit(130)
if args.mode == "crash":
    raise ValueError("ours")
if args.mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if args.mode == "diverge":
    sys.exit("error: step 3, loss nan")
value = {"nan": float("nan"), "text": "low"}.get(args.mode, args.x)
threads = int(os.environ["OMP_NUM_THREADS"])
results = {"losses": [{"validation": value}], "threads": threads, "k": args.k}
(args.out / "results.json").write_text(json.dumps(results))
"""
METRIC = ["--metric", "losses.0.validation"]


@pytest.fixture
def command(tmp_path) -> Path:
    path = tmp_path / "command.py"
    path.write_text(COMMAND)
    return path


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures("--no_figures", *flags)


def run_with_figures(*flags) -> None:
    sweep.main(["--quiet", *map(str, flags)])


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def wait_for(condition, process: Command) -> None:
    for _ in range(600):
        assert process.poll() is None, "the sweep ended too early"
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not within half a minute")


def drawn(text: str, count: int, seed: int = 0) -> list:
    flag = searched_flag(text)
    return [random_point([flag], seed, number)[flag.name] for number in range(count)]


# ---- what a sweep records ----


def test_a_sweep_leaves_its_table_results_and_figures(tmp_path, command):
    out = tmp_path / "sweep"
    search = ["--search", "x=-1:1", "--trials", 4, "--workers", 2, "--seed", 3]
    run_with_figures("--out", out, *METRIC, *search, "--", command, "--k", 2)
    found = table(out)
    assert list(found[0]) == [
        *("number", "variant", "draw", "state", "value", "x"),
        *("exit_status", "error", "seconds", "directory"),
    ]
    assert [row["state"] for row in found] == ["done"] * 4
    assert [float(row["x"]) for row in found] == drawn("x=-1:1", 4, seed=3)
    assert [row["value"] for row in found] == [row["x"] for row in found]
    assert [Path(row["directory"]).name for row in found] == [f"trial-0000{i}" for i in range(4)]
    best = results(out)["best"]
    assert best["value"] == best["x"] == min(drawn("x=-1:1", 4, seed=3))
    assert best["command"] == f"python {command} --k 2 --x".replace("--x", f"--x={best['x']}")
    assert results(out)["trials"] == {"done": 4}
    for name in ("best.png", "flags.png"):
        assert (out / "figures" / name).stat().st_size > 1000
    redraw(out)


def test_a_sweep_without_figures_leaves_none(tmp_path, command):
    flags = [*METRIC, "--search", "x=0:1", "--trials", 1, "--no_figures"]
    run_with_figures("--out", tmp_path / "sweep", *flags, "--", command)
    assert results(tmp_path / "sweep")["trials"] == {"done": 1}
    assert not (tmp_path / "sweep" / "figures").exists()


def test_every_way_to_fail_is_recorded_and_the_sweep_goes_on(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    modes = ["well", "crash", "killed", "diverge", "nan", "text"]
    search = ["--search", f"mode=choice:{','.join(modes)}", "--method", "grid"]
    run("--out", out, *METRIC, *search, "--", command, "--x", 1)
    found = {row["mode"]: row for row in table(out)}
    ends = {mode: (row["state"], row["exit_status"], row["error"]) for mode, row in found.items()}
    assert ends == {
        "well": ("done", "0", ""),
        "crash": ("failed", "1", "ValueError: ours"),
        "killed": ("failed", "-9", "ended by SIGKILL"),
        "diverge": ("diverged", "1", "error: step 3, loss nan"),
        "nan": ("diverged", "0", "losses.0.validation is nan"),
        "text": ("failed", "0", "losses.0.validation in results.json is 'low', not a number"),
    }
    assert results(out)["trials"] == {"done": 1, "diverged": 2, "failed": 3}
    assert results(out)["mean"] == results(out)["best"]["value"] == 1.0
    assert "Traceback" in (out / "trial-00001" / "stderr.txt").read_text()
    assert "3 failed; trial 1 with: ValueError: ours" in capsys.readouterr().err


def test_a_sweep_none_of_whose_trials_is_done_says_so_by_its_exit_status(tmp_path, command):
    out = tmp_path / "sweep"
    search = ["--search", "mode=choice:diverge,crash,text", "--method", "grid"]
    with pytest.raises(SystemExit, match="error: no trial is done"):
        run("--out", out, *METRIC, *search, "--", command, "--x", 1)
    assert results(out)["trials"] == {"diverged": 1, "failed": 2}


def test_variants_run_on_the_same_draws_each_in_a_study_of_its_own(tmp_path, command):
    out = tmp_path / "sweep"
    variants = ["--variant", "one=--k 1", "--variant", "two=--k 2"]
    flags = ["--metric", "k", "--search", "x=0:1", "--trials", 3, *variants]
    run("--out", out, *flags, "--", command)
    found = table(out)
    assert [row["variant"] for row in found] == ["one"] * 3 + ["two"] * 3
    assert [float(row["x"]) for row in found] == 2 * drawn("x=0:1", 3)
    assert [float(row["value"]) for row in found] == [1] * 3 + [2] * 3
    assert results(out)["variants"]["two"]["best"]["directory"] == str(out / "two/trial-00000")
    run("--resume", out, "--trials", 4, "--", command)
    assert [row["value"] for row in table(out) if row["variant"] == "two"] == ["2.0"] * 4


def test_the_direction_says_which_trial_is_best(tmp_path, command):
    out = tmp_path / "sweep"
    flags = ["--search", "x=step:0:1:0.5", "--method", "grid", "--direction", "maximize"]
    run("--out", out, *METRIC, *flags, "--", command)
    assert [row["x"] for row in table(out)] == ["0.0", "0.5", "1.0"]
    assert results(out)["best"]["value"] == 1.0


def test_bad_trials_are_ended_early_and_cleanly(tmp_path, command):
    out = tmp_path / "sweep"
    flags = ["--method", "asha", "--watch", "loss", "--reduction", 2, "--search", "x=0:1"]
    arguments = [*METRIC, *flags, "--trials", 5, "--workers", 2]
    run("--out", out, *arguments, "--", command, "--steps", 12, "--pause", 0.1)
    found = table(out)
    pruned = [row for row in found if row["state"] == "pruned"]
    done = [row for row in found if row["state"] == "done"]
    assert pruned and done and len(pruned) + len(done) == 5
    for row in pruned:
        assert row["exit_status"] == "130" and (Path(row["directory"]) / "cleanly").exists()
        assert not (Path(row["directory"]) / "results.json").exists()
    assert results(out)["best"]["x"] == min(drawn("x=0:1", 5)), "the best is never ended"


def test_with_other_methods_trials_worse_than_the_median_are_ended(tmp_path, command):
    out = tmp_path / "sweep"
    flags = ["--method", "grid", "--watch", "loss", "--startup", 2, "--min_steps", 2]
    search = ["--search", "x=choice:0.1,0.2,0.9,0.05"]
    run("--out", out, *METRIC, *flags, *search, "--", command, "--steps", 12, "--pause", 0.1)
    assert [row["state"] for row in table(out)] == ["done", "done", "pruned", "done"]


@pytest.mark.parametrize(("workers", "share"), [(1, sweep.cores()), (1000, 1)])
def test_each_worker_has_its_share_of_the_cores(tmp_path, command, workers, share):
    out = tmp_path / "sweep"
    flags = ["--metric", "threads", "--search", "x=0:1", "--trials", 1, "--workers", workers]
    run("--out", out, *flags, "--", command)
    assert results(out)["best"]["value"] == share


def test_a_command_with_threads_keeps_them(tmp_path, command, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    out = tmp_path / "sweep"
    flags = ["--metric", "threads", "--search", "x=0:1", "--trials", 1]
    run("--out", out, *flags, "--", command, "--threads", 3)
    assert results(out)["best"]["value"] == 5, "the environment is left as it is"


# ---- a stranger's sweep ----


def test_a_resumed_sweep_runs_commands_of_this_project_only(tmp_path, command, capsys):
    out, flags = tmp_path / "sweep", [*METRIC, "--search", "x=0:1", "--trials", 1]
    run("--out", out, *flags, "--", command)
    count = len(list(out.iterdir()))
    more = ("--resume", out, "--trials", 2)
    assert "is no command of this project" in refused(capsys, sweep.main, *more)
    (out / "config.json").write_text(
        (out / "config.json").read_text().replace(str(command), str(tmp_path / "main.py"))
    )
    command.rename(tmp_path / "main.py")
    assert "is no command of this project" in refused(capsys, sweep.main, *more)
    assert len(list(out.iterdir())) == count


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["main.py", "8"], None),
        (["tune_one_pass.py", "-S", "/tmp/x"], "with -S, which writes outside"),
        (["tune_one_pass.py", "-S/tmp/x"], "writes outside"),
        (["tune_one_pass.py", "--save_state=/tmp/x"], "writes outside"),
        (["evaluate.py", "latent-predictive", "--to_zoo", "x"], "writes outside"),
        (["main.py", "8", "--data-dir", "/nowhere/at/all"], "writes outside"),
        (["main.py", "8", "--data-dir", "/"], None),
        (["plot.py", "rules"], "no command of this project"),
        (["sweep.py"], "no command of this project"),
        ([], "no list of words"),
        (["main.py", 8], "no list of words"),
        ("main.py", "no list of words"),
    ],
)
def test_what_a_resumed_sweep_would_write_elsewhere_has_to_be_asked_for(
    tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps({"command": "sweep", "trial_command": words}))
    if said is None:
        assert sweep.saved_command(tmp_path) == words
    else:
        with pytest.raises(UserError, match=said):
            sweep.saved_command(tmp_path)


def test_places_are_nothing_to_search_and_a_storage_is_asked_for_again(tmp_path, command, capsys):
    out, flags = tmp_path / "sweep", [*METRIC, "--trials", 1]
    search = ["--search", "save_state=choice:/tmp/x,/tmp/y"]
    assert "nothing to search" in refused(
        capsys, sweep.main, "--out", out, *flags, *search, "--", command
    )
    url = f"sqlite:///{tmp_path}/study.db"
    run("--out", out, *flags, "--search", "x=0:1", "--storage", url, "--", command)
    line = refused(capsys, sweep.main, "--resume", out, "--", command)
    assert "--storage" in line and "give that again" in line
    run("--resume", out, "--storage", url, "--", command)


def test_trials_are_not_written_through_a_link(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    run("--out", out, *METRIC, "--search", "x=0:1", "--trials", 1, "--", command)
    (out / "trial-00001").symlink_to(tmp_path)
    line = refused(capsys, sweep.main, "--resume", out, "--trials", 2, "--", command)
    assert "trial-00001 is a symbolic link" in line


# ---- going on ----


def test_a_sweep_killed_at_any_moment_goes_on_to_the_same_values(tmp_path, command):
    out = tmp_path / "sweep"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 4, "--workers", 2]
    arguments = ["--quiet", "--out", out, *flags, "--", command, "--steps", 6, "--pause", 0.1]
    process = Command("sweep.py", *arguments)
    wait_for(lambda: (out / "trial-00003" / "metrics.csv").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("--resume", out, "--", command, "--steps", 6, "--pause", 0.1)
    found = table(out)
    again = [row for row in found if row["state"] == "interrupted"]
    done = [row for row in found if row["state"] == "done"]
    assert again and sorted(float(row["x"]) for row in done) == sorted(drawn("x=0:1", 4))
    assert len({row["directory"] for row in found}) == 4 + len(again)
    for row in again:
        assert (Path(row["directory"]) / "cleanly").exists(), "it ended with the sweep"


def test_an_interrupted_sweep_ends_its_trials_cleanly_and_goes_on(tmp_path, command):
    out = tmp_path / "sweep"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 3, "--workers", 2, "--out", out, "--quiet"]
    process = Command("sweep.py", *flags, "--", command, "--steps", 10, "--pause", 0.1)
    wait_for(lambda: (out / "trial-00001" / "metrics.csv").exists(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert [row["state"] for row in table(out)] == ["interrupted"] * 2 + ["waiting"] * 2
    assert (out / "trial-00000" / "cleanly").exists() and (out / "figures" / "best.png").exists()
    run("--resume", out, "--", command, "--steps", 10, "--pause", 0.1)
    done = [float(row["x"]) for row in table(out) if row["state"] == "done"]
    assert sorted(done) == sorted(drawn("x=0:1", 3))


def test_sweeps_that_share_a_directory_run_every_draw_once(tmp_path, command):
    out = tmp_path / "sweep"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 8, "--out", out, "--quiet"]
    arguments = [*flags, "--", command, "--pause", 0.2]
    processes = [Command("sweep.py", *arguments) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    # whoever reported last may not have seen the other's last trial
    run("--resume", out, "--", command, "--pause", 0.2)
    assert [row["state"] for row in table(out)] == ["done"] * 8
    assert sorted(float(row["x"]) for row in table(out)) == sorted(drawn("x=0:1", 8))
    assert len(list((out / "processes").iterdir())) == 3


def test_a_sweep_goes_on_with_more_trials(tmp_path, command):
    out = tmp_path / "sweep"
    run("--out", out, *METRIC, "--search", "x=0:1", "--trials", 1, "--", command)
    run("--resume", out, "--trials", 3, "--", command)
    assert [float(row["x"]) for row in table(out)] == drawn("x=0:1", 3)


def test_a_study_that_has_lost_its_last_trials_is_refused(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    run("--out", out, *METRIC, "--search", "x=0:1", "--trials", 2, "--", command)
    before = (out / "results.json").read_text()
    lines = (out / "study.journal").read_bytes().splitlines(keepends=True)
    (out / "study.journal").write_bytes(b"".join(lines[: len(lines) // 2 - 3]))
    line = refused(capsys, sweep.main, "--resume", out, "--", command)
    assert "study.journal is damaged: the study does not know" in line and "trial-00001" in line
    assert (out / "results.json").read_text() == before


def test_a_share_is_so_many_trials(tmp_path, command):
    out = tmp_path / "sweep"
    flags = ["--search", "x=0:1", "--trials", 3, "--share", 2]
    run("--out", out, *METRIC, *flags, "--", command)
    assert len(table(out)) == 2
    run("--resume", out, "--", command)
    assert len(table(out)) == 3


def test_a_database_holds_the_study_instead_of_a_journal(tmp_path, command):
    url = f"sqlite:///{tmp_path}/study.db"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 2, "--storage", url, "--study", "rates"]
    run("--out", tmp_path / "here", *flags, "--share", 1, "--", command)
    run("--out", tmp_path / "there", *flags, "--", command)
    assert [Path(row["directory"]).parent.name for row in table(tmp_path / "there")] == [
        *("here", "there"),
    ]


# ---- SLURM ----


def test_the_job_array_shares_the_trials_and_runs_as_it_is_written(tmp_path, command, capsys):
    script, out = tmp_path / "job.sh", tmp_path / "a sweep"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 5, "--workers", 2, "--out", out]
    sweep.main([*map(str, [*flags, "--slurm", script, "--array_tasks", 2, "--", command])])
    assert not out.exists() and f"submit it: sbatch {script}\n" in capsys.readouterr().out
    lines = script.read_text().splitlines()
    assert {"#SBATCH --array=0-1", "#SBATCH --cpus-per-task=2"} < set(lines)
    assert lines[0] == "#!/bin/bash" and "--share 3" in lines[-1]
    subprocess.run(["bash", script], cwd=tmp_path, check=True)
    assert [row["state"] for row in table(out)] == ["done"] * 3


# ---- refused ----


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--method", "annealing"],
            "choose from 'random', 'tpe', 'gp', 'population', 'asha', 'grid'",
        ),
        (["--search", "x=log:0:1"], "NAME=log:LOW:HIGH (LOW above 0), not 'x=log:0:1'"),
        (["--search", "x"], "must be one of NAME=log:LOW:HIGH"),
        (["--search", "x=0:1", "x=0:2"], "x comes twice"),
        (["--search", "y.1=0:1", "y.3=0:1"], "y must be those from 1 on, each once"),
        (["--search", "x.1-2=0:1"], "x must be those from 1 on, each once"),
        (["--search", "value=0:1"], "value is a column"),
        (["--search", "out=choice:a,b"], "the sweep gives it"),
        (["--method", "grid"], "--search x=0:1: a grid needs choice, int or step"),
        (["--trials", "9" * 14], "--trials: must be at most 1000000, not 99999999999999"),
        (["--method", "asha"], "--watch COLUMN"),
        (["--method", "population", "--startup", "1"], "at least 2"),
        (["--startup", "3"], "--startup needs --method tpe, gp or population"),
        (["--reduction", "7"], "--reduction needs --method asha"),
        (["--min_steps", "9"], "--min_steps needs --watch"),
        (["--array_tasks", "3"], "--array_tasks needs --slurm"),
        (["--variant", "--k 1"], 'must be "NAME=ARGUMENTS..."'),
        (["--variant", "a=--x 1"], "--x is given by the sweep"),
        (["--trials", "0"], "at least 1"),
        (["--storage", "sqlite:////nowhere/study.db"], "can't use the storage"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_no_directory(
    tmp_path, command, capsys, flags, said
):
    out = tmp_path / "sweep"
    right = [*METRIC, "--search", "x=0:1", "--out", out]
    assert said in refused(capsys, sweep.main, *right, *flags, "--", command)
    assert not out.exists()


def test_a_grid_of_more_points_than_can_be_made_is_refused(tmp_path, command, capsys):
    flags = [*METRIC, "--method", "grid", "--search", "j=int:1:1000", "k=int:1:1000"]
    line = refused(capsys, sweep.main, *flags, "--out", tmp_path / "sweep", "--", command)
    assert "1,000,000 points; at most 100,000" in line and not (tmp_path / "sweep").exists()


def test_a_command_that_is_not_there_is_refused(tmp_path, capsys):
    flags = [*METRIC, "--search", "x=0:1", "--out", tmp_path / "sweep"]
    assert "no command" in refused(capsys, sweep.main, *flags)
    assert "no file absent.py" in refused(capsys, sweep.main, *flags, "--", "absent.py", 3)


def test_a_flag_that_the_command_does_not_know_stops_the_sweep_at_once(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    flags = [*METRIC, "--search", "rate=0:1", "--trials", 50, "--out", out, "--quiet"]
    line = refused(capsys, sweep.main, *flags, "--", command)
    assert "command.py: error: unrecognized arguments: --rate" in line
    assert not out.exists()


def test_values_refused_by_a_command_that_has_run_before_are_failures(tmp_path, command):
    out = tmp_path / "sweep"
    flags = ["--metric", "k", "--search", "k=int:6:8", "--method", "grid"]
    run("--out", out, *flags, "--", command, "--x", 0)
    assert [row["state"] for row in table(out)] == ["done", "failed", "done"]
    assert table(out)[1]["error"] == "command.py: error: k must not be 7"


def test_a_column_that_can_not_be_watched_is_refused(tmp_path, command, capsys):
    flags = [*METRIC, "--search", "x=0:1", "--method", "asha", "--watch", "accuracy", "--quiet"]
    line = refused(capsys, sweep.main, *flags, "--out", tmp_path / "sweep", "--", command)
    assert "--watch accuracy: metrics.csv has loss" in line
    assert not (tmp_path / "sweep").exists()


def test_a_metric_that_is_not_there_stops_the_sweep_at_once(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    flags = ["--metric", "loss", "--search", "x=0:1", "--trials", 50, "--out", out, "--quiet"]
    line = refused(capsys, sweep.main, *flags, "--", command)
    assert "results.json has no loss: it has losses, threads, k" in line
    assert not out.exists()


def test_a_refused_variant_leaves_the_values_of_the_others(tmp_path, command, capsys):
    out = tmp_path / "sweep"
    flags = [*METRIC, "--search", "x=0:1", "--trials", 1, "--out", out, "--quiet"]
    variants = ["--variant", "a=--k 1", "--variant", "b=--rate 1"]
    assert "arguments: --rate" in refused(capsys, sweep.main, *flags, *variants, "--", command)
    assert [row["state"] for row in table(out)] == ["done", "failed"]


def test_a_directory_of_something_else_or_of_another_search_is_refused(tmp_path, command, capsys):
    flags = [*METRIC, "--trials", 1, "--quiet", "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    search = ["--search", "x=0:1", "--", command]
    assert "not empty" in refused(capsys, sweep.main, *flags, tmp_path / "full", *search)
    run(*flags, tmp_path / "sweep", *search)
    line = refused(
        capsys, sweep.main, *flags, tmp_path / "sweep", "--search", "x=0:2", "--", command
    )
    assert "another search: search ['x=0:1'] there, ['x=0:2'] now" in line
    line = refused(capsys, sweep.main, "--resume", tmp_path / "sweep", "--", command, "--k", 1)
    assert "another search: command" in line


# ---- a real command ----


def test_a_command_of_this_project_is_swept(tmp_path):
    out = tmp_path / "sweep"
    arguments = ["--components", 2, "--dataset", "mnist5k", "--threads", 1]
    flags = ["--metric", "table.0.test_accuracy", "--direction", "maximize", "--method", "grid"]
    command = [ROOT / "baseline_pca.py", *arguments]
    run("--out", out, *flags, "--search", "C=choice:0.1", "--", *command)
    best = results(out)["best"]
    (found,) = json.loads((Path(best["directory"]) / "results.json").read_text())["table"]
    assert best["C"] == "0.1" and best["value"] == found["test_accuracy"] > 0.3


def test_each_of_a_flags_values_may_be_searched():
    searched = [searched_flag(text) for text in ("d.5=0:1", "k=int:1:9", "d.1-4=step:0:1:0.5")]
    trial = SimpleNamespace(params={"d.5": 0.25, "k": 3, "d.1-4": 0.5})
    flags = ["--d", "0.5", "0.5", "0.5", "0.5", "0.25", "--k", "3"]
    assert sweep.flags_of(trial, searched) == flags


COMPETING = [
    "train_krotov_hopfield.py", "--depth", 1, "--units", 8, "--epochs", 1, "--train_images", 300,
    "--round_batches", 2, "--classifier_epochs", 1,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "search", "command"),
    [
        ("validation_accuracy", ["ranking_param=int:2:8", "delta=step:0:0.4:0.005"], COMPETING),
        (
            "test_accuracy_mean",
            ["lr=log:1e-5:1e-3"],
            ["main.py", 4, "--metasteps", 1, "--initial_inner_steps", 2, "--beside"],
        ),
    ],
    ids=["train_krotov_hopfield", "main"],
)
def test_searches_of_the_larger_commands_find_their_values(tmp_path, metric, search, command):
    script, *arguments = command
    flags = ["--metric", metric, "--direction", "maximize", "--trials", 1, "--search", *search]
    common = ["--dataset", "mnist5k", "--threads", 1]
    run("--out", tmp_path / "sweep", *flags, "--", ROOT / script, *arguments, *common)
    assert [row["state"] for row in table(tmp_path / "sweep")] == ["done"]
    assert results(tmp_path / "sweep")["best"]["value"] > 0.05


@pytest.mark.slow
def test_runs_of_one_pass_tuning_are_swept(tmp_path):
    arguments = ["-c", ROOT / "configs/boston.yaml", "--total_step_limit", 40, "--quiet"]
    flags = ["--metric", "loss_validation", "--trials", 1, "--search", "lr=log:1e-4:1e-1"]
    command = [ROOT / "tune_one_pass.py", *arguments, "--data-dir", tmp_path]
    run("--out", tmp_path / "sweep", *flags, "--", *command)
    assert {row["state"] for row in table(tmp_path / "sweep")} == {"done"}
