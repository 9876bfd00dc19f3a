"""Settings of meta-training and what there is to choose from: no torch is loaded with it."""

import math
from dataclasses import dataclass

from learned_optimizer.errors import OptimizerError

NETWORK_KINDS = ("lstm", "mlp")
EXTRA_INPUTS = ("time", "relative_update", "parameter")  # of an LSTM
SMALL_STEPS = ("relu", "leaky_relu", "conv")  # optimizees for which out_mul .01 is better than .1
BATCH_SIZE = 128  # images of a step of an optimizee
ESTIMATORS = ("suffix_sum", "autograd", "es", "pes")
SELECTIONS = ("sum", "end")
SYMMETRY_KINDS = ("translation", "scale", "rescale")
CONTROL = "_control"  # after the kind: a symmetry that is not there


@dataclass(frozen=True)
class MetaTrainingSettings:
    """Everything about meta-training that is a number or a choice.

    coordinates: see suffix_sum_gradient. penalty: beta of the symmetries' regulariser, of
    `penalty_kinds`. sigma, pairs: of the evolution strategies. selection: by what loss of the
    validation runs the best epoch is chosen, their sum over all steps or the mean of the last ten.
    """

    epochs: int = 50
    runs_per_epoch: int = 20
    inner_steps: int = 200
    unroll: int = 20
    tasks: int = 1  # K, trainings side by side in a run
    lr: float = 0.01
    decay: str = "none"  # or "cosine": the rate falls to 0 at the last run
    log_loss: bool = False
    estimator: str = "suffix_sum"
    coordinates: int | None = None
    penalty: float = 0.0
    penalty_kinds: tuple[str, ...] = ("rescale",)
    penalty_relative: bool = False
    sigma: float = 0.01
    pairs: int = 1
    validation_runs: int = 5
    selection: str = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (self.runs_per_epoch, self.inner_steps, self.unroll, self.tasks, self.pairs)
        if min(*whole, self.validation_runs) < 1:
            raise OptimizerError("runs, steps, unroll, tasks, pairs and validation runs are >= 1")
        if self.estimator not in ESTIMATORS or self.decay not in ("none", "cosine"):
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
