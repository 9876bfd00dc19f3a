"""Hypergradient descent: the meta-loop that adapts a learning rule and an initializer.

    theta_0 ~ initializer(psi);   theta_{t+1} = rule(theta_t, psi, batch_t)
    psi <- psi - optimiser(d L(theta_N) / d psi)

One meta-step averages this hypergradient over `tasks` independent draws of theta_0 and batches,
each clipped, adds the penalties and makes one optimiser step. Every draw has generators of its own,
made from (seed, meta-step, task), so that a resumed run needs no generator's state, and that it
does not matter which process of a team works on which task.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from experiment.errors import NonFiniteError, WrongInputError
from experiment.precision import Products
from experiment.processes import ALONE, Team
from experiment.run_log import RunLog, finish_on_interrupt, read_metrics, run_to_end
from experiment.seeds import seeded_generator
from learning_rules import LearningRule
from meta_gradients import (
    MetaGradient,
    Reverse,
    Strategies,
    Task,
    check_finite,
    trained_hyperparameters,
)
from models_fully_local import Params
from train import detached, train

Schedule = float | Callable[[int], float]

OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}


class MetaError(WrongInputError):
    """What is wrong with the settings or the course of a meta-run, in one line."""


class OuterLoss(Protocol):
    """What the meta-loop minimises; raises FloatingPointError where it cannot be evaluated."""

    metrics: tuple[str, ...]  # the names of the numbers that come with the loss

    def __call__(
        self, model: nn.Module, params: Params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """A scalar loss attached to params, and the numbers to record beside it."""


@dataclass(frozen=True)
class MetaSettings:
    """Everything about the meta-loop that is a number or a choice.

    A schedule is a number or a function of the meta-step (from 0).
    """

    metasteps: int = 1000
    lr: float = 1e-5
    optimizer: str = "adam"
    warmup_steps: int = 0  # the rate rises linearly over these
    decay: str = "none"  # or "cosine": the rate falls to 0 at the last of the metasteps
    finetune_steps: int = 0  # further ones, at finetune_factor times the rate
    finetune_factor: float = 0.1
    inner_steps: int | Callable[[int], int] = 250  # differentiated through
    ungraded_steps: int = 0  # before them, not differentiated through: truncation
    tasks: int = 1
    reinitialize_every: int = 1  # in between, training goes on from the last parameters
    accumulate: bool = False  # one optimiser step per reinitialisation instead of per meta-step
    clip_norm: float | None = None  # of each task's hypergradient
    l1: Schedule = 0.0  # of the rule's coefficients
    l2: Schedule = 0.0
    sparsify_from: int | None = None  # from here on a coefficient that changes sign is removed
    average: float = 0.0  # decay of the running average of the coefficients; 0: the last ones
    nonfinite: str = "skip"  # or "stop"
    method: MetaGradient = field(default_factory=Reverse)
    products: str = (
        "float32"  # or less, for the training but not its outer loss: experiment/precision.py
    )
    seed: int = 0

    def check(self, initializer: nn.Module) -> None:
        """Raises MetaError where the settings contradict each other."""
        trains_initializer = any(p.requires_grad for p in initializer.parameters())
        if trains_initializer and (self.reinitialize_every > 1 or self.ungraded_steps):
            raise MetaError(
                "training the initializer needs reinitialisation at every meta-step and no "
                "ungraded steps; fix the initializer or leave both out"
            )
        if trains_initializer and not self.method.reaches_start:
            name = type(self.method).__name__.lower()
            raise MetaError(
                f"method {name} does not reach the initial distribution: fix the initializer, or "
                "take reverse, forward or es"
            )
        if isinstance(self.method, Strategies) and self.reinitialize_every > 1:
            raise MetaError("es needs reinitialisation at every meta-step: it ends in no training")
        if self.accumulate and self.reinitialize_every == 1:
            raise MetaError("accumulating gradients needs reinitialize_every of at least 2")
        if self.optimizer not in OPTIMIZERS:
            raise MetaError(f"optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        if self.nonfinite not in ("skip", "stop") or self.decay not in ("none", "cosine"):
            raise MetaError("nonfinite is skip or stop, decay is none or cosine")
        if min(self.tasks, self.reinitialize_every) < 1:
            raise MetaError("tasks and reinitialize_every are at least 1")
        if not 0 <= self.average < 1:
            raise MetaError(f"average {self.average:g}: a decay must be at least 0 and below 1")

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


def rising_steps(initial: int, raise_by: int, raise_every: int, maximum: int) -> Callable:
    """The schedule of inner steps: `initial`, more by raise_by every raise_every, capped."""
    return lambda metastep: min(maximum, initial + raise_by * (metastep // raise_every))


@dataclass(frozen=True)
class TaskOutcome:
    """What one task contributes to a meta-step: a hypergradient and its numbers, or a problem."""

    task: int
    hypergradient: list[Tensor] | None
    numbers: dict[str, float]
    problem: str = ""


class HypergradientDescent:
    """The state of a meta-run; `step` makes one meta-step and returns its row of numbers.

    make_model() -> model, make_batches(generator) -> iterator of batches,
    initializer(model, generator) -> params, warn(text) for each task that is left out. The tasks
    are spread over the processes of `team`; every process makes the same steps.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        rule: LearningRule,
        initializer: nn.Module,
        make_batches: Callable[[torch.Generator], Iterator],
        outer_loss: OuterLoss,
        settings: MetaSettings,
        warn: Callable[[str], None] = warnings.warn,
        team: Team = ALONE,
    ) -> None:
        settings.check(initializer)
        self.warn, self.team = warn, team
        self.make_model, self.make_batches = make_model, make_batches
        self.rule, self.initializer = rule, initializer
        self.outer_loss, self.settings = outer_loss, settings
        self.metastep = 0
        self.carried: list[Params | None] = [None] * settings.tasks
        self.removals: list[dict[str, Tensor]] = []
        self.average = {name: p.detach().clone() for name, p in self._trained().items()}
        self._start_optimizer()

    def _trained(self) -> dict[str, nn.Parameter]:
        return trained_hyperparameters(self.rule, self.initializer)

    def _start_optimizer(self) -> None:
        trained = list(self._trained().values())
        self.optimizer = OPTIMIZERS[self.settings.optimizer](trained, self.settings.lr)
        self.pending, self.collected = [torch.zeros_like(p) for p in trained], 0

    # ---- one meta-step ----

    def step(self) -> dict[str, float]:
        """One meta-step; returns the numbers seen before the update. Raises NonFiniteError."""
        begin, settings = time.perf_counter(), self.settings
        inner_steps = settings.inner_steps
        steps = inner_steps(self.metastep) if callable(inner_steps) else inner_steps
        done = self._outcomes_of_all_tasks(steps)
        names = ("meta_loss", *self.outer_loss.metrics)
        row = {name: _mean([outcome.numbers[name] for outcome in done]) for name in names}
        row.update(
            hypergradient_norm=self._collect([outcome.hypergradient for outcome in done]),
            skipped_tasks=settings.tasks - len(done),
            inner_steps=steps,
            learning_rate=settings.rate(self.metastep),
        )
        last_before_restart = (self.metastep + 1) % settings.reinitialize_every == 0
        if self.collected and (last_before_restart or not settings.accumulate):
            self._update()
        self.metastep += 1
        return row | {"seconds": time.perf_counter() - begin}

    def _outcomes_of_all_tasks(self, steps: int) -> list[TaskOutcome]:
        """Those that came to a finite end, in the order of the tasks. Raises NonFiniteError."""
        own = [self._outcome(task, steps) for task in self.team.share(self.settings.tasks)]
        outcomes = [outcome for share in self.team.gathered(own) for outcome in share]
        outcomes.sort(key=lambda outcome: outcome.task)
        for outcome in outcomes:
            if outcome.problem:
                self.carried[outcome.task] = None
                where = f"meta-step {self.metastep + 1}, {outcome.problem}"
                if self.settings.nonfinite == "stop":
                    raise NonFiniteError(where)
                self.warn(f"{where}; this task is left out")
        return [outcome for outcome in outcomes if not outcome.problem]

    def _outcome(self, task: int, steps: int) -> TaskOutcome:
        try:
            gradient, numbers = self._run_task(task, steps)
        except FloatingPointError as problem:
            return TaskOutcome(task, None, {}, f"task {task}, {problem}")
        return TaskOutcome(task, [g.cpu() for g in gradient], numbers)

    def _run_task(self, number: int, steps: int) -> tuple[list[Tensor], dict[str, float]]:
        """The hypergradient of one draw of initial parameters and batches, and its numbers."""
        with Products(self.settings.products) as products:
            task = self._draw_task(number, steps, products)
            gradient, theta = self.settings.method(task)
        for name, g in zip(self._trained(), gradient, strict=True):
            # The optimiser squares it: what overflows then is as bad as what is not finite now.
            check_finite(g.square(), f"hypergradient of {name}")
        self.carried[number] = detached(theta)
        return gradient, task.numbers()

    def _draw_task(self, number: int, steps: int, products: Products) -> Task:
        settings, draw = self.settings, (self.settings.seed, self.metastep, number)
        model = self.make_model()

        def judge(params: Params) -> tuple[Tensor, dict[str, float]]:
            with products.exact():
                return self.outer_loss(model, params, seeded_generator(*draw, 2))

        batches = self.make_batches(seeded_generator(*draw, 1))
        task = Task(
            model, self.rule, self.initializer, batches, steps,
            judge=judge,
            draw_start=lambda: seeded_generator(*draw, 0),
            generator=seeded_generator(*draw, 3),
            start=self.carried[number] if self.metastep % settings.reinitialize_every else None,
        )  # fmt: skip
        if task.start is None and settings.ungraded_steps:
            task.start = task.advanced(task.initial(), settings.ungraded_steps)
        return task

    def _collect(self, gradients: list[list[Tensor]]) -> float:
        """Adds the mean of the clipped hypergradients to what is pending; their mean norm."""
        norms = [torch.nn.utils.get_total_norm(gradient).item() for gradient in gradients]
        for gradient, norm in zip(gradients, norms, strict=True):
            scale = 1.0 / len(gradients)
            if self.settings.clip_norm is not None:
                scale *= min(1.0, self.settings.clip_norm / max(norm, 1e-30))
            there = [g.to(p.device) for g, p in zip(gradient, self.pending, strict=True)]
            torch._foreach_add_(self.pending, there, alpha=scale)
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
        """A step of the optimiser, none where what it takes or gives is not finite."""
        where, trained = f"meta-step {self.metastep + 1}", self._trained()
        for name, p in trained.items():
            check_finite(p.grad.square(), f"{where}, hypergradient and penalties of {name}")
        old = [p.detach().clone() for p in trained.values()]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        try:
            for name, p in trained.items():
                check_finite(p.detach(), f"{where}, {name} after a step at rate {rate:g}")
        except NonFiniteError:
            for p, value in zip(trained.values(), old, strict=True):
                p.data.copy_(value)
            raise

    def _add_penalties(self, width: float) -> None:
        """Adds the gradients of l1 sqrt(psi^2 + width^2) + l2/2 psi^2 for the rule's coefficients.

        Adam moves by about the learning rate however small a gradient is; an L1 norm that is
        rounded off over this width lets it come to rest at 0.
        """
        l1, l2 = (
            s(self.metastep) if callable(s) else s for s in (self.settings.l1, self.settings.l2)
        )
        for p in self.rule.parameters():
            if p.requires_grad and (l1 or l2):
                psi = p.detach()
                rounded = (psi.square() + width**2).sqrt().clamp_min(1e-30)
                p.grad += l1 * psi / rounded + l2 * psi

    def _update_average(self) -> None:
        decay = min(self.settings.average, (self.metastep + 1) / (self.metastep + 10))
        for name, p in self._trained().items():
            self.average[name].lerp_(p.detach(), 1 - decay)

    def _remove_terms_that_changed_sign(self, before: dict[str, Tensor]) -> None:
        keep = {n: before[n] * p.detach() >= 0 for n, p in self.rule.named_parameters()}
        if all(mask.all() for mask in keep.values()):
            return
        names, old = list(self._trained()), self.optimizer.state_dict()
        self.rule.keep(keep)
        self.removals.append(keep)
        self._start_optimizer()
        for number, name in enumerate(names):
            kind, _, parameter = name.partition(".")
            if kind == "rule" and number in old["state"]:
                mask, state = keep[parameter], old["state"][number]
                old["state"][number] = {
                    key: v[mask] if v.shape == mask.shape else v for key, v in state.items()
                }
                self.average[name] = self.average[name][mask]
        self.optimizer.load_state_dict(old)

    # ---- state ----

    def use_average(self) -> None:
        """Puts the running averages in the place of the last values, for good."""
        with torch.no_grad():
            for name, p in self._trained().items():
                p.copy_(self.average[name])

    def state_dict(self) -> dict:
        """All that a resumed run needs, in plain containers of tensors; the same in every process,
        all of which must call it together.
        """
        return {
            "metastep": self.metastep,
            "removals": self.removals,
            "rule": self.rule.state_dict(),
            "initializer": self.initializer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "pending": self.pending,
            "collected": self.collected,
            "carried": self._carried_by_all(),
        }

    def _carried_by_all(self) -> list[Params | None]:
        """The parameters that go on to the next meta-step, of all tasks."""
        own = {task: self.carried[task] for task in self.team.share(self.settings.tasks)}
        carried = {k: v for share in self.team.gathered(own) for k, v in share.items()}
        return [carried[task] for task in range(self.settings.tasks)]

    def load_state_dict(self, state: dict) -> None:
        """Takes up a run where `state_dict` left it."""
        self.metastep, self.removals = state["metastep"], list(state["removals"])
        for keep in self.removals:
            self.rule.keep(keep)
        self.rule.load_state_dict(state["rule"])
        self.initializer.load_state_dict(state["initializer"])
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


