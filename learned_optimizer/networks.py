"""Learned optimisers as networks that see one coordinate at a time, with weights shared by all.

    theta <- theta + out_mul u,    u, memory = network(inputs of the gradient, memory)

    CoordinateLSTM  LSTM cell (20), LSTM cell (20), linear; 5,301 weights, 5,221 on raw gradients
    CoordinateMLP   MLP (32, 32) on running averages of the gradient; u = direction exp(.001 size)

Inputs are detached from theta: there are no second derivatives. All tensors have one column per
coordinate. The memory [rows, n] starts at 0; its first rows are computed by the weights (the LSTM's
state), the others only record what was seen (running averages, a count of steps). Its type is at
least float32, because a count stops at 256 in bfloat16 and squares overflow at 256 in float16.
Sources: Andrychowicz et al. 2016 (arXiv 1606.04474) with the preprocessing of its appendix A; Metz
et al. 2020 (arXiv 2009.11243) for the MLP.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from learned_optimizer import coordinate_lstm
from learned_optimizer.errors import OptimizerError
from learned_optimizer.seeds import seeded_generator
from learned_optimizer.settings import EXTRA_INPUTS

LARGEST_LOG = 10.0  # p: gradients below e^-p are scaled by e^p instead of taking their log
TIME_SCALE = 100.0  # steps
DECAYS = (0.5, 0.9, 0.99)  # of the MLP's running averages of g; the last also of g^2
MLP_CHUNK = 1 << 14  # columns in one autograd graph
LARGEST_HIDDEN = 4096  # units
LARGEST_FACTOR = sys.float_info.max
LARGEST_GRADIENT = 1e15  # for the MLP, so that its averages of squares stay finite in float32
LARGEST_PREPROCESS_FACTOR = 80.0  # so that e^p is finite in float32


def log_and_sign(g: Tensor, p: float = LARGEST_LOG) -> Tensor:
    """[2, ...]: (log(|g| + 1e-8) / p, sign g) if |g| >= e^-p, otherwise (-1, e^p g)."""
    size = g.abs()
    large = size >= math.exp(-p)
    logarithm = torch.where(large, (size + 1e-8).log_().div_(p), -1.0)
    return torch.stack([logarithm, torch.where(large, g.sign(), g * math.exp(p))])


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the memory of a network with weights of this type."""
    return torch.promote_types(dtype, torch.float32)


