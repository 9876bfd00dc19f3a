"""The family of rules with unit statistics, against one product per term and closed forms."""

import json
import math

import pytest
import torch
import unit_statistics_oracle as oracle
from hypothesis import given, note, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from oracles import DOUBLE, assert_near, gradients, normal, weighted_sum
from torch import Tensor

from krotov_hopfield import BioLinear
from learning_rules import RuleError, classical_rule, term_effects, term_grams
from models_fully_local import Activation, LateralConv2d, LateralLinear, lateral_mlp
from rules import load_rule, rule_from_dict, save_rule
from rules.unit_statistics import (
    DEFAULT,
    PRESETS,
    RUNNING,
    UnitStatisticsRule,
    default_rule,
    foldiak,
    latent_predictive,
    oja,
    preset,
)
from rules.unit_statistics_sums import GatedPlan
from rules.unit_statistics_terms import parse_term
from train import MEMORY, train

ACTIVATION = Activation("sigmoid", 2.0)
hypothesis_settings = settings(deadline=None, max_examples=60, derandomize=True)
RHO = dict.fromkeys(RUNNING, 0.7)


def filled(rule: UnitStatisticsRule, seed: int = 0) -> UnitStatisticsRule:
    """The rule with normal numbers everywhere, in float64."""
    rule.double()
    with torch.no_grad():
        for k, p in enumerate(rule.parameters()):
            p.copy_(normal(1000 + seed + k, *p.shape, scale=0.5))
    return rule


def numbers_of(rule) -> list[Tensor]:
    return [number for number in rule.parameters() if number.requires_grad]


def network(fan_in=4, sizes=(3,), activation=ACTIVATION, inhibition="none", **options):
    return lateral_mlp(
        fan_in, sizes, activation, inhibition=inhibition, inh_steps=2, inh_factor=0.3, **options
    )


def parameters_of(model, seed: int = 0, scale: float = 0.6) -> list[dict[str, Tensor]]:
    return [
        {
            name: normal(100 * number + seed + k, *shape, scale=scale)
            for k, (name, shape) in enumerate(layer.parameter_shapes().items())
        }
        for number, layer in enumerate(model.layers)
    ]


def batch_for(rule, size: int = 6, features: int = 4, seed: int = 50):
    views = tuple(normal(seed + k, size, features) for k in range(rule.views))
    return views if rule.views == 2 else views[0]


def tensors_of(params) -> list[Tensor]:
    return [layer[name] for layer in params for name in sorted(layer)]


def assert_update_equals_oracle(rule, model, params, batch, relative=1e-10) -> None:
    """Two updates and their gradients by numbers of the rule, old parameters and inputs."""
    views = batch if isinstance(batch, tuple) else (batch,)
    leaves = [*numbers_of(rule), *tensors_of(params), *views]
    actual, expected = params, params
    for _ in range(2):
        actual = rule.update(model, actual, batch)
        expected = oracle.update(rule, model, expected, batch)
    expected = [{name: e[name] for name in a} for a, e in zip(actual, expected, strict=True)]
    actual, expected = tensors_of(actual), tensors_of(expected)
    for tensor, expected_tensor in zip(actual, expected, strict=True):
        assert_near(tensor, expected_tensor, relative)
    actual = gradients(weighted_sum(actual), leaves)
    expected = gradients(weighted_sum(expected), leaves)
    for grad, expected_grad in zip(actual, expected, strict=True):
        assert_near(grad, expected_grad, 10 * relative)


# ---- against one product per term ----

NAMES = ["s", "y", "gain", "c", "z", "r", "r_cov", "r_exact", "share", "won"]
PAIR_NAMES = [*NAMES, "r_cross", *(f"{n}'" for n in NAMES), "r_cross'"]
POWERS_OF_VAR = ["", "var", "var^-1", "var^-1/2", "var^0.3", "mean", "mean^2 square"]


