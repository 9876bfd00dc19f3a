"""Settings of a command that come from YAML files, merged left to right, and from flags, which win.

    add_settings(parser, KEYS)          # a flag for every key, and -c FILE...
    args = parse(parser, argv)
    complete(args, KEYS)                # now every key has its value: flag, else file, else default

Nested tables merge key by key; every other value replaces the one before it.
"""

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import WrongInputError


class SettingsError(WrongInputError):
    """A file or a value that can't be used; the message is one line."""


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: of the key and of its flag.
        kind: text to value, raising argparse.ArgumentTypeError; it also checks the files' values.
        default: the value where neither flag nor file has one.
        help: a line.
        many: whether it is a list.
        choices: the values that are allowed; None: those that `kind` takes.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    many: bool = False
    choices: Sequence[str] | None = None


def add_settings(parser: argparse.ArgumentParser, keys: Sequence[Key]) -> None:
    """A flag for every key, and -c for files of them."""
    group = parser.add_argument_group("settings, as flags or as keys of the files after -c")
    files = {"nargs": "+", "default": [], "type": Path, "metavar": "FILE"}
    group.add_argument("-c", "--config", help="YAML files, merged left to right", **files)
    for key in keys:
        shown = "" if key.default in (None, [], {}) else f" (default: {key.default})"
        group.add_argument(
            f"--{key.name}",
            type=key.kind,
            nargs="*" if key.many else None,
            choices=key.choices,
            metavar=None if key.choices else key.name.upper(),
            help=key.help + shown,
        )


def complete(args: argparse.Namespace, keys: Sequence[Key]) -> None:
    """Give every key that has no flag its value from the files in `args.config`, or its default.

    Raises SettingsError for a file that can't be read, a key that doesn't exist, a wrong value.
    A run that is resumed has its values already.
    """
    merged: dict[str, Any] = {}
    if getattr(args, "resume", None) is None:
        for path in args.config:
            merged = merge(merged, read_settings(path, keys))
    for key in keys:
        value = getattr(args, key.name)
        value = merged.get(key.name, key.default) if value is None else value
        if isinstance(key.default, dict):
            value = merge(key.default, value)
        setattr(args, key.name, value)


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`; tables within both merge in the same way."""
    merged = dict(old)
    for name, value in new.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def read_settings(path: Path, keys: Sequence[Key]) -> dict[str, Any]:
    """The checked settings in one file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"can't read {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SettingsError(f"{path} must be a table of keys and values")
    known = {key.name: key for key in keys}
    return {name: _checked(path, name, value, known) for name, value in found.items()}


def mapping(text: str) -> dict[str, Any]:
    """The type of a flag that is a table, written as in YAML: '{lr: [-10, 0]}'."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a table such as '{{lr: 1}}', not {text!r}")
    return value


def truth(text: str) -> bool:
    """The type of a flag that is true or false."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return values[text.lower()]


def _checked(path: Path, name: Any, value: Any, known: dict[str, Key]) -> Any:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise SettingsError(f"{path}: unknown key {name!r}; the nearest known key is {near!r}")
    key = known[name]
    if value is None:
        return key.default
    if key.many:
        if not isinstance(value, list):
            raise SettingsError(f"{path}: {name} must be a list, not {value!r}")
        return [_one(path, key, element) for element in value]
    return _one(path, key, value)


def _one(path: Path, key: Key, value: Any) -> Any:
    text = (
        yaml.safe_dump(value, default_flow_style=True).strip()
        if isinstance(value, dict)
        else str(value)
    )
    try:
        converted = key.kind(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise SettingsError(f"{path}: {key.name} {error}") from error
    if key.choices is not None and converted not in key.choices:
        choices = ", ".join(map(str, key.choices))
        raise SettingsError(f"{path}: {key.name} must be one of {choices}, not {value!r}")
    return converted
