"""Networks of competing layers, with activations and pooling, and classifiers on their features.

    recipe = RECIPES["deep"](4)                               # the first four layers
    network = KrotovHopfieldNetwork((3, 32, 32), recipe, generator)
    for block in network.blocks: block.layer.training_step(x, rate); x = block(x)

A Recipe (recipes.py) says what a network consists of.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from krotov_hopfield.errors import CompetitionError
from krotov_hopfield.layers import BioConv2d, BioLinear, Triangle
from krotov_hopfield.recipes import LayerPlan, Recipe

# below the mean square of any features that aren't all 0, even after high powers
SMALLEST_SQUARE = 1e-24


class Block(nn.Module):
    """A competing layer followed by its activation and its pooling."""

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
        """The block's output, [batch, units] or [batch, units, H', W'].

        Raises CompetitionError if the images are too small.
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


class KrotovHopfieldNetwork(nn.Module):
    """The layers of a recipe for images of input_shape [C, H, W], initialized by a CPU generator.

    Raises CompetitionError if the images are too small or an option doesn't suit its layer, such as
    a ranking_param above the number of units.
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
        self.input_shape, self.recipe = tuple(input_shape), recipe
        self.blocks = nn.ModuleList()
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
        """Images [batch, C, H, W] as the first layer takes them.

        With recipe.unit_inputs each image is divided by its Euclidean norm.
        """
        if not self.recipe.unit_inputs:
            return x
        return x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's features of images [batch, C, H, W]."""
        x = self.prepared(x)
        for block in self.blocks:
            x = block(x)
        return x


def make_layer(
    shape: Sequence[int], plan: LayerPlan, recipe: Recipe, dtype: torch.dtype
) -> BioLinear | BioConv2d:
    """The competing layer of a plan, for inputs [batch, *shape]."""
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
    """A norm without parameters, dropout, and a linear map to the logits of the classes.

    The linear map starts uniform within +-1/sqrt(fan-in).

    features: the shape of a sample's features, [units] or [channels, H, W].
    generator: a CPU generator.
    feature_norm: as in a Recipe.
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
                options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
                noise = torch.rand(parameter.shape, **options)
                parameter.copy_((2 * noise - 1) / math.sqrt(self.linear.in_features))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits [batch, classes] of features [batch, *features].

        generator: for dropout during training, on any device (default: torch's global one of the
            CPU).
        """
        drops = self.training and self.dropout
        return self.logits(x, self.uniform(len(x), generator) if drops else None)

    def uniform(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """Numbers in [0, 1) that decide what is dropped, float32 [batch, features]."""
        place = generator.device if generator is not None else "cpu"
        options = {"generator": generator, "dtype": torch.float32, "device": place}
        return torch.rand(batch, self.linear.in_features, **options)

    def logits(self, x: Tensor, uniform: Tensor | None) -> Tensor:
        """Logits [batch, classes], with those features dropped whose `uniform` is small enough.

        uniform: numbers in [0, 1), [batch, features]; None: nothing is dropped.
        """
        x = self.norm(x).flatten(1)
        if uniform is not None:
            kept = uniform >= self.dropout
            x = x * (kept.to(x.device) / (1 - self.dropout)).to(x.dtype)
        return self.linear(x)
