"""Multinomial logistic regression on given features: the solver of the linear probe.

    minimise over W, b:   C sum_n CE(softmax(W f_n + b), label_n) + 1/2 |W|^2

which is scikit-learn's LogisticRegression(C=C) for three classes or more. (For two, scikit-learn
penalises the difference w_1 - w_0 instead: its C is then twice the C here for the same solution.)

The method is L-BFGS on all rows, a few milliseconds per iteration, preconditioned in two ways:
1. Features are centred and whitened. In these coordinates, Boehning's bound is Hessian <= I/2, and
   the quadratic penalty is diagonal. (Boehning 1992, Multinomial logistic regression algorithm.)
2. Every few iterations the Hessian of a strided subsample of rows replaces that bound: the whole
   Hessian if classes x features is small, else (up to 1,024 features) its block for each class.
   (Byrd, Chin, Neveitt, Nocedal 2011, On the use of stochastic Hessian information.)
Beyond 4,096 features, where a D x D matrix would cost more than the solve, columns are only scaled.
With fewer rows than features, W is in the span of the centred rows; other directions are left out.
If one column is so large that rounding hides the others in the covariance, axes are computed
separately for groups of columns of similar size, in float64. (Not beyond 4,096 features: there,
columns that are multiples of each other up to seven digits remain hard to distinguish.)
Products are in the features' dtype; everything small, and every sum over rows, is in float64.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.errors import WrongInputError
from hypergradients import ConjugateGradient
from hypergradients.linear_solvers import Matvec, Vector

NUMBERS_AT_ONCE = 2**19  # entries of a chunk of features; bounds the float64 copies
WHITEN_UP_TO = 4096  # features; above, each column is only scaled
WHITEN_IN_DOUBLE_UP_TO = 256  # features; above, N D^2 products in float64 would dominate the solve
LEAST_VARIANCE = 1e-10  # of an axis, relative to the largest, with fewer rows than features
LOST_SHARE = 1e-11  # of a column's length: more than this, outside the axes, is not just rounding
WORST_SCALE = 1e6  # a variance may be raised by at most this factor if it matters
LIKE_SIZE = 1e-4  # columns at least this size, relative to the largest, are rotated with it
JOINT_HESSIAN_UP_TO = 800  # classes * (features + 1); above, one block for each class
BLOCKS_UP_TO = 1024  # features; above, Boehning's bound stays: blocks cost more than they save
WIDE = 512  # features and the bias; above, blocks are so dear that they are made more rarely
JOINT_ROWS, BLOCK_ROWS = 4096, 16384  # rows in the subsample of the Hessian, of its blocks
# first iteration with a Hessian, and the period
JOINT_SCHEDULE, BLOCK_SCHEDULE, WIDE_SCHEDULE = (4, 8), (10, 30), (10, 100)
HESSIAN_SHIFT = 0.03  # added, times the mean diagonal, because a subsample misses some directions
HUGE_ROW, HUGE_ROW_TOLERANCE = 1e4, 1e-12  # relative to the median row's length; see fit_logistic
MEMORY = 30  # pairs kept by L-BFGS
ABSENT_BIAS = -40.0  # see fit_logistic
MOST_PRODUCTS = 500  # products with the Hessian in solve_hessian
HESSIAN_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative, for its residual
OBJECTIVE_NOISE = {torch.float32: 1e-8, torch.float64: 2e-15}  # relative error of one evaluation


class ProbeError(WrongInputError):
    """Wrong input to the probe; the message is one line."""


class NonFiniteFeatures(ProbeError, FloatingPointError):  # noqa: N818 - the name says what it is
    """Features that are nan, infinite, or so large that sums overflow."""


@dataclass(frozen=True)
class LogisticFit:
    """A fitted classifier, logits = features @ weight.T + bias; tensors are float64.

    weight, bias: [classes, D] and [classes].
    objective: C * summed cross-entropy + 1/2 |weight|^2, evaluated in float64 on all rows.
    gradient_norm: the Euclidean norm of the objective's gradient with respect to (weight, bias).
    iterations: the number of steps of L-BFGS.
    converged: whether the predicted decrease fell below tolerance * objective.
    """

    weight: Tensor
    bias: Tensor
    objective: float
    gradient_norm: float
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """The logits [B, classes], float64, of features [B, D]; ProbeError for other shapes."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ProbeError(
                f"features have shape {list(features.shape)}; "
                f"expected [B, {self.weight.shape[1]}] for this classifier"
            )
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


