"""Every family of rules is read from its file alone, and no other one is imported for it."""

import json

import pytest
import torch
from forked import Command

import rules
from experiment.run_log import RunLog
from learning_rules import PerLayerRule, PolynomialPairRule, PolynomialRule, RuleError
from rules import (
    KrotovHopfieldRule,
    load_rule,
    preset,
    rule_from_dict,
    save_rule,
    write_rule,
)
from rules.families import FAMILIES

EXAMPLES = {
    "PolynomialRule": lambda: PolynomialRule({"w": [(1, 0, 1, 0)]}),
    "PolynomialPairRule": lambda: PolynomialPairRule({"b": [(1, 0, 0)]}),
    "KrotovHopfieldRule": lambda: KrotovHopfieldRule(0.1),
    "UnitStatisticsRule": lambda: preset("latent-predictive", learn=("eta", "exponents")),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_rule_of_every_family_reads_back_alone_and_as_a_layers(kind, tmp_path):
    rule = EXAMPLES[kind]()
    for whole in (rule, PerLayerRule([rule, rule])):
        save_rule(whole, tmp_path / "rule.json")
        again = load_rule(tmp_path / "rule.json")
        assert type(again) is type(whole) and again.to_dict() == whole.to_dict()
        assert all(p.dtype == torch.float64 for p in again.parameters())


def test_only_the_module_of_the_rules_own_family_is_imported(tmp_path):
    kinds = ("PolynomialRule", "KrotovHopfieldRule")
    for kind in kinds:
        save_rule(PerLayerRule([EXAMPLES[kind]()]), tmp_path / f"{kind}.json")
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from rules import load_rule
for kind in {kinds}:
    load_rule(f"{tmp_path}/{{kind}}.json")
    loaded = "rules.competing_units" in sys.modules
    assert loaded == (kind == "KrotovHopfieldRule")
""")
    assert Command(script).wait(60) == 0


def test_a_run_gets_its_rule_exact_as_a_formula_and_in_latex(tmp_path):
    rule = PerLayerRule([EXAMPLES["PolynomialRule"]()])
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        write_rule(log, rule)
        assert load_rule(log.path("rule.json")).to_dict() == rule.to_dict()
        assert log.path("rule.txt").read_text() == rule.formula() + "\n"
        assert log.path("rule.tex").read_text() == rule.tex() + "\n"


def changed(**values) -> dict:
    """A rule for one layer, some values of which are others."""
    return {"kind": "PerLayerRule", "rules": [EXAMPLES["PolynomialRule"]().to_dict() | values]}


def of_power(*powers) -> dict:
    return {"w": [{"exponents": list(powers), "coefficient": 1.0}], "b": [], "m": []}


STATISTICS = preset("latent-predictive").to_dict()
NO_RULES = {
    "no layer": ({"kind": "PerLayerRule", "rules": []}, "no rule of a layer"),
    "nested": ({"kind": "PerLayerRule", "rules": [changed()]}, "not 'PerLayerRule'"),
    "large bound": (changed(bound_size=1e300), "at most 1e"),
    "larger bound": (changed(bound_size=10**400), "at most 1e"),
    "power of x": (changed(terms=of_power(10**9, 0, 0, 0)), "powers up to 16"),
    "power of w": (changed(terms=of_power(0, 0, 0, 17)), "powers up to 16"),
    "huge coefficient": (
        changed(terms={"w": [{"exponents": [1, 0, 1, 0], "coefficient": 10**400}], "b": [],
                       "m": []}), "Overflow"),
    "no table": (changed(terms=[1]), "TypeError"),
    "list": ([1], "TypeError"),
    "power of y": (STATISTICS | {"terms": {"w": {"x gain y^1000000000": 1.0}}}, "beyond 16"),
    "power by repetition": (STATISTICS | {"terms": {"w": {"x gain " + 17 * "y ": 1.0}}}, "beyond"),
    "power of var": (STATISTICS | {"terms": {"w": {"x gain var^-17": 1.0}}}, "beyond 16"),
    "tau": (STATISTICS | {"start": STATISTICS["start"] | {"tau": 1e300}}, "tau must be at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_RULES)
def test_what_no_rule_is_like_is_refused_before_it_can_be_used(tmp_path, name):
    description, said = NO_RULES[name]
    (tmp_path / "rule.json").write_text(json.dumps(description))
    with pytest.raises(RuleError, match=f"not the description of a learning rule: .*{said}"):
        load_rule(tmp_path / "rule.json")


def test_an_unknown_kind_is_refused_and_a_name_the_package_lacks_is_an_attribute_error():
    with pytest.raises(ValueError, match="not the description of a learning rule"):
        rule_from_dict(json.loads('{"kind": "SangerRule"}'))
    assert all(getattr(rules, name) for name in rules.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rules.nothing  # noqa: B018
