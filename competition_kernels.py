"""The sparse update of competition.py as compiled loops over samples, for the CPU.

Each sample changes two rows of g^T x, those of the largest and of the k-th largest current. The
loops rank the currents and add the sample's input to these rows at once: neither gates nor patches
are ever stored, and rows that no sample has changed cost nothing.

Inputs are images with the channels last, flat: the window of a sample is `offsets` (from its
origin) to segments of `length` numbers that follow each other, in the order of a row of weights.
A fully connected layer has one segment. One thread; the interpreter's lock is released.
"""

import math

import numpy as np
from numba import njit

# Sums may be reordered and divisions by a common factor shared; that stays within rounding.
LOOSE = {"reassoc", "contract", "nsz", "arcp", "nnan"}
compiled = njit(cache=True, nogil=True, fastmath=LOOSE)


@compiled
def _largest(row):
    """The place of the largest number; of equal ones the first."""
    most = row[0]
    for i in range(len(row)):
        most = max(most, row[i])
    place = np.int32(len(row))
    for i in range(len(row)):
        place = min(place, np.int32(i) if row[i] == most else np.int32(len(row)))
    return min(place, np.int32(len(row) - 1))  # where nothing equals NaN


@compiled
def _slot_of(unit, slots, units, count, sums, pull):
    """The row of `sums` that belongs to a unit, cleared when the unit comes for the first time."""
    if slots[unit] < 0:
        slots[unit] = count[0]
        units[count[0]] = unit
        sums[count[0]] = 0
        pull[count[0]] = 0
        count[0] += 1
    return slots[unit]


@compiled
def add_samples(currents, x, origins, offsets, length, k, delta, slots, units, sums, pull):
    """Adds g^T x, sum_b g_b and s over all samples of all groups; returns how many units learned.

    currents [samples, groups, O], overwritten; x flat; origins [samples] of the windows in x;
    k: 1 for the winner alone. A group sees the channels after its predecessor's: `length` further.
    slots [groups * O] holds -1. Filled for each unit that learned: units [n], its sums [n, N + 1]
    (the last one of the gates), its pull s [n] in float64.
    """
    samples, groups, rivals = currents.shape
    count = np.zeros(1, np.int64)
    for b in range(samples):
        for group in range(groups):
            row = currents[b, group]
            winner = _largest(row)
            highest, other = row[winner], winner
            for _ in range(k - 1):
                row[other] = -math.inf
                other = _largest(row)
            first = _slot_of(group * rivals + winner, slots, units, count, sums, pull)
            pull[first] += highest
            origin = origins[b] + group * length
            if k == 1:
                _add(sums[first], x, origin, offsets, length)
            else:
                last = _slot_of(group * rivals + other, slots, units, count, sums, pull)
                pull[last] -= delta * row[other]
                _add_two(sums[first], sums[last], x, origin, offsets, length, delta)
    return count[0]


@compiled
def _add(total, x, origin, offsets, length):
    for q in range(len(offsets)):
        part = total[q * length : (q + 1) * length]
        window = x[origin + offsets[q] : origin + offsets[q] + length]
        for i in range(length):
            part[i] += window[i]
    total[-1] += 1


@compiled
def _add_two(total, other, x, origin, offsets, length, delta):
    for q in range(len(offsets)):
        part = total[q * length : (q + 1) * length]
        against = other[q * length : (q + 1) * length]
        window = x[origin + offsets[q] : origin + offsets[q] + length]
        for i in range(length):
            part[i] += window[i]
            against[i] -= delta * window[i]
    total[-1] += 1
    other[-1] -= delta


@compiled
def subtract_pull(weight, bias, units, sums, pull, largest):
    """Turns sums [n, N + 1] into changes D, and finds the largest |D_oi| [n] of each unit.

    weight [O, N]; bias [O], or of length 0.
    """
    for row in range(len(units)):
        unit, s = units[row], weight.dtype.type(pull[row])
        change, w = sums[row], weight[unit]
        most = weight.dtype.type(0)
        for i in range(len(w)):
            change[i] -= s * w[i]
            most = max(most, abs(change[i]))
        if len(bias):
            change[-1] -= s * bias[unit]
            most = max(most, abs(change[-1]))
        largest[row] = most


@compiled
def add_changes(weight, bias, units, changes, factors):
    """weight [O, N] and bias [O, or 0] += factors [n] times changes [n, N + 1], in place."""
    for row in range(len(units)):
        unit, factor = units[row], factors[row]
        change, w = changes[row], weight[unit]
        for i in range(len(w)):
            w[i] += factor * change[i]
        if len(bias):
            bias[unit] += factor * change[-1]


@compiled
def powers_and_norms(weight, exponent, powers, norms):
    """powers = sign(W) |W|^(exponent-1), norms = sum_i |W_oi|^exponent; exponent >= 2 is whole.

    weight and powers [O, N], norms [O].
    """
    for unit in range(len(weight)):
        w, power = weight[unit], powers[unit]
        for i in range(len(w)):
            power[i] = w[i]
        for _ in range(exponent - 2):
            for i in range(len(w)):
                power[i] *= abs(w[i])
        norms[unit] = _dot(w, power)


@compiled
def norms_of(weight, bias, exponent, units, norms):
    """norms [O] of these units [n], their biases included, as in `powers_and_norms`."""
    for row in range(len(units)):
        unit = units[row]
        w = weight[unit]
        total = weight.dtype.type(0)
        for i in range(len(w)):
            size = abs(w[i])
            power = size
            for _ in range(exponent - 1):
                power *= size
            total += power
        if len(bias):
            total += abs(bias[unit]) ** exponent
        norms[unit] = total


@compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
