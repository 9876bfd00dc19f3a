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

Reverse takes the tasks of a meta-step one by one, or `together` as one batched training, in which
the tensors of params, batches and hyperparameters have a leading dimension for the tasks.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

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
from kernels.recorded_updates import RecordedUpdates, Recording
from learning_rules import LearningRule
from models_fully_local import Params, TaskError, of_task, over_tasks
from train import (
    MEMORY_LIMIT,
    METHOD,
    START,
    AdjointLimit,
    Draw,
    TaskAdjointLimit,
    Training,
    TrainingError,
    hold_task_adjoint,
    train_on_the_way,
)


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

    def one_by_one(self, training: Training) -> str:
        """Why tasks of this training are done one by one; "" if `together` takes them."""
        if training.models is not None:
            return "each task draws its model"
        if any(name.startswith("batches.") for name in training.hyperparameters):
            return "the batches have parameters that are learned"
        try:
            over_tasks(training.model)
        except TaskError as problem:
            return str(problem)
        return training.rule.one_by_one()

    def together(
        self, training: Training, draws: Sequence[Draw], recorder: "Recorder | None" = None
    ) -> list[Hypergradient | FloatingPointError]:
        """The hypergradients of several draws in one batched training; for some, why there is none.

        They are those of single draws up to rounding. Only where `one_by_one` returns "".

        recorder: with it, updates are recorded once and replayed, whatever `memory` is; raises
            RecordingError if they cannot be.
        """
        tasks = _Tasks(training, draws)
        if not tasks.draws:
            return tasks.hypergradients()
        times = [_evenly_spaced(draw.steps, self.loss_times) for draw in tasks.draws]
        ends = sorted({end for of_task in times for end in of_task})
        if recorder is not None:
            passed = recorder.train(training, tasks, ends, self.adjoint_limit)
        else:
            limit = None if self.adjoint_limit is None else TaskAdjointLimit(self.adjoint_limit)
            passed = train_on_the_way(
                over_tasks(training.model), tasks.start, tasks.batches(), tasks.rule, ends,
                memory=self.memory, memory_limit=self.memory_limit, adjoint_limit=limit,
            )  # fmt: skip
        tasks.judge(dict(zip(ends, passed, strict=True)), times)
        return tasks.hypergradients()

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
        before = _with_all_entries(before, maps[0], hparams)
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
        before = _with_all_entries(before, update, hparams)
        theta, loss = _without_graph(update, before, hparams), _RecordedLoss(training, draw)
        gradient, _ = implicit(theta, hparams, update, loss, FixedPoint(self.K), set_grad=False)
        return Hypergradient(gradient, theta, loss.mean_numbers())


@dataclass(frozen=True)
class Forward:
    """Forward mode: the memory of one update, a time proportional to the hyperparameters' number.

    All rules here have it, in operations of torch alone where reverse mode has faster ones; a rule
    of your own must consist of such operations. Equilibria have none and are refused.
    """

    reaches = ("rule", "initializer")

    def __call__(self, training: Training, draw: Draw) -> Hypergradient:
        start, batches = start_map(training, draw)
        updates, hparams = update_maps(training, batches, draw.steps), _values(training)

        def first(_: Params, psi: Sequence[Tensor]) -> Params:
            # with the first update, before which the rule has no state
            return updates[0](start([], psi), psi)

        loss, params = _RecordedLoss(training, draw), _without_graph(first, [], hparams)
        gradient = forward_mode(params, hparams, [first, *updates[1:]], loss, set_grad=False)
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


