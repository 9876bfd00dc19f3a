"""Layers with lateral inhibition, and networks of them; parameters are passed at each call.

    s = x w^T + b
    y_0 = sigma(s);   y_{j+1} = y_j + f (sigma(s + y_j m^T) - y_j),   j = 0..J-1

A model holds no parameters. It is called as `model(x, params)`, where params is a list with one
dict of tensors per layer: {w: [out, in], b: [out], m: [out, out]}, or {} for a layer without
parameters. In a convolutional layer w is [out, in, kh, kw], and channels compete at every position.

`over_tasks(model)` is the same model for several tasks at once, each with its own parameters:
inputs are then [tasks, batch, ...], parameters {w: [tasks, out, in], ...}.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiment.choices import INHIBITION, NORMS, WITH_LATERAL_WEIGHTS
from experiment.main_settings import UNIT_FLAGS
from kernels.equilibrium import equilibrium
from kernels.forward_mode import runs_forward
from kernels.local_polynomial import TaskWindows, Windows, samples
from kernels.own_precision import in_own_precision
from kernels.task_products import contracted

Params = list[dict[str, Tensor]]

_aten = torch.ops.aten
# Each base function in place, and the product of a gradient with its derivative, given its output
_BASES = {
    "sigmoid": (torch.sigmoid_, _aten.sigmoid_backward),
    "tanh": (torch.tanh_, _aten.tanh_backward),
    "relu": (torch.relu_, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "identity": (lambda u: u, lambda grad, z: grad.clone()),
}


@dataclass(frozen=True)
class Activation:
    """sigma(u) = base(slope * u), with base sigmoid, tanh, relu or identity."""

    base: str = "sigmoid"
    slope: float = 1.0

    def __post_init__(self) -> None:
        if self.base not in _BASES:
            raise ValueError(f"activation {self.base!r} is unknown; choose from {sorted(_BASES)}")

    def __call__(self, s: Tensor) -> Tensor:
        """sigma of preactivations."""
        return self.of_scaled_(self.slope * s)

    def of_scaled_(self, scaled: Tensor) -> Tensor:
        """Apply base in place to a preactivation already multiplied by the slope."""
        return _BASES[self.base][0](scaled)

    def backward(self, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient with respect to the scaled preactivation, given sigma's output."""
        return _BASES[self.base][1](grad, output)


def activation_of(wanted: Activation | str | Callable[[Tensor], Tensor]) -> Callable:
    """An Activation, that of the name of its base, or any function of each number by itself.

    wanted: other names are those of functions in torch.nn.functional or torch, such as "gelu". Any
        function is differentiated by autograd, which keeps more than an Activation does.
    Raises ValueError for a name that there is not, and for what is no function of each number.
    """
    if isinstance(wanted, Activation):
        return wanted
    if isinstance(wanted, str) and wanted in _BASES:
        return Activation(wanted)
    function = wanted
    if isinstance(wanted, str):
        function = getattr(nn.functional, wanted, None) or getattr(torch, wanted, None)
    probe = torch.tensor([[-1.0, 0.5]])
    try:
        at_once, each = function(probe), [function(part) for part in probe.split(1, dim=1)]
        elementwise = torch.allclose(at_once, torch.cat(each, dim=1), equal_nan=True)
    except (TypeError, ValueError, RuntimeError, IndexError):
        elementwise = False
    if not elementwise:
        raise ValueError(
            f"activation {wanted!r} is unknown: it must be one of {sorted(_BASES)}, an Activation, "
            "or a function of each number by itself, such as torch.exp or 'gelu'"
        )
    return function


