"""What symmetries of a network demand of its gradients, and how far an update departs from it.

    translation   shifting all logits changes no softmax:     xi = 1 on the weights from one input
                  of the last layer to all classes; and 1 on all its biases, apart
    scale         batch norm undoes the size of its input:    xi = (w, b) of a neuron before it
    rescale       sigma(a z) = a sigma(z), a > 0 (ReLU, LeakyReLU, identity), so that what comes in
                  may grow by as much as what goes out shrinks: xi = (w_in, b, -w_out) of a neuron

Each unit's direction xi at theta leaves the loss as it is, to first order: <v, xi> = 0 for v the
gradient, at all theta, though not for every optimiser's v = theta_t - theta_{t+1}. `deviations` are
these inner products, `relative` ones are divided by |v| |xi|: cosines, on one scale for all. With
batch norm's affine map, (gamma, beta) are the incoming weights. Batch norm's eps breaks its
symmetry a little: <g, xi> is about eps / variance of its terms. The order of a network's layers
suggests what symmetries it may have; a gradient at a random point tells which of them it does
have, whatever else its forward does. Source: Kunin et al. 2021, Neural Mechanics
(arXiv 2012.04728), table 1.
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
# Not so: what the rescale identity must not hold for; nn.ReLU6 is an nn.Hardtanh
INHOMOGENEOUS = (
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign,
)  # fmt: skip
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

TOLERANCE = 1e-6  # of the relative deviation of a symmetry that holds, in float64
ROUNDOFF = 1e-10  # of the norm of the whole gradient: smaller parts of it tell nothing
SMALL_EPS = 1e-12  # of batch norm, lest its own departure be taken for a broken symmetry


@dataclass(frozen=True)
class Part:
    """A parameter's share in the directions xi of all units of a symmetry.

    rows: the parameter as [units, numbers of each]. sign: of the parameter in xi; None: xi is 1.
    """

    layer: int
    name: str
    rows: Callable[[Tensor], Tensor]
    sign: int | None = 1

    def of(self, v: Params, theta: Params) -> tuple[Tensor, Tensor]:
        """v and xi, both [units, numbers]."""
        part = self.rows(v[self.layer][self.name])
        if self.sign is None:
            return part, torch.ones_like(part)
        return part, self.sign * self.rows(theta[self.layer][self.name])


@dataclass(frozen=True)
class Symmetry:
    """One symmetry of the units at one place of a network; kind is one of SYMMETRY_KINDS.

    place: the layers, by their numbers among the optimizee's layers, such as "1-3". control: the
    network does not have it, since an activation between them, such as a sigmoid, breaks it.
    """

    kind: str
    place: str
    parts: tuple[Part, ...]
    control: bool = False

    @property
    def label(self) -> str:
        """What its deviations are recorded under: the kind, or "<kind>_control"."""
        return f"{self.kind}{CONTROL}" if self.control else self.kind

    def deviations(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> of each unit, [units]."""
        return sum((part * xi).sum(1) for part, xi in self._pairs(v, theta))

    def relative(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> / (|v| |xi|) of each unit, over its own parameters; 0 where v is."""
        squares = self._squares(v, theta)
        scale = squares[0] * squares[1]
        still = scale == 0
        safe = torch.where(still, torch.ones_like(scale), scale)
        return self.deviations(v, theta) * ~still / safe.sqrt()

    def holds(self, v: Params, theta: Params) -> bool:
        """Whether all deviations of a gradient v in float64 are roundoff."""
        whole = math.hypot(*(t.norm().item() for layer in v for t in layer.values()))
        part, xi = (squares.sqrt() for squares in self._squares(v, theta))
        allowed = (TOLERANCE * part + ROUNDOFF * whole) * xi
        return bool((self.deviations(v, theta).abs() <= allowed).all())

    def _squares(self, v: Params, theta: Params) -> list[Tensor]:
        """|v|^2 and |xi|^2 of each unit, [units] both."""
        sides = zip(*self._pairs(v, theta), strict=True)
        return [sum(t.square().sum(1) for t in side) for side in sides]

    def _pairs(self, v: Params, theta: Params) -> list[tuple[Tensor, Tensor]]:
        return [part.of(v, theta) for part in self.parts]


def find_symmetries(
    optimizee: Optimizee, batch: tuple[Tensor, Tensor], controls: bool = False
) -> list[Symmetry]:
    """All of the symmetries above that an optimizee has.

    Those looked for are between layers that inputs pass one after the other, as in nn.Sequential,
    each as often as it is used; a layer of another kind ends what is known. Each is kept if it
    holds for the gradient of the batch at a random point, of a copy of the network in float64:
    what forward does besides calling layers, and weights that layers share, may break it. With
    controls, rescaling is also told where the activation, such as a sigmoid, breaks it: its
    deviations show what a broken one looks like.
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
    """A copy whose batch norms are all but exact."""
    network = copy.deepcopy(optimizee)
    for layer in network.layers:
        if isinstance(layer, _BatchNorm):
            layer.eps = SMALL_EPS
    return network


def _random_point(optimizee: Optimizee) -> Params:
    """Parameters in float64, none of which is at a value, such as 0, that hides something."""
    generator = seeded_generator(0)
    params = optimizee.initial(generator, torch.float64)
    options = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    noise = [torch.randn(n, **options) for n in optimizee.sizes()]
    return optimizee.unflat(optimizee.flat(params) + 0.1 * torch.cat(noise))


def _between_layers(
    layers: Sequence[nn.Module], order: Sequence[int], params: Params
) -> list[Symmetry]:
    """Scale and rescale symmetries, and controls, that layers used in this order may have."""
    symmetries = {}  # a pair of layers may be used repeatedly
    source, control = None, False  # the last weighted or affine layer; whether sigmoids came since
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
    """Translations, which the last layer has if it is fully connected and a softmax follows."""
    last = next((n for n in reversed(order) if isinstance(layers[n], WEIGHTED)), None)
    if last is None or not isinstance(layers[last], nn.Linear):
        return []
    rows = {"weight": torch.t, "bias": _one_row}
    parts = [Part(last, name, rows[name], None) for name in rows if name in params[last]]
    return [Symmetry("translation", f"{last}.{part.name}", (part,)) for part in parts]


def _owns_its_weights(layer: nn.Module, params: dict[str, Tensor]) -> bool:
    """Whether weight and bias are parameters of this layer; an earlier one may own what is tied."""
    return "weight" in params and (getattr(layer, "bias", None) is None or "bias" in params)


def _incoming(number: int, params: Params) -> tuple[Part, ...]:
    """(w_in, b) of each unit of a layer, or (gamma, beta)."""
    return tuple(Part(number, n, _by_unit) for n in ("weight", "bias") if n in params[number])


def _rescaling(
    layer: nn.Module, source: int, number: int, params: Params, control: bool
) -> Symmetry | None:
    """Of each unit of the layer `source`, with -w_out in the layer `number`; None if unknown."""
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
    """Weights [out, units * positions / groups, ...] as [units, all that leaves each]."""

    units: int
    groups: int

    def __call__(self, tensor: Tensor) -> Tensor:
        by_group = tensor.reshape(
            self.groups, len(tensor) // self.groups, self.units // self.groups, -1
        )
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)


