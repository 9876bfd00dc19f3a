"""Methods for the hypergradient of a training: N updates, then the loss, then its derivative.

    method      what it differentiates                                  reaches     memory
    Reverse     all updates                                             all         see --memory
    Truncated   the last K updates                                      no start    see --memory
    LookBack    the last K - 1 updates (K terms), all at theta_{N-1}    the rule    one update
    Implicit    theta_N as a fixed point of the last update             the rule    one update
    Forward     all updates, one direction per hyperparameter           no batches  one update
    Strategies  nothing: losses at randomly perturbed hyperparameters   no batches  none
    Persistent  nothing: the same, for trainings window by window       no batches  none

Hyperparameters belong to the rule, to the initial distribution (the start) or to the batches. The
gradient of a method is 0 for those that it doesn't reach. A learning rule with its batches is
treated as a list of update maps, as in hypergradients/methods.py.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from experiment.meta_settings import MetaSettings
from hypergradients import (
    FixedPoint,
    Pairs,
    UpdateMap,
    evolution_strategies,
    forward_mode,
    implicit,
    neumann_lookback,
    persistent_evolution_strategies,
)
from models_fully_local import Params
from train import MEMORY_LIMIT, METHOD, START, AdjointLimit, Draw, Training, train_on_the_way


@dataclass(frozen=True)
class Hypergradient:
    """The result of a method.

    gradient: a tensor for each of training.hyperparameters, in their order.
    params: the last parameters, from which training can go on.
    numbers: numbers to record: "meta_loss", then those of the outer loss; means if it was evaluated
        several times.
    """

    gradient: list[Tensor]
    params: Params
    numbers: dict[str, float]


class MetaGradient(Protocol):
    """A method for the hypergradient.

    reaches: the modules whose gradient it gives, out of "rule", "initializer", "batches".
    """

    reaches: tuple[str, ...]

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        """The hypergradient of one draw of the training.

        Raises FloatingPointError if it is not finite, and HypergradientError if the method can't be
        used with the rule.
        """


@dataclass(frozen=True)
class Reverse:
    """Backpropagation through all updates.

    memory, memory_limit: as in `train`.
    adjoint_limit: the factor of an AdjointLimit, which biases the gradient; None: no limit.
    loss_times: k; the outer loss is the mean of the losses after 1/k, 2/k, ..., k/k of the
        differentiated updates.
    """

    memory: str = MetaSettings.memory
    memory_limit: int = MEMORY_LIMIT
    adjoint_limit: float | None = None
    loss_times: int = MetaSettings.loss_times
    reaches = ("rule", "initializer", "batches")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        params, batches = training.begin(draw)
        return self._through(training, draw, params, batches, draw.steps)

    def _through(
        self, training: Training, draw: Draw, params: Params, batches: Iterator, steps: int
    ) -> Hypergradient:
        """The hypergradient through the last `steps` updates, which begin at params."""
        limit = None if self.adjoint_limit is None else AdjointLimit(self.adjoint_limit)
        times = _evenly_spaced(steps, self.loss_times)
        passed = train_on_the_way(
            training.model, params, batches, training.rule, times,
            memory=self.memory, memory_limit=self.memory_limit, adjoint_limit=limit,
        )  # fmt: skip
        recorded = _RecordedLoss(training, draw)
        losses = [
            recorded.after(draw.steps - steps + done, theta)
            for done, theta in zip(times, passed, strict=True)
        ]
        loss, numbers, params = sum(losses) / len(losses), recorded.mean_numbers(), passed[-1]
        hparams = list(training.hyperparameters.values())
        gradient = torch.autograd.grad(loss, hparams, materialize_grads=True)
        return Hypergradient(list(gradient), params, numbers)


@dataclass(frozen=True)
class Truncated(Reverse):
    """Backpropagation through the last K updates; hyperparameters' earlier effects are ignored."""

    K: int = MetaSettings.K
    reaches = ("rule", "batches")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        last = min(self.K, draw.steps)
        params, batches = training.begin(draw)
        before = training.advance(params, batches, draw.steps - last)
        return self._through(training, draw, before, batches, last)


