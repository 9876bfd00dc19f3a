"""The sums of a rule's terms with unit statistics, laid out so that few matrix products are needed.

The layout of a rule's terms is planned once; kernels/unit_statistics.py has the formulas.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.gated_update import LATERAL_CURRENTS, GatedTerms
from kernels.local_polynomial import samples, with_samples
from kernels.unit_statistics import (
    FLOOR,
    correlate,
    currents,
    gain,
    gated_currents,
    moments,
)
from learning_rules import RuleError
from rules.choices import LATERAL
from rules.unit_statistics_terms import Linear, Term, split_linear

Signal = Callable[[Sequence[Tensor]], Tensor]
GATED = (("gain", 1),)  # the prefactor for which kernels/unit_statistics.py has a special function


# ---- layout of terms ----


class CoefficientMap:
    """A constant matrix [..., columns, terms], kept on every device where it has been needed."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._moved: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, psi: Tensor) -> Tensor:
        """Its product with coefficients psi; see `placed`."""
        key = (psi.dtype, psi.device)
        if key not in self._moved:
            self._moved[key] = self.matrix.to(psi)
        return placed(self._moved[key], psi)


@dataclass(frozen=True)
class Currents:
    """Terms with the same prefactor, as columns whose weights are linear in the coefficients.

    Attributes:
        prefactor: powers of quantities of the receiving unit.
        columns: by kind (see `Linear`), the powers of statistics of each column.
        place: by kind, the map [views, columns, terms] from coefficients to the weights of the
            columns for the sum and the difference of the views (for s: the same, the other view).
    """

    prefactor: tuple[tuple[str, int], ...]
    columns: dict[str, list[tuple[tuple[str, float], ...]]]
    place: dict[str, CoefficientMap]


@dataclass(frozen=True)
class TermSum:
    """Terms with the same powers of the sending unit's quantities and of the parameter.

    Attributes:
        sending: powers of the sending unit's quantities, possibly none.
        own: the power of the parameter.
        currents: the terms that differ from sample to sample or have a sending quantity.
        statistics: for the other terms, the powers of statistics of each column.
        place: the map [columns, terms] from coefficients to the weights of these columns.
    """

    sending: tuple[tuple[str, int], ...]
    own: int
    currents: list[Currents]
    statistics: list[tuple[tuple[str, float], ...]]
    place: CoefficientMap


def planned_sums(terms: Sequence[Term], views: int) -> list[TermSum]:
    keys = dict.fromkeys((t.sending(), t.power(t.group)) for t in terms)
    return [_planned_sum(terms, views, sending, own_power) for sending, own_power in keys]


def _planned_sum(terms: Sequence[Term], views: int, sending, own_power: int) -> TermSum:
    parts: dict[tuple, list[tuple[int, Linear, dict[str, float]]]] = {}
    constant: dict[tuple, list[int]] = {}
    for index, term in enumerate(terms):
        if (term.sending(), term.power(term.group)) != (sending, own_power):
            continue
        if not sending and not term.varying():
            constant.setdefault(tuple(term.statistics().items()), []).append(index)
            continue
        prefactor, linears = split_linear(term.varying())
        for linear in linears:
            powers = dict(term.statistics())
            for name, power in linear.statistics.items():
                powers[name] = powers.get(name, 0) + power
            parts.setdefault(prefactor, []).append((index, linear, powers))
    place = torch.zeros(len(constant), len(terms), device="cpu")
    for column, indices in enumerate(constant.values()):
        place[column, indices] = 1.0
    laid_out = [_laid_out(p, linears, views, len(terms)) for p, linears in parts.items()]
    return TermSum(sending, own_power, laid_out, list(constant), CoefficientMap(place))


