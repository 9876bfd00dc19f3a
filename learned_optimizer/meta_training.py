"""Meta-training of learned optimisers on runs of an optimizee, which are cut into windows.

    each run:     K trainings from new parameters, of `inner_steps` steps in windows of `unroll`
    each window:  meta-gradient of its losses, one step of Adam on the optimiser's weights
    each epoch:   the frozen optimiser makes validation runs; the weights with the smallest sum of
                  losses, or the smallest final loss, are kept

Every run has its own generators, seeded by (seed, run, training), so that a resumed run does not
need the states of generators. Source: Andrychowicz et al. 2016 (arXiv 1606.04474).
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from learned_optimizer.errors import OptimizerError
from learned_optimizer.networks import CoordinateNetwork
from learned_optimizer.optimizees import Task
from learned_optimizer.recorded import RecordedCalls
from learned_optimizer.seeds import seeded_generator
from learned_optimizer.settings import MetaTrainingSettings
from learned_optimizer.symmetries import Symmetry, mean_deviations, symmetry_penalty
from learned_optimizer.window_gradients import (
    Trainings,
    WindowGradient,
    WindowLoss,
    autograd_gradient,
    persistent_gradient,
    replayed_roll_out,
    start,
    steps_of_adam,
    strategies_gradient,
    suffix_sum_gradient,
)

VALIDATION = 2**31  # takes the place of the run in the seeds of validation
VALIDATION_WINDOW = 20
STARTING_RATE = 0.05  # the learning rate of Adam's steps before a random start
LAST_STEPS = 10  # the final loss is the mean over these
MOMENTS = "exp_avg", "exp_avg_sq"  # of torch's Adam

Value = TypeVar("Value")


class Team(Protocol):
    """Several processes that share the trainings of a run, as seen by one of them.

    Attributes:
        count: the number of processes.
    """

    count: int

    def share(self, tasks: int) -> Sequence[int]:
        """The numbers of the trainings, out of 0..tasks-1, that this process has to do."""

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in the same order in each; all have to call it together."""


class _Alone:
    """A team of one process."""

    count = 1

    def share(self, tasks: int) -> Sequence[int]:
        return range(tasks)

    def gathered(self, value: Value) -> list[Value]:
        return [value]


ALONE = _Alone()


@dataclass(frozen=True)
class Validation:
    """The results of a frozen optimiser on validation runs.

    Attributes:
        losses: [runs, steps].
        update, gradient: for each symmetry's label, the mean |relative deviation| over its units
            of the first run's updates or gradients, [steps].
    """

    losses: Tensor
    update: dict[str, Tensor]
    gradient: dict[str, Tensor]


