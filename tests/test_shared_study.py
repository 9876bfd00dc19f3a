"""Who runs which draw: one process or several, some of them killed."""

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from experiment.errors import WrongInputError
from sweeps import study as shared_study
from sweeps.points import make_sampler, random_point
from sweeps.space import searched_flag
from sweeps.study import (
    Outcome,
    StudyError,
    Watch,
    claim,
    counted_trials,
    finish,
    open_storage,
    open_study,
    run_again,
    say_alive,
    state_of,
)

optuna.logging.set_verbosity(optuna.logging.ERROR)
FLAGS = [searched_flag("x=-1:1"), searched_flag("lr=log:1e-4:1"), searched_flag("p=choice:2,3")]


def study_in(directory, method="random", definition=None, url=None, seed=0):
    storage = open_storage(url, directory)
    draws = make_sampler(FLAGS, seed, method, startup=5)
    return open_study(storage, "s", "minimize", definition or {"of": "x"}, draws, NopPruner())


def run_all(study, draws, value=lambda params: params["x"] ** 2) -> list[dict]:
    taken = []
    while (trial := claim(study, draws)) is not None:
        taken.append(trial.params)
        finish(trial, Outcome("done", value(trial.params), 0))
    return taken


def be_another_process() -> None:
    """What a forked process lacks of one that was started anew."""
    shared_study.HERE |= {"process": os.getpid(), "session": f"of {os.getpid()}"}


def finished_draws(study) -> list[int]:
    return sorted(t.user_attrs["draw"] for t in counted_trials(study) if state_of(t) == "done")


@pytest.fixture(params=["journal", "sqlite"])
def url(request, tmp_path):
    """Either storage."""
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def test_every_draw_is_given_out_once_with_its_values(tmp_path, url):
    taken = run_all(study_in(tmp_path, url=url), 6)
    assert taken == [random_point(FLAGS, 0, number) for number in range(6)]


def test_a_study_opened_again_goes_on_and_may_be_extended(tmp_path, url):
    run_all(study_in(tmp_path, url=url), 3)
    assert claim(study_in(tmp_path, url=url), 3) is None
    assert run_all(study_in(tmp_path, url=url), 5) == [random_point(FLAGS, 0, n) for n in (3, 4)]


def test_a_study_of_another_search_is_refused(tmp_path):
    study_in(tmp_path)
    with pytest.raises(StudyError, match=r"of 'x' there, 'y' now.*choose another"):
        study_in(tmp_path, definition={"of": "y"})


def test_guided_trials_come_nearer_to_the_optimum_than_random_ones():
    def value(params):
        return (params["x"] - 0.3) ** 2 + 0.1 * (math.log10(params["lr"]) + 2) ** 2

    values = {"random": [], "tpe": [], "population": []}
    for method, seed in [(m, s) for m in values for s in range(3)]:
        draws = make_sampler(FLAGS, seed, method, startup=5)
        study = open_study(InMemoryStorage(), "s", "minimize", {}, draws, NopPruner())
        taken = run_all(study, 25, value)
        assert taken[:5] == [random_point(FLAGS, seed, number) for number in range(5)]
        values[method] += [value(params) for params in taken[15:]]
    for method in ("tpe", "population"):
        assert np.median(values[method]) < 0.7 * np.median(values["random"])


def test_a_gaussian_process_comes_near_the_optimum_in_few_trials_and_after_diverged_ones(tmp_path):
    def value(params):
        return math.inf if params["x"] > 0.9 else (params["x"] + 0.6) ** 2

    study = study_in(tmp_path, "gp")
    taken = run_all(study, 8, value)
    assert taken[:5] == [random_point(FLAGS, 0, number) for number in range(5)]
    assert min(map(value, taken[5:])) < 0.2 * min(map(value, taken[:5]))


@pytest.mark.parametrize("method", ["tpe", "population"])
def test_a_guided_search_gone_on_with_suggests_what_one_never_stopped_does(tmp_path, method):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    taken = run_all(study_in(whole, method), 9)
    assert run_all(study_in(parts, method), 7) + run_all(study_in(parts, method), 9) == taken


def test_a_diverged_trial_counts_as_the_worst(tmp_path):
    study = study_in(tmp_path)
    trial = claim(study, 1)
    finish(trial, Outcome("diverged", None, 1, "error: loss nan"))
    (trial,) = study.get_trials()
    assert trial.value == math.inf and state_of(trial) == "diverged"
    assert trial.user_attrs["exit_status"] == 1


