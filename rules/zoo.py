"""A zoo of learned rules, each in a file with everything needed to use it.

    entry = load_zoo("latent-predictive")        # or the path of such a file, or of a run
    entry.recipe.rule, entry.recipe.views, entry.accuracies
    save_zoo(entry, "rules/zoo/mnist32.json")

The files are rules/zoo/NAME.json, some kB of JSON: `format` 1, and the fields of a ZooEntry and of
its Recipe. They are read strictly: anything missing, unknown, not finite or far too large raises a
RuleError of one line.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from experiment.files import write_whole
from experiment.main_settings import UNIT_FLAGS
from experiment.view_strengths import ViewStrengths
from initializers import fixed_initializer
from learning_rules import LearningRule, PerLayerRule, RuleError
from models_fully_local import INHIBITION, Activation, Sequential, lateral_network
from rules.choices import names, zoo_path
from rules.families import rule_from_dict

FORMAT = 1
IN_A_RUN = "zoo.json"  # the file of a run's rule, in its directory
CENTRINGS = ("none", "mean", "standardised")  # for each pixel, over the training images
LARGEST = {  # limits of the values in a file
    "bytes": 2**18, "layers": 8, "units": 2**16, "kernel": 64, "pool": 64, "inh_steps": 1000,
    "steps": 10**7, "batch_size": 2**20, "number": 1e30,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A rule, the units that it trains, their initial distribution, and their inputs.

    Attributes:
        rule: a PerLayerRule; further layers use its last rule.
        activation, inhibition, inh_steps, inh_factor, forbid_self_inhibition, forbid_excitation: of
            the units, as in models_fully_local.py.
        conv, pool: (channels, kernel) of each convolution before the layers of units, and the size
            of pooling, as in `lateral_network`.
        initial: the initial distribution, as in `fixed_initializer`.
        centring: "none", "mean" or "standardised", for each pixel over the training images.
        views: how pairs are made; None if the rule takes single inputs.
        batch_size: the number of inputs in each update.
    """

    rule: PerLayerRule
    activation: Activation = field(default_factory=lambda: Activation("sigmoid", 4.0))
    inhibition: str = "none"
    inh_steps: int = 10
    inh_factor: float = 0.2
    forbid_self_inhibition: bool = False
    forbid_excitation: bool = False
    conv: tuple[tuple[int, int], ...] = ()
    pool: int = 2
    initial: Mapping[str, float] = field(default_factory=lambda: {"spread_w": 1.0})
    centring: str = "mean"
    views: ViewStrengths | None = None
    batch_size: int = 512

    def network(self, input_shape: Sequence[int], units: Sequence[int]) -> Sequential:
        """The network for inputs [C, H, W], which it centres itself, with Centres between layers.

        Raises ValueError if the convolutions do not fit the inputs.
        """
        return lateral_network(
            input_shape,
            units,
            self.activation,
            convolutions=self.conv,
            pool=self.pool,
            centred_inputs=self.centring != "none",
            centred_layers=True,
            **{name: getattr(self, name) for name in UNIT_FLAGS},
        )

    def rules(self, layers: int) -> list[LearningRule]:
        """A rule for each of so many layers."""
        known = self.rule.rules
        return [known[min(k, len(known) - 1)] for k in range(layers)]


