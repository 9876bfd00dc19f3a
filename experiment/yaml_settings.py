"""Settings from YAML files, merged left to right, and from flags, which take precedence.

    add_keys(parser, KEYS)              # a flag for every key, and -c FILE...
    args = parse_settings(parser, KEYS, argv)   # every key has its value: flag, file or default

Nested tables merge key by key; every other value replaces the one before it. The config.json of a
run can be given as a file too, and starts the same run again.
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

# The errors of reading YAML or JSON, also for dates that don't exist and for too deep nesting
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


class SettingsError(WrongInputError):
    """A file or a value that can't be used; the message is one line."""


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: the name of the key and of its flag.
        kind: turns text into a value or raises argparse.ArgumentTypeError; values of files are
            checked by it too.
        default: the value if neither a flag nor a file gives one.
        help: the help text of the flag.
        many: whether the value is a list.
        choices: the allowed values; None: all that `kind` accepts.
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
        shared: the command's own keys whose meaning depends on the foreign ones beside them: if
            there are any, these keys' flags are translated as well.
    """

    keys: Sequence[Key]
    translate: Callable[[dict[str, Any]], dict[str, Any]]
    shared: Sequence[str] = ()


def keys_of(
    settings: type, names: Mapping[str, str], defaults: Mapping[str, Any]
) -> tuple[Key, ...]:
    """Keys for the fields of a settings dataclass, as experiment/settings.py makes flags for them.

    names: the fields' names by the keys' names.
    defaults: the command's defaults if they differ from the fields', by the keys' names.
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
    """The function that reads a value of a field from the text of a flag or a file."""
    if get_origin(entry.type) is dict:
        return mapping
    return truth if entry.type is bool else converter_of(entry) or str


def add_keys(parser: argparse.ArgumentParser, keys: Sequence[Key]) -> None:
    """Add a flag for every key, and -c for files of keys."""
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

    With --resume the files are not read again, since the run has its values already. Raises
    SettingsError for a file that can't be read, a key that doesn't exist, or a wrong value.

    run_flags: other flags of `parser` that may be set by the files too.
    of_one_run: names in a config.json that are neither keys nor such flags, to be ignored.
    foreign: settings of another program, whose flags `parser` has too.
    """
    args = parse(parser, argv)
    merged: dict[str, Any] = {}
    shared: dict[str, Any] = {}
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
        merged = merge(merged, others)
        if foreign is not None and any(key.name in merged for key in foreign.keys):
            shared = {name: getattr(args, name) for name in foreign.shared}
            shared = {name: value for name, value in shared.items() if value is not None}
            merged = _translated(merged | shared, known, foreign)
        run_settings = {flag.name: merged[flag.name] for flag in flags if flag.name in merged}
        parser.set_defaults(**run_settings)  # so that flags on the command line take precedence
        args = parse(parser, argv)
    for key in keys:
        value = None if key.name in shared else getattr(args, key.name)
        value = merged.get(key.name, key.default) if value is None else value
        if isinstance(key.default, dict):
            value = merge(key.default, value)
        setattr(args, key.name, value)
    for key in foreign.keys if foreign else ():
        delattr(args, key.name)
    return args


def _translated(merged: dict[str, Any], known: Sequence[Key], foreign: Foreign) -> dict[str, Any]:
    """Without keys of another program."""
    by_name = {key.name: key for key in known}
    return {
        name: _checked("translated", name, value, by_name)
        for name, value in foreign.translate(merged).items()
    }


def refuse_idle_settings(
    args: argparse.Namespace, keys: Sequence[Key], needs: Sequence[tuple[str, bool, str]]
) -> None:
    """Raise SettingsError if a setting that has no effect in this run differs from its default.

    needs: for each group of settings: their names, separated by blanks; whether they have an effect
        in this run; what they need to have one, for the message.
    """
    defaults = {key.name: key.default for key in keys}
    for names, matter, needed in needs:
        for name in names.split():
            if not matter and getattr(args, name) != defaults[name]:
                raise SettingsError(f"{name} needs {needed}")


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` updated with the values of `new`; tables that are in both merge in the same way."""
    merged = dict(old)
    for name, value in new.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def read_settings(
    path: Path, keys: Sequence[Key], of_one_run: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings in one file, checked; names in `of_one_run` are left out of a JSON file.

    Raises SettingsError for a file that can't be read, a key that doesn't exist, or a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"can't read {path}: {reason}") from error
    try:
        # JSON is not read as YAML, in which some of its numbers are texts
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
    """PyYAML's loader with the numbers of YAML 1.2.

    1e-1 is a number and 010 is ten; 1:30 and 1_000 are texts.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's form: resolvers by the first character
        first: [entry for entry in entries if entry[0].rpartition(":")[2] not in ("int", "float")]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number: decimal, also with leading zeros; 0o17 is octal, 0xf hexadecimal."""
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
    """The value of a YAML text; raises one of UNREADABLE if it isn't YAML."""
    return yaml.load(text, _Loader)  # derived from SafeLoader


def mapping(text: str) -> dict[str, Any]:
    """The type of a flag whose value is a table in YAML, such as '{lr: [-10, 0]}'."""
    try:
        value = read_yaml(text)
    except UNREADABLE:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a table such as '{{lr: 1}}', not {text!r}")
    return value


def truth(text: str) -> bool:
    """The type of a flag whose value is true or false."""
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
