"""Solvers of (I - M) x = b that know M only by products matvec(x) = M x.

Vectors are lists of tensors of any shapes. In an implicit hypergradient M is J^T, where J is the
Jacobian of a map, so that matvec is its vjp and `adjoint` its jvp. A solver is a small dataclass;
`solve(matvec, b)` returns x and the residuals |b - (I - M) x_k| of its iterates x_0, x_1, ...
except the last, whose product with M has not been computed. Each iteration costs one product with
M, except the first of FixedPoint; in NormalEquations also one with its adjoint.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hypergradients.errors import DivergenceError, DivergenceWarning, HypergradientError

Vector = Sequence[Tensor]
Matvec = Callable[[Vector], Vector]
# A residual of more than this times that of x = 0 is no solution. CG's residual may rise by the
# square root of the condition number before it falls, that of a map with momentum by about
# 1 / (1 - momentum).
DIVERGED = 1e3
ON_DIVERGENCE = ("raise", "warn")


class Solver(Protocol):
    """A way to solve (I - M) x = b in at most `iterations` iterations.

    With an attribute on_divergence = "warn", the result of these iterations counts as a solution:
    the DivergenceErrors below become DivergenceWarnings, unless numbers are not finite.
    """

    iterations: int

    def solve(self, matvec: Matvec, b: Vector) -> tuple[Vector, list[float]]:
        """x and the residuals of all iterates before x.

        Raises DivergenceError if no solution can be found.

        matvec: x -> M x.
        b: the right side. A solver with the attribute needs_adjoint = True gets x -> M^T x as a
            third argument.
        """

    def diverges(self, residuals: Sequence[float], start: float) -> bool:
        """Whether the residuals of the iterates show divergence; that of x = 0 is `start`."""


@dataclass(frozen=True)
class FixedPoint:
    """x_{k+1} = M x_k + b from x_0 = 0: the Neumann series; the error falls as the powers of M.

    iterations: the largest number of iterations, or terms of the series. The first, x_1 = b, takes
        no product.
    tol: stop if |x_{k+1} - x_k|, which is the residual of x_k, is below this.
    """

    iterations: int
    tol: float = 1e-10
    on_divergence: str = "raise"

    def solve(self, matvec: Matvec, b: Vector) -> tuple[Vector, list[float]]:
        if not self.iterations:
            return [torch.zeros_like(t) for t in b], []
        x, residuals = b, [norm(b)]
        while len(residuals) < self.iterations and residuals[-1] >= self.tol:
            new = torch._foreach_add(matvec(x), b)
            residuals.append(norm(torch._foreach_sub(new, x)))
            x = new
        return x, residuals

    def diverges(self, residuals: Sequence[float], start: float) -> bool:
        """Whether x is worse than 0, and the largest residual so far grows without slowing down.

        The residuals of a normal M are log-convex in k: once they grow, they keep growing. If M is
            not
        normal they may grow for a while although its powers vanish, but ever more slowly.
        """
        n, largest = len(residuals), list(itertools.accumulate(residuals, max))
        middle = largest[(n - 1) // 2] * largest[n // 2]
        steady = n > 2 and largest[-1] * largest[0] >= 0.99 * middle
        return hopeless(residuals[-1], start) or (residuals[-1] > 1.01 * start and steady)


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients (Hestenes and Stiefel 1952), for symmetric positive definite I - M.

    The error falls as (1 - 2 / sqrt(cond))^k. Raises HypergradientError if I - M is seen not to be
    symmetric, by comparing <(I - M) p, x> with <p, (I - M) x> for each direction p and the iterate
    x before it, from the second iteration on, at the cost of a few inner products. Raises
    DivergenceError if I - M is seen not to be positive definite; with on_divergence="warn" it
    continues until a direction has no curvature at all.

    iterations: the largest number of iterations.
    tol: stop if the residual is below this, or at the rounding error of b.
    precondition: precondition(r) is about (I - M)^-1 r, also symmetric positive definite (default:
        r itself). Only <b, precondition(b)> > 0 is checked.
    assume_symmetric: True for matvecs that are drawn anew each time or have larger rounding errors
        than b, which no test can tell from those of a matrix that is not symmetric.
    """

    iterations: int
    tol: float = 1e-10
    precondition: Matvec | None = None
    assume_symmetric: bool = False
    on_divergence: str = "raise"

    def solve(self, matvec: Matvec, b: Vector) -> tuple[Vector, list[float]]:
        precondition = self.precondition or (lambda r: r)
        x, r = [torch.zeros_like(t) for t in b], b
        z = p = precondition(r)
        rz, residuals, largest, definite = dot(r, z), [norm(b)], 1.0, True
        if rz <= 0 < residuals[0]:
            raise HypergradientError(f"<b, precondition(b)> is {rz:.3g}: it must be above 0")
        enough = max(self.tol, rounding_error(b))
        while len(residuals) <= self.iterations and residuals[-1] > enough:
            q = torch._foreach_sub(p, matvec(p))
            if not self.assume_symmetric:
                largest = max(largest, norm(q) / norm(p))
                _check_symmetric((p, q), (x, torch._foreach_sub(b, r)), largest)
            curvature = dot(p, q)
            if definite and not curvature > 0:
                definite = False
                report_divergence(
                    f"conjugate gradients need I - M symmetric positive definite, but met the "
                    f"curvature {curvature:.3g} at iteration {len(residuals)}, residual "
                    f"{residuals[-1]:.3g}, {residuals[0]:.3g} at the start; "
                    f"take CG_normaleq or fixed_point",
                    self.on_divergence,
                )
            if curvature == 0:
                break
            x = axpy(rz / curvature, p, x)
            r = axpy(-rz / curvature, q, r)
            residuals.append(norm(r))
            z = precondition(r)
            rz, before = dot(r, z), rz
            p = axpy(rz / before, p, z)
        return x, residuals[:-1]

    def diverges(self, residuals: Sequence[float], start: float) -> bool:
        return hopeless(residuals[-1], start)


