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


class FullBatches:
    """The whole set at every step, shared by all runs."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def next(self) -> Batch:
        """The whole set."""
        return Batch(self.inputs, self.targets, shared=True)

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
        if self._position + self.size > self._orders.shape[1]:
            self._orders, self._position = self._new_orders(), 0
        rows = self._orders[:, self._position : self._position + self.size]
        self._position += self.size
        return Batch(_gathered(self.inputs, rows), _gathered(self.targets, rows), shared=False)

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

    def state_dict(self) -> dict:
        """The position in the text."""
        return {"position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the batches with this `state` were."""
        self._position = state["position"]


def _gathered(values: Tensor, rows: Tensor) -> Tensor:
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)
