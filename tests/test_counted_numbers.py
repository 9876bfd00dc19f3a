"""Counted numbers: those of a slow formulation in Python integers, and as random as they should be.

Tests of randomness draw at fixed seeds; each bound is met by true random numbers in all but one of
some million cases.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sets import counted_numbers as m

MODULUS = 1 << 64
keys = st.integers(-(1 << 63), (1 << 63) - 1)
checks = settings(deadline=None, max_examples=25, derandomize=True)


# ---- the same in Python integers ----


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % MODULUS
    return z ^ (z >> 31)


def word(key, k):
    state, gamma = mix((key + m.S) % MODULUS), mix((key + 2 * m.S) % MODULUS) | 1
    return mix((state + k * gamma) % MODULUS)


def folded(key, number):
    return mix((key + (number + 1) * m.G) % MODULUS)


def tensor(*values):
    """Keys modulo 2^64 as int64."""
    return torch.tensor([(v + MODULUS // 2) % MODULUS - MODULUS // 2 for v in values])


def unsigned(words):
    return [[w % MODULUS for w in row] for row in words.tolist()]


def test_new_keys_are_the_numbers_of_split_mix():
    """The first numbers of SplitMix64 from 1234567, as its authors' program gives them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [folded(1234567, k) for k in range(3)] == expected
    assert unsigned(m.fold_in(tensor(1234567), torch.arange(3))[None])[0] == expected


@checks
@given(st.lists(keys, min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 2**40))
def test_words_and_keys_are_those_of_python_integers(some, count, number):
    found = unsigned(m.words(tensor(*some), count))
    assert found == [[word(key, k) for k in range(count)] for key in some]
    assert unsigned(m.counted(m.starts(tensor(*some)), count)) == found
    expected = [folded(key, number) for key in some]
    assert unsigned(m.fold_in(tensor(*some), number)[None])[0] == expected
    as_tensor = m.fold_in(tensor(*some), torch.tensor([[number], [number + 1]]))
    assert unsigned(as_tensor) == [expected, [folded(key, number + 1) for key in some]]


@checks
@given(keys)
def test_numbers_follow_from_words(key):
    drawn = m.words(tensor(key), 4)
    (row,) = unsigned(drawn)
    assert m.uniforms(drawn)[0].tolist() == [(w >> 11) / 2**53 for w in row]
    radius = [math.sqrt(-2 * math.log(((w >> 32) + 1) / 2**32)) for w in row]
    angle = [2 * math.pi * (w % 2**32) / 2**32 for w in row]
    expected = [f(a) * r for f in (math.cos, math.sin) for r, a in zip(radius, angle, strict=True)]
    assert m.normals(drawn, torch.float64)[0].tolist() == pytest.approx(expected, abs=1e-14)
    assert unsigned(drawn) == [row]


@checks
@given(keys)
def test_a_permutation_sorts_by_words(key):
    words = m.words(tensor(key), 30)[0].tolist()
    assert m.permutations(tensor(key), 30)[0].tolist() == sorted(range(30), key=words.__getitem__)


def test_normals_are_finite_at_both_ends():
    ends = torch.tensor([[0, -1, 1 << 32, -(1 << 32)]])
    for dtype in (torch.float32, torch.float64):
        drawn = m.normals(ends, dtype)
        assert drawn.isfinite().all() and drawn.abs().max() < 6.7


# ---- randomness ----

COUNT = 40_000
SIGMAS = 7


def chi_square(counts, expected):
    """The statistic in standard deviations above its mean, nearly normal with many cells."""
    free = counts.numel() - 1
    statistic = ((counts - expected).square() / expected).sum()
    return float((statistic - free) / math.sqrt(2 * free))


def streams(key):
    """Numbers of many keys, positions, tasks, steps: each should look random, [COUNT] int64."""
    base = tensor(key)
    steps = torch.arange(COUNT)
    return {
        "positions": m.words(base, COUNT)[0],
        "steps": m.words(m.fold_in(base, steps), 1)[:, 0],
        "keys one apart": m.words(base + steps, 1)[:, 0],
        "keys one bit apart": m.words(base ^ (steps << 40), 1)[:, 0],
        "folded twice": m.words(m.fold_in(m.fold_in(base, steps), 1), 1)[:, 0],
        "purposes": m.words(m.fold_in(m.fold_in(base, 1), steps), 1)[:, 0],
    }


@checks
@given(keys)
def test_bytes_and_pairs_of_neighbours_are_uniform(key):
    for name, drawn in streams(key).items():
        for shift in range(0, 64, 8):
            byte = (drawn >> shift) & 255
            counts = torch.bincount(byte, minlength=256).double()
            assert abs(chi_square(counts, COUNT / 256)) < SIGMAS, (name, shift)
        high = (drawn >> 60) & 15
        pairs = torch.bincount(high[1:] * 16 + high[:-1], minlength=256).double()
        assert abs(chi_square(pairs, (COUNT - 1) / 256)) < SIGMAS, name


