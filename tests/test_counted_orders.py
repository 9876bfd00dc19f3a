"""Orders of several tasks at once: each task's is the one that it has alone, epoch by epoch."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sets.counted_numbers import fold_in, permutations
from data_sets.counted_orders import (
    BATCHES,
    EPOCHS,
    CountedOrder,
    next_batches,
    orders_of_first_epochs,
)

CPU = torch.device("cpu")


def obvious(key: int, rows: int, batch_size: int, number: int) -> tuple[list[int], int]:
    """The rows of batch `number`, and its key."""
    keys = torch.tensor([key])
    epoch, place = divmod(number, rows // batch_size)
    order = permutations(fold_in(fold_in(keys, EPOCHS), epoch), rows)[0].tolist()
    return order[place * batch_size :][:batch_size], int(fold_in(fold_in(keys, BATCHES), number))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 9)), min_size=1, max_size=3
    ),
    st.integers(5, 9),
    st.integers(1, 5),
)
def test_batches_of_tasks_are_those_of_each_wherever_it_is(tasks, rows, batch_size):
    orders = [CountedOrder(key, rows, batch_size, CPU, done) for key, done in tasks]
    together = itertools.islice(next_batches(orders), 2 * rows)
    for number, (index, keys) in enumerate(together):
        for k, (key, done) in enumerate(tasks):
            expected = obvious(key, rows, batch_size, done + number)
            assert (index[k].tolist(), int(keys[k])) == expected
    assert [order.done for order in orders] == [done + 2 * rows for _, done in tasks]


def test_an_order_goes_on_where_another_iterator_has_left_it():
    order, other = (CountedOrder(k, 7, 2, CPU) for k in (5, 6))
    alone, together = next_batches([order]), next_batches([order, other])
    taken = [next(alone)[0][0], next(together)[0][0], next(together)[0][0], next(alone)[0][0]]
    assert [t.tolist() for t in taken] == [obvious(5, 7, 2, number)[0] for number in range(4)]


def test_first_epochs_are_those_of_next_batches():
    orders = [CountedOrder(k, 9, 4, CPU) for k in (5, 6)]
    first = orders_of_first_epochs(orders)
    for number, (index, _) in enumerate(itertools.islice(next_batches(orders), 2)):
        assert torch.equal(first[:, number], index)
