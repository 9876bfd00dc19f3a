"""Settings of meta-training and their choices; importing this module does not load torch."""

import math
from dataclasses import dataclass, field
from typing import Any

from learned_optimizer.errors import OptimizerError

NETWORK_KINDS = ("lstm", "mlp")
EXTRA_INPUTS = ("time", "relative_update", "parameter")  # of the LSTM
SMALL_STEPS = (
    "relu",
    "leaky_relu",
    "conv",
    "lenet",
)  # optimizees for which out_mul .01 is better than .1
BATCH_SIZE = 128  # images in a step of an optimizee
ESTIMATORS = ("suffix_sum", "autograd", "es", "pes")
SELECTIONS = ("sum", "end")
DECAYS = ("none", "cosine")
SYMMETRY_KINDS = ("translation", "scale", "rescale")
NORM = "norm"  # a penalty on the size of updates, for comparison with those on symmetries
CONTROL = "_control"  # follows the kind of a symmetry that the network doesn't have


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field with a default, a help text and the range of its numbers, for a command's flags."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class MetaTrainingSettings:
    """The numbers and choices of meta-training.

    Raises OptimizerError if a value is unknown or out of its range. The help texts say what the
    fields mean.
    """

    epochs: int = _setting(50, "epochs of meta-training; 0: none", "nonnegative")
    runs_per_epoch: int = _setting(
        20, "runs (trainings from new parameters) in an epoch", "positive"
    )
    inner_steps: int = _setting(200, "steps of each training", "positive")
    unroll: int = _setting(20, "steps of a training between two meta-steps", "positive")
    tasks: int = _setting(1, "trainings side by side in each run", "positive")
    lr: float = _setting(0.01, "learning rate of meta-training (Adam)", "positive")
    decay: str = _setting(
        "none", "decay of the learning rate of meta-training (cosine: to 0)", choices=DECAYS
    )
    log_loss: bool = _setting(False, "take the log of the sum of a window's losses")
    estimator: str = _setting("suffix_sum", "estimator of the meta-gradient", choices=ESTIMATORS)
    coordinates: int | None = _setting(
        None, "about how many coordinates suffix_sum samples (default: all)", "positive",
        metavar="N",
    )  # fmt: skip
    sigma: float = _setting(0.01, "standard deviation of perturbations (es and pes)", "positive")
    pairs: int = _setting(1, "pairs of opposite perturbations (es and pes)", "positive")
    validation_runs: int = _setting(
        5, "number of validation runs, which select the best epoch", "positive"
    )
    selection: str = _setting(
        "sum", "select the epoch by the sum of a run's losses, or by its last ten (end)",
        choices=SELECTIONS,
    )  # fmt: skip
    penalty: float = _setting(
        0.0, "weight of the updates' deviations from symmetries in the meta-loss",
        "nonnegative", metavar="BETA",
    )  # fmt: skip
    penalty_kinds: tuple[str, ...] = _setting(
        ("rescale",), "symmetries whose deviations are penalized; norm: penalize updates' norms",
        choices=(*SYMMETRY_KINDS, NORM),
    )  # fmt: skip
    penalty_relative: bool = _setting(False, "divide penalized deviations by |update| |parameters|")
    random_start: bool = _setting(False, "start each run after a random number of steps of Adam")
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (self.runs_per_epoch, self.inner_steps, self.unroll, self.tasks, self.pairs)
        if min(*whole, self.validation_runs) < 1:
            raise OptimizerError("runs, steps, unroll, tasks, pairs and validation runs are >= 1")
        if self.estimator not in ESTIMATORS or self.decay not in DECAYS:
            raise OptimizerError(
                f"estimator is one of {', '.join(ESTIMATORS)}; decay is none or cosine"
            )
        if self.selection not in SELECTIONS:
            raise OptimizerError(f"selection is one of {', '.join(SELECTIONS)}")
        if self.coordinates is not None and self.estimator != "suffix_sum":
            raise OptimizerError("only the estimator suffix_sum takes a number of coordinates")

    @property
    def runs(self) -> int:
        return self.epochs * self.runs_per_epoch

    def rate(self, run: int) -> float:
        """The learning rate of a run, counted from 0."""
        if self.decay == "none":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * run / max(1, self.runs)))
