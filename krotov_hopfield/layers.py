"""Layers of competing hidden units: nn.Linear and nn.Conv2d with a local learning rule.

    layer = BioConv2d(3, 96, 5, lebesgue_p=2, ranking_param=2, delta=0.2)
    for x in batches:
        convergence = layer.training_step(x, learning_rate=0.01)  # one update, no labels
    y = layer(x)                          # f(W) x, with f(W) = sign(W) |W|^(p-1)

The update is that of competition.py, on inputs normalized by a batch norm without parameters, which
uses the statistics of the batch in `training_step` and the running statistics in `forward`. In a
convolution, all channels of a group compete at every position of every image. A bias is the weight
of a constant input 1.

Names and signatures are BioPyTorch's; everything that BioPyTorch lacks is a keyword argument. On a
CPU, if at most two units learn from a sample, the compiled loops of competition_kernels.py compute
the update. In all other cases it takes two products, without waiting for the device: convolutions,
which store no patches, or, on another device and where there are not too many, products with them.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from krotov_hopfield import competition_kernels as kernels
from krotov_hopfield.choices import ACTING
from krotov_hopfield.competition import (
    Competition,
    check_options,
    convergence,
    p_norms,
    scaled_changes,
    scales,
    signed_power,
)
from krotov_hopfield.errors import CompetitionError

COMPILED_TYPES = (torch.float32, torch.float64)
LANES = 16  # row lengths of sums are multiples of this, so that each row begins a cache line
FEW_CHANNELS = 16  # below this, torch's batch norm is faster if channels aren't last in memory
ROWS_AT_ONCE = 500  # of a fully connected layer's weights, when they are raised to a power
LARGEST_EXPONENT = 16  # the largest p for which the loops multiply instead of calling pow
MOST_IN_PATCHES = 2**27  # numbers; beyond these, convolutions take the place of patches
MOST_IN_PARTS, SHORTEST_PART = 2**20, 256  # numbers, and terms of each, of a sum that is split


class _Competing:
    """What both layers share: options, the update, and the convergence that it returns.

    Keyword arguments of both layers, beyond BioPyTorch's:
        gate, inverse_temperature: see `Competition`.
        normalization: what the change is divided by, see `scales` (default: "matrix" for the fully
            connected layer, "filter" for the convolution).
        rate_exponent: q, by which the learning rate of unit o is multiplied by
            | |w_o|_2 - 1 |^q, as in SoftHebb, where q = 1/2; None: no such factor.
        batch_norm: whether inputs are normalized.
    """

    def _set_up(self, competition, lebesgue_p, normalization, rate_exponent, features) -> None:
        check_options(lebesgue_p, normalization, rate_exponent)
        self.competition, self.lebesgue_p = competition, lebesgue_p
        self.normalization, self.rate_exponent = normalization, rate_exponent
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.batch_norm = None
        if features:
            place = {"device": self.weight.device, "dtype": self.weight.dtype}
            self.batch_norm = nn.BatchNorm1d(features, affine=False, **place)

    @property
    def delta(self) -> float:
        """The gate's; may be set, also between two steps."""
        return self.competition.delta

    @delta.setter
    def delta(self, delta: float) -> None:
        self._compete(delta=delta)

    @property
    def ranking_param(self) -> int:
        """The gate's k; may be set."""
        return self.competition.ranking_param

    @ranking_param.setter
    def ranking_param(self, ranking_param: int) -> None:
        self._compete(ranking_param=ranking_param)

    def _compete(self, **changes: float) -> None:
        competition = replace(self.competition, **changes)
        competition.check(len(self.weight) // self._groups)
        self.competition = competition

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, spread: float = 1.0
    ) -> None:
        """Draw weights and biases from N(0, spread^2).

        generator: a CPU generator (default: torch's global one).
        """
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
                parameter.copy_(spread * torch.randn(parameter.shape, **options))

    def _respond(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The currents [batch, out] of inputs [batch, in], f(W) [out, in] and f(b) [out]."""
        return functional.linear(x, weight, bias)

    def _by_group(self, currents: Tensor, gates) -> Tensor:
        """`gates` applied to currents [batch, out]; the result has the same shape."""
        return gates(currents, 1)

    def _powers(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else signed_power(self.bias, self.lebesgue_p)
        return signed_power(self.weight, self.lebesgue_p), bias

    def _normalized(self, x: Tensor, learning: bool) -> Tensor:
        """The inputs x after batch norm.

        learning: use the statistics of the batch and update the running ones. A batch with a single
            number per feature has no variance; it is normalized by the running statistics, which
            stay unchanged.
        """
        norm = self.batch_norm
        if norm is None:
            return x
        from_batch = learning and x.numel() > x.shape[1]
        if from_batch:
            norm.num_batches_tracked.add_(1)
        return functional.batch_norm(
            x, norm.running_mean, norm.running_var, None, None, from_batch, norm.momentum, norm.eps
        )

    @torch.no_grad()
    def training_step(self, x: Tensor, learning_rate: float | Tensor = 0.1) -> Tensor:
        """Update the weights from a batch of inputs of the shape that `forward` takes.

        Returns the convergence max_o |sum_i |W_oi|^p - 1| of the new weights, a scalar tensor on
        the layer's device that approaches 0 during training. Raises CompetitionError for an empty
        batch or inputs of another shape or type; the layer is then unchanged. Under autocast,
        inputs are converted to the type of the weights, in which the update is computed.

        learning_rate: multiplies the scaled change, see `delta_weights`.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.training_step(x.to(self.weight.dtype), learning_rate)
        x = self._inputs(x.detach())
        if not len(x):
            raise CompetitionError("the batch is empty; expected at least one sample")
        if x.dtype != self.weight.dtype:
            raise CompetitionError(f"expected inputs of {self.weight.dtype}, as the weights, got "
                                   f"{x.dtype}")  # fmt: skip
        x = self._padded(self._normalized(x, learning=True))
        compiled = x.device.type == "cpu" and x.dtype in COMPILED_TYPES
        if compiled and self.competition.sparse:
            return self._compiled_step(x, learning_rate)
        return self._dense_step(x, learning_rate)

    def _rates(self, weight: Tensor, learning_rate: float | Tensor) -> Tensor:
        """The learning rate of each unit [O]."""
        if self.rate_exponent is None:
            return learning_rate * weight.new_ones(len(weight))
        radius = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return learning_rate * (radius - 1).abs() ** self.rate_exponent

    @torch.no_grad()
    def delta_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        """D / scale for a batch x: the change of the weights for a learning rate of 1.

        x: the inputs as they are after batch norm: [batch, channels, H, W] for a convolution, which
            pads them; [batch, N] for a fully connected layer.
        weight: of the shape of the layer's own. A fully connected layer takes [O, N] for any N: a
            column of ones in x and a column of weights make a bias.
        """
        return self._changes(self._padded(x), weight, None)[0]

    def _changes(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """D / scale for weights and biases; x is normalized and padded, or patches [B, N]."""
        p = self.lebesgue_p
        of_bias = None if bias is None else signed_power(bias, p)
        currents = self._respond(x, signed_power(weight, p), of_bias)
        g = self._by_group(currents, self.competition.gates)
        over = [d for d in range(g.dim()) if d != 1]
        pull = (g * currents).sum(over)
        hebbian = self._correlate(g, x, weight), None if bias is None else g.sum(over)
        return scaled_changes(weight, bias, hebbian, pull, self.normalization)

    def _dense_step(self, x: Tensor, learning_rate: float | Tensor) -> Tensor:
        """The update by matrix products, on any device; x is normalized and padded."""
        weight, by_patches = self.weight, self._takes_patches(x)
        if by_patches:
            x, weight = self._patches(x), self._weight_rows()
        change, of_bias = self._changes(x, weight, self.bias)
        rates = self._rates(weight, learning_rate)
        weight.add_(rates.view(-1, *[1] * (change.dim() - 1)) * change)
        if of_bias is not None:
            self.bias.add_(rates * of_bias)
        if by_patches:
            self._keep_rows(weight)
        return convergence(p_norms(weight, self.bias, self.lebesgue_p))

    def _compiled_step(self, x: Tensor, learning_rate: float | Tensor) -> Tensor:
        """The update by compiled loops, which touch only the rows of units that learned."""
        rows = self._weight_rows()
        weight, bias = rows.numpy(), _array(self.bias, self.weight)
        currents, norms = self._currents_and_norms(rows, x)
        learned, changes, pull = self._add_up(currents, x)
        largest = np.empty(len(learned), weight.dtype)
        kernels.subtract_pull(weight, bias, learned, changes, pull, largest)
        factors = self._rates(self.weight, learning_rate)[torch.from_numpy(learned)]
        factors = factors / scales(torch.from_numpy(largest), self.normalization)
        kernels.add_changes(weight, bias, learned, changes, factors.numpy())
        self._keep_rows(rows)
        written = [self.weight] if self.bias is None else [self.weight, self.bias]
        torch.autograd.graph.increment_version(written)  # autograd does not see the loops' writes
        if norms is None:
            return convergence(p_norms(self.weight, self.bias, self.lebesgue_p))
        kernels.norms_of(weight, bias, int(self.lebesgue_p), learned, norms.numpy())
        return convergence(norms)

    def _currents_and_norms(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The currents c and sum_i |W_oi|^p [O]; None for the latter if p needs a power function.

        rows: W as [O, N]. It is raised to its power in blocks, which stay in the cache and need
            little memory.
        """
        p = self.lebesgue_p
        if p != int(p) or not 2 <= p <= LARGEST_EXPONENT:
            return self._respond(x, *self._powers()), None
        norms, size = rows.new_empty(len(rows)), self._rows_at_once(rows)
        power, currents = torch.empty_like(rows[:size]), None
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            part = power[: len(rows[block])]
            kernels.powers_and_norms(
                rows[block].numpy(), int(p), part.numpy(), norms[block].numpy()
            )
            of_block = self._respond(x, self._as_weight(part), None)
            if size >= len(rows):
                currents = of_block
            else:
                currents = x.new_empty(len(x), len(rows)) if currents is None else currents
                currents[:, block] = of_block
        if self.bias is not None:
            norms += self.bias.abs() ** p
            bias = signed_power(self.bias, p)
            currents += bias.view(-1, *[1] * (currents.dim() - 2))
        return currents, norms

    def _add_up(self, currents: Tensor, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The numbers of the units that learn [n], their rows of g^T x, and their s [n] in float64.

        The rows [n, > N] have the sums of the gates in column N.
        """
        groups, units = self._groups, len(self.weight)
        by_sample = currents.movedim(1, -1).reshape(-1, groups, units // groups)
        flat, origins, offsets, length = self._windows(x, currents.shape)
        most = min(units, len(by_sample) * groups * 2)
        slots, learned = np.full(units, -1), np.empty(most, np.int64)
        width = -(-(self.weight[0].numel() + 1) // LANES) * LANES
        sums, pull = np.empty((most, width), flat.dtype), np.empty(most)
        k = self.competition.ranking_param if self.competition.gate == "ranked" else 1
        delta, by_sample = flat.dtype.type(self.competition.delta), by_sample.numpy()
        bits = by_sample.view(np.int32 if flat.itemsize == 4 else np.int64)
        highest = kernels.HIGHEST_KEY[flat.itemsize]
        count = kernels.add_samples(
            by_sample, bits, highest, flat, origins, offsets, length, k, delta, slots, learned,
            sums, pull,
        )  # fmt: skip
        return learned[:count], sums[:count], pull[:count]

    def extra_repr(self) -> str:
        rivalry = self.competition
        shown = {"lebesgue_p": self.lebesgue_p, "gate": repr(rivalry.gate)}
        shown |= {name: getattr(rivalry, name) for name in ACTING[rivalry.gate]}
        shown["normalization"] = repr(self.normalization)
        if self.rate_exponent is not None:
            shown["rate_exponent"] = self.rate_exponent
        if self.batch_norm is None:
            shown["batch_norm"] = False
        return ", ".join([super().extra_repr(), *(f"{k}={v}" for k, v in shown.items())])


class BioLinear(_Competing, nn.Linear):
    """A fully connected layer of competing units; inputs [batch, ...] are flattened to [batch, in].

    weight [out, in] and bias [out] start from N(0, 1). Raises CompetitionError if an option is
    unknown or out of its range.

    bias, delta, ranking_param, lebesgue_p: as in BioPyTorch; delta and ranking_param (k) are those
        of the gate, lebesgue_p is p.
    gate and the other keyword arguments: see `_Competing`.
    """

    _groups = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        delta: float = 0.05,
        ranking_param: int = 2,
        lebesgue_p: float = 3,
        device=None,
        dtype=None,
        *,
        gate: str = "ranked",
        inverse_temperature: float = 1.0,
        normalization: str = "matrix",
        rate_exponent: float | None = None,
        batch_norm: bool = True,
    ) -> None:
        competition = Competition(gate, ranking_param, delta, inverse_temperature)
        competition.check(out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        features = in_features if batch_norm else 0
        self._set_up(competition, lebesgue_p, normalization, rate_exponent, features)

    def forward(self, x: Tensor) -> Tensor:
        """The currents f(W) x + f(b), [batch, out]."""
        return self._respond(self._normalized(self._inputs(x), learning=False), *self._powers())

    def _inputs(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x[:1].numel() not in (0, self.in_features):
            raise CompetitionError(
                f"expected inputs of {self.in_features} features, [batch, ...], got {list(x.shape)}"
            )
        return x.flatten(1)

    def _padded(self, x: Tensor) -> Tensor:
        return x

    def _takes_patches(self, x: Tensor) -> bool:
        return False

    def _correlate(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """g^T x [out, in] of gates [batch, out], shaped as the weights."""
        return g.t() @ x

    def _weight_rows(self) -> Tensor:
        return self.weight.detach().contiguous()

    def _as_weight(self, rows: Tensor) -> Tensor:
        return rows

    def _rows_at_once(self, rows: Tensor) -> int:
        return min(len(rows), ROWS_AT_ONCE)

    def _keep_rows(self, rows: Tensor) -> None:
        if rows.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(rows)

    def _windows(self, x: Tensor, shape: torch.Size):
        """x [batch, in] flat, the origins of its rows, and the single segment of each row."""
        flat = x.contiguous().view(-1).numpy()
        origins = np.arange(shape[0]) * self.in_features
        return flat, origins, np.zeros(1, np.int64), self.in_features


class BioConv2d(_Competing, nn.Conv2d):
    """A convolution whose channels compete, within each group, at every position of every image.

    weight [out, in / groups, kh, kw] and bias [out] start from N(0, 1). Weight and output have
    their channels last in memory (torch.channels_last), whatever the memory format of the input:
    use `reshape`, not `view`, to flatten the output. Raises CompetitionError if an option is
    unknown or out of its range, and ValueError as nn.Conv2d does.

    stride, padding, dilation, groups, padding_mode: as in nn.Conv2d.
    bias, delta, ranking_param, lebesgue_p: as in BioPyTorch; delta and ranking_param (k) are those
        of the gate, lebesgue_p is p.
    gate and the other keyword arguments: see `_Competing`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        lebesgue_p: float = 3,
        ranking_param: int = 2,
        delta: float = 0.05,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        gate: str = "ranked",
        inverse_temperature: float = 1.0,
        normalization: str = "filter",
        rate_exponent: float | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        competition = Competition(gate, ranking_param, delta, inverse_temperature)
        competition.check(out_channels // groups)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        features = in_channels if batch_norm else 0
        self._set_up(competition, lebesgue_p, normalization, rate_exponent, features)

    @property
    def _groups(self) -> int:
        return self.groups

    def forward(self, x: Tensor) -> Tensor:
        """The currents f(W) * x + f(b), [batch, out, H', W'], with the channels last in memory."""
        x = self._padded(self._normalized(self._inputs(x), learning=False))
        return self._respond(x, *self._powers())

    def _inputs(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise CompetitionError(
                f"expected inputs [batch, {self.in_channels}, H, W], got {list(x.shape)}"
            )
        self._check_size(x.shape[2:])
        if self.in_channels < FEW_CHANNELS:
            return x
        return x.contiguous(memory_format=torch.channels_last)

    def _check_size(self, size: torch.Size) -> None:
        """Raises CompetitionError if images [H, W] are too small for the padding or the kernel."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        sides = max(top, bottom), max(left, right)
        least = {"reflect": 1, "circular": 0}.get(self.padding_mode, -math.inf)
        if any(n - side < least for n, side in zip(size, sides, strict=True)):
            raise CompetitionError(
                f"images of {list(size)} pixels are too small for {list(sides)} pixels of padding "
                f"by padding_mode {self.padding_mode!r}"
            )
        padded = [size[0] + top + bottom, size[1] + left + right]
        needed = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(n < least for n, least in zip(padded, needed, strict=True)):
            raise CompetitionError(
                f"images of {padded} pixels, padding included, are smaller than the "
                f"kernel's window of {needed}"
            )

    def _padded(self, x: Tensor) -> Tensor:
        """x with padding, so that the convolution itself needs none; channels last."""
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode)
        return x.contiguous(memory_format=torch.channels_last)

    def _respond(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The currents [batch, out, H', W'] for padded x and f(W) [out, in / groups, kh, kw].

        Of patches [B, N] and f(W) [out, N] they are [B, out].
        """
        if x.dim() == 2:
            return super()._respond(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _by_group(self, currents: Tensor, gates) -> Tensor:
        """`gates` applied to currents [batch, out, H', W'] within each group; same shape."""
        if currents.dim() == 2:
            return super()._by_group(currents, gates)
        return gates(currents.unflatten(1, (self.groups, -1)), 2).flatten(1, 2)

    def _correlate(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over samples of gates times windows, [out, in / groups, kh, kw].

        It is the weight gradient of the convolution if g [batch, out, H', W'] is the gradient of
        its output. Of gates [B, out] and patches [B, N] it is [out, N].
        """
        if x.dim() == 2:
            return contracted(g, x)
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, (0, 0), self.dilation, False, (0, 0), self.groups,
            (False, True, False),
        )[1]  # fmt: skip

    def _takes_patches(self, x: Tensor) -> bool:
        """Whether products with patches of padded x take the place of convolutions."""
        if x.device.type == "cpu" or self.groups > 1:
            return False
        places = len(x) * math.prod(self._places(x))
        return places * self.weight[0].numel() <= MOST_IN_PATCHES

    def _places(self, x: Tensor) -> list[int]:
        """Height and width of the output for padded x [batch, in, H, W]."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [(n - span - 1) // s + 1
                for n, span, s in zip(x.shape[2:], spans, self.stride, strict=True)]  # fmt: skip

    def _patches(self, x: Tensor) -> Tensor:
        """The windows of padded x, as rows [places, N] in the order of those of the weights."""
        x = x.permute(0, 2, 3, 1).contiguous()
        (image, down, across, channel), (dh, dw), (sh, sw) = x.stride(), self.dilation, self.stride
        (height, width), (kh, kw) = self._places(x.permute(0, 3, 1, 2)), self.kernel_size
        steps = image, sh * down, sw * across, dh * down, dw * across, channel
        windows = x.as_strided((len(x), height, width, kh, kw, x.shape[3]), steps)
        return windows.reshape(-1, kh * kw * x.shape[3])

    def _weight_rows(self) -> Tensor:
        """W as [out, kh * kw * in / groups]; a view if its channels are last in memory."""
        return self.weight.detach().permute(0, 2, 3, 1).reshape(self.out_channels, -1)

    def _as_weight(self, rows: Tensor) -> Tensor:
        return rows.view(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)

    def _rows_at_once(self, rows: Tensor) -> int:
        return len(rows)

    def _keep_rows(self, rows: Tensor) -> None:
        if rows.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(self._as_weight(rows))

    def _windows(self, x: Tensor, shape: torch.Size):
        """x flat with channels last, the origins of the windows, and the offsets of their segments.

        The last value is the length of a segment.
        """
        batch, channels, height, width = x.shape
        (kh, kw), (dh, dw), (sh, sw) = self.kernel_size, self.dilation, self.stride
        flat = x.permute(0, 2, 3, 1).reshape(-1).numpy()
        down = np.arange(shape[2]) * sh * width
        across = np.arange(shape[3]) * sw
        place = np.arange(batch)[:, None, None] * height * width + down[:, None] + across
        if self.groups == 1 and dw == 1:
            offsets, length = np.arange(kh) * dh * width, kw * channels
        else:
            offsets = (np.arange(kh)[:, None] * dh * width + np.arange(kw) * dw).reshape(-1)
            length = channels // self.groups
        return flat, place.reshape(-1) * channels, offsets * channels, length


class Triangle(nn.Module):
    """relu(u - mean over the channels at the same position)^power, for u [batch, channels, ...].

    Source: Coates, Ng, Lee 2011; with a power, Journe et al. 2023 (SoftHebb).
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, u: Tensor) -> Tensor:
        above = torch.relu(u - u.mean(1, keepdim=True))
        return above if self.power == 1 else above**self.power

    def extra_repr(self) -> str:
        return f"power={self.power}"


def contracted(g: Tensor, x: Tensor) -> Tensor:
    """g^T x [O, N] of g [B, O] and x [B, N], as a sum of parts over B where the result is small.

    One product with a small result would leave most of a GPU idle.
    """
    most = min(MOST_IN_PARTS // (g.shape[1] * x.shape[1]), len(g) // SHORTEST_PART)
    parts = max(k for k in (1, 2, 4, 8, 16, 32, 64) if k <= max(1, most) and len(g) % k == 0)
    if parts == 1:
        return g.t() @ x
    return (g.unflatten(0, (parts, -1)).mT @ x.unflatten(0, (parts, -1))).sum(0)


def _array(bias: Tensor | None, like: Tensor) -> np.ndarray:
    """The biases as an array that shares their memory; of length 0 if there are none."""
    return (like.new_empty(0) if bias is None else bias.detach()).numpy()
