"""The elementwise part of an LSTM cell in one pass over memory, compiled for the CPU, in float32.

    i, f, o, s = sigmoid(z);  c' = f c + i (2s - 1);  h' = o (2 sigmoid(2c') - 1)

coordinate_lstm.py has the same in torch operations, which serve all other types and devices and are
the reference in tests. sigmoid(x) = 1 / (1 + 2^y), y = -x log2(e) = n + r, |r| <= 1/2: 2^n is made
from its bits, 2^r is its Taylor series to the seventh power; errors stay below 1e-7. The loops have
no branches, so that the compiler can vectorize them.
"""

import math

import numpy as np
from torch import Tensor

from learned_optimizer.compiling import compiled

F = np.float32
MINUS_LOG2_E, LARGEST = F(-math.log2(math.e)), F(126)  # 2^y stays a normal number
A0, A1, A2, A3, A4, A5, A6, A7 = (F(math.log(2) ** k / math.factorial(k)) for k in range(8))
HALF, ONE, TWO, FOUR = F(0.5), F(1), F(2), F(4)
OPTIONS = {"fastmath": True, "error_model": "numpy"}


def cell_(z: Tensor, c: Tensor, half: Tensor, h: Tensor) -> None:
    """Replace z [4H, C] by its sigmoids and c [H, C] by c' in place; write half and h.

    half, h: [H, C]; sigmoid(2c') and h'.
    """
    _cell(z.numpy(), c.numpy(), half.numpy(), h.numpy())


def gate_gradients(
    gates: Tensor, half: Tensor, c: Tensor, dh: Tensor, dc: Tensor, dz: Tensor
) -> None:
    """Write dz [4H, C] from dh [H, C] and dc [H, C], which is changed in place from d c' to d c.

    gates, half: as `cell_` left them.
    c: [H, C], before the step.
    """
    _gate_gradients(*(t.numpy() for t in (gates, half, c, dh, dc, dz)))


@compiled(inline="always", **OPTIONS)
def _sigmoid(x):
    y = min(max(x * MINUS_LOG2_E, -LARGEST), LARGEST)
    n = np.floor(y + HALF)
    r = y - n
    power = A0 + r * (A1 + r * (A2 + r * (A3 + r * (A4 + r * (A5 + r * (A6 + r * A7))))))
    scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return ONE / (ONE + power * scale)


@compiled(**OPTIONS)
def _cell(z, c, half, h):
    H, C = c.shape
    for r in range(H):
        for k in range(C):
            i, f = _sigmoid(z[r, k]), _sigmoid(z[H + r, k])
            o, s = _sigmoid(z[2 * H + r, k]), _sigmoid(z[3 * H + r, k])
            cell = f * c[r, k] + i * (TWO * s - ONE)
            t = _sigmoid(TWO * cell)
            c[r, k], half[r, k], h[r, k] = cell, t, o * (TWO * t - ONE)
            z[r, k], z[H + r, k], z[2 * H + r, k], z[3 * H + r, k] = i, f, o, s


@compiled(**OPTIONS)
def _gate_gradients(gates, half, c, dh, dc, dz):
    H, C = c.shape
    for r in range(H):
        for k in range(C):
            i, f, o, s = gates[r, k], gates[H + r, k], gates[2 * H + r, k], gates[3 * H + r, k]
            t, d = half[r, k], dh[r, k]
            by_c = dc[r, k] + d * o * FOUR * t * (ONE - t)
            dz[r, k] = by_c * (TWO * s - ONE) * i * (ONE - i)
            dz[H + r, k] = by_c * c[r, k] * f * (ONE - f)
            dz[2 * H + r, k] = d * (TWO * t - ONE) * o * (ONE - o)
            dz[3 * H + r, k] = by_c * i * TWO * s * (ONE - s)
            dc[r, k] = by_c * f
