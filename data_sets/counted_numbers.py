"""Random numbers that are hashes of a key and a position, those of many keys at once.

    keys = on_device([drawn_key(generator) for generator in generators], device)
    of_step = fold_in(keys, 17)                # other keys, int64 [tasks]
    uniforms(words(of_step, 100))              # float64 [tasks, 100]
    permutations(of_step, 60_000)              # int64 [tasks, 60000]

Number k of a key is mix(state + k gamma) in arithmetic modulo 2^64, with an odd gamma:

    state = mix(key + S),   gamma = mix(key + 2 S) | 1,   fold_in(key, n) = mix(key + (n + 1) G)

mix and G are those of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", OOPSLA), whose numbers from the seed `key` are fold_in(key, 0), fold_in(key, 1), ...;
with a gamma of its own, the numbers of one key are not those of another, shifted. A few integer
operations give all numbers of all tasks, the same on every device and however many keys go
together, and the host waits for none.
"""

import math

import torch
from torch import Generator, Tensor

BITS = 64
G = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd
S = 0xD1B54A32D192ED03  # another odd number, so that words and new keys are not the same
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shifts and factors
LAST_SHIFT = 31


def drawn_key(generator: Generator) -> int:
    """A key, a whole number of 64 bits with a sign, drawn from a CPU generator."""
    word = torch.empty((), dtype=torch.int64, device="cpu")
    return int(word.random_(-(1 << (BITS - 1)), None, generator=generator))


def on_device(numbers: list, device: torch.device) -> Tensor:
    """Whole numbers, or lists of them, as an int64 tensor; the host does not wait for a GPU."""
    pinned = device.type == "cuda"
    values = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return values.to(device, non_blocking=True)


def fold_in(keys: Tensor, number: int | Tensor) -> Tensor:
    """New keys for a number, int64 of the shape of keys and number together, broadcast."""
    if isinstance(number, Tensor):
        return _mixed(torch.add(keys, number + 1, alpha=_signed(G)))
    return _mixed(keys + _signed((number + 1) * G))


def starts(keys: Tensor) -> Tensor:
    """State and gamma of each key, int64 [2, *keys.shape]."""
    state, gamma = _mixed(torch.stack([keys + _signed(S), keys + _signed(2 * S)]))
    return torch.stack([state, gamma | 1])


def counted(begun: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each key, int64 [..., count], each of 64 random bits.

    begun: from `starts`.
    """
    positions = torch.arange(count, device=begun.device)
    state, gamma = begun.unsqueeze(-1)
    return _mixed(torch.addcmul(state, positions, gamma))


def words(keys: Tensor, count: int) -> Tensor:
    """`counted` from keys, int64 [..., count]."""
    return counted(starts(keys), count)


def uniforms(words: Tensor) -> Tensor:
    """A uniform number in [0, 1) with 53 bits from each word, float64 of the same shape."""
    return _shifted(words, 11).double().mul_(2.0**-53)


def normals(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Two standard normal numbers from each word's halves (Box, Muller 1958), [..., 2 words].

    dtype: the type to compute in, at least float32.
    """
    radius = (_shifted(words, 32) + 1).to(dtype).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (words & ((1 << 32) - 1)).to(dtype).mul_(2.0**-32 * 2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)


def permutations(keys: Tensor, count: int) -> Tensor:
    """A random order of 0, ..., count - 1 for each key, int64 [tasks, count]."""
    return words(keys, count).sort(dim=1, stable=True).indices


def _signed(number: int) -> int:
    """The number modulo 2^64 as an int64 holds it."""
    half = 1 << (BITS - 1)
    return (number + half) % (1 << BITS) - half


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's mix of int64 numbers, which are changed in place."""
    for shift, factor in MIXING:
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, LAST_SHIFT))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z shifted to the right, with zeros from the left, as if it had no sign."""
    return (z >> bits).bitwise_and_((1 << (BITS - bits)) - 1)
