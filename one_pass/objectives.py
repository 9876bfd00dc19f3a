"""Training losses of many runs at once: value, gradient and products with the Hessian.

A run's weights are one flat vector, so that optimisers are plain algebra on [D, P]: D runs of P
weights each. An objective knows how the vector is folded into a network:

    objective = MLPObjective((8, 50, 1), "mse")
    weights, buffers = objective.initial(generators)             # one generator for each run
    at = objective.linearize(weights, buffers, Batch(inputs, targets, shared=True))
    at.loss, at.gradient, at.hessian_product(vectors)            # [D], [D, P], [D, P]

`MLPObjective` computes gradient and Hessian products in closed form (Pearlmutter's R operator,
Neural Computation 1994): for L layers, a linearization takes 3L - 1 matrix products, and each
Hessian product 6L - 4 more. `ModuleObjective` takes any nn.Module and leaves both to torch.func.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map

from one_pass.errors import OnePassError
from one_pass.recorded import RecordedCalls

Buffers = dict[str, Tensor]

RUNS_AT_ONCE, ROWS_AT_ONCE = 16, 4096  # in an evaluation, to limit the memory of activations


@dataclass(frozen=True)
class Batch:
    """Inputs [B, ...] and targets [B, ...] shared by all runs, or [D, B, ...] if not shared."""

    inputs: Tensor
    targets: Tensor
    shared: bool


@dataclass(frozen=True)
class Linearization:
    """A training loss around the current weights.

    Attributes:
        loss: [D].
        gradient: [D, P].
        buffers: the network's after this forward pass, {name: [D, ...]}.
        hessian_product: maps vectors [D, P] to the Hessian's products with them [D, P].
    """

    loss: Tensor
    gradient: Tensor
    buffers: Buffers
    hessian_product: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Loss [D] and gradient [D, P] on held-out samples, and the network's buffers after them."""

    loss: Tensor
    gradient: Tensor
    buffers: Buffers


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set: loss [D] and accuracy [D] in [0, 1], which is 0 for regressions."""

    loss: Tensor
    accuracy: Tensor


class Objective(Protocol):
    """What tuning.py needs to know about a network and its loss.

    Attributes:
        classifies: whether there is an accuracy.
        recurrent: whether the buffers are hidden states, which belong to the samples being read.
    """

    classifies: bool
    recurrent: bool

    def initial(self, generators: Sequence[Generator]) -> tuple[Tensor, Buffers]:
        """Initial weights [D, P] and buffers, drawn with one generator for each run."""

    def linearize(self, weights: Tensor, buffers: Buffers, batch: Batch) -> Linearization:
        """The training loss around `weights`."""

    def held_out(self, weights: Tensor, buffers: Buffers, batch: Batch) -> HeldOut:
        """Loss and gradient on held-out samples; the given buffers are not changed."""

    def evaluate(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> Evaluation:
        """Mean loss and accuracy over samples [N, ...] that all runs share."""


# ---- multilayer perceptrons, in closed form ----


@dataclass(frozen=True)
class MLPObjective:
    """A ReLU network with layers of these sizes and the mean squared error or the cross-entropy.

    Each layer's part of the flat vector is its weights [sizes[l], sizes[l + 1]], row by row,
    followed by its biases.

    Attributes:
        sizes: inputs, hidden units of each layer, outputs.
        loss: "mse" (targets [B, outputs]) or "cross_entropy" (targets int64 [B]).
    Raises OnePassError for fewer than two sizes, a size below 1, and an unknown loss. Its methods
        raise it for weights, inputs and targets of several floating-point types.
    """

    sizes: tuple[int, ...]
    loss: str

    recurrent = False

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise OnePassError(f"sizes are at least two numbers from 1, got {self.sizes}")

    @property
    def classifies(self) -> bool:
        """Whether there is an accuracy."""
        return self.loss == "cross_entropy"

    def initial(self, generators: Sequence[Generator]) -> tuple[Tensor, Buffers]:
        """Weights and biases from U(-1, 1) / sqrt(fan-in), as in torch; float64."""
        return torch.stack([self._one_initial(generator) for generator in generators]), {}

    def linearize(self, weights: Tensor, buffers: Buffers, batch: Batch) -> Linearization:
        """The loss around `weights`; the activations are kept for products with the Hessian."""
        check_types({"weights": weights, "inputs": batch.inputs, "targets": batch.targets})
        layers = self._unpack(weights)
        activations, outputs = _forward(layers, batch.inputs)
        loss, error, error_tangent = _LOSSES[self.loss](outputs, batch.targets)
        errors, gradient = _backward(layers, activations, error)

        def hessian_product(vectors: Tensor) -> Tensor:
            tangents = self._unpack(vectors)
            moved, output_tangent = _forward_tangent(layers, tangents, activations)
            start = error_tangent(output_tangent)
            return _backward_tangent(layers, tangents, activations, errors, moved, start)

        return Linearization(loss, gradient, buffers, hessian_product)

    def held_out(self, weights: Tensor, buffers: Buffers, batch: Batch) -> HeldOut:
        """The same as `linearize`, because there are no buffers."""
        linearization = self.linearize(weights, buffers, batch)
        return HeldOut(linearization.loss, linearization.gradient, buffers)

    def evaluate(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> Evaluation:
        """Mean loss and accuracy over all samples."""
        check_types({"weights": weights, "inputs": inputs, "targets": targets})

        def outputs(runs: slice, rows: slice) -> Tensor:
            return _forward(self._unpack(weights[runs]), inputs[rows])[1]

        return _over_all(outputs, len(weights), targets)

    def _one_initial(self, generator: Generator) -> Tensor:
        parts = []
        for fan_in, fan_out in pairwise(self.sizes):
            count = (fan_in + 1) * fan_out
            options = {"generator": generator, "dtype": torch.float64, "device": generator.device}
            uniform = torch.rand(count, **options)
            parts.append((2 * uniform - 1) / math.sqrt(fan_in))
        return torch.cat(parts)

    def _unpack(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights [D, in, out] and biases [D, 1, out] of each layer, views of `flat` [D, P]."""
        layers, start = [], 0
        for fan_in, fan_out in pairwise(self.sizes):
            middle = start + fan_in * fan_out
            weight = flat[:, start:middle].unflatten(1, (fan_in, fan_out))
            layers.append((weight, flat[:, None, middle : middle + fan_out]))
            start = middle + fan_out
        return layers


