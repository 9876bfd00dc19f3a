"""Runs of SGD that tune themselves, with many steps at a time as the replay of a recording.

    tuning = ReplayedTuning(objective, training, validation, settings, state)
    tuning.calls.record = CudaRecording      # None, as it is at first: steps are taken one by one
    tuning.advance(100)

Steps are recorded when their like come for the second time: the first step of a run, which ignores
momentum, has no like.
"""

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from one_pass.objectives import Objective
from one_pass.recorded import RecordedCalls
from one_pass.samples import Samples
from one_pass.settings import WITH_VALIDATION_BATCHES, Settings
from one_pass.tuning import State, Tuning

LENGTH = 10  # weight steps of a recording, at most, unless more are differentiated through
LONGEST = 200  # weight steps to differentiate through that are recorded


class ReplayedTuning(Tuning):
    """A Tuning whose steps can be replayed; its samples are the library's own, or have `draw`.

    Attributes:
        calls: its `record` makes the recordings. The objective's must be None if this is not.
    """

    def __init__(
        self,
        objective: Objective,
        training: Samples,
        validation: Samples | None,
        settings: Settings,
        state: State,
    ) -> None:
        super().__init__(objective, training, validation, settings, state)
        self.calls, self._seen = RecordedCalls(), set()

    def advance(self, steps: int) -> None:
        """Take `steps` weight steps, as Tuning does; raises OnePassError as that does."""
        while steps:
            count = self._count_together(steps) if self.calls.record is not None else steps
            like = self._like(count)
            if self.calls.record is None or count > LONGEST or like not in self._seen:
                super().advance(count)
                self._seen.add(like)
            else:
                self._replay(like, count)
            steps -= count

    def _count_together(self, steps: int) -> int:
        """How many of the next `steps` weight steps are taken together."""
        settings = self.settings
        until = settings.every - self.state.step % settings.every  # the next hyperparameter step
        if settings.method == "fixed":
            return min(steps, LENGTH)
        if settings.method == "unrolled":
            return min(steps, until)
        if settings.every > LENGTH:
            return min(steps, until, LENGTH)
        rounds = 1 if self._ends_outside() else LENGTH // settings.every
        return min(steps, until + (rounds - 1) * settings.every)

    def _ends_outside(self) -> bool:
        """Whether something follows a hyperparameter step, or is one, that is not recorded."""
        return self.settings.reset or self.settings.method == "population"

    def _like(self, count: int) -> Hashable:
        """The same for steps that are alike: what differs is in tensors of the same shapes."""
        state = self.state
        missing = tuple(name for name, value in vars(state).items() if value is None)
        tuned = tuple((state.step + k) % self.settings.every == 0 for k in range(1, count + 1))
        return state.fresh, missing, tuned

    def _replay(self, like: Hashable, count: int) -> None:
        state, settings, tuned = self.state, self.settings, like[-1]
        numbers = [self.training.draw(count)]
        if any(tuned) and settings.method in WITH_VALIDATION_BATCHES:
            numbers.append(self.validation.draw(sum(tuned)))
        method = "fixed" if settings.method == "population" else settings.method
        taken = replace(settings, method=method, reset=False)
        missing = {name: None for name, value in vars(state).items() if value is None}
        fixed = missing | {"step": state.step % settings.every, "fresh": state.fresh}

        def advanced(tensors: dict, numbers: list[Tensor]) -> dict:
            training, *held_out = map(_Given, (self.training, self.validation), numbers)
            samples = training, held_out[0] if held_out else None
            tuning = Tuning(self.objective, *samples, taken, State(**tensors | fixed))
            tuning.advance(count)
            return _tensors(tuning.state)

        found = self.calls(like, advanced, (_tensors(state), numbers))
        after = {"step": state.step + count, "fresh": False}
        self.restore(State(**dict.fromkeys(missing) | found | after))
        if tuned[-1] and settings.method == "population":
            self._exploit()
            self.restore(self.state)
        if tuned[-1] and self._reset_is_due():
            self._reset_or_renew()


class _Given:
    """The batches of these numbers, one after the other."""

    def __init__(self, samples: Samples, numbers: Tensor) -> None:
        self.next = map(samples.batch, numbers).__next__


def _tensors(state: State) -> dict:
    """The fields of the state that are tensors or contain them."""
    plain = (bool, int, type(None))
    return {name: value for name, value in vars(state).items() if not isinstance(value, plain)}
