"""A loop saves, ends on Ctrl-C, goes on where it was, and never saves what failed."""

import signal

import pytest
import torch

from experiment.errors import NonFiniteError, RunLogError
from experiment.loop import finish_on_interrupt, run_steps
from experiment.run_log import RunLog
from experiment.run_reader import read_metrics


class Counter:
    """Seven steps; says in which it is interrupted or fails, and which were saved."""

    def __init__(self, interrupted_in: int | None = None, fails_in: int | None = None) -> None:
        self.interrupted_in, self.fails_in = interrupted_in, fails_in
        self.done, self.saved = 0, []

    @property
    def finished(self) -> bool:
        return self.done == 7

    def step(self) -> dict[str, float]:
        if self.done + 1 == self.fails_in:
            raise NonFiniteError("loss")
        self.done += 1
        if self.done == self.interrupted_in:
            signal.raise_signal(signal.SIGINT)
        return {"x": self.done / 7, "sometimes": float("nan")}

    def state_dict(self) -> dict:
        self.saved.append(self.done)
        return {"done": torch.tensor(self.done)}

    def load_state_dict(self, state: dict) -> None:
        self.done = int(state["done"])


def new_run(tmp_path) -> RunLog:
    return RunLog.create(tmp_path / "run", {}, quiet=True)


def steps_saved(log: RunLog, interrupted_in: int | None, **settings) -> tuple[bool, list[int]]:
    """Whether the seven steps have been made, and after which of them a checkpoint was saved."""
    counter = Counter(interrupted_in)
    return run_steps(log, counter, "step", 7, **settings), counter.saved


def test_a_loop_saves_every_so_many_steps_of_the_run_and_at_its_end(tmp_path):
    with new_run(tmp_path) as log:
        assert steps_saved(log, 4, checkpoint_every=3) == (False, [3, 4])
    with RunLog.reopen(log.directory, quiet=True) as log:
        assert steps_saved(log, None, checkpoint_every=3) == (True, [6, 7])
    with RunLog.reopen(log.directory, quiet=True) as log:
        assert steps_saved(log, None) == (True, [])
    assert read_metrics(log.directory)["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_loop_interrupted_within_its_last_step_has_finished(tmp_path):
    with new_run(tmp_path) as log:
        assert steps_saved(log, 7) == (True, [1, 2, 3, 4, 5, 6, 7])


def test_rows_may_have_numbers_of_their_own_and_a_resumed_loop_finds_its_place(tmp_path):
    numbers = [0, 2, 3, 5, 8, 13, 21]
    with new_run(tmp_path) as log:
        assert steps_saved(log, 2, numbers=numbers) == (False, [1, 2])
    with RunLog.reopen(log.directory, quiet=True) as log:
        assert steps_saved(log, None, numbers=numbers) == (True, [3, 4, 5, 6, 7])
    assert read_metrics(log.directory)["step"].tolist() == numbers
    assert "going on from step 2" in log.path("log.txt").read_text()


def test_a_step_that_fails_leaves_a_checkpoint_of_the_rows_before_it(tmp_path):
    for fails_in, saved in ((1, []), (4, [3]), (6, [3, 5])):
        counter = Counter(fails_in=fails_in)
        with (
            RunLog.create(tmp_path / str(fails_in), {}, quiet=True) as log,
            pytest.raises(NonFiniteError),
        ):
            run_steps(log, counter, "step", 7, checkpoint_every=3)
        assert counter.saved == saved
        with RunLog.reopen(log.directory, quiet=True) as log:
            assert (log.load_checkpoint() or (0,))[0] == fails_in - 1


@pytest.mark.parametrize(("step", "state"), [(99, {"done": torch.tensor(3)}), (3, {"left": [1]})])
def test_the_state_of_another_command_is_refused_in_one_line(tmp_path, step, state):
    with new_run(tmp_path) as log:
        log.save_checkpoint(step, state)
    with (
        RunLog.reopen(log.directory, quiet=True) as log,
        pytest.raises(RunLogError, match="another command") as refusal,
    ):
        run_steps(log, Counter(), "step", 7)
    assert "\n" not in str(refusal.value)


def test_columns_that_were_not_measured_or_not_asked_for_are_not_shown(tmp_path, capsys):
    with RunLog.create(tmp_path / "run", {}) as log:
        run_steps(log, Counter(), "step", 7)
    shown = capsys.readouterr().err
    assert "step 7/7  x 1  " in shown and "sometimes" not in shown
    with RunLog.create(tmp_path / "other", {}) as log:
        run_steps(log, Counter(), "step", 7, shown=())
    assert "x 1" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_only_asks_and_the_second_stops(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), finish_on_interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(number)
        assert interrupt.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
