"""An Optuna study that several processes and machines work on at once, and that survives kills.

A trial's number is given out by the storage, once: so no two processes run the same trial, and all
of them together run as many draws as were asked for. A process that works on a trial says so every
HEARTBEAT seconds. When it has fallen silent, or is gone from this machine, its trial is closed as
interrupted, and queued under a new number with the same values.

    user attributes of a trial      what they are
    draw                            which draw its values are
    instead_of                      the number of the interrupted trial that it runs again
    owner                           who runs it: host, process, session, and when it was seen last
    directory, command              where, and what
    state, exit_status, error, seconds      how it ended (STATES)
    surplus                         given out beyond the number of draws, in a race; never run
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from experiment.command_line import UserError
from experiment.errors import RunLogError
from sweeps.journal import Journal

JOURNAL = "study.journal"
HEARTBEAT = 30.0  # seconds
LOST_AFTER = 180.0  # seconds since the last sign of life, by the clock of whoever looks
WATCHED_FOR = 2 * HEARTBEAT  # and so long without another one, by a clock that cannot jump
SQLITE_WAIT = 60  # seconds for another process's lock
RACES = 10

STATES = ("done", "pruned", "diverged", "failed", "interrupted", "running", "waiting")
TOLD_AS = {
    "done": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,  # with the worst value, so that a guided search avoids it
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "interrupted": TrialState.FAIL,
}
HERE = {"host": socket.gethostname(), "process": os.getpid(), "session": uuid.uuid4().hex[:12]}


Made = TypeVar("Made")


class StudyError(UserError):
    """A study that can't be reached, or is of another search; the message is one line."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: one of STATES, the value if it is done, and what the process said."""

    state: str
    value: float | None = None
    exit_status: int | None = None
    error: str = ""
    seconds: float = 0.0


# ---- opening ----


def open_storage(url: str | None, directory: Path) -> BaseStorage:
    """The database at `url`, or a journal file in `directory` if None; StudyError if unreachable.

    A journal is safe on file systems that machines share (NFS 3 and later).
    """
    with storage_errors(url):
        if url is not None:
            waits = {"connect_args": {"timeout": SQLITE_WAIT}} if url.startswith("sqlite") else {}
            return _unless_raced(lambda: RDBStorage(url, engine_kwargs=waits))
        return _replayed(Journal(directory.resolve() / JOURNAL))


def _replayed(journal: Journal) -> BaseStorage:
    """The storage of a journal; RunLogError where its records are not those of a study."""
    try:
        return JournalStorage(journal)
    except RunLogError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as problem:
        raise RunLogError(f"{JOURNAL} is damaged: its records are not those of a study "
                          f"({type(problem).__name__})") from problem  # fmt: skip


def open_study(
    storage: BaseStorage,
    name: str,
    direction: str,
    definition: Mapping[str, Any],
    sampler: BaseSampler,
    pruner: BasePruner,
) -> Study:
    """The study `name`, made if it isn't there; StudyError where it is of another search.

    definition: all that a trial's value depends on, as it reads back from JSON.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction=direction,
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    saved = _unless_raced(lambda: _saved_definition(study, definition))
    differing = [
        f"{key} {saved.get(key)!r} there, {definition.get(key)!r} now"
        for key in {**saved, **definition}
        if saved.get(key) != definition.get(key)
    ]
    if differing:
        raise StudyError(
            f"{name} is a study of another search: {'; '.join(differing)}; "
            "choose another --out or --study"
        )
    return study


def _saved_definition(study: Study, definition: Mapping[str, Any]) -> dict[str, Any]:
    """What the study was made for: `definition`, if it has just been made."""
    if "definition" not in study.user_attrs:
        study.set_user_attr("definition", dict(definition))
    return study.user_attrs["definition"]


def _unless_raced(make: Callable[[], Made]) -> Made:
    """`make()`, once more where another process was making the same tables or row meanwhile."""
    for _ in range(RACES):
        try:
            return make()
        except (SQLAlchemyError, OptunaError) as error:
            cause = str(error.__cause__ or error)
            if not any(sign in cause for sign in ("already exists", "UNIQUE", "duplicate")):
                raise
            time.sleep(1)
    return make()


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turn what a storage raises into a StudyError of one line."""
    try:
        yield
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        cause = error.__cause__ or error
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        where = JOURNAL if url is None else re.sub(r":[^:@/]*@", ":***@", url)
        raise StudyError(f"can't use the storage {where}: {line}") from error


# ---- taking and ending trials ----


def claim(study: Study, draws: int) -> Trial | None:
    """The next trial for this process, with its values chosen; None when all are given out."""
    while True:
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not waiting and sum(map(_first_run, trials)) >= draws:
            return None
        trial = study.ask()
        number = _draw_number(trial, study.get_trials(deepcopy=False))
        if number is None or number >= draws:
            trial.set_user_attr("surplus", True)
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr("draw", number)
        say_alive(trial)
        for name, among in study.sampler.infer_relative_search_space(study, trial).items():
            _suggest(trial, name, among)
        return trial


