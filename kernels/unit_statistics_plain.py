"""The functions of kernels/unit_statistics.py in operations of torch alone, for forward mode.

Values agree up to rounding; products are more, and more is kept.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.local_polynomial import Windows, with_samples


def moments(y: Sequence[Tensor], wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    """c [views, samples, units], the mean [units], and moments [views, units, units or none]."""
    mean = sum(y).mean(-2) / len(y)
    centred = [of_view - with_samples(mean) for of_view in y]
    if len(y) == 2:
        centred = [centred[0] + centred[1], centred[0] - centred[1]]
    c = torch.stack(centred)
    count = c.shape[-2] * len(c) ** 2
    if wanted == "gram":
        return c, mean, c.mT @ c / count
    if wanted == "variance":
        return c, mean, c.square().sum(-2) / count
    return c, mean, c.new_empty(*c.shape[:-2], 0)


def currents(
    c: Tensor, k: Tensor, const: Tensor | None, s: Sequence[Tensor], of_s: Tensor | None
) -> Tensor:
    """The currents of each view, [views, samples, units]."""
    total = [*(c @ k if k.dim() == c.dim() else c * k.unsqueeze(-2)).unbind()]
    if const is not None:
        total[0] = total[0] + with_samples(const)
    if len(c) == 2:
        total = [total[0] + total[1], total[0] - total[1]]
    if of_s is not None:
        for v, u in itertools.product(range(len(s)), repeat=2):
            total[v] = total[v] + s[u] * with_samples(of_s[(u - v) % len(s)])
    return torch.stack(total)


def correlate(h: Tensor, x: Sequence[Tensor], windows: Windows | None) -> tuple[Tensor, Tensor]:
    """sum_v h_v^T x_v [units, inputs], and the sum of h over samples and views [units]."""
    rows = x if windows is None else [windows.rows(images) for images in x]
    total = sum(of_view.mT @ inputs for of_view, inputs in zip(h, rows, strict=True))
    return total, h.sum((0, -2))


def rms_step(w: Tensor, b: Tensor, dw: Tensor, db: Tensor, rate, eps) -> tuple[Tensor, Tensor]:
    """w + f dw and b + f db, f [units]."""
    factor = rate * (dw.square().mean(-1) + eps * eps).rsqrt()
    return w + factor.unsqueeze(-1) * dw, b + factor * db
