"""Settings of one-pass tuning and their choices; importing this module does not load torch."""

from dataclasses import MISSING, dataclass, field
from typing import Any

from one_pass.errors import OnePassError

NAMES = ("lr", "weight_decay", "momentum")
METHODS = (
    "fixed", "look_back", "unrolled", "successive_gradients", "stepped_lr", "population",
)  # fmt: skip
WITH_VALIDATION_BATCHES = ("look_back", "unrolled")  # the methods that use some
OPTIMIZERS = ("adam", "sgd")  # for the raw hyperparameters
TRANSFORM_KINDS = ("10^", "exp", "sigmoid")  # how a raw value becomes the hyperparameter
DEFAULT_TRANSFORMS = {"lr": "10^", "weight_decay": "10^", "momentum": "sigmoid"}
SMALLEST_POPULATION = 5  # runs, because the worst fifth continues from the best


def _setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A field with a default, a help text and the range of its numbers, for a command's flags."""
    return field(default=default, metadata={"help": help, "range": range, **metadata})


@dataclass(frozen=True)
class Settings:
    """How hyperparameters are tuned between weight steps.

    Attributes:
        method: fixed; stepped_lr; look_back (of Clarke et al.); successive_gradients (of Baydin et
            al.); unrolled (exact derivatives through the last `look_back` steps); or population.
        optimised, high_dimensional: names of hyperparameters: those that are tuned, and those of
            them that have a value for each weight.
        every: weight steps between two hyperparameter steps, T.
        look_back: terms of the Neumann series, i, or unrolled steps.
        optimizer: adam or sgd, for the raw values.
        lr, final_lr: the optimizer's learning rate at the first and the last hyperparameter step.
        updates: hyperparameter steps over which this rate falls; it is constant afterwards.
        chain_rule: False gives the optimizer the derivative for the natural value, as Baydin et
            al. do.
        recover: a run whose training loss is not finite, or more than three times the first one,
            continues from the weights of its last good hyperparameter step with a third of its
            learning rate.
        clip_norm: the largest norm of the training gradient; None: no limit.
        transforms: {name: kind}, how raw values become hyperparameters.
        bounds: {name: (lowest, highest)} of raw values.
        reset: weights, momentum and buffers return to the start after each hyperparameter step
            except the last.
        renew: after this many hyperparameter steps, instead of a reset, the current weights and
            buffers become the new start; None: never.
        seed: of the random numbers that a population draws.
    Raises OnePassError for an unknown method, optimizer, name or transform, and if `every` or
    `look_back` is below 1.
    """

    method: str = _setting(MISSING, "how hyperparameters are tuned", choices=METHODS)
    optimised: tuple[str, ...] = _setting((), "hyperparameters that are tuned", choices=NAMES)
    high_dimensional: tuple[str, ...] = _setting(
        (), "tuned hyperparameters that have a value for each weight", choices=NAMES
    )
    transforms: dict[str, str] = field(
        default_factory=lambda: dict(DEFAULT_TRANSFORMS),
        metadata={"help": "10^, exp or sigmoid for each raw hyperparameter"},
    )
    every: int = _setting(10, "weight steps between two hyperparameter steps, T", "positive")
    look_back: int = _setting(
        5, "terms of the Neumann series, i (odd is safer), or unrolled steps", "positive"
    )
    optimizer: str = _setting("adam", "optimizer of the raw hyperparameters", choices=OPTIMIZERS)
    lr: float = _setting(
        0.05, "initial learning rate of the hyperparameters' optimizer", "positive"
    )
    final_lr: float = _setting(
        0.05, "last learning rate of the hyperparameters' optimizer; none: as initial", "positive"
    )
    updates: int = _setting(400, "number of hyperparameter steps", "positive")
    chain_rule: bool = _setting(
        True, "false: use derivatives for the natural, not the raw hyperparameters"
    )
    recover: bool = _setting(
        False, "continue diverged runs from their last good weights, at a lower rate"
    )
    clip_norm: float | None = None  # the largest norm of the training gradient
    bounds: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"lr": (-10.0, 0.0)},
        metadata={"help": "bounds of the raw hyperparameters; null: none"},
    )
    reset: bool = _setting(False, "reset the weights after each hyperparameter step")
    renew: int | None = _setting(
        None, "hyperparameter steps after which current weights become the new start", "positive"
    )
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
