"""A two-layer LSTM with shared weights, run over very many coordinates: forward pass and gradient.

    z = W [x; h; 1]            all four gates of a layer in one product, [4H, coordinates]
    i, f, o = sigmoid(z),  g = tanh(z)
    c' = f c + i g,   h' = o tanh(c')
    u = w h2' + b

Tensors have one column per coordinate: a gate is a block of whole rows, so that every operation
runs over contiguous memory. tanh(z) = 2 sigmoid(2z) - 1, with the factor 2 inside W, so that one
call computes all gates; in float32 on a CPU, everything elementwise is one compiled pass
(compiled_lstm.py). Columns are processed in chunks that fit into the cache; the gradient stores
what it needs for one chunk only and builds no autograd graph.
Source of the cell: Hochreiter, Schmidhuber 1997, with Gers's forget gate, as in torch.nn.LSTM.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optimizer import compiled_lstm

STEP_CHUNK = {"cpu": 4096}  # columns at once; LARGE_CHUNK on other devices
SEQUENCE_CHUNK = {"cpu": 2048}
LARGE_CHUNK = 1 << 16


@dataclass(frozen=True)
class Weights:
    """The weights in the form above, with gates in the order i, f, o, g and the rows of g doubled.

    Attributes:
        first: [4H, inputs + H + 1].
        second: [4H, 2H + 1].
        output: [1, H + 1].
    """

    first: Tensor
    second: Tensor
    output: Tensor

    @classmethod
    def of(cls, lstm: nn.LSTM, output: nn.Linear) -> "Weights":
        """The weights of an nn.LSTM with two layers and an nn.Linear with one output."""
        layers = [_stacked(*(p.detach() for p in layer)) for layer in lstm.all_weights]
        return cls(*layers, torch.cat([output.weight.detach(), output.bias.detach()[:, None]], 1))

    @property
    def hidden(self) -> int:
        """H, the number of hidden units of each layer."""
        return self.output.shape[1] - 1

    def gradients_by_module(
        self, first: Tensor, second: Tensor, output: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of the modules' own parameters, in order, from those of the three matrices."""
        H, inputs = self.hidden, self.first.shape[1] - self.hidden - 1
        return (
            *_unstacked(first, inputs, H),
            *_unstacked(second, H, H),
            output[:, :H],
            output[:, H],
        )


@torch.no_grad()
def step_(weights: Weights, x: Tensor, state: Tensor) -> Tensor:
    """One step of all coordinates: returns u [n] for inputs x [inputs, n].

    state: [4H, n], the rows h1, c1, h2, c2; changed in place.
    """
    u = x.new_empty(x.shape[1])
    H, chunk = weights.hidden, STEP_CHUNK.get(x.device.type, LARGE_CHUNK)
    space = _Space(weights, min(chunk, x.shape[1]), x)
    for columns in _chunks(x.shape[1], chunk):
        some = state[:, columns]
        part = space.of_size(some.shape[1])
        part.load(x[:, columns], some)
        _cell(weights.first, part.stacked1, part.c1, part.gates, part.half, part.h1)
        part.stacked2[:H] = part.h1
        _cell(weights.second, part.stacked2, part.c2, part.gates, part.half, part.h2)
        some.copy_(part.state)
        u[columns] = torch.addmv(weights.output[0, H:], part.h2.t(), weights.output[0, :H])
    return u


