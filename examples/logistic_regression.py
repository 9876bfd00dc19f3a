"""Hyperparameter optimisation: an L2 weight for each feature of a logistic regression.

    python examples/logistic_regression.py                          1,000 points of 20 features
    python examples/logistic_regression.py --method CG              another hypergradient
    python examples/logistic_regression.py --data digits            4 and 9, a weight for each pixel
    python examples/logistic_regression.py --resume runs/logistic_regression-...

    w_T    from w_0 = 0 by gradient descent on BCE(X w, y) + sum_i l_i w_i^2 / 2
    l      from 1 by SGD with momentum on BCE(X_val w_T, y_val), never below 1e-8

The synthetic data, drawn with seed 1, and all defaults are those of HyperTorch's notebook, whose
validation losses stand beside ours. First comes the error of every method at l = 1, in float64 and
over the number k of steps or iterations, beside what theory promises (Grazzi et al. 2020, arXiv
2006.16218): the powers of the map's contraction, or ((sqrt c - 1) / (sqrt c + 1))^k for conjugate
gradients, where c is the condition number, and its root c^2 for the normal equations.
"""

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from command_line import (
    UserError,
    common_parser,
    nonnegative_float,
    nonnegative_int,
    open_run,
    parse,
    positive_float,
    positive_int,
    run_command,
    set_up,
)
from figure_style import (
    COLOURS,
    FAINT,
    add_legend,
    label_axes,
    new_figure,
    one_panel,
    save_figure,
)
from hypergradients import (
    CG,
    CG_normaleq,
    checkpointed_reverse,
    fixed_point,
    forward_mode,
    neumann,
    neumann_lookback,
    nystrom,
    reverse,
    stoch_AID,
    truncated_reverse,
)
from inner_optimizers import GradientDescent
from mnist_datasets import ImageData, load_images
from run_log import RunLog, finish_on_interrupt, read_metrics
from update_maps import advance

PUBLISHED = {0: 0.5744, 10: 0.5338, 20: 0.3615, 30: 0.3225, 40: 0.2988, 50: 0.2945, 60: 0.2906}
PUBLISHED_WITH = {"data": "synthetic", "seed": 1, "method": "truncated_reverse", "steps": 100,
                  "K": 10, "rate": 0.1, "lr": 1.0, "momentum": 0.9, "dtype": "float32"}  # fmt: skip
LEAST = 1e-8  # an L2 weight
CURVE = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85)  # k of the errors
ROUNDING = 1e-14  # relative errors below it tell nothing in float64


