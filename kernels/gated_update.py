"""A whole update of a rule with unit statistics, if the gain is the prefactor of all terms but w.

    s_v = x_v w^T + b,  y_v = sigma(s_v)
    dw = sum_v (base'(slope s_v) l_v)^T x_v + (weight of w) w,  then rms_step

l are the currents of kernels/unit_statistics.py, with statistics of this batch; the matrix K
follows from the moments and a few weights. The update is one autograd function. On a CPU its parts
are compiled loops (unit_statistics_loops.py), because with few units the time is that of the calls.
Several tasks at once, as in kernels/unit_statistics.py, are batched products on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.local_polynomial import ROWS, Place, inner_products, mixed, with_samples
from kernels.own_precision import in_own_precision
from kernels.unit_statistics import (
    FLOOR,
    Activation,
    currents_backward,
    currents_forward,
    gate_backward,
    gate_forward,
    inner_product,
    inputs_backward,
    moments_backward,
    moments_forward,
    products_backward,
    products_forward,
    step_backward,
    step_forward,
)

# Factors of a column of weights: 1, <y>, v^-1/2, v^-1, and v_i^-1 sum_{k != i} Corr_ik^2
FACTORS = ("1", "mean", "d", "d2", "rz")
LATERAL_CURRENTS = ("r", "r_cov", "r_cross")
NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
# p0, ..., p3 with base'(u) = p0 + p1 y + p2 y^2 + p3 [y > 0] for y = base(u); then 2 p2
SLOPES = {
    "sigmoid": (0.0, 1.0, -1.0, 0.0, -2.0),
    "tanh": (1.0, 0.0, -1.0, 0.0, -2.0),
    "relu": (0.0, 0.0, 0.0, 1.0, 0.0),
    "identity": (1.0, 0.0, 0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class GatedTerms:
    """The layout of the weights of `gated_update` in one vector.

    Attributes:
        rows: the kinds of currents, in this order: "c", "r", "r_cov", "r_cross", which have one row
            for each view (for the sum, then for the difference), and "1", which has one row.
        factors: some of FACTORS; each row has a weight for each.
        of_s: whether weights of s follow, one for each view.
        of_w: whether the weight of a term w follows.
    """

    rows: tuple[str, ...]
    factors: tuple[str, ...]
    of_s: bool
    of_w: bool

    @property
    def currents(self) -> tuple[str, ...]:
        """The kinds of currents that have a row for each view."""
        return tuple(kind for kind in self.rows if kind != "1")

    @property
    def lateral(self) -> tuple[str, ...]:
        """The kinds of lateral currents."""
        return tuple(kind for kind in self.rows if kind in LATERAL_CURRENTS)

    def split(self, weights: Tensor, views: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weights of the rows [rows, factors], of s [views, 1] or None, of w [1] or None.

        Of several tasks, [tasks, rows, factors], [views, tasks, 1] and [tasks, 1].
        """
        count = views * len(self.currents) + ("1" in self.rows)
        end, tasks = count * len(self.factors), weights.shape[:-1]
        of_s = None
        if self.of_s:
            of_s = weights[..., end : end + views].movedim(-1, 0).unsqueeze(-1)
        of_rows = weights[..., :end].view(*tasks, count, -1)
        return of_rows, of_s, weights[..., -1:] if self.of_w else None

    def places(self, views: int) -> np.ndarray:
        """The first rows of c, r, r_cov, r_cross and 1, [5]; -1 for kinds that don't occur."""
        order = ("c", *LATERAL_CURRENTS, "1")
        begin = {kind: views * number for number, kind in enumerate(self.rows)}
        return np.array([begin.get(kind, -1) for kind in order])

    @property
    def codes(self) -> np.ndarray:
        """The indices of the factors in FACTORS."""
        return np.array([FACTORS.index(name) for name in self.factors])

    @property
    def level(self) -> str:
        """The moments that the currents need: "gram", "variance" or "mean"; see `moments`."""
        if self.lateral or "rz" in self.factors:
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
    activation: Activation,
    place: Place = ROWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """w and b after the update of the module's formula, and y = sigma(s) [views, samples, units].

    Statistics are those of the batch.

    weights: the weights of `terms`, all but that of w times slope / number of samples.
    w: [units, inputs]; b: [units]; rate, eps: scalars, as in `rms_step`.
    x: [samples, inputs] per view, or images, in which `place` defines the samples.
    """
    compiled = w.device.type == "cpu" and w.dtype in NUMPY_TYPES and w.dim() == 2
    update = _CompiledUpdate if compiled and terms.level == "gram" else _GatedUpdate
    return update.apply(terms, activation, place, weights, w, b, rate, eps, *x)


