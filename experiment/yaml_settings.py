"""Settings of a command that come from YAML files, merged left to right, and from flags, which win.

    add_keys(parser, KEYS)              # a flag for every key, and -c FILE...
    args = parse_settings(parser, KEYS, argv)   # every key has its value: flag, file or default

Nested tables merge key by key; every other value replaces the one before it. A run's config.json is
such a file too: it starts the same run again.
"""

import argparse
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from experiment.command_line import check_whole, parse
from experiment.errors import WrongInputError
from experiment.files import plain
from experiment.settings import converter_of

# what reading YAML or JSON raises, also for a date that does not exist and for tables too deep
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


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


@dataclass(frozen=True)
class Foreign:
    """Settings of another program, that files and flags may hold too.

    Attributes:
        keys: those that this command does not have.
        translate: all that files and these flags hold to settings of the command's own keys.
    """

    keys: Sequence[Key]
    translate: Callable[[dict[str, Any]], dict[str, Any]]


def keys_of(
    settings: type, names: Mapping[str, str], defaults: Mapping[str, Any]
) -> tuple[Key, ...]:
    """Keys of these names for fields of these names, as experiment/settings.py makes flags of them.

    defaults: those of a command that differ from the fields', by the keys' names.
    """
    known = {entry.name: entry for entry in fields(settings)}
    keys = []
    for name, field_name in names.items():
        entry = known[field_name]
        factory = entry.default_factory
        default = entry.default if factory is MISSING else factory()
        default = plain(defaults.get(name, default))
        choices, many = entry.metadata.get("choices"), get_origin(entry.type) is tuple
        keys.append(Key(name, _reader(entry), default, entry.metadata["help"], many, choices))
    return tuple(keys)


def _reader(entry: Field) -> Callable[[str], Any]:
    """What makes a value of a field from the text of a flag or a file."""
    if get_origin(entry.type) is dict:
        return mapping
    return truth if entry.type is bool else converter_of(entry) or str


def add_keys(parser: argparse.ArgumentParser, keys: Sequence[Key]) -> None:
    """A flag for every key, and -c for files of them."""
    group = parser.add_argument_group("settings, as flags or as keys of the files after -c")
    files = {"nargs": "+", "default": [], "type": Path, "metavar": "FILE"}
    group.add_argument("-c", "--config", help="YAML files, merged left to right", **files)
    add_flags(group, keys)


def add_flags(group: argparse._ArgumentGroup, keys: Sequence[Key]) -> None:
    """A flag for every key."""
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


def parse_settings(
    parser: argparse.ArgumentParser,
    keys: Sequence[Key],
    argv: Sequence[str] | None = None,
    run_flags: Sequence[str] = (),
    of_one_run: Sequence[str] = (),
    foreign: Foreign | None = None,
) -> argparse.Namespace:
    """Parse `argv`; a key has the value of its flag, else of the files after -c, else its default.

    run_flags: other flags of `parser` that the files may hold too.
    of_one_run: what config.json holds beside; it is left out.
    foreign: settings of another program, whose flags `parser` has too.

    Raises SettingsError for a file that can't be read, a key that doesn't exist, a wrong value.
    A run that is resumed has its values already: the files are not read again.
    """
    args = parse(parser, argv)
    merged: dict[str, Any] = {}
    others = {key.name: getattr(args, key.name) for key in (foreign.keys if foreign else ())}
    others = {name: value for name, value in others.items() if value is not None}
    resumed = getattr(args, "resume", None) is not None
    if resumed and others:
        raise SettingsError(f"--{min(others)}: a run that is gone on with has its settings already")
    if not resumed and (args.config or others):
        flags = [_as_key(action) for action in parser._actions if action.dest in run_flags]
        known = [*keys, *flags, *(foreign.keys if foreign else ())]
        for path in args.config:
            merged = merge(merged, read_settings(path, known, of_one_run))
        merged = _translated(merge(merged, others), known, foreign)
        run_settings = {flag.name: merged[flag.name] for flag in flags if flag.name in merged}
        parser.set_defaults(**run_settings)  # so that those on the command line win
        args = parse(parser, argv)
    for key in keys:
        value = getattr(args, key.name)
        value = merged.get(key.name, key.default) if value is None else value
        if isinstance(key.default, dict):
            value = merge(key.default, value)
        setattr(args, key.name, value)
    for key in foreign.keys if foreign else ():
        delattr(args, key.name)
    return args


def _translated(
    merged: dict[str, Any], known: Sequence[Key], foreign: Foreign | None
) -> dict[str, Any]:
    """Without keys of another program."""
    if foreign is None or not any(key.name in merged for key in foreign.keys):
        return merged
    by_name = {key.name: key for key in known}
    return {
        name: _checked("translated", name, value, by_name)
        for name, value in foreign.translate(merged).items()
    }


def refuse_idle_settings(
    args: argparse.Namespace, keys: Sequence[Key], needs: Sequence[tuple[str, bool, str]]
) -> None:
    """SettingsError where a setting has another value than its default, and would do nothing.

    needs: names of settings, whether they matter in this run, and what else they need.
    """
    defaults = {key.name: key.default for key in keys}
    for names, matter, needed in needs:
        for name in names.split():
            if not matter and getattr(args, name) != defaults[name]:
                raise SettingsError(f"{name} needs {needed}")


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`; tables within both merge in the same way."""
    merged = dict(old)
    for name, value in new.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def read_settings(
    path: Path, keys: Sequence[Key], of_one_run: Sequence[str] = ()
) -> dict[str, Any]:
    """The checked settings in one file; of a run's config.json without those `of_one_run`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"can't read {path}: {reason}") from error
    try:
        # not all that JSON writes is a number in YAML: 1e-05 is not
        settings = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except UNREADABLE as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise SettingsError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingsError(f"{path} must be a table of keys and values")
    if path.suffix == ".json":
        settings = {name: value for name, value in settings.items() if name not in of_one_run}
    known = {key.name: key for key in keys}
    return {name: _checked(path, name, value, known) for name, value in settings.items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the numbers of YAML 1.2: 1e-1 is one, 010 is ten, 1:30 and 1_000 are texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it: by the first character
        first: [entry for entry in entries if entry[0].rpartition(":")[2] not in ("int", "float")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, also with zeros in front; 0o17 is octal, 0xf hexadecimal."""
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "-+0123456789",
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    "-+.0123456789",
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: str) -> Any:
    """The value that a text says in YAML; raises one of UNREADABLE."""
    return yaml.load(text, _Loader)  # of PyYAML, a safe one


def mapping(text: str) -> dict[str, Any]:
    """The type of a flag that is a table, written as in YAML: '{lr: [-10, 0]}'."""
    try:
        value = read_yaml(text)
    except UNREADABLE:
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


def _as_key(action: argparse.Action) -> Key:
    return Key(action.dest, action.type or str, action.default, action.help, choices=action.choices)


def _checked(path: Path | str, name: Any, value: Any, known: dict[str, Key]) -> Any:
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


def _one(path: Path | str, key: Key, value: Any) -> Any:
    try:
        whole = isinstance(value, dict) and key.kind is mapping
        converted = value if whole else key.kind(str(value))
        check_whole(key.name, converted)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise SettingsError(f"{path}: {key.name} {error}") from error
    if key.choices is not None and converted not in key.choices:
        choices = ", ".join(map(str, key.choices))
        raise SettingsError(f"{path}: {key.name} must be one of {choices}, not {value!r}")
    return converted
