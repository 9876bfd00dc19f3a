"""The objective of regression networks with one hidden layer and one output, as compiled loops.

Such narrow matrix products leave most of a processor idle: with 8 inputs, 50 hidden units and one
output, a batched product takes 150 microseconds per run, the loop below 40. It processes samples
one by one, so that a run's weights, its gradient and the units of one sample stay in registers and
the first-level cache. Sizes are constants of the compiled code, by which the compiler unrolls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from one_pass.compiling import compiled
from one_pass.errors import OnePassError
from one_pass.objectives import Batch, Buffers, Linearization, MLPObjective, check_types


@dataclass(frozen=True)
class CompiledMLPObjective(MLPObjective):
    """MLPObjective for sizes (inputs, units, 1) and the mean squared error, on the CPU.

    Raises OnePassError for other sizes and losses.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) != 3 or self.sizes[2] != 1 or self.loss != "mse":
            raise OnePassError(
                f"the loops are for sizes (inputs, units, 1) and mse, got {self.sizes} and "
                f"{self.loss}; take MLPObjective"
            )

    def linearize(self, weights: Tensor, buffers: Buffers, batch: Batch) -> Linearization:
        """The loss around `weights`; the runs are distributed over torch's number of threads.

        On other devices, and for batches that differ between runs, it is MLPObjective's.
        """
        if not batch.shared or weights.device.type != "cpu":
            return super().linearize(weights, buffers, batch)
        check_types({"weights": weights, "inputs": batch.inputs, "targets": batch.targets})
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        inputs, units, _ = self.sizes
        samples = batch.inputs.contiguous().numpy(), batch.targets[:, 0].contiguous().numpy()
        weights = weights.contiguous()
        runs, dtype = len(weights), samples[0].dtype
        loss = np.empty(runs, dtype)
        gradient = np.empty(tuple(weights.shape), dtype)
        _gradient_loops(inputs, units)(*samples, weights.numpy(), loss, gradient)
        torch.set_num_threads(threads)  # numba's first call changes OpenMP's, which is torch's too

        def hessian_product(vectors: Tensor) -> Tensor:
            product = np.empty_like(gradient)
            vectors = vectors.contiguous().numpy()
            _product_loops(inputs, units)(*samples, weights.numpy(), vectors, product)
            return torch.from_numpy(product)

        return Linearization(
            torch.from_numpy(loss), torch.from_numpy(gradient), buffers, hessian_product
        )


# ---- loops for F inputs and H hidden units, compiled at the first call with each dtype ----
#
# A run's flat weights are W1 [F, H], b1 [H], w2 [H], b2. Arrays: X [N, F], y [N]; weights,
# gradients, vectors and products are [D, P].

# reassociated sums can be vectorized; nan and inf must keep their meaning, because runs may diverge
_loop = compiled(parallel=True, fastmath={"reassoc", "contract", "nsz"})


@cache
def _gradient_loops(F: int, H: int) -> Callable:
    """A function (X, y, weights, loss [D], gradients) that fills the last two."""
    b, o, c = F * H, F * H + H, F * H + 2 * H  # where b1, w2 and b2 begin

    @_loop
    def gradient(X, y, weights, loss, gradients):
        count = len(y)
        zero = weights.dtype.type(0)
        scale = weights.dtype.type(2 / count)
        for d in numba.prange(len(weights)):
            w = weights[d]
            W1, b1, w2 = w[:b].reshape(F, H), w[b:o], w[o:c]
            G1, g1, g2 = np.zeros((F, H), w.dtype), np.zeros(H, w.dtype), np.zeros(H, w.dtype)
            h, back = np.zeros(H, w.dtype), np.zeros(H, w.dtype)
            squares, g0 = zero, zero
            for n in range(count):
                output = w[c]
                for j in range(H):
                    z = b1[j]
                    for i in range(F):
                        z += X[n, i] * W1[i, j]
                    h[j] = zero if z <= zero else z  # nan stays nan
                    output += h[j] * w2[j]
                difference = output - y[n]
                error = difference * scale
                squares += difference * difference
                g0 += error
                for j in range(H):
                    g2[j] += error * h[j]
                    back[j] = error * w2[j] if h[j] > zero else zero
                    g1[j] += back[j]
                for i in range(F):
                    x = X[n, i]
                    for j in range(H):
                        G1[i, j] += x * back[j]
            loss[d] = squares / count
            g = gradients[d]
            g[:b], g[b:o], g[o:c], g[c] = G1.reshape(b), g1, g2, g0

    return gradient


@cache
def _product_loops(F: int, H: int) -> Callable:
    """A function (X, y, weights, vectors, products) that fills `products` with H v, H the Hessian.

    It recomputes the hidden units: storing them, [D, N, H], would take longer, because they do not
    fit into the caches.
    """
    b, o, c = F * H, F * H + H, F * H + 2 * H  # as in _gradient_loops

    @_loop
    def product(X, y, weights, vectors, products):
        count = len(y)
        zero = weights.dtype.type(0)
        scale = weights.dtype.type(2 / count)
        for d in numba.prange(len(weights)):
            w, v = weights[d], vectors[d]
            W1, b1, w2 = w[:b].reshape(F, H), w[b:o], w[o:c]
            V1, v1, v2 = v[:b].reshape(F, H), v[b:o], v[o:c]
            P1, p1, p2 = np.zeros((F, H), v.dtype), np.zeros(H, v.dtype), np.zeros(H, v.dtype)
            h, moved, back = np.zeros(H, v.dtype), np.zeros(H, v.dtype), np.zeros(H, v.dtype)
            p0 = zero
            for n in range(count):
                output, moving = w[c], v[c]
                for j in range(H):
                    z = b1[j]
                    for i in range(F):
                        z += X[n, i] * W1[i, j]
                    h[j] = zero if z <= zero else z
                    output += h[j] * w2[j]
                for j in range(H):
                    z = v1[j]
                    for i in range(F):
                        z += X[n, i] * V1[i, j]
                    moved[j] = z if h[j] > zero else zero
                    moving += moved[j] * w2[j] + h[j] * v2[j]
                error, change = (output - y[n]) * scale, moving * scale
                p0 += change
                for j in range(H):
                    p2[j] += change * h[j] + error * moved[j]
                    back[j] = change * w2[j] + error * v2[j] if h[j] > zero else zero
                    p1[j] += back[j]
                for i in range(F):
                    x = X[n, i]
                    for j in range(H):
                        P1[i, j] += x * back[j]
            p = products[d]
            p[:b], p[b:o], p[o:c], p[c] = P1.reshape(b), p1, p2, p0

    return product
