"""Symmetries of a network: what they imply for gradients, and how far updates deviate from that.

    translation   shifting all logits changes no softmax:     xi = 1 on the weights from one input
                  of the last layer to all classes; and 1 on all its biases, separately
    scale         batch norm cancels the size of its input:   xi = (w, b) of a neuron before it
    rescale       sigma(a z) = a sigma(z), a > 0 (ReLU, LeakyReLU, identity), so that incoming
                  weights may grow by the factor by which outgoing ones shrink:
                  xi = (w_in, b, -w_out) of a neuron

Moving theta along a unit's direction xi leaves the loss unchanged to first order. Hence <v, xi> = 0
for the gradient v at every theta, but not for the update v = theta_t - theta_{t+1} of every
optimiser. `deviations` are these inner products; `relative` ones are divided by |v| |xi|: cosines,
which can be compared across units. With batch norm's affine map, (gamma, beta) are the incoming
weights. Batch norm's eps breaks its symmetry a little: <g, xi> is about eps / variance of its
terms. The order of a network's layers suggests which symmetries it may have; a gradient at a random
point shows which of them it does have, whatever else its forward does. Source: Kunin et al. 2021,
Neural Mechanics (arXiv 2012.04728), table 1.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from learned_optimizer.errors import OptimizerError
from learned_optimizer.optimizees import Optimizee, Params
from learned_optimizer.seeds import seeded_generator
from learned_optimizer.settings import CONTROL, NORM

# sigma(a z) = a sigma(z) for a > 0, channel by channel
HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten, _DropoutNd,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
# Activations that break the rescale symmetry; nn.ReLU6 is a subclass of nn.Hardtanh
INHOMOGENEOUS = (
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign,
)  # fmt: skip
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

TOLERANCE = 1e-6  # the largest relative deviation of a symmetry that holds, in float64
ROUNDOFF = 1e-10  # times the norm of the whole gradient: smaller parts of it are noise
SMALL_EPS = 1e-12  # of batch norm, so that its eps isn't taken for a broken symmetry


@dataclass(frozen=True)
class Part:
    """A parameter's share in the directions xi of all units of a symmetry.

    Attributes:
        layer, name: where the parameter is in params.
        rows: maps the parameter to [units, numbers of each unit].
        sign: of the parameter in xi; None if xi is 1 there.
    """

    layer: int
    name: str
    rows: Callable[[Tensor], Tensor]
    sign: int | None = 1

    def of(self, v: Params, theta: Params) -> tuple[Tensor, Tensor]:
        """The parts of v and xi that belong to this parameter, both [units, numbers]."""
        part = self.rows(v[self.layer][self.name])
        if self.sign is None:
            return part, torch.ones_like(part)
        return part, self.sign * self.rows(theta[self.layer][self.name])


@dataclass(frozen=True)
class Symmetry:
    """One symmetry of the units at one place of a network.

    Attributes:
        kind: one of SYMMETRY_KINDS.
        place: the numbers of the layers among the optimizee's layers, such as "1-3".
        control: the network does not have this symmetry, because an activation between the layers,
            such as a sigmoid, breaks it.
    """

    kind: str
    place: str
    parts: tuple[Part, ...]
    control: bool = False

    @property
    def label(self) -> str:
        """The name under which deviations are recorded: the kind, or "<kind>_control"."""
        return f"{self.kind}{CONTROL}" if self.control else self.kind

    def deviations(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> of each unit, [units]."""
        return sum((part * xi).sum(1) for part, xi in self._pairs(v, theta))

    def relative(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> / (|v| |xi|) of each unit over its own parameters, [units]; 0 if v or xi is 0."""
        squares = self._squares(v, theta)
        scale = squares[0] * squares[1]
        still = scale == 0
        safe = torch.where(still, torch.ones_like(scale), scale)
        return self.deviations(v, theta) * ~still / safe.sqrt()

    def holds(self, v: Params, theta: Params) -> bool:
        """Whether all deviations of a float64 gradient v are roundoff."""
        whole = math.hypot(*(t.norm().item() for layer in v for t in layer.values()))
        part, xi = (squares.sqrt() for squares in self._squares(v, theta))
        allowed = (TOLERANCE * part + ROUNDOFF * whole) * xi
        return bool((self.deviations(v, theta).abs() <= allowed).all())

    def _squares(self, v: Params, theta: Params) -> list[Tensor]:
        """|v|^2 and |xi|^2 of each unit, both [units]."""
        sides = zip(*self._pairs(v, theta), strict=True)
        return [sum(t.square().sum(1) for t in side) for side in sides]

    def _pairs(self, v: Params, theta: Params) -> list[tuple[Tensor, Tensor]]:
        return [part.of(v, theta) for part in self.parts]


def find_symmetries(
    optimizee: Optimizee, batch: tuple[Tensor, Tensor], controls: bool = False
) -> list[Symmetry]:
    """All symmetries of the kinds above that an optimizee has.

    Candidates are found between layers that inputs pass one after the other, as in nn.Sequential;
    a layer of an unknown kind ends the search from the layers before it. A candidate is kept if it
    holds for the batch's gradient at a random point, for a copy of the network in float64, because
    operations between the layers or shared weights may break it.

    controls: also return rescale symmetries that an activation such as a sigmoid breaks; their
        deviations show what a broken symmetry looks like.
    """
    network = _with_small_eps(optimizee)
    batch = tuple(t.cpu().double() if t.is_floating_point() else t.cpu() for t in batch)
    params = _random_point(optimizee)
    with torch.no_grad():
        order = network.calls(batch[0], params)
    candidates = [
        *_between_layers(optimizee.layers, order, params),
        *_of_logits(optimizee.layers, order, params),
    ]
    v = network.unflat(network.gradients(network.flat(params)[None], [batch])[1][0])
    return [s for s in candidates if (controls if s.control else s.holds(v, params))]


def _with_small_eps(optimizee: Optimizee) -> Optimizee:
    """A copy in which the eps of batch norms is negligible."""
    network = copy.deepcopy(optimizee)
    for layer in network.layers:
        if isinstance(layer, _BatchNorm):
            layer.eps = SMALL_EPS
    return network


def _random_point(optimizee: Optimizee) -> Params:
    """Parameters in float64 without special values, such as 0, that could hide a dependence."""
    generator = seeded_generator(0)
    params = optimizee.initial(generator, torch.float64)
    options = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    noise = [torch.randn(n, **options) for n in optimizee.sizes()]
    return optimizee.unflat(optimizee.flat(params) + 0.1 * torch.cat(noise))


def _between_layers(
    layers: Sequence[nn.Module], order: Sequence[int], params: Params
) -> list[Symmetry]:
    """Scale and rescale symmetries, and controls, that layers used in this order may have."""
    symmetries = {}  # a dict, because a pair of layers may be used repeatedly
    # the last weighted or affine layer; whether a sigmoid or the like followed it
    source, control = None, False
    for number in order:
        layer = layers[number]
        if isinstance(layer, (_BatchNorm, *WEIGHTED)):
            if source is None:
                new = None
            elif isinstance(layer, WEIGHTED):
                new = _rescaling(layer, source, number, params, control)
            else:
                new = None if control else Symmetry("scale", str(source), _incoming(source, params))
            if new:
                symmetries[new.label, new.place] = new
            source, control = (number if _owns_its_weights(layer, params[number]) else None), False
        elif isinstance(layer, INHOMOGENEOUS):
            control = True
        elif not isinstance(layer, HOMOGENEOUS):
            source = None
    return list(symmetries.values())


def _of_logits(layers: Sequence[nn.Module], order: Sequence[int], params: Params) -> list[Symmetry]:
    """Translation symmetries, which a fully connected last layer has if a softmax follows."""
    last = next((n for n in reversed(order) if isinstance(layers[n], WEIGHTED)), None)
    if last is None or not isinstance(layers[last], nn.Linear):
        return []
    rows = {"weight": torch.t, "bias": _one_row}
    parts = [Part(last, name, rows[name], None) for name in rows if name in params[last]]
    return [Symmetry("translation", f"{last}.{part.name}", (part,)) for part in parts]


def _owns_its_weights(layer: nn.Module, params: dict[str, Tensor]) -> bool:
    """Whether weight and bias are this layer's in params; shared ones are an earlier layer's."""
    return "weight" in params and (getattr(layer, "bias", None) is None or "bias" in params)


def _incoming(number: int, params: Params) -> tuple[Part, ...]:
    """(w_in, b) of each unit of a layer, or (gamma, beta) of a batch norm."""
    return tuple(Part(number, n, _by_unit) for n in ("weight", "bias") if n in params[number])


def _rescaling(
    layer: nn.Module, source: int, number: int, params: Params, control: bool
) -> Symmetry | None:
    """Rescale symmetries between two layers' weights; None if they aren't known to match.

    source: the number of the layer whose units these are, with their incoming weights.
    number: of the layer with their outgoing weights.
    """
    if "weight" not in params[number]:
        return None
    units, groups = len(params[source]["weight"]), getattr(layer, "groups", 1)
    if units % groups or params[number]["weight"].shape[1] * groups % units:
        return None
    outgoing = Part(number, "weight", _ByInput(units, groups), -1)
    parts = (*_incoming(source, params), outgoing)
    return Symmetry("rescale", f"{source}-{number}", parts, control)


def _by_unit(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _one_row(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass(frozen=True)
class _ByInput:
    """Maps weights [out, units * positions / groups, ...] to [units, outgoing weights of each]."""

    units: int
    groups: int

    def __call__(self, tensor: Tensor) -> Tensor:
        by_group = tensor.reshape(
            self.groups, len(tensor) // self.groups, self.units // self.groups, -1
        )
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)


# ---- over a whole network ----


def mean_deviations(symmetries: Sequence[Symmetry], v: Params, theta: Params) -> dict[str, Tensor]:
    """For each label, the mean |relative deviation| over all units, a scalar tensor."""
    sizes: dict[str, list[Tensor]] = {}
    for symmetry in symmetries:
        sizes.setdefault(symmetry.label, []).append(symmetry.relative(v, theta).abs())
    return {label: torch.cat(parts).mean() for label, parts in sizes.items()}


def symmetry_penalty(
    optimizee: Optimizee,
    symmetries: Sequence[Symmetry],
    kinds: Sequence[str],
    beta: float,
    relative: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (theta, v) -> beta times the sum over units of |deviation|; theta and v are [n].

    Raises OptimizerError if the optimizee has no symmetry of one of these kinds.

    symmetries: the optimizee's; controls are ignored.
    kinds: of symmetries, or "norm": the sum over tensors of |v|, or of |v| / |theta| if relative.
    relative: take relative deviations.
    """
    held = [s for s in symmetries if not s.control]
    present = list(dict.fromkeys(s.kind for s in held))
    for kind in kinds:
        if kind not in (*present, NORM):
            raise OptimizerError(
                f"a penalty on {kind}: the optimizee has no {kind} symmetry; it has "
                f"{' and '.join(present) or 'none'}"
            )
    penalized = [s.relative if relative else s.deviations for s in held if s.kind in kinds]

    def penalty(theta: Tensor, v: Tensor) -> Tensor:
        at, update = optimizee.unflat(theta), optimizee.unflat(v)
        total = sum(deviations(update, at).abs().sum() for deviations in penalized)
        if NORM in kinds:
            total = total + _norms(update, at, relative)
        return beta * total

    return penalty


def _norms(v: Params, theta: Params, relative: bool) -> Tensor:
    """The sum over tensors of |v|, or if relative of |v| / |theta| (|v| for a theta of zeros)."""
    total = 0
    for of_v, of_theta in zip(v, theta, strict=True):
        for name, tensor in of_v.items():
            size = of_theta[name].norm() if relative else tensor.new_ones(())
            total = total + tensor.norm() / torch.where(size == 0, torch.ones_like(size), size)
    return total


# ---- statistics of gradients and updates over minibatches ----


def tail_index(samples: Tensor, block: int) -> float:
    """The tail index alpha of samples of a symmetric stable law: 2 if normal, 1 if Cauchy.

        1 / alpha = (mean log|Y| - mean log|X|) / log m,   Y sums of m consecutive X

    NaN if nothing is left after coordinates that are exactly 0 in any draw are left out, because X
    and Y would lose different shares of them. Raises OptimizerError if block < 2 or there are fewer
    samples than that. Source: Mohammadi et al. 2015, corollary 2.4; Simsekli et al. 2019 (arXiv
    1901.06053) for networks.

    samples: [draws, ...].
    block: m.
    """
    count = len(samples) // block
    if block < 2 or count < 1:
        raise OptimizerError(f"blocks of {block} need at least so many samples, got {len(samples)}")
    X = samples[: count * block, never_zero(samples)].double()
    Y = X.unflatten(0, (count, block)).sum(1)
    sizes = [t.abs().log().mean().item() for t in (Y, X)]
    difference = sizes[0] - sizes[1]
    return math.log(block) / difference if difference and math.isfinite(difference) else math.nan


def never_zero(samples: Tensor) -> Tensor:
    """For samples [draws, ...], a mask [...] of the coordinates that are exactly 0 in no draw."""
    return (samples != 0).all(0)


def covariance_size(samples: Tensor) -> tuple[float, float]:
    """Trace and largest eigenvalue of the covariance of samples [draws, n], over draws - 1.

    They are computed from the Gram matrix [draws, draws], which has the same nonzero eigenvalues;
    NaN if it is not finite.
    """
    centred = samples.double() - samples.double().mean(0)
    gram = centred @ centred.T / (len(samples) - 1)
    if not gram.isfinite().all():
        return math.nan, math.nan
    return gram.trace().item(), torch.linalg.eigvalsh(gram)[-1].item()
