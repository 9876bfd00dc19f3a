"""The fits of kernels/logistic_regression.py for several tasks at once, by Newton's method.

    V <- V - step H(V)^-1 g(V)     for each task

V are classifiers in the whitened coordinates z of the features, as there; g and H are gradient and
Hessian of the objective / (C N), which is quadratic but for the mean cross-entropy:

    H_kl = mean_n( p_nk ([k = l] - p_nl) z_n z_n^T ) + [k = l] penalty + 1/K 1 1^T

The last term, on the shift common to all classes, changes nothing else: g has no such component.
A Hessian costs many gradients. So the first steps are on every eighth row, and a Hessian is used
again as long as each step divides the predicted decrease by RENEW_UNLESS_DIVIDED_BY. (Kelley 1995,
Iterative Methods for Linear and Nonlinear Equations, 5.4: the Shamanskii method.)

Everything is in float64, and the host is asked twice per iteration whether all tasks are done. What
has too large a Hessian, or does not converge, is fitted one by one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.logistic_regression import (
    JOINT_HESSIAN_UP_TO,
    LogisticFit,
    NonFiniteFeatures,
    ProbeError,
    fit_logistic,
)
from kernels.task_products import contracted

TOLERANCE = 1e-14  # of the predicted decrease, relative to the objective
TOLERANCE_OF_FEW_ROWS = 1e-4  # the optimum of all rows is further away than that
EVERY = 8  # of the few rows
LEAST_ROWS = 8  # few rows are that many times as many as the numbers of a classifier
RENEW_UNLESS_DIVIDED_BY = 16.0
NOISE = 1e-14  # of the objective / (C N), absolute, by rounding
MOST_STEPS, MOST_HALVINGS = 60, 30
HESSIAN_ROWS = 4096  # rows of a task in a chunk of the sum of the Hessian
LEAST_VARIANCE = 1e-13  # of an axis, relative to the largest


@dataclass(frozen=True)
class LogisticFits:
    """Classifiers of several tasks, logits = features @ weight.mT + bias; float64.

    weight, bias: [tasks, classes, D] and [tasks, classes].
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """The logits [tasks, B, classes] of features [tasks, B, D]."""
        return torch.baddbmm(self.bias.unsqueeze(1), features.double(), self.weight.mT)


@torch.no_grad()
def fit_logistic_tasks(
    features: Tensor, labels: Tensor, classes: int, C: float = 1000.0
) -> LogisticFits:
    """`fit_logistic` for each task, of labels [tasks, N] on features [tasks, N, D].

    Raises ProbeError for wrong input and NonFiniteFeatures for features that are not finite.
    """
    if features.ndim != 3 or labels.shape != features.shape[:2]:
        shapes = f"{list(features.shape)} and {list(labels.shape)}"
        raise ProbeError(f"features and labels are {shapes}; expected [tasks, N, D], [tasks, N]")
    if not bool(torch.isfinite(features).all()):
        raise NonFiniteFeatures("features are NaN or infinite; expected finite features")
    one_hot = torch.nn.functional.one_hot(labels, classes)
    small = classes * (features.shape[2] + 1) <= JOINT_HESSIAN_UP_TO
    if not small or not bool((one_hot.sum(1) > 0).all()):
        return _one_by_one(features, labels, classes, C, range(len(features)), None)
    problem = _Problem.of(features.double(), one_hot.double(), C)
    V, converged = _newton(problem, _start(problem), TOLERANCE)
    fits = problem.unwhitened(V)
    left = (~converged).nonzero()[:, 0].tolist()
    return _one_by_one(features, labels, classes, C, left, fits) if left else fits


def _one_by_one(features, labels, classes: int, C: float, tasks, fits: LogisticFits | None):
    """`fits` with those of these tasks replaced by single fits."""
    single: dict[int, LogisticFit] = {
        k: fit_logistic(features[k], labels[k], classes, C) for k in tasks
    }
    each = [
        (single[k].weight, single[k].bias) if k in single else (fits.weight[k], fits.bias[k])
        for k in range(len(features))
    ]
    return LogisticFits(*(torch.stack(tensors) for tensors in zip(*each, strict=True)))


