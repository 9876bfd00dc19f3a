"""Flags derived from the fields of settings dataclasses, so that each setting is written once.

    @dataclass(frozen=True)
    class TrainingSettings:
        lr: float = setting(1e-3, "learning rate", "positive")
        decay: str = setting("none", "how the rate falls", choices=("none", "cosine"))
        layers: tuple[int, ...] = setting((32,), "units of each layer", "positive")

    add_settings(group, TrainingSettings, lr=0.1)   # a flag for each field; --lr has default 0.1
    settings = settings_of(args, TrainingSettings)

The type of a field decides how its flag is read: bool is a switch, tuple[int, ...] takes one or
more numbers, tuple[int, int] two. The libraries don't use this module, but the fields of their
settings carry the same metadata.
"""

import argparse
from collections.abc import Iterable
from dataclasses import Field, field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from experiment.command_line import (
    any_float,
    fraction,
    fraction_below_1,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)

RANGES = {  # the function that reads a number of this type and range
    (int, "positive"): positive_int,
    (int, "nonnegative"): nonnegative_int,
    (float, ""): any_float,
    (float, "positive"): positive_float,
    (float, "nonnegative"): nonnegative_float,
    (float, "fraction"): fraction,
    (float, "fraction below 1"): fraction_below_1,
}

Settings = TypeVar("Settings")


def setting(default: Any, help: str, range: str = "", **metadata: Any) -> Any:
    """A dataclass field with a default, a help text, and the range of its numbers (see RANGES).

    metadata: choices, metavar, nargs and type, as in argparse, override what the field's type
        implies; flag is the flag's name if it differs from the field's.
    """
    return field(default=default, metadata={"help": help, "range": range, **metadata})


def add_settings(
    group: argparse._ArgumentGroup,
    settings: type,
    names: Iterable[str] | None = None,
    *,
    each_layer: bool = False,
    **defaults: Any,
) -> None:
    """Add a flag for each of these fields; by default for all that have a help text.

    each_layer: let the flags take several values, one for each layer.
    defaults: this command's defaults if they differ from the fields', by the fields' names.
    """
    known = {entry.name: entry for entry in fields(settings)}
    for name in names or (name for name, entry in known.items() if "help" in entry.metadata):
        entry = known[name]
        default = defaults.get(name, entry.default)
        form = _form(entry) | {"default": list(default) if isinstance(default, tuple) else default}
        if each_layer:
            form["nargs"] = "+"
        group.add_argument(f"--{flag_of(entry)}", help=entry.metadata["help"], **form)


def flags_of(settings: type) -> list[str]:
    """The names, without dashes, of the flags of all fields that have a help text."""
    return [flag_of(entry) for entry in fields(settings) if "help" in entry.metadata]


def settings_of(args: argparse.Namespace, settings: type[Settings], **others: Any) -> Settings:
    """The settings given by the flags; fields without a flag keep their defaults.

    others: values of fields that have no flag, or whose flag means something else.
    """
    values = {}
    for entry in fields(settings):
        if entry.name not in others and hasattr(args, flag_of(entry)):
            value = getattr(args, flag_of(entry))
            values[entry.name] = tuple(value) if isinstance(value, list) else value
    return settings(**values, **others)


def flag_of(entry: Field) -> str:
    """The name of a field's flag, without dashes."""
    return entry.metadata.get("flag", entry.name)


def type_of(entry: Field) -> type:
    """The type of a field; of a union, such as int | None, the first type that isn't None."""
    if get_origin(entry.type) is not UnionType:
        return entry.type
    return next(kind for kind in get_args(entry.type) if kind is not NoneType)


def converter_of(entry: Field) -> type | None:
    """The function that reads a value of a field, or an element of it; None if it is a text."""
    kind = type_of(entry)
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return None if kind is str else RANGES[kind, entry.metadata["range"]]


def _form(entry: Field) -> dict[str, Any]:
    """The keyword arguments of add_argument for a field."""
    kind, form = type_of(entry), {}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        elements = get_args(kind)
        form["nargs"] = "+" if elements[-1] is Ellipsis else len(elements)
    form["type"] = converter_of(entry)
    overrides = ("choices", "metavar", "nargs", "type")
    return form | {name: entry.metadata[name] for name in overrides if name in entry.metadata}
