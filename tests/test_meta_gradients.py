"""Every way to the hypergradient of a task, on rules whose hypergradient is known."""

import itertools

import pytest
import torch
from oracles import DOUBLE, assert_near
from torch import nn

from experiment.errors import NonFiniteError
from experiment.seeds import seeded_generator
from hypergradients import HypergradientError
from hypgraddesc import MetaError, MetaSettings
from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import LearningRule, PolynomialRule
from meta_gradients import Forward, Implicit, LookBack, Reverse, Strategies, Task, Truncated
from models_fully_local import Activation, lateral_mlp
from train import MEMORY, train


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


def squares(params):
    """A loss that is quadratic in w."""
    return params[1]["w"].square().sum(), {"largest": params[1]["w"].max().item()}


def follow(steps: int, rate: float = 0.3, trained_start: bool = True, judge=squares) -> Task:
    data = torch.rand(5, 4, generator=torch.Generator().manual_seed(8), dtype=DOUBLE)
    return Task(
        nn.Module(), Follow(rate), Start(trained_start), itertools.repeat(data), steps, judge,
        draw_start=lambda: torch.Generator().manual_seed(1), generator=seeded_generator(3),
    )  # fmt: skip


def lateral(steps: int, initializer=None) -> Task:
    """A polynomial rule on lateral-inhibitory units, other batches at each step."""
    rule = PolynomialRule.of_degree(2).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    initializer = initializer or GaussianInitializer({"b": FIXED, "m": FIXED}, {"w": FIXED})
    batches = iter([torch.rand(6, 4, generator=generator, dtype=DOUBLE) for _ in range(steps)])
    return Task(
        lateral_mlp(4, [3], Activation()), rule, initializer.double(), batches, steps, squares,
        draw_start=lambda: torch.Generator().manual_seed(1), generator=seeded_generator(3),
    )  # fmt: skip


def exact(task: Task) -> list[torch.Tensor]:
    """Backpropagation through everything at once."""
    params = train(
        task.model, task.initial(), task.batches, task.rule, task.steps, memory="keep"
    )  # fmt: skip
    hparams = list(task.hyperparameters.values())
    found = torch.autograd.grad(squares(params)[0], hparams, allow_unused=True)
    return [torch.zeros_like(h) if g is None else g for h, g in zip(hparams, found, strict=True)]


@pytest.mark.parametrize("method", [*(Reverse(memory) for memory in MEMORY), Forward()])
def test_methods_that_reach_the_start_give_the_whole_hypergradient(method):
    gradient, theta = method(follow(7))
    for g, e in zip(gradient, exact(follow(7)), strict=True):
        assert_near(g, e, 1e-12)
    assert_near(theta[1]["w"].detach(), Reverse()(follow(7))[1][1]["w"].detach(), 1e-13)


@pytest.mark.parametrize("method", [Truncated(K=80), LookBack(80), Implicit(80)])
def test_every_method_ends_in_the_same_where_training_has_converged(method):
    gradient, _ = method(follow(100, trained_start=False))
    assert_near(gradient[0], exact(follow(100, trained_start=False))[0], 1e-9)


def test_truncation_leaves_out_what_came_before():
    """The error is what the first N - K updates did: the factor (1 - rate)^K of the gradient."""
    task, K = follow(50, trained_start=False), 3
    whole = exact(task)[0]
    for method in (Truncated(K=K), LookBack(K)):
        gradient, _ = method(follow(50, trained_start=False))
        assert_near(gradient[0], (1 - 0.7**K) * whole, 1e-6)


def test_truncation_to_all_updates_leaves_out_nothing():
    for K in (6, 60):
        for g, e in zip(Truncated(K=K)(lateral(6))[0], exact(lateral(6)), strict=True):
            assert_near(g, e, 1e-12)


def test_looking_back_and_implicit_methods_take_any_polynomial_rule():
    """One term of the series is the gradient through the last update alone."""
    for g, e in zip(LookBack(1)(lateral(6))[0], Truncated(K=1)(lateral(6))[0], strict=True):
        assert_near(g, e, 1e-12)
    gradient, theta = Implicit(1)(lateral(6))
    assert all(g.isfinite().all() for g in gradient)
    assert_near(theta[1]["w"], Truncated(K=1)(lateral(6))[1][1]["w"].detach(), 1e-12)


def test_strategies_estimate_the_gradient_of_rules_and_starts():
    gradient, _ = Strategies(1e-3, 3000)(follow(4))
    for g, e in zip(gradient, exact(follow(4)), strict=True):
        assert_near(g, e, 0.15)


def test_strategies_need_no_derivative():
    class Rounded(Follow):
        def update(self, model, params, batch):
            (_, layer) = super().update(model, params, batch)
            return [{}, {"w": (1000 * layer["w"]).round() / 1000}]

    task = follow(4, trained_start=False)
    task.rule = Rounded()
    gradient, _ = Strategies(0.1, 1000)(task)
    assert_near(gradient[0], exact(follow(4, trained_start=False))[0], 0.2)


def test_perturbed_trainings_leave_the_hyperparameters_alone():
    task = lateral(3)
    before = {name: p.detach().clone() for name, p in task.hyperparameters.items()}
    Strategies(0.1, 2)(task)
    for name, p in task.hyperparameters.items():
        assert torch.equal(p, before[name]) and p.grad is None


def test_numbers_are_those_of_the_judgement():
    task = follow(5)
    _, theta = Reverse()(task)
    loss, numbers = squares(theta)
    assert task.numbers() == {"meta_loss": loss.item(), **numbers}
    task = follow(5)
    Strategies(1e-3, 2)(task)
    assert len(task.seen) == 4
    assert task.numbers()["meta_loss"] == pytest.approx(loss.item(), rel=1e-2)


def test_training_may_go_on_from_other_parameters():
    for method in (Reverse(), Forward(), Truncated(K=5), Strategies(1e-3, 1)):
        task = follow(5)
        task.start = [{}, {"w": torch.full((3, 4), 3.0, dtype=DOUBLE)}]
        gradient, _ = method(task)
        assert (gradient[1] == 0 and gradient[0].abs().max() > 0) or isinstance(method, Strategies)


def test_forward_mode_of_a_polynomial_rule_is_refused_with_the_reason():
    with pytest.raises(HypergradientError, match="does not run in forward mode, take reverse"):
        Forward()(lateral(2))


def test_an_update_that_is_no_contraction_is_refused_with_the_residual():
    with pytest.raises(FloatingPointError, match="diverges: residual"):
        Implicit(40)(follow(3, rate=-0.5, trained_start=False))


@pytest.mark.parametrize(
    "method", [Reverse(), Truncated(K=2), LookBack(2), Implicit(2), Forward(), Strategies()]
)
def test_what_is_not_finite_is_never_returned(method):
    def broken(params):
        return params[1]["w"].sum() * float("nan"), {}

    with pytest.raises(NonFiniteError, match="outer loss"):
        method(follow(3, judge=broken))


@pytest.mark.parametrize("method", [Truncated(), LookBack(), Implicit()])
def test_a_trained_initial_distribution_needs_a_method_that_reaches_it(method):
    MetaSettings(method=method).check(Start(trained=False))
    with pytest.raises(MetaError, match="does not reach the initial distribution"):
        MetaSettings(method=method).check(Start())


def test_strategies_cannot_go_on_with_a_training():
    with pytest.raises(MetaError, match="es needs reinitialisation"):
        settings = MetaSettings(method=Strategies(), reinitialize_every=2)
        settings.check(GaussianInitializer({"b": TRAINABLE}, {}).requires_grad_(False))
