"""A training, that is, a learning rule applied many times, and everything that it consists of.

    training = Training(model, rule, initializer, batches, outer_loss)
    draw = Draw((seed, metastep, task), steps=250)
    numbers, params = evaluate_training(training, draw)

    params = train(model, params, batches, rule, steps)     # differentiable through all updates

For differentiation, the steps are divided into segments of equal length. The graph of the last one
is kept for the backward pass; of each other segment only the initial parameters are kept, and it
runs again when the backward pass reaches it. The memory policy sets the length of segments:

    keep       all steps: fastest, memory grows with every step
    fit        as many steps as fit into memory_limit bytes
    segments   sqrt(steps): memory of about 2 sqrt(steps) steps
    recompute  one step: memory of the parameters of all steps and of one step's graph

Going back through many updates of a rule that is no contraction, the adjoint dL / d theta_t grows
by orders of magnitude, and the hypergradient is noise. `AdjointLimit` bounds it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from experiment.choices import MEMORY
from experiment.errors import NonFiniteError, WrongInputError
from experiment.meta_settings import MetaSettings
from experiment.seeds import seeded_generator
from hypergradients.replays import Moment, another_result
from kernels.own_precision import own_precision
from learning_rules import LearningRule
from models_fully_local import Params, of_task, over_tasks

MEMORY_LIMIT = int(MetaSettings.memory_limit * 2**30)  # peak below 4 GB in main.py
# the purposes of a draw's random numbers
START, BATCHES, OUTER, METHOD, HORIZON, MODEL, POOL, UNGRADED = range(8)
WITH_HYPERPARAMETERS = ("rule", "initializer", "batches")


class TrainingError(WrongInputError):
    """A training that is not possible; the message is one line."""


class OuterLoss(Protocol):
    """The loss that judges a training; raises FloatingPointError if it cannot be evaluated.

    It may also have `of_tasks(model, params, generators)`, the same for several tasks at once: a
    model of `over_tasks`, params [tasks, ...]; it returns losses [tasks] and a list of numbers.
    """

    metrics: tuple[str, ...]  # the names of the numbers returned with the loss

    def __call__(
        self, model: nn.Module, params: Params, generator: Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """A scalar loss attached to params, and further numbers to record."""


@dataclass(frozen=True)
class Draw:
    """One draw of a training: its initial parameters, its batches, its number of updates.

    key: nonnegative integers such as (seed, meta-step, task). They seed a separate generator for
        each purpose of random numbers, so that nothing depends on what was drawn before.
    steps: the number of updates that the outer loss is differentiated through.
    ungraded_steps: the number of updates before these, without differentiation; only if the
        initializer draws the start.
    start: parameters to go on from; None: the initializer draws them.
    """

    key: tuple[int, ...]
    steps: int
    ungraded_steps: int = 0
    start: Params | None = None

    def generator(self, purpose: int) -> Generator:
        """A new generator for START, ..., or POOL; it is the same at each call."""
        return seeded_generator(*self.key, purpose)


@dataclass(frozen=True)
class Training:
    """Everything that a training consists of, for meta-learning, evaluation and comparison.

    The hyperparameters are the nn.Parameters of the rule, and of the initializer and the batches if
    these are modules.

    model: called as model(x, params); has no parameters of its own.
    rule: updates params.
    initializer: (model, generator) -> params.
    batches: (generator) -> iterator over the batches that the rule's update takes.
    outer_loss: judges the parameters.
    name: a name, such as the data set's, to tell its numbers from those of other trainings.
    models: (generator) -> model, if each task of a meta-step draws its model, such as its width.
    """

    model: nn.Module
    rule: LearningRule
    initializer: Callable[[nn.Module, Generator], Params]
    batches: Callable[[Generator], Iterator]
    outer_loss: OuterLoss
    name: str = ""
    models: Callable[[Generator], nn.Module] | None = None

    def with_drawn_model(self, draw: Draw) -> "Training":
        """This training with the model that `models` draws; unchanged if models is None."""
        if self.models is None:
            return self
        return replace(self, model=self.models(draw.generator(MODEL)))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that may hold hyperparameters, by name: "rule", "initializer", "batches"."""
        parts = {name: getattr(self, name) for name in WITH_HYPERPARAMETERS}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    @property
    def hyperparameters(self) -> dict[str, nn.Parameter]:
        """The trainable hyperparameters, named "rule. ...", "initializer. ...", "batches. ..."."""
        return {
            f"{kind}.{name}": p
            for kind, module in self.modules.items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    def hyperparameter_values(self) -> dict[str, float]:
        """Coefficients, initial distribution and learned views, as columns of metrics.csv."""
        groups = {
            "coefficient": self.rule.coefficients(),
            "initial": self.initializer.effective(),
            "views": self.batches.effective() if hasattr(self.batches, "effective") else {},
        }
        return {f"{group}/{n}": v for group, values in groups.items() for n, v in values.items()}

    def begin(self, draw: Draw) -> tuple[Params, Iterator]:
        """The parameters before the graded updates, attached to the initializer, and the batches.

        After ungraded updates the parameters are detached. Raises NonFiniteError if these have made
        them not finite.
        """
        batches = self.batches(draw.generator(BATCHES))
        if draw.start is not None:
            return draw.start, batches
        params = self.initial(draw, batches)
        if draw.ungraded_steps:
            params = self.advance(params, batches, draw.ungraded_steps)
        return params, batches

    def initial(self, draw: Draw, batches: Iterator) -> Params:
        """The parameters before the rule's first update, drawn by the initializer."""
        return self.initializer(self.model, draw.generator(START))

    def drawn_anew(self, begun: Params, drawn: Params) -> Params:
        """The result of `initial` if the initializer drew `drawn`; `begun` is the actual result."""
        return drawn

    def advance(self, params: Params, batches: Iterator, steps: int) -> Params:
        """The parameters after `steps` more updates, without a graph; may raise NonFiniteError."""
        params = train(self.model, params, batches, self.rule, steps, grad=False)
        check_finite(params, f"parameters after {steps} inner steps")
        return params

    def checked_outer_loss(self, params: Params, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """The outer loss attached to params, and the numbers to record, "meta_loss" first.

        The model is in evaluation mode (no dropout). Raises NonFiniteError if the parameters or the
        loss are not finite.
        """
        check_finite(params, f"parameters after {draw.steps} inner steps")
        with judged(self.model):
            loss, numbers = self.outer_loss(self.model, params, draw.generator(OUTER))
        check_finite(loss, "outer loss")
        return loss, {"meta_loss": loss.item(), **numbers}

    def checked_outer_losses(self, params: Params, draws: Sequence[Draw]) -> list["Judged"]:
        """The result of `checked_outer_loss` for each task of params [tasks, ...], or its error."""
        each = [of_task(params, k) for k in range(len(draws))]
        many = getattr(self.outer_loss, "of_tasks", None)
        if many is not None and all_finite(tree_leaves(params)):
            generators = [draw.generator(OUTER) for draw in draws]
            # a task that fails is found one by one
            with suppress(FloatingPointError), judged(self.model):
                losses, numbers = many(over_tasks(self.model), params, generators)
                check_finite(losses, "outer losses")
                told = zip(losses.tolist(), numbers, strict=True)
                rows = [{"meta_loss": loss, **of_task} for loss, of_task in told]
                return list(zip(losses.unbind(), rows, strict=True))
        return [self._judged(*task) for task in zip(each, draws, strict=True)]

    def _judged(self, params: Params, draw: Draw) -> "Judged":
        try:
            return self.checked_outer_loss(params, draw)
        except FloatingPointError as problem:
            return problem


# An outer loss with its numbers, or why there is none
Judged = tuple[Tensor, dict[str, float]] | FloatingPointError


@contextmanager
def judged(model: nn.Module) -> Iterator[None]:
    """The model in evaluation (no dropout), and after it as it was."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def evaluate_training(training: Training, draw: Draw) -> tuple[dict[str, float], Params]:
    """The outer loss and its numbers after draw.steps updates, and the parameters.

    Raises FloatingPointError if these are not finite.
    """
    return next(evaluate_on_the_way(training, draw, [draw.steps]))


def evaluate_on_the_way(
    training: Training, draw: Draw, steps: Sequence[int]
) -> Iterator[tuple[dict[str, float], Params]]:
    """The results of `evaluate_training` after each of `steps` (increasing) of one training."""
    params, batches = training.begin(draw)
    for done, until in itertools.pairwise([0, *steps]):
        params = training.advance(params, batches, until - done)
        yield training.checked_outer_loss(params, draw)[1], params


class AdjointLimit:
    """A bound on the adjoints dL / d theta_t of one training, after each of its updates.

        |a_t|  <=  factor |a_N|,     a_t = dL / d theta_t,     t = 1, ..., N

    A larger adjoint is scaled down to the bound, separately for each tensor of params, and is then
    propagated to earlier updates: clipping within the unrolled graph (Pascanu, Mikolov, Bengio
    2013, "On the difficulty of training recurrent neural networks"). This biases the hypergradient:
    early updates count less than they should. If no adjoint exceeds the bound, it is exact to the
    last bit. a_N is the first nonzero adjoint, going back; for a statistic of the rule, on which L
    itself does not depend, it is the adjoint before the last update.

    Each object serves one training and one backward pass.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._norms_at_end: dict[tuple[int, str], Tensor | float] = {}

    def __call__(self, params: Params) -> Params:
        """The same parameters, with bounded adjoints."""
        places = [(k, n) for k, layer in enumerate(params) for n in layer if layer[n].requires_grad]
        if not places:
            return params
        held = _HeldAdjoints.apply(self, places, *(params[k][name] for k, name in places))
        new = [dict(layer) for layer in params]
        for (k, name), tensor in zip(places, held, strict=True):
            new[k][name] = tensor
        return new

    def held(self, adjoint: Tensor, place: tuple[int, str]) -> Tensor:
        """An adjoint of the tensor at (layer, name), scaled down if it is too large."""
        norm = torch.linalg.vector_norm(adjoint, dtype=torch.float64)
        if norm.device.type == "cpu":
            return self._held_on_cpu(adjoint, place, norm.item())
        return self._held_elsewhere(adjoint, place, norm)

    def _held_elsewhere(self, adjoint: Tensor, place: tuple[int, str], norm: Tensor) -> Tensor:
        """The same without reading numbers, for which the CPU would have to wait for the GPU."""
        before = self._norms_at_end.get(place, torch.zeros_like(norm))
        at_end = self._norms_at_end[place] = torch.where(before > 0, before, norm)
        smallest = torch.finfo(norm.dtype).tiny
        return adjoint * (self.factor * at_end / norm.clamp_min(smallest)).clamp_max(1.0)

    def _held_on_cpu(self, adjoint: Tensor, place: tuple[int, str], norm: float) -> Tensor:
        """The same with Python numbers, and without a product if the adjoint isn't too large."""
        before = self._norms_at_end.get(place, 0.0)
        at_end = self._norms_at_end[place] = before if before > 0 else norm
        scale = min(self.factor * at_end / max(norm, sys.float_info.min), 1.0)
        return adjoint if scale == 1 else adjoint * scale


class TaskAdjointLimit(AdjointLimit):
    """The bound of an AdjointLimit for several tasks at once, each held to its own last adjoint.

    Tensors are [tasks, ...]; later updates may be of the first tasks only.
    """

    def held(self, adjoint: Tensor, place: tuple[int, str]) -> Tensor:
        """An adjoint [tasks, ...] of the tensor at (layer, name), each task's scaled by itself."""
        begun = self._norms_at_end.get(place, adjoint.new_zeros(0, dtype=torch.float64))
        begun = torch.cat([begun, begun.new_zeros(len(adjoint) - len(begun))])
        held, self._norms_at_end[place] = hold_task_adjoint(self.factor, adjoint, begun)
        return held


def hold_task_adjoint(
    factor: float, adjoint: Tensor, norms_at_end: Tensor
) -> tuple[Tensor, Tensor]:
    """An adjoint [tasks, ...] with each task's norm at most `factor` times its norm at the end.

    Returns also the norms at the end, [tasks]: those given, or of the adjoint where these are 0.
    """
    norm = torch.linalg.vector_norm(adjoint.reshape(len(adjoint), -1), dim=1, dtype=torch.float64)
    at_end = torch.where(norms_at_end > 0, norms_at_end, norm)
    scale = (factor * at_end / norm.clamp_min(sys.float_info.min)).clamp_max(1.0)
    return adjoint * scale.to(adjoint.dtype).view(-1, *[1] * (adjoint.dim() - 1)), at_end


class _HeldAdjoints(torch.autograd.Function):
    """The identity of several tensors, whose gradients pass through AdjointLimit.held."""

    @staticmethod
    def forward(ctx, limit: AdjointLimit, places: list[tuple[int, str]], *tensors: Tensor):
        ctx.limit, ctx.places = limit, places
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *adjoints: Tensor | None):
        held = (
            None if adjoint is None else ctx.limit.held(adjoint, place)
            for place, adjoint in zip(ctx.places, adjoints, strict=True)
        )  # fmt: skip
        return None, None, *held


def train(
    model: nn.Module,
    params: Params,
    batches: Iterator,
    rule: LearningRule,
    steps: int,
    *,
    grad: bool = True,
    memory: str = "fit",
    memory_limit: int = MEMORY_LIMIT,
    adjoint_limit: AdjointLimit | None = None,
) -> Params:
    """Parameters after `steps` updates of the rule, each on the next batch.

    Updates are made in the dtype of params, also under autocast. The memory policy never changes
    the result or its gradient: updates that run again draw the same numbers from torch's global
    generators and don't change running statistics. Raises TrainingError for an unknown memory
    policy, for batches that end early or are empty, and for a rule whose updates give other results
    when they run again, because it has a random generator of its own.

    grad: True attaches the result to params and to the rule's hyperparameters; False detaches it.
    memory: a policy of the module's docstring.
    memory_limit: bytes of the graph of one segment, for "fit".
    adjoint_limit: changes only the gradient.
    """
    _check_policy(memory)
    if not grad:
        with torch.no_grad(), own_precision(tree_leaves(params)):
            for k in range(steps):
                params = rule.update(model, params, _next_batch(batches, k))
        return detached(params)
    return train_on_the_way(
        model, params, batches, rule, [steps],
        memory=memory, memory_limit=memory_limit, adjoint_limit=adjoint_limit,
    )[-1]  # fmt: skip


def train_on_the_way(
    model: nn.Module,
    params: Params,
    batches: Iterator,
    rule: LearningRule,
    steps: Sequence[int],
    *,
    memory: str = "fit",
    memory_limit: int = MEMORY_LIMIT,
    adjoint_limit: AdjointLimit | None = None,
) -> list[Params]:
    """The results of `train` after each of `steps` (increasing) updates, in one graph.

    Arguments and errors are those of `train`.
    """
    _check_policy(memory)
    total = steps[-1]
    used = [_next_batch(batches, k) for k in range(total)]
    passed = []
    with own_precision(tree_leaves(params)), set_checkpoint_early_stop(False):
        length = _segment_length(model, params, used, rule, memory, memory_limit)
        for begin, end in itertools.pairwise([0, *steps]):
            for start, stop in _segments(begin, end, length):
                arguments = (model, params, used[start:stop], rule, adjoint_limit)
                if start >= total - length:
                    params = _run(*arguments)
                else:
                    params = checkpoint(
                        _Repeatable(params), *arguments, use_reentrant=False,
                        preserve_rng_state=False,
                    )  # fmt: skip
            passed.append(params)
    return passed


def detached(params: Params) -> Params:
    """The same parameters without their graph."""
    return [{name: tensor.detach() for name, tensor in layer.items()} for layer in params]


def check_finite(value: Tensor | Params, what: str) -> None:
    """Raise NonFiniteError if a tensor, or one of several parameters, is not finite.

    what: the name of the value, for the message.
    """
    tensors = [value] if isinstance(value, Tensor) else [t for d in value for t in d.values()]
    if tensors and not all_finite(tensors):
        raise NonFiniteError(f"{what}: not finite")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is infinite or nan; the host waits once for each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(flags).all()) for flags in found.values())