class _Tasks:
    """Draws of one training as one, the longest first, and what has become of each.

    Hyperparameters are leaves [tasks, ...] of their own, so that the gradient of the sum of all
    losses by them is the hypergradient of each task.

    Attributes:
        draws: in the order of the tasks here.
        start: the parameters before the first update, leaves [tasks, ...].
        rule: updates parameters [tasks, ...] by those leaves.
    """

    def __init__(self, training: Training, draws: Sequence[Draw]) -> None:
        self.training, self.failed = training, {}
        self._given = [*draws]
        begun, self._initializers = {}, []
        for number in sorted(range(len(draws)), key=lambda k: -draws[k].steps):
            own = _InitializerOfTask(training.initializer)
            try:
                begun[number] = replace(training, initializer=own).begin(draws[number])
                self._initializers.append(own)
            except FloatingPointError as problem:
                self.failed[number] = problem
        self.numbers, self.draws = [*begun], [draws[number] for number in begun]
        self._drawn, self._streams = [p for p, _ in begun.values()], [b for _, b in begun.values()]
        self.start = _joined(self._drawn, _leaf)
        self.psi = {name: _leaf([p] * len(begun)) for name, p in training.rule.named_parameters()}
        self.rule = _RuleOfTasks(training.rule, self.psi)
        self._losses: list[list[Tensor]] = [[] for _ in begun]
        self._rows: list[list[dict[str, float]]] = [[] for _ in begun]
        self._last: list[Params] = [[] for _ in begun]

    def batches(self, all_go_on: bool = False) -> Iterator:
        """The batches of the tasks that go on, or of all, stacked, [tasks, batch, ...]."""
        together = getattr(self._streams[0], "of_tasks", None) or _stacked
        for step, batch in zip(range(self.draws[0].steps), together(self._streams), strict=False):
            going = sum(all_go_on or draw.steps > step for draw in self.draws)
            yield tree_map(lambda x, going=going: x[:going], batch)

    def parts(self) -> tuple[Iterator, Callable]:
        """What the batches of all tasks are made from, and the function that makes them.

        The house's own streams make theirs from a few numbers; other batches are themselves.
        """
        first = self._streams[0]
        if not hasattr(first, "parts_of_tasks"):
            return self.batches(all_go_on=True), _unchanged
        return itertools.islice(
            first.parts_of_tasks(self._streams), self.draws[0].steps
        ), first.make

    def with_all_entries(self, model: nn.Module, batch) -> Params:
        """`start`, with 0 for what the rule remembers since its first update."""
        # detached as within a recording, so that a compiled update is not compiled once more
        start = [{name: t.detach() for name, t in layer.items()} for layer in self.start]
        psi = {name: t.detach() for name, t in self.psi.items()}
        with torch.no_grad():
            after = _RuleOfTasks(self.training.rule, psi).update(model, start, batch)
        return _filled(self.start, after)

    def judge(self, passed: dict[int, Params], times: Sequence[Sequence[int]]) -> None:
        """Take the losses of all tasks, of each after its `times`; the first of all together.

        passed: the parameters by the number of updates that led to them.
        """
        for turn in range(max(map(len, times))):
            tasks = [k for k, ends in enumerate(times) if turn < len(ends)]
            draws = [replace(self.draws[k], steps=times[k][turn]) for k in tasks]
            reached = [of_task(passed[draw.steps], k) for k, draw in zip(tasks, draws, strict=True)]
            results = self.training.checked_outer_losses(_joined(reached, torch.stack), draws)
            for k, params, result in zip(tasks, reached, results, strict=True):
                self._last[k] = params
                if isinstance(result, FloatingPointError):
                    self.failed.setdefault(self.numbers[k], result)
                else:
                    self._losses[k].append(result[0])
                    self._rows[k].append(result[1])

    def hypergradients(self) -> list[Hypergradient | FloatingPointError]:
        """The result of each draw, in the order in which they were given."""
        sound = [k for k, number in enumerate(self.numbers) if number not in self.failed]
        results: dict[int, Hypergradient | FloatingPointError] = dict(self.failed)
        if sound:
            leaves = [t for t in (*self.psi.values(), *tree_leaves(self.start)) if t.requires_grad]
            total = sum(sum(self._losses[k]) / len(self._losses[k]) for k in sound)
            found = torch.autograd.grad(total, leaves, materialize_grads=True)
            by_leaf = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}
            of_initializers = self._through_the_start(sound, by_leaf)
            for k, of_initializer in zip(sound, of_initializers, strict=True):
                gradient = self._gradient(k, by_leaf, of_initializer)
                numbers = _means(self._rows[k])
                results[self.numbers[k]] = Hypergradient(gradient, self._last[k], numbers)
        return [results[number] for number in range(len(self._given))]

    def _through_the_start(
        self, tasks: Sequence[int], by_leaf: dict[int, Tensor]
    ) -> list[dict[str, Tensor]]:
        """The hypergradients of the initializer of each of these tasks, found all at once."""
        leaves = [[*self._initializers[k].leaves.values()] for k in tasks]
        pairs = [
            (drawn, by_leaf[id(leaf)][k])
            for k in tasks
            for drawn, leaf in zip(
                tree_leaves(self._drawn[k]), tree_leaves(self.start), strict=True
            )
            if drawn.requires_grad
        ]
        found = [torch.zeros_like(leaf) for of_task in leaves for leaf in of_task]
        if found and pairs:
            tensors, adjoints = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                tensors, [*itertools.chain(*leaves)], adjoints, materialize_grads=True
            )
        each = iter(found)
        return [{n: next(each) for n in self._initializers[k].leaves} for k in tasks]

    def _gradient(
        self, k: int, by_leaf: dict[int, Tensor], of_initializer: dict[str, Tensor]
    ) -> list[Tensor]:
        """The hypergradient of task k, from those of the leaves and of its initializer."""
        found = {f"initializer.{name}": g for name, g in of_initializer.items()}
        found |= {
            f"rule.{name}": by_leaf[id(leaf)][k]
            for name, leaf in self.psi.items()
            if leaf.requires_grad
        }
        return [found[name] for name in self.training.hyperparameters]


