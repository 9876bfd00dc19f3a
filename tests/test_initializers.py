"""What the initial distribution draws, and how its numbers are trained."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DOUBLE, assert_near

from initializers import (
    ABSENT,
    FIXED,
    SCALERS,
    TRAINABLE,
    GaussianInitializer,
    PerLayerInitializer,
    SpreadInitializer,
    fixed_initializer,
)
from models_fully_local import Activation, lateral_mlp

MODES = (TRAINABLE, FIXED, ABSENT)
ALL = dict.fromkeys("wbm", TRAINABLE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fake_model(**shapes):
    """A model of one layer that asks for tensors of these shapes."""
    layer = SimpleNamespace(parameter_shapes=lambda: shapes, constrain=lambda m: m)
    return SimpleNamespace(layers=[layer])


def set_to(initializer, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(initializer, name).fill_(value)
    return initializer


def test_the_formula_holds_with_its_scalers():
    initializer = set_to(
        GaussianInitializer(ALL, ALL).double(),
        mean_w=0.002, spread_w=0.003, mean_b=0.01, spread_b=0.02, mean_m=-0.03, spread_m=0.05,
    )  # fmt: skip
    (drawn,) = initializer(fake_model(w=(4, 9), b=(4,), m=(4, 4)), seeded(5))
    noise = seeded(5)
    n_w, n_b, n_m = (torch.randn(s, generator=noise, dtype=DOUBLE) for s in ((4, 9), (4,), (4, 4)))
    assert_near(drawn["w"], 1000 * (0.002 + 0.003 * n_w) / 3, 1e-14)
    assert_near(drawn["b"], 100 * (0.01 + 0.02 * n_b), 1e-14)
    assert_near(drawn["m"], 100 * (-0.03 + 0.05 * n_m), 1e-14)


def test_moments_of_many_draws_are_those_asked_for():
    initializer = set_to(
        GaussianInitializer(ALL, ALL).double(),
        mean_w=0.5 / 1000, spread_w=2 / 1000, mean_b=3 / 100, spread_b=0.5 / 100,
        mean_m=-1 / 100, spread_m=0.1 / 100,
    )  # fmt: skip
    model, generator = fake_model(w=(30, 25), b=(30,), m=(30, 30)), seeded()
    draws = [initializer(model, generator)[0] for _ in range(40)]
    expected = {"w": (0.5 / 5, 2 / 5), "b": (3.0, 0.5), "m": (-1.0, 0.1)}
    for name, (mean, spread) in expected.items():
        values = torch.stack([draw[name] for draw in draws]).detach()
        error = 5 * spread / math.sqrt(values.numel())
        assert values.mean().item() == pytest.approx(mean, abs=error)
        assert values.std().item() == pytest.approx(spread, abs=error)
    assert not torch.equal(draws[0]["w"], draws[1]["w"])


def test_means_start_at_zero_and_spreads_at_an_effective_one():
    initializer = GaussianInitializer(ALL, ALL)
    for name, value in initializer.effective().items():
        assert value == pytest.approx(0.0 if name.startswith("mean") else 1.0, rel=1e-6)
    assert set(initializer.effective()) == {f"{k}_{n}" for k in ("mean", "spread") for n in "wbm"}
    for name, scaler in SCALERS.items():
        assert getattr(initializer, f"spread_{name}").item() == pytest.approx(1 / scaler)


@pytest.mark.parametrize("kind", ["mean", "spread"])
@pytest.mark.parametrize("name", "wbm")
@pytest.mark.parametrize("mode", MODES)
def test_each_number_is_trainable_fixed_or_absent(kind, name, mode):
    modes = {name: mode}
    initializer = GaussianInitializer(*((modes, {}) if kind == "mean" else ({}, modes)))
    numbers = dict(initializer.named_parameters())
    assert list(numbers) == ([] if mode == ABSENT else [f"{kind}_{name}"])
    assert all(p.requires_grad == (mode == TRAINABLE) for p in numbers.values())
    (drawn,) = initializer(fake_model(w=(3, 2), b=(3,), m=(3, 3)), seeded())
    for tensor_name, tensor in drawn.items():
        follows = tensor_name == name and mode == TRAINABLE
        assert tensor.requires_grad == follows
        random = tensor_name == name and kind == "spread" and mode != ABSENT
        assert bool((tensor != 0).any()) == random


def test_everything_absent_is_zero():
    (drawn,) = GaussianInitializer({}, {})(fake_model(w=(3, 2), b=(3,), m=(3, 3)))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in drawn.values())


@pytest.mark.parametrize("bad", ["Trainable", "", None, 1.0])
def test_an_unknown_mode_is_refused_with_those_that_exist(bad):
    for modes in (({"w": bad}, {}), ({}, {"m": bad})):
        with pytest.raises(ValueError, match="use trainable, fixed, absent"):
            GaussianInitializer(*modes)


def test_gradients_reach_means_and_spreads():
    initializer = GaussianInitializer(ALL, ALL).double()
    (drawn,) = initializer(fake_model(w=(4, 9), b=(4,), m=(4, 4)), seeded(5))
    sum(t.sum() for t in drawn.values()).backward()
    noise = seeded(5)
    for name, scale, shape in (("w", 1000 / 3, (4, 9)), ("b", 100, (4,)), ("m", 100, (4, 4))):
        total = torch.randn(shape, generator=noise, dtype=DOUBLE).sum()
        assert_near(getattr(initializer, f"spread_{name}").grad, scale * total, 1e-12)
        count = torch.tensor(float(math.prod(shape)), dtype=DOUBLE)
        assert_near(getattr(initializer, f"mean_{name}").grad, scale * count, 1e-12)


def test_the_same_generator_gives_the_same_draw():
    initializer = GaussianInitializer(ALL, ALL)
    model = lateral_mlp(6, [4, 3], Activation())
    one, two, other = (initializer(model, seeded(seed)) for seed in (1, 1, 2))
    for a, b, c in zip(one, two, other, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not any(torch.equal(a[name], c[name]) for name in a)


def test_a_float32_draw_is_the_float64_draw_rounded():
    model = lateral_mlp(6, [4, 3], Activation())
    single = GaussianInitializer(ALL, ALL)(model, seeded())
    double = GaussianInitializer(ALL, ALL).double()(model, seeded())
    for a, b in zip(single, double, strict=True):
        for name in a:
            assert a[name].dtype == torch.float32 and b[name].dtype == DOUBLE
            assert_near(a[name], b[name].float(), 1e-6)


def test_layers_draw_independently():
    model = lateral_mlp(4, [4, 4], Activation())
    _, first, second = GaussianInitializer({}, {"w": FIXED})(model, seeded())
    assert not torch.equal(first["w"], second["w"])


def test_layers_without_parameters_get_none():
    params = GaussianInitializer(ALL, ALL)(lateral_mlp(6, [4, 3], Activation()), seeded())
    assert params[0] == {}
    shapes = [{name: tuple(t.shape) for name, t in layer.items()} for layer in params[1:]]
    assert shapes == [{"w": (4, 6), "b": (4,), "m": (4, 4)}, {"w": (3, 4), "b": (3,), "m": (3, 3)}]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_the_fan_in_of_a_convolution_is_inputs_times_kernel(fan_out, fan_in, height, width):
    initializer = GaussianInitializer({}, {"w": FIXED}).double()
    (drawn,) = initializer(fake_model(w=(fan_out, fan_in, height, width)), seeded(3))
    noise = torch.randn((fan_out, fan_in, height, width), generator=seeded(3), dtype=DOUBLE)
    assert_near(drawn["w"], noise / math.sqrt(fan_in * height * width), 1e-6)


@pytest.mark.parametrize("no_self", [False, True])
@pytest.mark.parametrize("no_excitation", [False, True])
def test_what_a_layer_forbids_is_not_drawn(no_self, no_excitation):
    model = lateral_mlp(
        4, [6], Activation(), forbid_self_inhibition=no_self, forbid_excitation=no_excitation
    )
    initializer = GaussianInitializer({}, {"m": TRAINABLE})
    m = initializer(model, seeded())[1]["m"]
    assert bool((m.diagonal() == 0).all()) == no_self
    assert bool((m <= 0).all()) == no_excitation
    assert m.requires_grad


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([f"{kind}_{name}" for kind in ("mean", "spread") for name in "wbm"]),
        st.floats(-100, 100, width=32),
        min_size=1,
    )
)
def test_an_initializer_is_rebuilt_exactly_from_its_effective_numbers(numbers):
    modes = {"mean": {}, "spread": {}}
    for name in numbers:
        kind, parameter = name.split("_")
        modes[kind][parameter] = TRAINABLE
    trained = set_to(GaussianInitializer(modes["mean"], modes["spread"]), **numbers)
    rebuilt = GaussianInitializer.with_values(trained.effective()).to(torch.float32)
    assert rebuilt.effective() == trained.effective()
    assert not any(p.requires_grad for p in rebuilt.parameters())
    model = lateral_mlp(6, [4, 3], Activation())
    for a, b in zip(trained(model, seeded()), rebuilt(model, seeded()), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["means_w", "w", "mean_q", "mean", ""])
def test_numbers_of_other_names_are_refused(name):
    with pytest.raises(ValueError, match="mean"):
        GaussianInitializer.with_values({name: 1.0})


def test_a_spread_moves_on_a_logarithmic_scale_and_all_else_starts_at_0():
    initializer = set_to(SpreadInitializer(0.2).double(), moved=-1.5)
    (drawn,) = initializer(fake_model(w=(4, 3, 3), b=(4,), m=(4, 4)), seeded(5))
    spread = 0.2 * math.exp(-0.45)
    noise = torch.randn(4, 3, 3, generator=seeded(5), dtype=DOUBLE)
    assert_near(drawn["w"], spread / 3 * noise, 1e-14)
    assert not drawn["b"].any() and not drawn["m"].any()
    assert initializer.effective() == {"spread_w": pytest.approx(spread)}
    (gradient,) = torch.autograd.grad(drawn["w"].sum(), [initializer.moved])
    assert_near(gradient, 0.3 * drawn["w"].sum().detach(), 1e-12)


def test_a_spread_that_was_written_down_draws_the_same_again():
    model = lateral_mlp(5, [3, 2], Activation())
    initializer = set_to(SpreadInitializer(0.2), moved=0.7)
    read = SpreadInitializer.with_values(initializer.effective()).float()
    other = SpreadInitializer()
    other.set_values(initializer.effective())
    assert not list(filter(lambda p: p.requires_grad, read.parameters()))
    for drawn in (read(model, seeded(3)), other(model, seeded(3))):
        for layer, expected in zip(drawn, initializer(model, seeded(3)), strict=True):
            assert all(torch.equal(layer[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="must be > 0"):
        SpreadInitializer(0.0)


def test_each_layer_has_an_initializer_of_its_own_and_further_ones_the_last():
    model = lateral_mlp(5, [3, 2, 4], Activation())
    parts = [SpreadInitializer(0.2), GaussianInitializer({}, {"w": TRAINABLE})]
    initializer = PerLayerInitializer(parts)
    initializer.set_values({"spread_w": 0.3})
    assert initializer.effective() == pytest.approx({"1/spread_w": 0.3, "2/spread_w": 0.3})
    initializer.set_values({"1/spread_w": 0.3, "2/spread_w": 0.1})
    drawn, generator = initializer(model, seeded(4)), seeded(4)
    assert [set(layer) for layer in drawn] == [set(), *[{"w", "b", "m"}] * 3]
    for layer, fan_in, spread in zip(drawn[1:], (5, 3, 2), (0.3, 0.1, 0.1), strict=True):
        noise = torch.randn(layer["w"].shape, generator=generator, dtype=torch.float64)
        assert_near(layer["w"].detach().double(), spread / fan_in**0.5 * noise, 1e-6)


def test_fixed_numbers_are_read_for_all_layers_or_for_each():
    model = lateral_mlp(5, [3, 2], Activation())
    for part in (SpreadInitializer(0.2), GaussianInitializer({"b": TRAINABLE}, {"w": TRAINABLE})):
        for initializer in (part, PerLayerInitializer([SpreadInitializer(0.4), part])):
            read = fixed_initializer(initializer.effective()).float()
            assert not list(filter(lambda p: p.requires_grad, read.parameters()))
            for layer, expected in zip(
                read(model, seeded(3)), initializer(model, seeded(3)), strict=True
            ):
                assert all(torch.equal(layer[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="parameters are w, b, m"):
        fixed_initializer({"1/spread_v": 1.0})


def test_a_saved_state_holds_the_spread_that_was_taken_over():
    taken, resumed = SpreadInitializer(), SpreadInitializer()
    taken.set_values({"spread_w": 0.4})
    resumed.load_state_dict(taken.state_dict())
    assert resumed.effective() == taken.effective() == {"spread_w": pytest.approx(0.4)}
