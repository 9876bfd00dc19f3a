"""The equilibrium of lateral inhibition, with implicit instead of unrolled differentiation.

    y = sigma(s + y m^T)                    the limit of the dynamics in models_fully_local.py
    v = grad_y + (v * d) m                  d = sigma'(s + y m^T)
    grad_s = v * d,   grad_m = grad_s^T y   (implicit function theorem; Bai et al. 2019, 1909.01377)

Both equations have the form a = phi(a), and for each sample both maps have the eigenvalues of
diag(d) m. Both are solved by the second-order Richardson iteration

    c_{k+1} = beta c_k + alpha (phi(a_k) - a_k),   a_{k+1} = a_k + c_{k+1}

with alpha and beta derived from m, the same for all samples. The equilibrium does not depend on a
step size, and only y and m are kept for the backward pass, however many steps are taken.

The equilibrium is unique if the largest eigenvalue of (m + m^T) / 2 times the steepest slope of
sigma is below 1, because sigma is nondecreasing (Winston and Kolter 2020, arXiv 2006.08591). If
there are several, as with units that excite themselves or strongly inhibit others but not
themselves, the result is the one that the iteration reaches from sigma(s).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.own_precision import in_own_precision

_STEEPEST = {"sigmoid": 0.25}  # the largest derivative of a base function, if it is not 1
_POWER_STEPS, _MARGIN = 10, 1.2  # steps and safety factor of norms: too small ones cause divergence


class Activation(Protocol):
    """sigma(u) = base(slope * u), which is nondecreasing for a positive slope.

    base: "sigmoid" or another nondecreasing function, whose largest derivative is 1.
    """

    @property
    def base(self) -> str: ...

    @property
    def slope(self) -> float: ...

    def of_scaled_(self, scaled: Tensor) -> Tensor:
        """Apply base in place to a preactivation already multiplied by the slope."""

    def backward(self, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient with respect to the scaled preactivation, computed from sigma's output."""


def equilibrium(
    s: Tensor,
    m: Tensor,
    activation: Activation,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 200,
) -> Tensor:
    """y [samples, out] with y = sigma(s + y m^T), for s [samples, out] and m [out, out].

    Raises FloatingPointError, in the forward or the backward pass, if max_steps do not reach the
    tolerance. The gradient can't be differentiated again.

    tolerance: the largest change of a unit in one more undamped step of the dynamics; in the
        backward pass, relative to the largest entry of the incoming gradient.
    max_steps: the largest number of steps in each pass; a step costs one product with m.
    """
    return _Equilibrium.apply(s, m, activation, tolerance, max_steps)


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    @in_own_precision
    def forward(ctx, s, m, activation, tolerance, max_steps):
        scaled, scaled_m_t = activation.slope * s, activation.slope * m.t()

        def respond(y: Tensor, out: Tensor) -> None:
            activation.of_scaled_(torch.addmm(scaled, y, scaled_m_t, out=out))

        ctx.steps = *_alpha_and_beta(m, activation), max_steps
        start = activation.of_scaled_(scaled.clone())
        y = _solve(respond, start, *ctx.steps, tolerance, "lateral inhibition")
        ctx.save_for_backward(y, m)
        ctx.activation, ctx.tolerance = activation, tolerance
        return y

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad_y):
        y, m = ctx.saved_tensors
        d = ctx.activation.backward(torch.ones_like(y), y).mul_(ctx.activation.slope)
        product = torch.empty_like(y)

        def pull_back(v: Tensor, out: Tensor) -> None:
            torch.addmm(grad_y, torch.mul(v, d, out=product), m, out=out)

        tolerance = ctx.tolerance * _largest(grad_y)
        what = "the gradient of lateral inhibition"
        v = _solve(pull_back, grad_y.clone(), *ctx.steps, tolerance, what)
        grad_s = v.mul_(d)
        grad_m = grad_s.t() @ y if ctx.needs_input_grad[1] else None
        return grad_s, grad_m, None, None, None


def _solve(
    phi: Callable[[Tensor, Tensor], None],
    start: Tensor,
    alpha: float,
    beta: float,
    max_steps: int,
    tolerance: float,
    what: str,
) -> Tensor:
    """phi(a) for an `a` with |phi(a) - a| <= tolerance in every entry; overwrites `start`.

    Raises FloatingPointError if max_steps do not find it.

    phi: phi(a, out) writes its value to `out`.
    what: what is solved for, for the message.
    """
    a, mapped, change, step = start, *(torch.zeros_like(start) for _ in range(3))
    largest = math.inf
    for _ in range(max_steps):
        phi(a, mapped)
        largest = _largest(torch.sub(mapped, a, out=change))
        if largest <= tolerance:
            return mapped
        if not math.isfinite(largest):
            break
        a.add_(step.mul_(beta).add_(change, alpha=alpha))
    raise FloatingPointError(
        f"{what} has no equilibrium within {max_steps} steps: the largest change is {largest:.3g}, "
        f"to be {tolerance:.3g}; weaken m, or allow more steps or a larger tolerance"
    )


def _alpha_and_beta(m: Tensor, activation: Activation) -> tuple[float, float]:
    """The optimal alpha and beta for I - diag(d) m with 0 <= d <= steepest slope of sigma.

        alpha = 2 / r,   beta = (f / r)^2,   r = c + sqrt(c^2 - f^2)

    They are optimal if the eigenvalues lie in an ellipse with centre c and foci c -+ f. Its half
    axes are a / 2 and b, where a and b are that slope times the norms of the symmetric and the skew
    part of m: real parts are between 1 and 1 + a, or less if units excite each other, imaginary
    parts at most b. For symmetric m the number of steps grows like sqrt(1 + a), that of damped
    steps like 1 + a. (Manteuffel 1977, Numer. Math. 28; Niethammer and Varga 1983, ibid. 41.)
    """
    steepest = abs(activation.slope) * _STEEPEST.get(activation.base, 1.0)
    a, b = (steepest * _spectral_norm((m + sign * m.t()) / 2) for sign in (1, -1))
    c, f_squared = 1 + a / 2, a**2 / 4 - b**2
    r = c + math.sqrt(c**2 - f_squared)
    return 2 / r, f_squared / r**2


def _spectral_norm(matrix: Tensor) -> float:
    """An upper estimate of the norm of a symmetric or skew matrix, by power iteration.

    This finds up to 15 % too little if many eigenvalues are large, for which _MARGIN compensates.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), generator=generator, device="cpu")
    vector, tiny = start.to(matrix), torch.finfo(matrix.dtype).tiny
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / torch.linalg.vector_norm(vector).clamp_min(tiny))
    return _MARGIN * float(torch.linalg.vector_norm(vector))


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; nan if any entry is nan, 0 if there are no entries.

    It takes one pass over the tensor, a seventh of the time of torch.linalg.vector_norm.
    """
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))
