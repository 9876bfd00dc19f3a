"""The loop of every run: steps an algorithm, records its rows, saves it, ends cleanly on Ctrl-C.

    finished = run_steps(log, algorithm, "epoch", 100)

A run that was killed and resumed leaves the same rows as one that was never killed.
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
    """The interface that `run_steps` needs.

    finished: whether all steps have been taken.
    """

    @property
    def finished(self) -> bool: ...

    def step(self) -> Mapping[str, float]:
        """Take the next step and return the row to record.

        If it raises NonFiniteError, it must not have changed anything.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain containers of tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state returned by `state_dict`."""


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
    """Step the algorithm until it has finished; return False if Ctrl-C ended the loop before that.

    Goes on from the log's checkpoint if there is one. After Ctrl-C the current step is completed.
    Every process of the team must call this.

    name: what a step is called in the progress bar.
    total: the largest number of steps.
    numbers: the step numbers of the rows, increasing; by default 1, 2, ...
    shown: the columns of the row shown in the progress bar; by default all.
    checkpoint_every: save a checkpoint after every so many steps and after the last.
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
            # a signal may reach the processes at different moments, but they must end together
            stopped = any(team.gathered(interrupt.requested))
            if done % checkpoint_every == 0 or stopped or algorithm.finished:
                log.save_checkpoint(numbers[done - 1], algorithm.state_dict())
            progress.advance(_told(row, shown))
    return algorithm.finished


def _told(row: Mapping[str, float], shown: Collection[str] | None) -> dict[str, float]:
    """The columns to show, without those that are nan because they weren't measured."""
    return {n: v for n, v in row.items() if (shown is None or n in shown) and v == v}


class Interrupt:
    """The attribute `requested` says whether the user has asked the run to end."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: note the first signal, raise KeyboardInterrupt at a second Ctrl-C."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            with suppress(OSError, ValueError):  # a print may be what the signal interrupted
                os.write(
                    sys.stderr.fileno(), b"\nending after this step; Ctrl-C again stops at once\n"
                )
        self.requested = True


@contextmanager
def finish_on_interrupt() -> Iterator[Interrupt]:
    """Let the first SIGINT or SIGTERM only set `.requested`, so that a loop can complete its step.

    A second SIGINT raises KeyboardInterrupt. A command that was interrupted should raise it too
    after it has written its results, so that its exit status says so. Outside the main thread,
    where Python can't handle signals, this does nothing.
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