class _InitializerOfTask:
    """An initializer with leaves of its own for its trained parameters, of which it is a function.

    So one backward pass gives the gradients of several tasks.
    """

    def __init__(self, initializer: Callable[[nn.Module, Generator], Params]) -> None:
        self.initializer, self.leaves = initializer, {}
        if isinstance(initializer, nn.Module):
            named = initializer.named_parameters()
            self.leaves = {n: p.detach().requires_grad_() for n, p in named if p.requires_grad}

    def __call__(self, model: nn.Module, generator: Generator) -> Params:
        if not self.leaves:
            return self.initializer(model, generator)
        return functional_call(self.initializer, self.leaves, (model, generator))


class Recorder:
    """Keeps what has been recorded of the updates of trainings, from meta-step to meta-step.

    length: the updates of a recording.
    record: the kind of recording; None: that of the device.
    """

    def __init__(self, length: int = 10, record: type[Recording] | None = None) -> None:
        self.length, self.record = length, record
        self._recorded: dict[tuple, tuple[tuple[nn.Module, nn.Module], RecordedUpdates]] = {}

    def train(
        self, training: Training, tasks: _Tasks, ends: Sequence[int], adjoint_limit: float | None
    ) -> list[Params]:
        """The parameters after each of `ends` updates, of all tasks even where some are done."""
        batches, make = tasks.parts()
        batches = [*batches]
        if len(batches) < ends[-1]:
            raise TrainingError(
                f"the batches end after {len(batches)} updates; give an iterator that goes on"
            )
        start = tasks.with_all_entries(over_tasks(training.model), make(batches[0]))
        theta, spec = tree_flatten(start)
        of_batch = tree_flatten(batches[0])[1]
        updates = self._updates(training, tasks, spec, of_batch, make, adjoint_limit)
        state = []
        if adjoint_limit is not None:
            state = [t.new_zeros(len(t), dtype=torch.float64) for t in theta]
        psi, flat, passed = [*tasks.psi.values()], [*map(tree_leaves, batches)], []
        for begin, end in itertools.pairwise([0, *ends]):
            going = sum(draw.steps > begin for draw in tasks.draws)
            given = ([_of_first(t, going) for t in tensors] for tensors in (psi, theta))
            theta = updates(*given, flat[begin:end], state)
            passed.append(tree_unflatten(theta, spec))
        return passed

    def _updates(self, training, tasks, spec, of_batch, make, adjoint_limit) -> RecordedUpdates:
        """The recorded updates of a training, with parameters and batches of these structures.

        Batches are made within the updates, so that many need no memory.
        """
        owners = training.model, training.rule
        key = (*map(id, owners), str(spec), str(of_batch), make, adjoint_limit)
        if key not in self._recorded:
            model, names = over_tasks(training.model), [*tasks.psi]

            def update(psi, theta, batch) -> list[Tensor]:
                with torch.no_grad():
                    made = make(tree_unflatten(batch, of_batch))
                given = (model, tree_unflatten(theta, spec), made)
                named = dict(zip(names, psi, strict=True))
                return tree_leaves(functional_call(training.rule, named, given))

            def hold(adjoints, norms) -> tuple[list[Tensor], list[Tensor]]:
                pairs = zip(adjoints, norms, strict=True)
                held = [hold_task_adjoint(adjoint_limit, *pair) for pair in pairs]
                return [a for a, _ in held], [n for _, n in held]

            held = None if adjoint_limit is None else hold
            updates = RecordedUpdates(update, self.length, held, self.record)
            self._recorded[key] = owners, updates  # the owners, whose ids are then their own
        return self._recorded[key][1]