class _Repeatable:
    """`_run` with the same random numbers at each call; raises TrainingError if results differ."""

    def __init__(self, params: Params) -> None:
        self.moment = Moment(tree_leaves(params))
        self.first: Params | None = None

    def __call__(self, model: nn.Module, params: Params, *arguments) -> Params:
        if self.first is None:
            result = _run(model, params, *arguments)
            self.first = detached(result)
            return result
        with self.moment.repeated():
            result = _run(model, params, *arguments)
        _check_repeated(params, result, self.first)
        return result


def _check_repeated(start: Params, result: Params, first: Params) -> None:
    """Raise TrainingError if the second result of updates differs from the first."""
    places = [
        (k, name)
        for k, layer in enumerate(first)
        for name, tensor in layer.items()
        if tensor.is_floating_point()
    ]
    once, again = ([ps[k][name].detach() for k, name in places] for ps in (first, result))
    before = [  # 0 for what the rule remembers since these updates only
        start[k].get(name, torch.zeros_like(tensor)).detach()
        for (k, name), tensor in zip(places, once, strict=True)
    ]
    before = [  # of several tasks, some may be done
        tensor if tensor.shape == new.shape else tensor[: len(new)]
        for tensor, new in zip(before, once, strict=True)
    ]
    without_numbers = any(tensor.is_meta for tensor in once)
    if places and not without_numbers and another_result(before, again, once):
        raise TrainingError(
            "an update that runs again gives another result: take memory 'keep' for a rule with "
            "random numbers that are not of torch's global generators"
        )


