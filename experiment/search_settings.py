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
        None, "no gradients: so many points in place of meta-steps, random ones, or chosen by "
        "tree-structured Parzen estimators", choices=SAMPLERS,
    )  # fmt: skip
    search_range: float = setting(
        3.0, "points are within so many typical sizes of where hyperparameters start", "positive",
        metavar="SIZES",
    )  # fmt: skip
    finalists: int = setting(5, "best points of a search, judged again at its end", "positive")
    final_trainings: int = setting(4, "of each of them", "positive")
    trials: int = 150
    tasks: int = 1
    loss_times: int = 1
    inner_steps: Horizon = 250
    seed: int = 0
