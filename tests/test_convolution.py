"""Convolutional layers and their learning, against dense ones on patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, gradients, normal, weighted_sum
from torch import Tensor

from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import PerLayerRule, PolynomialPairRule, PolynomialRule
from models_fully_local import (
    INHIBITION,
    Activation,
    LateralConv2d,
    LateralLinear,
    Parameterless,
    lateral_network,
)
from train import MEMORY, train

ACTIVATION = Activation("sigmoid", 2.0)
hypothesis_settings = settings(deadline=None, max_examples=40, derandomize=True)

geometries = st.fixed_dictionaries({
    "channels": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.integers(1, 3),
    "padding": st.integers(0, 2),
    "image": st.tuples(st.integers(3, 6), st.integers(3, 6)),
    "batch": st.integers(1, 3),
})  # fmt: skip


def patches(images: Tensor, kernel, stride: int, padding: int) -> Tensor:
    """The window that each position of each image sees, a row for each."""
    columns = torch.nn.functional.unfold(images, kernel, stride=stride, padding=padding)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def filled(rule, seed: int = 0):
    """The rule with normal coefficients, in float64."""
    rule.double()
    with torch.no_grad():
        for k, psi in enumerate(rule.parameters()):
            psi.copy_(normal(seed + k, *psi.shape, scale=0.2))
    return rule


class Both:
    """A convolutional layer and the dense layer that does the same on patches."""

    def __init__(self, geometry, seed: int = 0, **options) -> None:
        fan_in, fan_out = geometry["channels"]
        self.window = (geometry["kernel"], geometry["stride"], geometry["padding"])
        self.convolutional = LateralConv2d(
            fan_in, fan_out, geometry["kernel"], ACTIVATION,
            stride=geometry["stride"], padding=geometry["padding"], **options,
        )  # fmt: skip
        size = fan_in * geometry["kernel"][0] * geometry["kernel"][1]
        self.dense = LateralLinear(size, fan_out, ACTIVATION, **options)
        shapes = self.convolutional.parameter_shapes()
        self.params = {
            name: normal(seed + k, *shape, scale=0.5)
            for k, (name, shape) in enumerate(shapes.items())
        }
        self.images = [
            normal(seed + 20 + k, geometry["batch"], fan_in, *geometry["image"]) for k in range(2)
        ]

    def with_images(self, views: int, rule=None):
        """s, y as rows and, with a rule, the new parameters; w as a matrix."""
        x = self.images[:views]
        s, y = zip(*(self.convolutional.respond(v, self.params) for v in x), strict=True)
        rows = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (*s, *y)]
        new = rule.update_layer(self.convolutional, self.params, x, s, y) if rule else {}
        return [*rows, *(t.flatten(1) if t.dim() == 4 else t for t in new.values())]

    def with_patches(self, views: int, rule=None):
        """The same, from the dense layer."""
        x = [patches(v, *self.window) for v in self.images[:views]]
        params = self.params | {"w": self.params["w"].flatten(1)}
        s, y = zip(*(self.dense.respond(v, params) for v in x), strict=True)
        new = rule.update_layer(self.dense, params, x, s, y) if rule else {}
        return [*s, *y, *new.values()]

    def assert_equal(self, views: int, rule=None) -> None:
        actual, expected = self.with_images(views, rule), self.with_patches(views, rule)
        leaves = [*(rule.parameters() if rule else ()), *self.params.values(), *self.images[:views]]
        found = gradients(weighted_sum(actual), leaves)
        wanted = gradients(weighted_sum(expected), leaves)
        for a, b in zip([*actual, *found], [*expected, *wanted], strict=True):
            assert_near(a, b)


def fits(geometry) -> bool:
    sizes = zip(geometry["image"], geometry["kernel"], strict=True)
    return all(n + 2 * geometry["padding"] >= k for n, k in sizes)


@pytest.mark.parametrize("inhibition", [n for n in INHIBITION if not n.endswith("image")])
@given(geometries.filter(fits))
@hypothesis_settings
def test_a_convolutional_layer_is_a_dense_layer_on_patches(inhibition, geometry):
    Both(geometry, inhibition=inhibition).assert_equal(views=1)


@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
@given(geometries.filter(fits), st.integers(1, 3))
@hypothesis_settings
def test_a_rule_changes_kernels_as_it_changes_dense_weights_on_patches(kind, geometry, degree):
    rule = filled(kind.of_degree(degree, bound="tanh", l2=0.01, forward_weight_bound=1.0))
    Both(geometry, forbid_excitation=True).assert_equal(rule.views, rule)


def test_terms_without_input_or_without_output_reach_kernels_too():
    terms = {"w": [(0, 0, 0, 0), (2, 0, 0, 1), (0, 1, 1, 2), (1, 2, 0, 0)], "b": [(1, 0)]}
    geometry = {
        "channels": (2, 3), "kernel": (3, 2), "stride": 2, "padding": 1, "image": (6, 5),
        "batch": 3,
    }  # fmt: skip
    Both(geometry, inhibition="none").assert_equal(1, filled(PolynomialRule(terms)))


def test_a_network_of_convolutions_pools_and_units_trains_end_to_end():
    model = lateral_network((1, 9, 8), [4], ACTIVATION, convolutions=[(3, 2), (2, 2)], inh_steps=2)
    rule = PerLayerRule([filled(PolynomialRule.of_degree(3), k) for k in range(3)])
    initializer = GaussianInitializer({"b": FIXED, "m": TRAINABLE}, {"w": TRAINABLE}).double()
    params = initializer(model, torch.Generator().manual_seed(0))
    assert [list(p["w"].shape) for p in params if p] == [[3, 1, 2, 2], [2, 3, 2, 2], [4, 2]]
    images = [normal(k, 5, 1, 9, 8).detach() for k in range(3)]
    variables = [*rule.parameters(), *(p for p in initializer.parameters() if p.requires_grad)]
    results = {}
    for memory in MEMORY:
        theta = train(model, params, iter(images), rule, 3, memory=memory)
        loss = weighted_sum([model(images[0], theta)])
        results[memory] = [loss, *torch.autograd.grad(loss, variables, retain_graph=True)]
    for memory in MEMORY:
        for a, b in zip(results[memory], results["keep"], strict=True):
            assert_near(a, b)
    assert all(g.abs().max() > 0 for g in results["keep"])


def test_the_initial_spread_of_kernels_is_divided_by_their_fan_in():
    model = lateral_network((2, 20, 20), [], ACTIVATION, convolutions=[(400, 5)], inhibition="none")
    params = GaussianInitializer({}, {"w": FIXED})(model, torch.Generator().manual_seed(0))
    assert params[0]["w"].std().item() == pytest.approx((2 * 5 * 5) ** -0.5, rel=0.02)


def test_channels_are_last_in_memory_so_that_rows_are_views():
    layer = LateralConv2d(1, 4, 3, ACTIVATION, inhibition="none")
    params = {"w": torch.rand(4, 1, 3, 3), "b": torch.rand(4)}
    for tensor in layer.respond(torch.rand(2, 1, 8, 8), params):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_pooling_averages_squares():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Parameterless(torch.nn.AvgPool2d(2))(x, {}).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("order", [1, 2])
def test_a_norm_over_the_image_is_that_of_all_its_positions_and_channels(order):
    layer = LateralConv2d(2, 3, 2, ACTIVATION, inhibition=f"l{order}_image", stride=2)
    params = {"w": normal(1, 3, 2, 2, 2), "b": normal(2, 3)}
    x = normal(3, 4, 2, 6, 6).detach()
    y = layer(x, params)
    sigma = torch.sigmoid(2 * torch.nn.functional.conv2d(x, params["w"], params["b"], stride=2))
    expected = sigma / (1e-6 + sigma.pow(order).sum((1, 2, 3), True) ** (1 / order))
    assert_near(y, expected)
    found, wanted = (gradients(weighted_sum([t]), params.values()) for t in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)


def test_images_that_a_kernel_does_not_fit_in_are_refused_with_both_shapes():
    layer = LateralConv2d(2, 3, 4, ACTIVATION)
    params = {"w": torch.rand(3, 2, 4, 4), "b": torch.rand(3), "m": torch.zeros(3, 3)}
    for shape in ((5, 2, 3, 6), (5, 1, 6, 6), (5, 2, 36)):
        with pytest.raises(ValueError, match=r"\[batch, 2, >= 4, >= 4\], got"):
            layer.respond(torch.rand(shape), params)


def test_a_network_that_leaves_nothing_of_its_images_is_refused():
    with pytest.raises(ValueError, match="nothing is left of images"):
        lateral_network((1, 8, 8), [4], ACTIVATION, convolutions=[(4, 5), (4, 5)])


def test_wide_convolutions_agree_in_float32():
    geometry = {
        "channels": (5, 7), "kernel": (3, 3), "stride": 1, "padding": 0, "image": (9, 9),
        "batch": 4,
    }  # fmt: skip
    both = Both(geometry)
    rule = filled(PolynomialRule.of_degree(3)).float()
    both.params = {name: t.detach().float() for name, t in both.params.items()}
    both.images = [image.detach().float() for image in both.images]
    for a, b in zip(both.with_images(1, rule), both.with_patches(1, rule), strict=True):
        assert_near(a, b, relative=1e-4)
