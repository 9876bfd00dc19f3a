"""Commands under test: run, killed, interrupted, refused; and what they leave behind."""

import csv
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Command

import plot
from experiment.command_line import run_command
from hypergradients import HypergradientError
from krotov_hopfield import CompetitionError
from learned_optimizer import OptimizerError
from one_pass import OnePassError

ROOT = Path(__file__).resolve().parent.parent
LIBRARY_ERRORS = (HypergradientError, CompetitionError, OptimizerError, OnePassError)


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
