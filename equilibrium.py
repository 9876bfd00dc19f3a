"""Lateral inhibition at its equilibrium, differentiated there instead of through its steps.

    y = sigma(s + y m^T)                           the limit of models_fully_local's dynamics
    v = grad_y + (v * sigma') m                    sigma' = sigma'(s + y m^T)
    grad_s = v * sigma',   grad_m = grad_s^T y     (implicit function theorem; Bai et al. 2019)

Both equations are a = phi(a), and both maps have the eigenvalues of diag(sigma') m. They are solved
by the second-order Richardson iteration

    d_{k+1} = beta d_k + alpha (phi(a_k) - a_k),   a_{k+1} = a_k + d_{k+1}

whose alpha and beta follow from m alone: they are best for the ellipse that holds the eigenvalues
(Niethammer and Varga 1983). Memory: y and m, however many steps there are. The limit depends on no
step size. It is the only one where the largest eigenvalue of (m + m^T) / 2 times the steepest slope
of sigma is below 1, as with inhibition that is symmetric and not much stronger between units than
of each by itself; where there are several, it is the one that is reached from sigma(s).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models_fully_local import Activation

_STEEPEST = {"sigmoid": 0.25}  # the largest derivative of a base function, where it is not 1
_POWER_STEPS = 10


def equilibrium(
    s: Tensor,
    m: Tensor,
    activation: Activation,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> Tensor:
    """y [samples, out] with y = sigma(s + y m^T), for s [samples, out] and m [out, out].

    tolerance: on the largest change of a unit in a further step of the undamped dynamics; of the
    backward pass' equation too, there relative to the largest entry of the gradient.
    max_steps: of each of both solutions; each costs one product with m.
    Raises FloatingPointError, in the forward or the backward pass, where they do not suffice. The
    backward pass can be differentiated no further.
    """
    return _Equilibrium.apply(s, m, activation, tolerance, max_steps)


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, m, activation, tolerance, max_steps):
        scaled, scaled_m_t = activation.slope * s, activation.slope * m.t()

        def respond(y: Tensor, out: Tensor) -> None:
            activation.of_scaled_(torch.addmm(scaled, y, scaled_m_t, out=out))

        ctx.richardson = _richardson(m, activation), max_steps
        start = activation.of_scaled_(scaled.clone())
        y = _solve(respond, start, *ctx.richardson, tolerance, "lateral inhibition")
        ctx.save_for_backward(y, m)
        ctx.activation, ctx.tolerance = activation, tolerance
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        y, m = ctx.saved_tensors
        slopes = ctx.activation.backward(torch.ones_like(y), y).mul_(ctx.activation.slope)
        weighted = torch.empty_like(y)

        def pull_back(v: Tensor, out: Tensor) -> None:
            torch.addmm(grad_y, torch.mul(v, slopes, out=weighted), m, out=out)

        tolerance = ctx.tolerance * _largest(grad_y)
        what = "the gradient of lateral inhibition"
        v = _solve(pull_back, grad_y.clone(), *ctx.richardson, tolerance, what)
        grad_s = v.mul_(slopes)
        grad_m = grad_s.t() @ y if ctx.needs_input_grad[1] else None
        return grad_s, grad_m, None, None, None


def _solve(
    phi: Callable[[Tensor, Tensor], None],
    start: Tensor,
    steps: tuple[float, float],
    max_steps: int,
    tolerance: float,
    what: str,
) -> Tensor:
    """phi(a) for an a of which no entry changes by more than the tolerance; overwrites `start`.

    phi(a, out) writes its value to `out`.
    """
    (alpha, beta), largest = steps, math.inf
    a, mapped, change, step = start, *(torch.empty_like(start) for _ in range(2)), 0 * start
    for k in range(1, max_steps + 1):
        phi(a, mapped)
        largest = _largest(torch.sub(mapped, a, out=change))
        if largest <= tolerance:
            return mapped
        if not math.isfinite(largest):
            break
        a.add_(step.mul_(beta).add_(change, alpha=alpha))
    raise FloatingPointError(
        f"{what} has come to no equilibrium: the largest change is {largest:.3g} after {k} steps, "
        f"{tolerance:.3g} is asked for; its weights are too strong or the steps too few"
    )


def _richardson(m: Tensor, activation: Activation) -> tuple[float, float]:
    """alpha and beta for I - diag(d) m^T, where d is between 0 and the steepest slope of sigma.

    Its eigenvalues have a real part between 1 and 1 + a, apart from excitation, and an imaginary
    part of at most b, where a, b are the norms of the symmetric and the skew part of m times that
    slope: the numerical range of m holds them. With an ellipse of these half axes a / 2, b, centre
    c and foci c +- f, alpha = 2 / g and beta = f^2 / g^2, g = c + sqrt(c^2 - f^2).
    """
    steepest = abs(activation.slope) * _STEEPEST.get(activation.base, 1.0)
    a, b = (steepest * _spectral_norm((m + sign * m.t()) / 2) for sign in (1, -1))
    centre, squared_focus = 1 + a / 2, (a / 2) ** 2 - b**2
    g = centre + math.sqrt(centre**2 - squared_focus)
    return 2 / g, squared_focus / g**2


def _spectral_norm(matrix: Tensor) -> float:
    """The norm of a symmetric or skew matrix, by power iteration: at most some 10 % too small.

    25 % would still do: the iteration tolerates real eigenvalues beyond the ellipse.
    """
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0))
    vector, tiny = start.to(matrix), torch.finfo(matrix.dtype).tiny
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / torch.linalg.vector_norm(vector).clamp_min(tiny))
    return float(torch.linalg.vector_norm(vector))


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, nan where there is one, 0 of an empty tensor.

    Faster than torch.linalg.vector_norm by an order of magnitude.
    """
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))
