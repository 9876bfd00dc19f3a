"""Every family of rules is read from its file alone, and no other one is imported for it."""

import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT

import rules
from experiment.run_log import RunLog
from learning_rules import PerLayerRule, PolynomialPairRule, PolynomialRule
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


@pytest.mark.parametrize(("kind", "imported"), [("PolynomialRule", 0), ("KrotovHopfieldRule", 1)])
def test_only_the_module_of_the_rules_own_family_is_imported(kind, imported, tmp_path):
    save_rule(PerLayerRule([EXAMPLES[kind]()]), tmp_path / "rule.json")
    program = f"""
import sys
from rules import load_rule
load_rule({str(tmp_path / "rule.json")!r})
sys.exit("rules.competing_units" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == imported


def test_a_run_gets_its_rule_exact_as_a_formula_and_in_latex(tmp_path):
    rule = PerLayerRule([EXAMPLES["PolynomialRule"]()])
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        write_rule(log, rule)
        assert load_rule(log.path("rule.json")).to_dict() == rule.to_dict()
        assert log.path("rule.txt").read_text() == rule.formula() + "\n"
        assert log.path("rule.tex").read_text() == rule.tex() + "\n"


def test_an_unknown_kind_is_refused_and_a_name_the_package_lacks_is_an_attribute_error():
    with pytest.raises(ValueError, match="not the description of a learning rule"):
        rule_from_dict(json.loads('{"kind": "SangerRule"}'))
    assert all(getattr(rules, name) for name in rules.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rules.nothing  # noqa: B018
