"""Hypergradient descent: the meta-loop that adapts a learning rule and an initializer.

    theta_0 ~ initializer(psi);   theta_{t+1} = rule(theta_t, psi, batch_t)
    psi <- psi - optimiser(d L(theta_N) / d psi)

A meta-step averages this hypergradient over `tasks` independent draws of theta_0 and batches, each
of them clipped, adds the penalties and makes one optimiser step. Every draw has its own generators,
seeded by (seed, meta-step, task), so that a resumed run needs no states of generators and results
do not depend on which process of a team computes which task.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn

from experiment.choices import DECAYS, NONFINITE
from experiment.errors import NonFiniteError, WrongInputError
from experiment.loop import finish_on_interrupt, run_steps
from experiment.meta_settings import Horizon, MetaSettings
from experiment.precision import Products
from experiment.processes import ALONE, Team
from experiment.run_log import MemoryLog, RunLog, SilentLog
from experiment.seeds import log_uniform_integer, seeded_generator
from kernels.recorded_updates import RecordingError
from meta_gradients import Hypergradient, Persistent, Recorder, Reverse, Strategies, make_method
from models_fully_local import Params
from train import (
    HORIZON,
    UNGRADED,
    Draw,
    OuterLoss,
    Training,
    all_finite,
    check_finite,
    detached,
    evaluate_training,
    judged,
)

OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
REACHED_BY = {  # what a module's hyperparameters are, and which methods compute their gradient
    "initializer": ("the initial distribution", "reverse, forward, es or pes"),
    "batches": ("the parameters of the batches", "reverse or truncated"),
}


class MetaError(WrongInputError):
    """The settings or the course of a meta-run are wrong; the message is one line."""


def check_settings(settings: MetaSettings, *trainings: Training) -> None:
    """Raises MetaError if the settings contradict each other or the trainings."""
    method = make_method(settings)
    trained = {name.split(".")[0] for name in trainings[0].hyperparameters}
    persistent = isinstance(method, Persistent)  # sees a training window by window
    goes_on = settings.reinitialize_every > 1 and not persistent
    if "initializer" in trained and (goes_on or settings.ungraded_steps):
        raise MetaError(
            "training the initializer needs reinitialisation at every meta-step and no "
            "ungraded steps; fix the initializer or leave both out"
        )
    for module, (what, others) in REACHED_BY.items():
        if module in trained and module not in method.reaches:
            name = type(method).__name__.lower()
            raise MetaError(
                f"method {name} does not reach {what}: fix the {module}, or take {others}"
            )
    if isinstance(method, Strategies) and settings.reinitialize_every > 1:
        raise MetaError("es needs reinitialisation at every meta-step: it ends in no training")
    if persistent and settings.sparsify_from is not None:
        raise MetaError("pes needs rules that keep all coefficients: remove none")
    if settings.reinitialize_every > 1 and any(training.models for training in trainings):
        raise MetaError("drawing the width of each task needs reinitialisation at every meta-step")
    if settings.tasks < len(trainings):
        raise MetaError(
            f"{len(trainings)} data sets need {len(trainings)} tasks or more, not {settings.tasks}"
        )
    if settings.accumulate and settings.reinitialize_every == 1:
        raise MetaError("accumulating gradients needs reinitialize_every of at least 2")
    if settings.optimizer not in OPTIMIZERS:
        raise MetaError(f"optimizer {settings.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
    if settings.nonfinite not in NONFINITE or settings.decay not in DECAYS:
        raise MetaError("nonfinite is skip or stop, decay is none or cosine")
    if min(settings.tasks, settings.reinitialize_every) < 1:
        raise MetaError("tasks and reinitialize_every are at least 1")
    if settings.stop_below is not None and not all(t.outer_loss.metrics for t in trainings):
        raise MetaError("stop_below needs an outer loss that tells an accuracy: leave it out")
    if not 0 <= settings.average < 1:
        raise MetaError(f"average {settings.average:g}: a decay must be at least 0 and below 1")


def rising_steps(initial: int, raise_by: int, raise_every: int, maximum: int) -> Horizon:
    """Inner steps that start at `initial` and grow by raise_by every raise_every meta-steps."""
    return lambda metastep, generator: min(maximum, initial + raise_by * (metastep // raise_every))


def random_steps(low: int, high: int) -> Horizon:
    """Inner steps drawn for each task from low to high, uniformly on a logarithmic scale."""
    return lambda metastep, generator: log_uniform_integer(low, high, generator)


def hypgraddesc(
    training: Training | Sequence[Training],
    settings: MetaSettings,
    log: RunLog | SilentLog | MemoryLog | None = None,
    *,
    hyperparameters: Callable[[], dict[str, float]] = dict,
    samples: Tensor | None = None,
    checkpoint_every: int = 10,
    team: Team = ALONE,
) -> "History":
    """Run the meta-loop, record a row per meta-step, and return the rows.

    The run continues from the log's checkpoint if there is one. Ctrl-C ends it cleanly after the
    current meta-step. At the end the hyperparameters are replaced by their running averages. Every
    process of the team calls this. Raises MetaError for wrong settings, and NonFiniteError if
    numbers that are not finite are to stop the run.

    log: None: no files are written.
    checkpoint_every: meta-steps between two checkpoints.

    The other arguments are those of HypergradientDescent.
    """
    log = MemoryLog() if log is None else log
    descent = HypergradientDescent(
        training, settings, log.warn, team=team, hyperparameters=hyperparameters, samples=samples
    )
    finished = run_steps(
        log, descent, "meta-step", settings.total_steps,
        shown=(*descent.names, "seconds"), checkpoint_every=checkpoint_every, team=team,
    )  # fmt: skip
    descent.use_average()
    return History(finished, log.history())


@dataclass(frozen=True)
class History:
    """The record of a meta-run.

    Attributes:
        finished: False if the run was interrupted.
        columns: an array [rows] for each number, such as "meta_loss"; "step" has the meta-steps.
            {} in processes of a team that do not write.
    """

    finished: bool
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class TaskOutcome:
    """The contribution of a task to a meta-step: a hypergradient and its numbers, or a problem."""

    task: int
    hypergradient: list[Tensor] | None
    numbers: dict[str, float]
    problem: str = ""


class HypergradientDescent:
    """The state of a meta-run; `step` makes one meta-step and returns its row of numbers.

    Raises MetaError if the settings contradict each other or the trainings.

    training: one or several. Several must share their hyperparameters: task k takes number k
        modulo their count, and the numbers of those that have a name are also recorded under it, as
        in "test_accuracy/fashion".
    warn: called with a message for each task that is left out.
    team: the processes that the tasks are distributed over; all of them make the same steps.
    hyperparameters: returns values to record with the numbers of each meta-step, as they were
        before the update. Values that are removed later are recorded as 0 from then on.
    samples: inputs [n, ...]. The outputs for them, of the first training's network as trained by
        the first task, are recorded as "output/<input>/<unit>"; nan if that task is left out.
    """

    def __init__(
        self,
        training: Training | Sequence[Training],
        settings: MetaSettings,
        warn: Callable[[str], None] = warnings.warn,
        *,
        team: Team = ALONE,
        hyperparameters: Callable[[], dict[str, float]] = dict,
        samples: Tensor | None = None,
    ) -> None:
        self.trainings = [training] if isinstance(training, Training) else list(training)
        check_shared(self.trainings)
        check_settings(settings, *self.trainings)
        self.method = make_method(settings)
        self.settings, self.warn, self.team = settings, warn, team
        self.hyperparameters, self.columns = hyperparameters, list(hyperparameters())
        self.samples = samples
        self.output_columns = [] if samples is None else list(self._outputs_at_start())
        self.metastep, self.stopped = 0, False
        self.alone: str | None = None  # why tasks are done one by one, once that is known
        self.recorder = Recorder() if self._on_gpu() else None
        self.carried: list[Params | None] = [None] * settings.tasks
        self.removals: list[dict[str, Tensor]] = []
        self.average = {name: p.detach().clone() for name, p in self._trained().items()}
        self._start_optimizer()

    @property
    def rule(self) -> nn.Module:
        """The rule that all trainings share."""
        return self.trainings[0].rule

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the outer loss's numbers, beginning with the loss."""
        return ("meta_loss", *self.trainings[0].outer_loss.metrics)

    @property
    def finished(self) -> bool:
        """Whether all meta-steps are done, or the accuracy was too low to continue."""
        return self.stopped or self.metastep >= self.settings.total_steps

    def _trained(self) -> dict[str, nn.Parameter]:
        return self.trainings[0].hyperparameters

    def _start_optimizer(self) -> None:
        trained = list(self._trained().values())
        self.optimizer = OPTIMIZERS[self.settings.optimizer](trained, self.settings.lr)
        self.pending, self.collected = [torch.zeros_like(p) for p in trained], 0

    # ---- one meta-step ----

    def step(self) -> dict[str, float]:
        """Make one meta-step and return its numbers, which were measured before the update.

        Raises NonFiniteError if no step can be made, or if a problem of a task is to stop the run.
        """
        seen, settings, begin = self.hyperparameters(), self.settings, time.perf_counter()
        done = self._outcomes_of_all_tasks()
        row = self._mean_numbers(done)
        row.update(
            hypergradient_norm=self._collect([outcome.hypergradient for outcome in done]),
            skipped_tasks=settings.tasks - len(done),
            inner_steps=_mean([self._inner_steps(k) for k in range(settings.tasks)]),
            learning_rate=settings.rate(self.metastep),
        )
        last_before_restart = (self.metastep + 1) % settings.reinitialize_every == 0
        if self.collected and (last_before_restart or not settings.accumulate):
            self._update()
        self.metastep += 1
        self._look_at_accuracy(row[self.names[-1]])
        row["seconds"] = time.perf_counter() - begin
        outputs = next((o.numbers for o in done if o.task == 0), {})
        row |= {name: outputs.get(name, math.nan) for name in self.output_columns}
        return row | {name: seen.get(name, 0.0) for name in self.columns}

    def _look_at_accuracy(self, accuracy: float) -> None:
        """End the run if the accuracy is below stop_below; nan does not end it."""
        least = self.settings.stop_below
        if least is not None and accuracy < least:
            self.stopped = True
            self.warn(
                f"meta-step {self.metastep}, {self.names[-1]} {accuracy:.4g} is below {least:g}: "
                "the last one"
            )

    def _mean_numbers(self, outcomes: list[TaskOutcome]) -> dict[str, float]:
        """Means over all tasks, and over the tasks of each named training."""
        row = {name: _mean([o.numbers[name] for o in outcomes]) for name in self.names}
        for part in dict.fromkeys(training.name for training in self.trainings if training.name):
            theirs = [o for o in outcomes if self._training(o.task).name == part]
            row |= {f"{n}/{part}": _mean([o.numbers[n] for o in theirs]) for n in self.names}
        return row

    def _training(self, task: int) -> Training:
        return self.trainings[task % len(self.trainings)]

    def _outcomes_of_all_tasks(self) -> list[TaskOutcome]:
        """The outcomes of tasks without a problem, in the order of the tasks.

        Raises NonFiniteError if a problem is to stop the run.
        """
        ours = self._outcomes(self.team.share(self.settings.tasks))
        outcomes = [outcome for share in self.team.gathered(ours) for outcome in share]
        outcomes.sort(key=lambda outcome: outcome.task)
        for outcome in outcomes:
            if outcome.problem:
                self.carried[outcome.task] = None
                where = f"meta-step {self.metastep + 1}, {outcome.problem}"
                if self.settings.nonfinite == "stop":
                    raise NonFiniteError(where)
                self.warn(f"{where}; this task is left out")
        return [outcome for outcome in outcomes if not outcome.problem]

    def _outcomes(self, tasks: Sequence[int]) -> list[TaskOutcome]:
        """The outcomes of these tasks, those of each training together or one by one."""
        if not self._together():
            return [self._outcome(task, self._hypergradient(task)) for task in tasks]
        outcomes = []
        for number in range(len(self.trainings)):
            some = [k for k in tasks if k % len(self.trainings) == number]
            several = len(some) > 1 or (some and self.recorder is not None)
            alone = map(self._hypergradient, some)
            results = self._hypergradients(some) if several else alone
            outcomes += [self._outcome(*pair) for pair in zip(some, results, strict=True)]
        return outcomes

    def _together(self) -> bool:
        """Whether tasks are computed together; says once why they are not although wanted."""
        wanted, on_cpu = self.settings.together, not self._on_gpu()
        idle = self.settings.tasks < 2 and self.recorder is None
        if idle or wanted == "never" or (wanted == "auto" and on_cpu):
            return False
        if self.alone is None:
            self.alone = self._why_alone()
            if self.alone:
                self.warn(f"tasks are done one by one: {self.alone}")
        return not self.alone

    def _on_gpu(self) -> bool:
        return any(p.device.type == "cuda" for p in self._trained().values())

    def _why_alone(self) -> str:
        """Why tasks are not computed together; "" if they can be."""
        if type(self.method) is not Reverse:
            return f"method {type(self.method).__name__.lower()} takes one task at a time"
        return next(filter(None, map(self.method.one_by_one, self.trainings)), "")

    def _hypergradients(self, tasks: Sequence[int]) -> list[Hypergradient | FloatingPointError]:
        """The hypergradients of several tasks of one training, computed together."""
        draws = [self._draw(task) for task in tasks]
        try:
            with self._exactly(self._training(tasks[0])) as training:
                results = self.method.together(training, draws, self.recorder)
        except RecordingError as problem:
            self.warn(f"updates are not replayed as a recording: {problem}")
            self.recorder = None
            return self._hypergradients(tasks)
        except torch.OutOfMemoryError:
            self.alone = "together they do not fit into the device's memory"
            self.warn(f"tasks are done one by one: {self.alone}")
            self.recorder = None
            return [self._hypergradient(task) for task in tasks]
        return [self._checked(result) for result in results]

    def _outcome(self, task: int, result: Hypergradient | FloatingPointError) -> TaskOutcome:
        if isinstance(result, FloatingPointError):
            return TaskOutcome(task, None, {}, f"task {task}, {result}")
        self.carried[task] = detached(result.params)
        outputs = {} if task else self._outputs(self.trainings[0].model, self.carried[task])
        gradient = [
            (g if size is None else g * size.to(g)).cpu()
            for g, size in zip(result.gradient, self._sizes(), strict=True)
        ]
        return TaskOutcome(task, gradient, result.numbers | outputs)

    def _outputs_at_start(self) -> dict[str, float]:
        model, generator = self.trainings[0].model, seeded_generator(self.settings.seed)
        return self._outputs(model, self.trainings[0].initializer(model, generator))

    def _outputs(self, model: nn.Module, params: Params) -> dict[str, float]:
        """The outputs for the samples, by column; {} without samples."""
        if self.samples is None:
            return {}
        with torch.no_grad(), judged(model):
            outputs = model(self.samples, params).flatten(1).tolist()
        return {
            f"output/{sample}/{unit}": value
            for sample, values in enumerate(outputs)
            for unit, value in enumerate(values)
        }

    def _hypergradient(self, task: int) -> Hypergradient | FloatingPointError:
        """The hypergradient of one draw of initial parameters and batches, or why there is none."""
        draw = self._draw(task)
        try:
            with self._exactly(self._training(task).with_drawn_model(draw)) as training:
                return self._checked(self.method(training, draw))
        except FloatingPointError as problem:
            return problem

    def _draw(self, task: int) -> Draw:
        """The draw of a task in this meta-step."""
        settings = self.settings
        return Draw(
            (settings.seed, self.metastep, task),
            self._inner_steps(task),
            self._drawn(settings.ungraded_steps, task, UNGRADED),
            self.carried[task] if self.metastep % settings.reinitialize_every else None,
        )

    @contextmanager
    def _exactly(self, training: Training) -> Iterator[Training]:
        """The training with exact products in its outer loss, within the precision of products."""
        with Products(self.settings.products) as products:
            yield replace(training, outer_loss=_ExactLoss(training.outer_loss, products))

    def _checked(
        self, result: Hypergradient | FloatingPointError
    ) -> Hypergradient | FloatingPointError:
        """The result, or an error if its gradient is not finite."""
        if isinstance(result, FloatingPointError):
            return result
        # The optimiser squares them, and the square may overflow.
        squares = [g.square() for g in result.gradient]
        if all_finite(squares):
            return result
        names = [n for n, s in zip(self._trained(), squares, strict=True) if not all_finite([s])]
        return NonFiniteError(f"hypergradient of {names[0]}: not finite")

    def _inner_steps(self, task: int) -> int:
        """The number of updates of this task in this meta-step."""
        return self._drawn(self.settings.inner_steps, task, HORIZON)

    def _drawn(self, steps: Horizon, task: int, purpose: int) -> int:
        """The value of a horizon for this task in this meta-step."""
        if not callable(steps):
            return steps
        return steps(
            self.metastep, seeded_generator(self.settings.seed, self.metastep, task, purpose)
        )

    def _sizes(self) -> list[Tensor | None]:
        """The unit in which each trained hyperparameter is measured; None for 1.

        Gradients, their norms and the optimiser's steps refer to hyperparameters in these units,
        which the rule chooses (LearningRule.step_sizes).
        """
        sizes = {f"rule.{name}": size for name, size in self.rule.step_sizes().items()}
        return [sizes.get(name) for name in self._trained()]

    def _collect(self, gradients: list[list[Tensor]]) -> float:
        """Add the mean of the clipped hypergradients to the pending ones; returns the mean norm."""
        norms = [torch.nn.utils.get_total_norm(gradient).item() for gradient in gradients]
        for gradient, norm in zip(gradients, norms, strict=True):
            scale = 1.0 / len(gradients)
            if self.settings.clip_norm is not None:
                scale *= min(1.0, self.settings.clip_norm / max(norm, 1e-30))
            moved = [g.to(p.device) for g, p in zip(gradient, self.pending, strict=True)]
            torch._foreach_add_(self.pending, moved, alpha=scale)
        self.collected += len(gradients)
        return _mean(norms)

    def _update(self) -> None:
        settings, trained = self.settings, self._trained()
        rate = settings.rate(self.metastep)
        for p, gradient in zip(trained.values(), self.pending, strict=True):
            p.grad = gradient.clone()
            gradient.zero_()
        self.collected = 0
        self._add_penalties(width=rate)
        before = {name: p.detach().clone() for name, p in self.rule.named_parameters()}
        self._make_step(rate)
        self._update_average()
        if settings.sparsify_from is not None and self.metastep >= settings.sparsify_from:
            self._remove_terms_that_changed_sign(before)

    def _make_step(self, rate: float) -> None:
        """Make a step of the optimiser; the hyperparameters are unchanged if it is not finite.

        Raises NonFiniteError if a gradient, or a hyperparameter after the step, is not finite.
        """
        where, trained = f"meta-step {self.metastep + 1}", self._trained()
        for name, p in trained.items():
            check_finite(p.grad.square(), f"{where}, hypergradient and penalties of {name}")
        old = [p.detach().clone() for p in trained.values()]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for size, p, start in zip(self._sizes(), trained.values(), old, strict=True):
            if size is not None:
                p.data.copy_(start + size.to(p) * (p.data - start))
        try:
            for name, p in trained.items():
                check_finite(p.detach(), f"{where}, {name} after a step at rate {rate:g}")
        except NonFiniteError:
            for p, value in zip(trained.values(), old, strict=True):
                p.data.copy_(value)
            raise

    def _add_penalties(self, width: float) -> None:
        """Add the gradients of l1 sqrt(psi^2 + width^2) + l2/2 psi^2 for the rule's coefficients.

        Adam moves by about the learning rate however small a gradient is. Smoothing the L1 norm
        over this width allows coefficients to come to rest at 0.
        """
        l1, l2 = (
            s(self.metastep) if callable(s) else s for s in (self.settings.l1, self.settings.l2)
        )
        entries, sizes = self.rule.entries_by_term(), self.rule.step_sizes()
        for name, p in self.rule.named_parameters():
            if entries.get(name) == name and p.requires_grad and (l1 or l2):
                psi = p.detach()
                rounded = (psi.square() + width**2).sqrt().clamp_min(1e-30)
                p.grad += sizes.get(name, 1.0) * (l1 * psi / rounded + l2 * psi)

    def _update_average(self) -> None:
        decay = min(self.settings.average, (self.metastep + 1) / (self.metastep + 10))
        for name, p in self._trained().items():
            self.average[name].lerp_(p.detach(), 1 - decay)

    def _remove_terms_that_changed_sign(self, before: dict[str, Tensor]) -> None:
        now, entries = dict(self.rule.named_parameters()), self.rule.entries_by_term()
        keep = {n: before[owner] * now[owner].detach() >= 0 for n, owner in entries.items()}
        if all(mask.all() for mask in keep.values()):
            return
        names, old = list(self._trained()), self.optimizer.state_dict()
        self.rule.keep(keep)
        self.removals.append(keep)
        self._start_optimizer()
        for number, name in enumerate(names):
            kind, _, parameter = name.partition(".")
            if kind == "rule" and parameter in keep and number in old["state"]:
                mask, state = keep[parameter], old["state"][number]
                old["state"][number] = {
                    key: v[mask] if v.shape == mask.shape else v for key, v in state.items()
                }
                self.average[name] = self.average[name][mask]
        self.optimizer.load_state_dict(old)

    # ---- state ----

    def use_average(self) -> None:
        """Replace the hyperparameters by their running averages."""
        with torch.no_grad():
            for name, p in self._trained().items():
                p.copy_(self.average[name])

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, in plain containers of tensors.

        It is the same in every process; all of them must call it together.
        """
        return {
            "metastep": self.metastep,
            "stopped": self.stopped,
            "alone": self.alone,
            "removals": self.removals,
            **{name: module.state_dict() for name, module in self.trainings[0].modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "pending": self.pending,
            "collected": self.collected,
            "carried": self._carried_by_all(),
        }

    def _carried_by_all(self) -> list[Params | None]:
        """The parameters of all tasks that the next meta-step continues from."""
        ours = {task: self.carried[task] for task in self.team.share(self.settings.tasks)}
        carried = {k: v for share in self.team.gathered(ours) for k, v in share.items()}
        return [carried[task] for task in range(self.settings.tasks)]

    def load_state_dict(self, state: dict) -> None:
        """Resume a run from the result of `state_dict`."""
        self.metastep, self.removals = state["metastep"], list(state["removals"])
        self.stopped = state.get("stopped", False)  # missing in older runs, as is the next
        self.alone = state.get("alone")
        for keep in self.removals:
            self.rule.keep(keep)
        for name, module in self.trainings[0].modules.items():
            module.load_state_dict(state[name])
        self._start_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.collected = state["collected"]
        for name, p in self._trained().items():
            self.average[name] = state["average"][name].to(p, copy=True)
        for pending, saved in zip(self.pending, state["pending"], strict=True):
            pending.copy_(saved)
        device = next(iter(self._trained().values())).device
        self.carried = [
            saved and [{n: t.to(device) for n, t in layer.items()} for layer in saved]
            for saved in state["carried"]
        ]


@dataclass(frozen=True)
class _ExactLoss:
    """An outer loss with exact matrix products, whatever the precision of the training's."""

    outer_loss: OuterLoss
    products: Products

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.outer_loss.metrics

    def __call__(
        self, model: nn.Module, params: Params, generator: Generator
    ) -> tuple[Tensor, dict[str, float]]:
        with self.products.exact():
            return self.outer_loss(model, params, generator)

    @property
    def of_tasks(self) -> Callable | None:
        """The outer loss of several tasks, with exact products; None if it has none."""
        many = getattr(self.outer_loss, "of_tasks", None)
        if many is None:
            return None

        def exactly(*arguments) -> tuple[Tensor, list[dict[str, float]]]:
            with self.products.exact():
                return many(*arguments)

        return exactly


