"""Both sources give each task the numbers that it would get alone, and new ones at each call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sets.counted_numbers import words
from data_sets.number_sources import CountedNumbers, HostNumbers

SOURCES = {
    "host": lambda seeds: HostNumbers([torch.Generator().manual_seed(seed) for seed in seeds]),
    "device": lambda seeds: CountedNumbers(torch.tensor(seeds)),
}
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def drawn(numbers, shape):
    return [
        numbers.uniforms(*shape), numbers.bytes(*shape),
        numbers.normals(*shape, dtype=torch.float32), numbers.uniforms(*shape),
    ]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=4), shape=shapes)
def test_the_numbers_of_a_task_are_those_that_it_gets_alone(source, seeds, shape):
    together = drawn(SOURCES[source](seeds), shape)
    for k, seed in enumerate(seeds):
        for one, alone in zip(together, drawn(SOURCES[source]([seed]), shape), strict=True):
            assert one.shape == (len(seeds), *shape) and torch.equal(one[k], alone[0])
    types = [t.dtype for t in together]
    assert types == [torch.float64, torch.uint8, torch.float32, torch.float64]


@pytest.mark.parametrize("source", SOURCES)
def test_each_call_gives_new_numbers(source):
    numbers = SOURCES[source]([3])
    one, other = numbers.uniforms(2000), numbers.uniforms(2000)
    assert abs(torch.corrcoef(torch.cat([one, other]))[0, 1]) < 0.12


def test_counted_bytes_are_those_of_words_and_no_word_serves_twice():
    numbers = CountedNumbers(torch.tensor([5]))
    first, _, second = (
        numbers.bytes(3, 3),
        numbers.normals(3, dtype=torch.float64),
        numbers.bytes(8),
    )
    row = words(torch.tensor([5]), 5)[0].tolist()
    expected = b"".join((w % 2**64).to_bytes(8, "little") for w in row)
    assert bytes(first.flatten().tolist()) == expected[:9]
    assert bytes(second.flatten().tolist()) == expected[32:]
