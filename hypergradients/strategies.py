"""Hypergradients without derivatives: losses at randomly perturbed hyperparameters.

    g = 1 / (2 sigma^2 N) sum_i xi_i (E(w_i+) - E(w_i-)),   e_i ~ N(0, sigma^2 I)
    w_i+, w_i- from updates under lambda + e_i, lambda - e_i

In antithetic evolution strategies xi_i = e_i: g estimates the gradient of E smoothed with width
sigma. In persistent ones (Vicol, Metz, Sohl-Dickstein 2021, arXiv 2112.13835) each pair continues
from the end of its last unroll, and xi_i is the sum of its e_i so far: unrolls can be arbitrarily
short without truncation bias. Update maps need not be differentiable. Arguments are those of
methods.py.

Both trajectories of a pair see the same random numbers from torch's global generators, so that
their losses differ by the perturbation alone, and neither leaves traces in the buffers of modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergradients.errors import HypergradientError
from hypergradients.replays import Moment, buffers_kept
from hypergradients.update_maps import OuterLoss, Point, Tree, UpdateMap, advance

SMALLEST_SIGMA, LARGEST_SIGMA = 1e-30, 1e30  # differences of losses are divided by it, once


@dataclass(frozen=True)
class Pairs:
    """The state of the two trajectories of each pair, and the sum of its perturbations so far.

    Attributes:
        above, below: params under +e and -e, one tree for each pair.
        perturbations: for each pair, one tensor per hyperparameter.
    """

    above: list[Tree]
    below: list[Tree]
    perturbations: list[list[Tensor]]

    @classmethod
    def start(cls, params: Tree, hparams: Tree, pairs: int) -> "Pairs":
        """All pairs at the same params and unperturbed, as every trajectory starts.

        Raises HypergradientError if pairs < 1.
        """
        if pairs < 1:
            raise HypergradientError(f"pairs must be at least 1, got {pairs}")
        zeros = [torch.zeros_like(h) for h in Point(params, hparams).hparams]
        return cls([params] * pairs, [params] * pairs, [zeros] * pairs)


def evolution_strategies(
    params: Tree,
    hparams: Tree,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    sigma: float,
    pairs: int,
    generator: torch.Generator,
    set_grad: bool = True,
) -> Tree:
    """Antithetic evolution strategies: 2 * pairs trajectories from w_0.

    params: w_0, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, likewise, each with requires_grad, none given twice.
    update_maps: Phi_0, ..., Phi_{T-1}, at least one, each (params, hparams) -> params of the same
        shapes; they need not be differentiable.
    outer_loss: (params, hparams) -> scalar.
    sigma: standard deviation of the perturbations, from 1e-30 to 1e30.
    pairs: the number of perturbations, each of which is used with both signs.
    generator: draws the perturbations.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. Its standard deviation grows with the number of hyperparameters and
    falls as 1 / sqrt(pairs). Raises HypergradientError for invalid arguments.
    """
    start = Pairs.start(params, hparams, pairs)
    return persistent_evolution_strategies(
        start, hparams, update_maps, outer_loss, sigma, generator, set_grad
    )[0]


def persistent_evolution_strategies(
    pairs: Pairs,
    hparams: Tree,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    sigma: float,
    generator: torch.Generator,
    set_grad: bool = True,
) -> tuple[Tree, Pairs]:
    """One unroll of every pair: its part of the hypergradient, and the pairs after it.

    The parts of a trajectory's unrolls add up to the gradient of the sum of their outer losses.
    Raises HypergradientError for invalid arguments.

    pairs: the state of the trajectories, which is Pairs.start(...) at first.
    update_maps: those of this unroll. The other arguments are those of `evolution_strategies`.
    """
    if not SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
        raise HypergradientError(
            f"sigma must be from {SMALLEST_SIGMA:g} to {LARGEST_SIGMA:g}, got {sigma:g}"
        )
    if not update_maps:
        raise HypergradientError("update_maps must not be empty")
    point = Point(pairs.above[0], hparams)
    total = [torch.zeros_like(h) for h in point.hparams]
    above, below, sums = [], [], []
    for start_above, start_below, before in zip(
        pairs.above, pairs.below, pairs.perturbations, strict=True
    ):
        noise = [_normal(h, sigma, generator) for h in point.hparams]
        sums.append(torch._foreach_add(before, noise))
        ends, losses, moment = [], [], Moment(point.params)
        for start, sign, same in (
            (start_above, 1, buffers_kept()), (start_below, -1, moment.repeated()),
        ):  # fmt: skip
            shifted = torch._foreach_add([h.detach() for h in point.hparams], noise, alpha=sign)
            moved = point.hparams_tree([h.requires_grad_() for h in shifted])
            with same:
                ends.append(advance(start, moved, update_maps))
                with torch.no_grad():
                    losses.append(float(outer_loss(ends[-1], moved)))
        above.append(ends[0])
        below.append(ends[1])
        total = torch._foreach_add(total, sums[-1], alpha=losses[0] - losses[1])
    gradient = torch._foreach_div(total, 2 * sigma**2 * len(sums))
    return point.delivered(gradient, set_grad), Pairs(above, below, sums)


def _normal(like: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return sigma * noise.to(like.device)