def check_shared(trainings: Sequence[Training]) -> None:
    """Raises MetaError if the trainings of one meta-run do not share their hyperparameters."""
    first = trainings[0]
    for other in trainings[1:]:
        same = list(first.hyperparameters) == list(other.hyperparameters) and all(
            p is other.hyperparameters[name] for name, p in first.hyperparameters.items()
        )
        if not same or other.rule is not first.rule:
            raise MetaError(
                "the trainings of one meta-run have different hyperparameters: give all of them "
                "the same rule, the same initializer and batches with the same parameters"
            )


def evaluate_draws(
    log: RunLog, training: Training, draws: Sequence[Draw]
) -> tuple[list[dict[str, float]], Params, bool]:
    """The numbers of `evaluate_training` for each draw, the last parameters, and whether all ran.

    Draws that are not finite are left out with a warning. Ctrl-C ends the loop early.
    """
    rows, params = [], []
    with (
        finish_on_interrupt() as interrupt,
        log.progress(len(draws), description="evaluation") as progress,
    ):
        for number, draw in enumerate(draws, 1):
            if interrupt.requested:
                break
            try:
                row, params = evaluate_training(training, draw)
                rows.append(row)
            except FloatingPointError as problem:
                log.warn(f"evaluation {number}, {problem}; left out")
            progress.advance(rows[-1] if rows else None)
    return rows, params, progress.done == len(draws)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