@dataclass(frozen=True)
class Problem:
    """Logistic regression with an L2 weight for each feature; hyperparameters [l], parameters [w].

    inputs: [points, features]. targets: 0 or 1 [points]. rate: of gradient descent.
    """

    inputs: Tensor
    targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    rate: float

    def to(self, *where) -> "Problem":
        """The same on another device, or of another type."""
        tensors = (self.inputs, self.targets, self.validation_inputs, self.validation_targets)
        return Problem(*(t.to(*where) for t in tensors), self.rate)

    def start(self) -> list[Tensor]:
        """w_0 = 0."""
        return [self.inputs.new_zeros(self.inputs.shape[1])]

    def first_hparams(self) -> list[Tensor]:
        """All L2 weights 1."""
        return [self.inputs.new_ones(self.inputs.shape[1]).requires_grad_()]

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        fit = binary_cross_entropy_with_logits(self.inputs @ params[0], self.targets)
        return fit + (hparams[0] * params[0].square()).sum() / 2

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        logits = self.validation_inputs @ params[0]
        return binary_cross_entropy_with_logits(logits, self.validation_targets)

    def accuracy(self, params: list[Tensor]) -> float:
        """Share of the validation points that are classified correctly."""
        right = (self.validation_inputs @ params[0] > 0) == (self.validation_targets > 0.5)
        return float(right.double().mean())

    def map(self, gradient: str = "graph") -> GradientDescent:
        """A step of gradient descent on the inner loss."""
        return GradientDescent(self.inner_loss, self.rate, gradient=gradient)

    def hessian(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """Of the inner loss: X^T diag(p (1 - p)) X / n + diag(l), [features, features]."""
        p = torch.sigmoid(self.inputs @ params[0])
        weighted = self.inputs.T * (p * (1 - p)) @ self.inputs
        return weighted / len(self.inputs) + hparams[0].detach().diag()

    def solve(self, hparams: list[Tensor]) -> list[Tensor]:
        """w* by Newton's method, which gets there without line search where l is about 1."""
        params = self.start()
        for _ in range(30):
            p = torch.sigmoid(self.inputs @ params[0])
            residual = self.inputs.T @ (p - self.targets) / len(self.inputs)
            gradient = residual + hparams[0].detach() * params[0]
            step = torch.linalg.solve(self.hessian(params, hparams), gradient)
            params = [params[0] - step]
            if step.norm() < 1e-15 * params[0].norm():
                break
        return params

    def hypergradient(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """Exact, at w*: -w* H^-1 grad_w E, as the inner gradient's derivative by l_i is w_i e_i."""
        p = torch.sigmoid(self.validation_inputs @ params[0])
        grad = self.validation_inputs.T @ (p - self.validation_targets)
        grad = grad / len(self.validation_targets)
        return -params[0] * torch.linalg.solve(self.hessian(params, hparams), grad)


# ---- the methods: (problem, hparams, T, k) -> hypergradient after T steps, k of them or k products

Method = Callable[[Problem, list[Tensor], int, int], list[Tensor]]


def along(method: Callable, problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """Methods that follow all steps from w_0; k plays no part."""
    maps = [problem.map()] * steps
    return method(problem.start(), hparams, update_maps=maps, outer_loss=problem.outer_loss)


def reversed_history(problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """reverse, with all states kept."""
    history, update = [problem.start()], problem.map()
    for _ in range(steps):
        history.append(update(history[-1], hparams, create_graph=False))
    return reverse(history, hparams, [update] * steps, problem.outer_loss)


def forwarded(problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """forward_mode, all directions at once."""
    maps = [problem.map("func")] * steps
    return forward_mode(problem.start(), hparams, maps, problem.outer_loss, vectorize=True)


def truncated(problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """The last k of all steps; the steps are more where k is."""
    maps = [problem.map()] * max(steps, k)
    return truncated_reverse(problem.start(), hparams, k, maps, problem.outer_loss)


def looked_back(problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """neumann_lookback: k terms with the map at w_{T-1}."""
    maps = [problem.map()]
    params = advance(problem.start(), hparams, maps * (steps - 1))
    return neumann_lookback(params, hparams, k, maps, problem.outer_loss)


def at_the_end(method: Callable, problem: Problem, hparams, steps: int, k: int) -> list[Tensor]:
    """Implicit methods, with w_T for the fixed point."""
    params = advance(problem.start(), hparams, [problem.map()] * steps)
    return method(params, hparams, K=k, fp_map=problem.map(), outer_loss=problem.outer_loss)


def by_an_optimizer(*args, **options) -> list[Tensor]:
    """stoch_AID's hypergradient, of SGD of rate 1 without noise."""
    return stoch_AID(*args, **options, verbose=False)[0]


METHODS: dict[str, Method] = {
    "reverse": reversed_history,
    "checkpointed_reverse": partial(along, checkpointed_reverse),
    "forward_mode": forwarded,
    "truncated_reverse": truncated,
    "neumann_lookback": looked_back,
    "fixed_point": partial(at_the_end, fixed_point),
    "neumann": partial(at_the_end, neumann),
    "stoch_AID": partial(at_the_end, by_an_optimizer),
    "CG": partial(at_the_end, CG),
    "CG_normaleq": partial(at_the_end, CG_normaleq),
    "nystrom": partial(at_the_end, nystrom),
}
WHOLE = ("reverse", "checkpointed_reverse", "forward_mode")  # k is the number of all steps
