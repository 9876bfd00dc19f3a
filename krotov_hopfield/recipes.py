"""Recipes of three known networks of competing layers and their training, as plain values.

A recipe holds all settings of a training; `dataclasses.replace` changes some of them.

    deep      convolutions of 96 to 256 channels, 300 units (Amato et al. 2019); competition
              parameters for each depth from BioPyTorch's search
    dense     2,000 units that see whole images (Krotov, Hopfield 2019)
    softhebb  convolutions of 96, 384, 1536 channels, soft competition (Journe et al. 2023)
"""

import math
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from krotov_hopfield.choices import (
    AUGMENTATIONS,
    FEATURE_NORMS,
    GATES,
    NORMALIZATIONS,
    SCHEDULES,
)


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field with a default, a help text and the range of its numbers, for a command's flags."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class LayerPlan:
    """The settings of one layer, its activation and its pooling.

    Attributes:
        units: of a fully connected layer, or channels of a convolution.
        kernel: the side of a convolution's kernels in pixels; 0 for a fully connected layer.
        lr, lr_end, lr_speed: the learning rate, see `learning_rate`.
        padding: of the layer's inputs, in pixels.
        activation: "relu", or "triangle" (see layers.py) or "power" (relu), both raised to `power`.
        pool: "max" or "average" over squares of pool_size pixels, pool_stride pixels apart; "" for
            none. "max" pads by (pool_size - pool_stride) // 2 pixels.
        lebesgue_p, ranking_param, delta, inverse_temperature: as in layers.py.
    """

    units: int = _setting(MISSING, "number of units (or channels) of each layer", "positive")
    kernel: int
    lr: float = _setting(MISSING, "initial learning rate of each layer", "positive")
    lr_end: float = _setting(
        0.0, "learning rate approached by an exponential schedule", "nonnegative"
    )
    lr_speed: float = _setting(1.0, "decay rate of an exponential schedule, per epoch", "positive")
    padding: int = 0
    activation: str = "relu"
    power: float = _setting(
        1.0, "power that activations (triangle or power) are raised to", "positive"
    )
    pool: str = ""
    pool_size: int = 2
    pool_stride: int = 2
    lebesgue_p: float = _setting(
        2, "exponent p of the p-norm that units converge to", "positive", metavar="P"
    )
    ranking_param: int = _setting(
        2, "rank of the unit that unlearns (ranked gate)", "positive", metavar="K"
    )
    delta: float = _setting(
        0.4, "how strongly losing units unlearn (ranked and losers gates)", "nonnegative"
    )
    inverse_temperature: float = _setting(
        1.0, "inverse temperature of the softmax (soft gate)", "positive"
    )


