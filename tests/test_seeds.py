"""Generators depend on their names, all of them, and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.seeds import log_uniform_integer, seeded_generator


def numbers(*key):
    return torch.randn(4, generator=seeded_generator(*key)).tolist()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(*[st.tuples(*[st.integers(0, 2**31)] * 4)] * 2)
def test_each_key_has_a_generator_of_its_own(one, two):
    assert (numbers(*one) == numbers(*two)) == (one == two)


@pytest.mark.parametrize("one, two", [((1,), (1, 0)), ((0, 0, 0), (0, 0)), ((2**32,), (0, 1))])
def test_keys_of_different_length_or_size_differ_too(one, two):
    assert numbers(*one) != numbers(*two)


def test_a_key_may_hold_large_seeds():
    assert numbers(2**63, 1) != numbers(2**63 + 1, 1)


def test_the_numbers_of_a_key_are_those_they_have_always_been():
    assert seeded_generator(0).initial_seed() == 5254295370254170289
    assert seeded_generator(0, 2**31, 1, 2).initial_seed() == 930722151641438861


def test_log_uniform_integers_fall_into_each_octave_equally_often_and_reach_both_ends():
    generator = seeded_generator(3)
    drawn = [log_uniform_integer(16, 256, generator) for _ in range(4000)]
    assert (min(drawn), max(drawn)) == (16, 256)
    for low in (16, 32, 64, 128):
        share = sum(low <= n < 2 * low for n in drawn) / len(drawn)
        assert share == pytest.approx(0.25, abs=0.03)
    assert {log_uniform_integer(5, 5, generator) for _ in range(9)} == {5}
