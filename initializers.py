"""Trainable initial distributions of a model's parameters.

    w = W (mu_w + sd_w N(0,1)) / sqrt(fan_in);   b = S (mu_b + sd_b N(0,1));   m likewise

The fixed scalers W = 1000, S = 100 act as larger learning rates for these few numbers. Or, for
rules whose learned numbers are logarithms, with a spread that stays positive:

    w = exp(log spread_0 + 0.3 u) N(0,1) / sqrt(fan_in);   b = 0;   m = 0
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from models_fully_local import Params, has_weights

SCALERS = {"w": 1000.0, "b": 100.0, "m": 100.0}
STRIDE = 0.3  # of logarithms: a number is its start times exp(STRIDE u), and one rate suits all
CPU = {"dtype": torch.float64, "device": "cpu"}  # of draws, whatever the default device is
TRAINABLE, FIXED, ABSENT = "trainable", "fixed", "absent"


class GaussianInitializer(nn.Module):
    """Draws every layer's parameters from Gaussians whose means and spreads may be trained.

    Attributes:
        means, spreads: for "w", "b", "m" whether each is "trainable", "fixed" or "absent" (0).
        scalers: W, S above by parameter; others than those only where they are given.
        A mean starts at 0, a spread at 1 / scaler, so that it is effectively 1.
        The nn.Parameters are called mean_w, spread_w, ... and hold the unscaled numbers.
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
        """Fixed means and spreads, as `effective` gives them; the others are absent.

        The numbers are held in float64: `.to(torch.float32)` gives back, bit for bit, those of a
        float32 initializer. Raises ValueError for a name that is not "mean_" or "spread_" and one
        of w, b, m.
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
        """Sets every mean and spread there is to those that `effective` gave.

        Raises KeyError where one is missing.
        """
        with torch.no_grad():
            for name, number in self.named_parameters():
                number.fill_(effective[name] / self.scalers[name[-1]])

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """One draw: a dict of tensors per layer, of the shapes that the layer asks for.

        The noise comes from a CPU generator and in float64, so that every device and dtype sees
        the same draw.
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
        """Each mean and spread, scaler included (of w: before the division by sqrt(fan_in))."""
        return {n: p.item() * self.scalers[n[-1]] for n, p in self.named_parameters()}


class SpreadInitializer(nn.Module):
    """Draws weights around 0 with one spread; biases and lateral weights start at 0.

    Attributes:
        start: the spread where training it begins, of w before the division by sqrt(fan_in).
        moved: u above, an nn.Parameter that starts at 0 and needs no gradient where it is fixed.
    Raises ValueError for a spread that is not positive.
    """

    def __init__(self, spread: float = 0.167, *, trainable: bool = True) -> None:
        super().__init__()
        if not 0 < spread < math.inf:
            raise ValueError(f"the spread of w must be > 0 and finite: {spread}")
        self.start = float(spread)
        self.moved = nn.Parameter(torch.zeros(()), trainable)

    @classmethod
    def with_values(cls, effective: Mapping[str, float]) -> "SpreadInitializer":
        """The fixed spread that `effective` gave, in float64."""
        return cls(effective["spread_w"], trainable=False).double()

    def set_values(self, effective: Mapping[str, float]) -> None:
        """Takes the spread that `effective` gave as its start."""
        self.start = float(effective["spread_w"])
        with torch.no_grad():
            self.moved.zero_()

    def get_extra_state(self) -> float:
        """Where the spread starts, which is no tensor of the module's but of its state."""
        return self.start

    def set_extra_state(self, state: float) -> None:
        """Takes what `get_extra_state` gave."""
        self.start = float(state)

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """One draw: a dict of tensors per layer, of the shapes that the layer asks for.

        The noise comes from a CPU generator and in float64, so that every device and dtype sees
        the same draw.
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
        """As it acts, a scalar."""
        return self.start * (STRIDE * self.moved).exp()

    def effective(self) -> dict[str, float]:
        """The spread of w, before the division by sqrt(fan_in)."""
        return {"spread_w": self.spread().item()}


class PerLayerInitializer(nn.Module):
    """An initializer of its own for each layer that has weights; further layers have the last's.

    Attributes:
        parts: GaussianInitializer or SpreadInitializer each.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def set_values(self, effective: Mapping[str, float]) -> None:
        """Takes what `effective` gave, or that of one initializer for all layers.

        Raises KeyError where a number is missing.
        """
        for part, values in zip(self.parts, _by_layer(effective, len(self.parts)), strict=True):
            part.set_values(values)

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """One draw: a dict of tensors per layer, of the shapes that the layer asks for."""
        params, number = [], 0
        for layer in model.layers:
            part = self.parts[min(number, len(self.parts) - 1)]
            params += part(SimpleNamespace(layers=[layer]), generator)
            number += has_weights(params[-1])
        return params

    def effective(self) -> dict[str, float]:
        """The numbers of each layer, such as "1/spread_w"."""
        return {
            f"{number}/{name}": value
            for number, part in enumerate(self.parts, 1)
            for name, value in part.effective().items()
        }


def fixed_initializer(effective: Mapping[str, float]) -> nn.Module:
    """The initializer that `effective` describes, its numbers fixed and in float64.

    Raises ValueError for names that no initializer has.
    """
    numbers = [int(n.partition("/")[0]) for n in effective if "/" in n]
    if numbers:
        layers = _by_layer(effective, max(numbers))
        return PerLayerInitializer([fixed_initializer(values) for values in layers])
    kind = SpreadInitializer if set(effective) == {"spread_w"} else GaussianInitializer
    return kind.with_values(effective)


def _by_layer(effective: Mapping[str, float], layers: int) -> list[dict[str, float]]:
    """The numbers of each layer; those that say no layer for all, the last's for further ones."""
    by_layer: dict[int, dict[str, float]] = {}
    for name, value in effective.items():
        layer, _, of_layer = name.rpartition("/")
        by_layer.setdefault(int(layer or 1), {})[of_layer] = value
    return [by_layer.get(min(k, max(by_layer)), {}) for k in range(1, layers + 1)]
