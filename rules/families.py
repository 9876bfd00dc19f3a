"""The families of rules that can be saved, and their files: rule.json, rule.txt, rule.tex.

    rule = load_rule("runs/main-.../rule.json")

A saved rule names its kind, and only the module of that kind is imported. A new family needs
to_dict, whose result has a "kind", and from_dict, and an entry in FAMILIES.
"""

import json
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

from experiment.files import write_whole
from experiment.run_log import RunLog
from learning_rules import LearningRule, PerLayerRule, RuleError

FAMILIES = {  # the module of each kind, which is the name of the rule's class
    "PolynomialRule": "learning_rules",
    "PolynomialPairRule": "learning_rules",
    "KrotovHopfieldRule": "rules.competing_units",
    "UnitStatisticsRule": "rules.unit_statistics",
}

READING_ERRORS = (
    LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError,
)  # fmt: skip


def rule_from_dict(description: dict, own: type[LearningRule] | None = None) -> LearningRule:
    """The rule that `to_dict` described, in float64; raises RuleError for anything else.

    own: a class that is not in FAMILIES, for rules of its kind.
    """
    of_one_layer = partial(_of_one_layer, own=own)
    try:
        if description["kind"] != PerLayerRule.__name__:
            return of_one_layer(description)
        return PerLayerRule.from_dict(description, of_one_layer)
    except READING_ERRORS as problem:
        what = problem if isinstance(problem, RuleError) else repr(problem)
        raise RuleError(f"not the description of a learning rule: {what}") from problem


def _of_one_layer(description: dict, own: type[LearningRule] | None) -> LearningRule:
    kind = description["kind"]
    if own is not None and kind == own.__name__:
        return own.from_dict(description)
    if kind not in FAMILIES:
        raise RuleError(f"a layer's rule is one of {', '.join(FAMILIES)}, not {kind!r}")
    return getattr(import_module(FAMILIES[kind]), kind).from_dict(description)


def load_rule(path: Path | str, own: type[LearningRule] | None = None) -> LearningRule:
    """Read a rule that `save_rule` wrote, in float64; raises RuleError if that fails.

    own: see `rule_from_dict`.
    """
    try:
        return rule_from_dict(json.loads(Path(path).read_text(encoding="utf-8")), own)
    except (OSError, ValueError, RecursionError) as problem:
        raise RuleError(f"cannot read a learning rule from {path}: {problem}") from problem


def save_rule(rule: LearningRule, path: Path | str) -> None:
    """Write a rule as JSON, with exact coefficients."""
    write_whole(path, json.dumps(rule.to_dict(), indent=1) + "\n")


def write_rule(log: RunLog, rule: LearningRule, effects: Mapping[str, float] | None = None) -> None:
    """Write a run's rule as rule.json, rule.txt and rule.tex, each atomically.

    effects: the effects of its terms, from `term_effects`, by which rule.txt and rule.tex sort
        them; None: no effects.
    """
    log.write_json("rule.json", rule.to_dict())
    log.write_text("rule.txt", f"{rule.formula(effects)}\n")
    log.write_text("rule.tex", f"{rule.tex(effects)}\n")
