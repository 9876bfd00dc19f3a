"""Sums over local terms with the statistics of units, factored into few products.

Statistics are numbers per unit. So all terms that multiply one prefactor f (the gain, say) by a
quantity that is linear in centred activities c = y - <y> and preactivations s collapse to

    l = c K + c' K' + S s + S' s' + const    K [units, units], S and const per unit
    h = f l;      dw = sum_views h^T x

For pairs everything is the same when the views are exchanged, so that sum and difference decouple:
with c_+- = c_1 +- c_2 and K_+- = (K +- K') / 2,

    l_1 = c_+ K_+ + c_- K_-,    l_2 = c_+ K_+ - c_- K_-

The moments are c_+^T c_+ and c_-^T c_-; covariance and cross-view covariance are their sum and
difference. Tensors [views, samples, units] hold first the sum, then the difference; with one view
there is the first only.

`gated_update` is a whole update in one step of autograd, for terms that all have the gain as their
prefactor; the other functions are its parts, for all other terms. Where units are few, the time
goes into the number of calls, not into the products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.local_polynomial import ROWS, Rows, Windows

FLOOR = 1e-4  # added to variances
# What may multiply a column of `gated_update`: 1, <y>, v^-1/2, v^-1.
FACTORS = ("1", "mean", "d", "d2")
LATERAL_CURRENTS = ("r", "r_cov", "r_cross")


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


# What multiplies a gradient in place: base'' / base' as a function of base's output.
_CURVATURE = {
    "sigmoid": lambda grad, y: grad.addcmul_(grad, y, value=-2),
    "tanh": lambda grad, y: grad.mul_(y).mul_(-2),
}


# ---- moments ----


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
        c, mean, second = _moments(y, wanted)
        ctx.save_for_backward(c)
        ctx.wanted = wanted
        return c, mean, second

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_c, grad_mean, grad_second):
        (c,) = ctx.saved_tensors
        return None, *_through_moments(c, ctx.wanted, grad_c, grad_mean, grad_second)


def _moments(y: Sequence[Tensor], wanted: str) -> tuple[Tensor, Tensor, Tensor]:
    if len(y) == 2:
        c = y[0].new_empty(2, *y[0].shape)
        torch.add(y[0], y[1], out=c[0])
        torch.sub(y[0], y[1], out=c[1])
        mean = c[0].mean(0)
        c[0].sub_(mean)
        mean = mean / 2
    else:
        mean = y[0].mean(0)
        c = (y[0] - mean).unsqueeze(0)
    if wanted == "gram":
        return c, mean, torch.bmm(c.transpose(1, 2), c).div_(_count(c))
    if wanted == "variance":
        return c, mean, torch.linalg.vector_norm(c, dim=1).square_().div_(_count(c))
    return c, mean, c.new_empty(len(c), 0)


def _count(c: Tensor) -> int:
    # The sum of two views is sqrt(2) as long as in an orthogonal change of basis.
    return c.shape[1] * len(c) ** 2


def _through_moments(
    c: Tensor, wanted: str, grad_c: Tensor, grad_mean: Tensor | None, grad_second: Tensor | None
) -> list[Tensor]:
    """Gradients of y per view."""
    if wanted == "gram":
        both = grad_second + grad_second.transpose(1, 2)
        grad = torch.baddbmm(grad_c, c, both, alpha=1 / _count(c))
    elif wanted == "variance":
        grad = torch.addcmul(grad_c, c, grad_second.unsqueeze(1), value=2 / _count(c))
    else:
        grad = grad_c.clone()
    views, samples, _ = c.shape
    total = grad[0].sum(0).neg_()
    if grad_mean is not None:
        total.add_(grad_mean, alpha=1 / views)
    first = grad[0].add_(total, alpha=1 / samples)
    return [first] if views == 1 else [first + grad[1], first - grad[1]]


# ---- currents ----


def currents(
    c: Tensor, k: Tensor, const: Tensor | None, s: Sequence[Tensor], of_s: Tensor | None
) -> Tensor:
    """l above, [views, samples, units]: that of the first view, then of the second.

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
        s, sigma = tensors[: len(c)], tensors[len(c) :]
        total = _currents(c, k, const, s, of_s)
        ctx.activation, ctx.has_const = activation, const is not None
        ctx.save_for_backward(c, k, of_s, *tensors, *([total] if sigma else ()))
        return _gated(total, sigma, activation) if sigma else total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        c, k, of_s, *tensors = ctx.saved_tensors
        s, grad_sigma = tensors[: len(c)], []
        if ctx.activation is not None:
            sigma, total = tensors[len(c) : -1], tensors[-1]
            grad, grad_sigma = _through_gate(grad, total, sigma, ctx.activation)
        grad_c, *of_weights, grad_s = _through_currents(grad, c, k, s, of_s, ctx.has_const)
        return None, grad_c, *of_weights, *grad_s, *grad_sigma