# ---- over a whole network ----


def mean_deviations(symmetries: Sequence[Symmetry], v: Params, theta: Params) -> dict[str, Tensor]:
    """Mean relative |deviation| over all units of each label that occurs, scalar tensors."""
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
    """(theta, v) [n] -> beta times the sum over units of |deviation| (or of the relative one).

    kinds: of symmetries, and "norm": the sum over tensors of |v|, or of |v| / |theta|.
    symmetries: the optimizee's, whose controls are left out. Raises OptimizerError where it has
    none of one of these kinds.
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
    """The sum over tensors of |v|, or of |v| / |theta|; a tensor of zeros has |v|."""
    total = 0
    for of_v, of_theta in zip(v, theta, strict=True):
        for name, tensor in of_v.items():
            size = of_theta[name].norm() if relative else tensor.new_ones(())
            total = total + tensor.norm() / torch.where(size == 0, torch.ones_like(size), size)
    return total


# ---- statistics of gradients and updates over minibatches ----


def tail_index(samples: Tensor, block: int) -> float:
    """alpha of samples [draws, ...] of a symmetric stable law, 2 for normal ones, 1 for Cauchy's.

        1 / alpha = (mean log|Y| - mean log|X|) / log m,   Y sums of m consecutive X

    block: m >= 2. Coordinates that are exactly 0 in any draw are left out: X and Y would lose
    different shares of them. NaN where nothing is left. Source: Mohammadi et al. 2015, corollary
    2.4; Simsekli et al. 2019 (arXiv 1901.06053) for networks.
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
    """Which coordinates of samples [draws, ...] are exactly 0 in no draw, [...]."""
    return (samples != 0).all(0)


def covariance_size(samples: Tensor) -> tuple[float, float]:
    """Trace and largest eigenvalue of the covariance of samples [draws, n], over draws - 1.

    From the Gram matrix [draws, draws], which has the same eigenvalues apart from zeros. NaN where
    that is not finite.
    """
    centred = samples.double() - samples.double().mean(0)
    gram = centred @ centred.T / (len(samples) - 1)
    if not gram.isfinite().all():
        return math.nan, math.nan
    return gram.trace().item(), torch.linalg.eigvalsh(gram)[-1].item()