@dataclass(frozen=True)
class ZooEntry:
    """A rule in the zoo.

    Attributes:
        layers: units of each layer that it was learned with, after the recipe's convolutions.
        steps: the number of updates that it was learned with.
        layerwise: whether these layers are trained one after the other.
        dataset, data: the name of the data set that it was learned on, and its source.
        command: the command that learned it.
        accuracies: accuracies of a probe on test images, each with dataset, layers, steps, mean,
            deviation (of the sample; None for one training) and number of trainings.
        about: a one-line description.
    """

    name: str
    recipe: Recipe
    layers: tuple[int, ...]
    steps: int
    layerwise: bool
    dataset: str
    data: str
    command: str
    accuracies: tuple[Mapping[str, Any], ...] = ()
    about: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain values, for JSON."""
        recipe = {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)}
        recipe["rule"] = self.recipe.rule.to_dict()
        recipe["activation"] = {
            "base": self.recipe.activation.base, "slope": self.recipe.activation.slope
        }  # fmt: skip
        recipe["views"] = self.recipe.views and self.recipe.views.to_dict()
        whole = {f.name: getattr(self, f.name) for f in fields(ZooEntry)}
        del whole["name"]
        about = whole.pop("about")
        return {"format": FORMAT, "about": about, **whole, "recipe": recipe}


def load_zoo(name: str | Path) -> ZooEntry:
    """The rule of this name, in this file or of this run.

    Raises RuleError if there is none or its file is damaged.
    """
    path = zoo_path(str(name)) if str(name) in names() else Path(name)
    try:
        if path.is_dir() and not (path / IN_A_RUN).is_file():
            raise RuleError(
                f"{path} holds no {IN_A_RUN}: runs of main.py end with one, unless their rule is a "
                "class of your own or too large; --resume writes that of an older run"
            )
        path = path / IN_A_RUN if path.is_dir() else path
        if not path.is_file():
            raise RuleError(f"no rule is called {str(name)!r}; choose from {', '.join(names())}")
        with path.open("rb") as file:
            text = file.read(LARGEST["bytes"] + 1)
    except OSError as problem:
        raise RuleError(f"cannot read {path}: {problem.strerror}") from problem
    try:
        called = path.parent.name if path.name == IN_A_RUN else path.stem
        return _entry(called, _parsed(text))
    except RecursionError:
        raise RuleError(f"{path} is no rule of the zoo: nested too deeply") from None
    except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
        raise RuleError(f"{path} is no rule of the zoo: {_one_line(problem)}") from problem


def save_zoo(entry: ZooEntry, path: str | Path) -> None:
    """Write an entry's file; raises RuleError if `load_zoo` could not read it."""
    text = json.dumps(entry.to_dict(), indent=1) + "\n"
    try:
        _entry(entry.name, _parsed(text.encode()))
    except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
        raise RuleError(f"not to be kept in the zoo: {_one_line(problem)}") from problem
    write_whole(path, text)


# ---- reading ----