def _laid_out(prefactor, linears, views: int, count: int) -> Currents:
    columns: dict[str, list] = {}
    for _, linear, powers in linears:
        of_kind = columns.setdefault(linear.kind, [])
        key = tuple(sorted((n, p) for n, p in powers.items() if p))
        if key not in of_kind:
            of_kind.append(key)
    place = {
        kind: torch.zeros(views, len(keys), count, device="cpu") for kind, keys in columns.items()
    }
    for index, linear, powers in linears:
        key = tuple(sorted((n, p) for n, p in powers.items() if p))
        column = place[linear.kind][:, columns[linear.kind].index(key), index]
        column += linear.sign * torch.tensor(_view_weights(linear, views), device="cpu")
    return Currents(prefactor, columns, {k: CoefficientMap(m) for k, m in place.items()})


def _view_weights(linear: Linear, views: int) -> list[float]:
    """The weights of sum and difference of the views; for s, of the same and the other view."""
    if views == 1:
        return [1.0]
    if linear.kind == "1":
        return [1.0, 0.0]
    if linear.kind == "s":
        return [0.0, 1.0] if linear.primed else [1.0, 0.0]
    other = linear.primed != (linear.kind == "r_cross")  # r_cross adds up the other view's z
    return [0.5, -0.5] if other else [0.5, 0.5]


@dataclass(frozen=True)
class GatedPlan:
    """The terms of w for `gated_update`, if they have the necessary form.

    Attributes:
        terms: the layout of the weights; None if the terms don't have that form.
        place: the map [weights, terms] from coefficients to weights.
        fixed: the number of weights at the end that don't multiply a mean over the batch.
        scaled: results of `placed`.
    """

    terms: GatedTerms | None
    place: Tensor
    fixed: int
    scaled: dict[tuple, Tensor] = field(default_factory=dict)

    def placed(self, psi: Tensor, scale: float) -> Tensor:
        """`place` in the type of psi, with the weights of means over the batch times `scale`."""
        key = (scale, psi.dtype, psi.device)
        if key not in self.scaled:
            place = self.place.to(psi, copy=True)
            place[: len(place) - self.fixed] *= scale
            self.scaled[key] = place
        return self.scaled[key]


# The names in `gated_update` of the powers of statistics that it supports
_GATED_FACTORS = {
    (): "1",
    (("mean", 1),): "mean",
    (("var", -0.5),): "d",
    (("var", -1),): "d2",
    (("rz", 1), ("var", -1)): "rz",
}


def planned_gated(sums: Sequence[TermSum], views: int, count: int) -> GatedPlan:
    """The plan of `gated_update` for sums whose terms are all x gain times a current, or w."""
    refused = GatedPlan(None, torch.zeros(0, count, device="cpu"), 0)
    currents, of_w = None, None
    for part in sums:
        if (part.sending, part.own) == ((("x", 1),), 0) and len(part.currents) == 1:
            (currents,) = part.currents
        elif (part.sending, part.own) == ((), 1) and part.statistics == [()] and not part.currents:
            of_w = part.place.matrix
        else:
            return refused
    if currents is None or currents.prefactor != GATED:
        return refused
    keys = {key for columns in currents.columns.values() for key in columns}
    if not keys <= set(_GATED_FACTORS) or currents.columns.get("s", [()]) != [()]:
        return refused
    factors = [key for key in _GATED_FACTORS if key in keys]
    rows = [kind for kind in ("c", *LATERAL_CURRENTS, "1") if kind in currents.columns]
    place = []
    for kind in rows:
        of_kind = torch.zeros(1 if kind == "1" else views, len(factors), count, device="cpu")
        for column, key in enumerate(currents.columns[kind]):
            matrix = currents.place[kind].matrix
            of_kind[:, factors.index(key)] = matrix[: len(of_kind), column]
        place.append(of_kind.flatten(0, 1))
    place += [currents.place["s"].matrix[:, 0]] if "s" in currents.columns else []
    place += [of_w] if of_w is not None else []
    names = tuple(_GATED_FACTORS[key] for key in factors)
    terms = GatedTerms(tuple(rows), names, "s" in currents.columns, of_w is not None)
    return GatedPlan(terms, torch.cat(place), int(of_w is not None))


# ---- one layer's units in one update ----


