"""Ranges as texts, draws from them, and grids."""

import argparse
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.points import distribution_of, random_point
from sweeps.space import grid, searched_flag

RANGES = [
    "momentum=0:1",
    "lr=log:1e-6:1e-1",
    "k=int:2:10",
    "delta=step:0:0.4:0.005",
    "p=choice:2,3,4",
    "shift=-1:-1e-5",
    "q.1-4=int:2:8",
]


def draws(text: str, count: int = 4000) -> np.ndarray:
    flag = searched_flag(text)
    return np.array([random_point([flag], 0, number)[flag.name] for number in range(count)])


@pytest.mark.parametrize("text", RANGES)
def test_a_flag_reads_back_from_its_text(text):
    assert searched_flag(str(searched_flag(text))) == searched_flag(text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("lr", "NAME=log:LOW:HIGH"),
        ("=0:1", "NAME=LOW:HIGH"),
        ("--lr=0:1", "NAME=LOW:HIGH"),
        ("lr=1", "NAME=LOW:HIGH"),
        ("lr.first=0:1", "NAME=LOW:HIGH"),
        ("lr=1:0", "LOW below HIGH"),
        ("lr=0:nan", "LOW below HIGH"),
        ("lr=0:inf", "LOW below HIGH"),
        ("lr=log:0:1", "LOW above 0"),
        ("lr=log:1e-3", "NAME=log:LOW:HIGH"),
        ("lr=log:small:1", "NAME=log:LOW:HIGH"),
        ("k=int:1:2.5", "NAME=int:LOW:HIGH"),
        ("d=step:0:1", "NAME=step:LOW:HIGH:STEP"),
        ("d=step:0:1:0", "STEP above 0"),
        ("d=step:0:1:2", "at most HIGH - LOW"),
        ("p=choice:", "choices are different"),
        ("p=choice:a,a", "choices are different"),
        ("x=normal:0:1", "NAME=LOW:HIGH"),
        ("C=step:0:1:1e-12", "at most 100000 steps"),
        ("C=step:0:1:1e-999999999", "at most 100000 steps"),
        ("k=int:0:99999999999999999999", "ends of at most 1000000000"),
        ("k=int:-99999999999999999999:0", "ends of at most 1000000000"),
        ("lr=0:1e300", r"ends of at most 1e\+30"),
        ("lr=step:-1e999:1e999:1e998", "LOW below HIGH"),
    ],
)
def test_a_malformed_range_is_refused_with_the_form_that_is_right(text, right):
    with pytest.raises(argparse.ArgumentTypeError, match=right) as refusal:
        searched_flag(text)
    assert repr(text) in str(refusal.value)


def test_draws_are_uniform_each_on_its_scale():
    quantiles = np.linspace(0.05, 0.95, 19)
    assert np.allclose(np.quantile(draws("m=-1:3"), quantiles), -1 + 4 * quantiles, atol=0.1)
    logarithms = np.log10(draws("lr=log:1e-6:1e-1"))
    assert np.allclose(np.quantile(logarithms, quantiles), -6 + 5 * quantiles, atol=0.12)
    for text, values in (
        ("k=int:2:4", [2, 3, 4]),
        ("p=choice:a,b,c", ["a", "b", "c"]),
        ("d=step:0:0.2:0.1", [0, 0.1, 0.2]),
    ):
        found, counts = np.unique(draws(text), return_counts=True)
        assert found.tolist() == values
        assert np.allclose(counts / 4000, 1 / 3, atol=0.03)


def test_flags_of_one_draw_are_independent():
    flags = [searched_flag("a=0:1"), searched_flag("b=0:1")]
    pairs = np.array([list(random_point(flags, 0, number).values()) for number in range(2000)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.06


@given(seed=st.integers(0, 2**40), number=st.integers(0, 10**6))
def test_a_draw_depends_on_seed_and_number_alone_and_lies_in_its_range(seed, number):
    flags = [searched_flag(text) for text in RANGES]
    values = random_point(flags, seed, number)
    assert values == random_point(flags, seed, number)
    assert values != random_point(flags, seed + 1, number) and values != random_point(
        flags, seed, number + 1
    )
    for flag in flags:
        inside = distribution_of(flag).to_internal_repr(values[flag.name])
        assert distribution_of(flag)._contains(inside)


def test_multiples_of_a_step_have_no_rounding_errors():
    flag = searched_flag("d=step:0:0.4:0.005")
    assert len(flag.values()) == 81
    assert [repr(value) for value in flag.values()[:4]] == ["0.0", "0.005", "0.01", "0.015"]
    assert flag.exact(0.1 + 0.2) == 0.3 != 0.1 + 0.2
    assert searched_flag("d=step:0:1:0.3").values() == [0, 0.3, 0.6, 0.9]


def test_a_grid_holds_every_combination_once():
    flags = [searched_flag(text) for text in ("k=int:1:3", "p=choice:a,b", "d=step:0:1:0.5")]
    expected = itertools.product([1, 2, 3], "ab", [0.0, 0.5, 1.0])
    assert [tuple(point.values()) for point in grid(flags)] == list(expected)
