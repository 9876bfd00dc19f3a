"""Competition between hidden units as a learning rule whose hyperparameters can be learned.

    rule = KrotovHopfieldRule(rate=0.02, delta=0.4)
    params = train(model, params, batches, rule, steps)      # differentiable in rate, delta, ...

The update is that of krotov_hopfield/competition.py, for the layers of models_fully_local.py:
fully connected, or convolutions whose channels compete at every position. Biases are the weights
of a constant input 1; lateral weights don't change. The layers themselves respond with W, not with
f(W); for p = 2 that is the same. Almost everywhere, the winners don't change with the
hyperparameters; the gradient is that of the update for given winners.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.local_polynomial import ROWS, samples
from krotov_hopfield import ACTING, Competition, CompetitionError
from krotov_hopfield.competition import check_number, check_options, scaled_changes, signed_power
from learning_rules import LearningRule, RuleError

SCALES = {  # the divisor of D, as text and in LaTeX
    "matrix": ("(max_oi |D_oi| + 1e-5)", r"(\max_{oi} |D_{oi}| + 10^{-5})"),
    "filter": ("(max_i |D_oi| + 1e-5)", r"(\max_i |D_{oi}| + 10^{-5})"),
    "clamp": ("max(max_oi |D_oi|, 1e-30)", r"\max(\max_{oi} |D_{oi}|, 10^{-30})"),
}
GATE_FORMULAS = {
    "ranked": (
        "g_bo = 1 for the largest c_bo of sample b, -delta for the k-th largest, else 0",
        r"g_{bo} = \begin{cases} 1 & \text{for the largest } c_{bo} \text{ of sample } b \\ "
        r"-\delta & \text{for the } k \text{-th largest} \\ 0 & \text{else} \end{cases}",
    ),
    "losers": (
        "g_bo = 1 for the largest c_bo of sample b, else -delta",
        r"g_{bo} = \begin{cases} 1 & \text{for the largest } c_{bo} \text{ of sample } b \\ "
        r"-\delta & \text{else} \end{cases}",
    ),
    "soft": (
        "g_bo = softmax_o(inverse_temperature c_bo), negated for all but the largest c_bo of "
        "sample b",
        r"g_{bo} = \pm \operatorname{softmax}_o(\beta c_{bo}), + \text{ for the largest } c_{bo} "
        r"\text{ of sample } b, - \text{ else}",
    ),
    "winner": (
        "g_bo = 1 for the largest c_bo of sample b, else 0",
        r"g_{bo} = \begin{cases} 1 & \text{for the largest } c_{bo} \text{ of sample } b \\ "
        r"0 & \text{else} \end{cases}",
    ),
}
SYMBOLS = {"rate": r"\eta", "delta": r"\delta", "inverse_temperature": r"\beta"}


class KrotovHopfieldRule(LearningRule):
    """The update of competing hidden units, the same for every layer.

    Raises RuleError for options that don't fit together.

    Attributes:
        log_rate, log_inverse_temperature: nn.Parameters, the logarithms of the learning rate and of
            the soft gate's inverse temperature, so that an optimiser's step is a relative change
            and both stay positive.
        delta: nn.Parameter, the strength of unlearning.
        gate, ranking_param, lebesgue_p, normalization: as in krotov_hopfield/layers.py.

    Parameters that the gate doesn't depend on don't require a gradient.
    """

    def __init__(
        self,
        rate: float,
        *,
        delta: float = 0.05,
        inverse_temperature: float = 1.0,
        gate: str = "ranked",
        ranking_param: int = 2,
        lebesgue_p: float = 2,
        normalization: str = "matrix",
    ) -> None:
        super().__init__()
        try:
            check_number("rate", rate, above=0)
            check_options(lebesgue_p, normalization)
            Competition(gate, ranking_param, delta, inverse_temperature).check()
        except CompetitionError as problem:
            raise RuleError(str(problem)) from problem
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate)))
        acts = ACTING[gate]
        self.delta = nn.Parameter(torch.tensor(float(delta)), "delta" in acts)
        temperature = torch.tensor(math.log(inverse_temperature))
        self.log_inverse_temperature = nn.Parameter(temperature, "inverse_temperature" in acts)
        self.gate, self.ranking_param = gate, int(ranking_param)
        self.lebesgue_p, self.normalization = lebesgue_p, normalization

    def update_layer(
        self,
        layer: nn.Module,
        old: dict[str, Tensor],
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        y: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """New parameters of one layer from its inputs x, as in LearningRule.

        Raises RuleError if fewer units compete than the rule ranks.
        """
        self.check_units(len(old["w"]))
        inputs, windows = x[0], layer.windows or ROWS
        weight = old["w"].flatten(1)
        currents = self._currents(layer, old, inputs)
        g = self.competition.gates(currents, 1)
        hebbian = torch.zeros_like(weight)
        windows.correlate_(hebbian, g, inputs)
        change, of_bias = scaled_changes(
            weight, old["b"], (hebbian, g.sum(0)), (g * currents).sum(0), self.normalization
        )
        rate = self.log_rate.exp()
        return old | {
            "w": old["w"] + rate * change.view_as(old["w"]),
            "b": old["b"] + rate * of_bias,
        }

    def check_units(self, units: int) -> None:
        """Raise RuleError if fewer units compete than the rule ranks."""
        try:
            self.competition.check(units)
        except CompetitionError as problem:
            raise RuleError(str(problem)) from problem

    @property
    def competition(self) -> Competition:
        """The gates, with the parameters' current values."""
        temperature = self.log_inverse_temperature.exp()
        return Competition(self.gate, self.ranking_param, self.delta, temperature)

    def _currents(self, layer: nn.Module, old: dict[str, Tensor], x: Tensor) -> Tensor:
        """f(W) x + f(b), [samples, units]."""
        power, bias = (signed_power(old[name], self.lebesgue_p) for name in ("w", "b"))
        if layer.windows is None:
            return nn.functional.linear(x, power, bias)
        return samples(layer.windows.convolve(x, power)) + bias

    def coefficients(self) -> dict[str, float]:
        """The rate, and the hyperparameters that the gate depends on, with their current values."""
        acting = {"w/rate": self.log_rate.exp().item()}
        if "delta" in ACTING[self.gate]:
            acting["w/delta"] = self.delta.item()
        if "inverse_temperature" in ACTING[self.gate]:
            acting["w/inverse_temperature"] = self.log_inverse_temperature.exp().item()
        return acting

    def formula(self, effects=None, *, latex: bool = False, max_terms: int | None = None) -> str:
        """The update and its hyperparameters as text or LaTeX.

        effects and max_terms are ignored, because the update is not a sum of separable terms.
        """
        acting = {n.split("/")[1]: f"{v:.4g}" for n, v in self.coefficients().items()}
        scale, gates = SCALES[self.normalization], GATE_FORMULAS[self.gate]
        rank = f", k = {self.ranking_param}" if self.gate == "ranked" else ""
        if latex:
            values = ", ".join(rf"{SYMBOLS[n]} = \text{{{v}}}" for n, v in acting.items())
            return (
                rf"&\Delta w_{{oi}} = \eta \, D_{{oi}} / {scale[1]}, \quad "
                "D_{oi} = \\sum_b g_{bo} (x_{bi} - c_{bo} w_{oi}) \\\\\n"
                r"&c_{bo} = \sum_i \operatorname{sign}(w_{oi}) |w_{oi}|^{p-1} x_{bi}, \quad "
                f"{gates[1]} \\\\\n"
                rf"&\text{{gate {self.gate}}}{rank}, p = {self.lebesgue_p:g}, {values}; \quad "
                r"b_o = w_{oi} \text{ of an input } x_{bi} = 1"
            )
        values = ", ".join(f"{n} {v}" for n, v in acting.items())
        return (
            f"Δw_oi = rate D_oi / {scale[0]},  D_oi = sum_b g_bo (x_bi - c_bo w_oi)\n"
            f"c_bo = sum_i sign(w_oi) |w_oi|^(p-1) x_bi;  b_o is the w_oi of an input x_bi = 1\n"
            f"{gates[0]}\n"
            f"gate {self.gate}{rank}, p = {self.lebesgue_p:g}; {values}"
        )

    def start_from(self, other: LearningRule) -> None:
        """Take over another rule's hyperparameters; raises RuleError unless its options agree."""
        if not isinstance(other, KrotovHopfieldRule) or other.options() != self.options():
            raise RuleError("the run's rule is not of competing units with the same gate, k and p")
        self.load_state_dict(other.state_dict())

    def options(self) -> dict:
        """The options that are not learned."""
        names = ("gate", "ranking_param", "lebesgue_p", "normalization")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict:
        """A description of the rule in plain values, for JSON; rules/families.py reads it."""
        numbers = {name: parameter.item() for name, parameter in self.named_parameters()}
        return {"kind": type(self).__name__, **self.options(), **numbers}

    @classmethod
    def from_dict(cls, description: dict) -> "KrotovHopfieldRule":
        """The rule that `to_dict` described, in float64."""
        names = ("gate", "ranking_param", "lebesgue_p", "normalization")
        rule = cls(1.0, **{name: description[name] for name in names}).double()
        with torch.no_grad():
            for name, parameter in rule.named_parameters():
                parameter.fill_(float(description[name]))
        return rule
