"""Settings from files and flags: merged, checked, refused."""

import argparse
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.command_line import positive_float, positive_int
from experiment.settings import setting
from experiment.yaml_settings import (
    Key,
    SettingsError,
    add_keys,
    keys_of,
    mapping,
    merge,
    parse_settings,
    refuse_idle_settings,
    truth,
)

KEYS = (
    Key("size", positive_int, 3, "a number"),
    Key("colour", str, "red", "a choice", choices=("red", "blue")),
    Key("names", str, [], "a list", many=True, choices=("a", "b")),
    Key("bounds", mapping, {"x": 1}, "a table"),
    Key("reset", truth, False, "a switch"),
)


@dataclass(frozen=True)
class Tuning:
    rate: float = setting(0.5, "a rate", "positive")
    names: tuple[str, ...] = setting((), "a list", choices=("a", "b"))
    fast: bool = setting(True, "a switch")
    bounds: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"x": (0.0, 1.0)}, metadata={"help": "a table"}
    )


def settings(tmp_path, flags=(), *texts):
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text)
    parser = argparse.ArgumentParser()
    add_keys(parser, KEYS)
    return parse_settings(parser, KEYS, [*flags, *(["-c", *map(str, paths)] if paths else [])])


def test_keys_of_fields_have_their_names_from_the_command_and_the_rest_from_the_field():
    names = {"speed": "rate", "names": "names", "fast": "fast", "box": "bounds"}
    assert keys_of(Tuning, names, {"fast": False}) == (
        Key("speed", positive_float, 0.5, "a rate"),
        Key("names", str, [], "a list", many=True, choices=("a", "b")),
        Key("fast", truth, False, "a switch"),
        Key("box", mapping, {"x": [0.0, 1.0]}, "a table"),
    )


def test_defaults_are_taken_where_nothing_is_said(tmp_path):
    args = settings(tmp_path)
    assert (args.size, args.colour, args.names, args.reset) == (3, "red", [], False)


def test_later_files_replace_earlier_ones_and_flags_win(tmp_path):
    texts = "size: 4\ncolour: blue\nnames: [a]", "size: 5\nnames: [b]"
    args = settings(tmp_path, ["--colour", "red"], *texts)
    assert (args.size, args.colour, args.names) == (5, "red", ["b"])


def test_tables_merge_key_by_key(tmp_path):
    args = settings(tmp_path, [], "bounds: {y: 2}", "bounds: {z: 3}")
    assert args.bounds == {"x": 1, "y": 2, "z": 3}


def test_a_switch_can_be_turned_off_again(tmp_path):
    assert settings(tmp_path, [], "reset: true").reset is True
    assert settings(tmp_path, ["--reset", "false"], "reset: true").reset is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 3", "unknown key 'sise'; the nearest known key is 'size'"),
        ("size: 0", "size must be a whole number of at least 1"),
        ("size: 99999999999", "size must be at most 1000000000"),
        ("colour: green", "colour must be one of red, blue"),
        ("names: a", "names must be a list"),
        ("names: [c]", "names must be one of a, b"),
        ("bounds: 3", "bounds must be a table"),
        ("reset: maybe", "must be true or false"),
        ("- 1", "must be a table of keys"),
        ("a: [", "is not YAML"),
        ("a: " + 5000 * "[", "is not YAML"),
        ("colour: 2024-13-45", "is not YAML: month must be in 1..12"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        settings(tmp_path, [], text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1), ("1E+5", 1e5), (".5", 0.5), ("-3.", -3.0), ("+7", 7), ("010", 10),
        ("-08", -8), ("09.5", 9.5), ("0o17", 15), ("0x1F", 31), (".inf", float("inf")),
        ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1_000", "1_000"), ("0b11", "0b11"),
        ("'1e-1'", "1e-1"), ("1e", "1e"), ("true", True), ("~", None),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2_in_files_and_in_flags(tmp_path, text, value):
    expected = {"x": value, "y": [value]}
    table = f"{{x: {text}, y: [{text}]}}"
    assert settings(tmp_path, [], f"bounds: {table}").bounds == expected
    assert settings(tmp_path, ["--bounds", table]).bounds == expected


def test_a_number_with_zeros_in_front_is_decimal_and_one_with_a_colon_is_none(tmp_path):
    assert settings(tmp_path, [], "size: 010").size == 10
    with pytest.raises(SettingsError, match="size must be a whole number"):
        settings(tmp_path, [], "size: 1:30")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"can't read .*: No such file"):
        settings(tmp_path, ["-c", str(tmp_path / "none.yaml")])


def test_a_runs_configuration_holds_other_flags_and_what_is_left_out(tmp_path):
    path, parser = tmp_path / "config.json", argparse.ArgumentParser()
    path.write_text('{"size": 4, "seed": 7, "bounds": {"y": 1e-05}, "command": "some"}')
    parser.add_argument("--seed", type=int, default=0)
    add_keys(parser, KEYS)

    def parsed(*flags):
        argv = [*flags, "-c", str(path)]
        return parse_settings(parser, KEYS, argv, ["seed"], ["command"])

    args = parsed()
    assert (args.size, args.seed, args.bounds) == (4, 7, {"x": 1, "y": 1e-05})
    assert parsed("--seed", "0").seed == 0
    for text, message in (
        ('{"seed": "x"}', "seed invalid literal"),
        ('{"units": 3}', "unknown key 'units'"),
        ("{", "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match=message):
            parsed()


def test_a_setting_that_would_do_nothing_is_refused_where_it_is_not_the_default(tmp_path):
    args = settings(tmp_path, [], "size: 4")
    refuse_idle_settings(args, KEYS, [("colour names", False, "paint"), ("size", True, "room")])
    with pytest.raises(SettingsError, match="size needs room"):
        refuse_idle_settings(args, KEYS, [("colour size", False, "room")])


TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=6
)
TABLES = st.dictionaries(st.sampled_from("abc"), TREES)


@given(TABLES, TABLES)
def test_the_later_table_is_found_whole_in_the_merged_one(first, second):
    merged = merge(first, second)
    assert set(merged) == set(first) | set(second)
    assert merge(merged, second) == merged


@given(TABLES)
def test_merging_with_itself_changes_nothing(table):
    assert merge(table, table) == table == merge({}, table) == merge(table, {})
