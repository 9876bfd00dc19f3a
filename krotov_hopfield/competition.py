"""Competition between hidden units: which units learn from a sample, and how weights change.

    c_bo = sum_i sign(W_oi) |W_oi|^(p-1) x_bi                      currents
    g_b  = gates of the currents of sample b                       how much each unit learns
    D    = g^T x - s[:, None] * W,   s_o = sum_b g_bo c_bo
    W   <- W + rate * D / (largest |D|)

A unit at rest (D_o = 0) with s_o != 0 has sum_i |W_oi|^p = 1: since c_bo = sum_i f(W_oi) x_bi, with
f(W) = sign(W) |W|^(p-1), sum_i f(W_oi) D_oi = s_o (1 - sum_i |W_oi|^p). All functions here are
differentiable. Of equal currents, the one with the lowest index counts as the largest.

Source: Krotov, Hopfield 2019, Unsupervised learning by competing hidden units (equations 3, 9, 10);
the soft gate: Moraitis et al. 2022, SoftHebb, with the signs of Journe et al. 2023.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from krotov_hopfield.choices import GATES, NORMALIZATIONS
from krotov_hopfield.errors import CompetitionError

EPSILON, PRECISION = 1e-5, 1e-30  # see `scales`


@dataclass(frozen=True)
class Competition:
    """How much each unit learns from a sample: the gates g, computed from all units' currents.

    Attributes:
        gate: "ranked": 1 for the largest current, -delta for the k-th largest, 0 for the others;
            "losers": 1 for the largest, -delta for all others;
            "soft": softmax of inverse_temperature times the currents, negated for all but the
            largest; "winner": 1 for the largest, 0 for the others.
        ranking_param: k, from 2 to the number of units.
        delta, inverse_temperature: finite numbers, inverse_temperature above 0; or scalar tensors,
            for differentiation, whose values are not checked.
    """

    gate: str = "ranked"
    ranking_param: int = 2
    delta: float | Tensor = 0.05
    inverse_temperature: float | Tensor = 1.0

    def check(self, units: int | None = None) -> None:
        """Raises CompetitionError if an option is unknown or out of its range.

        units: the number of competing units, which limits ranking_param; None: no limit.
        """
        if self.gate not in GATES:
            raise CompetitionError(f"gate {self.gate!r} is unknown; choose from {', '.join(GATES)}")
        k = self.ranking_param
        whole, limit = isinstance(k, Integral), math.inf if units is None else units
        if not whole or (self.gate == "ranked" and not 2 <= k <= limit):
            most = "" if units is None else f", to {units}, the number of units that compete"
            raise CompetitionError(
                f"ranking_param is {k}: it must be a whole number from 2, the runner-up{most}"
            )
        check_number("delta", self.delta)
        check_number("inverse_temperature", self.inverse_temperature, above=0)

    @property
    def sparse(self) -> bool:
        """Whether at most two units learn from each sample."""
        return self.gate in ("ranked", "winner")

    def gates(self, currents: Tensor, dim: int) -> Tensor:
        """The gates g, of the shape of the currents, whose dimension `dim` is that of the units."""
        winner, other = ranked(currents, self.ranking_param if self.gate == "ranked" else 1, dim)
        if self.gate == "soft":
            share = torch.softmax(self.inverse_temperature * currents, dim)
            sign = torch.full_like(share, -1).scatter_(dim, winner, 1)
            return share * sign
        if self.gate == "winner":
            return torch.zeros_like(currents).scatter_(dim, winner, 1)
        delta = self.delta * currents.new_ones(())  # on the device, without a copy to it
        if self.gate == "losers":
            return (-delta).expand_as(currents).scatter(dim, winner, 1)
        g = torch.zeros_like(currents).scatter_(dim, winner, 1)
        if currents.device.type != "cpu":  # where scattering a tensor may copy from the host
            return g - delta * torch.zeros_like(currents).scatter_(dim, other, 1)
        return g.scatter(dim, other, (-delta).expand_as(other))


def ranked(currents: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Indices of the largest and the k-th largest current: int64, of length 1 along `dim`."""
    left = currents.detach()
    winner = index = left.argmax(dim, keepdim=True)
    if k > 1:
        left = left.clone()
    for _ in range(k - 1):
        left.scatter_(dim, index, -torch.inf)
        index = left.argmax(dim, keepdim=True)
    return winner, index


def signed_power(weight: Tensor, p: float) -> Tensor:
    """sign(W) |W|^(p-1), which for p = 2 is W itself."""
    if p == 2:
        return weight
    if p == int(p) and 2 < p < 2**63:
        return weight * weight.abs() ** (int(p) - 2)
    return weight.sign() * weight.abs() ** (p - 1)


def p_norms(weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """sum_i |W_oi|^p for each unit [O]; a bias counts as one more weight of its unit."""
    sums = (weight.abs() ** p).flatten(1).sum(1)
    return sums if bias is None else sums + bias.abs() ** p


def convergence(norms: Tensor) -> Tensor:
    """How far the units are from rest: the largest |sum_i |W_oi|^p - 1|, a scalar tensor.

    norms: the sums of `p_norms` [O].
    """
    return (norms - 1).abs().amax()


def scales(largest: Tensor, normalization: str) -> Tensor:
    """The numbers [O] to divide the units' changes by.

    largest: the largest |D_oi| of each unit [O].
    normalization: "matrix": the largest of all units + 1e-5; "filter": each unit's own + 1e-5;
        "clamp": the largest of all units, but at least 1e-30.
    """
    if normalization == "filter":
        return largest + EPSILON
    if normalization == "matrix":
        return (largest.amax() + EPSILON).expand_as(largest)
    return largest.amax().clamp_min(PRECISION).expand_as(largest)


def scaled_changes(
    weight: Tensor,
    bias: Tensor | None,
    hebbian: tuple[Tensor, Tensor | None],
    pull: Tensor,
    normalization: str,
) -> tuple[Tensor, Tensor | None]:
    """D / scale for the weights [O, ...] and the biases [O].

    hebbian: g^T x, of the shape of the weights, and sum_b g_b [O] (None without biases).
    pull: s [O].
    """
    change = hebbian[0] - pull.view(-1, *[1] * (weight.dim() - 1)) * weight
    largest = change.abs().flatten(1).amax(1)
    change_of_bias = None
    if bias is not None:
        change_of_bias = hebbian[1] - pull * bias
        largest = torch.maximum(largest, change_of_bias.abs())
    scale = scales(largest, normalization)
    change = change / scale.view(-1, *[1] * (weight.dim() - 1))
    return change, None if change_of_bias is None else change_of_bias / scale


def check_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf
) -> None:
    """Raises CompetitionError if the value is not a finite number within these bounds.

    Tensors are not checked, because reading their values would wait for their device.
    """
    if isinstance(value, Tensor):
        return
    number = isinstance(value, Real) and math.isfinite(value)
    if not number or value < least or value <= above:
        bound = f" of at least {least:g}" if least > -math.inf else ""
        bound += f" above {above:g}" if above > -math.inf else ""
        raise CompetitionError(f"{name} is {value}: it must be a finite number{bound}")


def check_options(
    lebesgue_p: float, normalization: str, rate_exponent: float | None = None
) -> None:
    """Raises CompetitionError if p < 1, the exponent is below 0, or normalization is unknown."""
    check_number("lebesgue_p", lebesgue_p, least=1)
    if rate_exponent is not None:
        check_number("rate_exponent", rate_exponent, least=0)
    if normalization not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise CompetitionError(f"normalization {normalization!r} is unknown; choose from {known}")
