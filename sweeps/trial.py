"""One trial of a sweep as a process: how it is started, watched and ended, and its outcome.

The process has a session of its own, so that Ctrl-C at the terminal reaches only the sweep, which
then ends its trials in order. If the sweep is killed, the Linux kernel ends the process cleanly
(SIGTERM); on other systems it goes on, in a directory that nobody reads.
"""

import ctypes
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from experiment.command_line import UserError
from experiment.errors import RunLogError
from experiment.run_reader import read_json, read_metrics
from sweeps.study import Outcome

GRACE = 60.0  # seconds from SIGTERM, which ends a command cleanly, to SIGKILL
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class RefusedCommand(UserError):  # noqa: N818 - a kind of wrong input
    """The command refuses its flags, or lacks the column or value that the sweep asks for."""


@dataclass
class Worker:
    """A trial and the process that runs it."""

    trial: Trial
    process: subprocess.Popen
    stderr: BinaryIO
    directory: Path
    began: float
    compared_at: int = -1  # the step of the last rung
    ending: str | None = None  # the state in which it was asked to end
    kill_at: float = math.inf

    def end(self, state: str) -> None:
        """Ask the process to end, noting the state; kill it at a call more than GRACE s later."""
        if self.ending is None:
            self.ending, self.kill_at = state, time.monotonic() + GRACE
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() > self.kill_at:
            self.kill()

    def runs(self) -> bool:
        """Whether the process is still running."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process and its children at once."""
        if self.runs():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> tuple[str, str]:
        """The last nonempty line of stderr, at most 500 characters, and all of stderr."""
        self.stderr.seek(0)
        text = self.stderr.read().decode(errors="replace")
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return (lines[-1].strip()[:500] if lines else ""), text


def start(trial: Trial, command: Sequence[str], directory: Path, threads: int) -> Worker:
    """Run the command of a trial in a new process that writes to `directory`.

    threads: the number of CPU threads, unless the command has --threads.
    """
    environment = dict(os.environ)
    if not any(argument.split("=")[0] == "--threads" for argument in command):
        environment["OMP_NUM_THREADS"] = str(threads)
    trial.set_user_attr("directory", str(directory))
    trial.set_user_attr("command", shlex.join(["python", *command]))
    directory.parent.mkdir(parents=True, exist_ok=True)
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
    process = subprocess.Popen(
        [sys.executable, *command, "--out", str(directory), "--quiet", "--no_figures"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_the_sweep if sys.platform == "linux" else None,
    )
    return Worker(trial, process, stderr, directory, time.monotonic())


@dataclass(frozen=True)
class Rungs:
    """The steps at which trials are compared: first, first * reduction, first * reduction^2, ...

    column: the column of metrics.csv that is compared.
    reduction: 1 compares at every step from `first` on.
    """

    column: str
    first: int
    reduction: int

    def compare(self, worker: Worker) -> bool:
        """Report the trial's value at each rung newly reached; return whether to end the trial.

        A trial is ended if the pruner says so, or if another process has given it up. If a value is
        nan, it was not measured at that step, and the next one counts; an infinite value counts as
        the worst. Raises RefusedCommand if there is no such column.
        """
        columns = read_metrics(worker.directory)
        if columns and self.column not in columns:
            names = ", ".join(name for name in columns if name != "step")
            raise RefusedCommand(f"--watch {self.column}: metrics.csv has {names}")
        steps, values = columns.get("step", ()), columns.get(self.column, ())
        for step, value in zip(steps, values, strict=True):
            if step < self.next_after(worker.compared_at) or np.isnan(value):
                continue
            worker.compared_at = int(step)
            try:
                worker.trial.report(float(value), int(step))
            except UpdateFinishedTrialError:  # given up by another process
                return True
            if worker.trial.should_prune():
                return True
        return False

    def next_after(self, step: int) -> int:
        """The first rung after `step`."""
        if self.reduction == 1:
            return max(self.first, step + 1)
        rung = self.first
        while rung <= step:
            rung *= self.reduction
        return rung


def outcome_of(worker: Worker, metric: str) -> Outcome:
    """The outcome of a trial whose process has ended."""
    status = worker.process.returncode
    line, text = worker.last_words()
    seconds = round(time.monotonic() - worker.began, 3)
    if status == 0:
        value, error = read_value(worker.directory, metric)
        state = "failed" if value is None else "done" if math.isfinite(value) else "diverged"
        return Outcome(state, value if state == "done" else None, status, error, seconds)
    if worker.ending is not None:
        return Outcome(worker.ending, None, status, "", seconds)
    if status == 1 and line.startswith("error: "):  # a command's report of a number not finite
        return Outcome("diverged", None, status, line, seconds)
    if status != 2:
        worker.directory.mkdir(exist_ok=True)
        (worker.directory / "stderr.txt").write_text(text, encoding="utf-8")
    if status < 0:
        line = f"ended by {signal.Signals(-status).name}" + (f"; {line}" if line else "")
    return Outcome("failed", None, status, line, seconds)


def read_value(directory: Path, metric: str) -> tuple[float | None, str]:
    """The number at a dotted key of results.json and "", or None and what is wrong.

    It is nan if JSON has null, which stands for a number that is not finite; the text then says so.
    """
    try:
        value = read_json(directory / "results.json")
    except RunLogError as error:
        return None, str(error)
    for key in metric.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            known = f": it has {', '.join(value)}" if isinstance(value, dict) else ""
            return None, f"results.json has no {metric}{known}"
    if value is None:
        return math.nan, f"{metric} is null, no finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"{metric} in results.json is {value!r}, not a number"
    return float(value), "" if math.isfinite(value) else f"{metric} is {value}"


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_the_sweep() -> None:
    """Called in the new process: let the kernel send it SIGTERM when the sweep dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
