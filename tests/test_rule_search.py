"""Searches for a rule without gradients, on a problem whose best hyperparameters are known.

Updates are w += psi; after N of them the loss is |w_N - target|^2, least at psi = target / N.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from experiment.run_log import SilentLog
from experiment.search_settings import SearchSettings
from hypgraddesc import MetaError
from learning_rules import LearningRule
from sweeps.rule_search import RuleSearch, search_rule
from train import Draw, Training, evaluate_training

TARGET = torch.tensor([6.0, -0.03])
STEPS = 3


class Drift(LearningRule):
    def __init__(self):
        super().__init__()
        self.psi = nn.Parameter(torch.zeros(2))

    def update(self, model, params, batch):
        return [{"w": params[0]["w"] + self.psi}]

    def step_sizes(self):
        return {"psi": torch.tensor([1.0, 0.01])}


class Loss:
    """The distance from the target, in typical sizes; not finite beyond a bound."""

    metrics = ("distance",)

    def __init__(self, bound=math.inf):
        self.bound, self.seen = bound, []

    def __call__(self, model, params, generator):
        w = params[0]["w"]
        self.seen.append(w.clone())
        if w[0] > self.bound:
            raise FloatingPointError("far away")
        loss = ((w - TARGET) / torch.tensor([1.0, 0.01])).square().sum()
        return loss, {"distance": loss.sqrt().item()}


def training(loss=None, rule=None):
    return Training(
        nn.Identity(),
        rule or Drift(),
        lambda model, generator: [{"w": torch.zeros(2)}],
        lambda generator: itertools.repeat(torch.zeros(1)),
        loss or Loss(),
    )


def settings(**changes):
    return SearchSettings(
        **{"search": "tpe", "trials": 60, "inner_steps": STEPS, "finalists": 3} | changes
    )


def after(search, steps):
    return [search.step() for _ in range(steps)]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_ends_at_its_best_point_near_the_best_there_is(sampler):
    searched = training()
    assert search_rule(searched, settings(search=sampler), SilentLog())
    numbers, _ = evaluate_training(searched, Draw((0,), STEPS))
    assert numbers["meta_loss"] < {"random": 12.0, "tpe": 0.3}[sampler]  # 45 at the start


def test_points_lie_within_the_range_around_the_start_dense_near_it():
    rule = Drift()
    with torch.no_grad():
        rule.psi.copy_(torch.tensor([5.0, 0.5]))
    search = RuleSearch(training(rule=rule), settings(search="random", trials=50))
    after(search, 50)
    points = torch.stack(search.points)
    assert points.abs().max() <= 1 and points.shape == (50, 2)
    search._put(torch.tensor([1.0, -0.5], dtype=torch.float64))
    torch.testing.assert_close(rule.psi.data, torch.tensor([8.0, 0.5 - 0.03 * 0.25]))


def test_a_point_with_a_training_that_is_not_finite_is_worst_and_said():
    said = []
    search = RuleSearch(
        training(Loss(bound=1.0)), settings(search="random", trials=30), said.append
    )
    rows = after(search, 33)
    assert search.finished and 0 < len(said) < 33
    assert sum(math.isinf(loss) for loss in search.losses) == len(said)
    assert all(row["skipped_tasks"] == (row["meta_loss"] != row["meta_loss"]) for row in rows)
    search.use_best()
    assert search.trained["rule.psi"][0] * STEPS <= 1.0


def test_finalists_are_the_best_points_each_judged_by_the_further_draws():
    loss = Loss()
    search = RuleSearch(training(loss), settings(search="random", trials=10, final_trainings=2))
    after(search, 10)
    best = sorted(search.losses)[:3]
    loss.seen.clear()
    rows = after(search, 3)
    assert [row["meta_loss"] for row in rows] == pytest.approx(best)
    assert len(loss.seen) == 6


def test_losses_are_means_over_the_times_of_a_training():
    loss = Loss()
    search = RuleSearch(training(loss), settings(inner_steps=4, loss_times=2))
    search.step()
    w2, w4 = loss.seen
    torch.testing.assert_close(w4, 2 * w2)


def test_a_search_taken_up_again_goes_on_to_the_same_points():
    whole = RuleSearch(training(), settings(trials=30))
    first = [row | {"seconds": 0} for row in after(whole, 33)]
    half = RuleSearch(training(), settings(trials=30))
    after(half, 24)
    other = RuleSearch(training(), settings(trials=30))
    other.load_state_dict(half.state_dict())
    rest = [row | {"seconds": 0} for row in after(other, 9)]
    assert rest == first[24:] and other.finished


def test_trainings_that_share_no_hyperparameters_are_refused():
    with pytest.raises(MetaError):
        RuleSearch([training(), training()], settings())
