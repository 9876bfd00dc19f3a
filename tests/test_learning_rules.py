"""Polynomial rules against one product per monomial, and what else can be done with a rule."""

import copy
import itertools
import json
import math
import re

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from oracles import DOUBLE, assert_near, gradients, normal, weighted_sum
from torch import nn

from learning_rules import (
    BOUNDS,
    LearningRule,
    PerLayerRule,
    PolynomialPairRule,
    PolynomialRule,
    RuleError,
    SangerRule,
    classical_rule,
    polynomial_exponents,
    term_effects,
    term_grams,
    without_swapped_views,
)
from models_fully_local import (
    Activation,
    LateralConv2d,
    LateralLinear,
    Sequential,
    lateral_mlp,
)
from rules import load_rule, rule_from_dict, save_rule

KINDS = (PolynomialRule, PolynomialPairRule)
hypothesis_settings = settings(deadline=None, max_examples=50, derandomize=True)
ACTIVATION = Activation("sigmoid", 2.0)


def filled(rule: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The rule with normal coefficients, in float64."""
    rule.double()
    with torch.no_grad():
        for k, p in enumerate(rule.parameters()):
            p.copy_(normal(1000 + seed + k, *p.shape, scale=scale))
    return rule


def parameters_of(model, seed: int = 0, scale: float = 0.6) -> list[dict]:
    return [
        {
            name: normal(100 * number + seed + k, *shape, scale=scale)
            for k, (name, shape) in enumerate(layer.parameter_shapes().items())
        }
        for number, layer in enumerate(model.layers)
    ]


def batch_for(rule, size: int, features: int, seed: int = 50):
    views = tuple(normal(seed + k, size, features) for k in range(rule.views))
    return views[0] if rule.views == 1 else views


def tensors_of(params) -> list[torch.Tensor]:
    return [tensor for layer in params for tensor in layer.values()]


def assert_update_equals_oracle(rule, model, params, batch, relative=1e-10):
    """Values of the new parameters, and gradients by coefficients, old parameters and inputs."""
    plastic = sum(bool(layer) for layer in params)
    rules = list(rule.rules) if isinstance(rule, PerLayerRule) else [rule] * plastic
    views = batch if isinstance(batch, tuple) else (batch,)
    leaves = [*rule.parameters(), *tensors_of(params), *views]
    actual = tensors_of(rule.update(model, params, batch))
    expected = tensors_of(oracles.update(rules, model, params, batch))
    for tensor, expected_tensor in zip(actual, expected, strict=True):
        assert_near(tensor, expected_tensor, relative)
    actual_grads = gradients(weighted_sum(actual), leaves)
    expected_grads = gradients(weighted_sum(expected), leaves)
    for grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        assert_near(grad, expected_grad, relative)


def small_model(fan_in=3, sizes=(2,), **options):
    return lateral_mlp(fan_in, sizes, ACTIVATION, inh_steps=2, inh_factor=0.3, **options)


# ---- sets of exponents ----


@pytest.mark.parametrize("variables, total, partial", [
    (3, 0, None), (3, 2, None), (4, 3, None), (2, None, 3), (3, None, 2), (3, 4, 2), (3, 1, 5),
])  # fmt: skip
def test_exponents_are_all_monomials_within_the_degrees(variables, total, partial):
    highest = 6
    every = itertools.product(range(highest + 1), repeat=variables)
    expected = [
        powers
        for powers in every
        if (total is None or sum(powers) <= total) and (partial is None or max(powers) <= partial)
    ]
    assert polynomial_exponents(variables, total, partial) == expected


@pytest.mark.parametrize("degrees", [(None, None), (-1, None), (None, -1), (2, -1)])
def test_exponents_without_a_degree_or_of_a_negative_one_are_refused(degrees):
    with pytest.raises(RuleError, match="total_degree, partial_degree or both"):
        polynomial_exponents(3, *degrees)


def test_total_degree_three_has_35_10_and_20_terms_all_zero():
    rule = PolynomialRule.of_degree(3)
    assert [len(p) for p in (rule.w, rule.b, rule.m, rule.diagonal)] == [35, 10, 20, 1]
    assert [len(rule.exponents[group]) for group in "wbm"] == [35, 10, 20]
    assert not any(rule.coefficients().values())


def test_powers_up_to_two_without_the_preactivation_are_27_terms():
    terms = [term for term in polynomial_exponents(4, partial_degree=2) if term[1] == 0]
    assert len(terms) == 27
    assert len(PolynomialRule({"w": terms}).w) == 27


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("per_view", [1, 2, 3])
def test_of_two_terms_that_swap_with_the_views_the_first_is_kept(degree, per_view):
    every = polynomial_exponents(2 * per_view + 1, total_degree=degree)
    kept = without_swapped_views(every)
    classes = {
        frozenset([t, t[per_view : 2 * per_view] + t[:per_view] + t[2 * per_view :]]) for t in every
    }
    assert kept == sorted(min(pair) for pair in classes)
    shuffled = every[1::2] + every[::2]
    assert without_swapped_views(shuffled) == kept


def test_the_pair_rule_of_degree_three_keeps_one_of_each_swapped_pair():
    rule = PolynomialPairRule.of_degree(3)
    for group, variables in (("w", 7), ("b", 3), ("m", 5)):
        half = (variables - 1) // 2
        own_swap = [t for t in polynomial_exponents(variables, 3) if t[:half] == t[half:-1]]
        assert len(getattr(rule, group)) == (math.comb(variables + 3, 3) + len(own_swap)) // 2


# ---- the update against the oracle ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total, partial", [
    (1, None), (2, None), (3, None), (4, None), (None, 1), (None, 2), (3, 2), (4, 1),
])  # fmt: skip
def test_every_degree_equals_one_product_per_monomial(kind, total, partial):
    if kind is PolynomialPairRule and (total or 9) > 3:
        total, partial = min(total or 3, 3), 1  # thousands of terms would take the oracle minutes
    rule = filled(kind.of_degree(total, partial, bound="tanh"), scale=0.05)
    model = small_model()
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule, 4, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("l2", [0.0, 0.02])
@pytest.mark.parametrize("limit", [math.inf, 0.5])
def test_bounds_and_decay_equal_the_formula(kind, bound, l2, limit):
    rule = kind.of_degree(2, bound=bound, bound_size=0.2, l2=l2, forward_weight_bound=limit)
    filled(rule)
    model = small_model(4, [3])
    params, batch = parameters_of(model), batch_for(rule, 5, 4)
    assert_update_equals_oracle(rule, model, params, batch)
    new = rule.update(model, params, batch)[1]
    assert new["w"].abs().max() <= limit
    if limit < math.inf:
        assert (new["w"].abs() == limit).any() and (new["w"].abs() < limit).any()
        assert new["b"].abs().max() > limit or new["m"].abs().max() > limit
    if bound != "none" and not l2:
        for name in ("b", "m"):
            change = (new[name] - params[1][name]).abs().max()
            assert 0.1 < change <= 0.2 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, fan_in, fan_out", [(1, 3, 2), (3, 1, 2), (3, 3, 1), (1, 1, 1)])
def test_batches_and_layers_of_one_equal_the_oracle(kind, batch, fan_in, fan_out):
    rule, model = filled(kind.of_degree(3, bound="tanh")), small_model(fan_in, [fan_out])
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule, batch, fan_in))


@pytest.mark.parametrize("kind, degree", [(PolynomialRule, 3), (PolynomialPairRule, 2)])
def test_a_batch_of_thousands_equals_the_oracle(kind, degree):
    rule, model = filled(kind.of_degree(degree, bound="tanh")), small_model(3, [4])
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule, 3001, 3))


@st.composite
def sparse_rules(draw):
    """Rules with few random terms in each group, or none."""
    kind = draw(st.sampled_from(KINDS))
    exponents = {}
    for group, highest in (("w", 3), ("b", 3), ("m", 2)):
        width = len(kind.variable_names(group))
        power = st.integers(0, highest) if kind.views == 1 else st.sampled_from([0, 0, 0, 1, 2])
        exponents[group] = draw(st.lists(st.tuples(*[power] * width), unique=True, max_size=5))
    return kind(
        exponents,
        lateral_diagonal=draw(st.booleans()),
        bound=draw(st.sampled_from(BOUNDS)),
        bound_size=draw(st.sampled_from([0.1, 1.0])),
        l2=draw(st.sampled_from([0.0, 0.01])),
        forward_weight_bound=draw(st.sampled_from([math.inf, 1.0])),
    )


@hypothesis_settings
@given(
    sparse_rules(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_random_sparse_rules_equal_one_product_per_monomial(
    rule, batch, fan_in, fan_out, no_self, no_excitation, seed
):
    model = small_model(
        fan_in, [fan_out], forbid_self_inhibition=no_self, forbid_excitation=no_excitation
    )
    filled(rule, seed)
    inputs = batch_for(rule, batch, fan_in, 500 + seed)
    assert_update_equals_oracle(rule, model, parameters_of(model, seed), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", [
    {"w": ["1"]}, {"w": ["w"], "b": ["b"], "m": ["m"]}, {"b": ["y"]}, {"m": ["m"]}, {},
])  # fmt: skip
def test_rules_of_few_special_terms_equal_the_oracle(kind, terms):
    widths = {group: len(kind.variable_names(group)) for group in "wbm"}
    powers = {
        "1": lambda n: (0,) * n,
        "y": lambda n: (1,) + (0,) * (n - 1),
    }
    exponents = {
        group: [powers.get(name, lambda n: (0,) * (n - 1) + (1,))(widths[group]) for name in names]
        for group, names in terms.items()
    }
    rule, model = filled(kind(exponents)), small_model()
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule, 4, 3))


@pytest.mark.parametrize("inhibition", ["none", "l1", "l2"])
def test_layers_without_lateral_weights_are_updated_too(inhibition):
    rule, model = filled(PolynomialRule.of_degree(2)), small_model(inhibition=inhibition)
    params = parameters_of(model)
    assert_update_equals_oracle(rule, model, params, batch_for(rule, 4, 3))
    assert set(rule.update(model, params, batch_for(rule, 4, 3))[1]) == {"w", "b"}


def test_gradients_of_an_update_agree_with_finite_differences():
    rule = filled(PolynomialRule.of_degree(2, bound="tanh", l2=0.01))
    model, x = small_model(2, [2]), normal(9, 3, 2).detach()
    names = [name for name, _ in rule.named_parameters()]
    layer_names = list(model.layers[1].parameter_shapes())

    def function(*tensors):
        coefficients = dict(zip(names, tensors[: len(names)], strict=True))
        layer = dict(zip(layer_names, tensors[len(names) :], strict=True))
        with torch.nn.utils.stateless._reparametrize_module(rule, coefficients):
            return tuple(rule.update(model, [{}, layer], x)[1].values())

    coefficients = [p.detach().clone().requires_grad_() for p in rule.parameters()]
    layer = list(parameters_of(model)[1].values())
    assert torch.autograd.gradcheck(function, (*coefficients, *layer))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind):
    rule = filled(kind.of_degree(3, bound="tanh", forward_weight_bound=1.0), scale=0.02)
    model = small_model(6, [4])
    params = parameters_of(model)
    views = tuple(normal(60 + k, 40, 6).detach() for k in range(rule.views))
    expected = rule.update(model, params, views)[1]
    single = {name: tensor.detach().float() for name, tensor in params[1].items()}
    actual = rule.float().update(model, [{}, single], tuple(v.float() for v in views))[1]
    for name, tensor in actual.items():
        assert_near(tensor, expected[name].detach().float(), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_changes_nothing_in_place(kind):
    rule = filled(kind.of_degree(3, bound="tanh", forward_weight_bound=0.5, l2=0.1))
    model = small_model(3, [4, 2], forbid_self_inhibition=True, forbid_excitation=True)
    params, batch = parameters_of(model), batch_for(rule, 5, 3)
    views = batch if isinstance(batch, tuple) else (batch,)
    tensors = [*rule.parameters(), *tensors_of(params), *views]
    before, names = [t.detach().clone() for t in tensors], [list(layer) for layer in params]
    new = tensors_of(rule.update(model, params, batch))
    values = [t.detach().clone() for t in new]
    weighted_sum(new).backward()
    for tensor, value in zip([*tensors, *new], [*before, *values], strict=True):
        assert torch.equal(tensor, value)
    assert [list(layer) for layer in params] == names


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_gives_the_same_bits(kind):
    rule, model = filled(kind.of_degree(3, bound="tanh")), small_model(3, [4, 2])
    params, batch = parameters_of(model), batch_for(rule, 700, 3)
    with torch.no_grad():
        without = tensors_of(rule.update(model, params, batch))
    for tensor, other in zip(without, tensors_of(rule.update(model, params, batch)), strict=True):
        assert torch.equal(tensor, other) and not tensor.requires_grad


def test_zero_coefficients_leave_everything_as_it_is():
    rule, model = PolynomialRule.of_degree(3, bound="tanh").double(), small_model(3, [4, 2])
    params = parameters_of(model)
    new = rule.update(model, params, batch_for(rule, 5, 3))
    for tensor, old in zip(tensors_of(new), tensors_of(params), strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("degree", [2, 3])
def test_a_pair_rule_of_equal_views_updates_like_a_rule_of_one(degree):
    pair, model = filled(PolynomialPairRule.of_degree(degree, bound="tanh")), small_model()
    # Both views' powers of a variable add up when the views are equal.
    merged = {group: {} for group in "wbm"}
    for group, terms in pair.exponents.items():
        for term, value in zip(terms, getattr(pair, group).tolist(), strict=True):
            half = len(term) // 2
            both = (*(p + q for p, q in zip(term[:half], term[half:], strict=False)), term[-1])
            merged[group][both] = merged[group].get(both, 0.0) + value
    single = PolynomialRule({group: list(terms) for group, terms in merged.items()}, bound="tanh")
    single.double()
    with torch.no_grad():
        for group, terms in merged.items():
            getattr(single, group).copy_(torch.tensor(list(terms.values()), dtype=DOUBLE))
        single.diagonal.copy_(pair.diagonal)
    params, x = parameters_of(model), normal(50, 4, 3)
    expected = single.update(model, params, x)[1]
    for name, tensor in pair.update(model, params, (x, x))[1].items():
        assert_near(tensor, expected[name])


def test_pair_rule_is_unchanged_when_views_swap_and_its_terms_with_them():
    rule, model = filled(PolynomialPairRule.of_degree(2)), small_model()
    swapped_terms = {
        group: [(*t[len(t) // 2 : 2 * (len(t) // 2)], *t[: len(t) // 2], t[-1]) for t in terms]
        for group, terms in rule.exponents.items()
    }
    swapped = PolynomialPairRule(swapped_terms).double()
    with torch.no_grad():
        for p, q in zip(swapped.parameters(), rule.parameters(), strict=True):
            p.copy_(q)
    params, (one, two) = parameters_of(model), batch_for(rule, 5, 3)
    expected = rule.update(model, params, (one, two))[1]
    for name, tensor in swapped.update(model, params, (two, one))[1].items():
        assert_near(tensor, expected[name])


# ---- several layers ----


def test_a_later_layer_sees_the_output_from_before_the_update():
    model = small_model(3, [4, 2])
    rule = PerLayerRule([filled(PolynomialRule.of_degree(2), seed) for seed in (0, 10)])
    params, x = parameters_of(model), normal(50, 5, 3)
    assert_update_equals_oracle(rule, model, params, x)
    first, second = model.layers[1:]
    hidden = first(x, params[1])
    alone = rule.rules[1].update(Sequential([second]), [params[2]], hidden)[0]
    for name, tensor in rule.update(model, params, x)[2].items():
        assert_near(tensor, alone[name], 1e-14)


def test_one_rule_serves_every_layer():
    model, rule = small_model(3, [4, 2]), filled(PolynomialRule.of_degree(2))
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule, 5, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_one_rule_serves_layers_with_and_without_lateral_weights(kind):
    layers = [
        LateralLinear(3, 4, ACTIVATION, inhibition="none"),
        LateralLinear(4, 3, ACTIVATION, inh_steps=2),
        LateralLinear(3, 2, ACTIVATION, inhibition="l2"),
    ]
    model, rule = Sequential(layers), filled(kind.of_degree(2, bound="tanh"))
    params, batch = parameters_of(model), batch_for(rule, 5, 3)
    for _ in range(2):
        assert_update_equals_oracle(rule, model, params, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_rule_updates_as_the_rule_and_goes_its_own_way(kind):
    rule, model = filled(kind.of_degree(2, bound="tanh")), small_model()
    params, batch = parameters_of(model), batch_for(rule, 5, 3)
    before = tensors_of(rule.update(model, params, batch))
    other = copy.deepcopy(rule)
    for tensor, expected in zip(
        tensors_of(other.update(model, params, batch)), before, strict=True
    ):
        assert torch.equal(tensor, expected)
    other.keep({"w": torch.zeros(len(other.w), dtype=torch.bool)})
    for tensor, expected in zip(tensors_of(rule.update(model, params, batch)), before, strict=True):
        assert torch.equal(tensor, expected)
    assert torch.equal(other.update(model, params, batch)[1]["w"], params[1]["w"])


def test_per_layer_pair_rules_equal_the_oracle():
    model = small_model(3, [3, 2])
    rules = [filled(PolynomialPairRule.of_degree(2, bound="tanh"), seed) for seed in (0, 10)]
    rule = PerLayerRule(rules)
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rules[0], 5, 3))


def test_images_are_flattened_before_they_reach_the_rule():
    model, rule = small_model(6, [2]), filled(PolynomialRule.of_degree(2))
    params, x = parameters_of(model), normal(50, 5, 2, 3)
    expected = rule.update(model, params, x.flatten(1))[1]
    for name, tensor in rule.update(model, params, x)[1].items():
        assert torch.equal(tensor, expected[name])


def test_another_number_of_rules_than_layers_is_refused():
    model = small_model(3, [4, 2])
    params = parameters_of(model)
    for count in (0, 1, 3):
        rule = PerLayerRule([PolynomialRule.of_degree(1).double() for _ in range(count)])
        with pytest.raises(RuleError, match=rf"a rule for each layer with weights, 2, got {count}"):
            rule.update(model, params, normal(0, 5, 3))


def test_another_number_of_views_is_refused():
    model = small_model()
    params, x = parameters_of(model), normal(0, 5, 3)
    single = PolynomialRule.of_degree(1).double()
    pair = PolynomialPairRule.of_degree(1).double()
    with pytest.raises(RuleError, match="takes 1 views of each input, got 2"):
        single.update(model, params, (x, x))
    for batch, views in ((x, 1), ((x, x, x), 3), ([x], 1)):
        with pytest.raises(RuleError, match=f"takes 2 views of each input, got {views}"):
            pair.update(model, params, batch)
        with pytest.raises(RuleError, match=f"takes 2 views of each input, got {views}"):
            PerLayerRule([pair]).update(model, params, batch)


def test_a_rule_without_an_update_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="LearningRule has neither update_layer nor"):
        LearningRule().update_layer(None, {}, (), (), ())


# ---- removing terms ----


def masks_for(rule, seed: int) -> dict[str, torch.Tensor]:
    return {
        name: normal(seed + k, *p.shape) > 0 for k, (name, p) in enumerate(rule.named_parameters())
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_is_kept_updates_as_if_the_rest_were_zero(kind, seed):
    rule, model = filled(kind.of_degree(2, bound="tanh"), seed), small_model()
    params, batch = parameters_of(model), batch_for(rule, 4, 3)
    rule.update(model, params, batch)  # whatever it remembers of its terms must be forgotten
    masks = masks_for(rule, 3000 + 10 * seed)
    zeroed = filled(kind.of_degree(2, bound="tanh"), seed)
    with torch.no_grad():
        for name, p in zeroed.named_parameters():
            p.mul_(masks[name])
    names = [n for n, v in zeroed.coefficients().items() if v]
    expected = zeroed.update(model, params, batch)[1]
    rule.keep(masks)
    assert list(rule.coefficients()) == names
    assert rule.coefficients() == {n: v for n, v in zeroed.coefficients().items() if v}
    for name, tensor in rule.update(model, params, batch)[1].items():
        assert_near(tensor, expected[name])
    assert_update_equals_oracle(rule, model, params, batch)


def test_kept_coefficients_are_trainable_and_keep_their_dtype():
    rule = filled(PolynomialRule.of_degree(2))
    rule.keep({"w": rule.w.detach() > 0})
    assert isinstance(rule.w, nn.Parameter) and rule.w.requires_grad and rule.w.dtype == DOUBLE
    assert 0 < len(rule.w) < 15 and len(rule.b) == 6


def test_coefficients_that_were_not_trained_are_not_after_a_removal_either():
    rule = filled(PolynomialRule.of_degree(2))
    rule.b.requires_grad_(False)
    rule.keep({name: p.detach() > 0 for name, p in rule.named_parameters()})
    assert rule.w.requires_grad and not rule.b.requires_grad


def test_removing_nothing_changes_nothing():
    rule = filled(PolynomialRule.of_degree(2))
    before = rule.coefficients()
    rule.keep({name: torch.ones_like(p, dtype=torch.bool) for name, p in rule.named_parameters()})
    assert rule.coefficients() == before


def test_everything_may_be_removed():
    rule, model = filled(PolynomialRule.of_degree(2)), small_model()
    rule.keep({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in rule.named_parameters()})
    params = parameters_of(model)
    new = rule.update(model, params, batch_for(rule, 4, 3))
    for tensor, old in zip(tensors_of(new), tensors_of(params), strict=True):
        assert torch.equal(tensor, old)
    assert rule.coefficients() == {}
    assert rule.formula() == "Δw = 0\nΔb = 0"


def test_per_layer_masks_reach_their_rule():
    rule = PerLayerRule([filled(PolynomialRule.of_degree(1), seed) for seed in (0, 10)])
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in rule.named_parameters()}
    masks["rules.1.w"][0] = False
    masks["rules.0.diagonal"][0] = False
    rule.keep(masks)
    sizes = [len(p) for r in rule.rules for p in (r.w, r.b, r.m, r.diagonal)]
    assert sizes == [5, 3, 4, 0, 4, 3, 4, 1]


# ---- names and formulas ----


def test_coefficients_are_named_by_their_monomials():
    rule = PolynomialRule({"w": [(1, 0, 1, 0), (0, 2, 0, 1)], "b": [(0, 0)], "m": [(1, 2, 0)]})
    assert list(rule.coefficients()) == ["w/x y", "w/s^2 w", "b/1", "m/y_j y_i^2", "m/diagonal"]
    pair = PolynomialPairRule(
        {"w": [(1, 0, 0, 0, 2, 1, 0)], "b": [(1, 1, 1)], "m": [(1, 0, 0, 3, 1)]},
        lateral_diagonal=False,
    )
    assert list(pair.coefficients()) == ["w/x1 s2^2 y2", "b/y1 y2 b", "m/y1_j y2_i^3 m"]


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_coefficients_are_unique(kind):
    rule = kind.of_degree(3)
    assert len(rule.coefficients()) == sum(len(p) for p in rule.parameters())
    per_layer = PerLayerRule([kind.of_degree(1), kind.of_degree(1)])
    assert len(per_layer.coefficients()) == sum(len(p) for p in per_layer.parameters())
    assert {name[:2] for name in per_layer.coefficients()} == {"1/", "2/"}


def example_rule() -> PolynomialRule:
    rule = PolynomialRule(
        {"w": [(1, 0, 1, 0), (0, 0, 2, 1), (0, 0, 0, 0)], "b": [(1, 0)], "m": [(1, 1, 0)]}
    ).double()
    with torch.no_grad():
        rule.w.copy_(torch.tensor([0.25, -0.5, 0.0]))
        rule.m.fill_(1e-3)
        rule.diagonal.fill_(-2.0)
    return rule


def test_the_formula_names_the_largest_terms_first():
    expected = "Δw = - 0.5 y^2 w + 0.25 x y\nΔb = 0\nΔm = - 2 diagonal + 0.001 y_j y_i"
    assert example_rule().formula() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_speaks_of_lateral_weights_where_the_rule_has_terms_of_them(kind):
    with_m, without = (kind.of_degree(2, lateral=lateral) for lateral in (True, False))
    assert with_m.formula() == "Δw = 0\nΔb = 0\nΔm = 0" and r"\Delta m" in with_m.tex()
    assert without.formula() == "Δw = 0\nΔb = 0" and r"\Delta m" not in without.tex()


def test_the_formula_counts_the_terms_left_out():
    lines = example_rule().formula(max_terms=1).splitlines()
    assert lines[0] == "Δw = - 0.5 y^2 w + ... (1 smaller terms)"
    assert lines[2] == "Δm = - 2 diagonal + ... (1 smaller terms)"


def test_latex_names_the_largest_terms_first():
    lines = example_rule().formula(latex=True).splitlines()
    assert lines[0] == (r"\Delta w = - 5.00 \cdot 10^{-1} y^2 w + 2.50 \cdot 10^{-1} x y")
    assert lines[2] == (r"\Delta m = - 2.00 \cdot 10^{0} \delta_{ij} + 1.00 \cdot 10^{-3} y_j y_i")


@hypothesis_settings
@given(sparse_rules(), st.integers(0, 99))
def test_every_formula_lists_the_terms_by_size(rule, seed):
    filled(rule, seed)
    for latex in (False, True):
        groups = "wbm" if rule.m.numel() or rule.diagonal.numel() else "wb"
        for line, group in zip(rule.formula(latex=latex).splitlines(), groups, strict=True):
            numbers = r"(\d\.\d\d) \\cdot 10\^\{(-?\d+)\}" if latex else r"[+-] (\S+)"
            parts = re.findall(numbers, re.sub(r"= (?=\d)", "= + ", line))
            sizes = [float("e".join(p)) if latex else float(p) for p in parts]
            values = [abs(v) for n, v in rule.coefficients().items() if n[0] == group]
            assert sizes == sorted(sizes, reverse=True)
            expected = torch.tensor(sorted(values, reverse=True), dtype=DOUBLE)
            assert torch.allclose(torch.tensor(sizes, dtype=DOUBLE), expected, rtol=6e-3)


def test_a_coefficient_that_is_not_finite_has_its_place_in_every_formula():
    rule = example_rule()
    with torch.no_grad():
        rule.w.copy_(torch.tensor([math.nan, -math.inf, 0.25]))
    assert "nan" in rule.formula() and "- inf" in rule.formula()
    assert r"\mathrm{nan}" in rule.tex() and r"- \mathrm{inf}" in rule.tex()


def test_latex_of_a_pair_rule_has_the_view_as_a_subscript():
    latex = filled(PolynomialPairRule.of_degree(3)).formula(latex=True)
    assert not re.search(r"[a-z]\d", latex)


def test_latex_braces_powers_of_two_digits():
    rule = filled(PolynomialRule({"w": [(0, 0, 10, 0)]}))
    assert "y^{10}" in rule.formula(latex=True)


def test_the_formula_of_a_per_layer_rule_goes_layer_by_layer():
    rule = PerLayerRule([example_rule(), example_rule()])
    block = example_rule().formula()
    assert rule.formula() == f"layer 1\n{block}\nlayer 2\n{block}"
    assert rule.formula(latex=True, max_terms=1).count("smaller terms") == 4


# ---- saving and loading ----


def assert_same_rule(one, two):
    assert type(one) is type(two)
    assert one.to_dict() == two.to_dict()
    assert one.coefficients() == two.coefficients()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_rule_reads_back_exactly(kind, dtype, tmp_path):
    rule = filled(kind.of_degree(3, bound="clamp", bound_size=0.3, l2=0.1)).to(dtype)
    save_rule(rule, tmp_path / "rule.json")
    loaded = load_rule(tmp_path / "rule.json")
    assert_same_rule(rule, loaded)
    assert all(p.dtype == DOUBLE and p.requires_grad for p in loaded.parameters())
    for p, q in zip(rule.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.double(), q)


@hypothesis_settings
@given(rules=st.lists(sparse_rules(), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_any_rule_reads_back_exactly_from_json(rules, seed):
    rules = [filled(rule, seed) for rule in rules]
    for rule in (*rules, PerLayerRule(rules)):
        assert_same_rule(rule, rule_from_dict(json.loads(json.dumps(rule.to_dict()))))


def test_the_file_is_plain_json(tmp_path):
    save_rule(example_rule(), tmp_path / "rule.json")
    description = json.loads((tmp_path / "rule.json").read_text())
    assert description["kind"] == "PolynomialRule"
    assert description["terms"]["w"][0] == {"exponents": [1, 0, 1, 0], "coefficient": 0.25}
    assert description["forward_weight_bound"] is None


def test_a_loaded_rule_updates_as_the_saved_one(tmp_path):
    rule = PerLayerRule([
        filled(PolynomialRule.of_degree(3, bound="tanh", forward_weight_bound=1.0), seed)
        for seed in (0, 10)
    ])  # fmt: skip
    model = small_model(3, [4, 2])
    params, x = parameters_of(model), normal(50, 5, 3)
    save_rule(rule, tmp_path / "rule.json")
    loaded = load_rule(str(tmp_path / "rule.json"))
    expected = tensors_of(rule.update(model, params, x))
    for tensor, other in zip(tensors_of(loaded.update(model, params, x)), expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", ["w", "b", "m", "diagonal"])
def test_a_rule_whose_terms_were_removed_reads_back_exactly(kind, removed):
    rule = filled(kind.of_degree(2))
    rule.keep({removed: torch.zeros(len(getattr(rule, removed)), dtype=torch.bool)})
    assert_same_rule(rule, rule_from_dict(rule.to_dict()))


def test_a_rule_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(RuleError, match="cannot read a learning rule"):
            load_rule(path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b'{"kind": "Rule"}', b'{"kind": []}',
    b"\xff\xfe\x00", b'{"kind": "PolynomialRule"}', b'{"kind": "PerLayerRule"}',
    b'{"kind": "PerLayerRule", "rules": 3}', b'{"kind": "PerLayerRule", "rules": [{}]}',
])  # fmt: skip
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "rule.json").write_bytes(content)
    with pytest.raises(RuleError):
        load_rule(tmp_path / "rule.json")


def test_a_truncated_file_is_refused(tmp_path):
    save_rule(example_rule(), tmp_path / "rule.json")
    whole = (tmp_path / "rule.json").read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (tmp_path / "rule.json").write_bytes(whole[:length])
        with pytest.raises(RuleError):
            load_rule(tmp_path / "rule.json")


def with_replaced(value, path, replacement):
    """A copy of nested lists and dicts with the entry at `path` replaced, or deleted if `...`."""
    if not path:
        return replacement
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and replacement is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = with_replaced(value[path[0]], path[1:], replacement)
    return copy


@pytest.mark.parametrize("path, replacement", [
    (("terms", "w", 0, "exponents", 0), -1),
    (("terms", "w", 0, "exponents", 0), 1.5),
    (("terms", "w", 0, "exponents", 0), "x"),
    (("terms", "w", 0, "exponents", 0), None),
    (("terms", "w", 0, "exponents", 0), math.inf),
    (("terms", "w", 0, "exponents", 0), math.nan),
    (("terms", "w", 0, "exponents"), [1, 0, 1]),
    (("terms", "w", 0, "exponents"), [0, 0, 2, 1]),
    (("terms", "w", 0, "exponents"), 3),
    (("terms", "w", 0, "coefficient"), "x"),
    (("terms", "w", 0, "coefficient"), None),
    (("terms", "w", 0, "coefficient"), [1.0]),
    (("terms", "w", 0, "coefficient"), 10**400),
    (("bound_size",), 10**400),
    (("terms", "w", 0, "coefficient"), ...),
    (("terms", "w", 0), 3),
    (("terms", "w"), ...),
    (("terms", "w"), {"a": 1}),
    (("terms", "m"), None),
    (("terms",), []),
    (("terms",), ...),
    (("kind",), "LearningRule"),
    (("bound",), "soft"),
    (("bound",), ...),
    (("bound_size",), 0.0),
    (("bound_size",), math.nan),
    (("bound_size",), "x"),
    (("l2",), 1.5),
    (("l2",), None),
    (("forward_weight_bound",), -1.0),
    (("forward_weight_bound",), ...),
    (("diagonal",), 3),
    (("diagonal",), ["x"]),
    (("diagonal",), [1.0, 2.0]),
    (("diagonal",), ...),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_damaged_description_is_refused(path, replacement):
    # Bugs when written: infinite powers (OverflowError), powers and coefficients that are text
    # (a bare ValueError), powers that are not whole and a diagonal of two (accepted).
    damaged = with_replaced(example_rule().to_dict(), path, replacement)
    with pytest.raises(RuleError):
        rule_from_dict(damaged)


# ---- wrong settings ----


@pytest.mark.parametrize("options", [
    {"bound": "relu"}, {"bound_size": 0.0}, {"bound_size": -1.0}, {"bound_size": math.nan},
    {"l2": -0.1}, {"l2": 1.0}, {"forward_weight_bound": 0.0}, {"forward_weight_bound": -1.0},
])  # fmt: skip
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(RuleError):
        PolynomialRule.of_degree(1, **options)


@pytest.mark.parametrize("exponents", [
    {"w": [(1, 0, 1)]}, {"w": [(1, 0, 1, 0, 0)]}, {"b": [(1,)]}, {"m": [(1, 1)]},
    {"w": [(-1, 0, 1, 0)]}, {"w": [(1, 0, 1, 0), (1, 0, 1, 0)]},
])  # fmt: skip
def test_terms_of_another_length_negative_or_twice_are_refused(exponents):
    with pytest.raises(RuleError):
        PolynomialRule(exponents)


# ---- classical rules ----


def test_oja_is_the_step_of_oja():
    rate = 2.0**-5
    rule = classical_rule("oja", rate).double()
    model = Sequential([LateralLinear(5, 3, Activation("identity"), inhibition="none")])
    params = parameters_of(model)
    params[0]["b"] = torch.zeros(3, dtype=DOUBLE)
    x, w = normal(50, 7, 5).detach(), params[0]["w"].detach()
    new = rule.update(model, params, x)[0]
    expected = torch.zeros(3, 5, dtype=DOUBLE)
    for i in range(3):
        change = torch.zeros(5, dtype=DOUBLE)
        for image in x:
            y = w[i] @ image
            change += rate * y * (image - y * w[i]) / len(x)
        expected[i] = w[i] + change
    assert_near(new["w"], expected, 1e-14)
    assert torch.equal(new["b"], params[0]["b"])


def test_oja_finds_the_first_principal_direction():
    rule = classical_rule("oja", 0.05).double()
    model = Sequential([LateralLinear(4, 1, Activation("identity"), inhibition="none")])
    directions = torch.linalg.qr(normal(0, 4, 4).detach())[0]
    x = normal(1, 2000, 4).detach() * torch.tensor([2.0, 1.0, 0.5, 0.2]) @ directions.T
    params = [{"w": normal(2, 1, 4).detach(), "b": torch.zeros(1, dtype=DOUBLE)}]
    with torch.no_grad():
        for _ in range(400):
            params = rule.update(model, params, x)
    _, vectors = torch.linalg.eigh(x.T @ x)
    cosine = torch.nn.functional.cosine_similarity(params[0]["w"][0], vectors[:, -1], dim=0)
    assert abs(cosine) > 1 - 1e-6
    assert params[0]["w"].norm().item() == pytest.approx(1.0, abs=1e-6)


def test_foldiak_is_the_step_of_foldiak():
    rate, target = 2.0**-4, 0.125
    rule = classical_rule("foldiak", rate, target=target).double()
    layer = LateralLinear(
        5, 3, ACTIVATION, inh_steps=3, forbid_self_inhibition=True, forbid_excitation=True
    )
    model = Sequential([layer])
    params = parameters_of(model)
    x = normal(50, 7, 5).detach()
    w, b, m = (params[0][name].detach() for name in "wbm")
    y = layer(x, params[0]).detach()
    expected_w, expected_b, expected_m = w.clone(), b.clone(), m.clone()
    for inputs, active in zip(x, y, strict=True):
        for i in range(3):
            expected_w[i] += rate * active[i] * (inputs - w[i]) / 7
            expected_b[i] += rate * (target - active[i]) / 7
            for j in range(3):
                expected_m[i, j] -= rate * (active[i] * active[j] - target**2) / 7
    expected_m.clamp_(max=0).fill_diagonal_(0)
    new = rule.update(model, params, x)[0]
    assert_near(new["w"], expected_w, 1e-14)
    assert_near(new["b"], expected_b, 1e-14)
    assert_near(new["m"], expected_m, 1e-14)


def test_hebb_instar_and_anti_hebbian_are_their_steps():
    rate, model = 2.0**-4, small_model(4, [3])
    params, x = parameters_of(model), normal(50, 6, 4).detach()
    w, m = params[1]["w"], params[1]["m"]
    y = model.layers[1](x, params[1])
    hebb = classical_rule("hebb", rate).double().update(model, params, x)[1]
    instar = classical_rule("instar", rate).double().update(model, params, x)[1]
    anti = classical_rule("anti-hebbian", rate).double().update(model, params, x)[1]
    assert_near(hebb["w"], w + rate * y.T @ x / 6, 1e-14)
    assert_near(instar["w"], w + rate * (y.T @ x / 6 - y.mean(0)[:, None] * w), 1e-14)
    assert_near(anti["m"], m - rate * y.T @ y / 6, 1e-14)
    for new, names in ((hebb, "bm"), (instar, "bm"), (anti, "wb")):
        assert all(torch.equal(new[name], params[1][name]) for name in names)


def test_classical_rules_take_the_options_of_a_rule_and_can_be_saved():
    for name in ("hebb", "oja", "instar", "anti-hebbian", "foldiak"):
        rule = classical_rule(name, 0.25, bound="tanh", l2=0.5)
        assert (rule.bound, rule.l2) == ("tanh", 0.5)
        assert_same_rule(rule, rule_from_dict(rule.to_dict()))
    assert classical_rule("oja", 0.25).formula().startswith("Δw = 0.25 x y - 0.25 y^2 w")


def test_a_rule_that_is_not_classical_is_refused_with_those_that_are():
    with pytest.raises(RuleError, match=r"'ojas'; choose from hebb, oja"):
        classical_rule("ojas", 0.1)


# ---- Sanger's rule ----


def test_sanger_is_the_step_of_sanger_in_every_layer():
    rate, rule = 2.0**-5, SangerRule(2.0**-5).double()
    model = lateral_mlp(5, [4, 3], Activation("identity"), inhibition="none")
    params = parameters_of(model)
    x = normal(50, 7, 5).detach()
    new = rule.update(model, params, x)
    assert new[0] == {}
    for layer, old, updated in zip(model.layers[1:], params[1:], new[1:], strict=True):
        w, y = old["w"].detach(), layer(x, old).detach()
        expected = w.clone()
        for inputs, outputs in zip(x, y, strict=True):
            for i in range(len(w)):
                reconstruction = sum(outputs[k] * w[k] for k in range(i + 1))
                expected[i] += rate * outputs[i] * (inputs - reconstruction) / len(x)
        assert_near(updated["w"], expected, 1e-14)
        assert torch.equal(updated["b"], old["b"])
        x = y


def test_sanger_finds_the_principal_components_in_order():
    model = Sequential([LateralLinear(5, 3, Activation("identity"), inhibition="none")])
    directions = torch.linalg.qr(normal(0, 5, 5).detach())[0]
    x = normal(1, 2000, 5).detach() * torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2]) @ directions.T
    params = [{"w": normal(2, 3, 5).detach(), "b": torch.zeros(3, dtype=DOUBLE)}]
    rule = SangerRule(0.05).double()
    with torch.no_grad():
        for _ in range(2000):
            params = rule.update(model, params, x)
    _, vectors = torch.linalg.eigh(x.T @ x)
    products = (params[0]["w"] @ vectors.flip(1)[:, :3]).abs()
    assert torch.allclose(products, torch.eye(3, dtype=DOUBLE), atol=1e-6)


def test_sanger_refuses_a_convolution():
    model = Sequential([LateralConv2d(1, 2, 3, Activation("identity"), inhibition="none")])
    params = [{"w": torch.zeros(2, 1, 3, 3), "b": torch.zeros(2)}]
    with pytest.raises(RuleError, match="fully connected"):
        SangerRule(0.1).update(model, params, torch.zeros(2, 1, 5, 5))


# ---- effects of terms ----


def changes_by_single_terms(rule, layer, old, x, s, y) -> dict[str, list]:
    """What each term would change alone, by the plain formulas; views as tuples, or one of them."""
    of_w, of_b, of_m = (
        (oracles.delta_w, oracles.delta_b, oracles.delta_m)
        if rule.views == 1
        else (oracles.pair_delta_w, oracles.pair_delta_b, oracles.pair_delta_m)
    )
    terms = {
        group: zip(rule.exponents[group], getattr(rule, group), strict=True) for group in "wbm"
    }
    changes = {
        "w": [of_w([term], [psi], x, s, y, old["w"]) for term, psi in terms["w"]],
        "b": [of_b([term], [psi], y, old["b"]) for term, psi in terms["b"]],
    }
    if "m" in old:
        changes["m"] = [of_m([term], [psi], [], y, old["m"]) for term, psi in terms["m"]]
        changes["m"] += [of_m([], [], [psi], y, old["m"]) for psi in rule.diagonal]
    return changes


def effects_of_one_step(rules, model, params, batch) -> list[float]:
    """The ratio of root mean squares, layer by layer, in the order of the coefficients."""
    rules, effects, views = iter(rules), [], batch if isinstance(batch, tuple) else (batch,)
    for layer, old in zip(model.layers, params, strict=True):
        if not old:
            views = tuple(layer(view, old) for view in views)
            continue
        s, y = zip(*(layer.respond(view, old) for view in views), strict=True)
        seen = (views, s, y) if len(views) == 2 else (views[0], s[0], y[0])
        for changes in changes_by_single_terms(next(rules), layer, old, *seen).values():
            whole = sum(changes)
            effects += [(c.square().mean() / whole.square().mean()).sqrt().item() for c in changes]
        views = y
    return effects


def plain_parameters(model) -> list[dict]:
    return [{n: t.detach() for n, t in layer.items()} for layer in parameters_of(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_ratios_of_root_mean_squares(kind):
    rule = PerLayerRule([filled(kind.of_degree(2), seed) for seed in (0, 10)])
    model = small_model(3, [4, 2])
    params, batch = plain_parameters(model), batch_for(rule.rules[0], 5, 3)
    effects = term_effects(rule, term_grams(rule, model, params, iter([batch])))
    expected = effects_of_one_step(rule.rules, model, params, batch)
    assert list(effects) == list(rule.coefficients())
    assert list(effects.values()) == pytest.approx(expected, rel=1e-9)


@hypothesis_settings
@given(sparse_rules(), st.integers(0, 99))
def test_effects_of_any_rule_are_those_before_bound_decay_and_limit(rule, seed):
    filled(rule, seed)
    model = small_model(3, [2])
    params, batch = plain_parameters(model), batch_for(rule, 4, 3)
    free = filled(type(rule)(rule.exponents, lateral_diagonal=bool(len(rule.diagonal))), seed)
    effects, of_free = (
        term_effects(r, term_grams(r, model, params, iter([batch]))) for r in (rule, free)
    )
    assert effects == of_free
    expected = effects_of_one_step([rule], model, params, batch)
    assert list(effects.values()) == pytest.approx(expected, rel=1e-6)


def test_grams_are_summed_over_evenly_spaced_steps_of_a_training():
    rule = filled(PolynomialRule.of_degree(2, bound="tanh"))
    model = small_model(3, [4])
    params, batches = plain_parameters(model), [batch_for(rule, 5, 3, k) for k in range(7)]
    grams = term_grams(rule, model, params, iter(batches), steps=7, points=3)
    expected = {}
    for step, batch in enumerate(batches):
        if step in (0, 3, 6):
            for name, matrix in term_grams(rule, model, params, iter([batch])).items():
                expected[name] = expected.get(name, 0) + matrix
        params = rule.update(model, params, batch)
    for name, matrix in grams.items():
        assert_near(matrix, expected[name])


def test_the_sum_of_a_gram_matrix_is_the_square_of_the_whole_change():
    rule = filled(PolynomialRule.of_degree(2))
    model = small_model(3, [4])
    params, batch = plain_parameters(model), batch_for(rule, 5, 3)
    new = rule.update(model, params, batch)[1]
    for name, matrix in term_grams(rule, model, params, iter([batch])).items():
        assert_near(matrix.sum(), (new[name] - params[1][name]).square().sum(), 1e-9)


def test_a_rule_that_all_layers_share_has_the_effects_of_all_their_synapses():
    rule = filled(PolynomialRule.of_degree(1))
    model = small_model(3, [4, 2])
    params, batch = plain_parameters(model), batch_for(rule, 5, 3)
    shared = term_grams(rule, model, params, iter([batch]))
    apart = term_grams(PerLayerRule([rule, rule]), model, params, iter([batch]))
    for group in "wbm":
        assert_near(shared[group], apart[f"1/{group}"] + apart[f"2/{group}"])
    assert list(term_effects(rule, shared)) == list(rule.coefficients())


def test_effects_in_a_convolution_of_the_whole_image_are_those_in_a_dense_layer():
    rule, options = filled(PolynomialRule.of_degree(3)), {"inh_steps": 3}
    image = Sequential([LateralConv2d(2, 4, 3, ACTIVATION, **options)])
    dense = Sequential([LateralLinear(18, 4, ACTIVATION, **options)])
    params, x = plain_parameters(image), normal(50, 5, 2, 3, 3).detach()
    flat = [params[0] | {"w": params[0]["w"].flatten(1)}]
    grams = term_grams(rule, image, params, iter([x]))
    for name, matrix in term_grams(rule, dense, flat, iter([x.flatten(1)])).items():
        assert_near(grams[name], matrix, 1e-9)


def test_a_term_has_no_effect_where_nothing_changes_or_the_parameter_is_missing():
    silent = PolynomialRule.of_degree(1).double()
    model = small_model(3, [2])
    grams = term_grams(silent, model, plain_parameters(model), iter([normal(50, 4, 3)]))
    assert set(term_effects(silent, grams).values()) == {0.0}
    rule = filled(PolynomialRule.of_degree(1))
    model = lateral_mlp(3, [2], ACTIVATION, inhibition="none")
    grams = term_grams(rule, model, plain_parameters(model), iter([normal(50, 4, 3)]))
    effects = term_effects(rule, grams)
    assert all((effect == 0) == (name[0] == "m") for name, effect in effects.items())


def test_terms_that_cancel_each_other_have_effects_above_one():
    rule = PolynomialRule({"b": [(0, 0), (1, 0)]}).double()
    with torch.no_grad():
        rule.b.copy_(torch.tensor([-1.0, 1.1]))
    layer = LateralLinear(1, 1, Activation("identity"), inhibition="none")
    params = [{name: torch.ones(shape, dtype=DOUBLE) for name, shape in
               layer.parameter_shapes().items()}]  # fmt: skip
    grams = term_grams(rule, Sequential([layer]), params, iter([torch.zeros(3, 1).double()]))
    assert term_effects(rule, grams) == pytest.approx({"b/1": 10.0, "b/y": 11.0})


def test_measuring_effects_changes_nothing_and_keeps_no_graph():
    rule = filled(PolynomialRule.of_degree(2))
    model = small_model(3, [2])
    params, before = parameters_of(model), copy.deepcopy(rule.state_dict())
    old = [t.clone() for t in tensors_of(params)]
    grams = term_grams(rule, model, params, iter([normal(50, 4, 3)] * 3), steps=3)
    assert all(not matrix.requires_grad for matrix in grams.values())
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(params), old, strict=True))


def test_a_formula_with_effects_names_the_largest_effects_first():
    effects = {"w/x y": 1.25, "w/y^2 w": 0.0321, "w/1": 0.0, "b/y": 0.0, "m/y_j y_i": 2e-5,
               "m/diagonal": 1.0}  # fmt: skip
    expected = (
        "Δw = 0.25 x y [1.2] - 0.5 y^2 w [0.032]\nΔb = 0\n"
        "Δm = - 2 diagonal [1] + 0.001 y_j y_i [2e-05]"
    )
    assert example_rule().formula(effects) == expected
    line = example_rule().formula(effects, latex=True, max_terms=1).splitlines()[0]
    assert line == r"\Delta w = 2.50 \cdot 10^{-1} x y \;[1.2] + ... (1 smaller terms)"
    both = PerLayerRule([example_rule(), example_rule()])
    swapped = effects | {"w/x y": 0.01}
    of_both = {f"1/{n}": e for n, e in effects.items()} | {f"2/{n}": e for n, e in swapped.items()}
    one, two = (example_rule().formula(e) for e in (effects, swapped))
    assert both.formula(of_both) == f"layer 1\n{one}\nlayer 2\n{two}"


def test_tex_is_an_environment_with_every_term_once():
    rule = filled(PolynomialPairRule.of_degree(2))
    effects = {name: k / 7 for k, name in enumerate(rule.coefficients())}
    for text in (rule.tex(), rule.tex(effects)):
        lines = text.splitlines()
        assert (lines[0], lines[-1]) == (r"\begin{align*}", r"\end{align*}")
        assert text.count(r"\cdot") == len(effects)
        assert all(line.endswith(r" \\") for line in lines[1:-2])
        assert all(line.count("&") == 1 and line.count(r"\cdot") <= 3 for line in lines[1:-1])
        for line in lines[1:-1]:
            MathTextParser("agg").parse(f"${line.removesuffix(chr(92) * 2).replace('&', '')}$")
    assert rule.tex(effects).count("[") == len(effects)


def test_tex_of_a_rule_without_terms_is_zero_and_of_several_layers_a_block_each():
    empty = PolynomialRule({"w": [(1, 0, 1, 0)]})
    assert empty.tex().splitlines()[1:-1] == [r"\Delta w ={}& 0 \\", r"\Delta b ={}& 0"]
    both = PerLayerRule([example_rule(), example_rule()])
    assert both.tex() == f"Layer 1:\n{example_rule().tex()}\nLayer 2:\n{example_rule().tex()}"


def test_a_rule_that_starts_from_another_has_its_coefficients_and_0_elsewhere():
    short = classical_rule("foldiak", 0.3)
    rule = filled(PolynomialRule.of_degree(3))
    rule.start_from(short)
    values = rule.coefficients()
    for name, value in short.coefficients().items():
        assert values.pop(name) == pytest.approx(value)
    assert not any(values.values())


def test_a_rule_without_lateral_terms_has_none():
    rule = PolynomialRule.of_degree(3, lateral=False)
    assert not rule.exponents["m"] and not len(rule.diagonal)
    assert len(rule.coefficients()) == 35 + 10
