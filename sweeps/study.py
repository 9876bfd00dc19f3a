"""An Optuna study that several processes and machines share, and that survives kills.

The storage gives out each trial number once, so no two processes run the same trial, and together
they run as many draws as were asked for. A process that works on a trial writes a sign of life
every HEARTBEAT seconds. If that stops, or the process has ended on this machine, its trial is
closed as interrupted and queued under a new number with the same values.

    user attributes of a trial      meaning
    draw                            the number of the draw that gives its values
    instead_of                      the number of the interrupted trial that it repeats
    owner                           host, process and session that run it, and its last sign of life
    directory, command              the run directory and the command line
    state, exit_status, error, seconds      how it ended (STATES)
    surplus                         given out in a race beyond the number of draws; never run
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
LOST_AFTER = 180.0  # seconds since the last sign of life, by the wall clock of the observer
WATCHED_FOR = 2 * HEARTBEAT  # seconds without a new one, by the observer's monotonic clock
SQLITE_WAIT = 60  # seconds to wait for another process's lock
RACES = 10  # attempts while another process creates the same tables or rows

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
    """A study that can't be reached or belongs to another search; the message is one line."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    state: one of STATES.
    value: the metric, if the state is done.
    exit_status, error: of the process; the error is one line.
    seconds: how long it ran.
    """

    state: str
    value: float | None = None
    exit_status: int | None = None
    error: str = ""
    seconds: float = 0.0


# ---- opening ----


def open_storage(url: str | None, directory: Path) -> BaseStorage:
    """The database at `url` or, if that is None, the journal file in `directory`.

    The journal may be on a file system that machines share (NFS 3 or later). Raises StudyError if
    the storage can't be reached, and RunLogError if the journal is damaged.
    """
    with storage_errors(url):
        if url is not None:
            waits = {"connect_args": {"timeout": SQLITE_WAIT}} if url.startswith("sqlite") else {}
            return _unless_raced(lambda: RDBStorage(url, engine_kwargs=waits))
        return _replayed(Journal(directory.resolve() / JOURNAL))


def _replayed(journal: Journal) -> BaseStorage:
    """The storage of a journal; raises RunLogError if its records are not those of a study."""
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
    """The study `name`, created if necessary; raises StudyError if it belongs to another search.

    definition: everything that a trial's value depends on, as JSON would return it.
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
    """The definition saved in the study; in a new study `definition` is saved first."""
    if "definition" not in study.user_attrs:
        study.set_user_attr("definition", dict(definition))
    return study.user_attrs["definition"]


def _unless_raced(make: Callable[[], Made]) -> Made:
    """`make()`, repeated if another process was creating the same tables or rows meanwhile."""
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
    """Turn the errors of a storage into a StudyError of one line."""
    try:
        yield
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        cause = error.__cause__ or error
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        where = JOURNAL if url is None else re.sub(r":[^:@/]*@", ":***@", url)
        raise StudyError(f"can't use the storage {where}: {line}") from error


# ---- taking and ending trials ----


def claim(study: Study, draws: int) -> Trial | None:
    """The next trial for this process, with its values chosen; None if all are given out."""
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
    """Write a sign of life for the trial; to be called every HEARTBEAT seconds.

    Returns False if another process has given the trial up because this one was silent too long.
    """
    try:
        trial.set_user_attr("owner", HERE | {"seen": time.time()})
    except UpdateFinishedTrialError:
        return False
    return True


def finish(trial: Trial, outcome: Outcome) -> bool:
    """Record how a trial ended; returns False if another process has given it up meanwhile."""
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
    """Queue the trial's values again, then close the trial with this outcome.

    In this order a kill in between loses nothing. If two processes queue a successor at the same
    moment, `claim` runs only the first.
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
    """Finds running trials whose process is gone.

    A process of this machine that has ended is gone. Any other trial is given up if its last sign
    of life is LOST_AFTER seconds from now, and no new one comes within WATCHED_FOR seconds of
    watching: so no trial is lost because clocks disagree or one jumps.

    suspects: whether some trial must be watched longer before it can be given up.
    """

    def __init__(self) -> None:
        self.suspects = False
        self._unchanged: dict[int, tuple[float, float]] = {}  # sign of life, and when first read

    def take_back_lost(self, study: Study) -> list[int]:
        """Queue the trials whose process is gone again, and return their numbers."""
        self.suspects = False
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        lost = [trial for trial in running if self._is_lost(trial)]
        for trial in lost:
            outcome = Outcome("interrupted", error="the process that ran it is gone")
            run_again(Trial(study, trial._trial_id), outcome)
        return [trial.number for trial in lost]

    def _is_lost(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner is None:  # just taken, or by a process that was killed before it could sign
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
    """The state of a trial, one of STATES."""
    if trial.state == TrialState.RUNNING:
        return "running"
    return trial.user_attrs.get("state", "waiting")


def counted_trials(study: Study) -> list[FrozenTrial]:
    """All trials except those given out beyond the number of draws."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if not trial.user_attrs.get("surplus")]


def _first_run(trial: FrozenTrial) -> bool:
    return "instead_of" not in trial.user_attrs and not trial.user_attrs.get("surplus")


def _draw_number(trial: Trial, trials: Sequence[FrozenTrial]) -> int | None:
    """The number of a trial's draw; None if an earlier trial already repeats the same one.

    Trials that repeat no other are draws 0, 1, 2, ..., in order of their numbers.
    """
    earlier = [other for other in trials if other.number < trial.number]
    replaced = trial.user_attrs.get("instead_of")
    if replaced is None:
        return sum(map(_first_run, earlier))
    if any(other.user_attrs.get("instead_of") == replaced for other in earlier):
        return None
    if "draw" in trial.user_attrs:
        return trial.user_attrs["draw"]
    # the trial that it replaces was lost before its draw was recorded
    return sum(_first_run(other) for other in earlier if other.number < replaced)


def _suggest(trial: Trial, name: str, among: BaseDistribution) -> None:
    if isinstance(among, optuna.distributions.CategoricalDistribution):
        trial.suggest_categorical(name, among.choices)
    elif isinstance(among, optuna.distributions.IntDistribution):
        trial.suggest_int(name, among.low, among.high)
    else:
        trial.suggest_float(name, among.low, among.high, step=among.step, log=among.log)


def _runs(process: int) -> bool:
    """Whether a process other than this one has this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
