"""The equilibrium of lateral inhibition against loops of many steps, closed forms, differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    DOUBLE,
    SIGMAS,
    assert_near,
    gradients,
    lateral_loop,
    normal,
    weighted_sum,
)

from kernels.equilibrium import equilibrium
from learning_rules import PolynomialRule
from models_fully_local import Activation, LateralLinear, Sequential, lateral_mlp
from train import graph_bytes, train

ACTIVATIONS = [
    Activation("sigmoid", 4.0),
    Activation("sigmoid", 0.7),
    Activation("tanh", 1.0),
    Activation("tanh", -0.8),
    Activation("relu", 1.0),
    Activation("identity", 0.9),
]
EXACT = {"tolerance": 1e-13, "max_steps": 1000}


def of_norm(size, matrix):
    return (size * matrix / torch.linalg.matrix_norm(matrix.detach(), 2)).detach().requires_grad_()


def lateral_weights(kind, units=5, size=0.6, seed=1):
    """A matrix of spectral norm `size`."""
    noise = normal(seed, units, units).detach()
    matrix = {
        "any": noise,
        "symmetric": noise + noise.T,
        "skew": noise - noise.T,
        "inhibition": -noise @ noise.T,
        "competition": -noise.abs() * (1 - torch.eye(units, dtype=DOUBLE)),
    }[kind]
    return of_norm(size, matrix)


def loop(s, m, activation, steps=300, factor=0.2):
    sigma = SIGMAS[activation.base]
    return lateral_loop(s, m, lambda u: sigma(activation.slope * u), steps, factor)


def assert_equals_the_loop(s, m, activation, steps=300, factor=0.2):
    y, expected = equilibrium(s, m, activation, **EXACT), loop(s, m, activation, steps, factor)
    assert_near(y, expected, 1e-10)
    found, sought = (gradients(weighted_sum([v]), [s, m]) for v in (y, expected))
    for a, b in zip(found, sought, strict=True):
        assert_near(a, b, 1e-8)


@pytest.mark.parametrize("kind", ["any", "symmetric", "skew", "inhibition", "competition"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_it_is_the_limit_of_many_steps_and_so_are_its_gradients(activation, kind):
    assert_equals_the_loop(normal(0, 7, 5), lateral_weights(kind), activation)


@pytest.mark.parametrize("kind, size", [("inhibition", 8.0), ("skew", 3.0), ("any", 1.6)])
def test_strong_weights_have_the_same_limit(kind, size):
    m = lateral_weights(kind, size=size)
    assert_equals_the_loop(normal(0, 7, 5, scale=0.5), m, ACTIVATIONS[0], 1500, 0.05)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(0, 6), st.integers(1, 6), st.sampled_from(ACTIVATIONS), st.floats(0.0, 0.7),
    st.integers(0, 99),
)  # fmt: skip
def test_any_batch_and_number_of_units_is_solved(batch, units, activation, size, seed):
    s, m = normal(seed, batch, units), lateral_weights("any", units, size, 100 + seed)
    assert_equals_the_loop(s, m, activation, 300)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (2, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_those_of_finite_differences(activation, shape):
    s, m = normal(0, *shape), lateral_weights("any", shape[1])
    assert torch.autograd.gradcheck(lambda s, m: equilibrium(s, m, activation, **EXACT), (s, m))


def test_linear_units_have_a_closed_form():
    s, m = normal(0, 6, 4), lateral_weights("any", 4, 0.9)
    y = equilibrium(s, m, Activation("identity", 0.9), **EXACT)
    expected = 0.9 * s @ torch.linalg.inv(torch.eye(4, dtype=DOUBLE) - 0.9 * m.T)
    assert_near(y, expected)
    found, sought = (gradients(weighted_sum([v]), [s, m]) for v in (y, expected))
    for a, b in zip(found, sought, strict=True):
        assert_near(a, b)


def test_without_lateral_weights_it_is_the_activation():
    s, m = normal(0, 6, 4), torch.zeros(4, 4, dtype=DOUBLE, requires_grad=True)
    y = equilibrium(s, m, ACTIVATIONS[0], max_steps=1)
    assert_near(y, torch.sigmoid(4 * s))
    assert_near(gradients(y.sum(), [s])[0], gradients(torch.sigmoid(4 * s).sum(), [s])[0])


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_tolerance_bounds_the_errors(dtype, tolerance):
    s, m = normal(0, 50, 16, scale=0.5), lateral_weights("inhibition", 16, 3.0)
    exact = equilibrium(s, m, ACTIVATIONS[0], **EXACT)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (s, m)]
    y = equilibrium(*leaves, ACTIVATIONS[0], tolerance=tolerance)
    assert y.dtype == dtype
    assert (torch.sigmoid(4 * (leaves[0] + y @ leaves[1].T)) - y).abs().max() <= 3 * tolerance
    assert (y - exact).abs().max() <= 3 * tolerance
    found, sought = gradients(y.square().sum(), leaves), gradients(exact.square().sum(), [s, m])
    for a, b in zip(found, sought, strict=True):
        assert a.dtype == dtype
        assert_near(a.double(), b, 30 * tolerance)


def test_steps_grow_as_the_root_of_the_strength_where_damped_ones_would_not_converge():
    s = normal(0, 50, 16, scale=0.5).detach()
    for strength in (30.0, 120.0, 480.0):
        m = lateral_weights("inhibition", 16, strength).detach()
        y = equilibrium(s, m, ACTIVATIONS[0], tolerance=1e-6, max_steps=round(15 * strength**0.5))
        assert (torch.sigmoid(4 * (s + y @ m.T)) - y).abs().max() < 1e-4
        damped = loop(s, m, ACTIVATIONS[0])
        assert (torch.sigmoid(4 * (s + damped @ m.T)) - damped).abs().max() > 0.1


@pytest.mark.parametrize("units, strength", [(8, 10.0), (8, 100.0), (64, 10.0), (64, 100.0)])
def test_strong_inhibition_along_many_directions_takes_no_more_steps(units, strength):
    basis = torch.linalg.qr(normal(1, units, units).detach())[0]
    m = -basis @ torch.linspace(0, strength, units, dtype=DOUBLE).diag() @ basis.T
    s, steps = normal(0, 40, units), round(15 * strength**0.5)
    y = equilibrium(s, m, Activation("identity"), tolerance=1e-6, max_steps=steps)
    expected = s @ torch.linalg.inv(torch.eye(units, dtype=DOUBLE) - m)
    assert_near(y, expected, 1e-4)
    assert_near(*(gradients(v.sum(), [s])[0] for v in (y, expected)), 1e-4)


def test_strangely_laid_out_tensors_are_as_good():
    s, m = normal(0, 5, 7), lateral_weights("any")
    y = equilibrium(s.t(), m, ACTIVATIONS[0], **EXACT)
    assert_near(y, loop(s.t(), m, ACTIVATIONS[0]))
    found = gradients(y.sum(), [s, m])  # whose grad_y is one number, expanded
    for a, b in zip(found, gradients(loop(s.t(), m, ACTIVATIONS[0]).sum(), [s, m]), strict=True):
        assert_near(a, b, 1e-8)


# ---- as a part of something longer ----


class EquilibriumLayer(LateralLinear):
    def compete(self, s, params):
        return equilibrium(s, params["m"], self.activation, **EXACT)


def meta_gradients(model, memory):
    """Of a loss after four updates of two layers, by the rule and by where they start."""
    rule = PolynomialRule.of_degree(2).double()
    with torch.no_grad():
        for k, psi in enumerate(rule.parameters()):
            psi.copy_(normal(k, *psi.shape, scale=0.02))
    shapes = [layer.parameter_shapes() for layer in model.layers]
    params = [
        {name: normal(10 * n + k, *shape, scale=0.2) for k, (name, shape) in enumerate(d.items())}
        for n, d in enumerate(shapes)
    ]
    batches = iter([normal(50 + t, 9, 6).detach() for t in range(4)])
    theta = train(model, params, batches, rule, 4, memory=memory)
    loss = weighted_sum([*(t for d in theta for t in d.values()), model(normal(60, 9, 6), theta)])
    return gradients(loss, [*rule.parameters(), *(t for d in params for t in d.values())])


def test_a_longer_graph_is_differentiated_through_it_whatever_is_kept():
    sizes = [(6, 5), (5, 3)]
    layers = [EquilibriumLayer(*size, Activation("sigmoid", 4.0)) for size in sizes]
    found = meta_gradients(Sequential([torch.nn.Flatten(), *layers]), "keep")
    options = {"inh_steps": 250, "inh_factor": 0.2}
    sought = meta_gradients(lateral_mlp(6, [5, 3], Activation("sigmoid", 4.0), **options), "keep")
    again = meta_gradients(Sequential([torch.nn.Flatten(), *layers]), "recompute")
    for a, b, c in zip(found, sought, again, strict=True):
        assert_near(a, b, 1e-8)
        assert torch.equal(a, c)


def test_only_y_and_m_are_kept_however_many_steps_it_takes():
    s, m = normal(0, 40, 6), lateral_weights("inhibition", 6, 3.0)
    sizes = [
        graph_bytes(lambda t=tolerance: equilibrium(s, m, ACTIVATIONS[0], tolerance=t))
        for tolerance in (1e-2, 1e-8)
    ]
    assert sizes == [8 * (40 * 6 + 6 * 6)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_bits_are_always_the_same_and_nothing_given_is_changed(dtype):
    s, m, grad = (
        t.detach().to(dtype) for t in (normal(0, 33, 7), normal(1, 7, 7), normal(2, 33, 7))
    )
    m = m / 4
    before = [t.clone() for t in (s, m, grad)]
    s, m = s.requires_grad_(), m.requires_grad_()
    y = equilibrium(s, m, ACTIVATIONS[0])
    first, second = (torch.autograd.grad(y, [s, m], grad, retain_graph=True) for _ in range(2))
    with torch.no_grad():
        without = equilibrium(s, m, ACTIVATIONS[0])
    assert torch.equal(y, without) and not without.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((s, m, grad), before, strict=True))
    assert torch.equal(y, without)


@pytest.mark.parametrize("wants_s, wants_m", [(True, False), (False, True)])
def test_one_of_both_gradients_may_be_unwanted(wants_s, wants_m):
    s, m = normal(0, 4, 5).requires_grad_(wants_s), lateral_weights("any").requires_grad_(wants_m)
    wanted = s if wants_s else m
    values = equilibrium(s, m, ACTIVATIONS[0], **EXACT), loop(s, m, ACTIVATIONS[0])
    found, sought = (gradients(weighted_sum([v]), [wanted])[0] for v in values)
    assert_near(found, sought, 1e-8)


def test_a_gradient_of_zero_stays_zero():
    s, m = normal(0, 4, 5), lateral_weights("any")
    for grad in gradients(0 * equilibrium(s, m, ACTIVATIONS[0]).sum(), [s, m]):
        assert not grad.any()


def test_a_second_derivative_is_refused():
    s, m = normal(0, 4, 5), lateral_weights("any")
    y = equilibrium(s, m, ACTIVATIONS[0])
    (grad,) = torch.autograd.grad(y.square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- no equilibrium ----


def refusal(function):
    with pytest.raises(FloatingPointError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and "largest change" in message
    return message


@pytest.mark.parametrize("base, m", [
    ("identity", [[2.0, 0.0], [0.0, 2.0]]),  # grows beyond all bounds
    ("relu", [[1.0, 1.0], [1.0, 1.0]]),
    ("tanh", [[1.5, -4.0], [4.0, 1.5]]),  # goes round for ever
    ("sigmoid", [[math.nan, 0.0], [0.0, 0.0]]),
])  # fmt: skip
def test_weights_without_a_stable_equilibrium_are_refused_with_the_change(base, m):
    s, m = normal(0, 4, 2), torch.tensor(m, dtype=DOUBLE)
    message = refusal(lambda: equilibrium(s, m, Activation(base), max_steps=500))
    assert message.startswith("lateral inhibition has no equilibrium within 500 steps")


@pytest.mark.parametrize("max_steps", [0, 1, 3])
def test_too_few_steps_are_refused(max_steps):
    s, m = normal(0, 4, 5), lateral_weights("inhibition", size=3.0)
    message = refusal(lambda: equilibrium(s, m, ACTIVATIONS[0], max_steps=max_steps))
    assert f"within {max_steps} steps" in message and "to be 0.0001" in message


def test_an_unstable_equilibrium_is_refused_in_the_backward_pass():
    s = torch.zeros(3, 2, dtype=DOUBLE, requires_grad=True)
    y = equilibrium(s, 2 * torch.eye(2, dtype=DOUBLE), Activation("tanh"))  # begins and ends at 0
    message = refusal(lambda: y.sum().backward())
    assert message.startswith("the gradient of lateral inhibition")


def test_a_gradient_that_is_not_finite_is_refused():
    s, m = normal(0, 4, 5), lateral_weights("any")
    y = equilibrium(s, m, ACTIVATIONS[0])
    for bad in (math.nan, math.inf):
        assert refusal(lambda bad=bad: torch.autograd.grad(y, s, bad * y, retain_graph=True))


def test_what_is_refused_may_have_solvable_samples():
    m, ones = torch.ones(2, 2, dtype=DOUBLE), torch.ones(1, 2, dtype=DOUBLE)
    assert not equilibrium(-ones, m, Activation("relu")).any()
    refusal(lambda: equilibrium(torch.cat([-ones, ones]), m, Activation("relu")))
