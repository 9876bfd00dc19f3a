"""The settings of hypergradient descent (hypgraddesc.py); importing it does not load torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiment.choices import DECAYS, MEMORY, META_OPTIMIZERS, METHODS, NONFINITE, PRODUCTS
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
    lr: float = setting(1e-5, "learning rate of the coefficients", "positive")
    optimizer: str = setting("adam", "of the coefficients", choices=META_OPTIMIZERS)
    warmup_steps: int = setting(0, "the rate rises over these", "nonnegative")
    decay: str = setting(
        "none", "how the rate falls again; cosine: to 0 at the last meta-step", choices=DECAYS
    )
    finetune_steps: int = setting(0, "more, at a lower rate", "nonnegative")
    finetune_factor: float = setting(0.1, "times --lr is their rate", "positive")
    inner_steps: Horizon = setting(250, "differentiated updates", "positive")
    ungraded_steps: Horizon = setting(0, "updates before them, not differentiated", "nonnegative")
    tasks: int = setting(1, "draws averaged in one hypergradient", "positive")
    reinitialize_every: int = setting(
        1, "in between, training goes on from where it was", "positive", metavar="METASTEPS"
    )
    accumulate: bool = setting(False, "one step of the coefficients for all of these")
    clip_norm: float | None = setting(
        None, "bound of the norm of each task's hypergradient", "positive", metavar="NORM"
    )
    l1: Schedule = setting(0.0, "L1 weight of the coefficients", "nonnegative", flag="l1_reg")
    l2: Schedule = setting(0.0, "their L2 weight", "nonnegative", flag="l2_coefficients")
    sparsify_from: int | None = setting(
        None, "from here on, remove coefficients that change sign", "nonnegative",
        metavar="METASTEP",
    )  # fmt: skip
    average: float = setting(
        0.0, "end with a running average of the coefficients of this decay", "fraction",
        metavar="DECAY",
    )  # fmt: skip
    stop_below: float | None = setting(
        None, "end the meta-steps where the accuracy, seen before a meta-step, is below this",
        "fraction", metavar="ACCURACY",
    )  # fmt: skip
    nonfinite: str = setting(
        "skip", "what to do with a hypergradient that is not finite", choices=NONFINITE
    )
    products: str = setting(
        "float32", "how matrix products multiply, in float32 training", choices=PRODUCTS
    )
    method: str | Callable = setting("reverse", "way to the hypergradient", choices=METHODS)
    K: int = setting(
        20, "last updates (truncated), terms (lookback, implicit), updates of a window (pes)",
        "positive",
    )  # fmt: skip
    sigma: float = setting(1e-4, "perturbation of hyperparameters by es, pes", "positive")
    pairs: int = setting(4, "of perturbed trainings by es, pes", "positive")
    memory: str = setting("fit", "what is kept for the backward pass", choices=MEMORY)
    memory_limit: float = setting(2.5, "for --memory fit", "positive", metavar="GB")
    adjoint_limit: float | None = setting(
        None, "hold each dL/dtheta_t at so many times that of the end", "positive",
        metavar="FACTOR",
    )  # fmt: skip
    loss_times: int = setting(
        1, "mean of the outer loss after 1/N, 2/N, ... of the updates", "positive", metavar="N"
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