def _currents(c, k, const, s, of_s) -> Tensor:
    total = c * k.unsqueeze(1) if k.dim() == 2 else torch.bmm(c, k)
    if const is not None:
        total[0].add_(const)
    if len(c) == 2:
        first = total[0] + total[1]
        torch.sub(total[0], total[1], out=total[1])
        total[0].copy_(first)
    if of_s is not None:
        for v, of_view in enumerate(total.unbind()):
            for u, preactivation in enumerate(s):
                of_view.addcmul_(preactivation, of_s[(u - v) % len(s)])
    return total


def _through_currents(grad, c, k, s, of_s, has_const: bool):
    """Gradients of c, k, const, of_s, and of s per view."""
    grad_s, grad_of_s = [None] * len(s), None
    if of_s is not None:
        grad_s, grad_of_s = _through_preactivations(grad, s, of_s)
    if len(c) == 2:
        grad = torch.stack([grad[0] + grad[1], grad[0] - grad[1]])
    grad_const = grad[0].sum(0) if has_const else None
    if k.dim() == 3:
        grad_c = torch.bmm(grad, k.transpose(1, 2))
        grad_k = torch.bmm(c.transpose(1, 2), grad)
    else:
        grad_c = grad * k.unsqueeze(1)
        grad_k = (c * grad).sum(1)
    return grad_c, grad_k, grad_const, grad_of_s, grad_s


def _through_preactivations(
    grad: Tensor, s: Sequence[Tensor], of_s: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of s and of S, S', from that of l per view."""
    grads, per_unit, views = grad.unbind(), of_s.shape[1] > 1, range(len(s))
    grad_s = [grads[u] * of_s[0] for u in views]
    if len(s) == 2:
        for u in views:
            grad_s[u].addcmul_(grads[1 - u], of_s[1])
    grad_of_s = torch.zeros_like(of_s)
    for k in views:
        for v in views:
            if per_unit:
                grad_of_s[k].add_((grads[v] * s[(v + k) % len(s)]).sum(0))
            else:
                grad_of_s[k].add_(torch.dot(grads[v].flatten(), s[(v + k) % len(s)].flatten()))
    return grad_s, grad_of_s


def _gated(total: Tensor, sigma: Sequence[Tensor], activation: Activation) -> Tensor:
    if len(sigma) == 1:
        return activation.backward(total[0], sigma[0]).unsqueeze(0)
    return torch.stack([activation.backward(t, y) for t, y in zip(total, sigma, strict=True)])


def _through_gate(
    grad: Tensor, total: Tensor, sigma: Sequence[Tensor], activation: Activation
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of `total`, and of sigma per view (None: 0)."""
    grad_sigma = [None] * len(sigma)
    if activation.base in _CURVATURE:
        grad_sigma = list((grad * total).unbind())
        for curved, y in zip(grad_sigma, sigma, strict=True):
            _CURVATURE[activation.base](curved, y)
    return _gated(grad, sigma, activation), grad_sigma


# ---- products with the inputs ----


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
        ctx.save_for_backward(h, *x)
        ctx.place = _place(x, windows)
        return _correlated(h, x, ctx.place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_sum):
        h, *x = ctx.saved_tensors
        grad_x = _through_inputs(h, x, grad, ctx.place, ctx.needs_input_grad[2:])
        return _through_products(h, x, grad, grad_sum, ctx.place), None, *grad_x


def _place(x: Sequence[Tensor], windows: Windows | None) -> Rows | Windows:
    return windows if windows is not None and x[0].dim() == 4 else ROWS


def _correlated(h: Tensor, x: Sequence[Tensor], place: Rows | Windows) -> tuple[Tensor, Tensor]:
    summed = h.sum((0, 1)) if len(h) == 2 else h[0].sum(0)
    if place is ROWS:
        total = torch.mm(h[0].t(), x[0])
        for of_view, inputs in zip(h[1:], x[1:], strict=True):
            total.addmm_(of_view.t(), inputs)
        return total, summed
    total = h.new_zeros(h.shape[2], x[0].shape[1] * place.size[0] * place.size[1])
    for of_view, inputs in zip(h, x, strict=True):
        place.correlate_(total, of_view, inputs)
    return total, summed


def _through_products(h, x, grad: Tensor, grad_sum: Tensor, place) -> Tensor:
    """Gradient of h."""
    grad_h = torch.empty_like(h)
    for target, inputs in zip(grad_h, x, strict=True):
        place.project(inputs, grad, out=target)
    return grad_h.add_(grad_sum)


def _through_inputs(h, x, grad: Tensor, place, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradient of each x that needs one."""
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
    return _RmsStep.apply(w, b, dw, db, rate, eps)


class _RmsStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, b, dw, db, rate, eps):
        new, root, factor = _stepped(w, b, dw, db, rate, eps)
        ctx.save_for_backward(dw, db, eps, root, factor)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_w, grad_b):
        through = _through_step(grad_w, grad_b, *ctx.saved_tensors, ctx.needs_input_grad[4:6])
        return grad_w, grad_b, *through