class _LateralDynamics(torch.autograd.Function):
    """y_J from s and m; keeps only sigma's outputs, from which the rest follows elementwise."""

    @staticmethod
    def forward(ctx, s, m, activation, steps, factor):
        keep = any(ctx.needs_input_grad)
        scaled, scaled_m_t = activation.slope * s, activation.slope * m.mT
        outputs = s.new_empty(steps + 1 if keep else 1, *s.shape)
        y = activation.of_scaled_(outputs[0].copy_(scaled)).clone()
        for j in range(1, steps + 1):
            z = outputs[j if keep else 0]
            activation.of_scaled_(_plus_product(m)(scaled, y, scaled_m_t, out=z))
            # the last not in place: compiled by torch 2.11, the gradient would be 0
            y = y.lerp(z, factor) if j == steps else y.lerp_(z, factor)
        if keep:
            ctx.save_for_backward(outputs, m)
            ctx.activation, ctx.factor = activation, factor
        return y

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, grad_y):
        outputs, m = ctx.saved_tensors
        activation, factor, steps = ctx.activation, ctx.factor, len(outputs) - 1
        grads, grad = [], grad_y
        for j in range(steps, 0, -1):
            grads.append(activation.backward(grad, outputs[j]))
            grad = _plus_product(m)(
                grad, grads[-1], m, beta=1 - factor, alpha=factor * activation.slope
            )
        grad_s = activation.backward(grad, outputs[0])
        # without the factor f, which follows at the end
        grad_scaled = torch.stack(grads[::-1]) if grads else torch.empty_like(outputs[1:])
        grad_s = torch.add(grad_s, grad_scaled.sum(0), alpha=factor)
        grad_m = None
        if ctx.needs_input_grad[1]:
            y = _responses(outputs, factor)
            rows = _steps_joined(grad_scaled)
            grad_m = contracted(rows, _steps_joined(y)).mul_(factor * activation.slope)
        return grad_s.mul_(activation.slope), grad_m, None, None, None


def _plus_product(m: Tensor) -> Callable[..., Tensor]:
    """The sum of a tensor and a product with lateral weights, of one or of several tasks."""
    return torch.addmm if m.dim() == 2 else torch.baddbmm


def _steps_joined(values: Tensor) -> Tensor:
    """[J, batch, out] as [J * batch, out]; [J, tasks, batch, out] as [tasks, J * batch, out]."""
    if values.dim() == 3:
        return values.reshape(-1, values.shape[-1])
    return values.movedim(1, 0).flatten(1, 2)


def _responses(outputs: Tensor, factor: float) -> Tensor:
    """y_0..y_{J-1} [J, batch, out], the same to the last bit as in the forward pass."""
    y = torch.empty_like(outputs[1:])
    if len(y):
        y[0] = outputs[0]
    for j in range(1, len(y)):
        torch.lerp(y[j - 1], outputs[j], factor, out=y[j])
    return y


def lateral_dynamics(
    s: Tensor, m: Tensor, activation: Callable, inh_steps: int, inh_factor: float
) -> Tensor:
    """y_J [batch, out] of the dynamics above, for s [batch, out] and m [out, out].

    Of several tasks, [tasks, batch, out] for s [tasks, batch, out] and m [tasks, out, out].
    """
    if isinstance(activation, Activation) and not runs_forward():
        return _LateralDynamics.apply(s, m, activation, inh_steps, inh_factor)
    y = activation(s)
    for _ in range(inh_steps):
        y = torch.lerp(y, activation(_plus_product(m)(s, y, m.mT)), inh_factor)
    return y