class CoordinateNetwork(nn.Module):
    """What the networks share.

    Attributes:
        kind: the name of the kind of network, as in files.
        settings: the arguments that `make_network` needs to make it again.
        state_rows, seen_rows: rows of the memory that the weights compute, and that only record.
    """

    state_rows = seen_rows = 0

    def __init__(self, out_mul: float, settings: dict) -> None:
        super().__init__()
        self.settings = {"out_mul": out_mul, **settings}
        self.out_mul = out_mul

    @property
    def out_mul(self) -> float:
        """The factor of all steps, which is one of the settings.

        Setting it raises OptimizerError if the value isn't a finite number above 0.
        """
        return self.settings["out_mul"]

    @out_mul.setter
    def out_mul(self, factor: float) -> None:
        if not 0 < factor <= LARGEST_FACTOR:
            raise OptimizerError(f"out_mul must be a finite number above 0, got {factor}")
        self.settings["out_mul"] = float(factor)

    def memory(self, n: int, like: Tensor) -> Tensor:
        """The memory [rows, n] before the first step, of `like`'s type but at least float32."""
        rows = self.state_rows + self.seen_rows
        return like.new_zeros(rows, n, dtype=memory_dtype(like.dtype))

    def observe(
        self, g: Tensor, theta: Tensor, memory: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Inputs [inputs, n] of the network, and the memory after it has recorded what was seen.

        The inputs have the type of the gradient, the memory keeps its own.

        g, theta: gradient and parameters [n].
        sizes: how many consecutive coordinates belong to each tensor.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """u [n] and the next memory, with an autograd graph to the weights and the state rows."""
        raise NotImplementedError

    def step_(self, x: Tensor, memory: Tensor) -> Tensor:
        """u [n] without an autograd graph; the memory is changed in place."""
        raise NotImplementedError

    def sequence_gradient(self, x: Tensor, memory: Tensor, du: Tensor) -> list[Tensor]:
        """The gradient with respect to each parameter of the sum of du * u over a sequence.

        x: [T, inputs, n], the inputs of every step.
        memory: [rows, n], before the first step.
        du: [T, n].
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class CoordinateLSTM(CoordinateNetwork):
    """The LSTM optimiser.

    Raises OptimizerError if a setting is unknown or out of its range.

    hidden: units of each of the two layers.
    preprocess: take `log_and_sign` of the gradient instead of the gradient itself.
    extra_inputs: any of "time": tanh(step / 100); "relative_update": log(|d theta| / |theta|) / 10
        of the tensor, at least -1, and -1 before the first update; "parameter".
    out_mul: the factor of all steps; 0.01 is better than 0.1 for networks of ReLUs.
    preprocess_factor: p in `log_and_sign`.
    """

    kind = "lstm"

    def __init__(
        self,
        hidden: int = 20,
        *,
        preprocess: bool = True,
        extra_inputs: Sequence[str] = (),
        out_mul: float = 0.1,
        preprocess_factor: float = LARGEST_LOG,
    ) -> None:
        chosen = [name for name in EXTRA_INPUTS if name in extra_inputs]
        settings = {"hidden": hidden, "preprocess": bool(preprocess), "extra_inputs": chosen}
        if preprocess_factor != LARGEST_LOG:  # older files don't have it
            settings["preprocess_factor"] = float(preprocess_factor)
        super().__init__(out_mul, settings)
        _check_hidden(hidden)
        if len(chosen) != len(extra_inputs):
            raise OptimizerError(
                f"extra inputs are {', '.join(EXTRA_INPUTS)}, each at most once, got "
                f"{', '.join(map(str, extra_inputs))}"
            )
        if not 0 < preprocess_factor <= LARGEST_PREPROCESS_FACTOR:
            raise OptimizerError(
                f"preprocess_factor must be a number above 0, at most "
                f"{LARGEST_PREPROCESS_FACTOR:g}, got {preprocess_factor}"
            )
        self.extra_inputs, self.preprocess = tuple(chosen), bool(preprocess)
        self.preprocess_factor = float(preprocess_factor)
        self.state_rows = 4 * hidden
        self.seen_rows = ("time" in chosen) + ("relative_update" in chosen)
        self.lstm = nn.LSTM(1 + self.preprocess + len(chosen), hidden, 2)
        self.output = nn.Linear(hidden, 1)

    def observe(self, g, theta, memory, sizes):
        rows = [log_and_sign(g, self.preprocess_factor) if self.preprocess else g[None]]
        if not self.extra_inputs:
            return rows[0], memory
        seen = list(memory[self.state_rows :])
        if "time" in self.extra_inputs:
            rows.append((seen[0] / TIME_SCALE).tanh()[None].to(g))
            seen[0] = seen[0] + 1
        if "relative_update" in self.extra_inputs:
            now = theta.to(memory)
            rows.append(_relative_change(now, seen[-1], sizes)[None].to(g))
            seen[-1] = now
        if "parameter" in self.extra_inputs:
            rows.append(theta[None])
        memory = torch.cat([memory[: self.state_rows], *(row[None] for row in seen)])
        return torch.cat(rows), memory

    def forward(self, x, memory):
        h1, c1, h2, c2 = memory[: self.state_rows].to(x).chunk(4)
        h1, c1 = self._cell(0, x, h1, c1)
        h2, c2 = self._cell(1, h1, h2, c2)
        u = (self.output.weight @ h2)[0] + self.output.bias
        state = torch.cat([h1, c1, h2, c2]).to(memory)
        return u, torch.cat([state, memory[self.state_rows :]])

    def _cell(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        w_x, w_h, b_x, b_h = self.lstm.all_weights[layer]
        i, f, g, o = (w_x @ x + w_h @ h + (b_x + b_h)[:, None]).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def step_(self, x, memory):
        weights = coordinate_lstm.Weights.of(self.lstm, self.output)
        return coordinate_lstm.step_(weights, x, memory[: self.state_rows])

    def sequence_gradient(self, x, memory, du):
        weights = coordinate_lstm.Weights.of(self.lstm, self.output)
        state = memory[: self.state_rows]
        gradients = weights.gradients_by_module(
            *coordinate_lstm.sequence_gradient(weights, x, state, du)
        )
        return [g.reshape(p.shape) for g, p in zip(gradients, self.parameters(), strict=True)]


class CoordinateMLP(CoordinateNetwork):
    """The MLP optimiser, whose memory only records what was seen.

    Inputs per coordinate: g; its running averages with decays .5, .9, .99; the parameter; and g
    divided by the root of the running average of g^2. Averages are corrected for their start at 0,
    and each of these inputs is divided by its root mean square over the tensor. The last input is
    tanh(step / 100). There are two outputs: u = direction * exp(.001 size).
    """

    kind = "mlp"
    seen_rows = len(DECAYS) + 2
    inputs = len(DECAYS) + 4

    def __init__(self, hidden: int = 32, *, out_mul: float = 0.001) -> None:
        super().__init__(out_mul, {"hidden": hidden})
        _check_hidden(hidden)
        self.layers = nn.Sequential(
            nn.Linear(self.inputs, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def observe(self, g, theta, memory, sizes):
        *averages, squares, steps = memory
        dtype, theta = g.dtype, theta.to(memory)
        g, steps = g.to(memory).clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT), steps + 1
        averages = [d * m + (1 - d) * g for d, m in zip(DECAYS, averages, strict=True)]
        squares = DECAYS[-1] * squares + (1 - DECAYS[-1]) * g.square()
        corrected = [m / (1 - d**steps) for d, m in zip(DECAYS, averages, strict=True)]
        size = (squares / (1 - DECAYS[-1] ** steps)).sqrt()
        rows = torch.stack([g, *corrected, theta, g / (size + 1e-12)])
        x = torch.cat([_over_its_size(rows, sizes), (steps / TIME_SCALE).tanh()[None]])
        return x.to(dtype), torch.stack([*averages, squares, steps])

    def forward(self, x, memory):
        direction, size = self.layers(x.t()).t()
        return direction * (0.001 * size).exp(), memory

    @torch.no_grad()
    def step_(self, x, memory):
        return self(x, memory)[0]

    @torch.enable_grad()
    def sequence_gradient(self, x, memory, du):
        columns, du = x.transpose(0, 1).flatten(1), du.flatten()
        total = [torch.zeros_like(p) for p in self.parameters()]
        pairs = zip(columns.split(MLP_CHUNK, 1), du.split(MLP_CHUNK), strict=True)
        for some, weights in pairs:
            u, _ = self(some, memory)
            gradients = torch.autograd.grad((u * weights).sum(), list(self.parameters()))
            torch._foreach_add_(total, gradients)
        return total


NETWORKS = {network.kind: network for network in (CoordinateLSTM, CoordinateMLP)}


def make_network(kind: str, seed: int = 0, **settings) -> CoordinateNetwork:
    """A network of a kind in NETWORKS, with weights drawn by torch's defaults from the seed.

    Raises OptimizerError for an unknown kind or a setting out of its range.
    """
    if kind not in NETWORKS:
        raise OptimizerError(f"unknown optimiser {kind!r}; known are {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed).initial_seed())
        return NETWORKS[kind](**settings)


def _check_hidden(hidden: int) -> None:
    """Raises OptimizerError if this isn't a possible number of units."""
    if type(hidden) is not int or not 1 <= hidden <= LARGEST_HIDDEN:
        raise OptimizerError(f"hidden must be whole, >= 1 and <= {LARGEST_HIDDEN}, got {hidden!r}")


def _over_its_size(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """[rows, n]: each row divided by its root mean square over each tensor."""
    parts = [
        part / (part.square().mean(1, keepdim=True).sqrt() + 1e-12)
        for part in rows.split(list(sizes), 1)
    ]
    return torch.cat(parts, 1)


def _relative_change(theta: Tensor, before: Tensor, sizes: Sequence[int]) -> Tensor:
    """max(-1, log(|theta - before| / |theta|) / 10) of each tensor, repeated for its coordinates.

    It is -1 if `before` is 0, because memory starts at 0: the tensor has not been seen before.
    """
    rows = torch.stack([theta - before, theta, before])
    parts = []
    for part in rows.split(list(sizes), 1):
        change, size, seen = part.norm(dim=1)
        ratio = (change / (size + 1e-12) + 1e-12).log() / LARGEST_LOG
        known = ratio.clamp(min=-1).where(seen != 0, -1.0)
        parts.append(known.expand(part.shape[1]))
    return torch.cat(parts)