@torch.no_grad()
def sequence_gradient(
    weights: Weights, x: Tensor, state: Tensor, du: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to the three weights of the sum of du * u over a sequence.

    It needs memory for one chunk of columns: about 15 H numbers per step and column.

    x: [T, inputs, n].
    state: [4H, n], before the sequence.
    du: [T, n].
    """
    total = tuple(torch.zeros_like(w) for w in (weights.first, weights.second, weights.output))
    chunk = SEQUENCE_CHUNK.get(x.device.type, LARGE_CHUNK)
    tape = None
    for columns in _chunks(x.shape[2], chunk):
        if tape is None or tape.size != columns.stop - columns.start:
            tape = _Tape(weights, len(x), columns.stop - columns.start, x)
        tape.forward(x[:, :, columns], state[:, columns])
        tape.add_backward(du[:, columns], total)
    return total


def _cell(W: Tensor, stacked: Tensor, c: Tensor, gates: Tensor, half: Tensor, h: Tensor) -> None:
    """One layer on [x; h; 1] [K, C]: c [H, C] is changed in place and h [H, C] is written.

    The sigmoids of all gates are left in gates [4H, C], and sigmoid(2c') = (tanh(c') + 1) / 2 in
    half [H, C].
    """
    torch.mm(W, stacked, out=gates)
    if _compiled(gates):
        compiled_lstm.cell_(gates, c, half, h)
        return
    i, f, o, s = gates.sigmoid_().chunk(4)
    c.mul_(f).addcmul_(i, s, value=2).sub_(i)
    torch.mul(c, 2, out=half).sigmoid_()
    torch.mul(half, 2, out=h).sub_(1).mul_(o)


class _Space:
    """Contiguous buffers for `step_` on `size` columns."""

    def __init__(self, weights: Weights, size: int, like: Tensor) -> None:
        H = weights.hidden
        self.stacked1 = like.new_ones(weights.first.shape[1], size)
        self.stacked2 = like.new_ones(2 * H + 1, size)
        self.gates, self.half = like.new_empty(4 * H, size), like.new_empty(H, size)
        self.state = like.new_empty(4 * H, size)
        self.h1, self.c1, self.h2, self.c2 = self.state.chunk(4)
        self.weights, self.size, self.like = weights, size, like

    def of_size(self, size: int) -> "_Space":
        """These buffers, or smaller ones for the last chunk."""
        return self if size == self.size else _Space(self.weights, size, self.like)

    def load(self, x: Tensor, state: Tensor) -> None:
        """Copy the inputs [inputs, C] and the state [4H, C] before a step."""
        H = self.weights.hidden
        self.state.copy_(state)
        self.stacked1[: -H - 1] = x
        self.stacked1[-H - 1 : -1] = self.h1
        self.stacked2[H:-1] = self.h2


class _Tape:
    """What one chunk's forward pass stores for its backward pass.

    Attributes:
        stacked1: [T + 1, K1, C], the columns [x; h1; 1] that the first layer's products take.
        stacked2: [T + 1, K2, C], the columns [h1; h2; 1] of the second layer's.
        cells: [2, T + 1, H, C], c of both layers before each step and after the last.
        gates: [2, T, 4H, C], sigmoids.
        half: [2, T, H, C], sigmoid(2c').
    """

    def __init__(self, weights: Weights, steps: int, size: int, like: Tensor) -> None:
        H, K1 = weights.hidden, weights.first.shape[1]
        self.weights, self.size, self.steps = weights, size, steps
        self.stacked1 = like.new_ones(steps + 1, K1, size)
        self.stacked2 = like.new_ones(steps + 1, 2 * H + 1, size)
        self.cells = like.new_empty(2, steps + 1, H, size)
        self.gates = like.new_empty(2, steps, 4 * H, size)
        self.half = like.new_empty(2, steps, H, size)
        self.dz = like.new_empty(4 * H, size)
        self.slope = like.new_empty(4 * H, size)

    def forward(self, x: Tensor, state: Tensor) -> None:
        """Run the inputs x [T, inputs, C] from a state [4H, C]."""
        H, inputs = self.weights.hidden, x.shape[1]
        h1, self.cells[0, 0], h2, self.cells[1, 0] = state.split(H)
        self.stacked1[0, inputs:-1] = h1
        self.stacked2[0, H:-1] = h2
        self.stacked1[:-1, :inputs] = x
        for t in range(self.steps):
            self.cells[:, t + 1] = self.cells[:, t]
            next1, next2 = self.stacked1[t + 1, inputs:-1], self.stacked2[t + 1, H:-1]
            _cell(self.weights.first, self.stacked1[t], self.cells[0, t + 1],
                  self.gates[0, t], self.half[0, t], next1)  # fmt: skip
            self.stacked2[t, :H] = next1
            _cell(self.weights.second, self.stacked2[t], self.cells[1, t + 1],
                  self.gates[1, t], self.half[1, t], next2)  # fmt: skip

    def add_backward(self, du: Tensor, total: tuple[Tensor, Tensor, Tensor]) -> None:
        """Adds the gradients of the sum of du [T, C] * u to total, from the last step back."""
        H, (first, second, output) = self.weights.hidden, total
        h2 = self.stacked2[1:, H:]  # [T, H + 1, C], with the row of ones
        output.add_(torch.einsum("thc,tc->h", h2, du))
        w = self.weights.output[0, :H, None]
        back1 = self.weights.first[:, -H - 1 : -1].t().contiguous()
        back2 = self.weights.second[:, :-1].t().contiguous()
        dc1, dc2, dh1 = (du.new_zeros(H, self.size) for _ in range(3))
        dh2 = du.new_zeros(H, self.size)
        for t in reversed(range(self.steps)):
            dh2 = torch.addcmul(dh2, w, du[t])
            dz = self._gate_gradients(1, t, dh2, dc2)
            second.addmm_(dz, self.stacked2[t].t())
            dh1_here, dh2 = torch.mm(back2, dz).split(H)
            dz = self._gate_gradients(0, t, dh1.add_(dh1_here), dc1)
            first.addmm_(dz, self.stacked1[t].t())
            dh1 = torch.mm(back1, dz)

    def _gate_gradients(self, layer: int, t: int, dh: Tensor, dc: Tensor) -> Tensor:
        """The gradient [4H, C] of a layer's products; dc [H, C] becomes that of c instead of c'."""
        gates, half = self.gates[layer, t], self.half[layer, t]
        if _compiled(gates):
            compiled_lstm.gate_gradients(gates, half, self.cells[layer, t], dh, dc, self.dz)
            return self.dz
        i, f, o, s = gates.chunk(4)
        by_i, by_f, by_o, by_s = self.dz.chunk(4)
        # tanh(c') = 2 half - 1, whose slope is 4 half (1 - half)
        slope = torch.addcmul(half, half, half, value=-1)
        dc.addcmul_(slope.mul_(o), dh, value=4)
        torch.mul(half, 2, out=by_o).sub_(1).mul_(dh)
        torch.mul(s, 2, out=by_i).sub_(1).mul_(dc)
        torch.mul(dc, self.cells[layer, t], out=by_f)
        torch.mul(dc, i, out=by_s).mul_(2)
        dc.mul_(f)
        return self.dz.mul_(torch.addcmul(gates, gates, gates, value=-1, out=self.slope))


def _compiled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _stacked(w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> Tensor:
    """[4H, inputs + H + 1] from torch's four tensors, whose gates are in the order i, f, g, o."""
    i, f, g, o = torch.cat([w_x, w_h, (b_x + b_h)[:, None]], 1).chunk(4)
    return torch.cat([i, f, o, 2 * g])


def _unstacked(gradient: Tensor, inputs: int, hidden: int) -> tuple[Tensor, ...]:
    i, f, o, g = gradient.chunk(4)
    w_x, w_h, b = torch.cat([i, f, 2 * g, o]).split([inputs, hidden, 1], 1)
    return w_x, w_h, b[:, 0], b[:, 0]