class MetaTraining:
    """The state of meta-training, which `train_run` advances by one run.

    The trainings of a run are distributed over the processes of `team`; each process takes the same
    steps, with the average of all meta-gradients. Every process does the whole validation.
    Raises OptimizerError if there are fewer tasks than processes, or no symmetry of a kind to be
    penalized.

    symmetries: those whose deviations are recorded in validation and may be penalized.
    warn: called with a message if a run ends early.

    Attributes:
        network: trained in place.
        run: how many runs are done.
        best, best_epoch, best_loss: the weights selected so far, as a state_dict, their epoch, and
            the validation loss that they were selected by.
        curves: the validation losses [steps] of each epoch, beginning with the untrained optimiser.
        deviations: curves like these, by "update/<label>" and "gradient/<label>"; a label is the
            kind of a symmetry, followed by CONTROL for negative controls.
        calls: how windows are called; where its `record` is not None they are replayed, and the
            host waits for their numbers once a run.
    """

    def __init__(
        self,
        network: CoordinateNetwork,
        task: Task,
        symmetries: Sequence[Symmetry],
        settings: MetaTrainingSettings,
        warn: Callable[[str], None] = warnings.warn,
        team: Team = ALONE,
    ) -> None:
        if settings.tasks < team.count:
            raise OptimizerError(
                f"{team.count} processes need at least {team.count} tasks, one for each"
            )
        self.network, self.task, self.symmetries = network, task, symmetries
        self.settings, self.warn, self.team = settings, warn, team
        penalty = None
        if settings.penalty:
            penalty = symmetry_penalty(
                task.optimizee, symmetries, settings.penalty_kinds, settings.penalty,
                settings.penalty_relative,
            )  # fmt: skip
        self.window_loss = WindowLoss(settings.log_loss, penalty)
        self.optimizer = torch.optim.Adam(network.parameters(), settings.lr)
        self.run = self.best_epoch = 0
        self.best, self.best_loss = copy.deepcopy(network.state_dict()), math.inf
        self.curves: list[Tensor] = []
        self.deviations: dict[str, list[Tensor]] = {}
        self.calls = RecordedCalls()

    def train_run(self) -> dict[str, float]:
        """Do one run and return its numbers; those of validation are NaN if none was due.

        The run ends at a window whose loss or gradient is not finite, before the step.

        meta_loss, last_window_loss: mean training loss of all windows and of the last one.
        meta_gradient_norm: mean over the windows.
        skipped_windows: how many windows were left out because the run ended early.
        learning_rate: of the meta-training.
        validation_loss: sum over the steps, mean over the validation runs.
        validation_end: mean over the last 10 steps and the validation runs.
        seconds: the time that the run took.
        """
        begin, settings = time.perf_counter(), self.settings
        if not self.curves:
            self._validate()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.run)
        begun = self._start_of(self.run)
        losses, norms = self._windows(begun)
        self.run += 1
        numbers = {
            "meta_loss": _mean(losses),
            "last_window_loss": losses[-1] if losses else math.nan,
            "meta_gradient_norm": _mean(norms),
            "skipped_windows": math.ceil((settings.inner_steps - begun) / settings.unroll)
            - len(losses),
            "learning_rate": settings.rate(self.run - 1),
            "validation_loss": math.nan,
            "validation_end": math.nan,
        }
        if self.run % settings.runs_per_epoch == 0:
            numbers |= self._validate()
        return numbers | {"seconds": time.perf_counter() - begin}

    @property
    def epoch(self) -> int:
        return self.run // self.settings.runs_per_epoch

    def _start_of(self, run: int) -> int:
        """The number of steps that Adam takes in a run before the learned optimiser takes over."""
        settings = self.settings
        if not settings.random_start:
            return 0
        generator = seeded_generator(settings.seed, run, 3)
        return int(torch.randint(settings.inner_steps, (), generator=generator, device="cpu"))

    def _windows(self, begun: int) -> tuple[list[float], list[float]]:
        """Mean losses and meta-gradient norms of the run's windows, after `begun` steps of Adam."""
        settings, rows = self.settings, []
        trainings = self._started(self.run, self.team.share(settings.tasks))
        trainings = steps_of_adam(self.task.optimizee, trainings, begun, STARTING_RATE)
        estimate, waits = self._estimator(), self.calls.record is None
        ends = [*range(begun + settings.unroll, settings.inner_steps, settings.unroll)]
        sound = torch.ones_like(trainings.theta[0, 0], dtype=torch.bool)
        for first, end in pairwise([begun, *ends, settings.inner_steps]):
            window = estimate(trainings, end - first)
            loss, mean_loss, *gradient = self._pooled(window)
            norm = torch.nn.utils.get_total_norm(gradient)
            sound = sound & loss.isfinite() & norm.square().isfinite()
            rows.append(torch.stack([sound.to(loss), loss, mean_loss, norm]))
            if waits and not sound:
                break
            for p, g in zip(self.network.parameters(), gradient, strict=True):
                p.grad = g
            if waits:
                self.optimizer.step()
            else:
                self._step_if(sound)
            trainings = window.end
        return self._told(torch.stack(rows).tolist(), [*ends, settings.inner_steps])

    def _told(
        self, rows: Sequence[Sequence[float]], ends: Sequence[int]
    ) -> tuple[list[float], list[float]]:
        """Mean losses and gradient norms of the windows before the first that is not finite.

        rows: for each window, whether it is finite, its loss, mean loss and meta-gradient's norm.
        ends: the step at which each window ends.
        """
        finite = [row for row in rows if row[0]]
        if len(finite) < len(rows):
            _, loss, _, norm = rows[len(finite)]
            self.warn(
                f"run {self.run + 1}, step {ends[len(finite)]}: loss {loss:g}, "
                f"meta-gradient {norm:g}; the run ends here"
            )
            if self.calls.record is not None:
                for state in self.optimizer.state.values():
                    state["step"] -= len(rows) - len(finite)  # those that changed nothing
        return [row[2] for row in finite], [row[3] for row in finite]

    @torch.no_grad()
    def _step_if(self, sound: Tensor) -> None:
        """One step of Adam, except for its count undone if not `sound`; the host doesn't wait."""
        weights = list(self.network.parameters())
        before = [p.clone() for p in weights]
        moments = [
            self.optimizer.state[p].get(name, torch.zeros_like(p)).clone()
            for p in weights
            for name in MOMENTS
        ]
        self.optimizer.step()
        after = [*weights, *(self.optimizer.state[p][name] for p in weights for name in MOMENTS)]
        for new, old in zip(after, [*before, *moments], strict=True):
            new.copy_(torch.where(sound, new, old))

    def _pooled(self, window: WindowGradient) -> list[Tensor]:
        """The window's loss, mean loss and meta-gradient, over the trainings of the whole team."""
        mine = [window.loss, window.losses.mean(), *window.gradient]
        if self.team.count == 1:
            return mine
        weight = window.losses.shape[1] / self.settings.tasks
        shares = self.team.gathered([weight * tensor.cpu() for tensor in mine])
        return [sum(parts).to(window.loss.device) for parts in zip(*shares, strict=True)]

    def _estimator(self) -> Callable[[Trainings, int], WindowGradient]:
        settings, noise = self.settings, seeded_generator(self.settings.seed, self.run, 2)
        fixed = {
            "network": self.network, "optimizee": self.task.optimizee, "calls": self.calls
        }  # fmt: skip
        if settings.estimator == "suffix_sum":
            estimate = partial(
                suffix_sum_gradient, coordinates=settings.coordinates, generator=noise
            )
        elif settings.estimator == "autograd":
            estimate = autograd_gradient
        else:
            strategies = strategies_gradient if settings.estimator == "es" else _Persistent()
            estimate = partial(
                strategies, sigma=settings.sigma, pairs=settings.pairs, generator=noise
            )
        return lambda trainings, steps: estimate(
            **fixed, trainings=trainings, steps=steps, window_loss=self.window_loss
        )

    def _started(self, run: int, numbers: Sequence[int]) -> Trainings:
        """The trainings of a run that have these numbers, from new parameters."""
        weights = next(self.network.parameters())
        optimizee, seed = self.task.optimizee, self.settings.seed
        theta = [
            optimizee.initial(seeded_generator(seed, run, k, 0), weights.dtype, weights.device)
            for k in numbers
        ]
        batches = [self.task.batches(seeded_generator(seed, run, k, 1)) for k in numbers]
        thetas = torch.stack([*map(optimizee.flat, theta)])
        return start(self.network, optimizee, thetas, batches)[0]

    def _validate(self) -> dict[str, float]:
        """Validate the current weights, and select them if they are the best so far."""
        validation = self.validate()
        judged = {
            "sum": validation.losses.sum(1).mean().item(),
            "end": validation.losses[:, -LAST_STEPS:].mean().item(),
        }
        loss = judged[self.settings.selection]
        if loss < self.best_loss:
            self.best, self.best_loss = copy.deepcopy(self.network.state_dict()), loss
            self.best_epoch = self.epoch
        self.curves.append(validation.losses.mean(0).cpu())
        for name, of_labels in (("update", validation.update), ("gradient", validation.gradient)):
            for label, values in of_labels.items():
                self.deviations.setdefault(f"{name}/{label}", []).append(values)
        return {"validation_loss": judged["sum"], "validation_end": judged["end"]}

    def validate(self) -> Validation:
        """Run the frozen optimiser on the validation runs, which are the same at each call."""
        settings, optimizee = self.settings, self.task.optimizee
        trainings, losses = self._started(VALIDATION, range(settings.validation_runs)), []
        deviations: dict[str, dict[str, list[Tensor]]] = {"update": {}, "gradient": {}}
        for first in range(0, settings.inner_steps, VALIDATION_WINDOW):
            steps = min(VALIDATION_WINDOW, settings.inner_steps - first)
            window = replayed_roll_out(self.network, optimizee, trainings, steps, self.calls)
            if self.symmetries:
                # Only the first network: the others would show much the same and cost more time
                tensors = trainings.theta, trainings.gradient, window.u, window.gradients
                found = self.calls("deviations", self._deviations_along, tensors)
                for name, of_labels in found.items():
                    for label, sizes in of_labels.items():
                        deviations[name].setdefault(label, []).append(sizes)
            trainings = window.end
            losses.append(window.losses.T)
        curves = [
            {label: torch.cat(sizes).cpu() for label, sizes in of_labels.items()}
            for of_labels in deviations.values()
        ]
        return Validation(torch.cat(losses, 1).nan_to_num(math.inf), *curves)

    def _deviations_along(
        self, theta: Tensor, g: Tensor, u: Tensor, gradients: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """Deviations of the first training's "update" and "gradient" by label, [T] each.

        theta, g: parameters [K, n] and their gradient before the first step.
        u, gradients: [T, K n] and [T, K, n], as in a Rollout.
        """
        optimizee, found = self.task.optimizee, {"update": {}, "gradient": {}}
        for step, after in zip(u.view_as(gradients), gradients, strict=True):
            at = optimizee.unflat(theta[0])
            for name, v in (("update", -self.network.out_mul * step), ("gradient", g)):
                sizes = mean_deviations(self.symmetries, optimizee.unflat(v[0]), at)
                for label, size in sizes.items():
                    found[name].setdefault(label, []).append(size)
            theta, g = torch.add(theta, step, alpha=self.network.out_mul), after
        return {
            name: {label: torch.stack(sizes) for label, sizes in of_labels.items()}
            for name, of_labels in found.items()
        }

    def select(self) -> None:
        """Replace the weights of the network by the best ones."""
        self.network.load_state_dict(self.best)

    def state_dict(self) -> dict:
        """Everything that a resumed meta-training needs, in plain containers of tensors."""
        return {
            "run": self.run,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "curves": self.curves,
            "deviations": self.deviations,
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume meta-training from the result of `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.run, self.curves = state["run"], list(state["curves"])
        self.best = copy.deepcopy(state["best"])
        self.best_loss, self.best_epoch = state["best_loss"], state["best_epoch"]
        self.deviations = {name: list(values) for name, values in state["deviations"].items()}


class _Persistent:
    """persistent_gradient, which passes its perturbations on to the next window of the run."""

    def __init__(self) -> None:
        self.pairs = None

    def __call__(self, **arguments) -> WindowGradient:
        window, self.pairs = persistent_gradient(persistent=self.pairs, **arguments)
        return window


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