def say_alive(trial: Trial) -> bool:
    """Note that this process works on the trial; due every HEARTBEAT seconds.

    False where another process has given the trial up, because this one was silent for so long.
    """
    try:
        trial.set_user_attr("owner", HERE | {"seen": time.time()})
    except UpdateFinishedTrialError:
        return False
    return True


def finish(trial: Trial, outcome: Outcome) -> bool:
    """Record how a trial ended; False where another process has given it up meanwhile."""
    study = trial.study
    value = outcome.value
    if outcome.state == "diverged":
        value = float("inf") if study.direction == StudyDirection.MINIMIZE else -float("inf")
    try:
        for name in ("state", "exit_status", "error", "seconds"):
            trial.set_user_attr(name, getattr(outcome, name))
        study.tell(trial, value, state=TOLD_AS[outcome.state], skip_if_finished=True)
    except UpdateFinishedTrialError:
        return False
    return True


def run_again(trial: Trial, outcome: Outcome) -> None:
    """Queue the trial's values anew, then close it as interrupted.

    In this order nothing is lost by a kill in between; and of two successors, queued by two
    processes at the same moment, `claim` runs the first.
    """
    study = trial.study
    study.enqueue_trial(
        trial.params,
        user_attrs={
            "instead_of": trial.number,
            **({"draw": trial.user_attrs["draw"]} if "draw" in trial.user_attrs else {}),
        },
    )
    finish(trial, outcome)


class Watch:
    """Tells trials whose process is gone from those that are being worked on.

    One that has ended on this machine is gone. Any other is given up when its last sign of life is
    LOST_AFTER away from now, and no other comes while this process watches: so neither clocks that
    disagree nor one that jumps cost anyone his trial.

    suspects: whether any trial has to be watched for longer before that is known.
    """

    def __init__(self) -> None:
        self.suspects = False
        self._unchanged: dict[int, tuple[float, float]] = {}  # sign of life, and since when read

    def take_back_lost(self, study: Study) -> list[int]:
        """Queue anew the trials whose process is gone, and return their numbers."""
        self.suspects = False
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        lost = [trial for trial in running if self._is_lost(trial)]
        for trial in lost:
            outcome = Outcome("interrupted", error="the process that ran it is gone")
            run_again(Trial(study, trial._trial_id), outcome)
        return [trial.number for trial in lost]

    def _is_lost(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner is None:  # taken a moment ago, or by a process that was killed in that moment
            return self._is_silent(trial._trial_id, trial.datetime_start.timestamp())
        if owner["session"] == HERE["session"]:
            return False
        if owner["host"] == HERE["host"] and not _runs(owner["process"]):
            return True
        return self._is_silent(trial._trial_id, owner["seen"])

    def _is_silent(self, trial: int, sign_of_life: float) -> bool:
        now = time.monotonic()
        before, since = self._unchanged.get(trial, (None, now))
        if before != sign_of_life:
            since = now
        self._unchanged[trial] = sign_of_life, since
        if abs(time.time() - sign_of_life) <= LOST_AFTER:
            return False
        silent = now - since >= WATCHED_FOR
        self.suspects |= not silent
        return silent


def state_of(trial: FrozenTrial) -> str:
    """One of STATES."""
    if trial.state == TrialState.RUNNING:
        return "running"
    return trial.user_attrs.get("state", "waiting")


def counted_trials(study: Study) -> list[FrozenTrial]:
    """All trials but those that were given out beyond the number of draws."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if not trial.user_attrs.get("surplus")]


def _first_run(trial: FrozenTrial) -> bool:
    return "instead_of" not in trial.user_attrs and not trial.user_attrs.get("surplus")


def _draw_number(trial: Trial, trials: Sequence[FrozenTrial]) -> int | None:
    """Which draw a trial is to run; None where an earlier one runs the same again.

    The first trials of all draws, in order of their numbers, are draws 0, 1, 2, ...
    """
    earlier = [other for other in trials if other.number < trial.number]
    replaced = trial.user_attrs.get("instead_of")
    if replaced is None:
        return sum(map(_first_run, earlier))
    if any(other.user_attrs.get("instead_of") == replaced for other in earlier):
        return None
    if "draw" in trial.user_attrs:
        return trial.user_attrs["draw"]
    # the one that it replaces was lost before it knew its draw
    return sum(_first_run(other) for other in earlier if other.number < replaced)


def _suggest(trial: Trial, name: str, among: BaseDistribution) -> None:
    if isinstance(among, optuna.distributions.CategoricalDistribution):
        trial.suggest_categorical(name, among.choices)
    elif isinstance(among, optuna.distributions.IntDistribution):
        trial.suggest_int(name, among.low, among.high)
    else:
        trial.suggest_float(name, among.low, among.high, step=among.step, log=among.log)


def _runs(process: int) -> bool:
    """Whether another process of this number is there."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