class _LateralLayer(nn.Module):
    """The common part of layers of competing units. Raises ValueError for wrong sizes or options.

    activation: as for `activation_of`; by default a sigmoid.
    inhibition: "lateral" (the dynamics above), "equilibrium" (their limit, kernels/equilibrium.py,
        for an Activation), "none" (y = sigma(s)), "l1" or "l2" (sigma(s) divided by 1e-6 + its
        norm), "l1_image" or "l2_image" (the same with one norm for all positions of a convolution).
        Only the first two have the parameter m.
    inh_steps, inh_factor: J and f of the lateral dynamics.
    forbid_self_inhibition: keep the diagonal of m at 0.
    forbid_excitation: keep m <= 0.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        activation: Activation | str | Callable | None = None,
        *,
        inhibition: str = "lateral",
        inh_steps: int = 10,
        inh_factor: float = 0.1,
        forbid_self_inhibition: bool = False,
        forbid_excitation: bool = False,
    ) -> None:
        super().__init__()
        if min(weight_shape) < 1:
            raise ValueError(f"a layer needs sizes >= 1, got weights {list(weight_shape)}")
        if inhibition not in INHIBITION:
            raise ValueError(f"inhibition {inhibition!r} is unknown; choose from {INHIBITION}")
        self.weight_shape = weight_shape
        self.activation = activation_of(activation or Activation())
        if inhibition == "equilibrium" and not isinstance(self.activation, Activation):
            raise ValueError(f"inhibition 'equilibrium' needs an activation of {sorted(_BASES)}")
        self.inhibition = inhibition
        self.inh_steps, self.inh_factor = inh_steps, inh_factor
        self.forbid_self_inhibition = forbid_self_inhibition
        self.forbid_excitation = forbid_excitation

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that this layer expects, by name."""
        units = self.weight_shape[0]
        shapes = {"w": self.weight_shape, "b": (units,)}
        if self.inhibition in WITH_LATERAL_WEIGHTS:
            shapes["m"] = (units, units)
        return shapes

    def compete(self, s: Tensor, params: dict[str, Tensor]) -> Tensor:
        """The activation y [samples, out] of units with preactivations s [samples, out].

        Dynamics with lateral weights run in the dtype of m, also under autocast.
        """
        s = s.to(params["m"].dtype) if "m" in params else s
        if self.inhibition == "lateral":
            return lateral_dynamics(
                s, params["m"], self.activation, self.inh_steps, self.inh_factor
            )
        if self.inhibition == "equilibrium":
            return equilibrium(s, params["m"], self.activation)
        y = self.activation(s)
        if self.inhibition == "none":
            return y
        norms = torch.linalg.vector_norm(y, NORMS[self.inhibition], dim=-1, keepdim=True)
        return y / (1e-6 + norms)

    def forward(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        """The activation y of inputs x, with shapes as in `respond`."""
        return self.respond(x, params)[1]

    def constrain(self, m: Tensor) -> Tensor:
        """m [..., out, out] with the entries that this layer forbids set to 0."""
        if self.forbid_self_inhibition:
            m = m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1))
        return m.clamp(max=0) if self.forbid_excitation else m

    def extra_repr(self) -> str:
        units, inputs, *kernel = self.weight_shape
        size = f", kernel_size={tuple(kernel)}" if kernel else ""
        return f"{inputs}, {units}{size}, inhibition={self.inhibition!r}"


class LateralLinear(_LateralLayer):
    """A fully connected layer, w [out, in], whose units inhibit each other.

    Options as in _LateralLayer.
    """

    windows = None  # the input of a sample is a row, not a window

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | str | Callable | None = None,
        **options,
    ) -> None:
        super().__init__((out_features, in_features), activation, **options)
        self.in_features, self.out_features = in_features, out_features

    def respond(self, x: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Preactivation s and activation y, both [batch, out], of inputs x [batch, in]."""
        self.check(x)
        s = nn.functional.linear(x, params["w"], params["b"])
        return s, self.compete(s, params)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless inputs are [batch, in]."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"expected inputs of shape [batch, {self.in_features}], got {list(x.shape)}"
            )


class LateralConv2d(_LateralLayer):
    """A convolution, w [out, in, kh, kw], whose channels inhibit each other at every position.

    For a learning rule each position of each image is a sample, whose input is the window around
    it. Options as in _LateralLayer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        activation: Activation | str | Callable | None = None,
        *,
        stride: int = 1,
        padding: int = 0,
        **options,
    ) -> None:
        height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
        super().__init__((out_channels, in_channels, height, width), activation, **options)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.windows = Windows((height, width), stride, padding)

    def respond(self, x: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Preactivation s and activation y of inputs x [batch, in, H, W].

        Both are [batch, out, H', W'], with the channels last in memory.
        """
        self.check(x)
        s = self.windows.convolve(x, params["w"]) + params["b"].view(-1, 1, 1)
        rows = samples(s)
        if self.inhibition.endswith("image"):  # all positions share one norm
            rows = rows.reshape(len(s), -1)
        y = self.compete(rows, params)
        return s, y.view(*s.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless inputs are [batch, in, H, W] and not smaller than the kernel."""
        sizes = [n + 2 * self.windows.padding for n in x.shape[2:]]
        too_small = any(n < k for n, k in zip(sizes, self.windows.size, strict=False))
        if x.dim() != 4 or x.shape[1] != self.in_channels or too_small:
            height, width = self.windows.size
            raise ValueError(
                f"expected inputs of shape [batch, {self.in_channels}, >= {height}, >= {width}], "
                f"got {list(x.shape)}"
            )


class Parameterless(nn.Module):
    """A module without parameters or buffers, such as nn.Flatten or nn.Dropout, as a layer.

    Random ones must draw from torch's global generators. Raises ValueError for a module with
    parameters or buffers: those of a model are given at each call.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        held = next((name for name, _ in (*module.named_parameters(), *module.named_buffers())), "")
        if held:
            raise ValueError(
                f"{type(module).__name__} holds {held}, but parameters are given at each call: "
                "take a layer with parameter_shapes() and forward(x, params)"
            )
        self.module = module

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return self.module(x)


class Centre(nn.Module):
    """Subtracts its parameter "input_mean", of the shape of one input, if it has one.

    No rule changes it; rules/layerwise.py sets it to the mean of the inputs.
    """

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return x - params["input_mean"] if params else x


def has_weights(params: dict[str, Tensor]) -> bool:
    """Whether a layer with these parameters has weights, which a rule changes."""
    return "w" in params


class Sequential(nn.Module):
    """Layers in order; params has one dict per layer ({} for those without parameters).

    layers: those of this module, or any that is Parameterless. Some, such as nn.Dropout, act
        differently in evaluation, which Training switches to for the outer loss.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            layer if hasattr(layer, "parameter_shapes") else Parameterless(layer)
            for layer in layers
        )

    def forward(self, x: Tensor, params: Params) -> Tensor:
        if len(params) != len(self.layers):
            raise ValueError(f"expected {len(self.layers)} dicts of parameters, got {len(params)}")
        for layer, layer_params in zip(self.layers, params, strict=True):
            x = layer(x, layer_params)
        return x


