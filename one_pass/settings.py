"""Settings of one-pass tuning and what there is to choose from: no torch is loaded with it."""

from dataclasses import dataclass, field

from one_pass.errors import OnePassError

NAMES = ("lr", "weight_decay", "momentum")
METHODS = (
    "fixed", "look_back", "unrolled", "successive_gradients", "stepped_lr", "population",
)  # fmt: skip
TRANSFORM_KINDS = ("10^", "exp", "sigmoid")  # how a raw value becomes the hyperparameter
DEFAULT_TRANSFORMS = {"lr": "10^", "weight_decay": "10^", "momentum": "sigmoid"}
SMALLEST_POPULATION = 5  # of which one goes on from another


@dataclass(frozen=True)
class Settings:
    """What happens between weight steps.

    Attributes:
        method: fixed, stepped_lr, look_back (this paper's), successive_gradients (Baydin et al.),
            unrolled (exact derivatives through the last `look_back` steps), or population.
        optimised: names of the hyperparameters that are tuned.
        high_dimensional: those of them with a value for every weight.
        transforms: {name: kind}, how raw values become hyperparameters.
        every: T, weight steps for each hyperparameter step.
        look_back: i, terms of the series, or steps that are unrolled.
        lr, final_lr: Adam's on the raw values, at the first and at the last hyperparameter step.
        updates: hyperparameter steps in all, over which Adam's rate falls; beyond them it stays.
        chain_rule: False feeds Adam the derivative for the natural value, as Baydin et al. do.
        recover: a run whose training loss is not finite, or far above where it began, goes on from
            the weights of its last good hyperparameter step at a third of its learning rate.
        clip_norm: of the training gradient.
        bounds: {name: (lowest, highest)} of raw values.
        reset: weights, momentum and buffers start anew after each hyperparameter step but the last.
        seed: of what a population draws.
    Raises OnePassError for an unknown method, name or transform, and for counts below 1.
    """

    method: str
    optimised: tuple[str, ...] = ()
    high_dimensional: tuple[str, ...] = ()
    transforms: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_TRANSFORMS))
    every: int = 10
    look_back: int = 5
    lr: float = 0.05
    final_lr: float = 0.05
    updates: int = 400
    chain_rule: bool = True
    recover: bool = False
    clip_norm: float | None = None
    bounds: dict[str, tuple[float, float]] = field(default_factory=lambda: {"lr": (-10.0, 0.0)})
    reset: bool = False
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
        if self.every < 1 or self.look_back < 1:
            raise OnePassError(
                f"every and look_back must be at least 1, got {self.every} and {self.look_back}"
            )