@dataclass(frozen=True)
class _Problem:
    """The objectives / (C N) of several tasks as functions of V [tasks, classes, D + 1].

    Z: the whitened features (f - mean) map and a 1, [tasks, N, D + 1].
    one_hot: the labels, [tasks, N, classes].
    penalty: [tasks, 1, D + 1].
    """

    Z: Tensor
    one_hot: Tensor
    penalty: Tensor
    mean: Tensor
    map: Tensor

    @classmethod
    def of(cls, features: Tensor, one_hot: Tensor, C: float) -> "_Problem":
        """The problem of features [tasks, N, D]."""
        N = features.shape[1]
        ridge, mean = 1 / (C * N), features.mean(1, keepdim=True)
        centred = features - mean
        variance, axes = torch.linalg.eigh(contracted(centred, centred) / N)
        variance = torch.maximum(variance, LEAST_VARIANCE * variance[:, -1:])
        scale = (variance + 2 * ridge).rsqrt()
        map_ = axes * scale.unsqueeze(1)
        Z = torch.cat([centred @ map_, torch.ones_like(features[..., :1])], 2)
        of_bias = torch.zeros_like(scale[:, :1])
        penalty = torch.cat([ridge * scale.square(), of_bias], 1).unsqueeze(1)
        return cls(Z, one_hot, penalty, mean, map_)

    def of_few_rows(self) -> "_Problem | None":
        """The problem of every eighth row; None if that says too little."""
        Z, one_hot = (t[:, ::EVERY].contiguous() for t in (self.Z, self.one_hot))
        numbers = one_hot.shape[2] * Z.shape[2]
        if Z.shape[1] < LEAST_ROWS * numbers or not bool((one_hot.sum(1) > 0).all()):
            return None
        return replace(self, Z=Z, one_hot=one_hot)

    def constant(self) -> Tensor:
        """The best classifiers that do not look at the features."""
        bias = self.one_hot.sum(1).log()
        V = bias.new_zeros(*bias.shape, self.Z.shape[2])
        V[..., -1] = bias - bias.mean(1, keepdim=True)
        return V

    def unwhitened(self, V: Tensor) -> LogisticFits:
        """The classifiers of the features themselves."""
        weight = V[..., :-1] @ self.map.mT
        return LogisticFits(weight, V[..., -1] - (weight @ self.mean.mT).squeeze(2))

    def at(self, V: Tensor) -> "_Point":
        """Everything about V [tasks, classes, D + 1] but the Hessian."""
        logits = self.Z @ V.mT
        losses = logits.logsumexp(2) - (logits * self.one_hot).sum(2)
        value = losses.mean(1) + 0.5 * (V.square() * self.penalty).sum((1, 2))
        P = torch.softmax(logits, 2)
        gradient = contracted(P - self.one_hot, self.Z) / self.Z.shape[1] + V * self.penalty
        return _Point(V, value, gradient, P)

    def hessian(self, P: Tensor) -> Tensor:
        """[tasks, classes (D + 1), classes (D + 1)]."""
        (tasks, N, d), classes = self.Z.shape, P.shape[2]
        H = self.Z.new_zeros(tasks, classes * d, classes * d)
        blocks = self.Z.new_zeros(tasks, classes * d, d)
        for z, p in zip(self.Z.split(HESSIAN_ROWS, 1), P.split(HESSIAN_ROWS, 1), strict=True):
            weighted = (p.unsqueeze(3) * z.unsqueeze(2)).flatten(2)
            H.baddbmm_(weighted.mT, weighted, alpha=-1 / N)
            blocks.baddbmm_(weighted.mT, z, alpha=1 / N)
        by_class = H.view(tasks, classes, d, classes, d)
        by_class.diagonal(dim1=1, dim2=3).add_(blocks.view(tasks, classes, d, d).movedim(1, 3))
        by_class.diagonal(dim1=2, dim2=4).add_(1 / classes)
        H.diagonal(dim1=1, dim2=2).add_(self.penalty.squeeze(1).repeat(1, classes))
        return H


@dataclass(frozen=True)
class _Point:
    """Classifiers V, their objective [tasks], gradient [like V] and P [tasks, N, classes]."""

    V: Tensor
    value: Tensor
    gradient: Tensor
    P: Tensor


def _start(problem: _Problem) -> Tensor:
    """The optimum for few rows, where it is better for all rows than to ignore the features."""
    constant, few = problem.constant(), problem.of_few_rows()
    if few is None:
        return constant
    found, _ = _newton(few, constant, TOLERANCE_OF_FEW_ROWS)
    better = problem.at(found).value < problem.at(constant).value
    return torch.where(better.view(-1, 1, 1), found, constant)


def _newton(problem: _Problem, V: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The optimum from V on, and whether each task has converged, [tasks]."""
    point, renew = problem.at(V), True
    done = torch.zeros(len(V), dtype=torch.bool, device=V.device)
    for _ in range(MOST_STEPS):
        if renew:
            inverse, positive = _inverse_factors(problem.hessian(point.P))
            expected = torch.full_like(point.value, torch.inf)
        direction, slope = _direction(inverse, point.gradient)
        done = done | (-slope / 2 <= tolerance * point.value)
        going = ~done & positive & torch.isfinite(slope)
        slow = going & ~(-slope <= expected)
        some, renew = torch.stack([going.any(), slow.any()]).tolist()
        if not some:
            break
        if renew:  # this Hessian's steps have become too small: go on with that of this point
            continue
        direction = direction.where(going.view(-1, 1, 1), 0)
        point = _lower(problem, point, direction, slope)
        expected = -slope / RENEW_UNLESS_DIVIDED_BY
    return point.V, done


def _inverse_factors(H: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 of H = L L^T, and whether there is such an L, [tasks]."""
    factors, failed = torch.linalg.cholesky_ex(H)
    # not cholesky_solve, which takes 11 ms for 16 systems of 330 equations on an H200
    identity = torch.eye(H.shape[1], dtype=H.dtype, device=H.device).expand_as(H)
    return torch.linalg.solve_triangular(factors, identity, upper=False), failed == 0


def _direction(inverse: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """-H^-1 g, like g, and its product with g, [tasks]."""
    half = inverse @ gradient.flatten(1).unsqueeze(2)
    direction = -(inverse.mT @ half).view_as(gradient)
    return direction, -half.square().sum((1, 2))


def _lower(problem: _Problem, point: _Point, direction: Tensor, slope: Tensor) -> _Point:
    """The point after the largest of 1, 1/2, 1/4, ... of the direction that is low enough."""
    step = torch.ones_like(slope)
    for _ in range(MOST_HALVINGS):
        new = problem.at(point.V + direction * step.view(-1, 1, 1))
        enough = new.value <= point.value + 1e-4 * step * slope + NOISE
        if bool((enough | ~torch.isfinite(slope)).all()):
            break
        step = torch.where(enough, step, step / 2)
    return new
