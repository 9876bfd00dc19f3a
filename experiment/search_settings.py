"""The settings of a gradient-free search for a rule; importing it does not load torch."""

from dataclasses import dataclass

from experiment.meta_settings import Horizon
from experiment.settings import setting

SAMPLERS = ("random", "tpe")


@dataclass(frozen=True)
class SearchSettings:
    """How sweeps/rule_search.py searches for hyperparameters, with trials in place of meta-steps.

    trials: number of points tried, each by `tasks` trainings of inner_steps updates, which are
        judged after 1/loss_times, 2/loss_times, ... of their updates.
    seed: seeds the points, the trainings, and the sampler that chooses the next point.
    """

    search: str | None = setting(
        None, "try --metasteps points, random or by Parzen estimators (tpe), without gradients",
        choices=SAMPLERS,
    )  # fmt: skip
    search_range: float = setting(
        3.0, "range of points around the start, in typical sizes of hyperparameters", "positive",
        metavar="SIZES",
    )  # fmt: skip
    finalists: int = setting(
        5, "number of best points that are judged again at the end of a search", "positive"
    )
    final_trainings: int = setting(4, "trainings that judge each finalist of a search", "positive")
    trials: int = 150
    tasks: int = 1
    loss_times: int = 1
    inner_steps: Horizon = 250
    seed: int = 0
