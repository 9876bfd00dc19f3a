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
symmetry a little: <g, xi> is about eps / variance of its terms. Source: Kunin et al. 2021, Neural
Mechanics (arXiv 2012.04728), table 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from models_fully_local import Params
from optimizees import Optimizee

KINDS = ("translation", "scale", "rescale")

# sigma(a z) = a sigma(z) for a > 0, channel by channel
HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
# Not so: what the rescale identity must not hold for
INHOMOGENEOUS = (nn.Sigmoid, nn.Tanh, nn.Softplus, nn.ELU, nn.GELU, nn.SiLU)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    """One symmetry of the units at one place of a network; kind is one of KINDS.

    place: the layers, by their numbers among the optimizee's layers, such as "1-3".
    """

    kind: str
    place: str
    parts: tuple[Part, ...]

    def deviations(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> of each unit, [units]."""
        return sum((own * xi).sum(1) for own, xi in self._pairs(v, theta))

    def relative(self, v: Params, theta: Params) -> Tensor:
        """<v, xi> / (|v| |xi|) of each unit, over its own parameters; 0 where v is."""
        pairs = self._pairs(v, theta)
        squares = [sum(t.square().sum(1) for t in side) for side in zip(*pairs, strict=True)]
        product = sum((own * xi).sum(1) for own, xi in pairs)
        scale = squares[0] * squares[1]
        still = scale == 0
        return product * ~still / torch.where(still, torch.ones_like(scale), scale).sqrt()

    def _pairs(self, v: Params, theta: Params) -> list[tuple[Tensor, Tensor]]:
        return [part.of(v, theta) for part in self.parts]


def find_symmetries(optimizee: Optimizee, controls: bool = False) -> list[Symmetry]:
    """All of the symmetries above that the sequence of the optimizee's layers has.

    The layers must be used one after the other, as in nn.Sequential; a layer of another kind ends
    what is known. Translation needs the cross-entropy of a last fully connected layer. With
    controls, rescaling is also taken for a symmetry where the activation, such as a sigmoid, has
    none: its deviations show what a broken one looks like.
    """
    passing = (*HOMOGENEOUS, *INHOMOGENEOUS) if controls else HOMOGENEOUS
    found, source = [], None  # the last weighted or affine layer with only homogeneous ones since
    for number, layer in enumerate(optimizee.layers):
        if isinstance(layer, _BatchNorm):
            if source is not None and isinstance(optimizee.layers[source], WEIGHTED):
                parts = _incoming(optimizee.layers, source)
                found.append(Symmetry("scale", str(source), parts))
            source = number if layer.affine else None
        elif isinstance(layer, WEIGHTED):
            parts = _outgoing(optimizee.layers, source, number)
            if parts:
                whole = (*_incoming(optimizee.layers, source), *parts)
                found.append(Symmetry("rescale", f"{source}-{number}", whole))
            source = number
        elif not isinstance(layer, passing):
            source = None
    last = len(optimizee.layers) - 1
    if isinstance(optimizee.layers[last], nn.Linear) and optimizee.loss_of is cross_entropy:
        parts = [Part(last, "weight", torch.t, None)]
        if optimizee.layers[last].bias is not None:
            parts.append(Part(last, "bias", _one_row, None))
        found += [Symmetry("translation", f"{last}.{part.name}", (part,)) for part in parts]
    return found


def _incoming(layers: Sequence[nn.Module], number: int) -> tuple[Part, ...]:
    """(w_in, b) of each unit of a layer, or (gamma, beta)."""
    parts = [Part(number, "weight", _by_unit)]
    if getattr(layers[number], "bias", None) is not None:
        parts.append(Part(number, "bias", _by_unit))
    return tuple(parts)


def _outgoing(layers: Sequence[nn.Module], source: int | None, number: int) -> tuple[Part, ...]:
    """-w_out of each unit of the layer `source` in the layer `number`; () where none is known."""
    if source is None or getattr(layers[number], "groups", 1) != 1:
        return ()
    units, inputs = len(layers[source].weight), layers[number].weight.shape[1]
    if inputs % units:
        return ()
    return (Part(number, "weight", _ByInput(units), -1),)


def _by_unit(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _one_row(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass(frozen=True)
class _ByInput:
    """Weights [out, units * positions, ...] as [units, all that leaves each]."""

    units: int

    def __call__(self, tensor: Tensor) -> Tensor:
        out = len(tensor)
        return tensor.reshape(out, self.units, -1).transpose(0, 1).flatten(1)


# ---- over a whole network ----


def mean_deviations(
    symmetries: Sequence[Symmetry], v: Params, theta: Params, relative: bool = True
) -> dict[str, Tensor]:
    """Mean |deviation| over all units of each kind that the network has, scalar tensors."""
    sizes: dict[str, list[Tensor]] = {}
    for symmetry in symmetries:
        of = symmetry.relative if relative else symmetry.deviations
        sizes.setdefault(symmetry.kind, []).append(of(v, theta).abs())
    return {kind: torch.cat(parts).mean() for kind, parts in sizes.items()}


def symmetry_penalty(
    optimizee: Optimizee, kinds: Sequence[str], beta: float, relative: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """(theta, v) [n] -> beta times the sum over units of |deviation| (or of the relative one)."""
    symmetries = [s for s in find_symmetries(optimizee) if s.kind in kinds]

    def penalty(theta: Tensor, v: Tensor) -> Tensor:
        at, update = optimizee.unflat(theta), optimizee.unflat(v)
        of = [s.relative if relative else s.deviations for s in symmetries]
        return beta * sum(deviations(update, at).abs().sum() for deviations in of)

    return penalty


# ---- statistics of gradients and updates over minibatches ----


def tail_index(samples: Tensor, block: int) -> float:
    """alpha of samples [draws, ...] of a symmetric stable law, 2 for normal ones, 1 for Cauchy's.

        1 / alpha = (mean log|Y| - mean log|X|) / log m,   Y sums of m consecutive X

    block: m >= 2. Numbers that are exactly 0 are left out. NaN where nothing is left. Source:
    Mohammadi et al. 2015, corollary 2.4; Simsekli et al. 2019 (arXiv 1901.06053) for networks.
    """
    count = len(samples) // block
    if block < 2 or count < 1:
        raise ValueError(f"blocks of {block} need at least so many samples, got {len(samples)}")
    X = samples[: count * block].double()
    Y = X.unflatten(0, (count, block)).sum(1)
    sizes = [t[t != 0].abs().log().mean().item() for t in (Y, X)]
    difference = sizes[0] - sizes[1]
    return math.log(block) / difference if difference else math.nan


def covariance_size(samples: Tensor) -> tuple[float, float]:
    """Trace and largest eigenvalue of the covariance of samples [draws, n], over draws - 1.

    From the Gram matrix [draws, draws], which has the same eigenvalues apart from zeros.
    """
    centred = samples.double() - samples.double().mean(0)
    gram = centred @ centred.T / (len(samples) - 1)
    return gram.trace().item(), torch.linalg.eigvalsh(gram)[-1].item()