def respond(
    w: Tensor, b: Tensor, x: Sequence[Tensor], activation: Activation, place: Place
) -> tuple[Tensor, Tensor]:
    """Preactivations s and activities y, both [views, samples, units]."""
    s = w.new_empty(len(x), *w.shape[:-2], place.count(x[0]), w.shape[-2])
    for inputs, of_view in zip(x, s, strict=True):
        place.project(inputs, w, out=of_view)
    return s.add_(with_samples(b)), activation.of_scaled_(activation.slope * s)


def through_products(grad_s: Tensor, w: Tensor, grad_w: Tensor, x, place, grad_x) -> None:
    """Add the gradients through s to grad_w and to each of grad_x that is not None."""
    for of_view, inputs, grad in zip(grad_s, x, grad_x, strict=True):
        place.correlate_(grad_w, of_view, inputs)
        if grad is not None:
            place.spread_(grad, of_view, w)


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, terms, activation, place, weights, w, b, rate, eps, *x):
        rows, of_s, of_w = terms.split(weights, len(x))
        s, y = respond(w, b, x, activation, place)
        c, mean, second = moments_forward(y, terms.level)
        mixing = _Mixing.of_moments(terms, rows, mean, second)
        total = currents_forward(c, mixing.k, mixing.const, s, of_s)
        h = gate_forward(total, y, activation)
        dw, db = products_forward(h, x, place), h.sum((0, -2))
        if of_w is not None:
            dw.addcmul_(w, of_w.unsqueeze(-1))
        new, root, factor = step_forward(w, b, dw, db, rate, eps)
        kept = (dw, db, eps, root, factor)
        s = s if terms.of_s else None
        ctx.save_for_backward(weights, w, y, c, total, s, *kept, *mixing.tensors(), *x)
        ctx.terms, ctx.activation, ctx.place = terms, activation, place
        ctx.set_materialize_grads(False)
        return *new, y

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, *grads):
        terms, activation, place = ctx.terms, ctx.activation, ctx.place
        weights, w, y, c, total, s, *saved = ctx.saved_tensors
        kept, parts, x = saved[:5], saved[5:11], saved[11:]
        grad_w, grad_b = _filled(grads, w)
        rows, of_s, of_w = terms.split(weights, len(x))
        needed = ctx.needs_input_grad
        grad_dw, grad_db, grad_rate, grad_eps = step_backward(grad_w, grad_b, *kept, needed[6:8])
        grad_x = [None] * len(x)
        if any(needed[8:]):
            h = gate_forward(total, y, activation)
            grad_x = inputs_backward(h, x, grad_dw, place, needed[8:])
        grad_h = products_backward(total, x, grad_dw, place).add_(with_samples(grad_db))
        grad_total, grad_sigma = gate_backward(grad_h, total, y, activation)
        mixing, states = _Mixing(terms, rows, *parts), [None] * len(x) if s is None else s
        grad_c, grad_k, grad_const, grad_of_s, grad_s = currents_backward(
            grad_total, c, mixing.k, states, of_s, "1" in terms.rows
        )
        grad_rows, grad_mean, grad_second = mixing.backward(grad_k, grad_const)
        grad_y = moments_backward(c, terms.level, grad_c, grad_mean, grad_second)
        grad_y = [a if b is None else a.add_(b) for a, b in zip(grad_y, grad_sigma, strict=True)]
        grad_y = torch.stack(grad_y) if grads[2] is None else torch.stack(grad_y).add_(grads[2])
        through_sigma = activation.backward(grad_y, y).mul_(activation.slope)
        if s is not None:
            through_sigma.add_(torch.stack(grad_s))
        of_weights = [grad_rows.flatten(-2)]
        of_weights += [grad_of_s.squeeze(-1).movedim(0, -1)] if of_s is not None else []
        grad_old = grad_w.clone()
        if of_w is not None:
            of_weights.append(inner_product(grad_dw, w, dims=2).view_as(of_w))
            grad_old.addcmul_(grad_dw, of_w.unsqueeze(-1))
        through_products(through_sigma, w, grad_old, x, place, grad_x)
        grad_b = grad_b + through_sigma.sum((0, -2))
        return (None,) * 3 + (
            torch.cat(of_weights, -1), grad_old, grad_b, grad_rate, grad_eps, *grad_x
        )  # fmt: skip


