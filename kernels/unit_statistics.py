"""Sums over local terms with the statistics of units, factored into few products.

Statistics are numbers per unit. Therefore all terms with the same prefactor f (the gain, say) times
a quantity that is linear in centred activities c = y - <y> and preactivations s collapse to

    l = c K + c' K' + S s + S' s' + const    K [units, units], S and const per unit
    h = f l;      dw = sum_views h^T x

For pairs everything is symmetric under exchange of the views, so that sum and difference decouple:
with c_+- = c_1 +- c_2 and K_+- = (K +- K') / 2,

    l_1 = c_+ K_+ + c_- K_-,    l_2 = c_+ K_+ - c_- K_-

The moments are c_+^T c_+ and c_-^T c_-, up to a factor; covariance and cross-view covariance are
their sum and difference. c [views, samples, units] holds first the sum, then the difference; with
one view only the first.

Each function exists as an autograd function, and as separate forward and backward passes, of which
gated_update.py makes a larger autograd function. In forward mode it is that of the same name in
unit_statistics_plain.py.

Of several tasks, tensors have a dimension for them after that of the views, or in front if they are
of no view: c [views, tasks, samples, units], w [tasks, units, inputs], scalars [tasks, 1].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import unit_statistics_plain as plain
from kernels.forward_mode import runs_forward
from kernels.local_polynomial import (
    ROWS,
    Place,
    TaskWindows,
    Windows,
    place_of,
    with_samples,
)
from kernels.own_precision import in_own_precision
from kernels.task_products import contracted

FLOOR = 1e-4  # added to variances


class Activation(Protocol):
    """sigma(u) = base(slope * u), differentiated from its output; see models_fully_local.py."""

    base: str
    slope: float

    def of_scaled_(self, scaled: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, output: Tensor) -> Tensor: ...


def gain(sigma: Tensor, activation: Activation) -> Tensor:
    """sigma'(s), slope included, as a differentiable function of sigma(s)."""
    slope = activation.slope
    if activation.base == "sigmoid":
        return slope * sigma * (1 - sigma)
    if activation.base == "tanh":
        return slope * (1 - sigma.square())
    return slope * (sigma > 0).to(sigma) if activation.base == "relu" else sigma * 0 + slope


# Multiply a gradient in place by base'' / base', a function of base's output; 0 for other bases
_CURVATURE = {
    "sigmoid": lambda grad, y: grad.addcmul_(grad, y, value=-2),
    "tanh": lambda grad, y: grad.mul_(y).mul_(-2),
}


# ---- moments ----


def moments(y: Sequence[Tensor], wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    """Centred sum and difference of the views, the mean, and second moments of the batch.

    Returns c [views, samples, units], the mean [units] over samples and views, and the moments
    c_v^T c_v / (samples * views^2): [views, units, units] for "gram", its diagonals [views, units]
    for "variance", [views, 0] for "mean". The sum of the moments is the covariance pooled over the
    views.

    y: [samples, units] per view.
    wanted: "mean", "variance" or "gram".
    """
    return plain.moments(y, wanted) if runs_forward() else _Moments.apply(wanted, *y)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, *y):
        c, mean, second = moments_forward(y, wanted)
        ctx.save_for_backward(c)
        ctx.wanted = wanted
        return c, mean, second

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad_c, grad_mean, grad_second):
        (c,) = ctx.saved_tensors
        return None, *moments_backward(c, ctx.wanted, grad_c, grad_mean, grad_second)


