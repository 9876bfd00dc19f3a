"""Steps that change their state in place, several of them to a replay of a recording.

    steps = RecordedSteps(step, state, record)
    results = steps(count, batch)        # step(*batch(0)), step(*batch(1)), ...

A recording of `length` steps is launched as a whole, so that the host, which launches a kernel in
some microseconds, is not what a device waits for. It reads each batch from buffers of its own;
weights, an optimizer's momentum and running statistics stay where they are and are changed in
place. What differs from step to step, such as the learning rate, is part of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

STEPS = 10  # of a replay


class Recording(Protocol):
    """A function of tensors as a recorded computation, such as a CUDA graph.

    To make one may call the function several times. Raises RuntimeError, whose message is one line,
    if the function cannot be recorded.

    function: (tensors) -> list of tensors.
    examples: inputs, whose shapes are those of all replays.
    """

    def __init__(
        self, function: Callable[..., list[Tensor]], examples: Sequence[Tensor]
    ) -> None: ...

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The results for these inputs, valid until the next call."""


class NotRecordedError(RuntimeError):
    """Steps that cannot be recorded; the message is one line, and no step has been taken."""


class RecordedSteps:
    """See the module's docstring.

    step: (*batch) -> tensor of numbers; changes nothing but the tensors of `state`, in place.
    state: all tensors that a step changes.
    record: the kind of recording.
    length: the steps of a replay; those that are left over are replayed one by one.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        state: Sequence[Tensor],
        record: type[Recording],
        length: int = STEPS,
    ) -> None:
        self.step, self.record, self.length = step, record, length
        self.state = [t.detach() for t in state]
        self.recordings: dict[int, Recording] = {}

    def __call__(self, count: int, batch: Callable[[int], Sequence[Tensor]]) -> Tensor:
        """The results [count, ...] of so many steps, at least one; raises NotRecordedError.

        batch: the tensors of the batch with this number, from 0; the same whenever it is called.
        """
        whole = count - count % self.length
        sizes = [self.length] * (whole // self.length) + [1] * (count - whole)
        for size in {*sizes} - {*self.recordings}:
            self.recordings[size] = self._recorded(size, _several(batch, 0, size))
        results, first = [], 0
        for size in sizes:
            (found,) = self.recordings[size](*_several(batch, first, size))
            results.append(found.clone())
            first += size
        return torch.cat(results)

    def copies(self) -> list[Tensor]:
        """Copies of the state, for `put_back`."""
        return [t.clone() for t in self.state]

    def put_back(self, copies: Sequence[Tensor]) -> None:
        """Give the state the numbers that it had when these copies were made."""
        for tensor, copy in zip(self.state, copies, strict=True):
            tensor.copy_(copy)

    def _recorded(self, steps: int, tensors: Sequence[Tensor]) -> Recording:
        """A recording of so many steps, with their state as it was."""
        size = len(tensors) // steps

        def function(*tensors: Tensor) -> list[Tensor]:
            parts = [tensors[k : k + size] for k in range(0, steps * size, size)]
            return [torch.stack([self.step(*part) for part in parts])]

        before = self.copies()
        try:
            return self.record(function, tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            raise NotRecordedError(str(problem)) from problem
        finally:
            self.put_back(before)


def _several(batch: Callable[[int], Sequence[Tensor]], first: int, count: int) -> list[Tensor]:
    """The tensors of so many batches, one batch after the other."""
    return [t for k in range(first, first + count) for t in batch(k)]
