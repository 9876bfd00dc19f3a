"""The fits of kernels/logistic_regression.py for several tasks at once, by Newton's method.

    V <- V - step H(V)^-1 g(V)     for each task

V are classifiers in the whitened coordinates z of the features, as there; g and H are gradient and
Hessian of the objective / (C N), which is quadratic but for the mean cross-entropy:

    H_kl = mean_n( p_nk ([k = l] - p_nl) z_n z_n^T ) + [k = l] penalty + 1/K 1 1^T

The last term, on the shift common to all classes, changes nothing else: g has no such component.
Everything is in float64, and the host is asked once per iteration whether all tasks are done. What
has too large a Hessian, or does not converge, is fitted one by one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.logistic_regression import (
    JOINT_HESSIAN_UP_TO,
    LogisticFit,
    NonFiniteFeatures,
    ProbeError,
    fit_logistic,
)

TOLERANCE = 1e-14  # of the predicted decrease, relative to the objective
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
    problem = _Problem(features.double(), one_hot.double(), C)
    V, converged = _newton(problem, problem.constant())
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


class _Problem:
    """The objectives / (C N) of several tasks as functions of V [tasks, classes, D + 1]."""

    def __init__(self, features: Tensor, one_hot: Tensor, C: float) -> None:
        N = features.shape[1]
        self.one_hot, ridge = one_hot, 1 / (C * N)
        self.mean = features.mean(1, keepdim=True)
        centred = features - self.mean
        variance, axes = torch.linalg.eigh(centred.mT @ centred / N)
        variance = torch.maximum(variance, LEAST_VARIANCE * variance[:, -1:])
        scale = (variance + 2 * ridge).rsqrt()
        self.map = axes * scale.unsqueeze(1)  # z = (f - mean) map
        self.Z = torch.cat([centred @ self.map, torch.ones_like(features[..., :1])], 2)
        of_bias = torch.zeros_like(scale[:, :1])
        self.penalty = torch.cat([ridge * scale.square(), of_bias], 1).unsqueeze(1)

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

    def value(self, V: Tensor) -> Tensor:
        """[tasks]."""
        logits = self.Z @ V.mT
        losses = logits.logsumexp(2) - (logits * self.one_hot).sum(2)
        return losses.mean(1) + 0.5 * (V.square() * self.penalty).sum((1, 2))

    def gradient_and_probabilities(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """[tasks, classes, D + 1] and [tasks, N, classes]."""
        P = torch.softmax(self.Z @ V.mT, 2)
        return (P - self.one_hot).mT @ self.Z / self.Z.shape[1] + V * self.penalty, P

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


def _newton(problem: _Problem, V: Tensor) -> tuple[Tensor, Tensor]:
    """The optimum from V on, and whether each task has converged, [tasks]."""
    done = torch.zeros(len(V), dtype=torch.bool, device=V.device)
    for _ in range(MOST_STEPS):
        value = problem.value(V)
        gradient, P = problem.gradient_and_probabilities(V)
        factors, failed = torch.linalg.cholesky_ex(problem.hessian(P))
        # not cholesky_solve, which takes 11 ms for 16 systems of 330 equations on an H200
        half = torch.linalg.solve_triangular(
            factors, -gradient.flatten(1).unsqueeze(2), upper=False
        )
        direction = torch.linalg.solve_triangular(factors.mT, half, upper=True).view_as(V)
        slope = (gradient * direction).sum((1, 2))
        done = done | (-slope / 2 <= TOLERANCE * value)
        going = ~done & (failed == 0) & torch.isfinite(slope)
        if not bool(going.any()):
            break
        direction = direction.where(going.view(-1, 1, 1), 0)
        V = V + direction * _step(problem, V, direction, value, slope)
    return V, done


def _step(problem: _Problem, V: Tensor, direction: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """The largest of 1, 1/2, 1/4, ... for each task that lowers its objective, [tasks, 1, 1]."""
    step = torch.ones_like(value)
    for _ in range(MOST_HALVINGS):
        new = problem.value(V + direction * step.view(-1, 1, 1))
        enough = new <= value + 1e-4 * step * slope + NOISE
        if bool((enough | ~torch.isfinite(slope)).all()):
            break
        step = torch.where(enough, step, step / 2)
    return step.view(-1, 1, 1)
