"""Terms of the rules with unit statistics: products of powers of named quantities of a synapse.

A term is a text such as "x gain z'", "x gain c var^-1", "y^2 w" or "y_j y_i". For synapse ij, the
names mean:

    x; y_j, c_j, z_j     input j, for w; activity of the sending unit j, for m
    s, y, gain           preactivation, activity and sigma'(s) of the receiving unit i
    mean, square, var    <y>, <y^2>, variance + 1e-4, over the batch and its views
    c, z                 y - mean, c var^-1/2
    r_cov, r             lateral currents sum_{k != i} Cov_ik c_k, sum_{k != i} Corr_ik z_k
    r_exact              (r - z <r z>) var^-1/2: x gain r_exact is the gradient of squared Corr_ik
    r_cross              sum_{k != i} X_ik z'_k, X the correlation across views
    share                softmax over the layer's units of beta s, which are 1 in sum at each place
    won                  share of the unit with the largest s, -share of the others
    s' y' gain' c' z' r_cov' r' r_exact' r_cross' share' won'   the same in the other view
    signal               a number broadcast to all units, such as a reward
    w, b, m              the parameter itself
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from learning_rules import LARGEST_POWER, RuleError
from rules.choices import LATERAL

SENDING = {"w": ("x",), "b": (), "m": ("y_j", "c_j", "z_j")}
RECEIVING = ("gain", "s", "y", "c", "z", "r", "r_cov", "r_exact", "r_cross", "share", "won")
VARYING = (*(name + prime for name in RECEIVING for prime in ("", "'")), "signal")
STATISTICS = ("mean", "square", "var")

# Typical sizes of coefficients of working rules, by the quantity that they multiply: activities of
# two views differ little, currents are sums over many units. Searches over coefficients take steps
# of these sizes; the rule itself doesn't use them.
SIZES = {
    "y": 10.0,
    "r": 0.3,
    "r_cov": 3.0,
    "r_exact": 0.1,
    "r_cross": 0.3,
    "var": 100.0,
    "w": 0.1,
    "share": 10.0,
    "won": 10.0,
}

_FACTOR = re.compile(r"([A-Za-z_]+'?(?:_i)?)(?:\^(-?\d+(?:\.\d+)?(?:/\d+)?))?")
_TEX = {
    "x": "x_j", "y_j": "y_j", "c_j": "c_j", "z_j": "z_j", "gain": r"\sigma", "s": "s_i",
    "y": "y_i", "c": "c_i", "z": "z_i", "r": "r_i", "r_cov": r"r^{\mathrm{cov}}_i",
    "r_exact": r"r^{\mathrm{exact}}_i", "r_cross": r"r^{\mathrm{cross}}_i",
    "share": "p_i", "won": r"(\pm p_i)", "signal": r"\mathrm{signal}",
    "mean": r"\langle y_i \rangle", "square": r"\langle y_i^2 \rangle", "var": "v_i",
    "w": "w_{ij}", "b": "b_i", "m": "m_{ij}",
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """A product of powers of quantities.

    Attributes:
        group: "w", "b" or "m", the parameter that it changes.
        powers: (name, power) in the order above, for the quantities whose power isn't 0.
    """

    group: str
    powers: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        written = [(self._written(name), power) for name, power in self.powers]
        return " ".join(n if p == 1 else f"{n}^{_power_text(p)}" for n, p in written) or "1"

    def _written(self, name: str) -> str:
        of_unit = self.group == "m" and name.rstrip("'") in ("s", "y", "c", "z")
        return f"{name}_i" if of_unit else name

    def tex(self) -> str:
        """The product in LaTeX."""
        return r" \, ".join(_tex_factor(name, power) for name, power in self.powers)

    def typical_size(self) -> float:
        """The typical size of the coefficient: the product of the SIZES of the quantities."""
        return math.prod(SIZES.get(name.rstrip("'"), 1.0) ** power for name, power in self.powers)

    def power(self, name: str) -> float:
        """The power of a quantity, 0 if it does not occur."""
        return dict(self.powers).get(name, 0)

    def lateral(self) -> float:
        """The number of lateral currents in the product."""
        return sum(power for name, power in self.powers if name.rstrip("'") in LATERAL)

    def sending(self) -> tuple[tuple[str, float], ...]:
        """The powers of the sending unit's quantities."""
        return tuple(f for f in self.powers if f[0] in SENDING[self.group])

    def varying(self) -> dict[str, int]:
        """The powers of the receiving unit's quantities that differ from sample to sample."""
        return {name: power for name, power in self.powers if name in VARYING}

    def statistics(self) -> dict[str, float]:
        """The powers of the receiving unit's statistics."""
        return {name: power for name, power in self.powers if name in STATISTICS}


