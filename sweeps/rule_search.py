"""A gradient-free search for a rule, the baseline of hypergradient descent at equal time.

    finished = search_rule(training, SearchSettings(search="tpe", trials=150, tasks=2), log)

A point u in [-1, 1]^n stands for the n hyperparameters of a training (coefficients, the step's
numbers, the initial spread, strengths of views). Hyperparameter k is

    start_k + range size_k u_k |u_k|

with size_k the typical size that the rule gives it (LearningRule.step_sizes); the square makes
small changes more frequent than large ones. As in a meta-step, a point is judged by the mean outer
loss of some trainings, with new draws in each trial. The points with the lowest losses are
finalists: they are judged again, all on the same new draws, and the best of them is taken.

Points are uniform; or, after N_RANDOM uniform ones, proposed by Optuna's tree-structured Parzen
estimators (Bergstra et al. 2011; Watanabe, arXiv 2304.11127) over all numbers jointly.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence

import optuna
import torch
from torch import Tensor

from experiment.loop import run_steps
from experiment.processes import ALONE, Team
from experiment.run_log import RunLog, SilentLog
from experiment.search_settings import SearchSettings
from experiment.seeds import TRIAL, seeded_generator
from hypgraddesc import check_shared
from train import HORIZON, Draw, Training, evaluate_on_the_way

N_RANDOM = 20  # random points before the estimators propose points
POINT, FINAL = range(2)  # the use of random numbers, after (seed, TRIAL) in their keys


def search_rule(
    training: Training | Sequence[Training],
    settings: SearchSettings,
    log: RunLog | SilentLog,
    *,
    hyperparameters: Callable[[], dict[str, float]] = dict,
    checkpoint_every: int = 10,
    team: Team = ALONE,
) -> bool:
    """Run all trials, recording a row of each; return whether the search came to its end.

    At the end the hyperparameters are those of the best point. Goes on from the log's checkpoint if
    there is one; after Ctrl-C the current trial is completed. For the arguments see RuleSearch.
    Every process of the team must call this.
    """
    search = RuleSearch(training, settings, log.warn, team=team, hyperparameters=hyperparameters)
    finished = run_steps(
        log, search, "trial", search.total,
        shown=(*search.names, "best_loss", "seconds"), checkpoint_every=checkpoint_every, team=team,
    )  # fmt: skip
    search.use_best()
    return finished


class RuleSearch:
    """The state of a search; `step` judges one point and returns its row of numbers.

    Raises MetaError if several trainings do not share their hyperparameters.

    training: the training whose hyperparameters are searched; of n trainings, task k uses number
        k modulo n.
    warn: called with a message for each task whose training is not finite.
    hyperparameters: returns further columns for the row of each trial.
    """

    def __init__(
        self,
        training: Training | Sequence[Training],
        settings: SearchSettings,
        warn: Callable[[str], None] = warnings.warn,
        *,
        team: Team = ALONE,
        hyperparameters: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.trainings = [training] if isinstance(training, Training) else list(training)
        check_shared(self.trainings)
        self.settings, self.warn, self.team = settings, warn, team
        self.recorded = hyperparameters
        self.trained = self.trainings[0].hyperparameters
        sizes = {f"rule.{n}": size for n, size in self.trainings[0].rule.step_sizes().items()}
        self.start = {name: p.detach().clone() for name, p in self.trained.items()}
        self.reach = {
            name: settings.search_range * sizes.get(name, torch.ones(())).to(p).expand_as(p)
            for name, p in self.start.items()
        }
        self.points: list[Tensor] = []  # of the trials so far, float64 [n]
        self.losses: list[float] = []  # of the trials, then of the finalists in order of _order()
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # our rows already report each trial
        self.study = optuna.create_study()

    @property
    def count(self) -> int:
        """The number n of hyperparameters, the dimension of a point."""
        return sum(p.numel() for p in self.start.values())

    @property
    def total(self) -> int:
        """The number of steps: the trials, then one for each finalist."""
        return self.settings.trials + min(self.settings.finalists, self.settings.trials)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers that judge a training: the outer loss, then its metrics."""
        return ("meta_loss", *self.trainings[0].outer_loss.metrics)

    @property
    def finished(self) -> bool:
        """Whether all trials have been made and all finalists judged."""
        return len(self.losses) >= self.total

    # ---- one trial ----

    def step(self) -> dict[str, float]:
        """Judge the next point or the next finalist, and return its row."""
        begin, number = time.perf_counter(), len(self.losses)
        final = number - self.settings.trials
        if final < 0:
            point, tasks = self._propose(number), self.settings.tasks
            keys = [(self.settings.seed, number, task) for task in range(tasks)]
        else:
            point, tasks = self.points[self._order()[final]], self.settings.final_trainings
            tasks *= len(self.trainings)
            keys = [(self.settings.seed, TRIAL, FINAL, task) for task in range(tasks)]
        self._put(point)
        rows = self._judged(number, keys)
        row = {name: _mean([r[name] for r in rows]) for name in self.names}
        # a point with even one training that is not finite is to be avoided
        loss = row["meta_loss"] if len(rows) == len(keys) else math.inf
        self._remember(point, loss)
        return {
            **row,
            "best_loss": min(self.losses),
            "skipped_tasks": len(keys) - len(rows),
            "inner_steps": _mean([self._inner_steps(number, task) for task in range(tasks)]),
            "seconds": time.perf_counter() - begin,
            **self.recorded(),
        }

    def _propose(self, number: int) -> Tensor:
        """The point of this trial, float64 [n], a function of the earlier points and losses."""
        if self.settings.search == "random" or number < N_RANDOM:
            generator = seeded_generator(self.settings.seed, TRIAL, POINT, number)
            return 2 * torch.rand(self.count, generator=generator, dtype=torch.float64) - 1
        seed = seeded_generator(self.settings.seed, TRIAL, POINT, number).initial_seed() % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=1, multivariate=True
            )
            trial = self.study.ask(self._space())
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return torch.tensor([trial.params[name] for name in self._space()], dtype=torch.float64)

    def _space(self) -> dict[str, optuna.distributions.FloatDistribution]:
        return {f"u{k}": optuna.distributions.FloatDistribution(-1, 1) for k in range(self.count)}

    def _judged(self, number: int, keys: Sequence[tuple[int, ...]]) -> list[dict[str, float]]:
        """The mean numbers of each training that is finite, in order of the keys."""
        ours = [(task, self._numbers(number, task, keys[task]))
                for task in self.team.share(len(keys))]  # fmt: skip
        everyone = sorted(
            (pair for share in self.team.gathered(ours) for pair in share), key=lambda pair: pair[0]
        )
        for task, numbers in everyone:
            if isinstance(numbers, str):
                self.warn(f"trial {number + 1}, task {task}, {numbers}; this point is worst")
        return [numbers for _, numbers in everyone if not isinstance(numbers, str)]

    def _numbers(self, number: int, task: int, key: tuple[int, ...]) -> dict[str, float] | str:
        """The mean numbers of one training over its loss times, or what in it is not finite."""
        steps, times = self._inner_steps(number, task), self.settings.loss_times
        draw = Draw(key, steps)
        training = self.trainings[task % len(self.trainings)].with_drawn_model(draw)
        moments = sorted({math.ceil(steps * k / times) for k in range(1, times + 1)})
        try:
            rows = [row for row, _ in evaluate_on_the_way(training, draw, moments)]
        except FloatingPointError as problem:
            return str(problem)
        return {name: _mean([row[name] for row in rows]) for name in self.names}

    def _inner_steps(self, number: int, task: int) -> int:
        """The number of updates of this task in this trial."""
        steps, seed = self.settings.inner_steps, self.settings.seed
        if not callable(steps):
            return steps
        return steps(number, seeded_generator(seed, number, task, HORIZON))

    # ---- points ----

    def _put(self, point: Tensor) -> None:
        """Set the hyperparameters to those of a point."""
        parts = point.split([p.numel() for p in self.start.values()])
        with torch.no_grad():
            for (name, p), u in zip(self.trained.items(), parts, strict=True):
                moved = (u * u.abs()).to(p).view_as(p)
                p.copy_(self.start[name] + self.reach[name] * moved)

    def _remember(self, point: Tensor, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) > self.settings.trials:
            return
        self.points.append(point)
        if self.settings.search == "tpe":
            values = dict(zip(self._space(), point.tolist(), strict=True))
            self.study.add_trial(optuna.trial.create_trial(
                params=values, distributions=self._space(), value=loss
            ))  # fmt: skip

    def _order(self) -> list[int]:
        """The numbers of the trials so far, the lowest loss first."""
        return sorted(range(len(self.points)), key=self.losses.__getitem__)

    def use_best(self) -> None:
        """Set the hyperparameters to those of the best point.

        It is the best of the finalists if all of them have been judged, else of the trials.
        """
        order, finals = self._order(), self.losses[self.settings.trials :]
        if self.finished:
            self._put(self.points[order[finals.index(min(finals))]])
        elif order:
            self._put(self.points[order[0]])

    # ---- state ----

    def state_dict(self) -> dict:
        """Everything that a resumed search needs, in plain containers of tensors."""
        modules = {name: m.state_dict() for name, m in self.trainings[0].modules.items()}
        return {"start": self.start, "points": self.points, "losses": self.losses, **modules}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state returned by `state_dict`."""
        for name, module in self.trainings[0].modules.items():
            module.load_state_dict(state[name])
        self.start = {n: p.to(self.start[n], copy=True) for n, p in state["start"].items()}
        for point, loss in zip(state["points"], state["losses"], strict=False):
            self._remember(point, loss)
        self.losses = list(state["losses"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