class Units:
    """The quantities of one layer's units in one update, by name, and the sums of terms.

    layer, old, x, s, y: as in UnitStatisticsRule.update_layer.
    wanted: the names of the statistics that are needed.
    rho: the time constants of running statistics.
    signal: from the layer's inputs to the third factor, or None.
    beta: the inverse temperature of competition, a scalar; of several tasks, [tasks, 1].

    Attributes:
        state: the running statistics after this update.
    """

    def __init__(
        self,
        layer: nn.Module,
        old: Mapping[str, Tensor],
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        y: Sequence[Tensor],
        wanted: Set[str],
        rho: Mapping[str, Tensor | float],
        signal: Signal | None,
        beta: Tensor,
    ) -> None:
        self.beta = beta if beta.dim() == 0 else beta.unsqueeze(-1)
        self.layer, self.old, self.x = layer, old, x
        self.wanted, self.rho, self.signal = wanted, rho, signal
        self.s, self.y = [samples(t) for t in s], [samples(t) for t in y]
        self.views, (self.samples, self.units) = len(s), self.y[0].shape[-2:]
        self.state: dict[str, Tensor] = {}
        self._values: dict = {}
        level = "gram" if self.wanted & {"cov", "corr", "cross"} else "variance"
        level = level if self.wanted & {"var", "square"} or level == "gram" else "mean"
        self.c, batch_mean, self.second = moments(self.y, level)
        self._take_statistics(batch_mean, level)

    def _take_statistics(self, batch_mean: Tensor, level: str) -> None:
        """Put the statistics, running or of this batch, into `_values`."""
        values = self._values
        values["mean"] = self._running("mean", batch_mean)
        self.shift = None  # the batch's mean minus the running one
        if "mean" in self.rho:
            self.shift = batch_mean - values["mean"]
        if level == "mean":
            return
        pooled = self.second.sum(0)
        variance = pooled.diagonal(dim1=-2, dim2=-1) if level == "gram" else pooled
        if "square" in self.wanted:
            values["square"] = self._running("square", variance + batch_mean.square())
        if self.shift is not None:
            variance = variance + self.shift.square()
        values["var"] = self._running("var", variance) + FLOOR
        values["d"] = values["var"].rsqrt()
        if level == "gram":
            self._take_correlations(pooled)

    def _take_correlations(self, pooled: Tensor) -> None:
        others = 1 - torch.eye(self.units, dtype=pooled.dtype, device=pooled.device)
        d = self._values["d"]
        scale = d.unsqueeze(-1) * with_samples(d) * others
        shifted = 0 if self.shift is None else torch.outer(self.shift, self.shift)
        if "cov" in self.wanted:
            self._values["cov"] = self._running("cov", (pooled + shifted) * others)
        if "corr" in self.wanted:
            self._values["corr"] = self._running("corr", (pooled + shifted) * scale)
        if "cross" in self.wanted:
            across = self.second[0] - self.second[1] + shifted
            self._values["cross"] = self._running("cross", across * scale)

    def _running(self, name: str, batch: Tensor) -> Tensor:
        if name not in self.rho or name not in self.wanted:
            return batch
        if name in self.old:
            past = self.old[name]
            batch = past + self.rho[name] * (batch - past)
        self.state[name] = batch
        return batch

    # ---- quantities ----

    def statistic(self, name: str) -> Tensor:
        """A statistic [units], by name; "rz" is <r z>."""
        if name == "rz" and name not in self._values:
            self._values[name] = self._values["corr"].square().sum(-1)
        return self._values[name]

    def factor(self, powers: tuple[tuple[str, float], ...]) -> Tensor | None:
        """A product of powers of statistics, [units]; None stands for 1."""
        result = None
        for name, power in powers:
            if name == "var" and power == -0.5:
                value = self._values["d"]
            else:
                value = self.statistic(name)
                value = value if power == 1 else value**power
            result = value if result is None else result * value
        return result

    def quantity(self, name: str, view: int) -> Tensor:
        """A quantity of the receiving or sending units in one view, [samples, units]."""
        if name == "signal":
            return self._signal()
        if name.endswith("'"):
            return self.quantity(name[:-1], 1 - view)
        if name in ("s", "y"):
            return getattr(self, name)[view]
        key = (name.removesuffix("_j"), view)
        if key not in self._values:
            self._values[key] = self._computed(key[0], view)
        return self._values[key]

    def _computed(self, name: str, view: int) -> Tensor:
        if name == "y":
            return self.y[view]
        if name == "gain":
            return gain(self.sigma(view), self.layer.activation)
        if name == "c":
            return self.y[view] - self._of_units("mean")
        if name == "z":
            return self.quantity("c", view) * self._of_units("d")
        if name == "r_exact":
            r, z = (self.quantity(n, view) for n in ("r", "z"))
            return (r - z * self._of_units("rz")) * self._of_units("d")
        if name == "share":
            return (self.beta * self.s[view]).softmax(-1)
        if name == "won":
            return won(self.quantity("share", view), self.s[view])
        if name == "r_cov":
            return self.quantity("c", view) @ self._values["cov"]
        if name == "r_cross":
            return self.quantity("z", 1 - view) @ self._values["cross"]
        return self.quantity("z", view) @ self._values["corr"]

    def _of_units(self, name: str) -> Tensor:
        """A statistic, to go with every sample."""
        return with_samples(self.statistic(name))

    def sigma(self, view: int) -> Tensor:
        """sigma(s), which is y without inhibition, [samples, units]."""
        if self.layer.inhibition == "none":
            return self.y[view]
        key = ("sigma", view)
        if key not in self._values:
            activation = self.layer.activation
            self._values[key] = activation.of_scaled_(activation.slope * self.s[view])
        return self._values[key]

    def _signal(self) -> Tensor:
        if self.signal is None:
            raise RuleError(
                "a term of the rule has the signal: set rule.signal to what computes it"
            )
        signal = self.signal(self.x).to(self.y[0])
        if signal.dim():
            signal = signal.repeat_interleave(self.samples // len(signal)).unsqueeze(1)
        return signal

    # ---- sums of terms ----

    def total(self, plan: list[TermSum], psi: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The change [units, inputs] of a parameter `old`, and the change [units] of b.

        The latter is from the terms with a sending quantity, with 1 in its place.
        """
        change, alone = None, None
        for part in plan:
            matrix, per_unit = self._sum(part, psi)
            matrix = per_unit.unsqueeze(-1) if matrix is None else matrix
            matrix = matrix if part.own == 0 else matrix * old**part.own
            change = matrix if change is None else change + matrix
            if part.sending:
                of_bias = per_unit if part.own == 0 else per_unit * self.old["b"] ** part.own
                alone = of_bias if alone is None else alone + of_bias
        alone = torch.zeros_like(self.old["b"]) if alone is None else alone
        return change.expand_as(old), alone

    def _sum(self, part: TermSum, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        """The sum [units, inputs], and the sum [units] with 1 in place of sending quantities.

        The first is None if the terms have no sending quantities.
        """
        per_unit = None
        if part.statistics:
            weights = part.place(psi)
            factors = [self.factor(powers) for powers in part.statistics]
            per_unit = self._weighted(weights, factors)
        matrix = None
        if part.currents:
            h = [self._received(c, psi) for c in part.currents]
            h = sum(h[1:], start=h[0])
            if part.sending:
                sent, windows = self._sent(part.sending)
                matrix, summed = correlate(h, sent, windows)
            else:
                summed = h.sum((0, -2))
            per_unit = summed if per_unit is None else per_unit + summed
        return matrix, per_unit

    def _sent(self, powers) -> tuple[list[Tensor], object]:
        """The product of powers of sending quantities in each view, and its windows or None."""
        if powers[0][0] == "x":
            power = powers[0][1]
            return [x if power == 1 else x**power for x in self.x], self.layer.windows
        sent = []
        for view in range(self.views):
            factors = [self.quantity(name, view) ** power for name, power in powers]
            sent.append(math.prod(factors[1:], start=factors[0]))
        return sent, None

    def _received(self, part: Currents, psi: Tensor) -> Tensor:
        """The factor of sending quantities / number of samples, [views, samples, units]."""
        gated = part.prefactor == GATED
        scale = (self.layer.activation.slope if gated else 1.0) / self.samples
        psi = psi * scale
        k, const, of_s = self._matrices(part, psi)
        if gated:
            sigma = [self.sigma(view) for view in range(self.views)]
            return gated_currents(self.c, k, const, self.s, of_s, sigma, self.layer.activation)
        h = currents(self.c, k, const, self.s, of_s)
        if part.prefactor:
            h = h * torch.stack([self._prefactor(part.prefactor, v) for v in range(self.views)])
        return h

    def _prefactor(self, powers, view: int) -> Tensor:
        factors = [
            self.quantity(n, view) if p == 1 else self.quantity(n, view) ** p for n, p in powers
        ]
        return math.prod(factors[1:], start=factors[0])

    def _matrices(self, part: Currents, psi: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """K_+- or its diagonal, the constant, S and S'; see kernels/unit_statistics.py."""
        weights = {kind: self._weights(part, kind, psi) for kind in part.columns}
        lateral = [
            self._lateral(kind) * weights[kind].unsqueeze(-2) for kind in LATERAL if kind in weights
        ]
        diagonal = weights.get("c", self.c.new_zeros(self.views, *psi.shape[:-1], 1))
        diagonal = diagonal.expand(*diagonal.shape[:-1], self.units)
        k = sum(lateral, start=torch.diag_embed(diagonal)) if lateral else diagonal
        const = weights["1"][0].expand_as(self.old["b"]) if "1" in weights else None
        if self.shift is not None:
            shifted = self.shift @ k[0] if lateral else self.shift * k[0]
            const = self.views * shifted + (0 if const is None else const)
        return k, const, weights.get("s")

    def _weights(self, part: Currents, kind: str, psi: Tensor) -> Tensor:
        """The sum of the columns of a kind, [views, units or 1]."""
        weights = part.place[kind](psi)
        factors = [self.factor(powers) for powers in part.columns[kind]]
        return weights if factors == [None] else self._weighted(weights, factors)

    def _weighted(self, weights: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
        """The sum over factors [units] (None: 1) times weights [..., factors], [..., units]."""
        ones = torch.ones_like(self.old["b"])
        columns = [ones if factor is None else factor for factor in factors]
        if ones.dim() == 1:
            return weights @ torch.stack(columns)
        return (weights.unsqueeze(-2) @ torch.stack(columns, dim=1)).squeeze(-2)

    def _lateral(self, kind: str) -> Tensor:
        """The matrix [units, units] that maps centred activities to a lateral current."""
        matrix = self._values[LATERAL[kind]]
        return matrix if kind == "r_cov" else matrix * self._values["d"].unsqueeze(-1)


def won(share: Tensor, s: Tensor) -> Tensor:
    """The shares [..., units], negative for all but the unit of the largest s [..., units].

    Of equal units the first has won. Source: Journe et al. 2023 (ICLR, arXiv 2209.11883).
    """
    winner = s.argmax(-1, keepdim=True)
    return (-share).scatter(-1, winner, share.gather(-1, winner))


def placed(place: Tensor, psi: Tensor) -> Tensor:
    """The map [..., columns, terms] of coefficients psi [terms], [..., columns].

    Of several tasks, psi is [tasks, terms] and the result [..., tasks, columns].
    """
    return place @ psi if psi.dim() == 1 else psi @ place.mT


def wanted_statistics(groups) -> set[str]:
    """The names of the statistics that the terms of these groups need."""
    names = {name.rstrip("'") for terms in groups for t in terms for name, _ in t.powers}
    wanted = {"mean"} | (names & {"square", "var"})
    wanted |= {LATERAL[name] for name in names if name in LATERAL}
    if names & {"z", "z_j", "r", "r_exact", "r_cross"}:
        wanted.add("var")
    return wanted
