"""The fused LSTM over coordinates against torch.nn.LSTM and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learned_optimizer import coordinate_lstm
from learned_optimizer.coordinate_lstm import Weights, sequence_gradient, step_


def draw(hidden: int, inputs: int, columns: int, steps: int, dtype=torch.float64, seed=0):
    """Modules, inputs [T, inputs, n], a state [4H, n] and du [T, n]."""
    torch.manual_seed(seed)
    lstm, output = nn.LSTM(inputs, hidden, 2).to(dtype), nn.Linear(hidden, 1).to(dtype)
    x = 2 * torch.randn(steps, inputs, columns, dtype=dtype)
    state = torch.randn(4 * hidden, columns, dtype=dtype)
    return lstm, output, x, state, torch.randn(steps, columns, dtype=dtype)


def by_torch(lstm, output, x, state):
    """u [T, n] by torch.nn.LSTM with the coordinates as its batch."""
    h1, c1, h2, c2 = (t.t() for t in state.chunk(4))
    return output(lstm(x.transpose(1, 2), (torch.stack([h1, h2]), torch.stack([c1, c2])))[0])[
        ..., 0
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)
)
def test_sequence_gradient_is_autograds_through_torchs_lstm(hidden, inputs, columns, steps, chunk):
    lstm, output, x, state, du = draw(hidden, inputs, columns, steps)
    weights = Weights.of(lstm, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinate_lstm, "SEQUENCE_CHUNK", {"cpu": chunk})
        found = weights.gradients_by_module(*sequence_gradient(weights, x, state, du))
    loss = (by_torch(lstm, output, x, state) * du).sum()
    expected = torch.autograd.grad(loss, [*lstm.parameters(), *output.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [3, 4, 1000])
def test_steps_in_place_are_those_of_torchs_lstm_in_chunks_of_any_size(monkeypatch, chunk):
    lstm, output, x, state, _ = draw(5, 2, 10, 6)
    monkeypatch.setattr(coordinate_lstm, "STEP_CHUNK", {"cpu": chunk})
    expected = by_torch(lstm, output, x, state)
    weights = Weights.of(lstm, output)
    u = torch.stack([step_(weights, now, state) for now in x])
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_the_compiled_cell_agrees_with_torchs_operations_also_where_gates_saturate(scale):
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(4 * 7, 33, generator=generator)
    c = 2 * torch.randn(7, 33, generator=generator)
    i, f, o, s = z.double().sigmoid().chunk(4)
    next_c = f * c.double() + i * (2 * s - 1)
    half, h = torch.empty_like(c), torch.empty_like(c)
    coordinate_lstm.compiled_lstm.cell_(z, c, half, h)
    for ours, exact in (
        (z, torch.cat([i, f, o, s])),
        (c, next_c),
        (half, (2 * next_c).sigmoid()),
        (h, o * next_c.tanh()),
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)


def test_float32_gradients_are_those_of_float64_up_to_rounding():
    lstm, output, x, state, du = draw(20, 2, 300, 20)
    exact = sequence_gradient(Weights.of(lstm, output), x, state, du)
    single = sequence_gradient(
        Weights.of(lstm.float(), output.float()), x.float(), state.float(), du.float()
    )
    for rounded, reference in zip(single, exact, strict=True):
        assert (rounded - reference).norm() < 2e-6 * reference.norm()
