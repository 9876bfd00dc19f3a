"""The loop of a run: steps an algorithm, records its rows, saves it, ends cleanly on Ctrl-C.

    finished = run_steps(log, algorithm, "epoch", 100)

Whatever is stepped, a run that was killed and is resumed leaves the same rows as one never killed.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

from experiment.checkpoints import taking_up_state
from experiment.errors import NonFiniteError
from experiment.processes import ALONE, Team
from experiment.run_log import RunLog, SilentLog


class Algorithm(Protocol):
    """What `run_steps` steps.

    finished: whether no step is left.
    """

    @property
    def finished(self) -> bool: ...

    def step(self) -> Mapping[str, float]:
        """The next step; the row to record. A NonFiniteError comes before anything has changed."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, in plain containers of tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the run where `state_dict` left it."""


def run_steps(
    log: RunLog | SilentLog,
    algorithm: Algorithm,
    name: str,
    total: int,
    *,
    numbers: Sequence[int] | None = None,
    shown: Collection[str] | None = None,
    checkpoint_every: int = 1,
    team: Team = ALONE,
) -> bool:
    """Steps the algorithm until it has finished; False where Ctrl-C ended that before.

    Goes on from the log's checkpoint if there is one. Ctrl-C ends it after the running step. Every
    process of the team calls this.
    name, total: what a step is called beside the progress, and how many there are, at most.
    numbers: what the rows are called, rising; by default 1, 2, ...
    shown: columns of the row that are shown beside the progress; by default all.
    checkpoint_every: steps from the start of the run between checkpoints; one follows the last.
    """
    done, saved = 0, team.gathered(log.load_checkpoint())[0]
    numbers = range(1, total + 1) if numbers is None else numbers
    if saved is not None:
        with taking_up_state():
            done = numbers.index(saved[0]) + 1
            algorithm.load_state_dict(saved[1])
        if not algorithm.finished:
            log.say(f"going on from {name} {saved[0]}")
    stopped = False
    with finish_on_interrupt() as interrupt, log.progress(total, done, name) as progress:
        while not (algorithm.finished or stopped):
            try:
                row = algorithm.step()
            except NonFiniteError:
                if done % checkpoint_every:
                    log.save_checkpoint(numbers[done - 1], algorithm.state_dict())
                raise
            log.record(numbers[done], row)
            done += 1
            # A signal may reach the processes at different moments: they end together.
            stopped = any(team.gathered(interrupt.requested))
            if done % checkpoint_every == 0 or stopped or algorithm.finished:
                log.save_checkpoint(numbers[done - 1], algorithm.state_dict())
            progress.advance(_told(row, shown))
    return algorithm.finished


def _told(row: Mapping[str, float], shown: Collection[str] | None) -> dict[str, float]:
    """The columns to show, without those that were not measured in this step."""
    return {n: v for n, v in row.items() if (shown is None or n in shown) and v == v}


class Interrupt:
    """Whether the user has asked the run to end: `requested`."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: note the first signal; at a second Ctrl-C stop at once."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            with suppress(OSError, ValueError):  # not print, which a handler may interrupt
                os.write(
                    sys.stderr.fileno(), b"\nending after this step; Ctrl-C again stops at once\n"
                )
        self.requested = True


@contextmanager
def finish_on_interrupt() -> Iterator[Interrupt]:
    """Let the first SIGINT or SIGTERM only set `.requested`, so that a loop ends after its step.

    A second SIGINT raises KeyboardInterrupt, and so should the command once its results are
    written: its exit status then tells that it was interrupted. Outside the main thread, where
    Python can't handle signals, nothing changes.
    """
    interrupt = Interrupt()
    before: dict[int, Callable | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt.handle)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
