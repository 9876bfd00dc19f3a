"""Batches for many runs at once: the whole set, shuffled, or in the order of a text."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from one_pass.errors import OnePassError
from one_pass.objectives import Batch


class Samples(Protocol):
    """Batches for D runs, and the whole set that they come from.

    Attributes:
        inputs, targets: the whole set, [N, ...].
    """

    inputs: Tensor
    targets: Tensor

    def next(self) -> Batch:
        """The next batch of every run."""

    def draw(self, count: int) -> Tensor:
        """The numbers of the samples in the next `count` batches, [count, ...]."""

    def batch(self, numbers: Tensor) -> Batch:
        """The batch of these samples, an entry of what `draw` returns."""


class FullBatches:
    """The whole set at every step, shared by all runs."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def next(self) -> Batch:
        """The whole set."""
        return Batch(self.inputs, self.targets, shared=True)

    def draw(self, count: int) -> Tensor:
        """Nothing, since no batch differs from another: [count, 0]."""
        return torch.zeros(count, 0, dtype=torch.long, device=self.inputs.device)

    def batch(self, numbers: Tensor) -> Batch:
        """The whole set."""
        return self.next()

    def state_dict(self) -> dict:
        """An empty dict: there is no state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Does nothing: there is no state."""


class ShuffledBatches:
    """Batches of `size` samples in a new order each epoch, which differs between runs.

    Raises OnePassError if the size isn't between 1 and the number of samples.

    generators: one for each run.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, size: int, generators: Sequence[Generator]
    ) -> None:
        if not 1 <= size <= len(inputs):
            raise OnePassError(f"batch size {size} must be from 1 to {len(inputs)}, the samples")
        self.inputs, self.targets = inputs, targets
        self.size, self.generators = size, generators
        self._orders, self._position = self._new_orders(), 0

    def next(self) -> Batch:
        """The next samples of each run, [D, size, ...]; an epoch's incomplete batch is dropped."""
        return self.batch(self._next_rows())

    def draw(self, count: int) -> Tensor:
        """The rows of the next batches, [count, D, size]."""
        return torch.stack([self._next_rows() for _ in range(count)])

    def batch(self, numbers: Tensor) -> Batch:
        """The batch of these rows [D, size]."""
        inputs, targets = _gathered(self.inputs, numbers), _gathered(self.targets, numbers)
        return Batch(inputs, targets, shared=False)

    def _next_rows(self) -> Tensor:
        if self._position + self.size > self._orders.shape[1]:
            self._orders, self._position = self._new_orders(), 0
        rows = self._orders[:, self._position : self._position + self.size]
        self._position += self.size
        return rows

    def state_dict(self) -> dict:
        """What a resumed run needs to draw the same batches."""
        states = torch.stack([generator.get_state() for generator in self.generators])
        return {"orders": self._orders.cpu(), "position": self._position, "generators": states}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the batches with this `state` were."""
        self._orders, self._position = state["orders"].to(self.inputs.device), state["position"]
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved.clone())  # not a view of the stacked states

    def _new_orders(self) -> Tensor:
        count = len(self.inputs)
        orders = [torch.randperm(count, generator=g, device=g.device) for g in self.generators]
        return torch.stack(orders).to(self.inputs.device)


class SequentialBatches:
    """One window of text after the other, the same for all runs.

    inputs, targets: [windows, B, length].
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self._position = 0

    def next(self) -> Batch:
        """The next window; the first follows the last."""
        index = self._position % len(self.inputs)
        self._position += 1
        return Batch(self.inputs[index], self.targets[index], shared=True)

    def draw(self, count: int) -> Tensor:
        """The numbers of the next windows, [count]."""
        numbers = torch.arange(self._position, self._position + count, device=self.inputs.device)
        self._position += count
        return numbers % len(self.inputs)

    def batch(self, numbers: Tensor) -> Batch:
        """The window of this number []."""
        inputs, targets = (t.index_select(0, numbers[None])[0] for t in (self.inputs, self.targets))
        return Batch(inputs, targets, shared=True)

    def state_dict(self) -> dict:
        """The position in the text."""
        return {"position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the batches with this `state` were."""
        self._position = state["position"]


def _gathered(values: Tensor, rows: Tensor) -> Tensor:
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)