def _filled(grads: Sequence[Tensor | None], w: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the new w and b, with zeros instead of None."""
    grad_w, grad_b, _ = grads
    return (
        torch.zeros_like(w) if grad_w is None else grad_w.contiguous(),
        w.new_zeros(w.shape[:-1]) if grad_b is None else grad_b.contiguous(),
    )


class _CompiledUpdate(torch.autograd.Function):
    """_GatedUpdate with lateral currents, in compiled loops that write to given arrays."""

    @staticmethod
    def forward(ctx, terms, activation, place, weights, w, b, rate, eps, *x):
        from kernels import unit_statistics_loops as loops

        w, weights = w.contiguous(), weights.contiguous()
        s, y = respond(w, b, x, activation, place)
        fixed = _constants(terms, activation, len(x), s.shape[1], len(w), w.dtype)
        c, small = torch.empty_like(y), w.new_empty(fixed.numbers)
        of_weights, of_small, of_c, of_y = _arrays(weights, small, c, y)
        loops.centre(of_y, of_c, of_small)
        gram = torch.bmm(c.transpose(1, 2), c)
        k = torch.empty_like(gram)
        loops.mix(fixed.layout, fixed.codes, fixed.counts, *_arrays(gram), of_weights, of_small,
                  *_arrays(k))  # fmt: skip
        total = torch.bmm(c, k)
        h = torch.empty_like(total)
        loops.gate(fixed.layout, fixed.slope_of, of_weights, *_arrays(s), of_y, of_small,
                   *_arrays(total, h))  # fmt: skip
        dw = products_forward(h, x, place)
        new_w, new_b = torch.empty_like(w), w.new_empty(len(w))
        loops.step(fixed.layout, of_weights, *_arrays(w, b, rate, eps, dw), of_small,
                   *_arrays(new_w, new_b))  # fmt: skip
        s = s if terms.of_s else None
        ctx.save_for_backward(weights, w, y, c, total, s, dw, eps, small, k, *x)
        ctx.fixed, ctx.activation, ctx.place = fixed, activation, place
        ctx.set_materialize_grads(False)
        return new_w, new_b, y

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, *grads):
        from kernels import unit_statistics_loops as loops

        fixed, place, needed = ctx.fixed, ctx.place, ctx.needs_input_grad
        weights, w, y, c, total, s, dw, eps, small, k, *x = ctx.saved_tensors
        layout, of_weights, of_small, of_y = fixed.layout, *_arrays(weights, small, y)
        grad_w, grad_b = _filled(grads, w)
        grad_dw, grad_old, numbers = torch.empty_like(w), torch.empty_like(w), w.new_empty(2)
        grad_weights, grad_small = torch.empty_like(weights), w.new_empty(3, len(w))
        of_grads, of_sums = _arrays(grad_weights, grad_small)
        loops.through_step(layout, of_weights, *_arrays(grad_w, grad_b, w, dw, eps), of_small,
                           *_arrays(grad_dw, grad_old, numbers), of_grads, of_sums)  # fmt: skip
        grad_x = [None] * len(x)
        if any(needed[8:]):
            h = gate_forward(total, y, ctx.activation)
            grad_x = inputs_backward(h, x, grad_dw, place, needed[8:])
        grad = products_backward(total, x, grad_dw, place)
        grad_y, grad_s = torch.empty_like(grad), torch.empty_like(grad)
        of_grad_y, of_grad_s = _arrays(grad_y, grad_s)
        loops.through_gate(
            layout, fixed.slope_of, of_weights, *_arrays(y if s is None else s), of_y,
            *_arrays(total, grad), of_grad_y, of_grad_s, of_grads, of_sums,
        )  # fmt: skip
        grad_k, both = torch.bmm(c.transpose(1, 2), grad), torch.empty_like(k)
        loops.through_mix(layout, fixed.codes, fixed.counts, of_weights, of_small,
                          *_arrays(grad_k), of_grads, of_sums, *_arrays(both))  # fmt: skip
        grad_c = torch.baddbmm(torch.bmm(grad, k.transpose(1, 2)), c, both)
        if grads[2] is not None:
            grad_y.add_(grads[2])
        through_b = torch.empty_like(grad_b)
        loops.through_centre(
            fixed.slope_of, fixed.slope, *_arrays(grad_c), of_sums, of_y, of_grad_y,
            *_arrays(grad_b), of_grad_s, *_arrays(through_b),
        )  # fmt: skip
        through_products(grad_s, w, grad_old, x, place, grad_x)
        return (None,) * 3 + (
            grad_weights, grad_old, through_b, numbers[0], numbers[1], *grad_x
        )  # fmt: skip


@dataclass(frozen=True)
class _Constants:
    """The arguments of the loops that are no tensors, in the dtype of the tensors.

    Attributes:
        layout: the numbers of views, rows, factors, weights of s and weights of w, then the first
            rows of each kind (see `GatedTerms.places`).
        codes: see `GatedTerms`.
        counts: the factor from c^T c to the moments, and what is added to variances.
        slope, slope_of: the activation's slope and its SLOPES.
        numbers: the length of the array of everything kept for each unit or pair of units.
    """

    layout: tuple[int, ...]
    codes: np.ndarray
    counts: tuple[np.floating, np.floating]
    slope: np.floating
    slope_of: tuple[np.floating, ...]
    numbers: int


@lru_cache
def _constants(
    terms: GatedTerms, activation: Activation, views: int, samples: int, units: int, dtype
) -> _Constants:
    number, factors = NUMPY_TYPES[dtype], len(terms.factors)
    rows = views * len(terms.currents) + ("1" in terms.rows)
    layout = (views, rows, factors, views * terms.of_s, int(terms.of_w), *terms.places(views))
    matrices = 2 if "r_cross" in terms.rows else 1
    return _Constants(
        tuple(map(int, layout)),
        terms.codes,
        (number(1 / (samples * views**2)), number(FLOOR)),
        number(activation.slope),
        tuple(number(p) for p in SLOPES[activation.base]),
        units * (5 + factors + rows + matrices * units),
    )


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors as arrays that share their memory, for the loops."""
    return [t.detach().numpy() for t in tensors]


@dataclass
class _Mixing:
    """K_+- and the constant from moments and weights, and their backward pass.

    With e = 1 / v, d = v^-1/2 and rows a of weights times factors, K is off the diagonal

        K_ki = e_k Cov_ki d_i a^r_i + Cov_ki a^cov_i + e_k Cross_ki d_i a^cross_i

    and a^c on the diagonal.
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
            d = ((cov.diagonal(dim1=-2, dim2=-1) if lateral else cov) + FLOOR).rsqrt_()
        factors = _factors(terms.factors, mean, d, cov)
        if "r_cross" in terms.rows:
            across = second[0] - second[1]
        mixing = cls(terms, rows, factors, mixed(rows, factors), d, cov, across, d)
        by_kind = mixing.by_kind(mixing.a)
        if lateral:
            mixing.k = mixing.matrix(by_kind, views)
        else:
            mixing.k = by_kind["c"] if "c" in by_kind else mean.new_zeros(views, *mean.shape)
        return mixing

    @property
    def const(self) -> Tensor | None:
        """The row of the constant, [units], or None."""
        return self.a[-1] if "1" in self.terms.rows else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that `backward` needs in addition to terms and rows."""
        return self.factors, self.a, self.d, self.cov, self.across, self.k

    def by_kind(self, rows: Tensor) -> dict[str, Tensor]:
        """`rows` split by kind, [views, ...] each, or [1, ...] for "1"; views of their memory."""
        views = (len(rows) - ("1" in self.terms.rows)) // max(1, len(self.terms.currents))
        sizes = [views] * len(self.terms.currents) + [1] * ("1" in self.terms.rows)
        return dict(zip(self.terms.rows, rows.split(sizes), strict=True))

    def moments_of(self, kind: str) -> Tensor:
        """The covariances [units, units] of a kind: across views for r_cross, else pooled."""
        return self.across if kind == "r_cross" else self.cov

    def matrix(self, by_kind: dict[str, Tensor], views: int) -> Tensor:
        """K_+- [views, units, units]."""
        k = self.d.new_zeros(views, *self.cov.shape)
        for kind in self.terms.lateral:
            moments, column = self.moments_of(kind), by_kind[kind]
            if kind != "r_cov":
                moments, column = moments * self.d.square().unsqueeze(-1), column * self.d
            k.addcmul_(moments, column.unsqueeze(-2))
        diagonal = k.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(by_kind["c"] if "c" in by_kind else torch.zeros_like(diagonal))
        return k

    def backward(
        self, grad_k: Tensor, grad_const: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of rows, mean and second moments (None: 0); overwrites grad_k."""
        grad_a, lateral = torch.empty_like(self.a), self.terms.level == "gram"
        by_kind = self.by_kind(grad_a)
        if grad_const is not None:
            grad_a[-1] = grad_const
        diagonal = grad_k.diagonal(dim1=-2, dim2=-1) if lateral else grad_k
        if "c" in by_kind:
            by_kind["c"].copy_(diagonal)
        grad_d, grad_cov, grad_across = None, None, None
        if lateral:
            diagonal.zero_()
            grad_d, grad_cov, grad_across = self._through_matrix(grad_k, by_kind)
        grad_rows = inner_products(grad_a, self.factors, tasks=self.rows.dim() == 3)
        grad_factors = mixed(self.rows.mT, grad_a)
        grad_mean = None
        for row, name in zip(grad_factors, self.terms.factors, strict=True):
            if name == "mean":
                grad_mean = row
            elif name == "rz":
                self._through_rz(row, grad_d, grad_cov)
            elif name != "1":
                of_d = row if name == "d" else 2 * self.d * row
                grad_d = of_d if grad_d is None else grad_d.add_(of_d)
        grad_second = self._second(len(grad_k), grad_d, grad_cov, grad_across)
        return grad_rows, grad_mean, grad_second

    def _through_matrix(self, grad_k: Tensor, grads: dict[str, Tensor]):
        """The gradients of d, covariance and cross-view covariance; writes those of rows."""
        grad_d, of_moments, e = torch.zeros_like(self.d), {}, self.d.square().unsqueeze(-1)
        by_kind = self.by_kind(self.a)
        for kind in self.terms.lateral:
            moments, column, with_d = self.moments_of(kind), by_kind[kind], kind != "r_cov"
            scaled = moments * e if with_d else moments
            of_column = torch.linalg.vecdot(grad_k, scaled, dim=-2)
            of_scaled = grad_k * (column * self.d if with_d else column).unsqueeze(-2)
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

    def _through_rz(self, grad: Tensor, grad_d: Tensor, grad_cov: Tensor) -> None:
        """Add the gradients through the factor rz to those of d and covariance."""
        e, others = self.d.square(), _without_diagonal(self.cov)
        squares = others.square()
        grad_e = 2 * grad * e * _applied(squares, e) + _applied(squares.mT, grad * e * e)
        grad_d.addcmul_(grad_e, self.d, value=2)
        grad_cov.addcmul_(others * (grad * e * e).unsqueeze(-1), e.unsqueeze(-2), value=2)

    def _second(self, views: int, grad_d, grad_cov, grad_across) -> Tensor | None:
        """The gradient of the second moments from those of d and both covariances, or None."""
        if self.terms.level == "mean":
            return None
        grad_var = grad_d * self.d.pow(3).mul_(-0.5)
        if grad_cov is None:
            return grad_var.expand(views, *grad_var.shape)
        grad_cov.diagonal(dim1=-2, dim2=-1).add_(grad_var)
        if grad_across is None:
            return grad_cov.expand(views, *grad_cov.shape)
        return torch.stack([grad_cov + grad_across, grad_cov - grad_across])


def _factors(names: Sequence[str], mean: Tensor, d: Tensor, cov: Tensor) -> Tensor:
    """The values [factors, units] of these FACTORS."""
    factors = mean.new_empty(len(names), *mean.shape)
    for row, name in zip(factors.unbind(), names, strict=True):
        if name == "1":
            row.fill_(1)
        elif name == "d2":
            torch.square(d, out=row)
        elif name == "rz":
            e = d.square()
            row.copy_(e * e * _applied(_without_diagonal(cov).square(), e))
        else:
            row.copy_(mean if name == "mean" else d)
    return factors


def _without_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


def _applied(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of a matrix and a vector, or of those of each task."""
    if vector.dim() == 1:
        return matrix @ vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
