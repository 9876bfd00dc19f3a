"""Flags from the fields of settings, and settings from flags."""

import argparse
from dataclasses import dataclass

import pytest

from experiment.command_line import OneLineParser, fraction, positive_float
from experiment.settings import add_settings, setting, settings_of


@dataclass(frozen=True)
class Some:
    epochs: int = setting(5, "passes", "positive")
    lr: float = setting(0.1, "rate", "positive", metavar="RATE")
    most: float | None = setting(None, "bound", "fraction")
    decay: str = setting("none", "how the rate falls", choices=("none", "cosine"))
    penalty: float = setting(0.0, "weight", "nonnegative", flag="l1_reg")
    fast: bool = setting(False, "in less time")
    units: tuple[int, ...] = setting((32,), "of each layer", "positive")
    mask: tuple[float, float] = setting((0.0, 0.7), "share", "nonnegative", metavar=("LOW", "HIGH"))
    seed: int = 0


def parser_of(*names, **defaults) -> argparse.ArgumentParser:
    parser = OneLineParser(prog="some.py")
    add_settings(parser.add_argument_group("some"), Some, names or None, **defaults)
    return parser


def parsed(text: str = "", *names, **defaults) -> argparse.Namespace:
    return parser_of(*names, **defaults).parse_args(text.split())


def test_without_flags_the_settings_are_their_defaults():
    assert settings_of(parsed(), Some) == Some()


def test_each_flag_sets_its_field():
    args = parsed("--epochs 2 --lr 3 --most 1 --decay cosine --l1_reg 4 --fast --units 8 9 "
                  "--mask 0 1")  # fmt: skip
    assert settings_of(args, Some) == Some(2, 3.0, 1.0, "cosine", 4.0, True, (8, 9), (0.0, 1.0))


def test_a_command_has_defaults_of_its_own():
    args = parsed("--most .5", lr=2.0, units=(1, 2))
    assert settings_of(args, Some) == Some(lr=2.0, most=0.5, units=(1, 2))


def test_a_command_may_have_some_of_the_flags_and_take_other_fields_from_elsewhere():
    args = parsed("--lr 2", "lr", "fast")
    args.seed = 7
    assert {*vars(args)} == {"lr", "fast", "seed"}
    assert settings_of(args, Some, epochs=9) == Some(epochs=9, lr=2.0, seed=7)


def test_values_that_say_something_else_can_be_replaced():
    assert settings_of(parsed("--lr 2"), Some, lr=3.0).lr == 3.0


def test_a_flag_may_take_a_value_for_each_layer():
    parser = OneLineParser(prog="some.py")
    add_settings(parser.add_argument_group("some"), Some, ["lr"], each_layer=True, lr=None)
    assert parser.parse_args([]).lr is None
    assert parser.parse_args(["--lr", "1", "2"]).lr == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--epochs 0", "--epochs: must be a whole number of at least 1, not '0'"),
        ("--lr -1", "--lr: must be a number above 0, not '-1'"),
        ("--most 2", "--most: must be a number from 0 to 1, not '2'"),
        ("--decay fast", "--decay: invalid choice: 'fast'"),
        ("--units 1 0", "--units: must be a whole number of at least 1"),
        ("--mask 0", "--mask: expected 2 arguments"),
    ],
)
def test_values_out_of_range_are_refused(capsys, text, said):
    with pytest.raises(SystemExit):
        parsed(text)
    assert said in capsys.readouterr().err


def test_flags_show_help_and_know_what_reads_them():
    actions = {action.dest: action for action in parser_of()._actions}
    assert actions["lr"].help == "rate" and actions["lr"].metavar == "RATE"
    assert actions["lr"].type is positive_float and actions["most"].type is fraction
