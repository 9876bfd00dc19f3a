"""Commands under test: run, killed, interrupted, refused; and what they leave behind."""

import atexit
import csv
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import plot
from experiment.command_line import run_command
from hypergradients import HypergradientError
from krotov_hopfield import CompetitionError
from learned_optimizer import OptimizerError
from one_pass import OnePassError

ROOT = Path(__file__).resolve().parent.parent
LIBRARY_ERRORS = (HypergradientError, CompetitionError, OptimizerError, OnePassError)
LARGE_LIBRARIES = [  # none of this project's modules: some note which process they are in
    "matplotlib.figure", "numba", "optuna", "sklearn.linear_model", "tensorboard.summary",
    "torch.distributed", "torch.func", "torch.utils.checkpoint",
]  # fmt: skip


def rows(directory: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (directory / "metrics.csv").open() as file:
        return [{n: v for n, v in row.items() if n != "seconds"} for row in csv.DictReader(file)]


def outcome(directory: Path) -> tuple:
    """All numbers of a run that do not depend on the time it took."""
    return rows(directory), (directory / "results.json").read_text()


def redraw(directory: Path) -> None:
    """Has plot.py draw a run's figures: they are those that the command left, to the byte."""
    figures = directory / "figures"
    before = {path.name: path.read_bytes() for path in figures.iterdir()}
    shutil.rmtree(figures)
    plot.main(["run", str(directory)])
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == before


def refused(capsys, main: Callable, *flags) -> str:
    """The one line on stderr with which a command ends, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, [*map(str, flags)], wrong_input=LIBRARY_ERRORS)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


class Command:
    """A script in a process of its own, as `python script flags` would run it, but silent.

    The process is forked from a server that has imported the large libraries once. environment:
    variables beside those that were there when the server began; stderr: a file.
    """

    def __init__(
        self,
        script: str | Path,
        *flags,
        environment: dict[str, str] | None = None,
        stderr: str | Path = os.devnull,
    ) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(LARGE_LIBRARIES)
        arguments = [str(script), *map(str, flags)], environment or {}, str(stderr)
        self._process = server.Process(target=_run_script, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status once it has ended, at most after so many seconds."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} seconds"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends this signal to the process."""
        os.kill(self._process.pid, number)


def _run_script(arguments: list[str], environment: dict[str, str], stderr: str) -> None:
    atexit._clear()  # what the server registered is the server's
    os.chdir(ROOT)
    os.environ.update(environment)
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def start_team(
    processes: int,
    script: str | Path,
    *flags,
    folder: Path,
    environment: dict[str, str] | None = None,
) -> list[Command]:
    """A script in so many processes, as torchrun starts them; stderr of each: folder/<rank>.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (environment or {})
    shared["WORLD_SIZE"] = str(processes)
    team = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        stderr = folder / f"{rank}.txt"
        team.append(Command(script, *flags, environment=shared | ranks, stderr=stderr))
    return team


def wait_for_rows(directory: Path, count: int, process: Command) -> None:
    """Returns when metrics.csv has so many rows."""
    metrics = directory / "metrics.csv"
    for _ in range(2400):
        assert process.poll() is None, f"the run ended before row {count}"
        if metrics.exists() and metrics.read_text().count("\n") > count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no row {count} within two minutes")


def kill_at_row(count: int, directory: Path, script: str, *flags) -> None:
    """Starts a command, and ends it with SIGKILL once it has recorded so many rows."""
    process = Command(script, *flags)
    wait_for_rows(directory, count, process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def interrupt_at_row(count: int, directory: Path, script: str, *flags) -> None:
    """Starts a command, and ends it with Ctrl-C: cleanly, exit status 130."""
    process = Command(script, *flags)
    wait_for_rows(directory, count, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