def _next_batch(batches: Iterator, number: int) -> Any:
    """The next batch; raises TrainingError if there is none or it is empty."""
    batch = next(batches, None)
    if batch is None:
        raise TrainingError(
            f"the batches end after {number} updates; give an iterator that goes on"
        )
    if any(isinstance(t, Tensor) and not t.numel() for t in tree_leaves(batch)):
        raise TrainingError(f"batch {number} is empty; expected at least one sample")
    return batch


def _run(
    model: nn.Module,
    params: Params,
    batches: Sequence,
    rule: LearningRule,
    adjoint_limit: AdjointLimit | None,
) -> Params:
    for batch in batches:
        params = rule.update(model, params, batch)
        if adjoint_limit is not None:
            params = adjoint_limit(params)
    return params


def _check_policy(memory: str) -> None:
    if memory not in MEMORY:
        raise TrainingError(f"memory policy {memory!r} is unknown; choose from {', '.join(MEMORY)}")


def _segments(begin: int, end: int, length: int) -> list[tuple[int, int]]:
    """(start, stop) of segments of `length` steps; the first one may be shorter."""
    starts = range(end - length, begin - length, -length)
    return [(max(begin, start), start + length) for start in reversed(starts)]


def _segment_length(model, params, used, rule, memory: str, memory_limit: int) -> int:
    steps = max(1, len(used))
    if memory == "keep" or not used:
        return steps
    if memory == "recompute":
        return 1
    if memory == "segments":
        return math.isqrt(steps - 1) + 1
    # the second step is measured, because the initial parameters may not require gradients
    moment = Moment(tree_leaves(params))
    with moment.repeated():  # restores random generators and running statistics
        first = rule.update(model, params, used[0])
        with torch.no_grad(), moment.repeated():
            _check_repeated(params, rule.update(model, params, used[0]), first)
        size = graph_bytes(lambda: rule.update(model, first, used[0]))
    return min(steps, max(1, memory_limit // max(1, size)))


def graph_bytes(function) -> int:
    """Bytes of all tensors that the graph of function() keeps for its backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # detached, because an output that is held by its own graph would never be freed
        saved = kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
