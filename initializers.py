"""Trainable initial distributions of a model's parameters.

    w = W (mu_w + sd_w N(0,1)) / sqrt(fan_in);   b = S (mu_b + sd_b N(0,1));   m likewise

The fixed scalers W = 1000, S = 100 act like larger learning rates for these few numbers. For rules
whose learned numbers are logarithms, there is a spread that stays positive:

    w = exp(log spread_0 + 0.3 u) N(0,1) / sqrt(fan_in);   b = 0;   m = 0
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from models_fully_local import Params, has_weights

SCALERS = {"w": 1000.0, "b": 100.0, "m": 100.0}
STRIDE = 0.3  # a number is its start times exp(STRIDE u), so that one learning rate suits all
CPU = {"dtype": torch.float64, "device": "cpu"}  # for random draws, whatever the default device
TRAINABLE, FIXED, ABSENT = "trainable", "fixed", "absent"


class GaussianInitializer(nn.Module):
    """Draws every layer's parameters from Gaussians whose means and spreads may be trained.

    The nn.Parameters are mean_w, spread_w, ... and hold the numbers mu and sd of the formula. A
    mean starts at 0, a spread at 1 / scaler, so that its effective value is 1. Raises ValueError
    for unknown names and modes.

    means, spreads: "trainable", "fixed" or "absent" (0) for each of "w", "b", "m"; by default
        absent.
    scalers: the factors of "w", "b", "m"; by default W for w and S for b and m.
    """

    def __init__(
        self,
        means: Mapping[str, str],
        spreads: Mapping[str, str],
        scalers: Mapping[str, float] = SCALERS,
    ) -> None:
        super().__init__()
        self.scalers = {**SCALERS, **scalers}
        for kind, modes in (("mean", means), ("spread", spreads)):
            if unknown := set(modes) - set(SCALERS):
                raise ValueError(
                    f"{kind} of {sorted(unknown)}: parameters are {', '.join(SCALERS)}"
                )
            for name, scaler in self.scalers.items():
                mode = modes.get(name, ABSENT)
                if mode not in (TRAINABLE, FIXED, ABSENT):
                    raise ValueError(f"{kind} of {name} is {mode!r}; use trainable, fixed, absent")
                if mode != ABSENT:
                    start = torch.tensor(0.0 if kind == "mean" else 1.0 / scaler)
                    trainable = mode == TRAINABLE
                    self.register_parameter(f"{kind}_{name}", nn.Parameter(start, trainable))

    @classmethod
    def with_values(cls, effective: Mapping[str, float]) -> "GaussianInitializer":
        """An initializer with these fixed means and spreads, named as in `effective`.

        The numbers are kept in float64, so that `.to(torch.float32)` restores those of a float32
        initializer to the last bit. Raises ValueError for a name that is not "mean_" or "spread_"
        followed by w, b or m.
        """
        modes: dict[str, dict[str, str]] = {"mean": {}, "spread": {}}
        for name in effective:
            kind, _, parameter = name.partition("_")
            if kind not in modes:
                raise ValueError(f"{name!r} is no number of an initializer; use mean_w, spread_w")
            modes[kind][parameter] = FIXED
        initializer = cls(modes["mean"], modes["spread"]).double()
        initializer.set_values(effective)
        return initializer

    def set_values(self, effective: Mapping[str, float]) -> None:
        """Set every mean and spread that is not absent to its value in `effective`.

        Raises KeyError if one is missing.
        """
        with torch.no_grad():
            for name, number in self.named_parameters():
                number.fill_(effective[name] / self.scalers[name[-1]])

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """Draw a dict of tensors per layer, of the shapes of its `parameter_shapes`.

        The noise is drawn in float64 with a CPU generator, so that draws are the same for every
        device and dtype.
        """
        params = []
        for layer in model.layers:
            drawn = {
                name: self._draw(name, shape, generator)
                for name, shape in layer.parameter_shapes().items()
            }
            if "m" in drawn:
                drawn["m"] = layer.constrain(drawn["m"])
            params.append(drawn)
        return params

    def _draw(self, name: str, shape: tuple[int, ...], generator) -> Tensor:
        scale = self.scalers[name]
        if name == "w":
            scale /= math.sqrt(math.prod(shape[1:]))
        mean, spread = getattr(self, f"mean_{name}", None), getattr(self, f"spread_{name}", None)
        like = next(self.parameters(), torch.zeros(()))
        values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if spread is not None:
            noise = torch.randn(shape, generator=generator, **CPU)
            values = values + spread * noise.to(values)
        if mean is not None:
            values = values + mean
        return scale * values

    def effective(self) -> dict[str, float]:
        """Each mean and spread times its scaler (for w, before the division by sqrt(fan_in))."""
        return {n: p.item() * self.scalers[n[-1]] for n, p in self.named_parameters()}


class SpreadInitializer(nn.Module):
    """Draws weights around 0 with one spread; biases and lateral weights are 0.

    Raises ValueError for a spread that is not positive and finite.

    Attributes:
        start: the initial spread of w, before the division by sqrt(fan_in).
        moved: u of the formula, an nn.Parameter that starts at 0; no gradient if it is fixed.
    """

    def __init__(self, spread: float = 0.167, *, trainable: bool = True) -> None:
        super().__init__()
        if not 0 < spread < math.inf:
            raise ValueError(f"the spread of w must be > 0 and finite: {spread}")
        self.start = float(spread)
        self.moved = nn.Parameter(torch.zeros(()), trainable)

    @classmethod
    def with_values(cls, effective: Mapping[str, float]) -> "SpreadInitializer":
        """An initializer with the fixed spread of `effective`, in float64."""
        return cls(effective["spread_w"], trainable=False).double()

    def set_values(self, effective: Mapping[str, float]) -> None:
        """Set the spread to that of `effective`, as the initial one."""
        self.start = float(effective["spread_w"])
        with torch.no_grad():
            self.moved.zero_()

    def get_extra_state(self) -> float:
        """The initial spread, which belongs to the state but is not a tensor."""
        return self.start

    def set_extra_state(self, state: float) -> None:
        """Restore what `get_extra_state` returned."""
        self.start = float(state)

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """Draw a dict of tensors per layer, of the shapes of its `parameter_shapes`.

        The noise is drawn in float64 with a CPU generator, so that draws are the same for every
        device and dtype.
        """
        params = []
        for layer in model.layers:
            shapes = layer.parameter_shapes()
            drawn = {name: self.moved.detach().new_zeros(shape) for name, shape in shapes.items()}
            if shapes:
                noise = torch.randn(shapes["w"], generator=generator, **CPU)
                fan_in = math.prod(shapes["w"][1:])
                drawn["w"] = self.spread() / math.sqrt(fan_in) * noise.to(self.moved)
            params.append(drawn)
        return params

    def spread(self) -> Tensor:
        """The current spread, a scalar tensor."""
        return self.start * (STRIDE * self.moved).exp()

    def effective(self) -> dict[str, float]:
        """The current spread of w, before the division by sqrt(fan_in)."""
        return {"spread_w": self.spread().item()}


class PerLayerInitializer(nn.Module):
    """A separate initializer for each layer with weights; further layers use the last one.

    Attributes:
        parts: the initializers, each a GaussianInitializer or a SpreadInitializer.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def set_values(self, effective: Mapping[str, float]) -> None:
        """Set all numbers to those of `effective`, of this or of one initializer for all layers.

        Raises KeyError if one is missing.
        """
        for part, values in zip(self.parts, _by_layer(effective, len(self.parts)), strict=True):
            part.set_values(values)

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """Draw a dict of tensors per layer, of the shapes of its `parameter_shapes`."""
        params, number = [], 0
        for layer in model.layers:
            part = self.parts[min(number, len(self.parts) - 1)]
            params += part(SimpleNamespace(layers=[layer]), generator)
            number += has_weights(params[-1])
        return params

    def effective(self) -> dict[str, float]:
        """The numbers of each layer, named like "1/spread_w"."""
        return {
            f"{number}/{name}": value
            for number, part in enumerate(self.parts, 1)
            for name, value in part.effective().items()
        }


def fixed_initializer(effective: Mapping[str, float]) -> nn.Module:
    """The initializer that `effective` describes, with fixed numbers in float64.

    Raises ValueError for names that no initializer has.
    """
    numbers = [int(n.partition("/")[0]) for n in effective if "/" in n]
    if numbers:
        layers = _by_layer(effective, max(numbers))
        return PerLayerInitializer([fixed_initializer(values) for values in layers])
    kind = SpreadInitializer if set(effective) == {"spread_w"} else GaussianInitializer
    return kind.with_values(effective)


def _by_layer(effective: Mapping[str, float], layers: int) -> list[dict[str, float]]:
    """The numbers of each layer; names without a layer stand for layer 1.

    Layers beyond the last one that is named have its numbers.
    """
    by_layer: dict[int, dict[str, float]] = {}
    for name, value in effective.items():
        layer, _, of_layer = name.rpartition("/")
        by_layer.setdefault(int(layer or 1), {})[of_layer] = value
    return [by_layer.get(min(k, max(by_layer)), {}) for k in range(1, layers + 1)]
