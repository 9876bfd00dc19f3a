"""Sums over local terms with the statistics of units, factored into few products.

Statistics are numbers per unit. So all terms that multiply one prefactor f (the gain, say) by a
quantity that is linear in centred activities c = y - <y> and preactivations s collapse to

    l = c K + c' K' + S s + S' s' + k        K [units, units], S and k per unit
    h = f l;      dw = sum_views h^T x

For pairs everything is the same when the views are exchanged, so that sum and difference decouple:
with c_+- = c_1 +- c_2 and K_+- = (K +- K') / 2, l_1 = c_+ K_+ + c_- K_- and l_2 = c_+ K_+ - c_- K_-.
The moments are c_+^T c_+ and c_-^T c_-; covariance and cross-view covariance are their sum and
difference. Every function here takes this form: tensors [views, samples, units], first the sum,
then the difference; with one view there is the first only.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.local_polynomial import ROWS, Windows

MOMENTS = ("mean", "variance", "gram")


class Activation(Protocol):
    """sigma(u) = base(slope * u), known by its output; see models_fully_local.py."""

    base: str
    slope: float

    def backward(self, grad: Tensor, output: Tensor) -> Tensor: ...


def gain(sigma: Tensor, activation: Activation) -> Tensor:
    """sigma'(s), slope included, from sigma(s); differentiable in it."""
    slope = activation.slope
    if activation.base == "sigmoid":
        return slope * sigma * (1 - sigma)
    if activation.base == "tanh":
        return slope * (1 - sigma.square())
    return slope * (sigma > 0).to(sigma) if activation.base == "relu" else sigma * 0 + slope


def moments(y: Sequence[Tensor], wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    """Centred sum and difference of the views, the mean, and second moments of the batch.

    y: [samples, units] per view. wanted: "mean", "variance" or "gram".
    Returns c [views, samples, units], the mean [units] over samples and views, and c_v^T c_v over
    the number of samples and views: [views, units, units] for "gram", its diagonals [views, units]
    for "variance", [views, 0] for "mean". Pooled over views, the covariance is their sum.
    """
    return _Moments.apply(wanted, *y)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, *y):
        views, (samples, units) = len(y), y[0].shape
        c = y[0].new_empty(views, samples, units)
        if views == 2:
            torch.add(y[0], y[1], out=c[0])
            torch.sub(y[0], y[1], out=c[1])
        mean = (c[0] if views == 2 else y[0]).mean(0)
        torch.sub(c[0] if views == 2 else y[0], mean, out=c[0])
        if views == 2:
            mean = mean / 2
        # The sum of two views is twice as large as an orthogonal change of basis would make it.
        count = samples * views**2
        if wanted == "gram":
            second = torch.bmm(c.transpose(1, 2), c).div_(count)
        elif wanted == "variance":
            second = torch.linalg.vector_norm(c, dim=1).square_().div_(count)
        else:
            second = c.new_empty(views, 0)
        ctx.save_for_backward(c)
        ctx.wanted, ctx.count = wanted, count
        return c, mean, second

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_c, grad_mean, grad_second):
        (c,) = ctx.saved_tensors
        views, samples, _ = c.shape
        if ctx.wanted == "gram":
            both = grad_second + grad_second.transpose(1, 2)
            grad = torch.baddbmm(grad_c, c, both, alpha=1 / ctx.count)
        elif ctx.wanted == "variance":
            grad = torch.addcmul(grad_c, c, grad_second.unsqueeze(1), value=2 / ctx.count)
        else:
            grad = grad_c.clone()
        grad[0] += (grad_mean / views - grad[0].sum(0)) / samples
        if views == 1:
            return None, grad[0]
        return None, grad[0] + grad[1], grad[0] - grad[1]


def currents(
    c: Tensor, k: Tensor, const: Tensor | None, s: Sequence[Tensor], of_s: Tensor | None
) -> Tensor:
    """l above, [views, samples, units]: first that of the first view, then of the second.

    c: from `moments`; k: K_+- [views, units, units], or its diagonal [views, units]; const [units]
    or None; s: [samples, units] per view; of_s: S, S' [views, units or 1], or None.
    """
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
    """base'(slope s) l, the gain over the slope times `currents`; sigma: sigma(s) per view."""
    return _Currents.apply(activation, c, k, const, of_s, *s, *sigma)


