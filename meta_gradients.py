"""Ways to the hypergradient of a task: train by a rule for N updates, judge, differentiate.

    method       what it differentiates                                   reaches the start   memory
    Reverse      all updates                                              yes   as --memory says
    Truncated    the last K updates                                       no    as --memory says
    LookBack     the last K updates, all of them at theta_{N-1}           no    one update
    Implicit     theta_N, taken for a fixed point of the last update      no    one update
    Forward      all updates, a direction for each hyperparameter         yes   one update
    Strategies   nothing: losses at randomly perturbed hyperparameters    yes   none

Whichever way: hyperparameters are those of the rule and of the initial distribution, and a learning
rule with its batches is a list of update maps as in hypergradients/methods.py. A method that does
not reach the start has no part of the gradient for the initial distribution.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiment.errors import NonFiniteError
from hypergradients import (
    FixedPoint,
    UpdateMap,
    evolution_strategies,
    forward_mode,
    implicit,
    neumann_lookback,
)
from learning_rules import LearningRule
from models_fully_local import Params
from train import MEMORY_LIMIT, train

Judge = Callable[[Params], tuple[Tensor, dict[str, float]]]


@dataclass
class Task:
    """One draw of initial parameters and batches, and what the parameters are judged by.

    draw_start(): a new generator of the initial parameters, the same at each call.
    generator: of what a method draws besides.
    judge(params): a loss attached to them, and numbers to record.
    start: parameters to go on from; else the initializer draws them.
    """

    model: nn.Module
    rule: LearningRule
    initializer: nn.Module
    batches: Iterator
    steps: int
    judge: Judge
    draw_start: Callable[[], torch.Generator]
    generator: torch.Generator
    start: Params | None = None
    seen: list[dict[str, float]] = field(default_factory=list)  # of every judgement

    @property
    def hyperparameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, named "rule. ..." and "initializer. ..."."""
        return trained_hyperparameters(self.rule, self.initializer)

    def initial(self) -> Params:
        """The parameters before the first update, attached to the initial distribution."""
        if self.start is not None:
            return self.start
        return self.initializer(self.model, self.draw_start())

    def advanced(self, params: Params, steps: int) -> Params:
        """The parameters after the next so many updates, without a graph. Raises NonFiniteError."""
        params = train(self.model, params, self.batches, self.rule, steps, grad=False)
        check_finite(params, f"parameters after {steps} inner steps")
        return params

    def loss(self, params: Params, _: object = None) -> Tensor:
        """The outer loss, also as a function of (params, hparams). Raises NonFiniteError."""
        check_finite(params, f"parameters after {self.steps} inner steps")
        value, numbers = self.judge(params)
        check_finite(value, "outer loss")
        self.seen.append({"meta_loss": value.item(), **numbers})
        return value

    def numbers(self) -> dict[str, float]:
        """The means of the numbers of all judgements."""
        count = len(self.seen)
        return {name: sum(row[name] for row in self.seen) / count for name in self.seen[0]}

    # ---- as update maps of (params, hparams), a list in the order of `hyperparameters` ----

    def begins(self, params: Params, hparams: Sequence[Tensor]) -> Params:
        """The map to the initial parameters, whatever params are."""
        if self.start is not None:
            return self.start
        own = self._own("initializer", hparams)
        return functional_call(self.initializer, own, (self.model, self.draw_start()))

    def maps(self, steps: int) -> list[UpdateMap]:
        """The next so many updates."""

        def update(batch) -> UpdateMap:
            return lambda params, hparams: functional_call(
                self.rule, self._own("rule", hparams), (self.model, params, batch)
            )

        return [update(batch) for batch in itertools.islice(self.batches, steps)]

    def _own(self, kind: str, hparams: Sequence[Tensor]) -> dict[str, Tensor]:
        named = zip(self.hyperparameters, hparams, strict=True)
        return {n.removeprefix(kind + "."): t for n, t in named if n.startswith(kind + ".")}


class MetaGradient(Protocol):
    """A way to the hypergradient; reaches_start: whether it has the part of the initializer."""

    reaches_start: bool

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        """The hypergradient, a tensor for each hyperparameter, and the last parameters.

        Raises FloatingPointError where there is none that is finite, and HypergradientError where
        the rule does not allow the method.
        """


