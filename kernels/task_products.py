"""Products of several tasks that sum over samples, fast on a GPU.

    result_tij = sum_b one_tbi other_tbj

A library computes each task's result in few blocks, each of which walks through all samples, so
that most of a GPU is idle. Here the samples are cut into parts, whose sums are then added.
"""

import math

import torch
from torch import Tensor

BLOCKS = 512  # of results, which keep a GPU of 132 processors busy
TILE = (32, 128)  # about the rows and columns of a result that one block computes
LEAST_SAMPLES = 64  # in a part


def contracted(one: Tensor, other: Tensor, parts: int | None = None) -> Tensor:
    """The product [..., m, n], for one [..., samples, m] and other [..., samples, n].

    parts: a divisor of the number of samples; None: as many as keep a GPU busy, and 1 elsewhere.
    """
    if parts is None:
        parts = _parts(one, other) if one.device.type == "cuda" else 1
    if parts == 1:
        return torch.matmul(one.mT, other)
    cut = (t.unflatten(-2, (parts, -1)) for t in (one, other))
    return _wide(*cut).sum(-3)


def _parts(one: Tensor, other: Tensor) -> int:
    """The largest power of two that divides the samples and does not make too many blocks."""
    samples, sizes = one.shape[-2], (one.shape[-1], other.shape[-1])
    tiles = math.prod(math.ceil(n / t) for n, t in zip(sorted(sizes), TILE, strict=True))
    blocks = math.prod(one.shape[:-2]) * tiles
    parts = 1
    while (
        2 * parts * blocks <= BLOCKS
        and samples % (2 * parts) == 0
        and samples // (2 * parts) >= LEAST_SAMPLES
    ):
        parts *= 2
    return parts


def _wide(one: Tensor, other: Tensor) -> Tensor:
    """The products of all parts, computed with the longer side first, which is a tenth faster."""
    if one.shape[-1] < other.shape[-1]:
        return torch.matmul(other.mT, one).mT
    return torch.matmul(one.mT, other)
