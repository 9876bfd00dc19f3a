"""The settings of hypergradient descent (hypgraddesc.py); importing it does not load torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiment.choices import (
    DECAYS,
    MEMORY,
    META_OPTIMIZERS,
    METHODS,
    NONFINITE,
    PRODUCTS,
    TOGETHER,
)
from experiment.settings import setting

Schedule = float | Callable[[int], float]
Horizon = int | Callable[[int, Any], int]


@dataclass(frozen=True)
class MetaSettings:
    """The numbers and choices of the meta-loop.

    A Schedule is a number or a function of the meta-step (counted from 0). inner_steps and
    ungraded_steps are a number or a function of the meta-step and a torch.Generator, so that each
    task can draw its own. method is one of METHODS or a MetaGradient; the fields after it, from K
    to loss_times, concern only some methods, see meta_gradients.py.
    """

    metasteps: int = setting(1000, "meta-steps before the fine-tuning", "nonnegative")
    lr: float = setting(1e-5, "learning rate of the meta-steps", "positive")
    optimizer: str = setting("adam", "optimizer of the meta-steps", choices=META_OPTIMIZERS)
    warmup_steps: int = setting(
        0, "meta-steps over which the learning rate rises to --lr", "nonnegative"
    )
    decay: str = setting(
        "none", "decay of the learning rate after the warm-up (cosine: to 0)", choices=DECAYS
    )
    finetune_steps: int = setting(
        0, "further meta-steps at a lower learning rate (fine-tuning)", "nonnegative"
    )
    finetune_factor: float = setting(
        0.1, "learning rate of the fine-tuning, divided by --lr", "positive"
    )
    inner_steps: Horizon = setting(250, "differentiated updates of a training", "positive")
    ungraded_steps: Horizon = setting(0, "updates before the differentiated ones", "nonnegative")
    tasks: int = setting(1, "trainings over which a hypergradient is averaged", "positive")
    together: str = setting(
        "auto", "tasks as one batched computation (auto: on a GPU)", choices=TOGETHER
    )
    reinitialize_every: int = setting(
        1,
        "meta-steps before a training starts anew; until then it continues",
        "positive",
        metavar="METASTEPS",
    )
    accumulate: bool = setting(
        False, "update only when trainings start anew, with the sum of hypergradients"
    )
    clip_norm: float | None = setting(
        None, "largest norm of each task's hypergradient", "positive", metavar="NORM"
    )
    l1: Schedule = setting(
        0.0, "weight of the L1 penalty on coefficients", "nonnegative", flag="l1_reg"
    )
    l2: Schedule = setting(
        0.0, "weight of the L2 penalty on coefficients", "nonnegative", flag="l2_coefficients"
    )
    sparsify_from: int | None = setting(
        None, "first meta-step after which coefficients that changed sign are removed",
        "nonnegative", metavar="METASTEP",
    )  # fmt: skip
    average: float = setting(
        0.0, "end with a running average of the hyperparameters, with this decay", "fraction",
        metavar="DECAY",
    )  # fmt: skip
    stop_below: float | None = setting(
        None, "end the run after a meta-step whose accuracy is below this",
        "fraction", metavar="ACCURACY",
    )  # fmt: skip
    nonfinite: str = setting(
        "skip", "what to do with hypergradients that are not finite", choices=NONFINITE
    )
    products: str = setting(
        "float32", "precision of matrix products in float32 training", choices=PRODUCTS
    )
    method: str | Callable = setting(
        "reverse", "how the hypergradient is computed", choices=METHODS
    )
    K: int = setting(
        20, "updates (truncated), terms (lookback, implicit) or window length (pes)",
        "positive",
    )  # fmt: skip
    sigma: float = setting(1e-4, "standard deviation of perturbations (es and pes)", "positive")
    pairs: int = setting(4, "pairs of opposite perturbations (es and pes)", "positive")
    memory: str = setting("fit", "what is kept in memory for the backward pass", choices=MEMORY)
    memory_limit: float = setting(2.5, "memory that --memory fit may use", "positive", metavar="GB")
    adjoint_limit: float | None = setting(
        None, "limit |dL/dtheta_t| to this multiple of its value after the last update", "positive",
        metavar="FACTOR",
    )  # fmt: skip
    loss_times: int = setting(
        1,
        "take the mean of outer losses after 1/N, 2/N, ... of the updates",
        "positive",
        metavar="N",
    )
    seed: int = 0

    @property
    def total_steps(self) -> int:
        return self.metasteps + self.finetune_steps

    def rate(self, metastep: int) -> float:
        """The learning rate of a meta-step."""
        rate = self.lr * min(1.0, (metastep + 1) / max(1, self.warmup_steps))
        if metastep >= self.metasteps:
            return self.lr * self.finetune_factor
        if self.decay == "cosine" and metastep >= self.warmup_steps:
            done = (metastep - self.warmup_steps) / max(1, self.metasteps - self.warmup_steps)
            rate *= 0.5 * (1 + math.cos(math.pi * done))
        return rate
