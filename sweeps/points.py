"""The values of the searched flags in a trial, determined by the number of its draw.

Random draw i depends only on the seed, on i and on the list of searched flags: it is the same for
every variant of a command, any number of workers and whichever process takes it. A guided draw also
depends on the results so far.
"""

import warnings
from collections.abc import Sequence

import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from experiment.seeds import seeded_generator
from sweeps.space import SearchedFlag, Value, grid

GUIDED = ("tpe", "gp", "population")


def random_point(flags: Sequence[SearchedFlag], seed: int, number: int) -> dict[str, Value]:
    """Random draw `number`, counted from 0: independent values of all flags."""
    generator = seeded_generator(seed, number)
    options = {"dtype": torch.float64, "generator": generator, "device": "cpu"}
    shares = torch.rand(len(flags), **options).tolist()
    return {flag.name: flag.at(share) for flag, share in zip(flags, shares, strict=True)}


def distribution_of(flag: SearchedFlag) -> BaseDistribution:
    """The values of a flag as a distribution for Optuna's guided samplers."""
    if flag.kind == "choice":
        return CategoricalDistribution(flag.choices)
    if flag.kind == "int":
        return IntDistribution(flag.low, flag.high)
    if flag.kind == "step":
        return FloatDistribution(flag.low, flag.high, step=float(flag.range.split(":")[-1]))
    return FloatDistribution(flag.low, flag.high, log=flag.kind == "log")


class PointSampler(BaseSampler):
    """Values by the number of the draw: random, points of a grid, or guided by earlier results.

    flags, seed: as in `random_point`.
    points: the points of a grid, to be used instead of random draws.
    guide: "tpe" (tree-structured Parzen estimators; Watanabe, arXiv 2304.11127), "gp" (a Gaussian
        process and its expected improvement; Jones et al. 1998), "population" (a genetic algorithm,
        NSGA-II; Deb et al. 2002), or None for no guidance.
    startup: the number of random draws before the guided ones; for "population" its size.
    """

    def __init__(
        self,
        flags: Sequence[SearchedFlag],
        seed: int,
        points: Sequence[dict[str, Value]] | None = None,
        guide: str | None = None,
        startup: int = 5,
    ) -> None:
        self.flags, self.seed, self.points = flags, seed, points
        self.guide, self.startup = guide, startup

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The distributions of all searched flags, because their values are chosen jointly."""
        return {flag.name: distribution_of(flag) for flag in self.flags}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """The values of draw number trial.user_attrs["draw"]."""
        number = trial.user_attrs["draw"]
        if self.points is not None:
            return self.points[number]
        values = random_point(self.flags, self.seed, number)
        # NSGAIISampler decides itself which trials are its first, random generation
        if self.guide == "population" or (self.guide is not None and number >= self.startup):
            with warnings.catch_warnings():  # a diverged trial counts as the worst that was finite
                warnings.filterwarnings("ignore", "Clip non-finite values")
                values |= self._guide(number).sample_relative(study, trial, search_space)
        return values

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution
    ) -> Value:
        """Never called, because all values are chosen jointly."""
        raise NotImplementedError(f"{param_name} was not chosen with the other flags")

    def _guide(self, number: int) -> BaseSampler:
        """A sampler seeded for this trial, so that its suggestion doesn't depend on the process."""
        seed = seeded_generator(self.seed, number, 1).initial_seed() % 2**32
        if self.guide == "population":
            return NSGAIISampler(population_size=self.startup, seed=seed)
        if self.guide == "gp":
            return GPSampler(seed=seed, n_startup_trials=1)
        return TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)


def make_sampler(
    flags: Sequence[SearchedFlag], seed: int, method: str, startup: int
) -> PointSampler:
    """The sampler for a value of --method: random, grid, tpe or population."""
    points = list(grid(flags)) if method == "grid" else None
    return PointSampler(flags, seed, points, method if method in GUIDED else None, startup)
