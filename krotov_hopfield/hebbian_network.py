"""Networks of competing layers: what a layer is followed by, three known recipes, a classifier.

    recipe = RECIPES["deep"](4)                               # the first four layers
    network = HebbianNetwork((3, 32, 32), recipe, generator)
    for block in network.blocks: block.layer.training_step(x, rate); x = block(x)

A recipe is everything that a training is made of, as plain values, to be changed by
`dataclasses.replace`.

    deep      convolutions of 96 to 256 channels, 300 units (Amato et al. 2019); competition
              parameters by depth from BioPyTorch's search
    dense     2,000 units that see whole images (Krotov, Hopfield 2019)
    softhebb  convolutions of 96, 384, 1536 channels, soft competition (Journe et al. 2023)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from krotov_hopfield.competition import CompetitionError
from krotov_hopfield.layers import BioConv2d, BioLinear, Triangle, exponential_rate

SCHEDULES = ("constant", "linear", "exponential")
FEATURE_NORMS = ("batch", "image")
SMALLEST_SQUARE = 1e-24  # below any mean square of features that are not all 0, also to high powers


@dataclass(frozen=True)
class LayerPlan:
    """One layer and what follows it.

    kernel: 0: fully connected. activation: "relu", "triangle" or "power" (relu to a power), the
    last two to `power`. pool: "max" or "average" over squares of pool_size, every pool_stride
    pixels; "" without. lr, lr_end: learning rates. lebesgue_p, ranking_param, delta,
    inverse_temperature: as in layers.py.
    """

    units: int
    kernel: int
    lr: float
    lr_end: float = 0.0
    lr_speed: float = 1.0
    padding: int = 0
    activation: str = "relu"
    power: float = 1.0
    pool: str = ""
    pool_size: int = 2
    pool_stride: int = 2
    lebesgue_p: float = 2
    ranking_param: int = 2
    delta: float = 0.4
    inverse_temperature: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A network and its training.

    Attributes:
        layers: from the input on.
        gate, normalization, rate_exponent: as in layers.py, of all layers;
            normalization "": that of each kind of layer.
        padding_mode: as in nn.Conv2d. batch_norm: of each layer's inputs.
        unit_inputs: each image is divided by its Euclidean norm.
        spread: of the initial weights, N(0, spread^2); with fan_in_spread divided by sqrt(fan-in).
        schedule: "constant"; "linear": lr (1 - epoch / epochs), epoch by epoch; "exponential":
            from lr to lr_end with lr_speed, see `exponential_rate`.
        together: all layers learn from each batch; else each after those before it.
        epochs: passes of each layer's training, also a fraction of one.
        patience: a layer's training ends after so many batches that did not bring it closer to
            rest than any before; 0: never. threshold: or once its convergence is below this. Both
            are looked at after every batch.
        feature_norm: what the classifier does to features first: "batch", batch norm; "image",
            those of each image are divided by their root mean square.
        dropout, classifier_epochs, classifier_lr, classifier_batch_size: of the classifier.
    """

    layers: tuple[LayerPlan, ...]
    gate: str = "ranked"
    normalization: str = ""
    rate_exponent: float | None = None
    padding_mode: str = "zeros"
    batch_norm: bool = True
    unit_inputs: bool = False
    spread: float = 1.0
    fan_in_spread: bool = False
    schedule: str = "exponential"
    together: bool = False
    epochs: float = 20
    batch_size: int = 64
    patience: int = 0
    threshold: float = 0.0
    feature_norm: str = "batch"
    dropout: float = 0.0
    classifier_epochs: int = 150
    classifier_lr: float = 0.05
    classifier_batch_size: int = 64