@torch.no_grad()
def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    C: float = 1000.0,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
    start: LogisticFit | None = None,
) -> LogisticFit:
    """Multinomial logistic regression of labels [N] on features [N, D]; see the module's formula.

    The solver stops when the predicted decrease of the objective is less than `tolerance` times the
    objective (in float32, rounding leaves about 1e-8). The result is never worse than `start` or,
    without it, than the best constant classifier. The prediction is that of a quadratic model. If a
    row is far larger than the others, the loss curves so sharply that this model holds only in a
    small neighbourhood; the tolerance is then at most 1e-12.

    For a class without labels the optimum is bias -> -inf, weight 0. Its bias is set to -40: since
    the logits of the others sum to zero, their largest is >= 0, and its probability <= exp(-40).

    Raises ProbeError for wrong input and NonFiniteFeatures, one of its subclasses, for features
    that are not finite or too large.

    start: a classifier to start from; by default the best constant one.
    """
    labels = _check(features, labels, classes, C, start)
    counts = torch.bincount(labels, minlength=classes)
    present, labels = _present(counts, labels)
    problem = LogisticProblem(features, labels, len(present), C)
    if _has_a_huge_row(features):
        tolerance = min(tolerance, HUGE_ROW_TOLERANCE)

    if start is None:
        bias = counts[present].double().log()
        weight = bias.new_zeros(len(present), features.shape[1])
    else:
        weight = start.weight.to(features.device, torch.float64)[present]
        bias = start.bias.to(features.device, torch.float64)[present]
    first = weight - weight.mean(0), bias - bias.mean()
    V, iterations, converged = _lbfgs(problem, problem.whiten(*first), tolerance, max_iterations)
    best = problem.unwhiten(V)
    objective, slope = _objective_and_slope(features, labels, *best, C)
    if not objective <= (before := _objective_and_slope(features, labels, *first, C))[0]:
        best, (objective, slope) = first, before

    weight = best[0].new_zeros(classes, features.shape[1]).index_copy(0, present, best[0])
    bias = best[1].new_full((classes,), ABSENT_BIAS).index_copy(0, present, best[1])
    return LogisticFit(weight, bias, objective, slope, iterations, converged)


