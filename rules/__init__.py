"""Families of learning rules beyond the polynomial one, and the reading and writing of all rules.

    from rules import load_rule

Each name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {  # the public names by module
    "competing_units": "KrotovHopfieldRule",
    "families": "FAMILIES load_rule rule_from_dict save_rule write_rule",
    "learned_optimizer_rule": "LearnedRule",
    "unit_statistics": "UnitStatisticsRule preset",
    "local_features": "LocalFeatures",
    "choices": "names",
    "zoo": "load_zoo save_zoo",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from rules.choices import names as names
    from rules.competing_units import KrotovHopfieldRule as KrotovHopfieldRule
    from rules.families import FAMILIES as FAMILIES
    from rules.families import load_rule as load_rule
    from rules.families import rule_from_dict as rule_from_dict
    from rules.families import save_rule as save_rule
    from rules.families import write_rule as write_rule
    from rules.learned_optimizer_rule import LearnedRule as LearnedRule
    from rules.local_features import LocalFeatures as LocalFeatures
    from rules.unit_statistics import UnitStatisticsRule as UnitStatisticsRule
    from rules.unit_statistics import preset as preset
    from rules.zoo import load_zoo as load_zoo
    from rules.zoo import save_zoo as save_zoo
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