def _stepped(w, b, dw, db, rate, eps) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """New w and b, 1 / sqrt(mean_j dw_ij^2 + eps^2) and f, both [units]."""
    square = torch.linalg.vector_norm(dw, dim=1).square_()
    root = torch.add(eps * eps, square, alpha=1 / dw.shape[1]).rsqrt_()
    factor = root * rate
    new = torch.addcmul(w, dw, factor.unsqueeze(1)), torch.addcmul(b, db, factor)
    return new, root, factor


def _through_step(grad_w, grad_b, dw, db, eps, root, factor, needed: Sequence[bool]):
    """Gradients of dw, db, rate and eps."""
    grad_factor = torch.linalg.vecdot(grad_w, dw).addcmul_(grad_b, db)
    shrink = grad_factor * factor * root * root  # of f, by half the mean square
    grad_dw = grad_w * factor.unsqueeze(1)
    grad_dw.addcmul_(dw, shrink.unsqueeze(1), value=-1 / dw.shape[1])
    grad_rate = torch.dot(grad_factor, root) if needed[0] else None
    grad_eps = -(shrink.sum() * eps) if needed[1] else None
    return grad_dw, grad_b * factor, grad_rate, grad_eps


# ---- a whole update ----


@dataclass(frozen=True)
class GatedTerms:
    """How the weights of `gated_update` are laid out in one vector.

    Attributes:
        rows: kinds of currents among "c", "r", "r_cov", "r_cross" (one row for each view: for the
            sum, then the difference) and "1" (one row), in this order.
        factors: of FACTORS; each row has one weight for each.
        of_s: whether weights of s, one for each view, follow.
        of_w: whether the weight of a term w follows.
    """

    rows: tuple[str, ...]
    factors: tuple[str, ...]
    of_s: bool
    of_w: bool

    @property
    def currents(self) -> tuple[str, ...]:
        """The kinds that have a row for each view."""
        return tuple(kind for kind in self.rows if kind != "1")

    @property
    def lateral(self) -> tuple[str, ...]:
        """The kinds of lateral currents."""
        return tuple(kind for kind in self.rows if kind in LATERAL_CURRENTS)

    def split(self, weights: Tensor, views: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[rows, factors], of s [views, 1] or None, of w [1] or None."""
        count = views * len(self.currents) + ("1" in self.rows)
        end = count * len(self.factors)
        of_s = weights[end : end + views].unsqueeze(1) if self.of_s else None
        return weights[:end].view(count, -1), of_s, weights[-1:] if self.of_w else None

    @property
    def level(self) -> str:
        """Which moments the currents need."""
        if self.lateral:
            return "gram"
        return "variance" if "d" in self.factors or "d2" in self.factors else "mean"


def gated_update(
    terms: GatedTerms,
    weights: Tensor,
    w: Tensor,
    b: Tensor,
    rate: Tensor,
    eps: Tensor,
    x: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    activation: Activation,
    windows: Windows | None = None,
) -> tuple[Tensor, Tensor]:
    """w and b after the `rms_step` of dw = sum_v (f_v l_v)^T x_v + (weight of w) w; f: base'.

    weights: all of `terms`, over the number of samples and times the slope, but that of w.
    w: [units, inputs]; x as in `correlate`; s, y = sigma(s): [samples, units] per view.
    Statistics are those of the batch.
    """
    return _GatedUpdate.apply(
        terms, activation, windows, len(x), weights, w, b, rate, eps, *x, *s, *y
    )


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, terms, activation, windows, views, weights, w, b, rate, eps, *tensors):
        x, s, y = tensors[:views], tensors[views : 2 * views], tensors[2 * views :]
        rows, of_s, of_w = terms.split(weights, views)
        c, mean, second = _moments(y, terms.level)
        mixing = _Mixing.of_moments(terms, rows, mean, second)
        total = _currents(c, mixing.k, mixing.const, s, of_s)
        h, place = _gated(total, y, activation), _place(x, windows)
        dw, db = _correlated(h, x, place)
        if of_w is not None:
            dw.addcmul_(w, of_w)
        new, root, factor = _stepped(w, b, dw, db, rate, eps)
        kept = (dw, db, eps, root, factor)
        s = s if terms.of_s else ()
        ctx.save_for_backward(weights, w, c, total, *kept, *mixing.tensors(), *x, *y, *s)
        ctx.terms, ctx.activation, ctx.place, ctx.views = terms, activation, place, views
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_w, grad_b):
        views, terms, needed = ctx.views, ctx.terms, ctx.needs_input_grad
        weights, w, c, total, *saved = ctx.saved_tensors
        kept, parts, tensors = saved[:5], saved[5:11], saved[11:]
        x, y, s = tensors[:views], tensors[views : 2 * views], tensors[2 * views :]
        rows, of_s, of_w = terms.split(weights, views)
        grad_dw, grad_db, grad_rate, grad_eps = _through_step(grad_w, grad_b, *kept, needed[7:9])
        grad_x = [None] * views
        if any(needed[9 : 9 + views]):
            h = _gated(total, y, ctx.activation)
            grad_x = _through_inputs(h, x, grad_dw, ctx.place, needed[9 : 9 + views])
        grad_h = _through_products(total, x, grad_dw, grad_db, ctx.place)
        grad_total, grad_sigma = _through_gate(grad_h, total, y, ctx.activation)
        mixing = _Mixing(terms, rows, *parts)
        grad_c, grad_k, grad_const, grad_of_s, grad_s = _through_currents(
            grad_total, c, mixing.k, s or [None] * views, of_s, "1" in terms.rows
        )
        grad_rows, grad_mean, grad_second = mixing.backward(grad_k, grad_const)
        grad_y = _through_moments(c, terms.level, grad_c, grad_mean, grad_second)
        grad_y = [a if b is None else a.add_(b) for a, b in zip(grad_y, grad_sigma, strict=True)]
        grads = [grad_rows.flatten()]
        grads += [grad_of_s.flatten()] if of_s is not None else []
        if of_w is not None:
            grads.append(torch.dot(grad_dw.flatten(), w.flatten()).unsqueeze(0))
            grad_w = torch.addcmul(grad_w, grad_dw, of_w)
        return (None,) * 4 + (
            torch.cat(grads), grad_w, grad_b, grad_rate, grad_eps, *grad_x, *grad_s, *grad_y,
        )  # fmt: skip


@dataclass
class _Mixing:
    """K_+- and the constant from moments and weights, and back.

    With e = 1 / v, d = v^-1/2 and rows a of weights times factors, off the diagonal

        K_ki = e_k Cov_ki d_i a^r_i + Cov_ki a^cov_i + e_k Cross_ki d_i a^cross_i

    and a^c on it.
    """

    terms: GatedTerms
    rows: Tensor
    factors: Tensor
    a: Tensor
    d: Tensor
    cov: Tensor
    across: Tensor | None
    k: Tensor

    @classmethod
    def of_moments(cls, terms: GatedTerms, rows: Tensor, mean: Tensor, second: Tensor) -> "_Mixing":
        views, lateral = len(second), terms.level == "gram"
        cov, d, across = mean, mean, None
        if terms.level != "mean":
            cov = second[0] if views == 1 else second[0] + second[1]
            d = ((cov.diagonal() if lateral else cov) + FLOOR).rsqrt_()
        factors = _factors(terms.factors, mean, d)
        if "r_cross" in terms.rows:
            across = second[0] - second[1]
        mixing = cls(terms, rows, factors, rows @ factors, d, cov, across, d)
        by_kind = mixing.by_kind(mixing.a)
        if lateral:
            mixing.k = mixing.matrix(by_kind)
        else:
            mixing.k = by_kind["c"] if "c" in by_kind else mean.new_zeros(views, len(mean))
        return mixing

    @property
    def const(self) -> Tensor | None:
        """The last row, where there is one."""
        return self.a[-1] if "1" in self.terms.rows else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What `backward` needs, with terms and rows."""
        return self.factors, self.a, self.d, self.cov, self.across, self.k

    def by_kind(self, rows: Tensor) -> dict[str, Tensor]:
        """[views or 1, ...] by kind; views of `rows`."""
        views = (len(rows) - ("1" in self.terms.rows)) // max(1, len(self.terms.currents))
        sizes = [views] * len(self.terms.currents) + [1] * ("1" in self.terms.rows)
        return dict(zip(self.terms.rows, rows.split(sizes), strict=True))

    def moments_of(self, kind: str) -> Tensor:
        """Covariances [units, units], across views for r_cross."""
        return self.across if kind == "r_cross" else self.cov

    def matrix(self, by_kind: dict[str, Tensor]) -> Tensor:
        """K [views, units, units]."""
        k = None
        for kind in self.terms.lateral:
            moments, column = self.moments_of(kind), by_kind[kind]
            if kind != "r_cov":
                moments, column = moments * self.d.square().unsqueeze(1), column * self.d
            part = moments * column.unsqueeze(1)
            k = part if k is None else k.add_(part)
        diagonal = k.diagonal(dim1=1, dim2=2)
        diagonal.copy_(by_kind["c"] if "c" in by_kind else torch.zeros_like(diagonal))
        return k

    def backward(
        self, grad_k: Tensor, grad_const: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of rows, mean and second; changes grad_k."""
        grad_a, lateral = torch.empty_like(self.a), self.terms.level == "gram"
        by_kind = self.by_kind(grad_a)
        if grad_const is not None:
            grad_a[-1] = grad_const
        diagonal = grad_k.diagonal(dim1=1, dim2=2) if lateral else grad_k
        if "c" in by_kind:
            by_kind["c"].copy_(diagonal)
        grad_d, grad_cov, grad_across = None, None, None
        if lateral:
            diagonal.zero_()
            grad_d, grad_cov, grad_across = self._through_matrix(grad_k, by_kind)
        grad_rows, grad_factors = grad_a @ self.factors.t(), self.rows.t() @ grad_a
        grad_mean = None
        for row, name in zip(grad_factors, self.terms.factors, strict=True):
            if name == "mean":
                grad_mean = row
            elif name != "1":
                of_d = row if name == "d" else 2 * self.d * row
                grad_d = of_d if grad_d is None else grad_d.add_(of_d)
        grad_second = self._second(len(grad_k), grad_d, grad_cov, grad_across)
        return grad_rows, grad_mean, grad_second

    def _through_matrix(self, grad_k: Tensor, grads: dict[str, Tensor]):
        """Gradients of d, covariance and cross-view covariance; fills those of rows."""
        grad_d, of_moments, e = torch.zeros_like(self.d), {}, self.d.square().unsqueeze(1)
        by_kind = self.by_kind(self.a)
        for kind in self.terms.lateral:
            moments, column, with_d = self.moments_of(kind), by_kind[kind], kind != "r_cov"
            scaled = moments * e if with_d else moments
            of_column = torch.linalg.vecdot(grad_k, scaled, dim=-2)
            of_scaled = grad_k * (column * self.d if with_d else column).unsqueeze(1)
            of_scaled = of_scaled[0] if len(grad_k) == 1 else of_scaled[0].add_(of_scaled[1])
            if with_d:
                torch.mul(of_column, self.d, out=grads[kind])
                grad_d.add_((of_column * column).sum(0))
                grad_d.addcmul_(torch.linalg.vecdot(of_scaled, moments), self.d, value=2)
                of_scaled.mul_(e)
            else:
                grads[kind].copy_(of_column)
            name = "across" if kind == "r_cross" else "cov"
            of_moments[name] = of_moments.get(name, 0) + of_scaled
        if "cov" not in of_moments:
            of_moments["cov"] = torch.zeros_like(self.cov)
        return grad_d, of_moments["cov"], of_moments.get("across")

    def _second(self, views: int, grad_d, grad_cov, grad_across) -> Tensor | None:
        """The gradient of the moments, from those of d, covariance, cross-view covariance."""
        if self.terms.level == "mean":
            return None
        grad_var = grad_d * self.d.pow(3).mul_(-0.5)
        if grad_cov is None:
            return grad_var.expand(views, -1)
        grad_cov.diagonal().add_(grad_var)
        if grad_across is None:
            return grad_cov.expand(views, -1, -1)
        return torch.stack([grad_cov + grad_across, grad_cov - grad_across])


def _factors(names: Sequence[str], mean: Tensor, d: Tensor) -> Tensor:
    """[factors, units], of FACTORS."""
    factors = mean.new_empty(len(names), len(mean))
    for row, name in zip(factors.unbind(), names, strict=True):
        if name == "1":
            row.fill_(1)
        elif name == "d2":
            torch.square(d, out=row)
        else:
            row.copy_(mean if name == "mean" else d)
    return factors