def _forward(
    layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The inputs of each layer, [D, B, in], and the outputs [D, B, out]."""
    runs = len(layers[0][0])
    entering = inputs if inputs.dim() == 3 else inputs.expand(runs, *inputs.shape)
    activations = []
    for weight, bias in layers:
        activations.append(entering)
        preactivation = torch.baddbmm(bias, entering, weight)
        entering = preactivation.clamp_min(0) if len(activations) < len(layers) else preactivation
    return activations, entering


def _backward(
    layers: Sequence[tuple[Tensor, Tensor]], activations: Sequence[Tensor], error: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The loss's derivatives at each layer's preactivations, and the flat gradient [D, P]."""
    errors, parts = [error], []
    for (weight, _), entering in zip(reversed(layers), reversed(activations), strict=True):
        parts += [error.sum(dim=1), torch.bmm(entering.mT, error).flatten(1)]
        if len(errors) < len(layers):
            error = _through_relu(torch.bmm(error, weight.mT), entering)
            errors.append(error)
    return errors[::-1], torch.cat(parts[::-1], dim=1)


def _forward_tangent(
    layers: Sequence[tuple[Tensor, Tensor]],
    tangents: Sequence[tuple[Tensor, Tensor]],
    activations: Sequence[Tensor],
) -> tuple[list[Tensor | None], Tensor]:
    """The derivatives of each layer's inputs (None for 0) and of the outputs along the tangents."""
    moved: list[Tensor | None] = [None]
    for index, ((weight, _), (weight_tangent, bias_tangent)) in enumerate(
        zip(layers, tangents, strict=True)
    ):
        tangent = torch.baddbmm(bias_tangent, activations[index], weight_tangent)
        if moved[-1] is not None:
            tangent = torch.baddbmm(tangent, moved[-1], weight)
        if index + 1 < len(layers):
            moved.append(_through_relu(tangent, activations[index + 1]))
    return moved, tangent


def _backward_tangent(
    layers: Sequence[tuple[Tensor, Tensor]],
    tangents: Sequence[tuple[Tensor, Tensor]],
    activations: Sequence[Tensor],
    errors: Sequence[Tensor],
    moved: Sequence[Tensor | None],
    error_tangent: Tensor,
) -> Tensor:
    """The derivative of the flat gradient along the tangents, [D, P]."""
    parts = []
    for index in reversed(range(len(layers))):
        entering = activations[index]
        product = torch.bmm(entering.mT, error_tangent)
        if moved[index] is not None:
            product = torch.baddbmm(product, moved[index].mT, errors[index])
        parts += [error_tangent.sum(dim=1), product.flatten(1)]
        if index:
            back = torch.bmm(error_tangent, layers[index][0].mT)
            back = torch.baddbmm(back, errors[index], tangents[index][0].mT)
            error_tangent = _through_relu(back, entering)
    return torch.cat(parts[::-1], dim=1)


def _through_relu(values: Tensor, activation: Tensor) -> Tensor:
    """`values` for active units, otherwise 0, in one pass over memory."""
    return torch.ops.aten.threshold_backward(values, activation, 0)


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Callable]:
    scale = 2 / (outputs.shape[1] * outputs.shape[2])
    difference = outputs - targets
    loss = difference.square().mean(dim=(1, 2))
    return loss, difference * scale, lambda tangent: tangent * scale