@dataclass(frozen=True)
class Recipe:
    """A network and its training.

    Attributes:
        layers: from the input on.
        gate, normalization, rate_exponent: as in layers.py, for all layers; normalization "" means
            the default of each kind of layer.
        padding_mode: as in nn.Conv2d.
        batch_norm: whether each layer's inputs are normalized.
        unit_inputs: divide each image by its Euclidean norm.
        spread: initial weights are drawn from N(0, spread^2).
        fan_in_spread: divide spread by sqrt(fan-in).
        schedule: "constant"; "linear": lr (1 - epoch / epochs), changed after each epoch;
            "exponential": from lr to lr_end with lr_speed, see `exponential_rate`.
        together: all layers learn from each batch; otherwise one layer after the other.
        epochs: passes of each layer's training; may be a fraction.
        batch_size: images in a batch of the layers' training.
        augmentation: of the training images, for layers and classifiers: "none"; "crop": padded by
            4 pixels of reflection and cropped at random; "flip": half of them also mirrored.
        patience: end a layer's training after this many batches in a row of which none set a new
            minimum of its convergence; 0: never.
        patience_epochs: the same, as a number of epochs' batches.
        threshold: end a layer's training when its convergence is below this; 0: never. All three
            are checked after every batch.
        rate_waits_above: batches after which a layer's convergence is at or above this do not
            count in its learning rate schedule; 0: all count.
        feature_norm: how the classifier normalizes features: "batch" is batch norm; "image" divides
            those of each image by their root mean square.
        dropout: fraction of the features dropped in the classifier's training.
        classifier_epochs: passes of the classifier's training; 0: no classifier.
        classifier_lr: its initial learning rate.
        classifier_batch_size: images in a batch of its training.
    """

    layers: tuple[LayerPlan, ...]
    gate: str = _setting("ranked", "which units learn from a sample, and how much", choices=GATES)
    normalization: str = _setting("", "how changes of weights are scaled", choices=NORMALIZATIONS)
    rate_exponent: float | None = _setting(
        None, "multiply each unit's rate by | |w| - 1 | to this power", "nonnegative"
    )
    padding_mode: str = "zeros"
    batch_norm: bool = True
    unit_inputs: bool = False
    spread: float = 1.0
    fan_in_spread: bool = False
    schedule: str = _setting(
        "exponential", "how the layers' learning rates change", choices=SCHEDULES
    )
    together: bool = False
    epochs: float = _setting(
        20, "passes over the images for each layer; may be a fraction", "nonnegative"
    )
    batch_size: int = _setting(64, "images in a batch of the layers' training", "positive")
    augmentation: str = _setting(
        "none",
        "crop training images at random; flip: also mirror half of them",
        choices=AUGMENTATIONS,
    )
    patience: int = _setting(
        0,
        "end a layer's training after this many batches without progress; 0: never",
        "nonnegative",
        metavar="BATCHES",
    )
    patience_epochs: float = _setting(
        0.0,
        "end a layer's training after this many epochs without progress; 0: never",
        "nonnegative",
        metavar="EPOCHS",
    )
    threshold: float = _setting(
        0.0, "end a layer's training once its convergence is below this; 0: never", "nonnegative"
    )
    rate_waits_above: float = _setting(
        0.0, "lower a layer's rate only while convergence is below this; 0: always", "nonnegative",
        metavar="CONVERGENCE",
    )  # fmt: skip
    feature_norm: str = _setting(
        "batch", "normalize the classifier's features by batch norm, or image by image",
        choices=FEATURE_NORMS,
    )  # fmt: skip
    dropout: float = _setting(
        0.0, "fraction of the classifier's features to drop", "fraction below 1"
    )
    classifier_epochs: int = _setting(
        150, "passes over the images for each classifier; 0: no classifier", "nonnegative"
    )
    classifier_lr: float = _setting(
        0.05, "initial learning rate of the classifiers (SGD)", "positive"
    )
    classifier_batch_size: int = _setting(
        64, "images in a batch of the classifiers' training", "positive"
    )


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
    """The first layers of the network of Amato et al., each trained after those before it.

    As in BioPyTorch's search, images are padded, cropped and mirrored at random (its
    slides/slides.pdf, page 34).
    """
    p, k, delta, dropout = FOUND_BY_DEPTH[depth]
    layers = tuple(
        replace(plan, lebesgue_p=p, ranking_param=k, delta=delta) for plan in DEEP_LAYERS[:depth]
    )
    return Recipe(layers, dropout=dropout, patience_epochs=1, threshold=0.01, augmentation="flip")


def dense(depth: int) -> Recipe:
    """Krotov and Hopfield's 2,000 units with a power of their rectified currents."""
    return Recipe(
        (LayerPlan(2000, 0, 0.02, activation="power", power=4.5),), normalization="clamp",
        batch_norm=False, unit_inputs=True, schedule="linear", epochs=200, batch_size=100,
        feature_norm="image", classifier_lr=0.01, classifier_batch_size=100,
    )  # fmt: skip


def softhebb(depth: int) -> Recipe:
    """The first layers of SoftHebb's network, all trained together in one pass."""
    return Recipe(
        SOFTHEBB_LAYERS[:depth], gate="soft", normalization="clamp", rate_exponent=0.5,
        padding_mode="reflect", spread=25.0, fan_in_spread=True, schedule="constant", together=True,
        epochs=1, batch_size=10, dropout=0.5, classifier_epochs=50,
    )  # fmt: skip


RECIPES = {"deep": deep, "dense": dense, "softhebb": softhebb}
DEEPEST = {"deep": len(DEEP_LAYERS), "dense": 1, "softhebb": len(SOFTHEBB_LAYERS)}


def learning_rate(plan: LayerPlan, recipe: Recipe, epochs: float) -> float:
    """The learning rate of a layer after this many epochs."""
    if recipe.schedule == "linear":
        return plan.lr * (1 - math.floor(epochs) / recipe.epochs)
    if recipe.schedule == "exponential":
        return exponential_rate(plan.lr, plan.lr_end, plan.lr_speed, epochs)
    return plan.lr


def exponential_rate(start: float, end: float, speed: float, epochs: float) -> float:
    """end - (end - start) exp(-speed * epochs): a learning rate that decays from start to end."""
    return end - (end - start) * math.exp(-speed * epochs)