def hypgraddesc(
    make_model: Callable[[], nn.Module],
    rule: LearningRule,
    initializer: nn.Module,
    make_batches: Callable[[torch.Generator], Iterator],
    outer_loss: OuterLoss,
    settings: MetaSettings,
    log: RunLog,
    *,
    hyperparameters: Callable[[], dict[str, float]] = dict,
    checkpoint_every: int = 10,
    team: Team = ALONE,
) -> bool:
    """Runs the meta-loop, recording a row per meta-step; True when it came to its end.

    Goes on from the log's checkpoint if there is one. Ctrl-C ends it cleanly after the running
    meta-step. At the end the rule and the initializer hold their averages. hyperparameters() gives
    what to record beside the numbers of each meta-step. Every process of the team calls this.
    """
    descent = HypergradientDescent(
        make_model, rule, initializer, make_batches, outer_loss, settings, log.warn, team
    )
    columns = list(hyperparameters())
    saved = team.gathered(log.load_checkpoint())[0]
    if saved is not None:
        descent.load_state_dict(saved[1])
        log.say(f"going on from meta-step {descent.metastep}")
    total, shown = settings.total_steps, ("meta_loss", *outer_loss.metrics, "seconds")

    def step(number: int) -> tuple[dict[str, float], dict[str, float]]:
        values = hyperparameters()  # of before the update, as the numbers are
        try:
            row = descent.step()
        except NonFiniteError:
            log.save_checkpoint(descent.metastep, descent.state_dict())
            raise
        of_rule = {name: values.get(name, 0.0) for name in columns}
        return row | of_rule, {name: row[name] for name in shown}

    with log.progress(total, descent.metastep, "meta-step") as progress:
        finished = run_to_end(
            log, progress, range(descent.metastep + 1, total + 1), step, descent.state_dict,
            checkpoint_every=checkpoint_every, team=team,
        )  # fmt: skip
    descent.use_average()
    return finished