@st.composite
def terms(draw, group: str, views: int) -> str:
    """A random term of at most three quantities that differ from sample to sample."""
    sending = {"w": ["", "x", "x^2"], "b": [""], "m": ["", "y_j", "c_j", "z_j^2"]}[group]
    names = st.sampled_from(PAIR_NAMES if views == 2 else NAMES)
    factors = [draw(st.sampled_from(sending)), *draw(st.lists(names, max_size=2))]
    if draw(st.booleans()):
        factors.append("gain")
    factors += [draw(st.sampled_from(POWERS_OF_VAR)), draw(st.sampled_from(["", "", group]))]
    return " ".join(factors) or "1"


@st.composite
def rules(draw) -> UnitStatisticsRule:
    views, groups = draw(st.sampled_from([1, 2])), {}
    for group in draw(st.sampled_from(["w", "wb", "wm", "wbm"])):
        texts = draw(st.lists(terms(group, views), min_size=1, max_size=4))
        groups[group] = {str(parse_term(text, group, views)): 0.0 for text in texts}
    learn = draw(
        st.sampled_from([(), ("eta", "eps", "tau", "decay", "beta", "exponents"), ("eps",)])
    )
    rho = draw(st.sampled_from([{}, RHO, {"mean": 0.3}, {"corr": 0.5, "cov": 0.2}]))
    learn += tuple(f"rho_{name}" for name in rho) if learn else ()
    return filled(UnitStatisticsRule(
        groups, views=views, step=draw(st.sampled_from(["rms", "plain"])), tau=10.0,
        decay=0.1, eta=0.2, eps=0.3, beta=2.0, rho=rho, learn=learn,
        lateral_power=draw(st.sampled_from([0.0, -0.75])),
    ), draw(st.integers(0, 100)))  # fmt: skip


@given(rules(), st.sampled_from(["none", "lateral", "l2"]), st.sampled_from([1, 3]),
       st.sampled_from(["sigmoid", "tanh", "identity"]))  # fmt: skip
@hypothesis_settings
def test_any_terms_change_parameters_as_one_product_per_term_does(rule, inhibition, units, base):
    note(json.dumps(rule.to_dict()))
    model = network(sizes=(units, 2), activation=Activation(base, 1.5), inhibition=inhibition)
    assert_update_equals_oracle(rule, model, parameters_of(model, scale=0.4), batch_for(rule), 1e-8)


@pytest.mark.parametrize("base", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_form_to_be_learned_equals_one_product_per_term(views, base):
    texts = [t for t in DEFAULT if views == 2 or "'" not in t]
    rule = filled(UnitStatisticsRule.of_terms(texts, views=views, learn=("eta", "eps")))
    model = network(sizes=(5,), activation=Activation(base, 2.0))
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule), 1e-9)


LINEAR = [
    *DEFAULT, "x gain c", "x gain c'", "x gain mean", "x gain z var^-1/2", "x gain z' var^-1/2",
    "x gain r_exact", "x gain r_exact'", "x gain r_cov", "x gain r_cov'", "x gain r_cross",
    "x gain r_cross'",
]  # fmt: skip


@pytest.mark.parametrize("views", [1, 2])
def test_all_that_is_linear_in_activities_is_one_step_and_equals_what_it_stands_for(views):
    texts = [t for t in LINEAR if views == 2 or not ("'" in t or "cross" in t)]
    rule = filled(UnitStatisticsRule.of_terms(texts, views=views, learn=("eta", "eps"),
                                              lateral_power=-0.4))  # fmt: skip
    model = network(sizes=(5,))
    assert rule._gated_plan().terms is not None
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule), 1e-13)
    results = []
    for plan in (rule._gated_plan(), GatedPlan(None, torch.zeros(0, len(texts)), 0)):
        rule._gated = plan
        params, batch = parameters_of(model), batch_for(rule)
        new = tensors_of(rule.update(model, params, batch))
        leaves = [*numbers_of(rule), *tensors_of(params)]
        results.append([*new, *gradients(weighted_sum(new), leaves)])
    for at_once, in_parts in zip(*results, strict=True):
        assert_near(at_once, in_parts, 1e-12)