CONVOLUTION_RATES, DENSE_RATES = (0.007, 0.0001, 0.8), (0.1, 0.005, 0.1)  # BioPyTorch's
DEEP_LAYERS = (
    LayerPlan(96, 5, *CONVOLUTION_RATES, pool="max"),
    LayerPlan(128, 3, *CONVOLUTION_RATES),
    LayerPlan(192, 3, *CONVOLUTION_RATES, pool="max"),
    LayerPlan(256, 3, *CONVOLUTION_RATES),
    LayerPlan(300, 0, *DENSE_RATES),
)
FOUND_BY_DEPTH = {  # p, k, Delta, dropout: the best of BioPyTorch's search on CIFAR-10
    1: (2, 9, 0.08, 0.2),
    2: (8, 3, 0.34, 0.25),
    3: (8, 5, 0.25, 0.05),
    4: (8, 7, 0.235, 0.1),
    5: (8, 2, 0.335, 0.1),
}
SOFTHEBB_LAYERS = (
    LayerPlan(96, 5, 0.08, padding=2, activation="triangle", power=0.7, pool="max", pool_size=4),
    LayerPlan(384, 3, 0.005, padding=1, activation="triangle", power=1.4, pool="max", pool_size=4,
              inverse_temperature=0.65),
    LayerPlan(1536, 3, 0.01, padding=1, activation="triangle", power=1.0, pool="average",
              inverse_temperature=0.25),
)  # fmt: skip


def deep(depth: int) -> Recipe:
    """The first layers of Amato et al.'s network, one after the other."""
    p, k, delta, dropout = FOUND_BY_DEPTH[depth]
    layers = tuple(
        replace(plan, lebesgue_p=p, ranking_param=k, delta=delta) for plan in DEEP_LAYERS[:depth]
    )
    return Recipe(layers, dropout=dropout, patience=300)


def dense(depth: int) -> Recipe:
    """Krotov and Hopfield's 2,000 units, and the power of their rectified currents."""
    return Recipe(
        (LayerPlan(2000, 0, 0.02, activation="power", power=4.5),), normalization="clamp",
        batch_norm=False, unit_inputs=True, schedule="linear", epochs=200, batch_size=100,
        feature_norm="image", classifier_lr=0.01, classifier_batch_size=100,
    )  # fmt: skip


def softhebb(depth: int) -> Recipe:
    """The first layers of SoftHebb's network, all at once, in one pass."""
    return Recipe(
        SOFTHEBB_LAYERS[:depth], gate="soft", normalization="clamp", rate_exponent=0.5,
        padding_mode="reflect", spread=25.0, fan_in_spread=True, schedule="constant", together=True,
        epochs=1, batch_size=10, dropout=0.5, classifier_epochs=50,
    )  # fmt: skip


RECIPES = {"deep": deep, "dense": dense, "softhebb": softhebb}
DEEPEST = {"deep": len(DEEP_LAYERS), "dense": 1, "softhebb": len(SOFTHEBB_LAYERS)}


def learning_rate(plan: LayerPlan, recipe: Recipe, epochs: float) -> float:
    """The learning rate of a layer that has been trained for so many epochs."""
    if recipe.schedule == "linear":
        return plan.lr * (1 - math.floor(epochs) / recipe.epochs)
    if recipe.schedule == "exponential":
        return exponential_rate(plan.lr, plan.lr_end, plan.lr_speed, epochs)
    return plan.lr


class Block(nn.Module):
    """A competing layer with its activation and its pooling."""

    def __init__(self, layer: BioLinear | BioConv2d, plan: LayerPlan) -> None:
        super().__init__()
        self.layer, self.plan = layer, plan
        self.activation = {
            "relu": nn.ReLU, "triangle": lambda: Triangle(plan.power),
            "power": lambda: RectifiedPower(plan.power),
        }[plan.activation]()  # fmt: skip
        self.pool = nn.Identity()
        if plan.pool == "max":
            padding = (plan.pool_size - plan.pool_stride) // 2
            self.pool = nn.MaxPool2d(plan.pool_size, plan.pool_stride, padding)
        elif plan.pool == "average":
            self.pool = nn.AvgPool2d(plan.pool_size, plan.pool_stride)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [batch, units] or [batch, units, H', W'].

        Raises CompetitionError for images that are too small.
        """
        u = self.activation(self.layer(x))
        if self.plan.pool and min(u.shape[2:]) + 2 * self.pool.padding < self.plan.pool_size:
            raise CompetitionError(
                f"{list(u.shape[2:])} places are fewer than the squares of {self.plan.pool_size} "
                "that are pooled"
            )
        return self.pool(u)


class RectifiedPower(nn.Module):
    """relu(u)^power."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, u: Tensor) -> Tensor:
        return torch.relu(u) ** self.power

    def extra_repr(self) -> str:
        return f"power={self.power}"


