"""Commands under test: run, killed, interrupted, refused; and what they leave behind."""

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Command, record_and_signal

import plot
from experiment.command_line import run_command
from experiment.run_log import RunLog
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


def as_begun_before(directory: Path, *flags: str) -> None:
    """Makes a run one that a version without these flags has begun, and that has no rows yet."""
    config = json.loads((directory / "config.json").read_text())
    for flag in flags:
        del config[flag]
    (directory / "config.json").write_text(json.dumps(config))
    for path in [*directory.glob("checkpoint*"), directory / "metrics.csv"]:
        path.unlink()


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


def kill_at_row(count: int, script: str | Path, *flags) -> None:
    """Starts a command that is ended by SIGKILL once it has recorded so many rows."""
    process = Command(script, *flags, killed_at_row=count)
    assert process.wait(120) == -signal.SIGKILL


def interrupt_at_row(count: int, main: Callable, *flags) -> None:
    """Runs a command, here, that gets Ctrl-C at so many rows: it ends cleanly, exit status 130."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(RunLog, "record", record_and_signal(signal.SIGINT, count))
        run_command(main, [*map(str, flags)], wrong_input=LIBRARY_ERRORS)
    assert stop.value.code == 130