@dataclass(frozen=True)
class Reverse:
    """Backpropagation through all updates; memory and memory_limit as in `train`."""

    memory: str = "fit"
    memory_limit: int = MEMORY_LIMIT
    reaches_start = True

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        return self._from(task, task.initial(), task.steps)

    def _from(self, task: Task, start: Params, steps: int) -> tuple[list[Tensor], Params]:
        theta = train(
            task.model, start, task.batches, task.rule, steps,
            memory=self.memory, memory_limit=self.memory_limit,
        )  # fmt: skip
        hparams = list(task.hyperparameters.values())
        found = torch.autograd.grad(task.loss(theta), hparams, allow_unused=True)
        pairs = zip(hparams, found, strict=True)
        return [torch.zeros_like(p) if g is None else g for p, g in pairs], theta


@dataclass(frozen=True)
class Truncated(Reverse):
    """Backpropagation through the last K updates; what hyperparameters did before is left out."""

    K: int = 20
    reaches_start = False

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        last = min(self.K, task.steps)
        start = task.advanced(task.initial(), task.steps - last)
        return self._from(task, start, last)


@dataclass(frozen=True)
class LookBack:
    """K terms of the Neumann series with the last updates, all of them at theta_{N-1}."""

    K: int = 20
    reaches_start = False

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        last = min(max(self.K - 1, 1), task.steps)
        before = task.advanced(task.initial(), task.steps - last)
        maps, hparams = task.maps(last), list(task.hyperparameters.values())
        for update in maps[:-1]:
            before = _without_graph(update, before, hparams)
        gradient = neumann_lookback(
            before, hparams, min(self.K, last + 1), maps, task.loss, set_grad=False
        )
        return gradient, _without_graph(maps[-1], before, hparams)


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem at theta_N, with K iterations of the fixed-point solver.

    Valid where training has converged, so that the last update changes nothing any more. Raises
    DivergenceError where that update is no contraction.
    """

    K: int = 20
    reaches_start = False

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        before = task.advanced(task.initial(), task.steps - 1)
        (update,), hparams = task.maps(1), list(task.hyperparameters.values())
        theta = _without_graph(update, before, hparams)
        solver = FixedPoint(self.K)
        return implicit(theta, hparams, update, task.loss, solver, set_grad=False)[0], theta


@dataclass(frozen=True)
class Forward:
    """Forward mode: memory of one update, time as many updates as there are hyperparameters.

    For rules whose update is made of torch's own functions: those of PolynomialRule have a backward
    pass only, and are refused.
    """

    reaches_start = True

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        hparams = list(task.hyperparameters.values())
        maps, theta = [task.begins, *task.maps(task.steps)], []

        def loss(params: Params, _: object) -> Tensor:
            theta.append(params)
            return task.loss(params)

        start = _without_graph(task.begins, [], hparams)
        gradient = forward_mode(start, hparams, maps, loss, set_grad=False)
        return gradient, theta[-1]


@dataclass(frozen=True)
class Strategies:
    """Antithetic evolution strategies: `pairs` pairs of trainings, perturbed by `sigma`.

    No training is unperturbed, so none can be gone on with: the start stands for the last params.
    """

    sigma: float = 1e-4
    pairs: int = 4
    reaches_start = True

    def __call__(self, task: Task) -> tuple[list[Tensor], Params]:
        hparams, maps = list(task.hyperparameters.values()), task.maps(task.steps)

        def whole(_: Params, perturbed: Sequence[Tensor]) -> Params:
            params = _without_graph(task.begins, [], perturbed)
            for update in maps:
                params = _without_graph(update, params, perturbed)
            return params

        start = _without_graph(task.begins, [], hparams)
        gradient = evolution_strategies(
            start, hparams, [whole], task.loss, self.sigma, self.pairs, task.generator, False
        )
        return gradient, start


METHODS = {
    "reverse": Reverse,
    "truncated": Truncated,
    "lookback": LookBack,
    "implicit": Implicit,
    "forward": Forward,
    "es": Strategies,
}


def trained_hyperparameters(rule: nn.Module, initializer: nn.Module) -> dict[str, nn.Parameter]:
    """Their parameters that require a gradient, named "rule. ..." and "initializer. ..."."""
    return {
        f"{kind}.{name}": p
        for kind, module in (("rule", rule), ("initializer", initializer))
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def check_finite(value: Tensor | Params, what: str) -> None:
    """Raises NonFiniteError where a tensor, or one of the parameters, is not finite."""
    tensors = [value] if isinstance(value, Tensor) else [t for d in value for t in d.values()]
    if not all(torch.isfinite(t).all() for t in tensors):
        raise NonFiniteError(f"{what}: not finite")


@torch.no_grad()
def _without_graph(update: UpdateMap, params: Params, hparams: Sequence[Tensor]) -> Params:
    return update(params, hparams)