def lateral_mlp(
    in_features: int, layer_sizes: Sequence[int], activation: Activation, **options
) -> Sequential:
    """A network of Flatten and one LateralLinear, with the same options, per layer size."""
    sizes = [in_features, *layer_sizes]
    layers = [
        LateralLinear(fan_in, fan_out, activation, **options)
        for fan_in, fan_out in itertools.pairwise(sizes)
    ]
    return Sequential([nn.Flatten(), *layers])


def lateral_network(
    input_shape: Sequence[int],
    layer_sizes: Sequence[int],
    activation: Activation,
    *,
    convolutions: Sequence[tuple[int, int]] = (),
    pool: int = 2,
    centred_inputs: bool = False,
    centred_layers: bool = False,
    **options,
) -> Sequential:
    """A network for images of input_shape [C, H, W].

    Raises ValueError if images become smaller than a kernel or a pooling square.

    layer_sizes: units of the fully connected layers at the end; possibly none.
    convolutions: (channels, kernel size) of the LateralConv2d at the beginning.
    pool: side, in pixels, of the squares that are averaged after each convolution.
    centred_inputs: whether a Centre precedes everything.
    centred_layers: whether a Centre precedes each layer with weights but the first.
    options: of every layer, as in _LateralLayer.
    """
    channels, height, width = input_shape
    layers = []
    for out_channels, kernel in convolutions:
        layers += [LateralConv2d(channels, out_channels, kernel, activation, **options)]
        height, width = ((n - kernel + 1) // pool for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"nothing is left of images {list(input_shape)} after convolutions "
                f"{list(convolutions)} with pooling {pool}"
            )
        layers += [nn.AvgPool2d(pool)] if pool > 1 else []
        channels = out_channels
    dense = lateral_mlp(channels * height * width, layer_sizes, activation, **options)
    layers += dense.layers
    if centred_layers:
        layers = with_centres(layers)
    return Sequential([Centre(), *layers] if centred_inputs else layers)