@dataclass(frozen=True)
class LookBack:
    """K terms of the Neumann series with the last K - 1 updates, all evaluated at theta_{N-1}."""

    K: int = MetaSettings.K
    reaches = ("rule",)

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        last = min(max(self.K - 1, 1), draw.steps)
        params, batches = training.begin(draw)
        before = training.advance(params, batches, draw.steps - last)
        maps, hparams = update_maps(training, batches, last), _values(training)
        for update in maps[:-1]:
            before = _without_graph(update, before, hparams)
        loss, terms = _RecordedLoss(training, draw), min(self.K, last + 1)
        gradient = neumann_lookback(before, hparams, terms, maps, loss, set_grad=False)
        return Hypergradient(
            gradient, _without_graph(maps[-1], before, hparams), loss.mean_numbers()
        )


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem at theta_N, with K iterations of the fixed-point solver.

    Valid if training has converged, so that the last update no longer changes theta. Raises
    DivergenceError if that update is no contraction.
    """

    K: int = MetaSettings.K
    reaches = ("rule",)

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        params, batches = training.begin(draw)
        before = training.advance(params, batches, draw.steps - 1)
        (update,), hparams = update_maps(training, batches, 1), _values(training)
        theta, loss = _without_graph(update, before, hparams), _RecordedLoss(training, draw)
        gradient, _ = implicit(theta, hparams, update, loss, FixedPoint(self.K), set_grad=False)
        return Hypergradient(gradient, theta, loss.mean_numbers())


@dataclass(frozen=True)
class Forward:
    """Forward mode: the memory of one update, a time proportional to the hyperparameters' number.

    It needs rules whose update consists of torch's own functions. Those of PolynomialRule have only
    a backward pass and are refused.
    """

    reaches = ("rule", "initializer")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        start, batches = start_map(training, draw)
        maps, hparams = [start, *update_maps(training, batches, draw.steps)], _values(training)
        loss, params = _RecordedLoss(training, draw), _without_graph(start, [], hparams)
        gradient = forward_mode(params, hparams, maps, loss, set_grad=False)
        return Hypergradient(gradient, loss.params, loss.mean_numbers())


@dataclass(frozen=True)
class Strategies:
    """Antithetic evolution strategies: `pairs` pairs of trainings, perturbed by `sigma`.

    Since no training is unperturbed, none can be continued: the params of the result are the start.
    """

    sigma: float = MetaSettings.sigma
    pairs: int = MetaSettings.pairs
    reaches = ("rule", "initializer")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        start, batches = start_map(training, draw)
        maps, hparams = [start, *update_maps(training, batches, draw.steps)], _values(training)
        loss, params = _RecordedLoss(training, draw), _without_graph(start, [], hparams)
        gradient = evolution_strategies(
            _with_state(maps, hparams), hparams, [_as_one(maps)], loss, self.sigma, self.pairs,
            draw.generator(METHOD), False,
        )  # fmt: skip
        return Hypergradient(gradient, params, loss.mean_numbers())


@dataclass(frozen=True)
class Persistent:
    """Persistent evolution strategies: a window of draw.steps updates of perturbed trainings.

    `pairs` pairs of trainings continue from the end of their last window, with a new perturbation
    of width `sigma` in each window; a draw without a start begins new ones. The gradients of a
    training's windows add up to that of the sum of its outer losses, one after each window, without
    truncation bias. The params of the result are those of all these trainings.
    """

    sigma: float = MetaSettings.sigma
    pairs: int = MetaSettings.pairs
    reaches = ("rule", "initializer")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        hparams, loss = _values(training), _RecordedLoss(training, draw)
        start, batches = start_map(training, draw)
        maps = update_maps(training, batches, draw.steps)
        if draw.start is None:
            maps = [start, *maps]
            pairs = Pairs.start(_with_state(maps, hparams), hparams, self.pairs)
        else:
            pairs = _unpacked(draw.start, self.pairs)
        gradient, pairs = persistent_evolution_strategies(
            pairs, hparams, [_as_one(maps)], loss, self.sigma, draw.generator(METHOD), False
        )
        return Hypergradient(gradient, _packed(pairs), loss.mean_numbers())


def _packed(pairs: Pairs) -> Params:
    """Pairs in the form of params, so that they can be kept, moved and saved like these.

    For each pair: the layers of both trainings, then a dict of the perturbations by number.
    """
    packed = []
    for above, below, noise in zip(pairs.above, pairs.below, pairs.perturbations, strict=True):
        packed += [*above, *below, {str(k): tensor for k, tensor in enumerate(noise)}]
    return packed


def _unpacked(packed: Params, count: int) -> Pairs:
    """The `count` pairs that `_packed` has packed."""
    size = len(packed) // count
    each = [packed[k * size : (k + 1) * size] for k in range(count)]
    layers = size // 2
    return Pairs(
        [one[:layers] for one in each],
        [one[layers:-1] for one in each],
        [list(one[-1].values()) for one in each],
    )


METHODS = {
    "reverse": Reverse,
    "truncated": Truncated,
    "lookback": LookBack,
    "implicit": Implicit,
    "forward": Forward,
    "es": Strategies,
    "pes": Persistent,
}


def make_method(settings: MetaSettings) -> MetaGradient:
    """The method that the settings name, with their options, or the one that they contain."""
    if not isinstance(settings.method, str):
        return settings.method
    chosen = METHODS[settings.method]
    options = {entry.name: getattr(settings, entry.name) for entry in fields(chosen)}
    if "memory_limit" in options:
        options["memory_limit"] = int(settings.memory_limit * 2**30)
    return chosen(**options)


# ---- update maps of (params, hparams), with hparams in the order of training.hyperparameters ----


def start_map(training: Training, draw: Draw) -> tuple[UpdateMap, Iterator]:
    """The map from any params to those before the first graded update, and the batches.

    The map is constant if the draw has a start or ungraded updates.
    """
    begun, batches = training.begin(draw)
    if draw.start is not None or draw.ungraded_steps:
        return lambda params, hparams: begun, batches

    def initial(params: Params, hparams: Sequence[Tensor]) -> Params:
        numbers = _of_module(training, "initializer", hparams)
        place = (training.model, draw.generator(START))
        drawn = functional_call(training.initializer, numbers, place)
        return training.drawn_anew(begun, drawn)

    return initial, batches


def update_maps(training: Training, batches: Iterator, steps: int) -> list[UpdateMap]:
    """The maps of the next `steps` updates."""

    def update(batch) -> UpdateMap:
        return lambda params, hparams: functional_call(
            training.rule,
            _of_module(training, "rule", hparams),
            (training.model, params, batch),
        )

    return [update(batch) for batch in itertools.islice(batches, steps)]


def _of_module(training: Training, name: str, hparams: Sequence[Tensor]) -> dict[str, Tensor]:
    """The `hparams` that belong to this module, by their names in it."""
    named = zip(training.hyperparameters, hparams, strict=True)
    return {n.removeprefix(f"{name}."): t for n, t in named if n.startswith(f"{name}.")}


def _as_one(maps: Sequence[UpdateMap]) -> UpdateMap:
    """The composition of the maps, without a graph."""

    def whole(params: Params, hparams: Sequence[Tensor]) -> Params:
        for update in maps:
            params = _without_graph(update, params, hparams)
        return params

    return whole


def _with_state(maps: Sequence[UpdateMap], hparams: Sequence[Tensor]) -> Params:
    """Params that include the rule's state, which exists only after its first update.

    Evolution strategies need maps whose params have the same structure before and after.

    maps: the map from any params to the initial parameters, then the updates.
    """
    return _as_one(maps[:2])([], hparams)


class _RecordedLoss:
    """The outer loss of a draw as a function of (params, hparams), with a record of its numbers.

    params: the parameters of the last evaluation.
    """

    def __init__(self, training: Training, draw: Draw) -> None:
        self.training, self.draw = training, draw
        self.params: Params = []
        self._rows: list[dict[str, float]] = []

    def __call__(self, params: Params, hparams: object) -> Tensor:
        return self.after(self.draw.steps, params)

    def after(self, steps: int, params: Params) -> Tensor:
        """The loss of the parameters after `steps` updates."""
        self.params = params
        draw = replace(self.draw, steps=steps)
        loss, numbers = self.training.checked_outer_loss(params, draw)
        self._rows.append(numbers)
        return loss

    def mean_numbers(self) -> dict[str, float]:
        """The means of the numbers over all evaluations."""
        count = len(self._rows)
        return {name: sum(row[name] for row in self._rows) / count for name in self._rows[0]}


def _evenly_spaced(steps: int, times: int) -> list[int]:
    """1/times, 2/times, ... of the steps, rounded up; each number only once."""
    return sorted({-(-steps * k // times) for k in range(1, times + 1)})


def _values(training: Training) -> list[Tensor]:
    return list(training.hyperparameters.values())


@torch.no_grad()
def _without_graph(update: UpdateMap, params: Params, hparams: Sequence[Tensor]) -> Params:
    return update(params, hparams)
