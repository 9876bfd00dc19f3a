"""Random orders of the rows of a data set by counted numbers, those of several tasks at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sets.counted_numbers import fold_in, on_device, permutations

EPOCHS, BATCHES = range(2)  # the purposes of numbers


@dataclass
class CountedOrder:
    """An endless order of `rows` rows in batches, each epoch of its own; counts what is done.

    key: of 64 bits, as from `drawn_key`; everything else follows from it.
    done: the batches so far.
    """

    key: int
    rows: int
    batch_size: int
    device: torch.device
    done: int = 0

    @property
    def batches(self) -> int:
        """The batches of an epoch; a last incomplete one is dropped."""
        return self.rows // self.batch_size


def next_batches(
    orders: Sequence[CountedOrder], numbers: Callable[[Tensor], dict[str, Tensor]], at_once: int = 1
) -> Iterator[dict[str, Tensor]]:
    """For each next batch of orders of the same rows: its "rows", int64 [tasks, batch], and more.

    numbers: from keys [batches, tasks] of batches, tensors [batches, ...] by name.
    at_once: the number of batches whose numbers are computed together.
    """
    first, begun, chunk = orders[0], None, None
    while True:
        done = [order.done for order in orders]
        ahead = 0 if begun is None else done[0] - begun[0]
        if begun is None or ahead >= first.batches or done != [n + ahead for n in begun]:
            rows, keys = _an_epoch(orders)
            begun, ahead, chunk = done, 0, None
        if chunk is None or ahead // at_once != chunk:
            chunk = ahead // at_once
            some = numbers(keys[chunk * at_once : (chunk + 1) * at_once])
        for order in orders:
            order.done += 1
        yield {"rows": rows[ahead]} | {n: t[ahead % at_once] for n, t in some.items()}


def orders_of_first_epochs(orders: Sequence[CountedOrder]) -> Tensor:
    """The rows of the batches of the first epochs, int64 [tasks, batches, batch]."""
    keys = on_device([order.key for order in orders], orders[0].device)
    return _of_epochs(keys, torch.zeros_like(keys), orders[0])


def _an_epoch(orders: Sequence[CountedOrder]) -> tuple[Tensor, Tensor]:
    """Rows [batches, tasks, batch] and keys [batches, tasks] of as many next batches as an epoch's.

    They are of two epochs of an order that is within one.
    """
    first = orders[0]
    told = [[order.key, order.done, order.done // first.batches] for order in orders]
    keys, done, epochs = on_device(told, first.device).unbind(1)
    rows, places = _of_epochs(keys, epochs, first), [o.done % first.batches for o in orders]
    if any(places):
        both = torch.cat([rows, _of_epochs(keys, epochs + 1, first)], 1)
        rows = torch.stack([
            of_task[place : place + first.batches]
            for of_task, place in zip(both, places, strict=True)
        ])  # fmt: skip
    steps = done + torch.arange(first.batches, device=first.device).unsqueeze(1)
    return rows.transpose(0, 1).contiguous(), fold_in(fold_in(keys, BATCHES), steps)


def _of_epochs(keys: Tensor, epochs: Tensor, order: CountedOrder) -> Tensor:
    """The rows of an epoch of each key, [tasks, batches, batch]."""
    shuffled = permutations(fold_in(fold_in(keys, EPOCHS), epochs), order.rows)
    kept = shuffled[:, : order.batches * order.batch_size]
    return kept.unflatten(1, (order.batches, order.batch_size))