def test_convolutions_learn_as_dense_layers_do_on_patches():
    rule = filled(UnitStatisticsRule.of_terms([*DEFAULT, "s y' w"], rho={"var": 0.5}))
    conv = LateralConv2d(2, 3, (3, 2), ACTIVATION, stride=2, padding=1, inhibition="none")
    dense = LateralLinear(12, 3, ACTIVATION, inhibition="none")
    params = {"w": normal(1, 3, 2, 3, 2, scale=0.5), "b": normal(2, 3)}
    images = [normal(5 + k, 4, 2, 6, 5) for k in range(2)]
    unfold = torch.nn.Unfold((3, 2), stride=2, padding=1)
    rows = [unfold(image).transpose(1, 2).flatten(0, 1) for image in images]
    results = []
    for layer, x, w in ((conv, images, params["w"]), (dense, rows, params["w"].flatten(1))):
        old = params | {"w": w}
        s, y = zip(*(layer.respond(v, old) for v in x), strict=True)
        new = rule.update_layer(layer, old, x, s, y)
        new = [new["w"].flatten(1), new["b"], new["var"]]
        results.append([*new, *gradients(weighted_sum(new), [*numbers_of(rule), *images])])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


# ---- what it is for ----


def one_layer(rule, inputs=5, units=4, size=7, seed=0):
    """A layer, its old parameters, and x, s, y of all views."""
    layer = LateralLinear(inputs, units, ACTIVATION, inhibition="none")
    old = parameters_of(lateral_mlp(inputs, [units], ACTIVATION, inhibition="none"), seed)[1]
    x = [normal(seed + 50 + v, size, inputs).detach() for v in range(rule.views)]
    s, y = zip(*(layer.respond(v, old) for v in x), strict=True)
    return layer, old, x, s, y


