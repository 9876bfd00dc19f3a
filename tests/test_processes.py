"""Several processes make the same meta-steps as one, whatever happens to them."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from commands import refused
from forked import ROOT, Command, places_in_team, start_team

import learn_to_optimize
import main
from experiment.command_line import UserError, place_in_team
from experiment.opening import _run_before_the_restart
from experiment.processes import ALONE, Team, join_team
from experiment.run_reader import read_json, read_metrics
from hypgraddesc import HypergradientDescent

RUN = [
    "main.py", "3", "--dataset", "mnist5k", "--initial_inner_steps", "2", "--max_inner_steps", "2",
    "--batch_size", "32", "--evaluations", "1", "--warmup_steps", "1", "--lr", "1e-3",
    "--threads", "1", "--beside", "--tasks", "3", "--outer_images", "100", "--dtype", "float64",
    "--quiet",
]  # fmt: skip

# Two tasks that go on from meta-step to meta-step, one of which is not finite now and then.
META_RUN = """
import itertools, sys, torch
from hypgraddesc import HypergradientDescent, MetaSettings
from initializers import FIXED, GaussianInitializer
from learning_rules import PolynomialRule
from models_fully_local import Activation, lateral_mlp
from experiment.processes import join_team
from train import Training

class Loss:
    metrics = ("draw",)
    def __call__(self, model, params, generator):
        draw = torch.rand((), generator=generator)
        if draw < 0.2:
            raise FloatingPointError("not finite")
        return draw * sum(t.square().sum() for t in params[1].values()), {"draw": draw.item()}

def batches(generator):
    return (torch.rand(5, 4, generator=generator) for _ in itertools.count())

team = join_team()
training = Training(
    lateral_mlp(4, [3], Activation()), PolynomialRule.of_degree(2),
    GaussianInitializer({"b": FIXED}, {"w": FIXED}), batches, Loss(),
)
settings = MetaSettings(inner_steps=2, tasks=5, reinitialize_every=3, lr=1e-2, clip_norm=1.0)
descent = HypergradientDescent(training, settings, warn=lambda text: None, team=team)
rows = [{k: v for k, v in descent.step().items() if k != "seconds"} for _ in range(7)]
state = descent.state_dict()
torch.save((rows, state), f"{sys.argv[1]}/{team.count}-{team.rank}.pt")
"""


# Gathers to the last moment; without leaving, four of five such runs were aborted at their end.
# An optimiser's first step imports torch._dynamo, whose functions would keep the group.
BRIEF_RUN = """
import atexit
from pathlib import Path
from torch import distributed

def check():
    assert not distributed.is_initialized()
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
    print("left", flush=True)

atexit.register(check)
from experiment.processes import join_team
assert join_team().gathered(3) == [3, 3]
import torch._dynamo
"""


def torchrun(*command, options: Sequence[str] = (), **streams) -> subprocess.Popen:
    """A script in two processes that torchrun starts and watches."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*start, *map(str, command)], cwd=ROOT, env=environment, text=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams,
    )  # fmt: skip


def all_done(team: list[Command], folder: Path) -> None:
    """Waits for every process of a team; all have ended well."""
    statuses = [process.wait(180) for process in team]
    assert statuses == [0] * len(team), [path.read_text() for path in folder.glob("?.txt")]


def wait_for_rows(directory: Path, count: int, running: Callable[[], bool]) -> None:
    while len(read_metrics(directory).get("step", ())) < count:
        assert running(), f"ended before row {count}"
        time.sleep(0.05)


def numbers(directory: Path) -> tuple:
    metrics = read_metrics(directory)
    metrics.pop("seconds")
    return {name: column.tolist() for name, column in metrics.items()}, (
        directory / "rule.json"
    ).read_text()


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in tasks.split()]


def test_a_process_alone_does_every_task_and_gathers_its_own_value():
    assert ALONE.first and list(ALONE.share(4)) == [0, 1, 2, 3] and ALONE.gathered("x") == ["x"]
    assert ALONE.first_then_others(lambda: 7) == 7


def test_every_task_belongs_to_one_process():
    shares = [list(Team(rank, 3).share(7)) for rank in range(3)]
    assert sorted(task for share in shares for task in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_leaves_its_team_before_the_interpreter_ends(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(BRIEF_RUN)
    team = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=ROOT, text=True, env=os.environ | place,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for place in places_in_team(2)
    ]  # fmt: skip
    for process in team:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output == "left\n"


def test_two_processes_end_in_the_state_of_one_also_with_tasks_that_fail_or_go_on(
    tmp_path, monkeypatch
):
    script = tmp_path / "run.py"
    script.write_text(META_RUN)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script))
    all_done(start_team(2, script, tmp_path, folder=tmp_path), tmp_path)
    rows, state = torch.load(tmp_path / "1-0.pt", weights_only=True)
    assert any(row["skipped_tasks"] for row in rows)
    for rank in range(2):
        same_rows, same_state = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        assert same_rows == rows
        torch.testing.assert_close(same_state, state, rtol=0, atol=0)


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process_and_survives_the_loss_of_a_worker(tmp_path):
    steps = ["--metasteps", "24", "--no_figures"]
    main.main([*RUN[1:], *steps, "--out", str(tmp_path / "alone")])
    restart = ["--max-restarts", "1"]
    team = torchrun(*RUN, *steps, "--out", tmp_path / "team", options=restart)
    wait_for_rows(tmp_path / "team", 8, lambda: team.poll() is None)
    os.kill(children(team.pid)[1], signal.SIGKILL)
    assert team.wait(180) == 0, team.stderr.read()
    assert numbers(tmp_path / "team") == numbers(tmp_path / "alone")


