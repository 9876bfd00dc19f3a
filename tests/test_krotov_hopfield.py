"""Both layers against an update spelled out patch by patch, unit by unit."""

import copy
import math

import numpy as np
import pytest
import torch
from commands import refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import competing_layers
from krotov_hopfield import (
    BioConv2d,
    BioLinear,
    Competition,
    CompetitionError,
    Triangle,
    exponential_rate,
)
from krotov_hopfield import layers as krotov_hopfield

GATES = ("ranked", "losers", "soft", "winner")
DOUBLE = {"dtype": torch.float64}


# ---- the oracle: one patch after the other, in the words of the paper ----


def gates_of(currents: np.ndarray, competition: Competition) -> np.ndarray:
    """g of one sample; sorting is stable, so that of equal currents the first is the larger."""
    order = np.argsort(-currents, kind="stable")
    delta, g = float(competition.delta), np.zeros(len(currents))
    if competition.gate == "soft":
        share = np.exp(competition.inverse_temperature * (currents - currents.max()))
        g = -share / share.sum()
        g[order[0]] *= -1
        return g
    if competition.gate == "losers":
        g[:] = -delta
    if competition.gate == "ranked":
        g[order[competition.ranking_param - 1]] = -delta
    g[order[0]] = 1
    return g


def changed(rows: np.ndarray, patches: np.ndarray, layer, rate: float) -> np.ndarray:
    """Weights [O, N] of units that compete, biases as a last column, after these patches [S, N]."""
    p = layer.lebesgue_p
    change = np.zeros_like(rows)
    for v in patches:
        currents = (np.sign(rows) * np.abs(rows) ** (p - 1)) @ v
        g = gates_of(currents, layer.competition)
        for o in range(len(rows)):
            change[o] += g[o] * (v - currents[o] * rows[o])
    return change


def patches_of(x: torch.Tensor, layer: BioConv2d) -> torch.Tensor:
    """[groups, samples, N] of images behind the batch norm, padded as nn.Conv2d pads."""
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    else:
        down, across = (0, 0) if layer.padding == "valid" else layer.padding
        sides = [across, across, down, down]
    x = nn.functional.pad(x, sides, mode)
    columns = nn.functional.unfold(
        x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )
    return torch.stack([part.transpose(1, 2).flatten(0, 1) for part in
                        columns.chunk(layer.groups, 1)])  # fmt: skip


def expected(layer, x: torch.Tensor, rate: float) -> tuple[np.ndarray, float]:
    """The rows of weights (and biases) after a step, and its convergence."""
    x = x.double()
    if layer.batch_norm is not None:
        over = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        x = (x - mean) / (variance + layer.batch_norm.eps).sqrt()
    groups = getattr(layer, "groups", 1)
    patches = x[None] if isinstance(layer, BioLinear) else patches_of(x, layer)
    rows = layer.weight.double().reshape(len(layer.weight), -1)
    if layer.bias is not None:
        rows = torch.cat([rows, layer.bias.double()[:, None]], 1)
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
    rows, patches = rows.numpy(), patches.numpy()
    change = np.concatenate([
        changed(part, v, layer, rate)
        for part, v in zip(np.split(rows, groups), patches, strict=True)
    ])  # fmt: skip
    largest = np.abs(change).max(1, keepdims=True)
    if layer.normalization != "filter":
        largest[:] = largest.max()
    if layer.normalization == "clamp":
        assume(largest.min() > 1e-9)  # a change of 0 would be its rounding error, blown up
    scale = np.maximum(largest, 1e-30) if layer.normalization == "clamp" else largest + 1e-5
    if layer.rate_exponent is not None:
        radius = np.linalg.norm(layer.weight.double().flatten(1).numpy(), axis=1)
        rate = rate * np.abs(radius[:, None] - 1) ** layer.rate_exponent
    new = rows + rate * change / scale
    return new, np.abs((np.abs(new) ** layer.lebesgue_p).sum(1) - 1).max()