@torch.no_grad()
def evaluate(
    make_model: Callable[[], nn.Module],
    rule: LearningRule,
    initializer: nn.Module,
    make_batches: Callable[[torch.Generator], Iterator],
    outer_loss: OuterLoss,
    steps: int,
    draw: tuple[int, ...],
) -> tuple[dict[str, float], Params]:
    """Trains from one draw, named by non-negative integers, and judges the result.

    Returns the outer loss and its numbers, and the parameters.
    """
    model = make_model()
    start, order, outer = (seeded_generator(*draw, k) for k in range(3))
    params = train(model, initializer(model, start), make_batches(order), rule, steps, grad=False)
    check_finite(params, f"parameters after {steps} inner steps")
    loss, numbers = outer_loss(model, params, outer)
    return {"meta_loss": loss.item(), **numbers}, params


def evaluate_draws(
    log: RunLog, draws: int, judge: Callable[[int], tuple[dict[str, float], Params]]
) -> tuple[list[dict[str, float]], Params, bool]:
    """What judge(draw), as `evaluate`, says of each draw; what is not finite is left out.

    Returns the numbers, the last parameters, and False where Ctrl-C ended it before its time.
    """
    rows, params = [], []
    with (
        finish_on_interrupt() as interrupt,
        log.progress(draws, description="evaluation") as progress,
    ):
        while progress.done < draws and not interrupt.requested:
            try:
                row, params = judge(progress.done)
                rows.append(row)
            except FloatingPointError as problem:
                log.warn(f"evaluation {progress.done + 1}, {problem}; left out")
            progress.advance(rows[-1] if rows else None)
    return rows, params, progress.done == draws


def last_inner_steps(directory: str | Path, otherwise: int) -> int:
    """The inner steps of a run's last meta-step, `otherwise` where it has made none."""
    return int(read_metrics(directory).get("inner_steps", [otherwise])[-1])


def mean_and_deviation(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Of the values by this name, for results.json: the deviation is the population's; None where
    there are no values.
    """
    return {
        f"{name}_mean": float(np.mean(values)) if values else None,
        f"{name}_standard_deviation": float(np.std(values)) if values else None,
    }


def accuracy_text(results: Mapping[str, Any]) -> str:
    """For the screen, what `mean_and_deviation` says of test accuracies."""
    mean, deviation = (results[f"test_accuracy_{n}"] for n in ("mean", "standard_deviation"))
    return f"test accuracy {mean:.2%} +- {deviation:.2%}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
