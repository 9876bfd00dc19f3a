"""A whole update of a rule with unit statistics, for terms that all have the gain as prefactor.

    dw = sum_v (base'(slope s_v) l_v)^T x_v + (weight of w) w,  then rms_step

l are the currents of kernels/unit_statistics.py, with statistics of this batch; the matrix K comes
from the moments and a few weights. One step of autograd, whose parts are compiled loops on a CPU
(unit_statistics_loops.py): where units are few, the time goes into the number of calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.local_polynomial import Windows
from kernels.unit_statistics import (
    FLOOR,
    Activation,
    currents_backward,
    currents_forward,
    gate_backward,
    gate_forward,
    inputs_backward,
    moments_backward,
    moments_forward,
    place_of,
    products_backward,
    products_forward,
    step_backward,
    step_forward,
)

# What may multiply a column of weights: 1, <y>, v^-1/2, v^-1, and v_i^-1 sum_{k != i} Corr_ik^2.
FACTORS = ("1", "mean", "d", "d2", "rz")
LATERAL_CURRENTS = ("r", "r_cov", "r_cross")
NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
# base' = p0 + p1 y + p2 y^2 + p3 [y > 0] of y = base(u), and 2 p2.
SLOPES = {
    "sigmoid": (0.0, 1.0, -1.0, 0.0, -2.0),
    "tanh": (1.0, 0.0, -1.0, 0.0, -2.0),
    "relu": (0.0, 0.0, 0.0, 1.0, 0.0),
    "identity": (1.0, 0.0, 0.0, 0.0, 0.0),
}


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

    def places(self, views: int) -> np.ndarray:
        """Where the rows of c, r, r_cov, r_cross and 1 begin, -1 where there are none."""
        order = ("c", *LATERAL_CURRENTS, "1")
        begin = {kind: views * number for number, kind in enumerate(self.rows)}
        return np.array([begin.get(kind, -1) for kind in order])

    @property
    def codes(self) -> np.ndarray:
        """Factors as places in FACTORS."""
        return np.array([FACTORS.index(name) for name in self.factors])

    @property
    def level(self) -> str:
        """Which moments the currents need."""
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
    on_cpu = w.device.type == "cpu" and w.dtype in NUMPY_TYPES
    update = _CompiledUpdate if on_cpu and terms.level == "gram" else _GatedUpdate
    return update.apply(terms, activation, windows, len(x), weights, w, b, rate, eps, *x, *s, *y)


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, terms, activation, windows, views, weights, w, b, rate, eps, *tensors):
        x, s, y = tensors[:views], tensors[views : 2 * views], tensors[2 * views :]
        rows, of_s, of_w = terms.split(weights, views)
        c, mean, second = moments_forward(y, terms.level)
        mixing = _Mixing.of_moments(terms, rows, mean, second)
        total = currents_forward(c, mixing.k, mixing.const, s, of_s)
        h, place = gate_forward(total, y, activation), place_of(x, windows)
        dw, db = products_forward(h, x, place), h.sum((0, 1))
        if of_w is not None:
            dw.addcmul_(w, of_w)
        new, root, factor = step_forward(w, b, dw, db, rate, eps)
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
        grad_dw, grad_db, grad_rate, grad_eps = step_backward(grad_w, grad_b, *kept, needed[7:9])
        grad_x = [None] * views
        if any(needed[9 : 9 + views]):
            h = gate_forward(total, y, ctx.activation)
            grad_x = inputs_backward(h, x, grad_dw, ctx.place, needed[9 : 9 + views])
        grad_h = products_backward(total, x, grad_dw, ctx.place).add_(grad_db)
        grad_total, grad_sigma = gate_backward(grad_h, total, y, ctx.activation)
        mixing = _Mixing(terms, rows, *parts)
        grad_c, grad_k, grad_const, grad_of_s, grad_s = currents_backward(
            grad_total, c, mixing.k, s or [None] * views, of_s, "1" in terms.rows
        )
        grad_rows, grad_mean, grad_second = mixing.backward(grad_k, grad_const)
        grad_y = moments_backward(c, terms.level, grad_c, grad_mean, grad_second)
        grad_y = [a if b is None else a.add_(b) for a, b in zip(grad_y, grad_sigma, strict=True)]
        grads = [grad_rows.flatten()]
        grads += [grad_of_s.flatten()] if of_s is not None else []
        if of_w is not None:
            grads.append(torch.dot(grad_dw.flatten(), w.flatten()).unsqueeze(0))
            grad_w = torch.addcmul(grad_w, grad_dw, of_w)
        return (None,) * 4 + (
            torch.cat(grads), grad_w, grad_b, grad_rate, grad_eps, *grad_x, *grad_s, *grad_y,
        )  # fmt: skip


class _CompiledUpdate(torch.autograd.Function):
    """_GatedUpdate with lateral currents; its parts are compiled loops, which fill arrays."""

    @staticmethod
    def forward(ctx, terms, activation, windows, views, weights, w, b, rate, eps, *tensors):
        from kernels import unit_statistics_loops as loops

        x, place = tensors[:views], place_of(tensors, windows)
        s = [t.contiguous() for t in tensors[views : 2 * views]]
        y = [t.contiguous() for t in tensors[2 * views :]]
        w, (rows, of_s, of_w) = w.contiguous(), terms.split(weights, views)
        fixed = _constants(terms, activation.base, views, len(y[0]), w.dtype)
        s_y = _arrays(s[0], s[-1], y[0], y[-1])
        c, mean = y[0].new_empty(views, *y[0].shape), torch.empty_like(b)
        loops.centre(*s_y[2:], *_arrays(c, mean))
        gram = torch.bmm(c.transpose(1, 2), c)
        mixed = _empty_mixture(terms, gram, rows)
        arrays = _arrays(gram, mean, rows, *mixed)
        loops.mix(*fixed.counts, fixed.codes, fixed.at, *arrays)
        total = torch.bmm(c, mixed[-1])
        h, db = torch.empty_like(total), torch.empty_like(b)
        const = arrays[4][-1] if "1" in terms.rows else fixed.nothing
        loops.gate(fixed.slope_of, const, fixed.optional(of_s), *s_y, *_arrays(total, h, db))
        dw = products_forward(h, x, place)
        new = [torch.empty_like(t) for t in (w, b, b, b)]
        loops.step(fixed.optional(of_w), *_arrays(w, b, db, rate, eps, dw, *new))
        ctx.save_for_backward(
            weights, w, c, total, dw, db, eps, *new[2:], *mixed, *x, *y, *(s if terms.of_s else ())
        )
        ctx.terms, ctx.activation, ctx.place, ctx.fixed = terms, activation, place, fixed
        return new[0], new[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_w, grad_b):
        from kernels import unit_statistics_loops as loops

        terms, fixed, needed = ctx.terms, ctx.fixed, ctx.needs_input_grad
        weights, w, c, total, *saved = ctx.saved_tensors
        (dw, db, eps, root, factor), mixed, tensors = saved[:5], saved[5:11], saved[11:]
        views = len(c)
        x, y, s = tensors[:views], tensors[views : 2 * views], tensors[2 * views :]
        rows, of_s, of_w = terms.split(weights, views)
        s_y = _arrays(*((s[0], s[-1]) if s else (y[0], y[0])), y[0], y[-1])
        grad_dw, grad_db, grad_old = (torch.empty_like(t) for t in (w, db, w))
        numbers = w.new_empty(3)
        loops.through_step(fixed.optional(of_w), *_arrays(
            grad_w.contiguous(), grad_b.contiguous(), w, dw, db, eps, root, factor,
            grad_dw, grad_db, grad_old, numbers,
        ))  # fmt: skip
        grad_x = [None] * views
        if any(needed[9 : 9 + views]):
            h = gate_forward(total, y, ctx.activation)
            grad_x = inputs_backward(h, x, grad_dw, ctx.place, needed[9 : 9 + views])
        grad = products_backward(total, x, grad_dw, ctx.place)
        grad_weights, grad_y = torch.empty_like(weights), torch.empty_like(grad)
        grad_rows, grad_of_s, _ = terms.split(grad_weights, views)
        grad_s = torch.empty_like(grad) if s else w.new_empty(views, 0, 0)
        grad_const, grad_mean = torch.empty_like(db), torch.empty_like(db)
        loops.through_gate(fixed.slope_of, fixed.optional(of_s), *s_y, *_arrays(
            grad_db, total, grad, grad_y, grad_s, grad_of_s if s else db, grad_const
        ))  # fmt: skip
        grad_k, both = torch.bmm(c.transpose(1, 2), grad), torch.empty_like(mixed[-1])
        loops.through_mix(*fixed.counts[:1], fixed.codes, fixed.at, *_arrays(
            grad_const, rows, *mixed[:-1], grad_k, grad_rows, grad_mean, both
        ))  # fmt: skip
        grad_c = torch.baddbmm(torch.bmm(grad, mixed[-1].transpose(1, 2)), c, both)
        loops.through_centre(*_arrays(grad_c, grad_mean, grad_y))
        if of_w is not None:
            grad_weights[-1] = numbers[2]
        return (None,) * 4 + (
            grad_weights, grad_old, grad_b, numbers[0], numbers[1], *grad_x,
            *(grad_s if s else (None,) * views), *grad_y,
        )  # fmt: skip


@dataclass(frozen=True)
class _Constants:
    """What the loops are told besides tensors, in the types that keep them in single precision.

    Attributes:
        counts: 1 / (c^T c over moments), and what is added to variances.
        codes, at: see `GatedTerms`; slope_of: SLOPES; nothing: an array of length 0.
    """

    counts: tuple[np.floating, np.floating]
    codes: np.ndarray
    at: np.ndarray
    slope_of: tuple[np.floating, ...]
    nothing: np.ndarray

    def optional(self, tensor: Tensor | None) -> np.ndarray:
        """A vector, of length 0 for None."""
        return self.nothing if tensor is None else tensor.detach().numpy().reshape(-1)


@lru_cache
def _constants(
    terms: GatedTerms, base: str, views: int, samples: int, dtype: torch.dtype
) -> _Constants:
    number = NUMPY_TYPES[dtype]
    counts = number(1 / (samples * views**2)), number(FLOOR)
    slope_of = tuple(number(p) for p in SLOPES[base])
    return _Constants(counts, terms.codes, terms.places(views), slope_of, np.empty(0, dtype=number))


def _empty_mixture(terms: GatedTerms, gram: Tensor, rows: Tensor) -> list[Tensor]:
    """factors, a, d, cov, across, k of `_Mixing`, not yet filled."""
    units = gram.shape[1]
    across = (units, units) if "r_cross" in terms.rows else (0, 0)
    shapes = [(rows.shape[1], units), (len(rows), units), (units,), (units, units), across]
    return [*(gram.new_empty(shape) for shape in shapes), torch.empty_like(gram)]


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The same memory, for the loops."""
    return [t.detach().numpy() for t in tensors]


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
        factors = _factors(terms.factors, mean, d, cov)
        if "r_cross" in terms.rows:
            across = second[0] - second[1]
        mixing = cls(terms, rows, factors, rows @ factors, d, cov, across, d)
        by_kind = mixing.by_kind(mixing.a)
        if lateral:
            mixing.k = mixing.matrix(by_kind, views)
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

    def matrix(self, by_kind: dict[str, Tensor], views: int) -> Tensor:
        """K [views, units, units]."""
        k = self.d.new_zeros(views, *self.cov.shape)
        for kind in self.terms.lateral:
            moments, column = self.moments_of(kind), by_kind[kind]
            if kind != "r_cov":
                moments, column = moments * self.d.square().unsqueeze(1), column * self.d
            k.addcmul_(moments, column.unsqueeze(1))
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
            elif name == "rz":
                self._through_rz(row, grad_d, grad_cov)
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

    def _through_rz(self, grad: Tensor, grad_d: Tensor, grad_cov: Tensor) -> None:
        """Adds the gradients of d and covariance from that of the factor rz."""
        e, others = self.d.square(), _without_diagonal(self.cov)
        squares = others.square()
        grad_e = 2 * grad * e * (squares @ e) + squares.t() @ (grad * e * e)
        grad_d.addcmul_(grad_e, self.d, value=2)
        grad_cov.addcmul_(others * (grad * e * e).unsqueeze(1), e, value=2)

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


def _factors(names: Sequence[str], mean: Tensor, d: Tensor, cov: Tensor) -> Tensor:
    """[factors, units], of FACTORS."""
    factors = mean.new_empty(len(names), len(mean))
    for row, name in zip(factors.unbind(), names, strict=True):
        if name == "1":
            row.fill_(1)
        elif name == "d2":
            torch.square(d, out=row)
        elif name == "rz":
            e = d.square()
            row.copy_(e * e * (_without_diagonal(cov).square() @ e))
        else:
            row.copy_(mean if name == "mean" else d)
    return factors


def _without_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal())
