"""Every way to the hypergradient of a task, on rules whose hypergradient is known."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import DOUBLE, assert_near, perturb_in_all_directions
from torch import nn

from experiment.errors import NonFiniteError
from hypergradients import HypergradientError
from hypgraddesc import MetaError, MetaSettings, check_settings
from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import LearningRule, PerLayerRule, PolynomialPairRule, PolynomialRule
from meta_gradients import (
    Forward,
    Implicit,
    LookBack,
    Persistent,
    Reverse,
    Strategies,
    Truncated,
    make_method,
)
from models_fully_local import Activation, lateral_mlp, lateral_network
from rules.competing_units import KrotovHopfieldRule
from rules.unit_statistics import UnitStatisticsRule
from train import MEMORY, METHOD, START, Draw, Training, train


class Follow(LearningRule):
    """w <- (1 - rate) w + rate goal (batch mean): a linear contraction with a known end."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.goal = nn.Parameter(torch.tensor([0.7, -0.2], dtype=DOUBLE))
        self.rate = rate

    def update(self, model, params, batch):
        target = self.goal.sum() * batch.mean(0) + self.goal[1]
        return [{}, {"w": (1 - self.rate) * params[1]["w"] + self.rate * target}]


class Start(nn.Module):
    """All of w at one trained number."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.4, dtype=DOUBLE), requires_grad=trained)

    def forward(self, model, generator=None):
        noise = torch.rand(3, 4, generator=generator, dtype=DOUBLE)
        return [{}, {"w": self.level + noise}]


def squares(model, params, generator):
    """A loss that is quadratic in w."""
    return params[1]["w"].square().sum(), {"largest": params[1]["w"].max().item()}


def follow(
    steps: int, rate: float = 0.3, trained_start: bool = True, outer_loss=squares
) -> tuple[Training, Draw]:
    data = torch.rand(5, 4, generator=torch.Generator().manual_seed(8), dtype=DOUBLE)
    rule, start = Follow(rate), Start(trained_start)
    return Training(
        nn.Module(), rule, start, lambda generator: itertools.repeat(data), outer_loss
    ), Draw((1,), steps)


def lateral(steps: int) -> tuple[Training, Draw]:
    """A polynomial rule on lateral-inhibitory units, other batches at each step."""
    rule = PolynomialRule.of_degree(2).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    initializer = GaussianInitializer({"b": FIXED, "m": FIXED}, {"w": FIXED}).double()
    batches = [torch.rand(6, 4, generator=generator, dtype=DOUBLE) for _ in range(steps)]
    return Training(
        lateral_mlp(4, [3], Activation()), rule, initializer, lambda generator: iter(batches),
        squares,
    ), Draw((1,), steps)  # fmt: skip


def exact(training: Training, draw: Draw) -> list[torch.Tensor]:
    """Backpropagation through everything at once."""
    params, batches = training.begin(draw)
    params = train(training.model, params, batches, training.rule, draw.steps, memory="keep")
    hparams = list(training.hyperparameters.values())
    loss, _ = squares(training.model, params, None)
    gradient = torch.autograd.grad(loss, hparams, allow_unused=True)
    pairs = zip(hparams, gradient, strict=True)
    return [torch.zeros_like(h) if g is None else g for h, g in pairs]


@pytest.mark.parametrize("method", [*(Reverse(memory) for memory in MEMORY), Forward()])
def test_methods_that_reach_the_start_give_the_whole_hypergradient(method):
    result = method(*follow(7))
    for g, e in zip(result.gradient, exact(*follow(7)), strict=True):
        assert_near(g, e, 1e-12)
    expected = Reverse()(*follow(7)).params[1]["w"].detach()
    assert_near(result.params[1]["w"].detach(), expected, 1e-13)


@pytest.mark.parametrize("method", [Truncated(K=80), LookBack(80), Implicit(80)])
def test_every_method_ends_in_the_same_where_training_has_converged(method):
    gradient = method(*follow(100, trained_start=False)).gradient
    assert_near(gradient[0], exact(*follow(100, trained_start=False))[0], 1e-9)


def test_truncation_leaves_out_what_came_before():
    """The error is what the first N - K updates did: the factor (1 - rate)^K of the gradient."""
    K = 3
    whole = exact(*follow(50, trained_start=False))[0]
    for method in (Truncated(K=K), LookBack(K)):
        gradient = method(*follow(50, trained_start=False)).gradient
        assert_near(gradient[0], (1 - 0.7**K) * whole, 1e-6)


def test_truncation_to_all_updates_leaves_out_nothing():
    for K in (6, 60):
        for g, e in zip(Truncated(K=K)(*lateral(6)).gradient, exact(*lateral(6)), strict=True):
            assert_near(g, e, 1e-12)


@pytest.mark.parametrize("method", [Reverse, Truncated])
def test_limited_adjoints_change_the_gradient_of_an_expanding_training_alone(method):
    """Going back through w' = 1.5 w - 0.5 goal, each adjoint is 1.5 times the last."""
    K = {"K": 6} if method is Truncated else {}
    expanding = follow(6, rate=-0.5, trained_start=False)
    free = method(**K)(*expanding)
    same = method(adjoint_limit=8.0, **K)(*expanding)
    assert torch.equal(same.gradient[0], free.gradient[0])  # the largest is 1.5^5 = 7.6
    held = method(adjoint_limit=1.0, **K)(*expanding)
    assert held.numbers == free.numbers
    assert_near(held.gradient[0], free.gradient[0] * 6 * 0.5 / (1.5**6 - 1))


