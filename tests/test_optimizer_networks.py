"""The networks of learned optimisers: their inputs, sizes."""

import math

import pytest
import torch

from learned_optimizer import (
    EXTRA_INPUTS,
    CoordinateLSTM,
    CoordinateMLP,
    OptimizerError,
    make_network,
)
from learned_optimizer.networks import log_and_sign

SIZES = [6, 1, 3]


def run(network, steps=4, dtype=torch.float64):
    """Inputs, memories and theta of a few steps on random gradients."""
    network = network.to(dtype)
    torch.manual_seed(3)
    n, theta = sum(SIZES), torch.randn(sum(SIZES), dtype=dtype)
    memory, seen = network.memory(n, theta), []
    for _ in range(steps):
        x, memory = network.observe(torch.randn(n, dtype=dtype), theta, memory, SIZES)
        seen.append((x, memory))
        u, memory = network(x, memory)
        theta = (theta + network.out_mul * u).detach()
    return seen


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_lstm_has_the_published_number_of_weights():
    assert count(CoordinateLSTM()) == 5301
    assert count(CoordinateLSTM(preprocess=False)) == 5221


def test_gradients_become_a_logarithm_and_a_sign_or_if_small_a_scaled_value():
    g = torch.tensor([1.0, -math.exp(-5), 0.0, math.exp(-11), -1e-30], dtype=torch.float64)
    logarithm, sign = log_and_sign(g)
    torch.testing.assert_close(logarithm[:2], torch.tensor([0.0, -0.5]).double(), atol=1e-6, rtol=0)
    assert logarithm[2:].tolist() == [-1.0, -1.0, -1.0]
    expected = torch.tensor([1.0, -1.0, 0.0, math.exp(-1), -1e-30 * math.exp(10)])
    torch.testing.assert_close(sign, expected.double(), rtol=1e-7, atol=0)


def test_the_factor_of_the_preprocessing_may_be_another():
    network, g = CoordinateLSTM(preprocess_factor=5.0), torch.tensor([1.0, -1e-2, 1e-3])
    (logarithm, sign), _ = network.observe(g, g, network.memory(3, g), [3])
    torch.testing.assert_close(logarithm, torch.tensor([0.0, math.log(1e-2) / 5, -1.0]))
    torch.testing.assert_close(sign, torch.tensor([1.0, -1.0, 1e-3 * math.exp(5)]))
    assert CoordinateLSTM().settings == CoordinateLSTM(preprocess_factor=10.0).settings


@pytest.mark.parametrize("extra", [(), ("time",), ("relative_update",), EXTRA_INPUTS])
@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_a_step_in_place_is_the_differentiable_one(kind, extra):
    if kind == "mlp" and extra:
        pytest.skip("the MLP has its own inputs")
    network = make_network(kind, 1, **({"extra_inputs": extra} if kind == "lstm" else {}))
    for x, memory in run(network):
        u, following = network(x, memory)
        in_place = memory.clone()
        torch.testing.assert_close(network.step_(x, in_place), u, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(in_place, following, rtol=1e-12, atol=1e-14)


def test_extra_inputs_are_time_the_relative_change_and_the_parameter():
    network = CoordinateLSTM(extra_inputs=EXTRA_INPUTS).double()
    theta = torch.arange(1.0, 11.0, dtype=torch.float64)
    g, memory = torch.ones(10).double(), network.memory(10, theta)
    x, memory = network.observe(g, theta, memory, SIZES)
    assert torch.equal(x[3], -torch.ones(10).double())  # nothing is known yet
    x, _ = network.observe(g, theta * 1.1, memory, SIZES)
    time, change, parameter = x[2:]
    assert torch.equal(parameter, theta * 1.1)
    torch.testing.assert_close(time, torch.full_like(time, math.tanh(1 / 100)))
    torch.testing.assert_close(change, torch.full_like(change, math.log(0.1 / 1.1) / 10))


def test_the_mlps_inputs_do_not_depend_on_the_scale_of_gradients_and_parameters():
    network = CoordinateMLP().double()
    g, theta = torch.randn(10).double(), torch.randn(10).double()
    x, _ = network.observe(g, theta, network.memory(10, g), SIZES)
    scaled, _ = network.observe(1e-3 * g, 50 * theta, network.memory(10, g), SIZES)
    torch.testing.assert_close(x, scaled, rtol=1e-6, atol=1e-8)


def test_a_huge_gradient_leaves_the_mlps_averages_finite():
    network = CoordinateMLP()
    g = torch.full((10,), 1e25)
    x, memory = network.observe(g, torch.ones(10), network.memory(10, g), SIZES)
    assert memory.isfinite().all() and torch.equal(x[0], torch.ones(10))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 0},
        {"hidden": 2.5},
        {"out_mul": 0.0},
        {"out_mul": math.inf},
        {"extra_inputs": ["x"]},
        {"preprocess_factor": 0.0},
        {"preprocess_factor": math.nan},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(OptimizerError):
        make_network("lstm", 0, **settings)


def test_an_input_given_twice_is_told_as_such():
    with pytest.raises(OptimizerError, match="at most once, got time, time"):
        CoordinateLSTM(extra_inputs=["time", "time"])


def test_the_same_seed_draws_the_same_weights_and_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    first, same, other = (make_network("lstm", seed).output.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