@dataclass(frozen=True)
class _RuleOfTasks:
    """A rule whose hyperparameters are psi [tasks, ...], for the first tasks as many as a batch."""

    rule: LearningRule
    psi: dict[str, Tensor]

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        count = len(tree_leaves(batch)[0])

        def first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: t if len(t) == count else t[:count] for n, t in tensors.items()}

        given = (model, [first(layer) for layer in params], batch)
        return functional_call(self.rule, first(self.psi), given)


def _stacked(streams: Sequence[Iterator]) -> Iterator:
    """The next batches of several streams, stacked; those that come again are stacked once."""
    stacked: dict[tuple[int, ...], tuple] = {}
    while True:
        batches = [next(stream, None) for stream in streams]
        if any(batch is None for batch in batches):
            return
        key = tuple(map(id, tree_leaves(batches)))
        if key not in stacked:  # with the batches, whose ids are then not given to others
            stacked[key] = batches, tree_map(lambda *x: torch.stack(x), *batches)
        yield stacked[key][1]


def _unchanged(batch):
    return batch


def _joined(tasks: Sequence[Params], join: Callable[[list[Tensor]], Tensor]) -> Params:
    """The parameters [tasks, ...] of tasks that `join` has made one tensor each."""
    return [
        {name: join([layer[name] for layer in layers]) for name in layers[0]}
        for layers in zip(*tasks, strict=True)
    ]


def _of_first(tensor: Tensor, count: int) -> Tensor:
    """A tensor [tasks, ...] whose gradient is that of the first tasks, also if others' is nan."""
    if count == len(tensor):
        return tensor
    return torch.cat([tensor[:count], tensor[count:].detach()])


def _leaf(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked, as a leaf that asks for its gradient if one of them does."""
    wanted = any(t.requires_grad for t in tensors)
    return torch.stack([t.detach() for t in tensors]).requires_grad_(wanted)


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


def _with_all_entries(params: Params, update: UpdateMap, hparams: Sequence[Tensor]) -> Params:
    """The params, with 0 for what the rule remembers since its first update, this one."""
    return _filled(params, _without_graph(update, params, hparams))


def _filled(params: Params, after: Params) -> Params:
    """The params, with 0 for the entries that they lack and those after an update have."""
    return [
        {name: old.get(name, torch.zeros_like(t)) for name, t in new.items()}
        for old, new in zip(params, after, strict=True)
    ]


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
        return _means(self._rows)


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _evenly_spaced(steps: int, times: int) -> list[int]:
    """1/times, 2/times, ... of the steps, rounded up; each number only once."""
    return sorted({-(-steps * k // times) for k in range(1, times + 1)})


def _values(training: Training) -> list[Tensor]:
    return list(training.hyperparameters.values())


@torch.no_grad()
def _without_graph(update: UpdateMap, params: Params, hparams: Sequence[Tensor]) -> Params:
    return update(params, hparams)