@dataclass(frozen=True)
class NystromConjugateGradient:
    """Conjugate gradients preconditioned by a randomized Nystrom approximation U L U^T of I - M.

        P^-1 = l_rank U L^-1 U^T + (I - U U^T)

    I - M must be symmetric positive definite. This helps if only a few of its eigenvalues are
    large: the condition number falls to about l_rank / l_min. It costs `rank` more matvecs and as
    many vectors of memory. (Frangella, Tropp, Udell 2021, arXiv 2110.02820, algorithms 2.1 and 5.1;
    as an approximate inverse for hypergradients: Hataya and Yamada 2023, arXiv 2302.09726.)
    Raises HypergradientError if I - M is seen not to be symmetric, DivergenceError if it is seen
    not to be positive definite.

    iterations, tol: as in ConjugateGradient.
    rank: of the approximation, limited to the number of parameters.
    generator: draws the random test matrix, on the device of b (default: a fixed seed).
    """

    iterations: int
    tol: float = 1e-10
    rank: int = 10
    generator: torch.Generator | None = None

    def solve(self, matvec: Matvec, b: Vector) -> tuple[Vector, list[float]]:
        basis, eigenvalues = self._approximate(matvec, b)
        gain = eigenvalues[-1] / eigenvalues - 1

        def precondition(r: Vector) -> Vector:
            flat = _flat(r)
            return _shaped(flat + basis @ (gain * (basis.T @ flat)), b)

        return ConjugateGradient(self.iterations, self.tol, precondition).solve(matvec, b)

    diverges = ConjugateGradient.diverges

    def _approximate(self, matvec: Matvec, b: Vector) -> tuple[Tensor, Tensor]:
        """U [parameters, rank] and the eigenvalues [rank], largest first."""
        flat = _flat(b)
        rank = min(self.rank, len(flat))
        generator = self.generator or torch.Generator(flat.device).manual_seed(0)
        options = {"dtype": flat.dtype, "device": flat.device, "generator": generator}
        test = torch.linalg.qr(torch.randn(len(flat), rank, **options))[0]
        columns = [c - _flat(matvec(_shaped(c, b))) for c in test.T]
        sketch = torch.stack(columns, dim=1)
        shift = torch.finfo(flat.dtype).eps * sketch.norm()
        sketch = sketch + shift * test
        core = test.T @ sketch
        asymmetry = float((core - core.T).norm())
        if asymmetry > _asymmetry_of_rounding(flat.dtype, float(core.norm()), float(sketch.norm())):
            raise HypergradientError(_ASYMMETRIC.format(asymmetry / float(core.norm())))
        factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if failed or not sketch.isfinite().all():
            raise DivergenceError(
                "the Nystrom approximation needs I - M symmetric positive definite; "
                "take CG_normaleq or fixed_point"
            )
        root = torch.linalg.solve_triangular(factor.T, sketch, upper=True, left=False)
        basis, values, _ = torch.linalg.svd(root, full_matrices=False)
        return basis, (values.square() - shift).clamp_min(shift)