def rows_of(layer) -> np.ndarray:
    rows = layer.weight.double().reshape(len(layer.weight), -1)
    if layer.bias is not None:
        rows = torch.cat([rows, layer.bias.double()[:, None]], 1)
    return rows.numpy()


def assert_step_is_expected(layer, x, rate: float = 0.1, tolerance: float = 1e-10) -> None:
    want, convergence = expected(layer, x, rate)
    got = layer.training_step(x, rate)
    np.testing.assert_allclose(rows_of(layer), want, rtol=tolerance, atol=tolerance)
    assert got.item() == pytest.approx(convergence, rel=10 * tolerance, abs=tolerance)


def noise(*shape, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(layer, seed: int = 1):
    layer.reset_parameters(torch.Generator().manual_seed(seed), spread=0.7)
    return layer


@pytest.fixture(params=["compiled", "products", "patches"])
def way(request, monkeypatch) -> str:
    """All ways to the update: loops where they apply, convolutions, products with patches."""
    if request.param != "compiled":
        monkeypatch.setattr(krotov_hopfield, "COMPILED_TYPES", ())
    if request.param == "patches":
        take_patches(monkeypatch)
    return request.param


def take_patches(patch: pytest.MonkeyPatch) -> None:
    """Let convolutions learn by products with patches, as on a GPU."""
    patch.setattr(BioConv2d, "_takes_patches", lambda self, x: self.groups == 1)
    patch.setattr(krotov_hopfield, "SHORTEST_PART", 2)


# ---- the update ----

PAIRS = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))


@st.composite
def convolutions(draw) -> tuple[BioConv2d, torch.Tensor]:
    """Any layer that nn.Conv2d allows, and images that fit it."""
    groups, rivals = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    channels = groups * draw(st.integers(1, 2))
    kernel, dilation = draw(PAIRS), draw(PAIRS)
    stride = draw(PAIRS)
    padding = draw(st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)),
                             st.sampled_from(["valid", "same"])))  # fmt: skip
    if padding == "same":
        stride = 1
    layer = BioConv2d(
        channels, groups * rivals, kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        lebesgue_p=draw(st.sampled_from([1.5, 2, 2.5, 3, 4, 8])),
        ranking_param=draw(st.integers(2, rivals)), delta=draw(st.floats(0, 0.5)),
        gate=draw(st.sampled_from(GATES)), inverse_temperature=draw(st.floats(0.1, 3)),
        normalization=draw(st.sampled_from(["matrix", "filter", "clamp"])),
        rate_exponent=draw(st.sampled_from([None, 0.5])), batch_norm=draw(st.booleans()), **DOUBLE,
    )  # fmt: skip
    span = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    size = [max(3, n + draw(st.integers(0, 3))) for n in span]  # reflection needs more than 2
    x = noise(draw(st.integers(1, 3)), channels, *size, seed=draw(st.integers(0, 10)))
    if draw(st.booleans()):  # the same numbers, not one after the other in memory
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return seeded(layer, draw(st.integers(0, 10))), x


