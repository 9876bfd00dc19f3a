"""Batches for many runs: each sample once an epoch, the same again after a resume."""

import pytest
import torch

from one_pass import FullBatches, OnePassError, SequentialBatches, ShuffledBatches


def generators(runs: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(runs)]


def test_every_run_sees_each_sample_once_an_epoch_in_an_order_of_its_own():
    values = torch.arange(12)
    batches = ShuffledBatches(values, values, 4, generators(2))
    epoch = torch.cat([batches.next().inputs for _ in range(3)], dim=1)
    assert torch.equal(epoch.sort(dim=1).values, values.expand(2, 12))
    assert not torch.equal(epoch[0], epoch[1])
    again = torch.cat([batches.next().inputs for _ in range(3)], dim=1)
    assert not torch.equal(epoch, again)


def test_resumed_batches_are_the_same():
    values = torch.arange(10)
    first = ShuffledBatches(values, values, 3, generators(2))
    for _ in range(4):
        first.next()
    state = first.state_dict()
    expected = [first.next().inputs for _ in range(5)]
    second = ShuffledBatches(values, values, 3, generators(2))
    second.load_state_dict(state)
    assert all(torch.equal(second.next().inputs, batch) for batch in expected)


def test_text_comes_window_by_window_and_full_batches_are_shared():
    windows = torch.arange(3)[:, None]
    sequence = SequentialBatches(windows, windows)
    assert [sequence.next().inputs.item() for _ in range(4)] == [0, 1, 2, 0]
    assert FullBatches(windows, windows).next().shared


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_that_the_samples_cannot_fill_is_refused(size):
    with pytest.raises(OnePassError, match="from 1 to 10"):
        ShuffledBatches(torch.arange(10), torch.arange(10), size, generators(1))


def test_another_default_device_leaves_draws_where_their_generators_are():
    values = torch.arange(10)
    expected = ShuffledBatches(values, values, 3, generators(2)).next()
    with torch.device("meta"):
        batch = ShuffledBatches(values, values, 3, generators(2)).next()
    assert torch.equal(batch.inputs, expected.inputs)