@dataclass(frozen=True)
class NormalEquations:
    """Conjugate gradients on (I - M^T)(I - M) x = (I - M^T) b, for any regular I - M.

    The residual never grows; the error falls as (1 - 2 / cond)^k. (CGLS; Bjorck 1996, Numerical
    methods for least squares problems, 7.4.) In a hypergradient, matvecs with the adjoint come from
    differentiating those with M once more; raises HypergradientError if the map does not allow it.
    Raises DivergenceError if I - M is seen to be singular: a residual r remains, but (I - M^T) r
    vanishes.

    iterations: the largest number of iterations.
    tol: stop if the residual of the normal equations is below this, or at the rounding error of b.
    """

    iterations: int
    tol: float = 1e-10
    on_divergence: str = "raise"

    needs_adjoint = True

    def solve(self, matvec: Matvec, b: Vector, adjoint: Matvec) -> tuple[Vector, list[float]]:
        x, r = [torch.zeros_like(t) for t in b], b
        s = p = torch._foreach_sub(b, adjoint(b))
        ss, residuals = dot(s, s), [norm(b)]
        enough = max(self.tol, rounding_error(b))
        while len(residuals) <= self.iterations and math.sqrt(ss) > enough:
            product = matvec(p)
            if len(residuals) == 1:
                _check_adjoint(dot(product, b), dot(p, b) - dot(p, s), norm(p) * norm(b))
            q = torch._foreach_sub(p, product)
            qq = dot(q, q)
            if qq == 0:
                report_divergence(
                    f"I - M is singular; residual {residuals[-1]:.3g}", self.on_divergence
                )
                break
            step = ss / qq
            x, r = axpy(step, p, x), axpy(-step, q, r)
            residuals.append(norm(r))
            s = torch._foreach_sub(r, adjoint(r))
            ss, before = dot(s, s), ss
            p = axpy(ss / before, p, s)
        if self.iterations and _is_singular(math.sqrt(ss), residuals, b):
            report_divergence(
                f"I - M is singular, or too nearly so: the residual stays at {residuals[-1]:.3g}, "
                f"{residuals[0]:.3g} at the start",
                self.on_divergence,
            )
        return x, residuals[:-1]

    def diverges(self, residuals: Sequence[float], start: float) -> bool:
        return hopeless(residuals[-1], start)


