"""Settings of one-pass tuning and what there is to choose from: no torch is loaded with it."""

from dataclasses import MISSING, dataclass, field
from typing import Any

from one_pass.errors import OnePassError

NAMES = ("lr", "weight_decay", "momentum")
METHODS = (
    "fixed", "look_back", "unrolled", "successive_gradients", "stepped_lr", "population",
)  # fmt: skip
OPTIMIZERS = ("adam", "sgd")  # of the raw hyperparameters
TRANSFORM_KINDS = ("10^", "exp", "sigmoid")  # how a raw value becomes the hyperparameter
DEFAULT_TRANSFORMS = {"lr": "10^", "weight_decay": "10^", "momentum": "sigmoid"}
SMALLEST_POPULATION = 5  # of which one goes on from another


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field of this default and help, for numbers in this range; a command makes flags of it."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class Settings:
    """What happens between weight steps.

    Attributes:
        method: fixed, stepped_lr, look_back (this paper's), successive_gradients (Baydin et al.),
            unrolled (exact derivatives through the last `look_back` steps), or population.
        optimised, high_dimensional: names of hyperparameters.
        optimizer: adam or sgd, of the raw values.
        lr, final_lr: the optimizer's, at the first and at the last hyperparameter step.
        updates: hyperparameter steps over which this rate falls; beyond them it stays.
        chain_rule: False feeds the optimizer the derivative for the natural value, as Baydin et
            al. do.
        recover: a run whose training loss is not finite, or far above where it began, goes on from
            the weights of its last good hyperparameter step at a third of its learning rate.
        transforms: {name: kind}, how raw values become hyperparameters.
        bounds: {name: (lowest, highest)} of raw values.
        reset: weights, momentum and buffers start anew after each hyperparameter step but the last.
        renew: after every so many hyperparameter steps they go on instead, and what they are then
            is the new start; None: never.
        seed: of what a population draws.
    Raises OnePassError for an unknown method, name or transform, and for counts below 1.
    """

    method: str = _setting(MISSING, "how hyperparameters are tuned", choices=METHODS)
    optimised: tuple[str, ...] = _setting((), "those that are tuned", choices=NAMES)
    high_dimensional: tuple[str, ...] = _setting(
        (), "those of them with a value for each weight", choices=NAMES
    )
    transforms: dict[str, str] = field(
        default_factory=lambda: dict(DEFAULT_TRANSFORMS), metadata={"help": "exp, 10^ or sigmoid"}
    )
    every: int = _setting(10, "weight steps for each hyperparameter step, T", "positive")
    look_back: int = _setting(
        5, "terms of the series, i (odd is safer), or unrolled steps", "positive"
    )
    optimizer: str = _setting("adam", "of the raw values", choices=OPTIMIZERS)
    lr: float = _setting(0.05, "the optimizer's rate on the raw values", "positive")
    final_lr: float = _setting(0.05, "the rate falls to this; none: stays", "positive")
    updates: int = _setting(400, "hyperparameter steps", "positive")
    chain_rule: bool = _setting(True, "false: the derivative for the natural value is followed")
    recover: bool = _setting(
        False, "a run that diverges goes on from its last good weights, slower"
    )
    clip_norm: float | None = None  # of the training gradient
    bounds: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"lr": (-10.0, 0.0)},
        metadata={"help": "bounds of raw values; null: none"},
    )
    reset: bool = _setting(False, "train from the start again")
    renew: int | None = _setting(None, "go on instead after every so many of them", "positive")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OnePassError(
                f"method {self.method!r} is unknown; choose from {', '.join(METHODS)}"
            )
        for name in (*self.optimised, *self.high_dimensional, *self.transforms, *self.bounds):
            if name not in NAMES:
                raise OnePassError(
                    f"hyperparameter {name!r} is unknown; known are {', '.join(NAMES)}"
                )
        for name in NAMES:
            if self.transforms.get(name) not in TRANSFORM_KINDS:
                raise OnePassError(
                    f"{name} can be transformed by {', '.join(TRANSFORM_KINDS)}, not "
                    f"{self.transforms.get(name)!r}"
                )
        if self.optimizer not in OPTIMIZERS:
            raise OnePassError(
                f"optimizer {self.optimizer!r} is unknown; choose from {', '.join(OPTIMIZERS)}"
            )
        if self.every < 1 or self.look_back < 1:
            raise OnePassError(
                f"every and look_back must be at least 1, got {self.every} and {self.look_back}"
            )
