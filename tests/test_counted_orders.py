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


def by_keys(keys):
    return {"keys": keys}


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
    st.integers(1, 4),
)
def test_batches_of_tasks_are_those_of_each_wherever_it_is(tasks, rows, batch_size, at_once):
    orders = [CountedOrder(key, rows, batch_size, CPU, done) for key, done in tasks]
    together = itertools.islice(next_batches(orders, by_keys, at_once), 2 * rows)
    for number, parts in enumerate(together):
        index, keys = parts["rows"], parts["keys"]
        for k, (key, done) in enumerate(tasks):
            expected = obvious(key, rows, batch_size, done + number)
            assert (index[k].tolist(), int(keys[k])) == expected
    assert [order.done for order in orders] == [done + 2 * rows for _, done in tasks]


def test_an_order_goes_on_where_another_iterator_has_left_it():
    order, other = (CountedOrder(k, 7, 2, CPU) for k in (5, 6))
    alone = next_batches([order], by_keys, 3)
    together = next_batches([order, other], by_keys, 2)
    taken = [next(stream) for stream in (alone, together, together, alone)]
    assert [int(parts["keys"][0]) for parts in taken] == [obvious(5, 7, 2, k)[1] for k in range(4)]
    expected = [obvious(5, 7, 2, number)[0] for number in range(4)]
    assert [parts["rows"][0].tolist() for parts in taken] == expected


def test_first_epochs_are_those_of_next_batches():
    orders = [CountedOrder(k, 9, 4, CPU) for k in (5, 6)]
    first = orders_of_first_epochs(orders)
    for number, parts in enumerate(itertools.islice(next_batches(orders, by_keys), 2)):
        assert torch.equal(first[:, number], parts["rows"])
