"""What learned optimisers are trained on and judged by: networks, their losses and data.

    task = make_task("sigmoid20", images, labels)     # or relu128-128, relu20bn, conv16-32, ...
    params = task.optimizee.initial(generator)        # a list with one dict of tensors per layer
    for batch in task.batches(generator):             # (images, labels), endless
        loss = task.optimizee.loss(params, batch)

Names of tasks:

    relu128-128       an activation and the sizes of the hidden layers
    sigmoid+relu20    several activations, which the units of a layer have in turn
    relu20bn          with batch norm (affine, statistics of the batch) before each activation
    conv16-32         3x3 convolutions that keep the size, each with ReLU and 2x2 max pooling
    conv16k3-32k5     the same with kernels of 3x3 and 5x5 and no padding
    lenet             LeNet-5 with ReLUs, on images of 32x32
    quadratic         |W theta - y|^2 with ten parameters

`Optimizee` takes any nn.Module. Sources: Andrychowicz et al. 2016, section 3; Chen et al. 2020
(arXiv 2010.09089) for conv16k3-32k5; LeCun et al. 1998 for LeNet-5.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from learned_optimizer.errors import OptimizerError
from learned_optimizer.settings import BATCH_SIZE

Params = list[dict[str, Tensor]]  # one dict for each layer

ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "linear": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "log_sigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "hardshrink": nn.Hardshrink,
    "tanhshrink": nn.Tanhshrink,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
}
ONE = "|".join(ACTIVATIONS)
NAMED = re.compile(rf"((?:{ONE})(?:\+(?:{ONE}))*)(\d+(?:-\d+)*)(bn)?")
CONVOLUTIONS = re.compile(r"conv(\d+(?:k\d+)?(?:-\d+(?:k\d+)?)*)(bn)?")
QUADRATIC = 10  # parameters
LARGEST_LAYER = 1_000_000  # units


class Optimizee(nn.Module):
    """Any module as a model without parameters of its own, called as model(x, params).

    Running statistics are never updated. Raises OptimizerError for a module without parameters to
    optimise, and for one that draws random numbers: here if a layer such as dropout does it, in the
    first call of `gradients` otherwise.

    make_module: makes the module with initial parameters drawn from torch's global generator,
        which is seeded before and restored afterwards. The module is used in the mode (training
        or evaluation) that it is returned in.
    loss_of: (outputs, targets) -> scalar.

    Attributes:
        layers: the modules that have no children or have parameters of their own, in order;
            params holds one dict for each of them. Frozen parameters (requires_grad=False) are
            not in params; they keep the values of the first module made.
    """

    def __init__(
        self, make_module: Callable[[], nn.Module], loss_of: Callable = cross_entropy
    ) -> None:
        super().__init__()
        self.make_module, self.loss_of = make_module, loss_of
        module = self._drawn(torch.Generator())
        _refuse_random(module)
        layers = [
            (name, layer)
            for name, layer in module.named_modules()
            if not list(layer.children()) or list(layer.parameters(recurse=False))
        ]
        self._names = _parameter_names(layers)
        if not any(self._names):
            raise OptimizerError("the model has no parameters: there is nothing to optimise")
        self._shapes = [[module.get_parameter(n).shape for n in names] for names in self._names]
        self._module = [module]  # in a list, so that its parameters aren't this model's
        self._draws_nothing = False  # not yet known
        self.layers = [layer for _, layer in layers]

    def extra_repr(self) -> str:
        return f"{sum(self.sizes())} parameters"

    def names(self) -> list[str]:
        """The full name of each tensor of params, in order."""
        return [name for names in self._names for name in names]

    def sizes(self) -> list[int]:
        """The number of elements of each tensor of params, in order."""
        return [shape.numel() for shapes in self._shapes for shape in shapes]

    def sizes_by_layer(self) -> list[int]:
        """The number of elements of each of params' dicts."""
        return [sum(shape.numel() for shape in shapes) for shapes in self._shapes]

    def initial(
        self, generator: torch.Generator, dtype: torch.dtype | None = None, device="cpu"
    ) -> Params:
        """New initial parameters, of the module's own type if dtype is None."""
        module = self._drawn(generator)
        return [
            {_last(n): module.get_parameter(n).detach().to(device, dtype) for n in names}
            for names in self._names
        ]

    def forward(self, x: Tensor, params: Params) -> Tensor:
        """The module's outputs for inputs x."""
        module = self._module[0]
        values = {name: layer[_last(name)] for names, layer in self._with(params) for name in names}
        like = next(iter(values.values()))
        for name, buffer in module.named_buffers():
            dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
            values[name] = buffer.to(x.device, dtype, copy=True)
        for name, p in module.named_parameters():
            if not p.requires_grad:
                values[name] = p.to(x.device, like.dtype)
        return functional_call(module, values, (x,))

    def calls(self, x: Tensor, params: Params) -> list[int]:
        """The numbers of the layers in the order in which inputs x pass them; a layer may recur."""
        seen: list[int] = []
        hooks = [
            layer.register_forward_hook(lambda *_, number=number: seen.append(number))
            for number, layer in enumerate(self.layers)
        ]
        try:
            self(x, params)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, a scalar, of a batch of inputs and targets."""
        x, target = batch
        return self.loss_of(self(x, params), target)

    # ---- parameters as one vector ----

    def flat(self, params: Params) -> Tensor:
        """All parameters as one vector [n]."""
        tensors = (layer[_last(n)] for names, layer in self._with(params) for n in names)
        return torch.cat([tensor.flatten() for tensor in tensors])

    def unflat(self, theta: Tensor) -> Params:
        """Parameters that are views of one vector [n]."""
        parts = iter(theta.split(self.sizes()))
        return [
            {_last(n): next(parts).view(s) for n, s in zip(names, shapes, strict=True)}
            for names, shapes in zip(self._names, self._shapes, strict=True)
        ]

    def gradients(
        self, theta: Tensor, batches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Losses [K] and gradients [K, n] of K networks theta [K, n], each on its own batch.

        Raises OptimizerError if the model draws random numbers.
        """
        if not self._draws_nothing:
            self._check_draws_nothing(theta[0], batches[0])
        if len(batches) > 1 and not any(True for _ in self._module[0].buffers()):
            return self._gradients_at_once(theta, batches)
        losses, gradients = zip(*map(self._gradient, theta, batches), strict=True)
        return torch.stack(losses), torch.stack(gradients)

    def _gradient(self, theta: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            params = self.unflat(theta.detach())
            leaves = [t.requires_grad_() for layer in params for t in layer.values()]
            loss = self.loss(params, batch)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)  # 0 if not used
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    @torch.no_grad()
    def _check_draws_nothing(self, theta: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        """Raises OptimizerError if a loss advances torch's global generators, which aren't ours."""
        before = _generator_states(theta.device)
        self.loss(self.unflat(theta), batch)
        if not all(map(torch.equal, before, _generator_states(theta.device))):
            raise OptimizerError(
                "the model draws random numbers in its forward pass: leave that out, or call its "
                "eval()"
            )
        self._draws_nothing = True

    def _gradients_at_once(
        self, theta: Tensor, batches: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        def loss(vector: Tensor, x: Tensor, target: Tensor) -> Tensor:
            return self.loss(self.unflat(vector), (x, target))

        stacked = (torch.stack(part) for part in zip(*batches, strict=True))
        gradients, losses = vmap(grad_and_value(loss))(theta.detach(), *stacked)
        return losses, gradients

    def _with(self, params: Params):
        return zip(self._names, params, strict=True)

    def _drawn(self, generator: torch.Generator) -> nn.Module:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_module()


@dataclass(frozen=True)
class Task:
    """An optimizee and its data.

    Attributes:
        batches: batches(generator) is an endless iterator of (inputs, targets).
    """

    optimizee: Optimizee
    batches: Callable[[torch.Generator], Iterator[tuple[Tensor, Tensor]]]


def make_task(
    name: str,
    images: Tensor,
    labels: Tensor,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype = torch.float32,
    norm_eps: float = 1e-5,
    classes: int | None = None,
) -> Task:
    """The task of this name on these images; the names are listed above.

    Raises OptimizerError for an unknown name, if there is no label for each image or not enough
    images for a batch, and for batch norm if a batch has only one number per unit.

    images: [N, C, H, W], uint8, or floating-point numbers of any scale.
    labels: int64 [N].
    norm_eps: the eps of batch norm.
    classes: the number of outputs (default: the largest label + 1).
    """
    if name == "quadratic":
        device = images.device
        return Task(
            Optimizee(Quadratic, squared_distance),
            lambda generator: quadratic_batches(generator, dtype, device),
        )
    if not 1 <= batch_size <= len(images):
        raise OptimizerError(
            f"batch size {batch_size} must be from 1 to {len(images)}, the number of images"
        )
    if images.dim() != 4 or labels.shape != images.shape[:1]:
        raise OptimizerError(
            f"expected images [N, C, H, W] and labels [N], got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    classes = int(labels.max()) + 1 if classes is None else classes
    optimizee = image_optimizee(name, images.shape[1:], classes, norm_eps)
    if batch_size == 1:
        _refuse_batch_norm_of_one(name, optimizee, _floats(images[:1], dtype))
    return Task(
        optimizee, lambda generator: LabelledBatches(images, labels, batch_size, generator, dtype)
    )


def image_optimizee(
    name: str, input_shape: Sequence[int] = (1, 28, 28), classes: int = 10, norm_eps: float = 1e-5
) -> Optimizee:
    """The network with this name, whose outputs are the logits of the classes.

    Raises OptimizerError for an unknown name, or if the network doesn't suit the images.
    """
    dense, convolutions = NAMED.fullmatch(name), CONVOLUTIONS.fullmatch(name)
    if name == "lenet":
        return Optimizee(lambda: lenet(input_shape, classes))
    parts = dense or convolutions
    layers = parts[2 if dense else 1].split("-") if parts else []
    sizes = [[int(number) for number in layer.split("k")] for layer in layers]
    if not parts or any(0 in layer for layer in sizes):
        raise OptimizerError(
            f"unknown optimizee {name!r}; such as sigmoid20, relu128-128, relu20bn, "
            "sigmoid+tanh+relu20, conv16-32, conv16k3-32k5, lenet, quadratic; activations are "
            + ", ".join(ACTIVATIONS)
        )
    if max(map(max, sizes)) > LARGEST_LAYER:
        raise OptimizerError(f"{name} is too large: layers have at most {LARGEST_LAYER:,} units")
    if convolutions:
        return Optimizee(
            lambda: convolutional(input_shape, sizes, classes, bool(parts[2]), norm_eps)
        )
    kinds, units = [ACTIVATIONS[kind] for kind in parts[1].split("+")], [size for (size,) in sizes]
    return Optimizee(
        lambda: perceptron(
            input_shape, units, classes, lambda: activation_of(kinds), bool(parts[3]), norm_eps
        )
    )


def activation_of(kinds: Sequence[Callable[[], nn.Module]]) -> nn.Module:
    """One activation, or a mixture of several."""
    return kinds[0]() if len(kinds) == 1 else Mixture(kind() for kind in kinds)


class Mixture(nn.ModuleList):
    """Activations that the units of a layer [batch, units, ...] have in turn."""

    def forward(self, x: Tensor) -> Tensor:
        """The activations of x [batch, units, ...], in the same shape."""
        turn = torch.arange(x.shape[1], device=x.device) % len(self)
        turn = turn.view(-1, *[1] * (x.dim() - 2))
        y = self[0](x)
        for number, activation in enumerate(self[1:], 1):
            y = torch.where(turn == number, activation(x), y)
        return y


def perceptron(
    input_shape: Sequence[int],
    sizes: Sequence[int],
    classes: int,
    activation: Callable[[], nn.Module],
    norm: bool = False,
    norm_eps: float = 1e-5,
) -> nn.Sequential:
    """Fully connected layers; with norm, each hidden layer has batch norm before its activation."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = [torch.Size(input_shape).numel(), *sizes]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out)]
        if norm:
            layers += [nn.BatchNorm1d(fan_out, norm_eps, track_running_stats=False)]
        layers += [activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def convolutional(
    input_shape: Sequence[int],
    sizes: Sequence[Sequence[int]],
    classes: int,
    norm: bool = False,
    norm_eps: float = 1e-5,
) -> nn.Sequential:
    """Convolutions with ReLU, each followed by 2x2 max pooling, and a fully connected layer.

    Raises OptimizerError if nothing is left of the images.

    sizes: for each convolution its channels, then the side of its kernels, which are not padded;
        without a side, they are 3x3 and padded by 1.
    """
    layers: list[nn.Module] = []
    channels, height, width = input_shape
    for out, *side in sizes:
        kernel, padding = (side[0], 0) if side else (3, 1)
        layers += [nn.Conv2d(channels, out, kernel, padding=padding)]
        if norm:
            layers += [nn.BatchNorm2d(out, norm_eps, track_running_stats=False)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        lost = kernel - 1 - 2 * padding
        channels, height, width = out, (height - lost) // 2, (width - lost) // 2
        if min(height, width) < 1:
            raise OptimizerError(f"nothing is left of images {list(input_shape)} after {out} units")
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


def lenet(input_shape: Sequence[int], classes: int) -> nn.Sequential:
    """LeNet-5 with ReLUs and 2x2 max pooling; 61,706 parameters for grey images and ten classes.

    Raises OptimizerError if the images don't have 32 x 32 pixels.
    """
    if tuple(input_shape[1:]) != (32, 32):
        raise OptimizerError(
            f"lenet takes images of 32 x 32 pixels, not {' x '.join(map(str, input_shape[1:]))}: "
            "resize them"
        )
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


class Quadratic(nn.Module):
    """The map W -> W theta for matrices W [10, 10]; theta [10] is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(QUADRATIC))

    def forward(self, W: Tensor) -> Tensor:
        return W @ self.theta


def squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2, a scalar."""
    return (output - target).square().sum()


def quadratic_batches(
    generator: torch.Generator, dtype: torch.dtype, device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One W [10, 10] and y [10] with normal entries, repeated endlessly."""
    shape = QUADRATIC, QUADRATIC + 1
    place = {"dtype": dtype, "device": generator.device}
    numbers = torch.randn(shape, generator=generator, **place).to(device)
    while True:
        yield numbers[:, :-1], numbers[:, -1]


class LabelledBatches:
    """Batches of images [batch, C, H, W] and labels [batch], endless, in a new order at each pass.

    uint8 images become numbers in [0, 1]. An incomplete batch at the end of a pass is dropped.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        self.images, self.labels, self.dtype = images, labels, dtype
        self.batch_size, self.generator = batch_size, generator
        self._indices = self._endless()

    def __iter__(self) -> "LabelledBatches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.of(next(self._indices))

    def next_indices(self, count: int) -> Tensor:
        """The image numbers [count, batch] of the next batches, which are then over."""
        return torch.stack([next(self._indices) for _ in range(count)])

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels with these numbers [N]."""
        return _floats(self.images.index_select(0, index), self.dtype), self.labels[index]

    def _endless(self) -> Iterator[Tensor]:
        while True:
            count, generator = len(self.images), self.generator
            order = torch.randperm(count, generator=generator, device=generator.device)
            for index in order.to(self.images.device).split(self.batch_size):
                if len(index) == self.batch_size:
                    yield index


def _floats(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in floating point; uint8 become [0, 1], divided in float32 or wider, rounded once."""
    if images.dtype == torch.uint8:
        images = images.to(torch.promote_types(dtype, torch.float32)).div_(255)
    return images.to(dtype)


def _parameter_names(layers: Sequence[tuple[str, nn.Module]]) -> list[list[str]]:
    """For each layer, the full names of its parameters that aren't frozen.

    A parameter that layers share belongs to the first of them.
    """
    seen: set[int] = set()
    names = []
    for prefix, layer in layers:
        named = layer.named_parameters(recurse=False)
        new = [(n, p) for n, p in named if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for _, p in new)
        names.append([f"{prefix}.{n}" if prefix else n for n, _ in new])
    return names


def _generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators that a computation on the device may advance."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@torch.no_grad()
def _refuse_batch_norm_of_one(name: str, optimizee: Optimizee, image: Tensor) -> None:
    """Raises OptimizerError if a single image leaves batch norm without variance."""
    params = optimizee.initial(torch.Generator().manual_seed(0), image.dtype, image.device)
    try:
        optimizee(image, params)
    except ValueError as problem:
        raise OptimizerError(f"{name} needs batches of at least 2 images: {problem}") from problem


def _refuse_random(module: nn.Module) -> None:
    """Raises OptimizerError if a layer draws random numbers, which no seed would control."""
    for name, layer in module.named_modules():
        rate = float(isinstance(layer, nn.RReLU))
        if isinstance(layer, _DropoutNd):
            rate = layer.p
        elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            rate = layer.dropout
        if layer.training and rate:
            raise OptimizerError(
                f"the layer {name or 'itself'} ({type(layer).__name__}) draws random numbers: "
                "leave it out, or call its eval()"
            )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