@torch.no_grad()
def solve_hessian(
    features: Tensor,
    labels: Tensor,
    C: float,
    fit: LogisticFit,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """H^-1 (weight, bias), float64, with H the Hessian of the objective / (C N) at `fit`.

    The method is conjugate gradients in the whitened coordinates, preconditioned like the fit. The
    result is 0 for classes without labels.

    features, labels, C: [N, D], [N] and a number, as given to fit_logistic.
    weight, bias: [classes, D] and [classes]; their sums over classes must be 0, as those of the
        result are, because H is singular for a common shift of all biases.
    """
    present, labels = _present(torch.bincount(labels, minlength=len(bias)), labels)
    problem = LogisticProblem(features, labels, len(present), C)
    V = problem.whiten(fit.weight[present], fit.bias[present])
    joint = V.numel() <= JOINT_HESSIAN_UP_TO
    factors = problem.curvature(V) if joint or V.shape[1] <= BLOCKS_UP_TO else None

    def precondition(r: Vector) -> Vector:
        direction = _inverse_hessian_product(r[0], (), factors)
        return [direction - direction.mean(0)]

    g = problem.pull_back(weight[present], bias[present])
    tolerance = HESSIAN_TOLERANCE[features.dtype] * float(g.norm())
    solver = ConjugateGradient(MOST_PRODUCTS, tolerance, precondition, assume_symmetric=True)
    (v,), _ = solver.solve(_hessian_complement(problem, V), [g - g.mean(0)])
    solved = problem.unwhiten(v)
    centred = weight[present] - bias[present][:, None] * problem.mean
    rest = problem.outside(centred) / problem.ridge  # outside, H is that of the penalty alone
    solved = solved[0] + rest, solved[1] - rest @ problem.mean
    return (
        torch.zeros_like(fit.weight).index_copy(0, present, solved[0]),
        torch.zeros_like(fit.bias).index_copy(0, present, solved[1]),
    )


def _has_a_huge_row(features: Tensor) -> bool:
    sizes = torch.linalg.vector_norm(features, dim=1)
    return 0 < HUGE_ROW * float(sizes.median()) < float(sizes.max())


def _of_like_size(lengths: Tensor) -> list[Tensor]:
    """The indices of columns in groups of similar lengths, from the largest to the smallest."""
    order = lengths.argsort(descending=True)
    groups: list[list[int]] = []
    largest = 0.0
    for place, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if not groups or length < LIKE_SIZE * largest:
            groups.append([])
            largest = length
        groups[-1].append(place)
    return [torch.tensor(group, device=lengths.device) for group in groups]


def _present(counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes that have labels, and the labels as indices into that list."""
    return counts.nonzero()[:, 0], (torch.cumsum(counts > 0, 0) - 1)[labels]


class LogisticProblem:
    """The objective / (C N) as a function of V [classes, D + 1], in whitened coordinates.

    The coordinates of a row f are z = (f - mean) U * scale and a one; they are the rows of
    Z [N, D + 1]. U [D, D] is orthogonal, so that the penalty is 1/2 sum V^2 penalty; None means no
    rotation. With fewer rows than features, U [D, R] has a column for each direction in which the
    rows differ, and R takes the place of D in V and Z.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, C: float):
        N = len(features)
        self.classes, self.ridge = classes, 1 / (C * N)
        # flat indices of the labels' entries in [classes, N]
        self.of_label = labels * N + torch.arange(N, device=labels.device)
        self.mean = sum(rows.sum(0, dtype=torch.float64) for (rows,) in in_chunks(features)) / N
        if not bool(torch.isfinite(self.mean).all()):
            raise NonFiniteFeatures(_what_is_not_finite(features))
        self.uneven = False  # whether columns have very different sizes; U is then [D, D]
        if not (self._whitened_few_rows(features) or self._whitened(features)):
            self._whitened_by_size(features)

    def _fill(self, features: Tensor, variance: Tensor, product: torch.dtype) -> None:
        """Set scale, penalty and Z for the axes U, from the variances along them.

        product: the dtype of matrix products.
        """
        self._set_scale(variance)
        self.Z = features.new_ones(len(features), len(variance) + 1)
        T = None if self.U is None else (self.U * self.scale).to(product)
        for rows, z in in_chunks(features, self.Z):
            centred = rows - self.mean
            z[:, :-1] = centred * self.scale if T is None else centred.to(product) @ T

    def _set_scale(self, variance: Tensor) -> None:
        self.scale = (variance + 2 * self.ridge).rsqrt()
        self.penalty = self.ridge * torch.cat([self.scale**2, self.scale.new_zeros(1)])

    def _whitened_few_rows(self, features: Tensor) -> bool:
        """Set U, scale, penalty and Z from the Gram matrix of the rows; False if not possible.

        Applies if N < D; R < N axes suffice unless a column has a share in the axes left out.
        """
        N, D = features.shape
        if not (N < D and N <= WHITEN_UP_TO):
            return False
        centred = features.double() - self.mean
        variance, vectors = torch.linalg.eigh(centred @ centred.T / N)
        if not bool(torch.isfinite(variance).all()):
            return False
        kept = variance > LEAST_VARIANCE * variance[-1]
        variance, vectors = variance[kept], vectors[:, kept]
        lengths = (N * variance).sqrt()
        self.U, coordinates = centred.T @ (vectors / lengths), vectors * lengths
        if len(variance) < N - 1:
            lost = torch.linalg.vector_norm(centred - coordinates @ self.U.T, dim=0)
            if bool((lost > LOST_SHARE * torch.linalg.vector_norm(centred, dim=0)).any()):
                return False
        self._set_scale(variance)
        self.Z = features.new_ones(N, len(variance) + 1)
        self.Z[:, :-1] = coordinates * self.scale
        return True

    def _whitened(self, features: Tensor) -> bool:
        """Set U, scale, penalty and Z from the covariance of the columns; False if too inaccurate.

        That is the case if a variance that matters beside the penalty is far below the rounding
        error of the largest one, to which all variances are raised.
        """
        D = features.shape[1]
        product = torch.float64 if D <= WHITEN_IN_DOUBLE_UP_TO else features.dtype
        covariance = self._covariance(features, product, wide=D > WHITEN_UP_TO)
        if not bool(torch.isfinite(covariance).all()):
            return False
        if D > WHITEN_UP_TO:
            self.U = None
            self._fill(features, covariance, product)
            return True
        sizes = covariance.diagonal().sqrt()
        self.uneven = bool(LIKE_SIZE * sizes.max() > sizes.median())
        variance, self.U = torch.linalg.eigh(covariance)
        bound = 100 * torch.finfo(product).eps * float(variance[-1])
        raised = variance < bound
        self._fill(features, variance.clamp_min(bound), product)
        return not (bool(raised.any()) and self._some_matter(raised, bound))

    def _some_matter(self, raised: Tensor, bound: float) -> bool:
        """Whether one of the variances that were raised to a bound matters and is far below it."""
        squares = sum(z[:, :-1].square().sum(0, dtype=torch.float64) for (z,) in in_chunks(self.Z))
        variance = squares / len(self.Z) / self.scale**2
        far = bound + 2 * self.ridge > WORST_SCALE * (variance + 2 * self.ridge)
        return bool((raised & far & (variance > self.ridge)).any())

    def _covariance(self, features: Tensor, product: torch.dtype, wide: bool) -> Tensor:
        """The covariance of the columns [D, D] or, if wide, their variances [D]."""
        N, D = features.shape
        covariance = self.mean.new_zeros(D) if wide else self.mean.new_zeros(D, D)
        for (rows,) in in_chunks(features):
            centred = (rows - self.mean).to(torch.float64 if wide else product)
            covariance += centred.square_().sum(0) if wide else centred.T @ centred
        return covariance / N

    def _whitened_by_size(self, features: Tensor) -> None:
        """Set U, scale, penalty and Z with axes that combine only columns of similar size.

        Otherwise, by rounding, an axis of small columns would contain a share of the large ones,
        beside which its own variance would vanish.
        """
        N, D = features.shape
        covariance = self._covariance(features, torch.float64, wide=True)
        if not bool(torch.isfinite(covariance).all()):
            raise NonFiniteFeatures("features are too large: variance overflows; scale them")
        if D > WHITEN_UP_TO:
            self.U = None
            self._fill(features, covariance, torch.float64)
            return
        self.U, self.uneven = self.mean.new_zeros(D, D), True
        for columns in _of_like_size(covariance.sqrt()):
            some = features[:, columns].double() - self.mean[columns]
            self.U[columns[:, None], columns] = torch.linalg.eigh(some.T @ some)[1]
        squares = self.mean.new_zeros(D)
        for (rows,) in in_chunks(features):
            squares += ((rows - self.mean) @ self.U).square_().sum(0)
        self._fill(features, squares / N, torch.float64)

    def whiten(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The coordinates V of the classifier (weight, bias)."""
        rotated = weight if self.U is None else weight @ self.U
        return torch.cat([rotated / self.scale, (bias + weight @ self.mean)[:, None]], 1)

    def unwhiten(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier (weight, bias) at coordinates V."""
        rotated = V[:, :-1] * self.scale
        weight = rotated if self.U is None else rotated @ self.U.T
        return weight, V[:, -1] - weight @ self.mean

    def pull_back(self, weight: Tensor, bias: Tensor) -> Tensor:
        """A gradient by (weight, bias) as one by V; the transpose of `unwhiten`."""
        centred = weight - bias[:, None] * self.mean
        rotated = centred if self.U is None else centred @ self.U
        return torch.cat([rotated * self.scale, bias[:, None]], 1)

    def outside(self, weight: Tensor) -> Tensor:
        """The part of weights [classes, D] that is orthogonal to all columns of U."""
        if self.U is None or self.uneven:
            return torch.zeros_like(weight)
        return weight - (weight @ self.U) @ self.U.T

    def value_and_gradient(self, V: Tensor) -> tuple[float, Tensor]:
        """The objective / (C N) at V, and its gradient [classes, D + 1]."""
        logits = V.to(self.Z.dtype) @ self.Z.T
        losses, residual = _losses_and_residual(logits, self.of_label)
        N = len(self.Z)
        value = losses.sum(dtype=torch.float64) / N + 0.5 * (V.square() * self.penalty).sum()
        return float(value), (residual @ self.Z).double() / N + V * self.penalty

    def curvature(self, V: Tensor) -> Tensor | None:
        """Cholesky factors of the Hessian at V on evenly spaced rows; None if one fails.

        With d = D + 1, it is one factor [1, classes * d, classes * d] or, if that is too large, one
        for each class, [classes, d, d], without the coupling of classes.
        """
        N, d = self.Z.shape
        joint = self.classes * d <= JOINT_HESSIAN_UP_TO
        wanted = JOINT_ROWS if joint else BLOCK_ROWS
        rows = torch.arange(min(N, wanted), device=V.device) * N // min(N, wanted)
        Z = self.Z[rows]
        P = torch.softmax(V.to(Z.dtype) @ Z.T, 0)
        H = torch.stack([Z.T @ (Z * w[:, None]) for w in (P if joint else P * (1 - P))]).double()
        if joint:
            outer = (P.T[:, :, None] * Z[:, None, :]).flatten(1)
            H = (torch.block_diag(*H) - outer.T @ outer)[None]
        H /= len(rows)
        diagonal = H.diagonal(dim1=1, dim2=2)
        diagonal += self.penalty.repeat(H.shape[1] // d) + HESSIAN_SHIFT * diagonal.mean()
        factors, failed = torch.linalg.cholesky_ex(H)
        return None if bool(failed.any()) else factors


def _hessian_complement(problem: LogisticProblem, V: Tensor) -> Matvec:
    """The map v -> v - H v, with H the Hessian at V: the M for a solver of (I - M) v = b."""
    P = torch.softmax(V.to(problem.Z.dtype) @ problem.Z.T, 0)

    def matvec(v: Vector) -> Vector:
        (direction,) = v
        A = P * (direction.to(problem.Z.dtype) @ problem.Z.T)
        A -= P * A.sum(0)
        product = (A @ problem.Z).double() / len(problem.Z) + direction * problem.penalty
        return [direction - product]

    return matvec


def _lbfgs(
    problem: LogisticProblem, V: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, bool]:
    """L-BFGS (Nocedal & Wright, algorithm 7.4) with the inverse curvature as initial matrix.

    Directions sum to zero over the classes, as the optimum does; the loss does not depend on that
    sum. Returns the last V, the number of steps, and whether it converged.
    """
    noise = OBJECTIVE_NOISE[problem.Z.dtype]
    value, gradient = problem.value_and_gradient(V)
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    factors = None
    joint = V.numel() <= JOINT_HESSIAN_UP_TO
    by_width = WIDE_SCHEDULE if V.shape[1] > WIDE else BLOCK_SCHEDULE
    first, every = JOINT_SCHEDULE if joint else by_width
    narrow = joint or V.shape[1] <= BLOCKS_UP_TO
    for iteration in range(max_iterations):
        if narrow and iteration % every == first:
            factors = problem.curvature(V)
        direction = -_inverse_hessian_product(gradient, pairs, factors)
        direction -= direction.mean(0)
        slope = float((gradient * direction).sum())
        if not math.isfinite(value + slope) or slope > 0:
            return V, iteration, False
        if -slope / 2 <= tolerance * value:
            return V, iteration, True
        step = 1.0
        while True:
            new = V + step * direction
            new_value, new_gradient = problem.value_and_gradient(new)
            if new_value <= value + 1e-4 * step * slope + noise * value:
                break
            step *= _interpolate(new_value - value, step * slope)
            if -step * slope <= noise * value:
                return V, iteration, -slope / 2 <= 100 * noise * value
        s, y = new - V, new_gradient - gradient
        if (curvature := (s * y).sum()) > 0:
            pairs.append((s, y, 1 / curvature))
        V, value, gradient = new, new_value, new_gradient
    return V, max_iterations, False


def _inverse_hessian_product(gradient: Tensor, pairs, factors: Tensor | None) -> Tensor:
    """The two-loop recursion of L-BFGS.

    Its initial matrix is given by Cholesky factors of H or, without these, is a multiple of the
    identity: from the last pair, or from Boehning's bound (H^-1 >= 2 I) if there is none.
    """
    q, alphas = gradient.clone(), []
    for s, y, rho in reversed(pairs):
        alphas.append(rho * (s * q).sum())
        q -= alphas[-1] * y
    if factors is not None:
        q = torch.cholesky_solve(q.reshape(len(factors), -1, 1), factors).view_as(gradient)
    elif pairs:
        s, y, _ = pairs[-1]
        q *= (s * y).sum() / y.square().sum()
    else:
        q *= 2
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - rho * (y * q).sum())
    return q


def _interpolate(rise: float, slope: float) -> float:
    """The factor for a rejected step: the minimum of the parabola through it, in [0.1, 0.5]."""
    if not math.isfinite(rise):
        return 0.1
    return min(0.5, max(0.1, -slope / (2 * (rise - slope))))


def _losses_and_residual(logits: Tensor, of_label: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy [N] and its gradient by logits [classes, N], which are overwritten.

    There is no cancellation: a loss of 1e-12 keeps all its digits, as separable data require.

    of_label: [N], the flat indices of the labels' entries in the logits.
    """
    flat = logits.view(-1)
    top = logits.amax(0)
    margin = flat[of_label].sub_(top)  # <= 0
    residual = logits.sub_(top).exp_()
    flat[of_label] = 0
    others = residual.sum(0)
    total = others + margin.exp()
    residual /= total
    losses = torch.log1p(others + margin.expm1()).sub_(margin)
    flat[of_label] = -others / total
    return losses, residual


def _objective_and_slope(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, C: float
) -> tuple[float, float]:
    """The objective of the module's formula and the norm of its gradient, in float64."""
    value, by_weight, by_bias = 0.5 * weight.square().sum(), weight.clone(), torch.zeros_like(bias)
    for rows, targets in in_chunks(features, labels):
        rows = rows.double()
        logits = torch.addmm(bias[:, None], weight, rows.T)
        of_label = targets * len(rows) + torch.arange(len(rows), device=rows.device)
        losses, residual = _losses_and_residual(logits, of_label)
        value += C * losses.sum()
        by_weight += C * (residual @ rows)
        by_bias += C * residual.sum(1)
    return float(value), math.sqrt(float(by_weight.square().sum() + by_bias.square().sum()))


def in_chunks(features: Tensor, *others: Tensor) -> zip:
    """Chunks of corresponding rows of features [N, D] and other tensors."""
    rows = max(256, NUMBERS_AT_ONCE // features.shape[1])
    return zip(features.split(rows), *(other.split(rows) for other in others), strict=True)


def _what_is_not_finite(features: Tensor) -> str:
    rows = (~torch.isfinite(features)).any(1)
    if not bool(rows.any()):
        return "features are too large: their sum overflows; scale them"
    return (
        f"features of {int(rows.sum())} of {len(rows)} rows are NaN or infinite, "
        f"first in row {int(rows.nonzero()[0])}; expected finite features"
    )


def _check(features: Tensor, labels: Tensor, classes: int, C: float, start) -> Tensor:
    """The labels as int64 on the features' device; raises ProbeError for any wrong argument."""
    if features.ndim != 2 or 0 in features.shape:
        raise ProbeError(f"features have shape {list(features.shape)}; expected [N, D], N, D >= 1")
    if features.dtype not in OBJECTIVE_NOISE:
        raise ProbeError(f"features are {features.dtype}; expected float32 or float64")
    if labels.shape != features.shape[:1]:
        raise ProbeError(f"labels have shape {list(labels.shape)}; expected [{len(features)}]")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ProbeError(f"labels are {labels.dtype}; expected integers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ProbeError(f"labels run from {low} to {high}; expected 0 to {classes - 1}")
    if not (math.isfinite(C) and C > 0):
        raise ProbeError(f"C is {C}; expected a positive finite number")
    shape = (classes, features.shape[1])
    if start is not None and tuple(start.weight.shape) != shape:
        raise ProbeError(f"start has weight {list(start.weight.shape)}; expected {list(shape)}")
    return labels.to(features.device, torch.int64)