def test_a_loss_at_several_times_is_the_mean_over_trainings_of_these_lengths():
    results = [Reverse()(*lateral_of(6, steps)) for steps in (2, 4, 6)]
    several = Reverse(loss_times=3)(*lateral(6))
    for g, *parts in zip(several.gradient, *(r.gradient for r in results), strict=True):
        assert_near(g, sum(parts) / 3, 1e-12)
    for name, value in several.numbers.items():
        assert value == pytest.approx(sum(r.numbers[name] for r in results) / 3, rel=1e-12)
    assert torch.equal(several.params[1]["w"], results[-1].params[1]["w"])
    more_than_steps = Reverse(loss_times=100)(*lateral(6)).numbers["meta_loss"]
    each = [Reverse()(*lateral_of(6, steps)).numbers["meta_loss"] for steps in range(1, 7)]
    assert more_than_steps == pytest.approx(sum(each) / 6, rel=1e-12)


def test_a_truncated_loss_at_several_times_spreads_them_over_the_last_updates():
    several = Truncated(loss_times=2, K=4)(*lateral(6))
    results = [Truncated(K=k)(*lateral_of(6, steps)) for k, steps in ((2, 4), (4, 6))]
    for g, *parts in zip(several.gradient, *(r.gradient for r in results), strict=True):
        assert_near(g, sum(parts) / 2, 1e-12)


def lateral_of(batches: int, steps: int) -> tuple[Training, Draw]:
    """`lateral` of so many batches, of which the first steps are used."""
    training, draw = lateral(batches)
    return training, replace(draw, steps=steps)


def test_looking_back_and_implicit_methods_take_any_polynomial_rule():
    """One term of the series is the gradient through the last update alone."""
    last = Truncated(K=1)(*lateral(6))
    for g, e in zip(LookBack(1)(*lateral(6)).gradient, last.gradient, strict=True):
        assert_near(g, e, 1e-12)
    result = Implicit(1)(*lateral(6))
    assert all(g.isfinite().all() for g in result.gradient)
    assert_near(result.params[1]["w"], last.params[1]["w"].detach(), 1e-12)


def directions(monkeypatch, training: Training, windows: int = 1) -> int:
    return perturb_in_all_directions(monkeypatch, list(training.hyperparameters.values()), windows)


def test_strategies_estimate_the_gradient_of_rules_and_starts(monkeypatch):
    training, draw = follow(4)
    gradient = Strategies(1e-4, directions(monkeypatch, training))(training, draw).gradient
    for g, e in zip(gradient, exact(training, draw), strict=True):
        assert_near(g, e, 1e-6)


def test_strategies_need_no_derivative(monkeypatch):
    class Rounded(Follow):
        def update(self, model, params, batch):
            (_, layer) = super().update(model, params, batch)
            return [{}, {"w": (1000 * layer["w"]).round() / 1000}]

    training, draw = follow(4, trained_start=False)
    method = Strategies(0.1, directions(monkeypatch, training))
    gradient = method(replace(training, rule=Rounded()), draw).gradient
    assert_near(gradient[0], exact(training, draw)[0], 0.02)