def _cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Callable]:
    logarithms = outputs.log_softmax(dim=2)
    indices = targets.expand(outputs.shape[:2])[..., None]
    loss = -logarithms.gather(2, indices).mean(dim=(1, 2))
    probabilities = logarithms.exp()
    ones = torch.full_like(indices, -1, dtype=outputs.dtype)
    error = probabilities.scatter_add(2, indices, ones) / outputs.shape[1]

    def error_tangent(tangent: Tensor) -> Tensor:
        weighted = probabilities * tangent
        return (weighted - probabilities * weighted.sum(2, keepdim=True)) / outputs.shape[1]

    return loss, error, error_tangent


# outputs, targets -> loss [D], its gradient at the outputs, and the tangent of that gradient
_LOSSES = {"mse": _mean_squared_error, "cross_entropy": _cross_entropy}


# ---- any nn.Module ----


@dataclass(frozen=True)
class ModuleObjective:
    """Any network; torch.func computes gradient and Hessian products, batched over runs by vmap.

    Attributes:
        module: the network. In training mode it may change its buffers (batch norm, hidden states).
            Frozen parameters (requires_grad=False) keep their present values in all runs. Parts in
            evaluation mode of a module in training mode stay in it.
        loss: "mse" (targets as the outputs), "cross_entropy" (outputs [B, classes, ...], targets
            int64 [B, ...]), or a function of one run's outputs and targets whose result is a number
            []; there is no accuracy then.
        calls: how computations over all runs are called: at once, or recorded and replayed.
        drawn: whether the module draws random numbers, once that is known.
    Raises OnePassError for a module without parameters to train and for an unknown loss. Its
        methods raise it for targets of another shape than the outputs, with mse, for
        floating-point types that do not go together, for a loss that gives no number or has no
        second derivatives in torch.func, and for a module that draws random numbers in training: a
        run would depend on the others, and the Hessian would belong to another draw than the
        gradient.
    """

    module: nn.Module
    loss: str | Callable[[Tensor, Tensor], Tensor]
    calls: RecordedCalls = field(default_factory=RecordedCalls, compare=False, repr=False)
    drawn: list[bool] = field(default_factory=list, compare=False, repr=False)

    recurrent = False

    def __post_init__(self) -> None:
        if not callable(self.loss):
            check_loss(self.loss)
        if not self._trained():
            raise OnePassError("the module has no parameters that require a gradient")

    @property
    def classifies(self) -> bool:
        """Whether there is an accuracy."""
        return self.loss == "cross_entropy"

    def initial(self, generators: Sequence[Generator]) -> tuple[Tensor, Buffers]:
        """float64 weights from the layers' own reset_parameters, seeded by each run's generator.

        torch's global generator, which these use, is restored, and frozen layers are not changed.
        """
        frozen = [(p, p.detach().clone()) for p in self.module.parameters() if not p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            weights = torch.stack([self._one_initial(generator) for generator in generators])
        with torch.no_grad():
            for p, value in frozen:
                p.copy_(value)
        return weights, self._present_buffers(len(generators))

    def present(self, runs: int) -> tuple[Tensor, Buffers]:
        """The module's present weights, in their own type, and buffers, the same for every run."""
        return self._present_weights().expand(runs, -1).clone(), self._present_buffers(runs)

    def state_dict(self, weights: Tensor, buffers: Buffers, run: int) -> dict[str, Any]:
        """What the module's load_state_dict takes for one of the runs; frozen entries as they are.

        weights, buffers: of all runs.
        """
        names = self._names()
        of_run = self._folded(weights[run]) | {name: b[run] for name, b in buffers.items()}
        values = {name: value.detach().clone() for name, value in of_run.items()}
        entries = self.module.state_dict(keep_vars=True).items()
        return {key: values.get(names.get(id(entry)), entry) for key, entry in entries}

    def linearize(self, weights: Tensor, buffers: Buffers, batch: Batch) -> Linearization:
        """The loss around `weights`, in training mode."""
        gradient, (loss, after) = self._over_runs(self._gradient, batch, weights, buffers)

        def hessian_product(vectors: Tensor) -> Tensor:
            return self.product_with_hessian(weights, buffers, batch, vectors)

        return Linearization(loss, gradient, after, hessian_product)

    def product_with_hessian(
        self, weights: Tensor, buffers: Buffers, batch: Batch, vectors: Tensor
    ) -> Tensor:
        """The products of the training loss's Hessian with vectors [D, P], [D, P]."""
        return self._over_runs(self._hessian_product, batch, weights, buffers, vectors)

    def held_out(self, weights: Tensor, buffers: Buffers, batch: Batch) -> HeldOut:
        """Loss and gradient in evaluation mode, which does not change batch norm's statistics."""
        with in_evaluation_mode(self.module):
            gradient, (loss, after) = self._over_runs(
                self._gradient, batch, weights, buffers, training=False
            )
        return HeldOut(loss, gradient, after)

    def evaluate(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> Evaluation:
        """Mean loss and accuracy over all samples, in evaluation mode.

        A loss that is a function gets the outputs of all samples at once.
        """

        def outputs(runs: slice, rows: slice) -> Tensor:
            some = {name: buffer[runs] for name, buffer in buffers.items()}
            each = vmap(self._outputs, in_dims=(0, 0, None))
            return each(weights[runs], some, inputs[rows])[0]

        over_all = partial(_by_function, self._checked_loss) if callable(self.loss) else _over_all
        with self._explaining(weights, buffers, inputs), in_evaluation_mode(self.module):
            return over_all(outputs, len(weights), targets)

    def _over_runs(
        self,
        function: Callable,
        batch: Batch,
        weights: Tensor,
        buffers: Buffers,
        *vectors: Tensor,
        training: bool = True,
    ):
        """`function` applied to each run's weights, buffers, inputs, targets and vectors."""
        if training and not self.module.training:
            self.module.train()
        samples = None if batch.shared else 0
        dims = (0, 0, samples, samples, *(0 for _ in vectors))
        arguments = weights, buffers, batch.inputs, batch.targets, *vectors
        name = function.__name__, training, batch.shared
        over_runs = vmap(function, in_dims=dims)
        with self._explaining(weights, buffers, batch.inputs, twice=bool(vectors)):
            if _without_vmap(weights):
                self._check_draws_nothing(dims[:3], *arguments[:3])
                over_runs = partial(_of_one_run, function, dims)
            return self.calls(name, over_runs, arguments)

    @contextmanager
    def _explaining(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, twice: bool = False
    ) -> Iterator[None]:
        """Raises OnePassError for those of torch's errors that have a known reason.

        twice: whether the loss is differentiated twice.
        """
        try:
            yield
        except RuntimeError as problem:
            if "randomness" in str(problem):
                raise OnePassError(
                    "the module draws random numbers (dropout?), and these would differ with a "
                    "run's neighbours and from gradient to Hessian: leave that out"
                ) from problem
            if "vmap: It looks like" in str(problem) and callable(self.loss):
                raise OnePassError(
                    "the loss must be of tensors' operations alone, without .item() or branches on "
                    "values: it is mapped over the runs"
                ) from problem
            if "type" in str(problem):
                self._check_own_types(weights, buffers, inputs)
            missing = isinstance(problem, NotImplementedError) or "ZeroTensor" in str(problem)
            if not (twice and missing and callable(self.loss)):
                raise
            raise OnePassError(
                f"torch.func cannot differentiate this loss twice ({str(problem).splitlines()[0]});"
                " write it out, as (outputs - targets).square().mean() instead of mse_loss"
            ) from problem

    def _check_own_types(self, weights: Tensor, buffers: Buffers, inputs: Tensor) -> None:
        frozen = {n: p for n, p in self.module.named_parameters() if not p.requires_grad}
        try:
            check_types({"weights": weights, "inputs": inputs} | frozen | buffers)
        except OnePassError as known:
            raise known from None  # torch's traceback would say nothing more

    @torch.no_grad()
    def _check_draws_nothing(
        self, dims: tuple, weights: Tensor, buffers: Buffers, inputs: Tensor
    ) -> None:
        """Raises RuntimeError as vmap does, once, where a run is then computed without it."""
        if not self.drawn:
            vmap(self._outputs, in_dims=dims)(weights, buffers, inputs)
            self.drawn.append(False)

    def _gradient(
        self, flat: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Buffers]]:
        """One run's gradient, its loss and its buffers afterwards."""
        return grad(self._loss, has_aux=True)(flat, buffers, inputs, targets)

    def _hessian_product(
        self, flat: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor, vector: Tensor
    ) -> Tensor:
        """The product for one run, by forward over reverse differentiation.

        vmap is the outermost transform, because reverse over a batched gradient is wrong for batch
        norm (torch 2.13).
        """

        def gradient(some: Tensor) -> Tensor:
            return self._gradient(some, buffers, inputs, targets)[0]

        return jvp(gradient, (flat,), (vector,))[1]

    def _loss(
        self, flat: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Buffers]]:
        """One run's loss, to be differentiated; and it detached, with the buffers afterwards."""
        outputs, after = self._outputs(flat, buffers, inputs)
        loss = self._checked_loss(outputs, targets)
        return loss, (loss.detach(), {name: buffer.detach() for name, buffer in after.items()})

    def _checked_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One run's loss []; raises OnePassError if a function gives something else."""
        function = self.loss if callable(self.loss) else _TORCH_LOSSES[self.loss]
        loss = function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.shape or not loss.is_floating_point():
            tensor = isinstance(loss, Tensor)
            got = (tuple(loss.shape) or loss.dtype) if tensor else type(loss).__name__
            raise OnePassError(f"the loss gives {got}: take its mean, so that it is a number []")
        return loss

    def _outputs(self, flat: Tensor, buffers: Buffers, inputs: Tensor) -> tuple[Tensor, Buffers]:
        """One run's outputs, and its buffers afterwards."""
        after = {name: buffer.clone() for name, buffer in buffers.items()}  # is changed in place
        given = self._placed({**self._folded(flat), **after})
        return functional_call(self.module, given, (inputs,), tie_weights=False), after

    def _names(self) -> dict[int, str]:
        """The name of each parameter and buffer, by its id; the first of several."""
        named = *self.module.named_parameters(), *self.module.named_buffers()
        return {id(tensor): name for name, tensor in named}

    def _placed(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values under all names of tied tensors, but once for a part that is there twice.

        functional_call does the first by itself, but leaves its values in such a part (torch 2.13).
        """
        names, options = self._names(), {"recurse": False, "remove_duplicate": False}
        placed = {}
        for prefix, part in self.module.named_modules():
            for listed in (part.named_parameters, part.named_buffers):
                for place, tensor in listed(prefix, **options):
                    if (name := names[id(tensor)]) in values:
                        placed[place] = values[name]
        return placed

    def _folded(self, flat: Tensor) -> dict[str, Tensor]:
        """The trained parameters of one run by name, views of `flat` [P]."""
        shapes = {name: weight.shape for name, weight in self._trained().items()}
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}

    def _present_weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._trained().values()])

    def _present_buffers(self, runs: int) -> Buffers:
        buffers = self.module.named_buffers()
        return {name: buffer.expand(runs, *buffer.shape).clone() for name, buffer in buffers}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _one_initial(self, generator: Generator) -> Tensor:
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        torch.manual_seed(int(seed))
        for part in self.module.modules():
            weights = list(part.parameters(recurse=False))
            frozen = weights and not any(p.requires_grad for p in weights)
            if hasattr(part, "reset_parameters") and not frozen:
                part.reset_parameters()
        return self._present_weights().double()


def _without_vmap(weights: Tensor) -> bool:
    """Whether there is a single run on a GPU."""
    return len(weights) == 1 and weights.device.type != "cpu"


def _of_one_run(function: Callable, dims: Sequence[int | None], *arguments) -> Any:
    """What vmap gives for a single run, without what it costs a GPU: operations in place of one.

    dims: 0 for arguments that have a dimension for the run, else None.
    """
    of_run = [
        tree_map(lambda t: t[0], value) if dim == 0 else value
        for dim, value in zip(dims, arguments, strict=True)
    ]
    return tree_map(lambda t: t[None], function(*of_run))


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode; each of its parts is restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def check_loss(loss: str) -> None:
    """Raises OnePassError for an unknown name of a loss."""
    if loss not in _LOSSES:
        raise OnePassError(f"loss {loss!r} is unknown; choose from {', '.join(_LOSSES)}")


def check_types(tensors: dict[str, Tensor]) -> None:
    """Raises OnePassError if those of the tensors that are floating-point differ in type."""
    first: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            first.setdefault(tensor.dtype, name)
    if len(first) > 1:
        said = ", ".join(f"{name} {str(dtype)[len('torch.') :]}" for dtype, name in first.items())
        raise OnePassError(f"floating-point types differ: {said}; give all of them one type")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error [] of outputs and targets of one shape.

    torch.func cannot differentiate the derivatives of mse_loss behind batch norm. Raises
    OnePassError if the shapes differ.
    """
    _check_shapes(outputs.shape, targets.shape)
    return (outputs - targets).square().mean()


def _check_shapes(outputs: torch.Size, targets: torch.Size) -> None:
    """Raises OnePassError if a run's outputs and targets differ in shape and would be expanded."""
    if outputs != targets:
        raise OnePassError(
            f"the network gives {tuple(outputs)} for targets {tuple(targets)}: with mse both have "
            "the same shape"
        )


_TORCH_LOSSES = {"mse": _squared_error, "cross_entropy": nn.functional.cross_entropy}


# ---- evaluation ----


def _over_all(outputs: Callable[[slice, slice], Tensor], runs: int, targets: Tensor) -> Evaluation:
    """Mean loss and accuracy of `runs` runs over all rows, a few runs and rows at a time.

    outputs: outputs(runs, rows) is [D, B, ...] for these slices.
    """
    samples = len(targets)
    losses, correct = [], []
    for first in range(0, runs, RUNS_AT_ONCE):
        some = slice(first, first + RUNS_AT_ONCE)
        sums = [
            summed(outputs(some, slice(row, row + ROWS_AT_ONCE)), targets[row : row + ROWS_AT_ONCE])
            for row in range(0, samples, ROWS_AT_ONCE)
        ]
        losses.append(sum(loss for loss, _ in sums))
        correct.append(sum(right for _, right in sums))
    return Evaluation(torch.cat(losses) / samples, torch.cat(correct) / samples)


def _by_function(
    loss: Callable[[Tensor, Tensor], Tensor],
    outputs: Callable[[slice, slice], Tensor],
    runs: int,
    targets: Tensor,
) -> Evaluation:
    """The same for a function, which need not be a mean over samples and so gets all of them."""
    losses = []
    for first in range(0, runs, RUNS_AT_ONCE):
        some = slice(first, first + RUNS_AT_ONCE)
        starts = range(0, len(targets), ROWS_AT_ONCE)
        pieces = [outputs(some, slice(row, row + ROWS_AT_ONCE)) for row in starts]
        losses.append(vmap(loss, in_dims=(0, None))(torch.cat(pieces, dim=1), targets))
    found = torch.cat(losses)
    return Evaluation(found, torch.zeros_like(found))


def summed(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and numbers of correct answers [D] of outputs [D, B, ...], summed over the samples.

    Raises OnePassError if targets that are no classes have another shape than a run's outputs.
    """
    runs, samples = outputs.shape[:2]
    if targets.is_floating_point():
        _check_shapes(outputs.shape[1:], targets.shape)
        errors = (outputs - targets).square()
        right = torch.zeros_like(errors)
    else:
        expected = targets.expand(runs, *targets.shape)[:, :, None]
        errors = -outputs.log_softmax(dim=2).gather(2, expected)
        right = (outputs.argmax(dim=2) == targets).to(outputs.dtype)
    return tuple(t.reshape(runs, samples, -1).mean(dim=2).sum(dim=1) for t in (errors, right))
