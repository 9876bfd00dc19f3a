"""Classical rules, each with its network and the network's initial distribution.

Oja's and Sanger's rules are for linear units, that of Krotov and Hopfield (p = k = 2, Delta = 0.4)
for rectified units, all without inhibition; instar and Foldiak's rule are for sigmoid units that
inhibit each other. Inputs should be centred: on others every unit with positive weights is always
active, and instar and Foldiak's rule make all units respond alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from learning_rules import LearningRule, SangerRule, classical_rule
from models_fully_local import Activation
from rules.competing_units import KrotovHopfieldRule


@dataclass(frozen=True)
class Classical:
    """A rule, its network and the network's initial distribution.

    make_rule: from the learning rate to the rule.
    network: options of lateral_network.
    start: the initial distribution, as in GaussianInitializer.with_values.
    rate: a rate that suits 28 x 28 images; comparison/rule_comparison.py chooses its own.
    """

    make_rule: Callable[[float], LearningRule]
    network: dict[str, Any]
    start: dict[str, float]
    rate: float


LINEAR = {"activation": Activation("identity"), "inhibition": "none"}
RECTIFIED = {"activation": Activation("relu"), "inhibition": "none"}
COMPETING = {
    "activation": Activation("sigmoid", 4.0),
    "inh_factor": 0.2,
    "forbid_self_inhibition": True,
}
CLASSICAL = {
    "oja": Classical(partial(classical_rule, "oja"), LINEAR, {"spread_w": 1.0}, 0.003),
    "sanger": Classical(SangerRule, LINEAR, {"spread_w": 1.0}, 0.03),
    "instar": Classical(
        partial(classical_rule, "instar"), COMPETING, {"spread_w": 1.0, "mean_m": -0.5}, 0.01
    ),
    "krotov_hopfield": Classical(
        partial(KrotovHopfieldRule, delta=0.4), RECTIFIED, {"spread_w": 1.0}, 0.1
    ),
    "foldiak": Classical(
        partial(classical_rule, "foldiak"),
        COMPETING | {"forbid_excitation": True},
        {"spread_w": 1.0},
        0.003,
    ),
}