class HebbianNetwork(nn.Module):
    """The layers of a recipe, on images of input_shape [C, H, W], initialised by a generator.

    Raises CompetitionError where the images are too small, or too few units compete.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        recipe: Recipe,
        generator: torch.Generator,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.recipe, self.blocks = recipe, nn.ModuleList()
        x = torch.zeros(1, *input_shape, dtype=dtype)
        for plan in recipe.layers:
            layer = make_layer(x.shape[1:], plan, recipe, dtype)
            fan_in = layer.weight[0].numel()
            spread = recipe.spread / math.sqrt(fan_in) if recipe.fan_in_spread else recipe.spread
            layer.reset_parameters(generator, spread=spread)
            self.blocks.append(Block(layer, plan))
            try:
                x = self.blocks[-1](x)
            except CompetitionError as problem:
                raise CompetitionError(
                    f"images {list(input_shape)} are too small for layer {len(self.blocks)}, whose "
                    f"inputs are {list(x.shape[1:])}: take fewer layers"
                ) from problem

    def prepared(self, x: Tensor) -> Tensor:
        """Images [batch, C, H, W] as the first layer takes them."""
        if not self.recipe.unit_inputs:
            return x
        return x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [batch, C, H, W] behind the last layer."""
        x = self.prepared(x)
        for block in self.blocks:
            x = block(x)
        return x


def make_layer(
    shape: Sequence[int], plan: LayerPlan, recipe: Recipe, dtype: torch.dtype
) -> BioLinear | BioConv2d:
    """The competing layer of a plan, for inputs of this shape."""
    options = {
        "lebesgue_p": plan.lebesgue_p, "ranking_param": plan.ranking_param,
        "delta": plan.delta, "gate": recipe.gate, "dtype": dtype,
        "inverse_temperature": plan.inverse_temperature, "rate_exponent": recipe.rate_exponent,
        "batch_norm": recipe.batch_norm,
    }  # fmt: skip
    if recipe.normalization:
        options["normalization"] = recipe.normalization
    if not plan.kernel:
        return BioLinear(math.prod(shape), plan.units, **options)
    return BioConv2d(
        shape[0], plan.units, plan.kernel, padding=plan.padding, padding_mode=recipe.padding_mode,
        **options,
    )  # fmt: skip


class Classifier(nn.Module):
    """A norm without parameters, dropout, and a linear map to the classes.

    features: the shape of what it classifies, [units] or [channels, H, W]. feature_norm: of a
    Recipe. The linear map starts uniform within +-1/sqrt(fan-in), drawn from a generator on the
    CPU.
    """

    def __init__(
        self,
        features: Sequence[int],
        classes: int,
        dropout: float,
        generator: torch.Generator,
        *,
        feature_norm: str = "batch",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if feature_norm == "image":
            self.norm = nn.RMSNorm(list(features), SMALLEST_SQUARE, elementwise_affine=False)
        else:
            norm = nn.BatchNorm2d if len(features) == 3 else nn.BatchNorm1d
            self.norm = norm(features[0], affine=False, dtype=dtype)
        self.dropout = dropout
        self.linear = nn.Linear(math.prod(features), classes, dtype=dtype)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * noise - 1) / math.sqrt(self.linear.in_features))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits [batch, classes]; in training what is dropped comes from the generator."""
        x = self.norm(x).flatten(1)
        if self.training and self.dropout:
            kept = torch.rand(x.shape, generator=generator, dtype=torch.float32) >= self.dropout
            x = x * (kept.to(x.device) / (1 - self.dropout)).to(x.dtype)
        return self.linear(x)
