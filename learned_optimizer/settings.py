"""Settings of meta-training and what there is to choose from: no torch is loaded with it."""

import math
from dataclasses import dataclass, field
from typing import Any

from learned_optimizer.errors import OptimizerError

NETWORK_KINDS = ("lstm", "mlp")
EXTRA_INPUTS = ("time", "relative_update", "parameter")  # of an LSTM
SMALL_STEPS = (
    "relu",
    "leaky_relu",
    "conv",
    "lenet",
)  # optimizees for which out_mul .01 is better than .1
BATCH_SIZE = 128  # images of a step of an optimizee
ESTIMATORS = ("suffix_sum", "autograd", "es", "pes")
SELECTIONS = ("sum", "end")
DECAYS = ("none", "cosine")
SYMMETRY_KINDS = ("translation", "scale", "rescale")
NORM = "norm"  # a penalty on the size of updates, for comparison with those on symmetries
CONTROL = "_control"  # after the kind: a symmetry that is not there


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field of this default and help, for numbers in this range; a command makes flags of it."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class MetaTrainingSettings:
    """Everything about meta-training that is a number or a choice."""

    epochs: int = _setting(50, "0: no meta-training", "nonnegative")
    runs_per_epoch: int = _setting(20, "trainings from new parameters", "positive")
    inner_steps: int = _setting(200, "of each training", "positive")
    unroll: int = _setting(20, "steps between two meta-steps", "positive")
    tasks: int = _setting(1, "trainings side by side in each run", "positive")
    lr: float = _setting(0.01, "learning rate (Adam)", "positive")
    decay: str = _setting("none", "of the rate; cosine: to 0 at the last run", choices=DECAYS)
    log_loss: bool = _setting(False, "log of the sum of a window's losses")
    estimator: str = _setting("suffix_sum", "of the meta-gradient", choices=ESTIMATORS)
    coordinates: int | None = _setting(
        None, "suffix_sum: about how many coordinates it samples (default: all)", "positive",
        metavar="N",
    )  # fmt: skip
    sigma: float = _setting(0.01, "es, pes: width of perturbations", "positive")
    pairs: int = _setting(1, "es, pes: perturbations", "positive")
    validation_runs: int = _setting(5, "to select the best epoch", "positive")
    selection: str = _setting(
        "sum", "of the epoch: by the sum of a run's losses, or the mean of the last ten",
        choices=SELECTIONS,
    )  # fmt: skip
    penalty: float = _setting(
        0.0, "times the sum over units of |deviation| of the updates in the meta-loss",
        "nonnegative", metavar="BETA",
    )  # fmt: skip
    penalty_kinds: tuple[str, ...] = _setting(
        ("rescale",), "symmetries whose deviations are penalised; norm: the norms of the updates",
        choices=(*SYMMETRY_KINDS, NORM),
    )  # fmt: skip
    penalty_relative: bool = _setting(False, "deviations over |v| |theta|")
    random_start: bool = _setting(
        False, "each run begins where so many steps of Adam have led, a new number each time"
    )
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
        """The learning rate of a run."""
        if self.decay == "none":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * run / max(1, self.runs)))