def windows_of(method, training, draw, count: int):
    """The results of so many windows of trainings that go on, keys as meta-steps give them."""
    results, start = [], None
    for window in range(count):
        results.append(method(training, replace(draw, key=(1, window), start=start)))
        start = results[-1].params
    return results


def test_persistent_strategies_are_those_of_a_loop_over_perturbed_trainings():
    """g = sum xi (L+ - L-) / (2 sigma^2 N), xi the sum of a pair's perturbations so far."""
    sigma, count = 1e-2, 2
    training, draw = follow(3)
    results = windows_of(Persistent(sigma, count), training, draw, 3)
    hparams = list(training.hyperparameters.values())
    values, data = [h.detach().clone() for h in hparams], next(training.batches(None))
    ends, xi = [None] * count, [[torch.zeros_like(v) for v in values] for _ in range(count)]
    for window, result in enumerate(results):
        of_window = replace(draw, key=(1, window))
        generator, expected = of_window.generator(METHOD), [torch.zeros_like(v) for v in values]
        seen = []
        for pair in range(count):
            noise = [
                sigma * torch.randn(v.shape, generator=generator, dtype=DOUBLE) for v in values
            ]
            xi[pair] = [x + e for x, e in zip(xi[pair], noise, strict=True)]
            ended = []
            for number, sign in enumerate((1, -1)):
                with torch.no_grad():
                    for h, v, e in zip(hparams, values, noise, strict=True):
                        h.copy_(v + sign * e)
                    params = ends[pair] and ends[pair][number]
                    if params is None:
                        params = training.initializer(None, of_window.generator(START))
                    for _ in range(3):
                        params = training.rule.update(None, params, data)
                ended.append(params)
                seen.append(squares(None, params, None)[0].item())
            ends[pair] = ended
            for g, x in zip(expected, xi[pair], strict=True):
                g += x * (seen[-2] - seen[-1]) / (2 * sigma**2 * count)
        with torch.no_grad():
            for h, v in zip(hparams, values, strict=True):
                h.copy_(v)
        for g, e in zip(result.gradient, expected, strict=True):
            assert_near(g, e, 1e-9)
        assert result.numbers["meta_loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-12)


def test_persistent_strategies_add_up_to_the_gradient_of_the_sum_of_losses(monkeypatch):
    pairs = directions(monkeypatch, follow(2)[0], windows=3)
    results = windows_of(Persistent(1e-4, pairs), *follow(2), 3)
    begun = replace(follow(2)[1], key=(1, 0))  # as the first window begins
    parts = [exact(follow(2)[0], replace(begun, steps=steps)) for steps in (2, 4, 6)]
    for number in range(2):
        total = sum(result.gradient[number] for result in results)
        assert_near(total, sum(part[number] for part in parts), 1e-6)


class Remembering(Follow):
    """Counts its updates in the parameters, from the first one on, and slows down with them."""

    def update(self, model, params, batch):
        (_, layer) = super().update(model, params, batch)
        count = params[1].get("count", torch.zeros((), dtype=DOUBLE))
        w = params[1]["w"] + (layer["w"] - params[1]["w"]) / (1 + count)
        return [{}, {"w": w, "count": count + 1}]


def test_strategies_take_rules_that_begin_to_remember_with_their_first_update(monkeypatch):
    training, draw = follow(4)
    training = replace(training, rule=Remembering())
    expected = exact(training, draw)
    for method in (Strategies, Persistent):
        with monkeypatch.context() as patch:
            estimate = method(1e-4, directions(patch, training))(training, draw).gradient
        for g, e in zip(estimate, expected, strict=True):
            assert_near(g, e, 1e-6)
    first, second = windows_of(Persistent(1e-3, 2), training, draw, 2)
    assert [layer["count"].item() for layer in first.params if "count" in layer] == [4] * 4
    assert [layer["count"].item() for layer in second.params if "count" in layer] == [8] * 4


def test_perturbed_trainings_leave_the_hyperparameters_alone():
    training, draw = lateral(3)
    before = {name: p.detach().clone() for name, p in training.hyperparameters.items()}
    Strategies(0.1, 2)(training, draw)
    for name, p in training.hyperparameters.items():
        assert torch.equal(p, before[name]) and p.grad is None


def test_numbers_are_those_of_the_outer_loss_and_means_where_it_was_evaluated_several_times():
    result = Reverse()(*follow(5))
    loss, numbers = squares(None, result.params, None)
    assert result.numbers == {"meta_loss": loss.item(), **numbers}
    seen = []

    def counted(model, params, generator):
        seen.append(squares(model, params, generator)[0].item())
        return squares(model, params, generator)

    result = Strategies(1e-3, 2)(*follow(5, outer_loss=counted))
    assert len(seen) == 4 and result.numbers["meta_loss"] == pytest.approx(sum(seen) / 4)
    assert result.numbers["meta_loss"] == pytest.approx(loss.item(), rel=1e-2)


def test_training_may_go_on_from_other_parameters():
    start = [{}, {"w": torch.full((3, 4), 3.0, dtype=DOUBLE)}]
    for method in (Reverse(), Forward(), Truncated(K=5), Strategies(1e-3, 1)):
        training, draw = follow(5)
        gradient = method(training, replace(draw, start=start)).gradient
        assert (gradient[1] == 0 and gradient[0].abs().max() > 0) or isinstance(method, Strategies)


def test_ungraded_updates_come_first_on_the_same_batches_for_every_method():
    training, draw = lateral(9)
    whole = Truncated(K=4)(training, draw)
    for method in (Reverse(), Truncated(K=4)):
        result = method(training, replace(draw, steps=4, ungraded_steps=5))
        for g, e in zip(result.gradient, whole.gradient, strict=True):
            assert_near(g, e, 1e-12)
    training, draw = follow(9, trained_start=False)
    result = Forward()(training, replace(draw, steps=4, ungraded_steps=5))
    assert_near(result.gradient[0], Truncated(K=4)(training, draw).gradient[0], 1e-12)


STATISTICS = {
    "one step": ({"x gain y'": 0.4, "x gain z": -0.3, "x gain r_exact": 0.2, "w": -0.1}, {}),
    "sums": ({"x z": -0.2, "x r": 0.3, "x s": 0.1, "x gain var^-1/2": 0.2}, {"step": "plain"}),
    "running": ({"x gain y": 0.3, "x gain z var^-1/2": -0.2}, {"rho": {"mean": 0.9, "var": 0.8}}),
    "competing": ({"x won": 0.5, "won s w": -0.4}, {"learn": ("eta", "beta")}),
}


def statistics(name: str, convolution: bool = False) -> tuple[Training, Draw]:
    """A rule of unit statistics, of pairs if its terms look at the other view."""
    terms, options = STATISTICS[name]
    views = 2 if any("'" in term for term in terms) else 1
    rule = UnitStatisticsRule({"w": terms}, views=views, eta=0.05, **options).double()
    shape = (1, 5, 4) if convolution else (1, 2, 3)
    network = {"convolutions": [(3, 2)], "pool": 1} if convolution else {}
    model = lateral_network(
        shape, [2] if convolution else [3], Activation("sigmoid", 2.0), inhibition="none", **network
    )
    if convolution:
        rule = PerLayerRule([rule, copy.deepcopy(rule)])
    return training_on_images(model, rule, shape, views)


def training_on_images(model, rule, shape, views: int = 1) -> tuple[Training, Draw]:
    generator, steps = torch.Generator().manual_seed(3), 2
    initializer = GaussianInitializer({"b": TRAINABLE, "m": FIXED}, {"w": TRAINABLE}).double()
    images = torch.rand(steps, views, 6, *shape, generator=generator, dtype=DOUBLE)
    batches = [of_step[0] if views == 1 else tuple(of_step) for of_step in images]
    return Training(
        model, rule, initializer, lambda generator: iter(batches),
        lambda model, params, generator: (
            sum(t.square().sum() for layer in params for t in layer.values()), {}
        ),
    ), Draw((1,), steps)  # fmt: skip


def polynomial(kind: type, convolution: bool = False) -> tuple[Training, Draw]:
    shape = (1, 5, 4) if convolution else (1, 2, 3)
    network = {"convolutions": [(2, 2)], "pool": 2} if convolution else {}
    model = lateral_network(shape, [3], Activation(), inh_steps=3, **network)
    degree = 1 if convolution else 2
    rules = [
        kind.of_degree(degree, bound="tanh", forward_weight_bound=2.0).double() for _ in range(2)
    ]
    rule, generator = PerLayerRule(rules[: 1 + convolution]), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return training_on_images(model, rule, shape, kind.views)


TRAININGS = {f"statistics, {name}": partial(statistics, name) for name in STATISTICS} | {
    "statistics, convolution": partial(statistics, "one step", convolution=True),
    "polynomial": partial(polynomial, PolynomialRule),
    "polynomial, pairs": partial(polynomial, PolynomialPairRule),
    "polynomial, convolution": partial(polynomial, PolynomialRule, convolution=True),
    "competing units": lambda: training_on_images(
        lateral_mlp(6, [3], Activation("relu"), inhibition="none"),
        PerLayerRule([KrotovHopfieldRule(0.1, gate="soft").double()]), (1, 2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_every_family_of_rules_has_the_hypergradient_of_reverse_in_forward_mode(name):
    found, expected = (method(*TRAININGS[name]()) for method in (Forward(), Reverse("keep")))
    assert any(g.abs().max() > 1e-6 for g in expected.gradient if g.numel())
    for g, e in zip(found.gradient, expected.gradient, strict=True):
        assert_near(g, e, 1e-10)


def test_forward_mode_of_an_equilibrium_is_refused_with_the_reason():
    training, draw = lateral(2)
    model = lateral_mlp(4, [3], Activation(), inhibition="equilibrium")
    with pytest.raises(HypergradientError, match="does not run in forward mode, take reverse"):
        Forward()(replace(training, model=model), draw)


def test_an_update_that_is_no_contraction_is_refused_with_the_residual():
    with pytest.raises(FloatingPointError, match="diverges: residual"):
        Implicit(40)(*follow(3, rate=-0.5, trained_start=False))


@pytest.mark.parametrize(
    "method",
    [Reverse(), Truncated(K=2), LookBack(2), Implicit(2), Forward(), Strategies(), Persistent()],
)
def test_what_is_not_finite_is_never_returned(method):
    def broken(model, params, generator):
        return params[1]["w"].sum() * float("nan"), {}

    with pytest.raises(NonFiniteError, match="outer loss"):
        method(*follow(3, outer_loss=broken))


@pytest.mark.parametrize("method", [Truncated(), LookBack(), Implicit()])
def test_a_trained_initial_distribution_needs_a_method_that_reaches_it(method):
    check_settings(MetaSettings(method=method), follow(1, trained_start=False)[0])
    with pytest.raises(MetaError, match="does not reach the initial distribution"):
        check_settings(MetaSettings(method=method), follow(1)[0])


def test_settings_name_a_method_and_its_options_or_hold_one():
    settings = MetaSettings(method="truncated", K=5, memory_limit=1.5, adjoint_limit=2.0)
    assert make_method(settings) == Truncated(memory_limit=3 * 2**29, adjoint_limit=2.0, K=5)
    assert make_method(MetaSettings()) == Reverse()
    assert make_method(MetaSettings(method="pes", sigma=0.1)) == Persistent(sigma=0.1)
    assert make_method(MetaSettings(method=Implicit(3))) == Implicit(3)


def test_strategies_cannot_go_on_with_a_training():
    with pytest.raises(MetaError, match="es needs reinitialisation"):
        settings = MetaSettings(method=Strategies(), reinitialize_every=2)
        check_settings(settings, follow(1, trained_start=False)[0])


class Momentum(LearningRule):
    """A descent towards the batch's mean, whose velocity begins at 0 where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.goal = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))

    def update(self, model, params, batch):
        w, v = params[1]["w"], params[1].get("v", torch.zeros_like(params[1]["w"]))
        v = 0.2 * v + 0.3 * (self.goal * batch.mean(0) - w)
        return [{}, {"w": w + v, "v": v}]


class StartAtRest(Start):
    """The same start with a velocity, 0, from the beginning."""

    def forward(self, model, generator=None):
        _, layer = super().forward(model, generator)
        return [{}, layer | {"v": torch.zeros_like(layer["w"])}]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("method", [
    Reverse(memory="keep"), Reverse(memory="segments"), Reverse(memory="recompute"), Truncated(K=3),
    LookBack(3), Implicit(20), Forward(), Strategies(0.1, 2), Persistent(0.1, 2),
])  # fmt: skip
def test_what_a_rule_remembers_may_begin_with_its_first_update(method, steps):
    found = []
    for start in (Start, StartAtRest):
        training, draw = follow(steps, trained_start=False)
        initial = start("initializer" in method.reaches)
        found.append(method(replace(training, rule=Momentum(), initializer=initial), draw))
    for g, expected in zip(found[0].gradient, found[1].gradient, strict=True):
        assert_near(g, expected, 1e-12)
        assert expected.abs().max() > 0