def with_centres(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers, with a Centre in front of each that has weights except the first of these."""
    new, first = [], True
    for layer in layers:
        if isinstance(layer, _LateralLayer):
            new += [] if first else [Centre()]
            first = False
        new.append(layer)
    return new


class TaskError(ValueError):
    """What several tasks cannot do at once; the message is one line."""


def _check_inhibition(layer: nn.Module) -> None:
    if layer.inhibition == "equilibrium":
        raise TaskError("equilibria are solved for one task at a time")


class _TaskLinear(LateralLinear):
    """A LateralLinear for inputs x [tasks, batch, in] and parameters of every task."""

    def __init__(self, layer: LateralLinear) -> None:
        _check_inhibition(layer)
        nn.Module.__init__(self)
        self.__dict__.update(vars(layer))

    def respond(self, x: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Preactivation s and activation y, both [tasks, batch, out]."""
        self.check(x)
        s = torch.baddbmm(params["b"].unsqueeze(1), x, params["w"].mT)
        return s, self.compete(s, params)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless inputs are [tasks, batch, in]."""
        if x.dim() != 3 or x.shape[2] != self.in_features:
            raise ValueError(
                f"expected inputs of shape [tasks, batch, {self.in_features}], got {list(x.shape)}"
            )


class _TaskConv2d(LateralConv2d):
    """A LateralConv2d for inputs x [tasks, batch, in, H, W] and parameters of every task."""

    def __init__(self, layer: LateralConv2d) -> None:
        _check_inhibition(layer)
        nn.Module.__init__(self)
        self.__dict__.update(vars(layer))
        self.of_task, self.windows = layer.windows, TaskWindows(layer.windows)

    def respond(self, x: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Preactivation s and activation y, both [tasks, batch, out, H', W']."""
        self.check(x)
        each = zip(x, params["w"], params["b"], strict=True)
        s = [self.of_task.convolve(x, w) + b.view(-1, 1, 1) for x, w, b in each]
        rows = torch.stack([samples(of_task) for of_task in s])
        by_norm = rows.view(*x.shape[:2], -1) if self.inhibition.endswith("image") else rows
        y = self.compete(by_norm, params).view_as(rows)
        return self.windows.image(rows, x), self.windows.image(y, x)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless inputs are [tasks, batch, in, H, W]."""
        if x.dim() != 5:
            raise ValueError(f"expected inputs [tasks, batch, in, H, W], got {list(x.shape)}")


class _TaskSamples(Parameterless):
    """A module that treats each sample by itself, for inputs x [tasks, batch, ...]."""

    def forward(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class _TaskCentre(Centre):
    """A Centre whose mean is one of every task."""

    def forward(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return x - params["input_mean"].unsqueeze(1) if params else x


# What treats each sample by itself and draws no random numbers
_SAMPLEWISE = (nn.Flatten, nn.AvgPool2d, nn.MaxPool2d, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity)


def over_tasks(model: nn.Module) -> Sequential:
    """The model for inputs [tasks, batch, ...] and params whose tensors are [tasks, ...].

    Raises TaskError if one of its layers takes one task at a time.
    """
    return Sequential([_over_tasks(layer) for layer in model.layers])


def of_task(params: Params, task: int) -> Params:
    """The parameters of one task, views of those [tasks, ...] of all."""
    return [{name: tensor[task] for name, tensor in layer.items()} for layer in params]


def _over_tasks(layer: nn.Module) -> nn.Module:
    if type(layer) is LateralLinear:
        return _TaskLinear(layer)
    if type(layer) is LateralConv2d:
        return _TaskConv2d(layer)
    if type(layer) is Centre:
        return _TaskCentre()
    if type(layer) is Parameterless and type(layer.module) in _SAMPLEWISE:
        return _TaskSamples(layer.module)
    name = type(layer.module if isinstance(layer, Parameterless) else layer).__name__
    raise TaskError(f"a layer {name} takes one task at a time")


def network_of_flags(
    flags: Mapping[str, Any], input_shape: Sequence[int], layer_sizes: Sequence[int]
) -> Sequential:
    """The network of a run of main.py with these flags, with layers of these sizes.

    Its units are sigmoid(4 s) unless the flags have an "activation".
    """
    return lateral_network(
        input_shape,
        layer_sizes,
        Activation(**flags.get("activation", {"base": "sigmoid", "slope": 4.0})),
        convolutions=flags.get("conv", ()),
        pool=flags.get("pool", 2),
        centred_layers=flags.get("layerwise", False),
        **{name: flags[name] for name in UNIT_FLAGS},
    )