@settings(max_examples=100, deadline=None)
@given(convolutions())
def test_a_step_of_any_convolution_is_the_sum_over_its_patches(given_):
    layer, x = given_
    if layer.batch_norm is not None and x.numel() == x.shape[1]:
        return  # one number per channel: see the test of a batch without variance
    other = copy.deepcopy(layer)
    assert_step_is_expected(layer, x)
    expected_rows = rows_of(layer)
    third = copy.deepcopy(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(krotov_hopfield, "COMPILED_TYPES", ())
        other.training_step(x, 0.1)
        take_patches(patch)
        third.training_step(x, 0.1)
    np.testing.assert_allclose(rows_of(other), expected_rows, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(rows_of(third), expected_rows, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_step_of_any_fully_connected_layer_is_the_sum_over_its_samples(data):
    inputs, units = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))
    layer = BioLinear(
        inputs, units, data.draw(st.booleans()), data.draw(st.floats(0, 0.5)),
        data.draw(st.integers(2, units)), data.draw(st.sampled_from([1, 1.5, 2, 3, 5])), **DOUBLE,
        gate=data.draw(st.sampled_from(GATES)),
        normalization=data.draw(st.sampled_from(["matrix", "filter", "clamp"])),
        rate_exponent=data.draw(st.sampled_from([None, 0.5])),
        batch_norm=data.draw(st.booleans()),
    )  # fmt: skip
    x = noise(data.draw(st.integers(2, 7)), inputs, seed=data.draw(st.integers(0, 10)))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(krotov_hopfield, "COMPILED_TYPES", ())
        assert_step_is_expected(seeded(layer), x)


@pytest.mark.parametrize("gate", GATES)
def test_steps_in_float32_are_those_in_float64_up_to_rounding(gate, way):
    single = seeded(BioConv2d(3, 8, 3, 2, 3, 0.2, padding=1, gate=gate, dtype=torch.float32))
    layer = copy.deepcopy(single).double()
    x = noise(2, 3, 6, 6, dtype=torch.float32)
    assert single.training_step(x, 0.05).dtype == torch.float32
    layer.training_step(x.double(), 0.05)
    assert single.weight.dtype == torch.float32
    np.testing.assert_allclose(rows_of(single), rows_of(layer), rtol=1e-4, atol=1e-5)


def test_equal_currents_are_ranked_by_the_index_of_their_unit(way):
    layer = BioLinear(2, 6, False, 0.5, 3, 2, **DOUBLE, batch_norm=False)
    layer.weight.copy_(torch.tensor([[1.0, 0], [2, 0], [1, 1], [2, 1], [2, 2], [1, 0]]))
    before = layer.weight.clone()
    layer.training_step(torch.tensor([[1.0, 0.0]], **DOUBLE), 0.1)
    moved = (layer.weight != before).any(1)
    assert moved.tolist() == [False, True, False, False, True, False]  # first and third of 1, 3, 4


@pytest.mark.parametrize("k", [2, 3, 4])
def test_units_that_see_nothing_keep_their_weights(k, way):
    layer = seeded(BioConv2d(1, 4, 2, ranking_param=k, batch_norm=False, **DOUBLE))
    before = layer.weight.clone()
    layer.training_step(torch.zeros(2, 1, 3, 3, **DOUBLE), 0.5)
    assert torch.equal(layer.weight, before)


def test_units_that_never_come_first_or_kth_are_not_touched(way):
    layer = seeded(BioLinear(50, 300))
    before = layer.weight.clone()
    x = noise(5, 50, dtype=torch.float32)
    layer.training_step(x, 0.1)
    assert 2 <= (layer.weight != before).any(1).sum() <= 10


@pytest.mark.parametrize("p", [2, 3, 4.5])
def test_a_unit_at_rest_has_p_norm_1(p, way):
    layer = BioLinear(8, 2, False, 0.0, 2, p, **DOUBLE, batch_norm=False, normalization="clamp")
    seeded(layer)
    x = torch.cat([noise(20, 8, seed=3) + 2, noise(20, 8, seed=4) - 2])
    for step in range(1000):
        convergence = layer.training_step(x, 0.05 * 0.99**step)
    assert convergence < 1e-3
    np.testing.assert_allclose((layer.weight.abs() ** p).sum(1), 1, atol=1e-3)


def test_a_batch_without_variance_is_normalised_by_the_running_statistics(way):
    layer = seeded(BioLinear(5, 4, **DOUBLE))
    for seed in range(3):
        layer.training_step(3 + noise(20, 5, seed=seed), 0.1)
    statistics = copy.deepcopy(layer.batch_norm.state_dict())
    plain = BioLinear(5, 4, batch_norm=False, **DOUBLE)
    plain.weight.copy_(layer.weight)
    x = noise(1, 5, seed=9)
    norm = layer.batch_norm
    behind = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    layer.training_step(x, 0.1)
    assert_step_is_expected(plain, behind)
    np.testing.assert_allclose(layer.weight, plain.weight, atol=1e-12)
    for name, value in layer.batch_norm.state_dict().items():
        assert torch.equal(value, statistics[name])


def test_the_running_statistics_are_those_of_a_batch_norm_that_saw_the_same_batches():
    layer, norm = BioConv2d(3, 4, 3), nn.BatchNorm2d(3, affine=False)
    for seed in range(4):
        x = 2 + 3 * noise(5, 3, 6, 6, seed=seed, dtype=torch.float32)
        layer.training_step(x)
        norm(x)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(layer.batch_norm.state_dict()[name], value)
    norm.eval()
    x = noise(2, 3, 6, 6, dtype=torch.float32)
    power = layer.weight * layer.weight.abs()
    torch.testing.assert_close(layer(x), nn.functional.conv2d(norm(x), power), rtol=1e-4, atol=1e-4)


def test_forward_uses_the_signed_power_of_weights_and_biases():
    layer = seeded(BioLinear(4, 3, True, lebesgue_p=4, **DOUBLE, batch_norm=False))
    x = noise(2, 2, 2)
    power = layer.weight.sign() * layer.weight.abs() ** 3
    bias = layer.bias.sign() * layer.bias.abs() ** 3
    torch.testing.assert_close(layer(x), x.flatten(1) @ power.T + bias)


def test_the_gradient_by_the_input_passes_through_forward():
    layer = seeded(BioConv2d(2, 4, 3, padding="same", padding_mode="reflect", **DOUBLE))
    x = noise(1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_step_takes_inputs_that_need_a_gradient_and_leaves_them_without_one(way):
    layer = seeded(BioLinear(4, 3, batch_norm=False, **DOUBLE))
    x = noise(5, 4).requires_grad_()
    other = copy.deepcopy(layer)
    layer.training_step(x)
    other.training_step(x.detach())
    assert torch.equal(layer.weight, other.weight) and x.grad is None


def test_a_step_between_forward_and_backward_is_an_error_as_for_any_change_in_place(way):
    for bias in (False, True):  # with p = 2 the graph of forward keeps the weights themselves
        layer = seeded(BioLinear(4, 3, bias, lebesgue_p=2, batch_norm=False))
        y = layer(noise(5, 4, dtype=torch.float32).requires_grad_())
        layer.training_step(noise(5, 4, dtype=torch.float32))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("gate", ["ranked", "soft"])
def test_autocast_leaves_a_step_in_the_type_of_the_weights(gate, way):
    layer = seeded(BioConv2d(2, 4, 3, gate=gate))
    x, other = noise(2, 2, 5, 5, dtype=torch.float32), copy.deepcopy(layer)
    layer.training_step(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert other.training_step(x.bfloat16()).dtype == torch.float32
    assert torch.equal(layer.weight, other.weight)


def test_a_layer_shows_what_acts_in_it_and_where_it_departs_from_its_default():
    assert BioLinear(3, 4).extra_repr() == (
        "in_features=3, out_features=4, bias=False, lebesgue_p=3, gate='ranked', "
        "ranking_param=2, delta=0.05, normalization='matrix'"
    )
    shown = repr(BioConv2d(3, 4, 3, gate="soft", rate_exponent=0.5, batch_norm=False))
    assert "gate='soft', inverse_temperature=1.0, normalization='filter'" in shown
    assert "rate_exponent=0.5, batch_norm=False" in shown
    assert "delta" not in shown and "ranking_param" not in shown
    layer = BioLinear(3, 4, delta=0.2, ranking_param=3)
    assert (layer.delta, layer.ranking_param) == (0.2, 3)


def test_the_output_of_a_convolution_has_its_channels_last_in_memory():
    y = BioConv2d(3, 4, 3)(torch.zeros(2, 3, 6, 6))
    assert y.shape == (2, 4, 4, 4) and y.is_contiguous(memory_format=torch.channels_last)


def test_no_step_waits_for_the_device_and_none_needs_data_to_know_its_shapes():
    for gate in GATES:  # tensors on "meta" have shapes and no numbers: to ask for one is an error
        layer = BioConv2d(3, 8, 3, padding=1, groups=1, bias=True, device="meta", gate=gate)
        convergence = layer.training_step(torch.empty(4, 3, 8, 8, device="meta"), 0.1)
        assert convergence.shape == () and convergence.device.type == "meta"
        dense = BioLinear(12, 8, device="meta", gate=gate)
        assert dense.training_step(torch.empty(4, 12, device="meta")).shape == ()


@pytest.mark.parametrize("gate", ["ranked", "soft"])
def test_a_step_holds_no_tensor_larger_than_its_output_and_input_together(gate, way):
    layer = BioConv2d(4, 6, 5, padding=2, gate=gate)
    x = noise(8, 4, 16, 16, dtype=torch.float32)
    limit = x.numel() + 8 * 6 * 16 * 16
    if way == "patches":  # which are stored
        limit = 8 * 16 * 16 * 5 * 5 * 4

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.seen = max(self.seen, tensor.numel())
            return result

    with Largest() as largest:
        layer.training_step(x, 0.1)
    assert 0 < largest.seen <= limit


def test_layers_are_saved_loaded_and_copied_like_those_of_torch(tmp_path):
    layer = seeded(BioConv2d(2, 6, 3, padding=1))
    x = noise(3, 2, 5, 5, dtype=torch.float32)
    layer.training_step(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = BioConv2d(2, 6, 3, padding=1)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    row_major = copy.deepcopy(other)
    row_major.weight.data = row_major.weight.data.contiguous()
    for each in (layer, other, row_major):
        each.training_step(x)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer(x), other(x))
    torch.testing.assert_close(row_major.weight, layer.weight)
    assert set(layer.state_dict()) == {
        "weight", "batch_norm.running_mean", "batch_norm.running_var",
        "batch_norm.num_batches_tracked",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(way):
    def trained() -> torch.Tensor:
        layer = seeded(BioConv2d(2, 6, 3))
        for seed in range(5):
            layer.training_step(noise(3, 2, 7, 7, seed=seed, dtype=torch.float32), 0.1)
        return layer.weight

    assert torch.equal(trained(), trained())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking_param": 1}, "from 2, the runner-up, to 4"),
        ({"ranking_param": 5}, "from 2, the runner-up, to 4"),
        ({"ranking_param": 2.5}, "whole number"),
        ({"gate": "loudest"}, "choose from ranked, losers, soft, winner"),
        ({"lebesgue_p": 0.5}, "at least 1"),
        ({"lebesgue_p": math.nan}, "at least 1"),
        ({"lebesgue_p": "a"}, "at least 1"),
        ({"delta": math.nan}, "delta is nan: it must be a finite number"),
        ({"gate": "soft", "inverse_temperature": math.nan}, "finite number above 0"),
        ({"gate": "soft", "inverse_temperature": -1.0}, "finite number above 0"),
        ({"rate_exponent": -1.0}, "rate_exponent is -1.0: it must be a finite number of at least"),
        ({"rate_exponent": math.nan}, "finite number of at least 0"),
        ({"normalization": "none"}, "choose from matrix, filter, clamp"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_would(options, message):
    with pytest.raises(CompetitionError, match=message):
        BioLinear(3, 4, **options)
    with pytest.raises(CompetitionError, match=message):
        BioConv2d(4, 8, 3, groups=2, **options)


def test_whole_numbers_and_numbers_of_any_kind_are_taken():
    options = {"ranking_param": np.int64(2), "delta": np.float32(0.5), "lebesgue_p": np.float64(2)}
    layer, same = BioLinear(3, 4, **options), BioLinear(3, 4, False, 0.5, 2, 2)
    for each in (layer, same):
        seeded(each).training_step(noise(5, 3, dtype=torch.float32))
    assert torch.equal(layer.weight, same.weight)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (BioConv2d(2, 4, 5), torch.ones(2, 2, 4, 4), "smaller than the kernel's window"),
        (BioConv2d(2, 4, 3, padding=(1, 4), padding_mode="reflect"), torch.ones(2, 2, 4, 4),
         r"\[4, 4\] pixels are too small for \[1, 4\] pixels of padding by padding_mode 'reflect'"),
        (BioConv2d(2, 4, 3, padding=5, padding_mode="circular"), torch.ones(2, 2, 4, 6),
         "by padding_mode 'circular'"),
        (BioConv2d(2, 4, 3), torch.ones(2, 2, 4, 4).double(), "torch.float32, as the weights, got"),
        (BioLinear(3, 4), torch.ones(5, 3).long(), "torch.float32, as the weights, got"),
        (BioLinear(3, 4, dtype=torch.float64), torch.ones(5, 3), "torch.float64, as the weights"),
    ],
)  # fmt: skip
def test_a_refused_step_leaves_the_layer_as_it_was(layer, x, message, way):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(CompetitionError, match=message):
        layer.training_step(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_inputs_of_another_shape_are_refused_with_the_shape_expected():
    dense, convolution = BioLinear(6, 3), BioConv2d(2, 4, 3)
    for x in (torch.zeros(2, 5), torch.zeros(6)):
        with pytest.raises(CompetitionError, match="6 features"):
            dense.training_step(x)
    with pytest.raises(CompetitionError, match=r"\[batch, 2, H, W\]"):
        convolution(torch.zeros(2, 3, 5, 5))
    with pytest.raises(CompetitionError, match="smaller than the kernel"):
        convolution(torch.zeros(2, 2, 2, 5))
    with pytest.raises(CompetitionError, match="batch is empty"):
        dense.training_step(torch.zeros(0, 6))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", 1], "from 2, the runner-up, to 96"),
        (["--p", 0.5], "at least 1"),
        (["--p", 0], "above 0"),
        (["--repeat", 0], "at least 1"),
        (["--threads", 0], "at least 1"),
    ],
)
def test_the_benchmark_refuses_wrong_input_in_one_line(capsys, flags, message):
    assert message in refused(capsys, competing_layers.main, *flags)


# ---- activation and rate ----


def test_triangle_is_what_exceeds_the_mean_over_channels_to_a_power():
    u = noise(2, 3, 4, 5)
    for power in (1.0, 0.7, 2.0):
        y = Triangle(power)(u)
        for b, i, j in ((0, 0, 0), (1, 3, 4)):
            mean = u[b, :, i, j].mean()
            want = [max(0.0, (v - mean).item()) ** power for v in u[b, :, i, j]]
            np.testing.assert_allclose(y[b, :, i, j], want)


def test_the_exponential_rate_goes_from_start_towards_end():
    assert exponential_rate(0.1, 0.01, 2.0, 0) == pytest.approx(0.1)
    assert exponential_rate(0.1, 0.01, 2.0, 1) == pytest.approx(0.01 + 0.09 * math.exp(-2))
    assert exponential_rate(0.1, 0.01, 2.0, 50) == pytest.approx(0.01)


def test_another_default_device_leaves_the_draws_on_the_cpu():
    layer = BioConv2d(2, 3, 3)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    expected = layer.weight.clone()
    with torch.device("meta"):
        layer.reset_parameters(torch.Generator().manual_seed(0))
        BioLinear(2, 3, device="cpu").reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight, expected)