def parse_term(text: str, group: str, views: int) -> Term:
    """The term written as a text such as "x gain z'", for a rule with this number of views.

    Names may have the index of their unit: x_j, y_i. Raises RuleError for an unknown name or a
    power that is not allowed.
    """
    allowed = [*SENDING[group], *VARYING, *STATISTICS, group]
    powers: dict[str, float] = {}
    for factor in text.split():
        if factor == "1":
            continue
        match = _FACTOR.fullmatch(factor)
        name = _plain(match.group(1), allowed) if match else ""
        if name not in allowed:
            raise RuleError(
                f"{factor!r} in the term {text!r} of {group} is no power of any of: "
                f"{', '.join(allowed)}"
            )
        if views == 1 and (name.endswith("'") or name == "r_cross"):
            raise RuleError(f"{name} in the term {text!r} needs pairs of views")
        powers[name] = powers.get(name, 0) + _power(match.group(2), name, text)
    if powers and max(map(abs, powers.values())) > LARGEST_POWER:
        raise RuleError(f"a power in the term {text[:80]!r} is beyond {LARGEST_POWER}")
    return Term(group, tuple((name, powers[name]) for name in allowed if powers.get(name)))


def _plain(name: str, allowed: list[str]) -> str:
    """The name without the index of its unit."""
    if name in allowed:
        return name
    return "x" if name == "x_j" else name.replace("_i", "")


def _power(text: str | None, name: str, term: str) -> float:
    if text is None:
        return 1
    top, _, bottom = text.partition("/")
    if bottom and not int(bottom):
        raise RuleError(f"the power {text} in the term {term!r} divides by 0")
    value = float(top) / float(bottom or 1)
    if name == "var":
        return int(value) if value.is_integer() else value
    if not value.is_integer() or value < 0:
        raise RuleError(f"{name} in the term {term!r} takes whole powers >= 0; only var any other")
    return int(value)


def _power_text(power: float) -> str:
    if float(power).is_integer():
        return str(int(power))
    return f"{int(2 * power)}/2" if float(2 * power).is_integer() else repr(power)


def _tex_factor(name: str, power: float) -> str:
    prime, plain = "'" * name.endswith("'"), name.rstrip("'")
    if plain == "gain":
        symbol = rf"\sigma'(s_i{prime})"
    else:
        symbol = _TEX[plain] if not prime else f"{{{_TEX[plain]}}}'"
    if power == 1:
        return symbol
    symbol = f"({symbol})" if prime or "^" in symbol else symbol  # TeX takes one superscript
    return f"{symbol}^{{{_power_text(power)}}}"


# ---- what is linear in centred activities and preactivations ----


@dataclass(frozen=True)
class Linear:
    """A multiple of a quantity that currents are linear in; see kernels/unit_statistics.py.

    Attributes:
        kind: the quantity: "1", "s", "c", "r", "r_cov" or "r_cross".
        primed: whether it is the quantity of the other view.
        statistics: powers of the unit's statistics that multiply it; "rz" is <r z>.
        sign: 1 or -1.
    """

    kind: str
    primed: bool
    statistics: Mapping[str, float]
    sign: int = 1


# The first of these that occurs in a term is the quantity that its current is linear in
_LINEAR_FIRST = ("r_exact", "r_cross", "r_cov", "r", "z", "c", "y", "s")


def split_linear(varying: Mapping[str, int]) -> tuple[tuple[tuple[str, int], ...], list[Linear]]:
    """Split a product into a prefactor (powers of quantities) and a sum linear in one quantity."""
    names = [n for n in (p + q for p in _LINEAR_FIRST for q in ("", "'")) if varying.get(n)]
    rest = dict(varying)
    if not names:
        return _sorted(rest), [Linear("1", False, {})]
    rest[names[0]] -= 1
    kind, primed = names[0].rstrip("'"), names[0].endswith("'")
    parts = {
        "y": [Linear("c", primed, {}), Linear("1", primed, {"mean": 1})],
        "z": [Linear("c", primed, {"var": -0.5})],
        "r_exact": [
            Linear("r", primed, {"var": -0.5}),
            Linear("c", primed, {"var": -1, "rz": 1}, sign=-1),
        ],
    }
    return _sorted(rest), parts.get(kind, [Linear(kind, primed, {})])


def _sorted(powers: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, powers[name]) for name in VARYING if powers.get(name))
