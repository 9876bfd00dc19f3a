"""The language of terms: what is read, how it is written, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser

from learning_rules import RuleError
from rules.choices import COMPETING, compete
from rules.unit_statistics_terms import (
    RECEIVING,
    SENDING,
    STATISTICS,
    VARYING,
    parse_term,
    split_linear,
)


@pytest.mark.parametrize("text, group, written", [
    ("x gain z'", "w", "x gain z'"),
    ("z' gain x", "w", "x gain z'"),
    ("c x var^-1 gain", "w", "x gain c var^-1"),
    ("y y w", "w", "y^2 w"),
    ("x_j y_i^2", "w", "x y^2"),
    ("y_i y_j", "m", "y_j y_i"),
    ("z'_i z_j", "m", "z_j z'_i"),
    ("var^-1/2 var^-1/2", "b", "var^-1"),
    ("var^-0.5", "b", "var^-1/2"),
    ("var^0.3", "b", "var^0.3"),
    ("var^1/2 var^-1/2", "b", "1"),
    ("1", "m", "1"),
    ("signal x", "w", "x signal"),
])  # fmt: skip
def test_a_term_is_read_in_any_order_and_written_in_one(text, group, written):
    term = parse_term(text, group, 2)
    assert str(term) == written
    assert parse_term(written, group, 2) == term


@given(st.sampled_from("wbm"), st.data())
def test_what_is_written_is_read_back(group, data):
    whole = st.integers(0, 3)
    powers = {name: data.draw(whole) for name in (*SENDING[group], *VARYING, group)}
    powers |= {name: data.draw(whole) for name in STATISTICS}
    powers["var"] = data.draw(st.sampled_from([-2, -1, -0.5, 0, 0.25, 1.5, 3]))
    text = " ".join(f"{name}^{power}" for name, power in powers.items())
    term = parse_term(text, group, 2)
    assert dict(term.powers) == {name: power for name, power in powers.items() if power}
    assert parse_term(str(term), group, 2) == term


@pytest.mark.parametrize("name", VARYING)
@pytest.mark.parametrize("power", [1, 2])
def test_every_power_of_a_quantity_is_written_in_latex(name, power):
    tex = parse_term(f"x {name}^{power}", "w", 2).tex()
    MathTextParser("agg").parse(f"${tex}$")
    assert r"\, \pm" not in tex  # would read as a sum


@pytest.mark.parametrize("text, group, views, message", [
    ("x q", "w", 2, "'q' in the term 'x q' of w is no power of any of: x, gain"),
    ("x y", "b", 2, "of b is no power"),
    ("x^", "w", 2, "is no power"),
    ("y^-1", "w", 2, "y in the term 'y\\^-1' takes whole powers >= 0"),
    ("mean^1/2", "w", 2, "takes whole powers >= 0"),
    ("var^1/0", "w", 2, "divides by 0"),
    ("x z'", "w", 1, "z' in the term .* needs pairs of views"),
    ("x r_cross", "w", 1, "needs pairs of views"),
])  # fmt: skip
def test_what_no_term_is_gets_one_line(text, group, views, message):
    with pytest.raises(RuleError, match=message):
        parse_term(text, group, views)


@pytest.mark.parametrize("name", [n for n in RECEIVING[1:] if n not in COMPETING])
def test_every_receiving_quantity_is_what_a_current_is_linear_in(name):
    for powers in ({name: 1}, {name + "'": 1}, {name: 1, "gain": 1}):
        prefactor, linear = split_linear(powers)
        assert dict(prefactor) == {n: p for n, p in powers.items() if n == "gain"}
        assert all(part.primed == ("'" in next(iter(powers))) for part in linear)
    prefactor, _ = split_linear({name: 3})
    assert dict(prefactor) == {name: 2}


def test_terms_that_compete_are_told_from_others():
    assert compete(["x gain z'", "x won'^2"]) and compete(["share w"]) and compete(["x_j won_i"])
    assert not compete(["x gain z'", "w", "1"])