@dataclass(frozen=True)
class Optimizer:
    """Steps of any torch optimiser along x - M x - b. (Grazzi et al. 2022, arXiv 2202.03397.)

    iterations: the number of steps.
    build: build(x, **options) -> (optimiser, scheduler or None) (default: SGD with rate 1).
    start: the initial x (default: b).
    progress: progress(k, residual) is called before each step.
    """

    iterations: int
    build: Callable[..., tuple[torch.optim.Optimizer, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: Vector | None = None
    progress: Callable[[int, float], None] | None = None
    on_divergence: str = "raise"

    def solve(self, matvec: Matvec, b: Vector) -> tuple[Vector, list[float]]:
        x = [t.detach().clone() for t in (b if self.start is None else self.start)]
        build = self.build or (lambda x: (torch.optim.SGD(x, lr=1.0), None))
        optimizer, scheduler = build(x, **self.options)
        residuals = []
        for k in range(self.iterations):
            product = matvec(x)
            for t, moved, target in zip(x, product, b, strict=True):
                t.grad = t - moved - target
            residuals.append(norm([t.grad for t in x]))
            if self.progress is not None:
                self.progress(k, residuals[-1])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        for t in x:
            t.grad = None
        return x, residuals

    diverges = FixedPoint.diverges


def report_divergence(message: str, on_divergence: str) -> None:
    """Raise DivergenceError, or for "warn" emit a DivergenceWarning."""
    if on_divergence != "warn":
        raise DivergenceError(message)
    warnings.warn(message, DivergenceWarning, stacklevel=4)


def hopeless(residual: float, start: float) -> bool:
    """Whether a residual is not finite or far above that of x = 0."""
    return not residual <= DIVERGED * start


def dot(a: Vector, b: Vector) -> float:
    """The inner product of two vectors."""
    products = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    return float(sum(products))


def norm(a: Vector) -> float:
    """The Euclidean norm of a vector."""
    return math.sqrt(dot(a, a))


def axpy(factor: float, x: Vector, y: Vector) -> Vector:
    """y + factor x."""
    return torch._foreach_add(y, x, alpha=factor)


def rounding_error(b: Vector) -> float:
    """The rounding error of a vector of this type and length."""
    return max(torch.finfo(t.dtype).eps for t in b) * norm(b)


_ASYMMETRIC = (
    "conjugate gradients need I - M symmetric, but <(I - M) p, x> and <p, (I - M) x> differ by "
    "{:.2g} of their size; take CG_normaleq, or fixed_point for a contraction"
)


def _check_symmetric(
    one: tuple[Vector, Vector], other: tuple[Vector, Vector], largest: float
) -> None:
    """Raises HypergradientError unless <A p, x> = <p, A x>, for pairs (p, A p) and (x, A x).

    largest: the largest known factor by which A changes the length of a vector.
    """
    (p, moved_p), (x, moved_x) = one, other
    difference = abs(dot(moved_p, x) - dot(p, moved_x))
    size = norm(moved_p) * norm(x) + norm(p) * norm(moved_x)
    dtype = max((t.dtype for t in p), key=lambda dtype: torch.finfo(dtype).eps)
    if difference > _asymmetry_of_rounding(dtype, size, largest * norm(p) * norm(x)):
        raise HypergradientError(_ASYMMETRIC.format(difference / size))


def _asymmetry_of_rounding(dtype: torch.dtype, size: float, largest: float) -> float:
    """By how much <A p, x> and <p, A x> may differ if A is symmetric.

    size: of the two numbers.
    largest: their bound, with which the rounding errors of A's matvecs grow.
    """
    eps = torch.finfo(dtype).eps
    return math.sqrt(eps) * size + 1e3 * eps * largest


def _check_adjoint(one: float, other: float, size: float) -> None:
    if abs(one - other) > 1e-2 * max(abs(one), abs(other)) and abs(one - other) > 1e-4 * size:
        raise HypergradientError(
            "matvecs with M and its adjoint contradict each other: a step of the map cannot be "
            "differentiated twice (once_differentiable?); take fixed_point"
        )


def _is_singular(gradient: float, residuals: Sequence[float], b: Vector) -> bool:
    """Whether only a residual r remains that I - M^T maps to almost nothing.

    gradient: the length of (I - M^T) r.
    residuals: from that of x = 0 to |r|.
    """
    precision = math.sqrt(max(torch.finfo(t.dtype).eps for t in b))
    residual = residuals[-1]
    return residual > precision * residuals[0] and gradient <= precision * residual


def _flat(v: Vector) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v])


def _shaped(flat: Tensor, like: Vector) -> Vector:
    pieces = flat.split([t.numel() for t in like])
    return [p.view(t.shape).to(t.dtype) for p, t in zip(pieces, like, strict=True)]