def pooled_statistics(y) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Variance with 1e-4, covariance without its diagonal, centred activities of the views."""
    mean = torch.cat(list(y)).mean(0)
    c = [v - mean for v in y]
    covariance = sum(v.T @ v for v in c) / sum(map(len, c))
    variance = covariance.diagonal() + 1e-4
    return variance, covariance - covariance.diagonal().diag(), c


def test_latent_predictive_learning_is_the_gradient_of_its_objective():
    a, d = 3.0, 5.0
    rule = latent_predictive(a, d).double()
    layer, old, x, s, y = one_layer(rule)
    variance, covariance, _ = pooled_statistics(y)
    distance = (y[0] - y[1]).square().mean(0)
    objective = (a / 2 * distance - 2 * variance.log()).sum() + 2 * d * covariance.square().sum()
    delta = rule.changes(layer, old, x, s, y, {g: getattr(rule, g) for g in "wbm"})
    for name, gradient in zip("wb", gradients(objective, [old["w"], old["b"]]), strict=True):
        assert_near(delta[name], -gradient, 1e-10)


def test_r_exact_is_the_gradient_of_squared_correlations():
    rule = UnitStatisticsRule({"w": {"x gain r_exact": 1.0}}).double()
    layer, old, x, s, y = one_layer(rule)
    variance, covariance, _ = pooled_statistics(y)
    objective = (covariance.square() / variance / variance[:, None]).sum() / 2
    delta = rule.changes(layer, old, x, s, y, {"w": rule.w})
    assert_near(delta["w"], *gradients(objective, [old["w"]]), 1e-10)


def test_cross_view_decorrelation_is_a_gradient_at_constant_variances():
    rule = preset("cross-view", strength=0.75).double()
    layer, old, x, s, y = one_layer(rule)
    variance, _, c = pooled_statistics(y)
    z = [v / variance.detach().sqrt() for v in c]
    across = (z[0].T @ z[1] + z[1].T @ z[0]) / (2 * len(y[0]))
    others = across - across.diagonal().diag()
    objective = 0.375 * others.square().sum() - across.diagonal().sum()
    delta = rule.changes(layer, old, x, s, y, {"w": rule.w})
    assert_near(delta["w"], -gradients(objective, [old["w"]])[0], 1e-10)


@pytest.mark.parametrize("views", [1, 2])
def test_a_synapse_changes_by_its_own_input_and_weight_alone(views):
    texts = [t for t in (*DEFAULT, "x r_exact var^-1", "x r_cov", "x^2 s w", "y^2 w^2", "x r_cross",
                         "x won s", "share w")
             if views == 2 or not ("'" in t or "cross" in t)]  # fmt: skip
    rule = filled(UnitStatisticsRule.of_terms(texts, views=views))
    layer, old, x, s, y = one_layer(rule)
    s, y = ([t.detach() for t in held] for held in (s, y))
    x = [v.requires_grad_() for v in x]
    for i, j in ((0, 0), (2, 3)):
        changed = rule.changes(layer, old, x, s, y, {"w": rule.w})["w"]
        *of_x, of_w = gradients(changed[i, j], [*x, old["w"]])
        for grad in of_x:
            assert grad[:, j].all()
            assert grad.count_nonzero() == len(grad)
        assert of_w[i, j] != 0
        assert of_w.count_nonzero() == 1


@pytest.mark.parametrize("rule, classical, inhibition", [
    (oja(0.1), classical_rule("oja", 0.1), "none"),
    (foldiak(0.1, target=0.2), classical_rule("foldiak", 0.1, target=0.2), "lateral"),
])  # fmt: skip
def test_classical_rules_are_points_of_both_families(rule, classical, inhibition):
    model = network(inhibition=inhibition, forbid_self_inhibition=True, forbid_excitation=True)
    params, x = parameters_of(model), normal(50, 6, 4)
    expected = classical.double().update(model, params, x)[1]
    new = rule.double().update(model, params, x)[1]
    for name, tensor in expected.items():
        assert_near(new[name], tensor, 1e-7)  # the polynomial's coefficients were float32


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_softhebb_is_what_competing_units_with_soft_gates_do(beta):
    options = {"gate": "soft", "lebesgue_p": 2, "batch_norm": False}
    units = BioLinear(5, 4, inverse_temperature=beta, **options).double()
    rule = preset("softhebb", rate=1.0, beta=beta).double()
    layer, old, (x,), (s,), (y,) = one_layer(rule)
    new = rule.update_layer(layer, old, [x], [s], [y])
    change = torch.cat([new["w"] - old["w"], (new["b"] - old["b"])[:, None]], dim=1)
    weight = torch.cat([old["w"], old["b"][:, None]], dim=1)
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    expected = units.delta_weights(torch.cat([x, ones], dim=1), weight)
    assert_near(change / change.abs().max(), expected / expected.abs().max(), 1e-12)


def test_rules_written_before_there_was_competition_are_read():
    rule = preset("latent-predictive").double()
    written, state = rule.to_dict(), rule.state_dict()
    del written["start"]["beta"], state["_extra_state"]["beta"]
    assert rule_from_dict(written).to_dict() == rule.to_dict()
    rule.load_state_dict(state)
    assert rule.number("beta") == 1.0


@pytest.mark.parametrize("gain", [False, True])
def test_bcm_moves_by_activity_beyond_a_sliding_threshold(gain):
    rule = preset("bcm", rate=0.1, gain=gain).double()
    layer, old, (x,), (s,), (y,) = one_layer(rule)
    factor = 2 * y * (1 - y) if gain else 1
    post = factor * y * (y - y.square().mean(0))
    new = rule.update_layer(layer, old, [x], [s], [y])
    assert_near(new["w"], old["w"] + 0.1 * post.T @ x / len(x))
    assert_near(new["b"], old["b"] + 0.1 * post.mean(0))


def test_a_layer_whose_gain_is_not_known_is_refused():
    rule = UnitStatisticsRule.of_terms(["x gain y"], views=1)
    model = network(activation=torch.exp)
    with pytest.raises(RuleError, match="their activation must be an Activation, not"):
        rule.update(model, parameters_of(model), batch_for(rule))


def test_the_signal_multiplies_what_each_sample_changes():
    reward = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0, 0.0], dtype=DOUBLE)
    rule = UnitStatisticsRule(
        {"w": {"x gain signal z'": 1.0}}, step="plain", signal=lambda x: reward
    )
    rule.double()
    model = network()
    assert_update_equals_oracle(rule, model, parameters_of(model), batch_for(rule))
    lacking = rule_from_dict(rule.to_dict())
    with pytest.raises(RuleError, match=r"set rule\.signal"):
        lacking.update(model, parameters_of(model), batch_for(rule))


def test_pairs_may_be_exchanged():
    rule = filled(UnitStatisticsRule.of_terms([*DEFAULT, "x r_cross", "x s y'"]))
    model = network()
    params, (x, other) = parameters_of(model), batch_for(rule)
    one, two = (tensors_of(rule.update(model, params, b)) for b in ((x, other), (other, x)))
    for a, b in zip(one, two, strict=True):
        assert_near(a, b, 1e-12)


# ---- learning it ----

LEARNED = ("eta", "eps", "tau", "decay", "beta", "exponents", *(f"rho_{name}" for name in RUNNING))


def learned_rule() -> UnitStatisticsRule:
    texts = [*DEFAULT, "x r_exact", "x gain r_cov", "x r_cross", "x y square", "x won'", "share w"]
    return filled(UnitStatisticsRule.of_terms(
        texts, m=["y_j y_i", "m"], rho=RHO, learn=LEARNED, eta=0.1, eps=0.3, tau=5.0, decay=0.1,
    ))  # fmt: skip


def test_hypergradients_are_finite_differences():
    rule = learned_rule()
    model = network(inhibition="lateral")
    params = [{n: t.detach() for n, t in layer.items()} for layer in parameters_of(model)]
    batches = [batch_for(rule, seed=k) for k in range(0, 30, 10)]

    def loss() -> Tensor:
        return weighted_sum(tensors_of(train(model, params, iter(batches), rule, 3)))

    numbers = numbers_of(rule)
    for number, gradient in zip(numbers, gradients(loss(), numbers), strict=True):
        flat, expected = number.data.flatten(), torch.zeros_like(gradient).flatten()
        for k in range(number.numel()):
            values = []
            for step in (1e-5, -1e-5):
                moved = flat.clone()
                moved[k] += step
                number.data = moved.view_as(number)
                values.append(loss().item())
            expected[k] = (values[0] - values[1]) / 2e-5
        number.data = flat.view_as(number)
        assert_near(gradient, expected.view_as(gradient), 1e-5)


def test_every_memory_policy_gives_the_same_hypergradient():
    rule, model = learned_rule(), network(sizes=(3, 2), inhibition="lateral")
    params = parameters_of(model)
    batches = [batch_for(rule, seed=k) for k in range(0, 50, 10)]
    results = []
    for memory in MEMORY:
        new = tensors_of(train(model, params, iter(batches), rule, 5, memory=memory))
        grads = gradients(weighted_sum(new), [*numbers_of(rule), *tensors_of(params)])
        results.append([*new, *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_training_in_two_parts_is_training_in_one():
    rule, model = learned_rule().float(), network(inhibition="lateral")
    params = [{n: t.detach().float() for n, t in p.items()} for p in parameters_of(model)]
    batches = [tuple(v.detach().float() for v in batch_for(rule, seed=k)) for k in range(0, 60, 10)]
    whole = train(model, params, iter(batches), rule, 6, grad=False)
    part = train(model, params, iter(batches[:2]), rule, 2)
    part = [{n: t.detach().clone() for n, t in layer.items()} for layer in part]
    part = train(model, part, iter(batches[2:]), rule, 4, grad=False)
    assert set(whole[1]) == {"w", "b", "m", "updates", *RUNNING}
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(part), tensors_of(whole), strict=True))


def test_a_learned_number_moves_by_its_parameter_on_a_logarithmic_scale():
    rule = UnitStatisticsRule.of_terms(["w"], learn=("eta", "rho_var"), rho={"var": 0.25}).double()
    with torch.no_grad():
        for u in rule.moved.values():
            u.fill_(2.0)
    assert rule.number("eta").item() == pytest.approx(0.0054 * math.exp(0.6))
    logit = math.log(0.25 / 0.75) + 0.6
    assert rule.number("rho_var").item() == pytest.approx(1 / (1 + math.exp(-logit)))
    assert rule.number("eps") == 0.1


# ---- where numbers are extreme ----


def extreme_cases():
    def dead(old):
        return old | {"b": old["b"] + torch.tensor([80.0, -80.0, 0.0])}

    def same(x, other):
        return x, x.clone()

    yield "dead units", 3, dead, lambda x, other: (x, other)
    yield "equal views", 3, dict, same
    yield "one image", 3, dict, lambda x, other: (x[:1], other[:1])
    yield "one image, twice", 3, dict, lambda x, other: same(x[:1], other)
    yield "one unit", 1, dict, lambda x, other: (x, other)
    yield "no input", 3, dict, lambda x, other: (0 * x, 0 * other)
    yield "huge input", 3, dict, lambda x, other: (1e6 * x, 1e6 * other)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name, units, params_of, views_of", list(extreme_cases()))
def test_finite_inputs_give_finite_parameters_and_gradients(
    name, units, params_of, views_of, views
):
    texts = [*DEFAULT, "x gain r_exact", "x gain r_cov", "x gain r_cross", "x c var^-1"]
    texts = [t for t in texts if views == 2 or not ("'" in t or "cross" in t)]
    rule = filled(UnitStatisticsRule.of_terms(texts, views=views, rho={"cov": 0.5})).float()
    model = network(sizes=(units,))
    params = [{n: t.detach().float() for n, t in p.items()} for p in parameters_of(model)]
    params = [{}, params_of(params[1])]
    for tensor in params[1].values():
        tensor.requires_grad_()
    batch = views_of(*(normal(50 + k, 6, 4).detach().float() for k in range(2)))
    new = params
    for _ in range(2):
        new = rule.update(model, new, batch if views == 2 else batch[0])
    new = tensors_of(new)
    grads = gradients(weighted_sum(new), [*numbers_of(rule), *tensors_of(params)])
    assert all(tensor.isfinite().all() for tensor in [*new, *grads])


def test_a_unit_that_does_not_move_is_divided_by_eps():
    rule = UnitStatisticsRule({"w": {"x y": 0.0}, "b": {"1": 1.0}}, views=1, eta=0.5, eps=0.1)
    model = network()
    params = parameters_of(model)
    new = rule.double().update(model, params, batch_for(rule))[1]
    assert_near(new["w"], params[1]["w"])
    assert_near(new["b"], params[1]["b"] + 0.5 / 0.1)


def test_what_is_not_finite_is_not_hidden():
    rule, model = filled(default_rule()), network()
    params, (x, other) = parameters_of(model), batch_for(default_rule())
    bad = x.detach().clone()
    bad[0, 0] = math.nan
    assert rule.update(model, params, (bad, other))[1]["w"].isnan().all()


# ---- what it says of itself ----


def test_terms_change_together_what_they_change_alone():
    rule, model = learned_rule(), network(inhibition="lateral")
    params, batch = parameters_of(model), batch_for(rule)
    layer, old = model.layers[1], params[1]
    s, y = zip(*(layer.respond(x, old) for x in batch), strict=True)
    alone = rule.term_changes(layer, old, batch, s, y)
    psi = {g: getattr(rule, g) for g in alone}
    for group, whole in rule.changes(layer, old, batch, s, y, psi).items():
        if group in alone:  # b has no terms of its own
            assert_near(alone[group].sum(0), whole)
    effects = term_effects(rule, term_grams(rule, model, params, iter([batch])))
    assert list(effects) == list(rule.term_coefficients())
    assert all(effects.values())


def test_a_saved_rule_is_the_same_rule(tmp_path):
    rule = learned_rule()
    save_rule(rule, tmp_path / "rule.json")
    read = load_rule(tmp_path / "rule.json")
    assert read.coefficients() == rule.coefficients()
    assert read.formula() == rule.formula()
    for (name, a), (other, b) in zip(read.named_parameters(), rule.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    model = network(inhibition="lateral")
    params, batch = parameters_of(model), batch_for(rule)
    one, two = (tensors_of(r.update(model, params, batch)) for r in (rule, read))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read_back_and_written_as_formula(name):
    rule = preset(name).double()
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))).to_dict() == rule.to_dict()
    lines = rule.formula().splitlines()
    lateral = ["Δm"] if rule.terms["m"] else []
    assert [line[:2] for line in lines] == ["Δw", "Δb", *lateral, "w_"]
    for line in rule.tex().splitlines()[1:-1]:
        MathTextParser("agg").parse(f"${line.removesuffix(chr(92) * 2).replace('&', '')}$")


def test_formula_names_the_largest_terms_first():
    rule = UnitStatisticsRule(
        {"w": {"x gain y": -0.5, "x gain z'": 2.0, "w": 0.0}, "m": {"y_i y_j": 1.0}}, tau=20.0
    )
    assert rule.formula() == (
        "Δw = 2 x gain z' - 0.5 x gain y\nΔb = the terms of w with x, x = 1\nΔm = 1 y_j y_i\n"
        "w_ij += eta / (1 + t / tau) Δw_ij / sqrt(mean_j Δw_ij^2 + eps^2);  "
        "eta = 0.0054, eps = 0.1, tau = 20"
    )
    effects = {"w/x gain y": 0.9, "w/x gain z'": 0.5, "w/w": 0.0, "m/y_j y_i": 1.0}
    line = rule.formula(effects, max_terms=1).splitlines()[0]
    assert line == "Δw = - 0.5 x gain y [0.9] + ... (1 smaller terms)"


def test_coefficients_name_terms_and_numbers_of_the_step():
    rule = UnitStatisticsRule({"w": {"x y^2": 2.0}}, rho={"var": 0.5}, learn=("exponents",))
    assert rule.coefficients() == {
        "w/x y^2": 2.0, "step/eta": 0.0054, "step/eps": 0.1, "step/rho_var": 0.5,
        "exponent/w/x y^2": 0.0, "exponent/eta units": 0.0, "exponent/eta fan_in": 0.0,
    }  # fmt: skip


def test_the_lateral_power_is_told_and_saved_and_kept_by_a_rule_that_starts_from_another():
    rule = UnitStatisticsRule({"w": {"x gain r": 1.0}}, lateral_power=-0.75)
    assert rule.coefficients()["step/lateral_power"] == -0.75
    assert rule.formula().endswith("each lateral current times (n / 32)^lateral_power")
    MathTextParser("path").parse(
        f"${rule.formula(latex=True).splitlines()[-1]}$".replace("text", "mathrm")
    )
    other = UnitStatisticsRule.of_terms(["x gain r"], lateral_power=-0.5)
    other.start_from(rule)
    assert (other.w.item(), other.start["lateral_power"]) == (1.0, -0.5)
    resumed = UnitStatisticsRule.of_terms(["x gain r"])
    resumed.load_state_dict(rule.state_dict())
    for same in (rule_from_dict(rule.to_dict()), resumed):
        assert same.start["lateral_power"] == -0.75
    alone = UnitStatisticsRule({"w": {"x gain y": 1.0}}, lateral_power=-0.75)
    assert "step/lateral_power" not in alone.coefficients() and "lateral" not in alone.formula()
    older = rule.to_dict()
    del older["start"]["lateral_power"]
    assert rule_from_dict(older).start["lateral_power"] == 0


def test_a_lateral_power_that_overflows_ends_in_numbers_that_are_not_finite():
    rule = UnitStatisticsRule({"w": {"x r^16 r'^16": 1.0}}, lateral_power=-16.0)
    model = network(sizes=(4,))
    new = rule.double().update(model, parameters_of(model), batch_for(rule))
    assert not all(tensor.isfinite().all() for tensor in tensors_of(new))


def test_a_lateral_power_changes_nothing_in_layers_of_32_units():
    texts = [*DEFAULT, "x gain r_exact"]
    model, results = network(sizes=(32,)), []
    for power in (0.0, -0.75):
        rule = filled(UnitStatisticsRule.of_terms(texts, lateral_power=power))
        results.append(tensors_of(rule.update(model, parameters_of(model), batch_for(rule))))
    assert all(map(torch.equal, *results))


def test_a_term_that_is_not_kept_is_gone_and_nothing_else_changes():
    rule = learned_rule()
    names = list(rule.term_coefficients())
    with torch.no_grad():
        rule.w[1:3] = 0
    model = network(inhibition="lateral")
    params, batch = parameters_of(model), batch_for(rule)
    before = tensors_of(rule.update(model, params, batch))
    masks = {name: torch.ones(p.shape, dtype=bool) for name, p in rule.named_parameters()}
    masks["w"][1:3] = False
    rule.keep(masks)
    assert list(rule.term_coefficients()) == [names[0], *names[3:]]
    assert len(rule.exponents["w"]) == len(rule.w)
    for a, b in zip(tensors_of(rule.update(model, params, batch)), before, strict=True):
        assert_near(a, b)


def test_a_rule_that_starts_from_another_has_its_numbers_and_0_elsewhere():
    short = filled(UnitStatisticsRule.of_terms(["x gain z'"], learn=("eta",), eta=0.01))
    rule = UnitStatisticsRule.of_terms(DEFAULT, learn=("eta", "eps")).double()
    rule.start_from(short)
    values = rule.coefficients()
    assert values.pop("w/x gain z'") == short.w.item()
    assert values.pop("step/eta") == short.coefficients()["step/eta"]
    assert values.pop("step/eps") == 0.1
    assert not any(values.values())
    with pytest.raises(RuleError, match="has a term w/x gain that this one lacks"):
        short.start_from(filled(rule))
    with pytest.raises(RuleError, match="1 views"):
        oja().start_from(rule)


def test_a_rule_that_starts_from_one_without_competition_keeps_its_temperature():
    alone, competing = (UnitStatisticsRule.of_terms([text], beta=3.0) for text in ("w", "x won"))
    rule = UnitStatisticsRule.of_terms(["x won", "w"], beta=7.0, learn=("eta", "beta"))
    rule.start_from(alone)
    assert rule.coefficients()["step/beta"] == 7.0
    rule.start_from(competing)
    assert rule.coefficients()["step/beta"] == 3.0


@pytest.mark.parametrize("options, message", [
    ({"step": "adam"}, "choose from rms, plain"),
    ({"views": 3}, "1 or 2 views"),
    ({"eta": 0.0}, "eta must be > 0"),
    ({"decay": -1.0}, "decay must be > 0"),
    ({"rho": {"var": 0.0}}, r"within \(0, 1\]"),
    ({"rho": {"median": 0.5}}, "time constants are of mean"),
    ({"learn": ("rho_var",)}, "below 1 to be learned"),
    ({"beta": 0.0}, "beta must be > 0"),
    ({"beta": math.inf}, "beta must be at most"),
    ({"learn": ("tau",)}, "finite to be learned"),
    ({"learn": ("psi",)}, "cannot be learned"),
    ({"learn": ("lateral_power",)}, "cannot be learned"),
    ({"lateral_power": 17.0}, "from -16 to 16"),
    ({"lateral_power": math.nan}, "from -16 to 16"),
    ({"b": ["x y"]}, "is no power of any of"),
])  # fmt: skip
def test_what_a_rule_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(RuleError, match=message):
        UnitStatisticsRule.of_terms(["x y"], **options)


def test_unknown_presets_and_repeated_terms_are_refused():
    with pytest.raises(RuleError, match="choose from default, latent-predictive"):
        preset("hebb")
    with pytest.raises(RuleError, match="repeat themselves"):
        UnitStatisticsRule.of_terms(["x y z'", "z' y x"])
    with pytest.raises(RuleError, match="not the description of a learning rule"):
        rule_from_dict({"kind": "UnitStatisticsRule"})


def test_a_saved_state_holds_the_numbers_that_another_rule_has_left():
    other = preset("latent-predictive", eta=0.02, eps=0.3, tau=70.0)
    rule, resumed = (
        UnitStatisticsRule.of_terms(list(map(str, other.terms["w"]))) for _ in range(2)
    )
    rule.start_from(other)
    resumed.load_state_dict(rule.state_dict())
    assert resumed.to_dict() == rule.to_dict()
    assert [resumed.number(name) for name in ("eps", "tau")] == [0.3, 70.0]
