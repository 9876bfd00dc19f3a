"""Lateral-inhibitory layers against a loop written by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    SIGMAS,
    assert_near,
    gradients,
    lateral_loop,
    layer_response,
    normal,
    weighted_sum,
)
from torch import nn

from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import PolynomialRule
from models_fully_local import (
    INHIBITION,
    Activation,
    Centre,
    LateralLinear,
    Sequential,
    lateral_dynamics,
    lateral_mlp,
    lateral_network,
)

PER_POSITION = [kind for kind in INHIBITION if not kind.endswith("image")]
STEPWISE = [kind for kind in PER_POSITION if kind != "equilibrium"]
BASES = list(SIGMAS)
hypothesis_settings = settings(deadline=None, max_examples=40, derandomize=True)


def layer_params(layer: LateralLinear, seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = layer.parameter_shapes()
    return {
        name: normal(seed + k, *shape, scale=0.7) for k, (name, shape) in enumerate(shapes.items())
    }


def assert_layer_equals_oracle(layer, params, x):
    s, y = layer.respond(x, params)
    expected_s, expected_y = layer_response(layer, params, x)
    assert_near(s, expected_s)
    assert_near(y, expected_y)
    leaves = [x, *params.values()]
    actual = gradients(weighted_sum([s, y]), leaves)
    expected = gradients(weighted_sum([expected_s, expected_y]), leaves)
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("steps", [0, 1, 2, 10])
@pytest.mark.parametrize("factor", [0.0, 0.1, 0.7, 1.0])
def test_lateral_dynamics_are_the_loop_of_the_formula(base, steps, factor):
    s, m = normal(0, 5, 3), normal(1, 3, 3, scale=0.5)
    activation = Activation(base, 1.5)
    y = lateral_dynamics(s, m, activation, steps, factor)
    expected = lateral_loop(s, m, lambda u: SIGMAS[base](1.5 * u), steps, factor)
    assert_near(y, expected)
    actual = gradients(weighted_sum([y]), [s, m])
    for a, b in zip(actual, gradients(weighted_sum([expected]), [s, m]), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("steps, factor", [(0, 0.3), (1, 1.0), (4, 0.2)])
def test_lateral_dynamics_pass_gradcheck(base, steps, factor):
    s, m = normal(0, 3, 2), normal(1, 2, 2, scale=0.5)

    def function(s, m):
        return lateral_dynamics(s, m, Activation(base, 2.0), steps, factor)

    assert torch.autograd.gradcheck(function, (s, m))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_grad_gives_the_same_bits(base, dtype):
    s, m = (t.detach().to(dtype).requires_grad_() for t in (normal(0, 33, 7), normal(1, 7, 7)))
    with_graph = lateral_dynamics(s, m, Activation(base, 4.0), 10, 0.2)
    with torch.no_grad():
        without = lateral_dynamics(s, m, Activation(base, 4.0), 10, 0.2)
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.equal(with_graph, without)
    assert torch.equal(
        with_graph, lateral_dynamics(s.detach(), m.detach(), Activation(base, 4.0), 10, 0.2)
    )


@pytest.mark.parametrize("wants_s, wants_m", [(True, False), (False, True)])
def test_one_of_both_gradients_may_be_unwanted(wants_s, wants_m):
    s, m = normal(0, 4, 3).requires_grad_(wants_s), normal(1, 3, 3).requires_grad_(wants_m)
    wanted = s if wants_s else m
    y = lateral_dynamics(s, m, Activation("tanh"), 3, 0.4)
    expected = lateral_loop(s, m, torch.tanh, 3, 0.4)
    (grad,), (expected_grad,) = (gradients(weighted_sum([v]), [wanted]) for v in (y, expected))
    assert_near(grad, expected_grad)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_nothing_given_is_changed_forward_or_backward(base, steps):
    s, m, cotangent = normal(0, 4, 3), normal(1, 3, 3), normal(2, 4, 3).detach()
    before = [t.detach().clone() for t in (s, m, cotangent)]
    y = lateral_dynamics(s, m, Activation(base, 2.0), steps, 0.3)
    value = y.detach().clone()
    y.backward(cotangent)
    for tensor, copy in zip((s, m, cotangent, y), (*before, value), strict=True):
        assert torch.equal(tensor, copy)


def test_backward_can_run_twice_through_a_kept_graph():
    s, m = normal(0, 4, 3), normal(1, 3, 3)
    loss = weighted_sum([lateral_dynamics(s, m, Activation(), 5, 0.2)])
    first = torch.autograd.grad(loss, [s, m], retain_graph=True)
    second = torch.autograd.grad(loss, [s, m])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_steps_or_without_factor_nothing_is_inhibited():
    s, m = normal(0, 4, 3).detach(), normal(1, 3, 3).detach()
    expected = torch.sigmoid(4 * s)
    for steps, factor in [(0, 0.5), (10, 0.0)]:
        y = lateral_dynamics(s, m, Activation("sigmoid", 4.0), steps, factor)
        assert_near(y, expected, 1e-15)


def test_a_fixed_point_of_the_dynamics_is_reached_in_many_steps():
    s, m = normal(0, 4, 3).detach(), normal(1, 3, 3, scale=0.2).detach()
    y = lateral_dynamics(s, m, Activation("sigmoid"), 300, 0.5)
    assert_near(y, torch.sigmoid(s + y @ m.T), 1e-12)


@hypothesis_settings
@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4),
    st.sampled_from(BASES), st.sampled_from(STEPWISE), st.integers(0, 99),
)  # fmt: skip
def test_a_layer_of_any_size_and_inhibition_is_its_formula(
    batch, fan_in, fan_out, steps, base, inhibition, seed
):
    layer = LateralLinear(
        fan_in, fan_out, Activation(base, 1.2), inhibition=inhibition, inh_steps=steps
    )
    x = normal(1000 + seed, batch, fan_in)
    assert_layer_equals_oracle(layer, layer_params(layer, seed), x)


@pytest.mark.parametrize("base, inhibition", list(itertools.product(BASES, ("none", "l1", "l2"))))
def test_other_inhibition_modes_pass_gradcheck(base, inhibition):
    layer = LateralLinear(3, 2, Activation(base, 2.0), inhibition=inhibition)
    params = layer_params(layer)

    def function(x, w, b):
        return layer(x, {"w": w, "b": b})

    assert torch.autograd.gradcheck(function, (normal(9, 4, 3), params["w"], params["b"]))


def test_normalised_activations_have_norm_one():
    x = normal(5, 6, 3).detach()
    for inhibition, order in (("l1", 1), ("l2", 2)):
        layer = LateralLinear(3, 4, Activation("tanh"), inhibition=inhibition)
        y = layer(x, layer_params(layer))
        norms = torch.linalg.vector_norm(y, order, dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def test_normalised_activations_of_silent_units_are_zero():
    x = -torch.ones(2, 3, dtype=torch.float64)
    params = {"w": torch.ones(4, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
    for inhibition in ("l1", "l2"):
        layer = LateralLinear(3, 4, Activation("relu"), inhibition=inhibition)
        assert torch.equal(layer(x, params), torch.zeros(2, 4, dtype=torch.float64))


def test_silent_normalised_units_have_finite_gradients():
    layer = LateralLinear(3, 4, Activation("relu"), inhibition="l2")
    x = -torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    w, b = torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    params = {"w": w.requires_grad_(), "b": b.requires_grad_()}
    for grad in gradients(layer(x, params).sum(), params.values()):
        assert torch.isfinite(grad).all()


def test_float32_is_close_to_float64():
    layer = LateralLinear(6, 4, Activation("sigmoid", 4.0), inh_steps=10, inh_factor=0.2)
    x, params = normal(9, 20, 6), layer_params(layer)
    single = {name: tensor.detach().float() for name, tensor in params.items()}
    y = layer(x.detach().float(), single)
    assert y.dtype == torch.float32
    assert_near(y, layer(x, params).detach().float(), 1e-5)


# ---- what a layer forbids ----


@pytest.mark.parametrize("no_self, no_excitation", list(itertools.product([False, True], repeat=2)))
def test_forbidden_lateral_weights_are_absent_initially_and_after_updates(no_self, no_excitation):
    model = lateral_mlp(
        4, [3, 2], Activation("sigmoid", 4.0), inh_steps=3,
        forbid_self_inhibition=no_self, forbid_excitation=no_excitation,
    )  # fmt: skip
    initializer = GaussianInitializer({}, {"w": FIXED, "m": TRAINABLE})
    rule = PolynomialRule.of_degree(2)
    with torch.no_grad():
        rule.m.fill_(0.01)
        rule.diagonal.fill_(10.0)
    params = initializer(model, torch.Generator().manual_seed(0))
    seen = []
    for step in range(4):
        seen += [layer["m"] for layer in params if layer]
        params = rule.update(model, params, normal(step, 5, 4).detach().float())
    diagonals = torch.cat([m.diagonal() for m in seen])
    others = torch.cat([m[~torch.eye(len(m), dtype=torch.bool)] for m in seen])
    assert bool((diagonals == 0).all()) == no_self
    assert bool((others <= 0).all()) == no_excitation


def test_what_is_not_forbidden_is_left_alone():
    m = normal(0, 3, 3)
    assert torch.equal(LateralLinear(2, 3).constrain(m), m)
    constrained = LateralLinear(2, 3, forbid_self_inhibition=True).constrain(m)
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert torch.equal(constrained[off_diagonal], m[off_diagonal])
    constrained = LateralLinear(2, 3, forbid_excitation=True).constrain(m)
    assert torch.equal(constrained, torch.where(m < 0, m, torch.zeros_like(m)))


# ---- sequences ----


def test_a_sequence_runs_its_layers_in_order():
    model = lateral_mlp(6, [4, 3], Activation("tanh"), inh_steps=2)
    first, second = model.layers[1], model.layers[2]
    params = [{}, layer_params(first), layer_params(second, 10)]
    x = normal(20, 5, 2, 3)
    hidden = layer_response(first, params[1], x.flatten(1))[1]
    assert_near(model(x, params), layer_response(second, params[2], hidden)[1])


def test_a_model_has_no_parameters_of_its_own():
    assert not list(lateral_mlp(6, [4, 3], Activation()).parameters())


def test_modules_without_numbers_are_layers_and_others_are_refused():
    x = normal(0, 3, 2, 4, 4).detach()
    model = Sequential([nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), LateralLinear(8, 2)])
    assert [layer.parameter_shapes() for layer in model.layers[:3]] == [{}, {}, {}]
    params = [{}, {}, {}, layer_params(model.layers[3])]
    pooled = x.view(3, 2, 2, 2, 2, 2).amax((3, 5)).flatten(1)
    dropped = [model(x, params) for _ in range(2)]
    assert not torch.equal(*dropped)
    assert_near(model.eval()(x, params), model.layers[3](pooled, params[3]))
    for module in (nn.Linear(2, 2), nn.BatchNorm2d(3, affine=False)):
        with pytest.raises(ValueError, match=r"holds .* parameters are given at each call"):
            Sequential([module])


@pytest.mark.parametrize("inhibition", ["lateral", "none", "l1", "l2"])
def test_any_function_of_each_number_is_an_activation(inhibition):
    x = normal(1, 5, 4).detach()
    exact, free = (
        LateralLinear(4, 3, activation, inhibition=inhibition, inh_steps=4, inh_factor=0.3)
        for activation in (Activation("tanh"), lambda u: torch.tanh(u))
    )
    params = layer_params(exact)
    found, expected = free(x, params), exact(x, params)
    assert_near(found, expected)
    for a, b in zip(gradients(weighted_sum([found]), params.values()),
                    gradients(weighted_sum([expected]), params.values()), strict=True):  # fmt: skip
        assert_near(a, b)
    named = LateralLinear(4, 3, "gelu", inhibition="none")
    s, y = named.respond(x, params)
    assert_near(y, s * (1 + torch.erf(s / 2**0.5)) / 2)
    exponential = LateralLinear(4, 3, torch.exp, inhibition="l1").respond(x, params)
    assert_near(exponential[1], exponential[0].softmax(1), 1e-5)
    assert LateralLinear(4, 3, "relu").activation == Activation("relu")


def test_what_is_no_activation_is_refused_when_the_layer_is_made():
    for wanted in ("quux", "pi", 3, lambda u: u.sum(), lambda u: u.softmax(1), lambda u, v: u):
        with pytest.raises(ValueError, match=r"is unknown: it must be one of .*'sigmoid', 'tanh'"):
            LateralLinear(4, 3, wanted)
    with pytest.raises(ValueError, match="'equilibrium' needs an activation of"):
        LateralLinear(4, 3, torch.exp, inhibition="equilibrium")


def test_parameter_shapes_are_those_of_the_layer():
    shapes = LateralLinear(5, 3).parameter_shapes()
    assert shapes == {"w": (3, 5), "b": (3,), "m": (3, 3)}
    for inhibition in ("none", "l1", "l2"):
        assert "m" not in LateralLinear(5, 3, inhibition=inhibition).parameter_shapes()


def test_mlp_options_reach_every_layer():
    activation = Activation("relu", 2.0)
    model = lateral_mlp(5, [4, 3, 2], activation, inh_steps=7, inh_factor=0.3, inhibition="none")
    sizes = [(layer.in_features, layer.out_features) for layer in model.layers[1:]]
    assert sizes == [(5, 4), (4, 3), (3, 2)]
    for layer in model.layers[1:]:
        assert (layer.activation, layer.inh_steps, layer.inh_factor) == (activation, 7, 0.3)


# ---- wrong input ----


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3), (0, 0)])
def test_a_layer_without_units_is_refused(sizes):
    with pytest.raises(ValueError, match=rf"sizes >= 1, got weights \[{sizes[1]}, {sizes[0]}\]"):
        LateralLinear(*sizes)


def test_unknown_names_are_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'gelu' is unknown.*sigmoid"):
        Activation("gelu")
    with pytest.raises(ValueError, match=r"'l3' is unknown.*lateral"):
        LateralLinear(3, 2, inhibition="l3")


@pytest.mark.parametrize("shape", [(5, 3), (5, 5), (4,), (2, 2, 4)])
def test_inputs_of_another_shape_are_refused_with_both_shapes(shape):
    layer = LateralLinear(4, 2)
    with pytest.raises(ValueError) as error:
        layer(torch.zeros(shape), {n: torch.zeros(s) for n, s in layer.parameter_shapes().items()})
    assert "[batch, 4]" in str(error.value) and str(list(shape)) in str(error.value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_parameter_dicts_is_refused(count):
    model = Sequential([nn.Flatten(), nn.Flatten()])
    with pytest.raises(ValueError, match=f"expected 2 dicts of parameters, got {count}"):
        model(torch.zeros(1, 2), [{}] * count)


def test_layers_are_modules_that_print_their_sizes():
    assert isinstance(LateralLinear(4, 2), nn.Module)
    assert "4, 2" in repr(LateralLinear(4, 2))


def test_an_equilibrium_layer_is_the_limit_of_the_lateral_one():
    generator = torch.Generator().manual_seed(4)
    params = {
        "w": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "b": torch.randn(5, generator=generator, dtype=torch.float64),
        "m": -0.3 * torch.rand(5, 5, generator=generator, dtype=torch.float64),
    }
    x = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    limit = LateralLinear(7, 5, Activation(), inhibition="equilibrium")
    steps = LateralLinear(7, 5, Activation(), inh_steps=300)
    assert limit.parameter_shapes() == steps.parameter_shapes()
    torch.testing.assert_close(limit(x, params), steps(x, params), rtol=0, atol=1e-4)


def test_a_centre_takes_away_the_mean_that_it_is_given():
    x = torch.rand(3, 2, 4, 4)
    assert Centre()(x, {}) is x
    assert torch.equal(Centre()(x, {"input_mean": x.mean(0)}), x - x.mean(0))
    options = {"inhibition": "none", "convolutions": [(2, 3)], "centred_inputs": True}
    layers = lateral_network((1, 8, 8), [4], Activation(), centred_layers=True, **options).layers
    assert [type(getattr(layer, "module", layer)).__name__ for layer in layers] == [
        "Centre", "LateralConv2d", "AvgPool2d", "Flatten", "Centre", "LateralLinear"
    ]  # fmt: skip


@pytest.mark.parametrize("inhibition", ["lateral", "equilibrium", "none", "l2"])
def test_a_layer_responds_and_is_differentiated_under_autocast(inhibition):
    model = lateral_network((1, 6, 6), [4], Activation("sigmoid", 2.0), convolutions=[(3, 3)],
                            inhibition=inhibition)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    params = [
        {n: (0.3 * torch.randn(shape, generator=generator)).requires_grad_()
         for n, shape in layer.parameter_shapes().items()}
        for layer in model.layers
    ]  # fmt: skip
    x, leaves = torch.rand(5, 1, 6, 6, generator=generator), [t for p in params for t in p.values()]

    def outcome(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model(x, params).float()
            return y, *torch.autograd.grad(y.square().sum(), leaves)

    for under, plain in zip(outcome(True), outcome(False), strict=True):
        assert torch.allclose(under, plain, rtol=0.05, atol=0.02)