class _Currents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, c, k, const, of_s, *tensors):
        views = len(c)
        s, sigma = tensors[:views], tensors[views:]
        total = _product(c, k, const)
        if views == 2:
            total = torch.stack([total[0] + total[1], total[0] - total[1]])
        if of_s is not None:
            for v in range(views):
                for u in range(views):
                    total[v].addcmul_(s[u], of_s[(u - v) % views])
        ctx.activation, ctx.has_const = activation, const is not None
        if activation is None:
            ctx.save_for_backward(c, k, of_s, *s)
            return total
        ctx.save_for_backward(c, k, of_s, *s, *sigma, total)
        return torch.stack([activation.backward(t, y) for t, y in zip(total, sigma, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        c, k, of_s, *tensors = ctx.saved_tensors
        views, activation = len(c), ctx.activation
        s, grad_sigma = tensors[:views], []
        if activation is not None:
            sigma, total = tensors[views : 2 * views], tensors[-1]
            if activation.base in _CURVATURE:
                curved = grad * total
                for g, y in zip(curved, sigma, strict=True):
                    _CURVATURE[activation.base](g, y)
                grad_sigma = list(curved)
            else:
                grad_sigma = [None] * views
            grad = torch.stack(
                [activation.backward(g, y) for g, y in zip(grad, sigma, strict=True)]
            )
        grad_s, grad_of_s = [None] * views, None
        if of_s is not None:
            grad_s, grad_of_s = _through_preactivations(grad, s, of_s)
        if views == 2:
            grad = torch.stack([grad[0] + grad[1], grad[0] - grad[1]])
        grad_const = grad[0].sum(0) if ctx.has_const else None
        if k.dim() == 3:
            grad_c = torch.bmm(grad, k.transpose(1, 2))
            grad_k = torch.bmm(c.transpose(1, 2), grad)
        else:
            grad_c = grad * k.unsqueeze(1)
            grad_k = (c * grad).sum(1)
        return None, grad_c, grad_k, grad_const, grad_of_s, *grad_s, *grad_sigma


def _product(c: Tensor, k: Tensor, const: Tensor | None) -> Tensor:
    """c_v K_v per view, and the constant in the first."""
    if k.dim() == 2:
        total = c * k.unsqueeze(1)
    else:
        total = torch.bmm(c, k)
    if const is not None:
        total[0] += const
    return total


def _through_preactivations(
    grad: Tensor, s: Sequence[Tensor], of_s: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of s and S, from that of l per view."""
    views = range(len(s))
    grad_s = [sum(grad[v] * of_s[(u - v) % len(s)] for v in views) for u in views]
    per_unit = torch.stack(
        [sum((grad[v] * s[(v + k) % len(s)]).sum(0) for v in views) for k in views]
    )
    return grad_s, per_unit if of_s.shape[1] > 1 or grad.shape[2] == 1 else per_unit.sum(1, True)


# What multiplies the gradient in place: base'' / base' as a function of base's output.
_CURVATURE = {
    "sigmoid": lambda grad, y: grad.addcmul_(grad, y, value=-2),
    "tanh": lambda grad, y: grad.mul_(y).mul_(-2),
}


def correlate(
    h: Tensor, x: Sequence[Tensor], windows: Windows | None = None
) -> tuple[Tensor, Tensor]:
    """sum_v h_v^T x_v [units, inputs], and the sum of h over samples and views [units].

    h: [views, samples, units]; x: [samples, inputs] per view, or with windows images of which each
    window is a sample, [images, channels, H, W].
    """
    return _Correlate.apply(h, windows, *x)


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, windows, *x):
        place = windows if windows is not None and x[0].dim() == 4 else ROWS
        fan_in = x[0].shape[1] * (place.size[0] * place.size[1] if place is not ROWS else 1)
        total = h.new_zeros(h.shape[2], fan_in)
        for of_view, inputs in zip(h, x, strict=True):
            place.correlate_(total, of_view, inputs)
        ctx.save_for_backward(h, *x)
        ctx.place = place
        return total, h.sum((0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_sum):
        h, *x = ctx.saved_tensors
        grad_h = torch.empty_like(h)
        for target, inputs in zip(grad_h, x, strict=True):
            ctx.place.project(inputs, grad, out=target)
        grad_x = []
        for of_view, inputs, needed in zip(h, x, ctx.needs_input_grad[2:], strict=True):
            grad_x.append(torch.zeros_like(inputs) if needed else None)
            if needed:
                ctx.place.spread_(grad_x[-1], of_view, grad)
        return grad_h.add_(grad_sum), None, *grad_x


def rms_step(
    w: Tensor, b: Tensor, dw: Tensor, db: Tensor, rate: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """w + f dw and b + f db with f_i = rate / sqrt(mean_j dw_ij^2 + eps^2), one number per unit.

    w, dw: [units, inputs]; b, db: [units]; rate, eps: scalars.
    """
    return _RmsStep.apply(w, b, dw, db, rate, eps)


class _RmsStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, b, dw, db, rate, eps):
        squared = torch.linalg.vector_norm(dw, dim=1).square_().div_(dw.shape[1]).add_(eps * eps)
        factor = rate * squared.rsqrt()
        ctx.save_for_backward(dw, db, rate, eps, squared, factor)
        return torch.addcmul(w, dw, factor.unsqueeze(1)), torch.addcmul(b, db, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_w, grad_b):
        dw, db, rate, eps, squared, factor = ctx.saved_tensors
        grad_factor = torch.linalg.vecdot(grad_w, dw).addcmul_(grad_b, db)
        through = grad_factor * factor
        shrink = through / squared  # of factor, by half the mean square
        grad_dw = grad_w * factor.unsqueeze(1)
        grad_dw.addcmul_(dw, shrink.unsqueeze(1), value=-1 / dw.shape[1])
        grad_rate = (grad_factor * squared.rsqrt()).sum() if ctx.needs_input_grad[4] else None
        grad_eps = -(shrink.sum() * eps) if ctx.needs_input_grad[5] else None
        return grad_w, grad_b, grad_dw, grad_b * factor, grad_rate, grad_eps