def test_an_interrupted_trial_is_run_again_with_its_values_under_a_new_number(tmp_path):
    study = study_in(tmp_path, "tpe")
    run_all(study, 7)
    first = claim(study, 8)
    run_again(first, Outcome("interrupted", None, 130))
    second = claim(study, 8)
    assert (first.number, second.number) == (7, 8)
    assert second.params == first.params and second.user_attrs["draw"] == 7
    finish(second, Outcome("done", 1.0, 0))
    assert claim(study, 8) is None and finished_draws(study) == list(range(8))


def claim_and_wait(directory, url, claimed) -> None:
    be_another_process()
    claim(study_in(directory, url=url), 3)
    claimed.set()
    time.sleep(60)


def test_the_trial_of_a_killed_process_is_given_out_again(tmp_path, url):
    context = multiprocessing.get_context("fork")
    claimed = context.Event()
    process = context.Process(target=claim_and_wait, args=(tmp_path, url, claimed))
    process.start()
    assert claimed.wait(60)
    study = study_in(tmp_path, url=url)
    assert Watch().take_back_lost(study) == []
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert Watch().take_back_lost(study) == [0] and Watch().take_back_lost(study) == []
    assert sorted(map(str, run_all(study, 3))) == sorted(
        str(random_point(FLAGS, 0, n)) for n in range(3)
    )
    assert [state_of(t) for t in counted_trials(study)].count("interrupted") == 1


@pytest.fixture
def clock(monkeypatch):
    """The clock that cannot jump, to be moved by hand."""
    now = [1000.0]
    monkeypatch.setattr(shared_study.time, "monotonic", lambda: now[0])
    return now


def claimed_elsewhere(study):
    """A trial of another machine, and how to give a sign of life with another clock's time."""
    trial = claim(study, 1)
    elsewhere = {"host": "elsewhere", "process": 1, "session": "other"}
    return trial, lambda seen: trial.set_user_attr("owner", elsewhere | {"seen": seen})


def test_a_process_of_another_machine_is_lost_when_it_has_been_silent_for_long(tmp_path, clock):
    study, watch = study_in(tmp_path), Watch()
    trial, sign_of_life = claimed_elsewhere(study)
    sign_of_life(time.time() - 60)
    assert watch.take_back_lost(study) == [] and not watch.suspects
    sign_of_life(time.time() - 1000)
    assert watch.take_back_lost(study) == [] and watch.suspects
    clock[0] += shared_study.WATCHED_FOR
    assert watch.take_back_lost(study) == [0] and not watch.suspects
    assert not say_alive(trial) and not finish(trial, Outcome("done", 1.0, 0))


@pytest.mark.parametrize("jump", [-1e5, 1e5])
def test_a_clock_that_jumps_costs_no_process_its_trial(tmp_path, clock, jump):
    study, watch = study_in(tmp_path), Watch()
    trial, sign_of_life = claimed_elsewhere(study)
    for heartbeat in range(10):
        sign_of_life(time.time() + jump + heartbeat)
        assert watch.take_back_lost(study) == []
        clock[0] += shared_study.HEARTBEAT
    assert finish(trial, Outcome("done", 1.0, 0))


def test_a_trial_lost_before_it_knew_its_draw_is_run_all_the_same(tmp_path, monkeypatch):
    study = study_in(tmp_path)
    run_all(study, 2)
    study.ask()  # a kill at this moment
    monkeypatch.setattr(shared_study, "LOST_AFTER", 0.0)
    monkeypatch.setattr(shared_study, "WATCHED_FOR", 0.0)
    Watch().take_back_lost(study)
    monkeypatch.undo()
    run_all(study, 4)
    assert finished_draws(study) == [0, 1, 2, 3]
    assert [t.params for t in counted_trials(study) if state_of(t) == "done"][-1] in (
        random_point(FLAGS, 0, 2),
        random_point(FLAGS, 0, 3),
    )


def test_of_two_successors_of_a_lost_trial_one_is_run(tmp_path):
    study = study_in(tmp_path)
    trial = claim(study, 2)
    run_again(trial, Outcome("interrupted"))
    run_again(trial, Outcome("interrupted"))  # two processes, at the same moment
    run_all(study, 2)
    assert finished_draws(study) == [0, 1]