LEARN = [
    "learn_to_optimize.py", "relu4", "--dataset", "mnist5k", "--dtype", "float64", "--quiet",
    "--network", "mlp", "--threads", "1", "--tasks", "3", "--compare", "--inner_steps", "6",
    "--unroll", "3", "--batch_size", "16", "--validation_runs", "1", "--runs_per_epoch", "2",
]  # fmt: skip


def assert_same_optimizer(directory: Path, other: Path) -> None:
    weights = [read_json(where / "optimizer.json")["weights"] for where in (directory, other)]
    for name, ours in weights[0].items():
        theirs = torch.tensor(weights[1][name], dtype=torch.float64)
        expected = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(theirs, expected, rtol=1e-12, atol=1e-14)


def test_two_processes_learn_the_optimiser_that_one_learns(tmp_path):
    flags = [*LEARN[1:], "--epochs", "1", "--log_loss", "--penalty", "0.1", "--no_figures"]
    learn_to_optimize.main([*flags, "--out", str(tmp_path / "alone")])
    team = start_team(2, LEARN[0], *flags, "--out", tmp_path / "team", folder=tmp_path)
    all_done(team, tmp_path)
    assert_same_optimizer(tmp_path / "alone", tmp_path / "team")


@pytest.mark.slow
def test_a_team_that_learns_an_optimiser_survives_the_loss_of_a_worker(tmp_path):
    flags = [*LEARN[1:], "--epochs", "10", "--no_figures"]
    learn_to_optimize.main([*flags, "--out", str(tmp_path / "alone")])
    flags += ["--out", tmp_path / "team"]
    team = start_team(2, LEARN[0], *flags, folder=tmp_path)
    wait_for_rows(tmp_path / "team", 6, lambda: team[0].poll() is None)
    team[1].send_signal(signal.SIGKILL)
    assert team[0].wait(120) != 0, "it misses the other"
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}  # as torchrun starts a team for the second time
    all_done(start_team(2, LEARN[0], *flags, folder=tmp_path, environment=again), tmp_path)
    assert len(read_metrics(tmp_path / "team")["step"]) == 20
    assert_same_optimizer(tmp_path / "alone", tmp_path / "team")


@pytest.mark.slow
def test_a_team_that_is_interrupted_ends_together_with_figures(tmp_path):
    flags = [*RUN[1:], "--metasteps", "5000", "--out", tmp_path / "run"]
    team = start_team(2, RUN[0], *flags, folder=tmp_path)
    wait_for_rows(tmp_path / "run", 2, lambda: team[0].poll() is None)
    for process in team:
        process.send_signal(signal.SIGTERM)
    for process in team:
        process.wait(120)
    assert (tmp_path / "run" / "figures" / "meta_loss.png").exists()
    assert (tmp_path / "run" / "results.json").exists()


def test_fewer_tasks_than_processes_are_refused_once(tmp_path):
    flags = [*RUN[1:], "--tasks", "1", "--out", tmp_path / "run"]
    team = start_team(2, RUN[0], *flags, folder=tmp_path)
    assert [process.wait(120) for process in team] == [2, 2]
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: 2 processes need --tasks 2 or more, one for each"
    ]
    assert not (tmp_path / "run").exists()


def test_wrong_flags_are_said_once_in_a_team(tmp_path):
    team = start_team(2, RUN[0], "--degree", "x", folder=tmp_path)
    assert [process.wait(120) for process in team] == [2, 2]
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert said.count("--degree") == 1


def test_what_one_process_alone_cannot_do_it_says_and_the_others_end(tmp_path):
    team = start_team(2, "tests/team_of_unlike.py", folder=tmp_path)
    assert team[1].wait(120) == 2 and team[0].wait(120) == 1
    assert "process 1 of 2: error: only here" in (tmp_path / "1.txt").read_text()
    said = (tmp_path / "0.txt").read_text()
    assert "another process of the team has ended" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "left, place",
    [
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (2, 3)),
        ({"WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, None),
    ],
)
def test_what_a_torchrun_has_left_behind_hides_nothing(monkeypatch, capsys, left, place):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    if place is None:
        assert "unset WORLD_SIZE" in refused(capsys, lambda argv: join_team())
    else:
        assert place_in_team() == place
    if place != (2, 3):
        assert "error: wrong" in refused(capsys, _wrong)


def _wrong(argv):
    raise UserError("wrong")


def test_a_restarted_team_goes_on_where_the_lost_one_was(tmp_path, monkeypatch):
    flags = [*RUN[1:], "--metasteps", "5", "--no_figures", "--out"]
    main.main([*flags, str(tmp_path / "whole")])
    step = HypergradientDescent.step

    def lost_after_two(descent):
        if descent.metastep == 2:
            raise ConnectionError("the other worker is gone")
        return step(descent)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(HypergradientDescent, "step", lost_after_two)
        main.main([*flags, str(tmp_path / "run")])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main.main([*flags, str(tmp_path / "run")])
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_restarted_team_needs_to_know_its_directory(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="--out"):
        _run_before_the_restart(type("Args", (), {"out": None})())