def _parsed(text: bytes) -> dict[str, Any]:
    if len(text) > LARGEST["bytes"]:
        raise ValueError(f"it is larger than {LARGEST['bytes']} bytes")
    value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError("it holds no table")
    if value.get("format") != FORMAT:
        raise ValueError(f"its format is {value.get('format')!r}, expected {FORMAT}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def _entry(name: str, value: dict[str, Any]) -> ZooEntry:
    expected = {"format", *(f.name for f in fields(ZooEntry))} - {"name"}
    _check_names("the file", value, expected)
    recipe = _recipe(value["recipe"])
    layers = _whole_numbers("layers", value["layers"], "units")
    depth = len(recipe.conv) + len(layers)
    if not 1 <= depth <= LARGEST["layers"]:
        raise ValueError(f"its number of layers is {depth}, expected 1 to {LARGEST['layers']}")
    for text in ("dataset", "data", "command", "about"):
        if not isinstance(value[text], str):
            raise ValueError(f"{text} is {value[text]!r}, expected text")
    if type(value["layerwise"]) is not bool:
        raise ValueError(f"layerwise is {value['layerwise']!r}, expected true or false")
    return ZooEntry(
        name=name,
        recipe=recipe,
        layers=layers,
        steps=_whole("steps", value["steps"], "steps"),
        accuracies=tuple(map(_accuracy, value["accuracies"])),
        **{key: value[key] for key in ("layerwise", "dataset", "data", "command", "about")},
    )


def _recipe(value: dict[str, Any]) -> Recipe:
    _check_names("recipe", value, {f.name for f in fields(Recipe)})
    rule = rule_from_dict(value["rule"])
    if not isinstance(rule, PerLayerRule) or not 1 <= len(rule.rules) <= LARGEST["layers"]:
        raise ValueError(f"its rule is not one for each of 1 to {LARGEST['layers']} layers")
    _check_numbers(rule.coefficients())
    _check_understood("rule", value["rule"], rule.to_dict())
    if value["inhibition"] not in INHIBITION or value["centring"] not in CENTRINGS:
        raise ValueError(f"inhibition or centring is none of {(*INHIBITION, *CENTRINGS)}")
    views = None if value["views"] is None else ViewStrengths.from_dict(value["views"])
    if views is not None:
        _check_numbers(_numbers_of(views.to_dict()))
    if any(of_layer.views != (1 if views is None else 2) for of_layer in rule.rules):
        raise ValueError("views do not go with its rule")
    for flag in ("forbid_self_inhibition", "forbid_excitation"):
        if type(value[flag]) is not bool:
            raise ValueError(f"{flag} is {value[flag]!r}, expected true or false")
    numbers = {
        "inh_factor": value["inh_factor"], "slope": value["activation"]["slope"], **value["initial"]
    }  # fmt: skip
    _check_numbers(numbers)
    if not any(name.endswith("spread_w") for name in value["initial"]):
        raise ValueError("initial lacks spread_w")
    fixed_initializer(value["initial"])
    sizes = {
        "pool": _whole("pool", value["pool"], "pool"),
        "batch_size": _whole("batch_size", value["batch_size"], "batch_size"),
        "inh_steps": _whole("inh_steps", value["inh_steps"], "inh_steps", least=0),
        "conv": tuple(
            (_whole("conv", channels, "units"), _whole("conv", kernel, "kernel"))
            for channels, kernel in value["conv"]
        ),
    }
    made = {"rule": rule, "views": views, "activation": Activation(**value["activation"])}
    return Recipe(**{**value, **sizes, **made})


def _accuracy(value: dict[str, Any]) -> dict[str, Any]:
    _check_names(
        "accuracies", value, {"dataset", "layers", "steps", "mean", "deviation", "trainings"}
    )
    _check_numbers({"mean": value["mean"], "deviation": value["deviation"] or 0.0})
    return value


def _check_names(what: str, value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds no table")
    if missing := sorted(expected - value.keys()):
        raise ValueError(f"{what} lacks {missing[0]}")
    if unknown := sorted(value.keys() - expected):
        raise ValueError(f"{what} has {unknown[0]}, which format {FORMAT} does not know")


def _check_understood(what: str, value: Any, made: Any) -> None:
    """Raise ValueError if what was read has names, or truth values, that what was made has not."""
    if isinstance(value, dict) and isinstance(made, dict):
        for name, inner in value.items():
            if name not in made:
                raise ValueError(f"{what} has {name}, which is not understood")
            _check_understood(f"{what}, {name}", inner, made[name])
    elif isinstance(value, list) and isinstance(made, list):
        for inner, inner_made in zip(value, made, strict=True):
            _check_understood(what, inner, inner_made)
    elif isinstance(value, bool) and not isinstance(made, bool):
        raise ValueError(f"{what} is {str(value).lower()}, expected a number")


def _numbers_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers by name, the largest of each list; truth values and texts are left out."""
    alone = {
        name: max(value, key=abs) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }
    return {name: value for name, value in alone.items() if type(value) in (int, float)}


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected a number")
        if abs(value) > LARGEST["number"]:
            raise ValueError(f"{name} is {value:.3g}, beyond {LARGEST['number']:g}")


def _whole(name: str, value: Any, kind: str, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= LARGEST[kind]:
        raise ValueError(
            f"{name} is {value!r}, expected a whole number from {least} to {LARGEST[kind]}"
        )
    return value


def _whole_numbers(name: str, values: Any, kind: str) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{name} is {values!r}, expected a list of whole numbers")
    return tuple(_whole(name, value, kind) for value in values)


def _one_line(problem: Exception) -> str:
    text = str(problem) if isinstance(problem, ValueError) else repr(problem)
    return " ".join(text.split())[:300]