def test_a_number_given_out_beyond_the_draws_is_never_run_nor_shown(tmp_path, monkeypatch):
    study, other = study_in(tmp_path), study_in(tmp_path)
    ask = study.ask

    def slow_ask():  # the other process is faster, after this one has seen a free draw
        monkeypatch.setattr(study, "ask", ask)
        finish(claim(other, 1), Outcome("done", 1.0, 0))
        return ask()

    monkeypatch.setattr(study, "ask", slow_ask)
    assert claim(study, 1) is None
    assert finished_draws(study) == [0] and len(counted_trials(study)) == 1
    assert run_all(study, 3) == [random_point(FLAGS, 0, number) for number in (1, 2)]


def take_all(directory, url, draws, queue) -> None:
    be_another_process()
    queue.put(run_all(study_in(directory, url=url), draws))


def test_processes_that_share_a_study_run_every_draw_once(tmp_path, url):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=take_all, args=(tmp_path, url, 12, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    taken = [params for _ in processes for params in queue.get(timeout=30)]
    for process in processes:
        process.join()
    assert sorted(map(str, taken)) == sorted(str(random_point(FLAGS, 0, n)) for n in range(12))
    assert finished_draws(study_in(tmp_path, url=url)) == list(range(12))


def test_an_entry_half_written_by_a_killed_process_is_taken_off(tmp_path):
    run_all(study_in(tmp_path), 2)
    with (tmp_path / shared_study.JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    study = study_in(tmp_path)
    run_all(study, 4)
    assert finished_draws(study_in(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "url",
    ["sqlite:////nowhere/study.db", "nonsense", "postgresql+nodriver://me:secret@nowhere/study"],
)
def test_a_storage_that_can_not_be_reached_is_one_line_without_its_password(tmp_path, url):
    with pytest.raises(StudyError, match="can't use the storage") as refusal:
        open_storage(url, tmp_path)
    assert "\n" not in str(refusal.value) and "secret" not in str(refusal.value)


def test_trials_are_told_to_optuna_in_its_own_states(tmp_path):
    study = study_in(tmp_path)
    for state in ("done", "pruned", "failed", "diverged"):
        finish(claim(study, 4), Outcome(state, 1.0 if state == "done" else None, 0))
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert [trial.state for trial in study.get_trials()] == states


# ---- a journal that is damaged ----


def damaged_journal(tmp_path, change) -> Path:
    """The journal of four trials, after a change of its bytes."""
    run_all(study_in(tmp_path), 4)
    path = tmp_path / shared_study.JOURNAL
    path.write_bytes(change(path.read_bytes()))
    return path


def without_checksums(content: bytes) -> bytes:
    """As a journal was before there were any."""
    lines = content.splitlines()
    return b"".join(line.partition(b"\t")[0] + b"\n" for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b'"values":[0', b'"values":[1', 1),
        lambda content: b"".join(content.splitlines(keepends=True)[1:]),
        lambda content: content.replace(content.splitlines(keepends=True)[5], b""),
        lambda content: content + b"junk\n",
        lambda content: content + b"\xff\xfe\n",
        lambda content: b"[" * 100_000 + b"\n" + content,
        lambda content: without_checksums(content) + b'{"op_code":4,"worker_id":"x"}\n',
        lambda content: b'{"op_code":99,"worker_id":"x","trial_id":7}\n',
        lambda content: b"5\n",
    ],
)
def test_a_journal_that_was_changed_is_refused_in_one_line(tmp_path, change):
    path = damaged_journal(tmp_path, change)
    before = path.read_bytes()
    with pytest.raises(WrongInputError, match=r"study\.journal is damaged") as refusal:
        study_in(tmp_path)
    assert "\n" not in str(refusal.value) and path.read_bytes() == before


@pytest.mark.parametrize("of_before", [False, True])
def test_of_a_journal_without_its_last_newline_nothing_is_lost(tmp_path, of_before):
    path = damaged_journal(
        tmp_path, lambda content: (without_checksums(content) if of_before else content)[:-1]
    )
    before = path.read_bytes()
    assert len(counted_trials(study_in(tmp_path))) == 4
    assert path.read_bytes().startswith(before + b"\n")


def test_a_journal_of_before_there_were_checksums_goes_on_with_them(tmp_path):
    path = damaged_journal(tmp_path, without_checksums)
    assert run_all(study_in(tmp_path), 5) == [random_point(FLAGS, 0, 4)]
    lines = path.read_bytes().splitlines()
    assert b"\t" not in lines[0] and b"\t" in lines[-1]
    assert len(counted_trials(study_in(tmp_path))) == 5
