"""Recipes of networks of competing layers and their training: three known ones, by plain values.

A recipe is everything that a training is made of, to be changed by `dataclasses.replace`.

    deep      convolutions of 96 to 256 channels, 300 units (Amato et al. 2019); competition
              parameters by depth from BioPyTorch's search
    dense     2,000 units that see whole images (Krotov, Hopfield 2019)
    softhebb  convolutions of 96, 384, 1536 channels, soft competition (Journe et al. 2023)
"""

import math
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from krotov_hopfield.choices import FEATURE_NORMS, GATES, NORMALIZATIONS, SCHEDULES


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field of this default and help, for numbers in this range; a command makes flags of it."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class LayerPlan:
    """One layer and what follows it.

    kernel: 0: fully connected. activation: "relu", "triangle" or "power" (relu to a power), the
    last two to `power`. pool: "max" or "average" over squares of pool_size, every pool_stride
    pixels; "" without. lebesgue_p, ranking_param, delta, inverse_temperature: as in layers.py.
    """

    units: int = _setting(MISSING, "units of each layer", "positive")
    kernel: int
    lr: float = _setting(MISSING, "learning rate", "positive")
    lr_end: float = _setting(0.0, "where to (exponential)", "nonnegative")
    lr_speed: float = _setting(1.0, "how fast, per epoch (exponential)", "positive")
    padding: int = 0
    activation: str = "relu"
    power: float = _setting(1.0, "of each layer's activation", "positive")
    pool: str = ""
    pool_size: int = 2
    pool_stride: int = 2
    lebesgue_p: float = _setting(2, "of the norm that units come to have", "positive", metavar="P")
    ranking_param: int = _setting(2, "the k-th unlearns (ranked gates)", "positive", metavar="K")
    delta: float = _setting(0.4, "how much losers unlearn", "nonnegative")
    inverse_temperature: float = _setting(1.0, "of soft gates", "positive")


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
            rest than any before; 0: never. patience_epochs: or after as many as are in so many
            epochs. threshold: or once its convergence is below this. All are looked at after every
            batch.
        rate_waits_above: batches that leave a layer's convergence at this or above do not count
            in its schedule; 0: all count.
        feature_norm: what the classifier does to features first: "batch", batch norm; "image",
            those of each image are divided by their root mean square.
        dropout, classifier_epochs, classifier_lr, classifier_batch_size: of the classifier; with no
            epochs there is none.
    """

    layers: tuple[LayerPlan, ...]
    gate: str = _setting("ranked", "who learns from a sample", choices=GATES)
    normalization: str = _setting("", "what a change is divided by", choices=NORMALIZATIONS)
    rate_exponent: float | None = _setting(
        None, "rates times | |w| - 1 | to this power", "nonnegative"
    )
    padding_mode: str = "zeros"
    batch_norm: bool = True
    unit_inputs: bool = False
    spread: float = 1.0
    fan_in_spread: bool = False
    schedule: str = _setting("exponential", "how the learning rate falls", choices=SCHEDULES)
    together: bool = False
    epochs: float = _setting(20, "passes over the images; also a part of one", "nonnegative")
    batch_size: int = _setting(64, "images of one update", "positive")
    patience: int = _setting(
        0, "end after so many without progress; 0: never", "nonnegative", metavar="BATCHES"
    )
    patience_epochs: float = _setting(
        0.0, "end after so many epochs without progress; 0: never", "nonnegative", metavar="EPOCHS"
    )
    threshold: float = _setting(0.0, "end once the convergence is below this", "nonnegative")
    rate_waits_above: float = _setting(
        0.0, "the rate falls only while the convergence is below this; 0: always", "nonnegative",
        metavar="CONVERGENCE",
    )  # fmt: skip
    feature_norm: str = _setting(
        "batch", "features by batch norm, or by the root mean square of each image's",
        choices=FEATURE_NORMS,
    )  # fmt: skip
    dropout: float = _setting(0.0, "of the features", "fraction below 1")
    classifier_epochs: int = _setting(
        150, "passes over their features; 0: no classifier", "nonnegative"
    )
    classifier_lr: float = _setting(0.05, "its first learning rate (SGD)", "positive")
    classifier_batch_size: int = _setting(64, "features of one step", "positive")


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
    """The learning rate of a layer for which so many epochs count."""
    if recipe.schedule == "linear":
        return plan.lr * (1 - math.floor(epochs) / recipe.epochs)
    if recipe.schedule == "exponential":
        return exponential_rate(plan.lr, plan.lr_end, plan.lr_speed, epochs)
    return plan.lr


def exponential_rate(start: float, end: float, speed: float, epochs: float) -> float:
    """end - (end - start) exp(-speed * epochs): a learning rate after so many epochs."""
    return end - (end - start) * math.exp(-speed * epochs)
