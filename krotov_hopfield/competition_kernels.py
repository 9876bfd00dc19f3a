"""The update of competition.py with sparse gates, as compiled loops over samples for the CPU.

Each sample changes two rows of g^T x, those of the largest and of the k-th largest current. The
loops rank the currents and add the sample's input to these rows at once: neither gates nor patches
are ever stored, and rows that no sample has changed cost nothing.

Inputs are flat images with the channels last. The window of a sample consists of segments of
`length` consecutive numbers, which begin at `offsets` from the window's origin and are in the order
of a row of weights. A fully connected layer has one segment. The loops run in one thread and
release the interpreter's lock.
"""

import numpy as np

from krotov_hopfield.compiling import compiled

# Sums may be reordered and divisions by a common factor shared, which changes only the rounding.
LOOSE = {"reassoc", "contract", "nsz", "arcp", "nnan"}
loop = compiled(nogil=True, fastmath=LOOSE)

# Currents are ranked by integers that are made from their bits and have the same order: a compiler
# can find the largest of these with vector instructions, and NaN needs no special case.
LOWEST, LOWEST_OF_32_BITS = -(2**63), -(2**31)
HIGHEST_KEY = {4: 2**31 - 1, 8: 2**63 - 1}  # by bytes of a number; a search begins from here


@loop
def _next_largest(bits, b, group, key, place):
    """Key and place of the sample's next largest current after that of `key` at `place`.

    Of equal currents the first is the larger. For 32-bit currents, key and place are packed into
    one 64-bit integer, so that the compiler can search with vector instructions.
    """
    units = bits.shape[2]
    if bits.itemsize == 4:
        limit, most = (key << 32) + units - place, np.int64(LOWEST)
        for i in range(units):
            number = np.int64(bits[b, group, i])
            number = number if number >= 0 else LOWEST_OF_32_BITS - number
            packed = (number << 32) + (units - i)
            most = max(most, packed if packed < limit else np.int64(LOWEST))
        key = most >> 32
        return key, units - (most - (key << 32))
    most, where = np.int64(LOWEST), np.int64(0)
    for i in range(units):
        number = np.int64(bits[b, group, i])
        number = number if number >= 0 else LOWEST - number
        after = number < key or (number == key and i > place)
        if after and number > most:
            most, where = number, np.int64(i)
    return most, where


@loop
def _slot_of(unit, slots, units, count, sums, pull):
    """The row of `sums` that belongs to a unit; it is set to 0 when the unit first appears."""
    if slots[unit] < 0:
        slots[unit] = count[0]
        units[count[0]] = unit
        sums[count[0]] = 0
        pull[count[0]] = 0
        count[0] += 1
    return slots[unit]


@loop
def add_samples(
    currents, bits, highest, x, origins, offsets, length, k, delta, slots, units, sums, pull
):  # fmt: skip
    """Add g^T x, sum_b g_b and s over all samples of all groups; returns how many units learned.

    currents: [samples, groups, O].
    bits: the memory of the currents as int32 or int64.
    highest: the HIGHEST_KEY for that type.
    x: flat.
    origins: [samples], where each sample's window begins in x. The window of each further group
        begins `length` numbers later.
    k: 1 if only the winner learns.
    slots: [groups * O], filled with -1.
    units, sums, pull: outputs, one entry for each unit that learned: its number [n], its row of
        g^T x [n, > N] with its sum of gates in column N, and its s [n] in float64.
    """
    samples, groups, rivals = currents.shape
    count, window = np.zeros(1, np.int64), np.zeros(sums.shape[1], sums.dtype)
    window[length * len(offsets)] = 1
    for b in range(samples):
        for group in range(groups):
            _gather(window, x, origins[b] + group * length, offsets, length)
            key, place = _next_largest(bits, b, group, highest, -1)
            first = _slot_of(group * rivals + place, slots, units, count, sums, pull)
            pull[first] += currents[b, group, place]
            if k == 1:
                _add(sums, first, window)
            else:
                for _ in range(k - 1):
                    key, place = _next_largest(bits, b, group, key, place)
                other = _slot_of(group * rivals + place, slots, units, count, sums, pull)
                pull[other] -= delta * currents[b, group, place]
                _add_two(sums, first, other, window, delta)
    return count[0]


# Unsigned indices are not checked for negative values, so that these loops can be vectorized.


@loop
def _gather(window, x, origin, offsets, length):
    """window [> N] = the N numbers of flat x that belong to the window at `origin`."""
    for q in range(len(offsets)):
        begin, start = np.uintp(q * length), np.uintp(origin + offsets[q])
        for i in range(length):
            window[begin + np.uintp(i)] = x[start + np.uintp(i)]


@loop
def _add(sums, row, window):
    """One row of sums [n, > N] += window [> N]."""
    row = np.uintp(row)
    for i in range(len(window)):
        sums[row, i] += window[i]


@loop
def _add_two(sums, row, other, window, delta):
    """One row of sums [n, > N] += window [> N], and row `other` -= delta * window."""
    row, other = np.uintp(row), np.uintp(other)
    for i in range(len(window)):
        sums[row, i] += window[i]
        sums[other, i] -= delta * window[i]


@loop
def subtract_pull(weight, bias, units, sums, pull, largest):
    """Turn sums [n, > N] into changes D in place, and write each unit's largest |D_oi| to largest.

    weight: [O, N].
    bias: [O], or of length 0 if there are no biases.
    largest: [n].
    """
    for row in range(len(units)):
        unit, s = units[row], weight.dtype.type(pull[row])
        change, w = sums[row], weight[unit]
        most = weight.dtype.type(0)
        for i in range(len(w)):
            change[i] -= s * w[i]
            most = max(most, abs(change[i]))
        if len(bias):
            change[len(w)] -= s * bias[unit]
            most = max(most, abs(change[len(w)]))
        largest[row] = most


@loop
def add_changes(weight, bias, units, changes, factors):
    """weight [O, N] and bias [O or 0] += factors [n] times changes [n, > N], in place."""
    for row in range(len(units)):
        unit, factor = units[row], factors[row]
        change, w = changes[row], weight[unit]
        for i in range(len(w)):
            w[i] += factor * change[i]
        if len(bias):
            bias[unit] += factor * change[len(w)]


@loop
def powers_and_norms(weight, exponent, powers, norms):
    """powers = sign(W) |W|^(exponent-1), norms = sum_i |W_oi|^exponent; an integer exponent >= 2.

    weight and powers: [O, N].
    norms: [O].
    """
    for unit in range(len(weight)):
        w, power = weight[unit], powers[unit]
        for i in range(len(w)):
            power[i] = w[i]
        for _ in range(exponent - 2):
            for i in range(len(w)):
                power[i] *= abs(w[i])
        norms[unit] = _dot(w, power)


@loop
def norms_of(weight, bias, exponent, units, norms):
    """Write sum_i |W_oi|^exponent, biases included, for the given units [n] to norms [O]."""
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


@loop
def _dot(a, b):
    """sum_i a_i b_i of two vectors [N]."""
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