@checks
@given(keys)
def test_uniforms_have_the_distribution_of_kolmogorov_and_do_not_follow_each_other(key):
    for name, drawn in streams(key).items():
        u = (((drawn >> 11) & (2**53 - 1)).double() / 2**53).sort().values
        ranks = torch.arange(1, COUNT + 1).double() / COUNT
        distance = torch.maximum((ranks - u).abs().max(), (u - ranks + 1 / COUNT).abs().max())
        assert distance * math.sqrt(COUNT) < 3.0, name  # exceeded with probability 3e-8
        v = (drawn.double() / 2**63).double()
        for lag in (1, 2, 7, 8, 26, 64):
            r = torch.corrcoef(torch.stack([v[lag:], v[:-lag]]))[0, 1]
            assert abs(r) * math.sqrt(COUNT) < SIGMAS, (name, lag)


@checks
@given(keys, st.integers(0, 2**30))
def test_each_bit_of_key_step_and_position_changes_each_bit_of_a_word_half_of_the_time(key, step):
    """Avalanche: 64 flipped bits, 400 words of each; a share of 1/2 within seven deviations."""
    base = m.fold_in(tensor(key), torch.arange(400) + step)
    flips = 1 << torch.arange(64)
    changed = {
        "key": m.words((base.unsqueeze(1) ^ flips).flatten(), 1),
        "number": m.words(m.fold_in(base.unsqueeze(1), step ^ flips[:62]).flatten(), 1),
    }
    before = {"key": m.words(base, 1), "number": m.words(m.fold_in(base, step), 1)}
    for name, after in changed.items():
        bits = ((after.view(400, -1, 1) ^ before[name].view(400, 1, 1)) >> torch.arange(64)) & 1
        shares = bits.double().mean(0)
        assert (shares - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(400), name


@checks
@given(keys)
def test_normals_have_normal_moments_and_tails(key):
    z = m.normals(m.words(tensor(key), COUNT // 2), torch.float64)[0]
    bound = SIGMAS / math.sqrt(COUNT)
    assert abs(z.mean()) < bound and abs(z.square().mean() - 1) < bound * math.sqrt(2)
    assert abs(z.pow(3).mean()) < bound * math.sqrt(15)
    assert abs(z.pow(4).mean() - 3) < bound * math.sqrt(96)
    for half in (z[: COUNT // 2], z[COUNT // 2 :]):  # cosines and sines
        uniform = (0.5 * (1 + torch.erf(half / math.sqrt(2)))).sort().values
        ranks = torch.arange(1, len(half) + 1).double() / len(half)
        assert (ranks - uniform).abs().max() * math.sqrt(len(half)) < 3.0
    r = torch.corrcoef(torch.stack([z[: COUNT // 2], z[COUNT // 2 :]]))[0, 1]
    assert abs(r) * math.sqrt(COUNT // 2) < SIGMAS


@checks
@given(keys)
def test_permutations_put_each_at_each_place_equally_often(key):
    drawn = m.permutations(m.fold_in(tensor(key), torch.arange(COUNT)), 5)
    assert torch.equal(drawn.sort(1).values, torch.arange(5).expand(COUNT, 5))
    counts = torch.nn.functional.one_hot(drawn, 5).sum(0).double()
    assert ((counts - COUNT / 5).abs() < SIGMAS * math.sqrt(COUNT * 4 / 25)).all()
    orders = (drawn * 5 ** torch.arange(5)).sum(1).unique(return_counts=True)[1].double()
    assert len(orders) == 120 and abs(chi_square(orders, COUNT / 120)) < SIGMAS


# ---- keys and devices ----


def test_a_key_is_drawn_and_the_generator_goes_on():
    generator = torch.Generator().manual_seed(4)
    drawn = [m.drawn_key(generator) for _ in range(4)]
    assert len({*drawn}) == 4
    assert drawn[0] == m.drawn_key(torch.Generator().manual_seed(4))
    many = torch.tensor([m.drawn_key(generator) for _ in range(2000)])
    shares = ((many.unsqueeze(1) >> torch.arange(64)) & 1).double().mean(0)
    assert (shares - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(2000)


def test_numbers_are_where_their_keys_are():
    keys = torch.empty(3, dtype=torch.int64, device="meta")
    drawn = m.words(keys, 5)
    for tensor_of_numbers in (
        drawn, m.fold_in(keys, 2), m.uniforms(drawn), m.normals(drawn, torch.float32),
        m.permutations(keys, 5), m.on_device([1, 2], torch.device("meta")),
    ):  # fmt: skip
        assert tensor_of_numbers.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_has_the_numbers_of_the_cpu():
    some = tensor(*range(-3, 4))
    drawn, there = m.words(some, 1000), m.words(some.cuda(), 1000)
    assert torch.equal(there.cpu(), drawn)
    assert torch.equal(m.uniforms(there).cpu(), m.uniforms(drawn))
    assert torch.equal(m.permutations(some.cuda(), 1000).cpu(), m.permutations(some, 1000))
    assert torch.equal(m.fold_in(some.cuda(), 5).cpu(), m.fold_in(some, 5))
    near = m.normals(there, torch.float64).cpu(), m.normals(drawn, torch.float64)
    torch.testing.assert_close(*near, rtol=1e-12, atol=1e-12)
