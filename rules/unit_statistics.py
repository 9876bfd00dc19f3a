"""Local rules whose terms use the unit's statistics, the other view of the input, lateral currents.

    rule = UnitStatisticsRule.of_terms(["x gain z'", "x gain r", "w"])     # coefficients 0
    rule = preset("latent-predictive", eta=0.0054)                         # or a known rule
    params = train(model, params, pairs, rule, steps)

    dw_ij = sum_k psi_k mean_b( term_k + term_k with the views exchanged )
    w_ij += eta / (1 + t / tau) ( dw_ij / sqrt(mean_j dw_ij^2 + eps^2) - decay w_ij )

The terms are those of rules/unit_statistics_terms.py. A term in which nothing differs from sample
to sample, such as "w", counts only once. By default b has the terms of w that contain x, with x = 1
and w = b and the same coefficients: it is the weight of a constant input.

All terms are local: given what the receiving unit i knows (s and y of both views, lateral currents,
its share in the competition, statistics), the change dw_ij depends on no input except x_j and on no
weight except w_ij. The step divides it by one number per unit, which does depend on all of the
unit's dw_i. b_i has the divisor of w_i, and m_i has its own, from mean_k dm_ik^2. The plain step
has no divisor.

Statistics are those of the batch, over all its views. If their time constant rho is below 1, they
are running averages old + rho (batch - old), which include the current batch and start from the
first. These are kept in the layer's parameters as "mean", "square", "var" (without 1e-4), "cov",
"corr" and "cross" (without their diagonals), as is the number of updates, "updates", if tau is
finite. Values that are not finite propagate as in torch's own functions; finite values stay finite,
even if units are dead, views equal, or the batch is one image.

Sources: Halvagal, Zenke 2023 (latent predictive learning); Bienenstock, Cooper, Munro 1982 and
Intrator, Cooper 1992 (BCM); Oja 1982; Foldiak 1990; Zbontar et al. 2021 (decorrelation across
views); Journe et al. 2023 (competition); Metz et al. 2019, Confavreux et al. 2020 (learned rules of
such terms).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from initializers import STRIDE
from kernels.forward_mode import runs_forward
from kernels.gated_update import gated_update
from kernels.local_polynomial import place_of
from kernels.unit_statistics import rms_step
from learning_rules import (
    LARGEST_BOUND,
    LARGEST_POWER,
    LearningRule,
    RuleError,
    TermSumRule,
    as_matrix,
    changes_by_term,
)
from models_fully_local import Activation
from rules.choices import compete, have_currents
from rules.unit_statistics_sums import (
    GatedPlan,
    Signal,
    TermSum,
    Units,
    placed,
    planned_gated,
    planned_sums,
    wanted_statistics,
)
from rules.unit_statistics_terms import Term, parse_term

GROUPS = ("w", "b", "m")
STEPS = ("rms", "plain")
RUNNING = ("mean", "square", "var", "cov", "corr", "cross")
UNITS, FAN_IN = 32, 784  # the width and fan-in at which exponents have no effect
LATERAL_POWER = "lateral_power"

# Parts of the step as text and in LaTeX: change, divisor, decreasing rate, decay, assignment
STEP_TEXTS = (
    ("Δw_ij", " / sqrt(mean_j Δw_ij^2 + eps^2)", "eta / (1 + t / tau)", "decay w_ij", "w_ij +="),
    (
        r"\Delta w_{ij}",
        r" / \sqrt{\langle \Delta w_{ij}^2 \rangle_j + \epsilon^2}",
        r"\frac{\eta}{1 + t / \tau}",
        r"\lambda w_{ij}",
        r"w_{ij} \leftarrow w_{ij} +",
    ),
)
LATERAL_TEXTS = (
    f"with n units, each lateral current times (n / {UNITS})^{LATERAL_POWER}",
    rf"r \leftarrow (n / {UNITS})^{{\kappa}} r \text{{ for currents of }} n \text{{ units}}",
)
SYMBOLS = {
    "eta": ("eta", r"\eta"),
    "eps": ("eps", r"\epsilon"),
    "tau": ("tau", r"\tau"),
    "decay": ("decay", r"\lambda"),
    "beta": ("beta", r"\beta"),
    LATERAL_POWER: (LATERAL_POWER, r"\kappa"),
    **{f"rho_{name}": (f"rho_{name}", rf"\rho_{{\mathrm{{{name}}}}}") for name in RUNNING},
}


class UnitStatisticsRule(TermSumRule):
    """A rule of the family above, the same for every layer.

    Attributes:
        views: 2 for pairs, 1 for single inputs.
        terms: {"w": [Term, ...], "b": [...], "m": [...]}.
        w, b, m: the coefficients psi of these terms, nn.Parameters of the same lengths.
        bias_like_w: whether b has the terms of w instead of a group of its own.
        step: "rms" or "plain".
        start: initial values of eta, eps, tau, decay, beta (the inverse temperature of
            competition) and the time constants "rho_mean", ...; and the lateral power p: each
            coefficient is multiplied by (units / 32)^p for each lateral current in its term,
            since currents are sums over the other units.
        moved: the nn.Parameters u of those that are learned. Their values are start exp(0.3 u), or
            logistic(logit(start) + 0.3 u) for a time constant.
        exponents: if exponents are learned, the nn.Parameters "w", "b", "m" [terms] multiply each
            coefficient by (units / 32)^exponent, and the scalars "units" and "fan_in" multiply eta
            by (units / 32)^units (fan_in / 784)^fan_in.
        signal: a function from the layer's inputs, one tensor per view, to the third factor,
            [batch] or a scalar; `to_dict` leaves it out.
    """

    def __init__(
        self,
        terms: Mapping[str, Mapping[str, float]],
        *,
        views: int = 2,
        step: str = "rms",
        eta: float = 0.0054,
        eps: float = 0.1,
        tau: float = math.inf,
        decay: float = 0.0,
        beta: float = 1.0,
        lateral_power: float = 0.0,
        rho: Mapping[str, float] | None = None,
        learn: Sequence[str] = ("eta",),
        signal: Signal | None = None,
    ) -> None:
        """Make the rule; raises RuleError for an unknown term or option.

        terms: {"w": {"x gain z'": coefficient}, ...}; without "b", b has the terms of w.
        rho: time constants by the names in RUNNING; those left out are 1.
        learn: some of "eta", "eps", "tau", "decay", "beta", "rho_mean", ..., "exponents".
        """
        super().__init__()
        _check(terms, views, step)
        self.views, self.step, self.signal = views, step, signal
        self.bias_like_w = "b" not in terms
        self.terms: dict[str, list[Term]] = {}
        for group in GROUPS:
            parsed = [parse_term(text, group, views) for text in terms.get(group, {})]
            if len(set(parsed)) != len(parsed):
                raise RuleError(f"the terms of {group} repeat themselves")
            self.terms[group] = parsed
            values = torch.tensor([float(v) for v in terms.get(group, {}).values()])
            setattr(self, group, nn.Parameter(values, requires_grad=bool(len(values))))
        self.start = {"eta": eta, "eps": eps, "tau": tau, "decay": decay, "beta": beta}
        self.start[LATERAL_POWER] = lateral_power
        self.start |= {f"rho_{name}": 1.0 for name in RUNNING}
        self.start |= {f"rho_{name}": value for name, value in (rho or {}).items()}
        _check_numbers(self.start, learn)
        self.moved = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in learn if name != "exponents"}
        )
        self.exponents = nn.ParameterDict()
        if "exponents" in learn:
            sizes = {group: (len(self.terms[group]),) for group in GROUPS}
            for name, size in (sizes | {"units": (), "fan_in": ()}).items():
                self.exponents[name] = nn.Parameter(torch.zeros(size))
        self._forget_plans()

    @classmethod
    def of_terms(
        cls,
        w: Sequence[str],
        *,
        b: Sequence[str] | None = None,
        m: Sequence[str] = (),
        **options,
    ) -> "UnitStatisticsRule":
        """The rule with these terms, all coefficients 0; options as for the class."""
        groups = {"w": w, "m": m} if b is None else {"w": w, "b": b, "m": m}
        return cls({g: dict.fromkeys(texts, 0.0) for g, texts in groups.items()}, **options)

    def one_by_one(self) -> str:
        """As in LearningRule: running statistics, third factors, and classes of your own."""
        if type(self) is not UnitStatisticsRule:
            return super().one_by_one()
        if any(self.start[f"rho_{name}"] < 1 for name in RUNNING):
            return "a rule of unit statistics has running statistics"
        return "" if self.signal is None else "a rule of unit statistics has a signal"

    # ---- the update ----

    def update_layer(
        self,
        layer: nn.Module,
        old: dict[str, Tensor],
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        y: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """New parameters of one layer; arguments as in LearningRule."""
        units, rate = self._units(layer, old, x, s, y), self._rate(old)
        delta = self._changes(units, {group: getattr(self, group) for group in GROUPS})
        matrix = as_matrix(old["w"], "w", layer)
        w, b = self._stepped(matrix, delta.get("w"), rate, old["b"], delta.get("b"))
        new = old | units.state | {"w": w.view_as(old["w"]), "b": b}
        if "m" in delta:
            new["m"], _ = self._stepped(old["m"], delta["m"], rate)
        return self._finished(layer, old, new, rate)

    def respond_and_update(
        self, layer: nn.Module, old: dict[str, Tensor], x: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """As in LearningRule; a single autograd function if terms, layer and mode allow it.

        Raises RuleError for a layer whose activation is not an Activation, which has the gain.
        """
        if not isinstance(layer.activation, Activation):
            raise RuleError(
                "a rule of unit statistics knows the gain of its units: their activation must be "
                f"an Activation, not {layer.activation}"
            )
        gated = self._gated_plan()
        if gated.terms is None or layer.inhibition != "none" or runs_forward():
            return super().respond_and_update(layer, old, x)
        for view in x:
            layer.check(view)
        place, rate = place_of(x, layer.windows), self._rate(old)
        psi = self._scaled_to_width(self.w, "w", old["b"].shape[-1])
        weights = placed(gated.placed(psi, layer.activation.slope / place.count(x[0])), psi)
        numbers = (_scalar(number, old["b"]) for number in (rate, self.number("eps")))
        w, b, y = gated_update(
            gated.terms, weights, as_matrix(old["w"], "w", layer), old["b"], *numbers, x,
            layer.activation, place,
        )  # fmt: skip
        new = old | {"w": w.view_as(old["w"]), "b": b}
        y = [place.image(of_view, view) for of_view, view in zip(y, x, strict=True)]
        return y, self._finished(layer, old, new, rate)

    def _finished(self, layer, old, new: dict[str, Tensor], rate) -> dict[str, Tensor]:
        """`new` with decay, the layer's constraints on m, and the number of updates."""
        if self.start["decay"]:
            decayed = rate * self.number("decay")
            for name in ("w", "m") if self.terms["m"] and "m" in old else ("w",):
                new[name] = new[name] - _for_each(decayed, old[name]) * old[name]
        if "m" in new and self.terms["m"]:
            new["m"] = layer.constrain(new["m"])
        if math.isfinite(self.start["tau"]):
            new["updates"] = _updates(old) + 1
        return new

    def changes(
        self, layer: nn.Module, old: dict[str, Tensor], x, s, y, psi: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The changes of the parameters, before the step, that coefficients psi [terms] make.

        Each has its parameter's shape; parameters without terms are left out. The other arguments
        are as in `update_layer`.
        """
        delta = self._changes(self._units(layer, old, x, s, y), psi)
        return {group: d.view_as(old[group]) for group, d in delta.items()}

    def term_changes(self, layer: nn.Module, old: dict[str, Tensor], x, s, y) -> dict[str, Tensor]:
        """The change, before the step, that each term makes alone: [terms, *shape] by parameter."""
        psi = {group: getattr(self, group) for group in GROUPS if self.terms[group]}
        return changes_by_term(self, psi, layer, old, x, s, y)

    def _units(self, layer, old, x, s, y) -> Units:
        running = [name for name in RUNNING if self.start[f"rho_{name}"] < 1]
        rho = {name: self.number(f"rho_{name}") for name in running}
        wanted = wanted_statistics(self.terms.values())
        beta = _scalar(self.number("beta"), old["b"])
        return Units(layer, old, x, s, y, wanted, rho, self.signal, beta)

    def _changes(self, units: Units, psi: dict[str, Tensor]) -> dict[str, Tensor]:
        """Like `changes`, with w and m as matrices."""
        old, delta = units.old, {}
        for group in GROUPS:
            if not self.terms[group] or group not in old or group not in psi:
                continue
            parameter = as_matrix(old[group], group, units.layer)
            scaled = self._scaled_to_width(psi[group], group, parameter.shape[-2])
            matrix, bias = units.total(self._plan(group), scaled, parameter)
            delta[group] = matrix if group != "b" else matrix.squeeze(-1)
            if group == "w" and self.bias_like_w:
                delta["b"] = bias
        return delta

    def _forget_plans(self) -> None:
        self._plans: dict[str, list[TermSum]] = {}
        self._gated: GatedPlan | None = None
        self._scales: dict[tuple, Tensor] = {}  # kept, as a recorded graph may make no new ones

    def _gated_plan(self) -> GatedPlan:
        """The plan of the whole update in one step; its `terms` are None if that is not possible.

        It may be kept because time constants, step and terms change only in `keep`, `start_from`
        and `set_extra_state`, which forget it.
        """
        if self._gated is None:
            running = any(self.start[f"rho_{name}"] < 1 for name in RUNNING)
            apart = running or self.step != "rms" or not self.bias_like_w or self.terms["m"]
            sums = [] if apart else self._plan("w")
            self._gated = planned_gated(sums, self.views, len(self.terms["w"]))
        return self._gated

    def _plan(self, group: str) -> list[TermSum]:
        if group not in self._plans:
            self._plans[group] = planned_sums(self.terms[group], self.views)
        return self._plans[group]

    def _scaled_to_width(self, psi: Tensor, group: str, units: int) -> Tensor:
        if self.start[LATERAL_POWER] and units != UNITS:
            psi = psi * self._lateral_scale(psi, group, units)
        if group not in self.exponents:
            return psi
        return psi * (self.exponents[group] * math.log(units / UNITS)).exp()

    def _lateral_scale(self, psi: Tensor, group: str, units: int) -> Tensor:
        key = (group, units, psi.device, psi.dtype)
        if key not in self._scales:
            powers = [term.lateral() * self.start[LATERAL_POWER] for term in self.terms[group]]
            exponents = torch.tensor(powers, dtype=torch.double)  # for which inf is no error
            self._scales[key] = ((units / UNITS) ** exponents).to(psi)
        return self._scales[key]

    def _rate(self, old: dict[str, Tensor]) -> Tensor | float:
        """The rate of this update, at this width."""
        rate = self.number("eta")
        if math.isfinite(self.start["tau"]):
            rate = rate / (1 + _updates(old) / self.number("tau"))
        if self.exponents:
            units = old["b"].shape[-1]
            fan_in = old["w"].numel() // old["b"].numel()
            power = self.exponents["units"] * math.log(units / UNITS)
            power = power + self.exponents["fan_in"] * math.log(fan_in / FAN_IN)
            rate = rate * power.exp()
        return rate

    def number(self, name: str) -> Tensor | float:
        """The current value of eta, eps, tau, decay, beta or a time constant "rho_mean", ..."""
        start = self.start[name]
        if name not in self.moved:
            return start
        if name.startswith("rho_"):
            return torch.sigmoid(math.log(start / (1 - start)) + STRIDE * self.moved[name])
        return start * torch.pow(math.exp(STRIDE), self.moved[name])

    def _stepped(
        self,
        old: Tensor,
        delta: Tensor | None,
        rate: Tensor | float,
        old_bias: Tensor | None = None,
        of_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weights [units, fan_in] and biases [units] after the step, without decay."""
        if self.step == "plain":
            new = old if delta is None else old + _for_each(rate, old) * delta
            if of_bias is not None:
                old_bias = old_bias + _for_each(rate, old_bias) * of_bias
            return new, old_bias
        delta = torch.zeros_like(old) if delta is None else delta
        bias = old.new_zeros(old.shape[:-1]) if old_bias is None else old_bias
        of_bias = torch.zeros_like(bias) if of_bias is None else of_bias
        rate, eps = (_scalar(number, bias) for number in (rate, self.number("eps")))
        return rms_step(old, bias, delta, of_bias, rate, eps)

    # ---- coefficients and formulas ----

    def coefficients(self) -> dict[str, float]:
        """The coefficients, named like "w/x gain z'", and the step's numbers, like "step/eta".

        Learned exponents are named like "exponent/w/x gain z'" and "exponent/eta units", time
        constants like "step/rho_mean".
        """
        named = self.term_coefficients()
        for name in self._acting():
            named[f"step/{name}"] = self._value(name)
        for group, exponents in self.exponents.items():
            if group in GROUPS:
                for term, value in zip(self.terms[group], exponents.tolist(), strict=True):
                    named[f"exponent/{group}/{term}"] = value
            else:
                named[f"exponent/eta {group}"] = exponents.item()
        return named

    def term_coefficients(self) -> dict[str, float]:
        """The coefficients of the terms alone."""
        return {
            f"{group}/{term}": value
            for group, terms in self.terms.items()
            for term, value in zip(terms, getattr(self, group).tolist(), strict=True)
        }

    def entries_by_term(self) -> dict[str, str]:
        """The names of the nn.Parameters with one entry per term, and the group of each."""
        names = {group: group for group in GROUPS}
        return names | {f"exponents.{g}": g for g in GROUPS if g in self.exponents}

    def _value(self, name: str) -> float:
        number = self.number(name)
        return number.item() if isinstance(number, Tensor) else number

    def _acting(self) -> list[str]:
        """The names of the rule's numbers that have an effect."""
        eps = ["eps"] if self.step == "rms" else []
        tau = ["tau"] if math.isfinite(self.start["tau"]) else []
        decay = ["decay"] if self.start["decay"] else []
        texts = [str(term) for of_group in self.terms.values() for term in of_group]
        beta = ["beta"] if compete(texts) else []
        lateral = [LATERAL_POWER] if self.start[LATERAL_POWER] and have_currents(texts) else []
        running = [name for name in self.start if name[:4] == "rho_" and self.start[name] < 1]
        return ["eta", *eps, *tau, *decay, *beta, *lateral, *running]

    def _sum_text(self, group: str, texts: Sequence[str], latex: bool) -> str:
        if group == "b" and self.bias_like_w:
            return r"\Delta w \text{ with } x = 1" if latex else "the terms of w with x, x = 1"
        return super()._sum_text(group, texts, latex)

    def _term_texts(
        self, group: str, effects: Mapping[str, float] | None, latex: bool
    ) -> list[str]:
        """The nonzero terms of a group with their signs, sorted by decreasing size or effect."""
        terms = zip(self.terms[group], getattr(self, group).tolist(), strict=True)
        terms = [(term, value, f"{group}/{term}") for term, value in terms if value]
        terms.sort(key=lambda t: -(abs(t[1]) if effects is None else effects[t[2]]))
        space = r" \;" if latex else " "
        return [
            _signed(term, value, latex) + (f"{space}[{effects[name]:.2g}]" if effects else "")
            for term, value, name in terms
        ]

    def _step_texts(self, latex: bool) -> list[str]:
        numbers = {name: self._value(name) for name in self._acting()}
        change, divisor, slower, decay, arrow = STEP_TEXTS[latex]
        change += divisor if self.step == "rms" else ""
        if "decay" in numbers:
            change = f"({change} - {decay})"
        rate = slower if "tau" in numbers else SYMBOLS["eta"][latex]
        values = ", ".join(f"{SYMBOLS[n][latex]} = {value:.4g}" for n, value in numbers.items())
        texts = [f"{arrow} {rate} {change};  {values}"]
        if LATERAL_POWER in numbers:
            texts.append(LATERAL_TEXTS[latex])
        return texts

    def step_sizes(self) -> dict[str, Tensor]:
        """The typical size of each coefficient; see LearningRule.step_sizes."""
        return {
            group: torch.tensor([term.typical_size() for term in terms])
            for group, terms in self.terms.items()
            if terms
        }

    # ---- files, and changes of the terms ----

    def get_extra_state(self) -> dict[str, float]:
        """The initial values of eta, eps, ..., which belong to the state but are no tensors."""
        return dict(self.start)

    def set_extra_state(self, state: Mapping[str, float]) -> None:
        """Restore what `get_extra_state` returned."""
        self.start |= state  # files of older versions lack beta and the lateral power
        self._forget_plans()

    def to_dict(self) -> dict:
        """A description of the rule in plain values, for JSON; `rule_from_dict` reads it."""
        groups = [g for g in GROUPS if not (g == "b" and self.bias_like_w)]
        return {
            "kind": type(self).__name__,
            "views": self.views,
            "step": self.step,
            "terms": {
                g: dict(zip(map(str, self.terms[g]), getattr(self, g).tolist(), strict=True))
                for g in groups
            },
            "start": {n: v if math.isfinite(v) else None for n, v in self.start.items()},
            "moved": {name: u.item() for name, u in self.moved.items()},
            "exponents": {name: p.tolist() for name, p in self.exponents.items()},
        }

    @classmethod
    def from_dict(cls, description: dict) -> "UnitStatisticsRule":
        """The rule that `to_dict` described, in float64; a signal must be set anew."""
        start = {n: math.inf if v is None else v for n, v in description["start"].items()}
        learned = [*description["moved"], *(["exponents"] if description["exponents"] else [])]
        rule = cls(
            description["terms"],
            views=description["views"],
            step=description["step"],
            **{name: start[name] for name in ("eta", "eps", "tau", "decay")},
            beta=start.get("beta", 1.0),  # files of older versions lack it
            lateral_power=start.get(LATERAL_POWER, 0.0),  # and this
            rho={name: start[f"rho_{name}"] for name in RUNNING},
            learn=learned,
        ).double()
        exact = {g: list(values.values()) for g, values in description["terms"].items()}
        exact |= {f"moved.{name}": u for name, u in description["moved"].items()}
        exact |= {f"exponents.{name}": p for name, p in description["exponents"].items()}
        for name, value in exact.items():
            target = rule.get_parameter(name)
            target.data = torch.tensor(value, dtype=torch.double).view_as(target)
        return rule

    def keep(self, masks: dict[str, Tensor]) -> None:
        """Remove the terms whose mask is False.

        masks: bool [terms] by the names of the nn.Parameters "w", "b", "m"; others are ignored.
        """
        for group in GROUPS:
            if group not in masks:
                continue
            mask = masks[group]
            holders = [(self, group)]
            holders += [(self.exponents, group)] if group in self.exponents else []
            for holder, name in holders:
                parameter = getattr(holder, name)
                kept = nn.Parameter(parameter.detach()[mask].clone(), parameter.requires_grad)
                setattr(holder, name, kept)
            terms = zip(self.terms[group], mask.tolist(), strict=True)
            self.terms[group] = [term for term, stays in terms if stays]
        self._forget_plans()

    def start_from(self, other: LearningRule) -> None:
        """Take over another rule's coefficients and numbers; terms that it lacks get 0.

        Exponents and the lateral power are kept, and beta if the other rule has no term that
        competes. Raises RuleError if the other rule is of another family, has terms that this one
        lacks, another step, another kind of biases, or another number of views.
        """
        if not isinstance(other, UnitStatisticsRule) or other.views != self.views:
            raise RuleError(f"the rule is not one of unit statistics with {self.views} views")
        if (other.step, other.bias_like_w) != (self.step, self.bias_like_w):
            raise RuleError(f"the rule does not have the {self.step} step and biases of this one")
        values, terms = other.term_coefficients(), self.term_coefficients()
        missing = [name for name, value in values.items() if value and name not in terms]
        if missing:
            raise RuleError(f"the rule has a term {missing[0]} that this one lacks")
        own = [LATERAL_POWER] if "beta" in other._acting() else [LATERAL_POWER, "beta"]
        kept = {name: self._value(name) for name in own}
        with torch.no_grad():
            for group in GROUPS:
                names = [f"{group}/{term}" for term in self.terms[group]]
                taken = [values.get(name, 0.0) for name in names]
                getattr(self, group).copy_(torch.tensor(taken, dtype=torch.double))
            for u in self.moved.values():
                u.zero_()
        self.start = {name: other._value(name) for name in other.start} | kept
        self._forget_plans()


def _check(terms: Mapping[str, Mapping[str, float]], views: int, step: str) -> None:
    if unknown := set(terms) - set(GROUPS):
        raise RuleError(f"terms of {sorted(unknown)}: parameters are {', '.join(GROUPS)}")
    if views not in (1, 2):
        raise RuleError(f"a rule takes 1 or 2 views of each input, not {views}")
    if step not in STEPS:
        raise RuleError(f"step {step!r} is unknown; choose from {', '.join(STEPS)}")


def _check_numbers(start: Mapping[str, float], learn: Sequence[str]) -> None:
    known = [*(name for name in start if name != LATERAL_POWER), "exponents"]
    if unknown := [name for name in learn if name not in known]:
        raise RuleError(f"{unknown[0]!r} cannot be learned; choose from {', '.join(known)}")
    for name, value in start.items():
        if name.startswith("rho_"):
            if name.removeprefix("rho_") not in RUNNING:
                raise RuleError(f"time constants are of {', '.join(RUNNING)}, not of {name[4:]!r}")
            if not 0 < value <= 1 or (name in learn and value == 1):
                raise RuleError(f"{name} must be within (0, 1], below 1 to be learned: {value}")
        elif name == LATERAL_POWER:
            if not abs(value) <= LARGEST_POWER:
                raise RuleError(f"{name} must be from -{LARGEST_POWER} to {LARGEST_POWER}: {value}")
        elif not (value > 0 or (name == "decay" and value == 0)):
            raise RuleError(f"{name} must be > 0: {value}")
        elif value > LARGEST_BOUND and (name, value) != ("tau", math.inf):
            raise RuleError(f"{name} must be at most {LARGEST_BOUND:g}: {value}")
        elif name in learn and not 0 < value < math.inf:
            raise RuleError(f"{name} must be > 0 and finite to be learned: {value}")


def _updates(old: dict[str, Tensor]) -> Tensor:
    return old["updates"] if "updates" in old else old["b"].new_zeros(old["b"].shape[:-1])


def _scalar(number: Tensor | float, bias: Tensor) -> Tensor:
    """A number as a scalar tensor, [tasks, 1] if biases are [tasks, units]."""
    number = number.to(bias) if isinstance(number, Tensor) else bias.new_full((), number)
    return number if bias.dim() == 1 else number.expand(len(bias)).unsqueeze(-1)


def _for_each(number: Tensor | float, parameter: Tensor) -> Tensor | float:
    """A number of every task, [tasks], in the dimensions of a parameter [tasks, ...]."""
    if not isinstance(number, Tensor) or not number.dim():
        return number
    return number.view(-1, *[1] * (parameter.dim() - 1))


def _signed(term: Term, value: float, latex: bool) -> str:
    sign = "-" if value < 0 else "+"
    name = term.tex() if latex else str(term)
    return f"{sign} {abs(value):.3g} {name if name != '1' else ''}".rstrip()


# ---- named rules ----

DEFAULT = ("x gain", "x gain y", "x gain y'", "x gain z", "x gain z'", "x gain r", "x gain r'",
           "x gain s", "w")  # fmt: skip


def default_rule(**options) -> UnitStatisticsRule:
    """The default terms with coefficients 0, to be learned; options as for UnitStatisticsRule."""
    return UnitStatisticsRule.of_terms(DEFAULT, **{"eps": 0.1, **options})


def latent_predictive(a: float = 33.0, d: float = 21.4, **options) -> UnitStatisticsRule:
    """Latent predictive learning (Halvagal, Zenke 2023) in closed local form, for centred inputs.

    dw = gain (-a (y - y') + 2 c / var - 4 d r_cov) x: predict the other view, keep the variance,
    decorrelate. With statistics of the batch, dw is minus the gradient of
    sum_i [a/2 <(y - y')^2> - 2 log var_i] + 2 d sum_{i != k} Cov_ik^2.
    """
    terms = {"x gain y": -a, "x gain y'": a, "x gain c var^-1": 2.0, "x gain r_cov": -4 * d}
    return UnitStatisticsRule({"w": terms}, **{"eps": 0.2, "tau": 274.0, **options})


def cross_view_decorrelation(strength: float = 0.1, **options) -> UnitStatisticsRule:
    """Each unit agrees with itself across views and with no other unit (Zbontar et al. 2021).

    dw is minus the gradient of -sum_i X_ii + strength / 2 sum_{i != k} X_ik^2 with X the
    correlation across views, for fixed variances.
    """
    terms = {"x gain z' var^-1/2": 1.0, "x gain r_cross var^-1/2": -strength}
    return UnitStatisticsRule({"w": terms}, **options)


def bcm(rate: float = 0.01, *, gain: bool = False, **options) -> UnitStatisticsRule:
    """dw = rate y (y - <y^2>) x, with a threshold that slides with the unit's activity.

    Sources: Bienenstock, Cooper, Munro 1982 (Journal of Neuroscience); Intrator, Cooper 1992
    (Neural Networks).

    gain: multiply by sigma'(s), as in the derivation from an objective.
    """
    factor = "x gain" if gain else "x"
    terms = {f"{factor} y^2": 1.0, f"{factor} y square": -1.0}
    return UnitStatisticsRule({"w": terms}, **{"views": 1, "step": "plain", "eta": rate, **options})


def oja(rate: float = 0.01, **options) -> UnitStatisticsRule:
    """dw = rate (x y - y^2 w), without a change of biases (Oja 1982)."""
    groups = {"w": {"x y": 1.0, "y^2 w": -1.0}, "b": {}}
    return UnitStatisticsRule(groups, **{"views": 1, "step": "plain", "eta": rate, **options})


def foldiak(rate: float = 0.01, *, target: float = 0.1, **options) -> UnitStatisticsRule:
    """Foldiak 1990 without the clipping: units decorrelate and approach a mean activity.

    dw = rate (x y - y w), db = rate (target - y), dm = -rate (y_i y_j - target^2).
    """
    groups = {
        "w": {"x y": 1.0, "y w": -1.0},
        "b": {"1": target, "y": -1.0},
        "m": {"1": target**2, "y_j y_i": -1.0},
    }
    return UnitStatisticsRule(groups, **{"views": 1, "step": "plain", "eta": rate, **options})


def softhebb(rate: float = 0.01, **options) -> UnitStatisticsRule:
    """dw = rate won (x - s w): the winner of a sample learns it, the others unlearn it.

    A unit at rest has weights of Euclidean norm 1; the bias is one of them, of an input 1. Source:
    Journe et al. 2023 (ICLR, arXiv 2209.11883), without its rates that depend on the norm.
    """
    groups = {"w": {"x won": 1.0, "won s w": -1.0}, "b": {"won": 1.0, "won s b": -1.0}}
    return UnitStatisticsRule(groups, **{"views": 1, "step": "plain", "eta": rate, **options})


PRESETS: dict[str, Callable[..., UnitStatisticsRule]] = {
    "default": default_rule,
    "latent-predictive": latent_predictive,
    "cross-view": cross_view_decorrelation,
    "bcm": bcm,
    "oja": oja,
    "foldiak": foldiak,
    "softhebb": softhebb,
}


def preset(name: str, **numbers) -> UnitStatisticsRule:
    """The rule of this name in PRESETS; raises RuleError if there is none.

    numbers: arguments of its function and of UnitStatisticsRule.
    """
    if name not in PRESETS:
        raise RuleError(f"no such rule is called {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name](**numbers)