def moments_forward(y: Sequence[Tensor], wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    if len(y) == 2:
        c = y[0].new_empty(2, *y[0].shape)
        torch.add(y[0], y[1], out=c[0])
        torch.sub(y[0], y[1], out=c[1])
        mean = c[0].mean(-2)
        c[0].sub_(with_samples(mean))
        mean = mean / 2
    else:
        mean = y[0].mean(-2)
        c = (y[0] - with_samples(mean)).unsqueeze(0)
    if wanted == "gram":
        return c, mean, contracted(c, c).div_(count_of(c))
    if wanted == "variance":
        return c, mean, torch.linalg.vector_norm(c, dim=-2).square_().div_(count_of(c))
    return c, mean, c.new_empty(*c.shape[:-2], 0)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Matrix products of each view, or of each view and task."""
    return torch.bmm(one, other) if one.dim() == 3 else torch.matmul(one, other)


def count_of(c: Tensor) -> int:
    # one factor `views` for the mean over views, one because sum and difference are not normalised
    return c.shape[-2] * len(c) ** 2


def moments_backward(
    c: Tensor, wanted: str, grad_c: Tensor, grad_mean: Tensor | None, grad_second: Tensor | None
) -> list[Tensor]:
    """The gradient of y of each view."""
    if wanted == "gram":
        both = grad_second + grad_second.mT
        if c.dim() == 3:
            grad = torch.baddbmm(grad_c, c, both, alpha=1 / count_of(c))
        else:
            grad = torch.add(grad_c, torch.matmul(c, both), alpha=1 / count_of(c))
    elif wanted == "variance":
        grad = torch.addcmul(grad_c, c, grad_second.unsqueeze(-2), value=2 / count_of(c))
    else:
        grad = grad_c.clone()
    views, samples = len(c), c.shape[-2]
    total = grad[0].sum(-2).neg_()
    if grad_mean is not None:
        total.add_(grad_mean, alpha=1 / views)
    first = grad[0].add_(with_samples(total), alpha=1 / samples)
    return [first] if views == 1 else [first + grad[1], first - grad[1]]


# ---- currents ----


def currents(
    c: Tensor, k: Tensor, const: Tensor | None, s: Sequence[Tensor], of_s: Tensor | None
) -> Tensor:
    """The currents l of the module's formula for each view, [views, samples, units].

    c: [views, samples, units], from `moments`.
    k: K_+- [views, units, units], or its diagonal [views, units].
    const: [units] or None.
    s: [samples, units] per view.
    of_s: S, S' [views, units or 1], or None.
    """
    if runs_forward():
        return plain.currents(c, k, const, s, of_s)
    return _Currents.apply(None, c, k, const, of_s, *s)


def gated_currents(
    c: Tensor,
    k: Tensor,
    const: Tensor | None,
    s: Sequence[Tensor],
    of_s: Tensor | None,
    sigma: Sequence[Tensor],
    activation: Activation,
) -> Tensor:
    """base'(slope s) l, that is, `currents` times the gain without its factor `slope`.

    sigma: sigma(s) [samples, units] per view; the other arguments are those of `currents`.
    """
    if runs_forward():
        gains = torch.stack([gain(y, activation) for y in sigma])
        return plain.currents(c, k, const, s, of_s) * gains / activation.slope
    return _Currents.apply(activation, c, k, const, of_s, *s, *sigma)


class _Currents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, c, k, const, of_s, *tensors):
        s, sigma = tensors[: len(c)], tensors[len(c) :]
        total = currents_forward(c, k, const, s, of_s)
        ctx.activation, ctx.has_const = activation, const is not None
        ctx.save_for_backward(c, k, of_s, *tensors, *([total] if sigma else ()))
        return gate_forward(total, sigma, activation) if sigma else total

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad):
        c, k, of_s, *tensors = ctx.saved_tensors
        s, grad_sigma = tensors[: len(c)], []
        if ctx.activation is not None:
            sigma, total = tensors[len(c) : -1], tensors[-1]
            grad, grad_sigma = gate_backward(grad, total, sigma, ctx.activation)
        grad_c, *of_weights, grad_s = currents_backward(grad, c, k, s, of_s, ctx.has_const)
        return None, grad_c, *of_weights, *grad_s, *grad_sigma


def currents_forward(c, k, const, s, of_s) -> Tensor:
    total = _products(c, k) if k.dim() == c.dim() else c * k.unsqueeze(-2)
    if const is not None:
        total[0].add_(with_samples(const))
    if len(c) == 2:
        first = total[0] + total[1]
        torch.sub(total[0], total[1], out=total[1])
        total[0].copy_(first)
    if of_s is not None:
        for v, of_view in enumerate(total.unbind()):
            for u, preactivation in enumerate(s):
                of_view.addcmul_(preactivation, with_samples(of_s[(u - v) % len(s)]))
    return total


def currents_backward(grad, c, k, s, of_s, has_const: bool):
    """The gradients of c, k, const, of_s, and of s per view; None if there are none."""
    grad_s, grad_of_s = [None] * len(s), None
    if of_s is not None:
        grad_s, grad_of_s = _through_preactivations(grad, s, of_s)
    if len(c) == 2:
        grad = torch.stack([grad[0] + grad[1], grad[0] - grad[1]])
    grad_const = grad[0].sum(-2) if has_const else None
    if k.dim() == c.dim():
        grad_c = _products(grad, k.mT)
        grad_k = contracted(c, grad)
    else:
        grad_c = grad * k.unsqueeze(-2)
        grad_k = (c * grad).sum(-2)
    return grad_c, grad_k, grad_const, grad_of_s, grad_s


def _through_preactivations(
    grad: Tensor, s: Sequence[Tensor], of_s: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradients of s per view and of S, S', from that of l."""
    grads, per_unit, views = grad.unbind(), of_s.shape[-1] > 1, range(len(s))
    grad_s = [grads[u] * with_samples(of_s[0]) for u in views]
    if len(s) == 2:
        for u in views:
            grad_s[u].addcmul_(grads[1 - u], with_samples(of_s[1]))
    grad_of_s = torch.zeros_like(of_s)
    for k in views:
        for v in views:
            if per_unit:
                grad_of_s[k].add_((grads[v] * s[(v + k) % len(s)]).sum(-2))
            else:
                grad_of_s[k].add_(inner_product(grads[v], s[(v + k) % len(s)], dims=2))
    return grad_s, grad_of_s


def inner_product(one: Tensor, other: Tensor, dims: int) -> Tensor:
    """The sum of one * other over the last dimensions: a scalar, or [tasks, 1] of several tasks."""
    if one.dim() == dims:
        return torch.dot(one.flatten(), other.flatten())
    return torch.linalg.vecdot(one.flatten(1), other.flatten(1)).unsqueeze(1)


def gate_forward(total: Tensor, sigma: Sequence[Tensor], activation: Activation) -> Tensor:
    if len(sigma) == 1:
        return activation.backward(total[0], sigma[0]).unsqueeze(0)
    return torch.stack([activation.backward(t, y) for t, y in zip(total, sigma, strict=True)])


def gate_backward(
    grad: Tensor, total: Tensor, sigma: Sequence[Tensor], activation: Activation
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of `total`, and of sigma per view (None: 0)."""
    grad_sigma = [None] * len(sigma)
    if activation.base in _CURVATURE:
        grad_sigma = list((grad * total).unbind())
        for curved, y in zip(grad_sigma, sigma, strict=True):
            _CURVATURE[activation.base](curved, y)
    return gate_forward(grad, sigma, activation), grad_sigma


# ---- products with the inputs ----


def correlate(
    h: Tensor, x: Sequence[Tensor], windows: Windows | TaskWindows | None = None
) -> tuple[Tensor, Tensor]:
    """sum_v h_v^T x_v [units, inputs], and the sum of h over samples and views [units].

    h: [views, samples, units].
    x: [samples, inputs] per view; or, with windows, images [images, channels, H, W] of which each
        window is a sample.
    """
    return plain.correlate(h, x, windows) if runs_forward() else _Correlate.apply(h, windows, *x)


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, windows, *x):
        ctx.save_for_backward(h, *x)
        ctx.place = place_of(x, windows)
        return products_forward(h, x, ctx.place), h.sum((0, -2))

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad, grad_sum):
        h, *x = ctx.saved_tensors
        grad_x = inputs_backward(h, x, grad, ctx.place, ctx.needs_input_grad[2:])
        grad_h = products_backward(h, x, grad, ctx.place).add_(with_samples(grad_sum))
        return grad_h, None, *grad_x


def products_forward(h: Tensor, x: Sequence[Tensor], place: Place) -> Tensor:
    """sum_v h_v^T x_v, [units, inputs]."""
    if place is ROWS:
        total = torch.mm(h[0].t(), x[0])
        for of_view, inputs in zip(h[1:], x[1:], strict=True):
            total.addmm_(of_view.t(), inputs)
        return total
    total = h.new_zeros(*h.shape[1:-2], h.shape[-1], place.fan_in(x[0]))
    for of_view, inputs in zip(h, x, strict=True):
        place.correlate_(total, of_view, inputs)
    return total


def products_backward(h: Tensor, x: Sequence[Tensor], grad: Tensor, place) -> Tensor:
    """The gradient of h, of which only the shape is used."""
    grad_h = torch.empty_like(h)
    for target, inputs in zip(grad_h, x, strict=True):
        place.project(inputs, grad, out=target)
    return grad_h


def inputs_backward(h, x, grad: Tensor, place, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each x that needs one, else None."""
    grads = []
    for of_view, inputs, needs in zip(h, x, needed, strict=True):
        grads.append(torch.zeros_like(inputs) if needs else None)
        if needs:
            place.spread_(grads[-1], of_view, grad)
    return grads


# ---- the step ----


def rms_step(
    w: Tensor, b: Tensor, dw: Tensor, db: Tensor, rate: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """w + f dw and b + f db with f_i = rate / sqrt(mean_j dw_ij^2 + eps^2), one number per unit.

    w, dw: [units, inputs]; b, db: [units]; rate, eps: scalars.
    """
    step = plain.rms_step if runs_forward() else _RmsStep.apply
    return step(w, b, dw, db, rate, eps)


class _RmsStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, b, dw, db, rate, eps):
        new, root, factor = step_forward(w, b, dw, db, rate, eps)
        ctx.save_for_backward(dw, db, eps, root, factor)
        return new

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad_w, grad_b):
        through = step_backward(grad_w, grad_b, *ctx.saved_tensors, ctx.needs_input_grad[4:6])
        return grad_w, grad_b, *through


def step_forward(w, b, dw, db, rate, eps) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The new w and b; 1 / sqrt(mean_j dw_ij^2 + eps^2) and f, both [units]."""
    square = torch.linalg.vector_norm(dw, dim=-1).square_()
    root = torch.add(eps * eps, square, alpha=1 / dw.shape[-1]).rsqrt_()
    factor = root * rate
    new = torch.addcmul(w, dw, factor.unsqueeze(-1)), torch.addcmul(b, db, factor)
    return new, root, factor


def step_backward(grad_w, grad_b, dw, db, eps, root, factor, needed: Sequence[bool]):
    """The gradients of dw, db, rate and eps; `needed`: whether rate and eps need theirs."""
    grad_factor = torch.linalg.vecdot(grad_w, dw).addcmul_(grad_b, db)
    shrink = grad_factor * factor * root * root  # minus the gradient by half the mean square
    grad_dw = grad_w * factor.unsqueeze(-1)
    grad_dw.addcmul_(dw, shrink.unsqueeze(-1), value=-1 / dw.shape[-1])
    grad_rate = inner_product(grad_factor, root, dims=1) if needed[0] else None
    grad_eps = -(shrink.sum(-1).view_as(eps) * eps) if needed[1] else None
    return grad_dw, grad_b * factor, grad_rate, grad_eps
