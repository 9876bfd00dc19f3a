"""The meta-loop on a problem whose hypergradient is known in closed form, and its resumption.

The inner problem is w_{t+1} = w_t + psi * batch, so that N updates on batches of 1 end at
w_0 + N psi, and d loss / d psi = N d loss / d w.
"""

import copy
import io
import itertools
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from oracles import DOUBLE
from torch import nn

from experiment.errors import NonFiniteError
from experiment.run_log import RunLog
from experiment.run_reader import read_metrics
from experiment.seeds import log_uniform_integer
from experiment.statistics import accuracy_text, mean_and_deviation
from hypgraddesc import (
    OPTIMIZERS,
    HypergradientDescent,
    MetaError,
    MetaSettings,
    check_settings,
    evaluate_draws,
    hypgraddesc,
    random_steps,
    rising_steps,
)
from initializers import FIXED, TRAINABLE, GaussianInitializer
from learning_rules import LearningRule, PerLayerRule, PolynomialRule
from meta_gradients import Forward, Persistent, Reverse
from models_fully_local import Activation, lateral_mlp
from rules.unit_statistics import UnitStatisticsRule
from train import MEMORY, Draw, Training, evaluate_training


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


class Drift(LearningRule):
    """w + psi * batch, one coefficient for each entry of w."""

    def __init__(self, start):
        super().__init__()
        self.psi = nn.Parameter(double(*start))
        self.places, self.size = torch.arange(len(start)), len(start)

    def update(self, model, params, batch):
        psi = torch.zeros(self.size, dtype=self.psi.dtype, device=self.psi.device)
        return [{"w": params[0]["w"] + psi.index_put((self.places,), self.psi) * batch}]

    def keep(self, masks):
        self.psi = nn.Parameter(self.psi.detach()[masks["psi"]])
        self.places = self.places[masks["psi"]]

    def coefficients(self):
        return {f"psi{k}": v for k, v in zip(self.places.tolist(), self.psi.tolist(), strict=True)}


class Start(nn.Module):
    """w_0 = start + spread * noise; remembers what it has drawn."""

    def __init__(self, start, spread=0.0, trainable=False):
        super().__init__()
        self.start = nn.Parameter(double(*start), requires_grad=trainable)
        self.spread, self.drawn = spread, []

    def forward(self, model, generator=None):
        noise = torch.randn(self.start.shape, generator=generator, dtype=DOUBLE)
        w = self.start + (self.spread * noise).to(self.start)
        self.drawn.append(w.detach().clone())
        return [{"w": w}]


class Outer:
    """A loss of w, and w_0 beside it; remembers the w that it was given."""

    metrics = ("first",)

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, model, params, generator):
        w = params[0]["w"]
        self.seen.append(w.detach().clone())
        loss = self.function(w, len(self.seen) - 1)
        return loss, {"first": w[0].item()}


def distance(*target):
    return lambda w, call: (w - double(*target).to(w)).square().sum()


def slopes(*gradients):
    """A loss whose gradient by w is, call by call, one of these."""
    return lambda w, call: (w * double(*gradients[call])).sum()


def ones(generator):
    return itertools.repeat(torch.ones((), dtype=DOUBLE))


def descent(psi, loss, *, start=None, spread=0.0, trainable=False, batches=ones, **settings):
    """A meta-run of one inner step and a constant rate, where nothing else is asked for."""
    start = start or [0.0] * len(psi)
    options = {"metasteps": 1000, "lr": 0.01, "inner_steps": 1, **settings}
    training = Training(
        nn.Identity(), Drift(psi), Start(start, spread, trainable), batches, Outer(loss)
    )
    return HypergradientDescent(training, MetaSettings(**options), Said())


class SizedDrift(Drift):
    """Drift in units of its own: it is 1 / size that the optimiser moves."""

    def step_sizes(self):
        return {"psi": double(10.0, 0.1)}


class Rescaled(Drift):
    """Drift of psi = size * parameter, written out."""

    def update(self, model, params, batch):
        return [{"w": params[0]["w"] + double(10.0, 0.1) * self.psi * batch}]


def test_typical_sizes_are_the_same_as_hyperparameters_in_these_units():
    settings = MetaSettings(metasteps=5, lr=0.05, inner_steps=1, clip_norm=0.3)

    def run(rule, psi):
        start = Start([0.0, 0.0])
        training = Training(nn.Identity(), rule(psi), start, ones, Outer(distance(2.0)))
        run = HypergradientDescent(training, settings, Said())
        norms = [run.step()["hypergradient_norm"] for _ in range(5)]
        return run.rule.psi.detach(), norms

    sized, norms = run(SizedDrift, [1.0, -1.0])
    written_out, expected_norms = run(Rescaled, [0.1, -10.0])
    assert norms == pytest.approx(expected_norms, rel=1e-12)
    assert torch.allclose(sized, double(10.0, 0.1) * written_out, rtol=1e-12)


def initializer_of(run):
    return run.trainings[0].initializer


def outer_loss_of(run):
    return run.trainings[0].outer_loss


class Said(list):
    """Remembers what a run warned of."""

    def __call__(self, text):
        self.append(text)


def by_hand(psi, gradients, lr=0.01, optimizer="adam") -> list[torch.Tensor]:
    """psi after each optimiser step on these gradients."""
    p = nn.Parameter(double(*psi))
    stepper, found = OPTIMIZERS[optimizer]([p], 1.0), []
    for k, gradient in enumerate(gradients):
        stepper.param_groups[0]["lr"] = lr(k) if callable(lr) else lr
        p.grad = gradient(p.detach()) if callable(gradient) else double(*gradient)
        stepper.step()
        found.append(p.detach().clone())
    return found


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


# ---- schedules ----


def test_the_rate_rises_linearly_and_then_stays():
    settings = MetaSettings(metasteps=100, lr=2.0, warmup_steps=4)
    assert [settings.rate(k) for k in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert settings.rate(99) == 2.0
    assert MetaSettings(lr=2.0).rate(0) == 2.0


def test_the_cosine_falls_from_the_end_of_the_rise_to_the_last_meta_step():
    settings = MetaSettings(metasteps=104, lr=2.0, warmup_steps=4, decay="cosine")
    assert [settings.rate(k) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for done in (0.0, 0.25, 0.5, 0.75, 0.99):
        assert settings.rate(4 + round(100 * done)) == pytest.approx(1 + math.cos(math.pi * done))
    assert 0 < settings.rate(103) < 1e-2
    rates = [settings.rate(k) for k in range(3, 104)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("decay", ["none", "cosine"])
def test_fine_tuning_steps_follow_at_a_reduced_rate(decay):
    settings = MetaSettings(
        metasteps=10, lr=2.0, warmup_steps=2, decay=decay, finetune_steps=5, finetune_factor=0.05
    )
    assert settings.total_steps == 15
    assert [settings.rate(k) for k in range(10, 15)] == [0.1] * 5


def test_a_run_uses_the_rate_of_each_meta_step():
    settings = {"metasteps": 6, "warmup_steps": 2, "decay": "cosine", "finetune_steps": 2}
    run = descent([0.0], distance(1.0), lr=0.1, **settings)
    rates, expected = [], []
    for k in range(8):
        rates.append(run.step()["learning_rate"])
        expected.append(run.settings.rate(k))
    assert rates == expected
    (end,) = by_hand([0.0], [lambda p: 2 * (p - 1)] * 8, run.settings.rate)[-1:]
    assert_close(run.rule.psi.detach(), end)


def test_inner_steps_rise_and_are_capped():
    schedule = rising_steps(10, 5, 100, 22)
    steps = [schedule(k, None) for k in (0, 99, 100, 199, 200, 1000)]
    assert steps == [10, 10, 15, 15, 20, 22]
    assert rising_steps(250, 0, 100, 250)(10**6, None) == 250


def test_every_task_may_draw_its_own_number_of_inner_steps():
    def horizon(metastep, generator):
        return int(torch.randint(1, 9, (), generator=generator))

    runs = [descent([0.5], distance(0.0), tasks=4, inner_steps=horizon, seed=k) for k in (0, 0, 1)]
    drawn = []
    for run in runs:
        rows = [run.step() for _ in range(3)]
        drawn.append((torch.cat(outer_loss_of(run).seen), [row["inner_steps"] for row in rows]))
    ends = drawn[0][0][:4]
    assert len(ends.unique()) > 1 and drawn[0][1][0] == ends.mean() / 0.5
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])


def test_a_random_horizon_is_drawn_for_each_task_and_recorded_as_the_mean():
    """w_N = N psi with psi = 1 says which N each task had."""
    run = descent([1.0], slopes(*[(0.0,)] * 12), tasks=3, inner_steps=random_steps(2, 9))
    rows = [run.step() for _ in range(4)]
    horizons = torch.cat(outer_loss_of(run).seen).view(4, 3)
    assert horizons.unique().numel() > 3 and horizons.min() >= 2 and horizons.max() <= 9
    assert [row["inner_steps"] for row in rows] == pytest.approx(horizons.mean(1).tolist())


def test_inner_steps_may_follow_a_schedule():
    run = descent([0.5], distance(0.0), inner_steps=rising_steps(1, 1, 2, 3))
    psi, steps, losses = [], [], []
    for _ in range(8):
        psi.append(run.rule.psi.item())
        row = run.step()
        steps.append(row["inner_steps"])
        losses.append(row["meta_loss"])
    assert steps == [1, 1, 2, 2, 3, 3, 3, 3]
    expected = [(n * p) ** 2 for n, p in zip(steps, psi, strict=True)]
    assert losses == pytest.approx(expected)


# ---- one meta-step ----


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_run_steps_as_its_optimizer_does_on_the_closed_form(optimizer):
    run = descent([0.3, -0.2], distance(1.0, 2.0), optimizer=optimizer, inner_steps=4)
    expected = by_hand(
        [0.3, -0.2], [lambda p: 8 * (4 * p - double(1.0, 2.0))] * 20, optimizer=optimizer
    )
    for psi in expected:
        run.step()
        assert_close(run.rule.psi.detach(), psi)


def test_a_row_holds_what_was_seen_before_the_update():
    run = descent([0.5, 0.0], distance(0.0, 1.0), start=[1.0, 0.0], inner_steps=2)
    row = run.step()
    assert row["meta_loss"] == pytest.approx(2.0**2 + 1.0)
    assert row["first"] == 2.0
    assert row["hypergradient_norm"] == pytest.approx(math.hypot(8.0, 4.0))
    assert (row["skipped_tasks"], row["inner_steps"], row["learning_rate"]) == (0, 2, 0.01)
    assert row["seconds"] > 0
    assert list(row)[:2] == ["meta_loss", "first"] and list(row)[-1] == "seconds"


def test_the_initializer_is_trained_too():
    run = descent([0.5], distance(3.0), start=[1.0], trainable=True)
    # Both have the same gradient, 2 (start + psi - 3), and so the same steps.
    for _ in range(20):
        run.step()
    moved = run.rule.psi.item() - 0.5
    assert moved > 0.1 and initializer_of(run).start.item() == pytest.approx(1.0 + moved)


def test_what_is_fixed_stays():
    run = descent([0.5], distance(3.0), start=[1.0])
    run.step()
    assert initializer_of(run).start.item() == 1.0
    run = descent([0.5], distance(3.0), start=[1.0], trainable=True)
    run.rule.psi.requires_grad_(False)
    run = HypergradientDescent(run.trainings[0], run.settings)
    run.step()
    assert run.rule.psi.item() == 0.5 and initializer_of(run).start.item() != 1.0


def test_tasks_are_different_draws_and_their_hypergradients_are_averaged():
    run = descent([0.0], distance(1.0), spread=1.0, tasks=4, inner_steps=2)
    psi = 0.0
    expected = nn.Parameter(double(0.0))
    stepper = torch.optim.Adam([expected], 0.01)
    for k in range(5):
        row = run.step()
        starts = torch.stack(initializer_of(run).drawn[4 * k :]).flatten()
        assert len(starts.unique()) == 4
        ends = starts + 2 * psi
        expected.grad = (4 * (ends - 1)).mean().reshape(1)
        assert row["meta_loss"] == pytest.approx((ends - 1).square().mean().item())
        assert row["first"] == pytest.approx(ends.mean().item())
        stepper.step()
        assert_close(run.rule.psi.detach(), expected.detach())
        psi = run.rule.psi.item()
    assert len(torch.cat(initializer_of(run).drawn).unique()) == 20


def test_every_draw_of_batches_has_a_generator_of_its_own():
    def random_batches(generator):
        while True:
            yield torch.randn((), generator=generator, dtype=DOUBLE)

    ends = []
    for seed in (0, 0, 1):
        run = descent(
            [1.0], slopes(*[(0.0,)] * 6), batches=random_batches, tasks=2, inner_steps=3, seed=seed
        )
        for _ in range(3):
            run.step()
        ends.append(torch.cat(outer_loss_of(run).seen))
        assert len(ends[-1].unique()) == 6
    assert torch.equal(ends[0], ends[1]) and not torch.isin(ends[0], ends[2]).any()


def test_the_start_the_batches_and_the_outer_loss_share_no_noise():
    drawn = []

    def noise(generator):
        drawn.append(torch.randn(3, generator=generator, dtype=DOUBLE))
        return drawn[-1]

    class Noisy(Outer):
        def __call__(self, model, params, generator):
            noise(generator)
            return super().__call__(model, params, generator)

    run = descent(
        [1.0], distance(0.0), spread=1.0, batches=lambda generator: iter(noise(generator))
    )
    run.trainings = [replace(run.trainings[0], outer_loss=Noisy(distance(0.0)))]
    run.step()
    numbers = torch.cat([*initializer_of(run).drawn, *drawn])
    assert len(numbers) == 7 and len(numbers.unique()) == 7


@pytest.mark.parametrize("memory", MEMORY)
def test_every_memory_policy_gives_the_same_run(memory):
    rows = []
    for policy in ("keep", memory):
        run = descent([0.1], distance(1.0), spread=1.0, inner_steps=5, method=Reverse(policy))
        rows.append([without_seconds(run.step()) for _ in range(3)])
    assert rows[0] == rows[1]


# ---- several trainings ----


def test_tasks_take_turns_in_several_trainings_that_share_their_hyperparameters():
    rule, start = Drift([0.25]), Start([0.0])
    outer_losses = [Outer(distance(target)) for target in (1.0, 3.0)]
    trainings = [Training(nn.Identity(), rule, start, ones, loss) for loss in outer_losses]
    run = HypergradientDescent(trainings, MetaSettings(inner_steps=2, tasks=3, lr=0.01))
    row = run.step()
    assert [len(loss.seen) for loss in outer_losses] == [2, 1]
    distances = [0.5 - target for target in (1.0, 3.0, 1.0)]
    assert row["meta_loss"] == pytest.approx(sum(d**2 for d in distances) / 3)
    (expected,) = by_hand([0.25], [(sum(4 * d for d in distances) / 3,)])
    assert_close(rule.psi.detach(), expected)


def test_trainings_with_names_have_their_numbers_recorded_apart():
    rule, start = Drift([0.25]), Start([0.0])
    trainings = [
        Training(nn.Identity(), rule, start, ones, Outer(loss), name=name)
        for name, loss in {"near": distance(1.0), "far": distance(3.0), "none": nan_loss_of}.items()
    ]
    run = HypergradientDescent(
        trainings, MetaSettings(inner_steps=1, tasks=5, lr=0.01), Said().append
    )
    row = run.step()
    near, far = 0.75**2, 2.75**2
    assert row["meta_loss"] == pytest.approx((2 * near + 2 * far) / 4)
    assert row["meta_loss/near"] == pytest.approx(near)
    assert row["meta_loss/far"] == pytest.approx(far)
    assert row["first/near"] == row["first/far"] == row["first"] == 0.25
    assert math.isnan(row["meta_loss/none"]) and row["skipped_tasks"] == 1
    alone = HypergradientDescent(trainings[0], MetaSettings(inner_steps=1, lr=0.01)).step()
    assert alone["meta_loss/near"] == alone["meta_loss"]
    nameless = HypergradientDescent(
        replace(trainings[0], name=""), MetaSettings(inner_steps=1)
    ).step()
    assert "meta_loss/" not in " ".join(nameless)


def nan_loss_of(w, call):
    return w.sum() * math.nan


def test_every_one_of_several_trainings_needs_a_task():
    rule, start = Drift([0.25]), Start([0.0])
    trainings = [Training(nn.Identity(), rule, start, ones, Outer(distance(1.0)))] * 3
    with pytest.raises(MetaError, match="3 data sets need 3 tasks or more, not 2"):
        HypergradientDescent(trainings, MetaSettings(tasks=2))


class Wide(nn.Module):
    """A model that is no more than its width."""

    def __init__(self, width):
        super().__init__()
        self.width = width


class FirstOf(nn.Module):
    """w_0 = zeros of the width of the model."""

    def forward(self, model, generator=None):
        return [{"w": torch.zeros(model.width, dtype=DOUBLE)}]


def test_each_task_draws_its_model_and_the_same_again_after_a_resumption():
    class Spread(Drift):
        def update(self, model, params, batch):
            return [{"w": params[0]["w"] + self.psi * batch}]

    def widths(generator):
        return Wide(log_uniform_integer(2, 40, generator))

    loss = Outer(lambda w, call: w.sum())
    training = Training(Wide(7), Spread([0.5]), FirstOf(), ones, loss, models=widths)
    runs = [
        HypergradientDescent(training, MetaSettings(inner_steps=1, tasks=3, lr=0.0, seed=4))
        for _ in range(2)
    ]
    rows = [runs[0].step() for _ in range(4)]
    drawn = [len(w) for w in loss.seen]
    assert len(set(drawn)) > 4 and all(2 <= n <= 40 for n in drawn)
    assert rows[1]["hypergradient_norm"] == pytest.approx(sum(drawn[3:6]) / 3)
    for _ in range(2):
        runs[1].step()
    again = HypergradientDescent(training, runs[1].settings)
    again.load_state_dict(stored(runs[1].state_dict()))
    assert without_seconds(again.step()) == without_seconds(rows[2])
    evaluate_training(training, Draw((0,), 1))
    assert len(loss.seen[-1]) == 7
    with pytest.raises(MetaError, match="width of each task needs reinitialisation"):
        HypergradientDescent(training, MetaSettings(reinitialize_every=2))


def test_trainings_with_hyperparameters_of_their_own_are_refused_in_one_line():
    trainings = [
        Training(nn.Identity(), Drift([0.1]), Start([0.0]), ones, Outer(distance(1.0)))
        for _ in range(2)
    ]
    with pytest.raises(MetaError, match="give all of them the same rule") as error:
        HypergradientDescent(trainings, MetaSettings())
    assert "\n" not in str(error.value)


class Strength(nn.Module):
    """Batches of one learned number."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(double(1.0))

    def forward(self, generator):
        return itertools.repeat(self.level.sum())


def test_the_parameters_of_batches_are_hyperparameters_too():
    batches = Strength()
    training = Training(nn.Identity(), Drift([0.5]), Start([0.0]), batches, Outer(distance(3.0)))
    assert list(training.hyperparameters) == ["rule.psi", "batches.level"]
    run = HypergradientDescent(training, MetaSettings(inner_steps=2, lr=0.01))
    row = run.step()  # the end is 2 psi level
    assert row["hypergradient_norm"] == pytest.approx(math.hypot(4 * -2.0, 2 * -2.0))
    assert batches.level.item() == pytest.approx(1.01)
    fresh = replace(training, rule=Drift([0.0]), batches=Strength())
    again = HypergradientDescent(fresh, run.settings)
    again.load_state_dict(stored(run.state_dict()))
    assert_same_bits(without_seconds(again.step()), without_seconds(run.step()))
    with pytest.raises(MetaError, match="does not reach the parameters of the batches"):
        HypergradientDescent(training, MetaSettings(method=Forward()))


# ---- clipping and penalties ----


def test_hypergradients_are_clipped_before_the_penalties_are_added():
    # The loss asks psi to fall with 100, clipped to 1; L2 asks it to rise with 2.
    run = descent([-2.0], slopes((100.0,)), clip_norm=1.0, l2=1.0)
    row = run.step()
    assert row["hypergradient_norm"] == pytest.approx(100.0)
    assert run.rule.psi.item() > -2.0
    run = descent([-2.0], slopes((100.0,)), l2=1.0)
    run.step()
    assert run.rule.psi.item() < -2.0


def test_clipping_bounds_the_norm_over_all_that_is_trained():
    gradients = [(3.0, 4.0), (0.03, 0.04), (-30.0, 40.0)]
    run = descent([0.0, 0.0], slopes(*gradients), clip_norm=0.5)
    clipped = [(0.3, 0.4), (0.03, 0.04), (-0.3, 0.4)]
    for psi in by_hand([0.0, 0.0], clipped):
        run.step()
        assert_close(run.rule.psi.detach(), psi, 1e-6)


def test_no_task_outweighs_the_others_when_clipped():
    gradients = [(1000.0,), (-0.5,), (-0.5,), (-0.5,)]
    run = descent([0.0], slopes(*gradients), clip_norm=1.0, tasks=4)
    run.step()
    assert run.rule.psi.item() > 0


def test_l2_is_added_to_the_hypergradient_of_the_rule_alone():
    run = descent([3.0], distance(0.0), start=[2.0], trainable=True, l2=0.5)
    expected = nn.Parameter(double(3.0)), nn.Parameter(double(2.0))
    stepper = torch.optim.Adam(expected, 0.01)
    for _ in range(5):
        run.step()
        slope = 2 * (expected[0].detach() + expected[1].detach())
        expected[0].grad, expected[1].grad = slope + 0.5 * expected[0].detach(), slope
        stepper.step()
        assert_close(run.rule.psi.detach(), expected[0].detach())
        assert_close(initializer_of(run).start.detach(), expected[1].detach())


def test_l1_brings_a_useless_coefficient_to_rest_at_zero():
    def loss(w, call):
        return 50 * (w[0] - 0.1).square()

    run = descent([0.05, 0.05, -0.05], loss, lr=1e-3, l1=1.0)
    for _ in range(400):
        run.step()
    useful, *useless = run.rule.psi.tolist()
    assert max(map(abs, useless)) < 2e-5  # without rounding off, Adam would move by 1e-3
    assert useful == pytest.approx(0.09, abs=1e-3)  # 100 (w - 0.1) + 1 = 0
    without = descent([0.05, 0.05, -0.05], loss, lr=1e-3)
    for _ in range(400):
        without.step()
    assert_close(without.rule.psi.detach(), double(0.1, 0.05, -0.05), 1e-3)


def test_a_coefficient_at_zero_stays_under_l1():
    run = descent([0.0], slopes(*[(0.0,)] * 5), l1=100.0)
    for _ in range(5):
        run.step()
    assert run.rule.psi.item() == 0.0


def test_penalties_may_follow_a_schedule():
    seen = []

    def schedule(metastep):
        seen.append(metastep)
        return 1.0 if metastep == 2 else 0.0

    for name in ("l1", "l2"):
        seen.clear()
        run = descent([0.5], slopes(*[(0.0,)] * 4), **{name: schedule})
        values = [run.rule.psi.item() for _ in range(4) if run.step()]
        assert values[0] == values[1] == 0.5 and values[2] < 0.5
        assert seen == [0, 1, 2, 3]


def test_a_rate_of_zero_under_l1_changes_nothing():
    settings = {"metasteps": 1, "finetune_steps": 2, "finetune_factor": 0.0}
    run = descent([0.5, 0.0], slopes(*[(0.0, 0.0)] * 3), l1=1.0, **settings)
    run.step()
    before = run.rule.psi.detach().clone()
    run.step()
    assert torch.equal(run.rule.psi.detach(), before)


# ---- accumulation, reinitialisation, truncation ----


def test_accumulated_hypergradients_are_summed_up_to_the_reinitialisation():
    gradients = [(1.0,), (2.0,), (-9.0,), (4.0,), (5.0,), (6.0,), (1.0,)]
    run = descent([0.0], slopes(*gradients), accumulate=True, reinitialize_every=3)
    first, second = by_hand([0.0], [(-6.0,), (15.0,)])
    values = []
    for _ in gradients:
        run.step()
        values.append(run.rule.psi.detach().clone())
    for k, expected in enumerate([double(0.0)] * 2 + [first] * 3 + [second] * 2):
        assert_close(values[k], expected, 1e-6)


def test_between_reinitialisations_training_goes_on_from_detached_parameters():
    run = descent([0.1], distance(5.0), spread=1.0, tasks=2, inner_steps=3, reinitialize_every=4)
    w, expected = None, nn.Parameter(double(0.1))
    stepper = torch.optim.Adam([expected], 0.01)
    for k in range(10):
        run.step()
        if k % 4 == 0:
            w = torch.cat(initializer_of(run).drawn[-2:])
        w = w + 3 * expected.item()
        assert_close(torch.cat(outer_loss_of(run).seen[-2:]), w)
        expected.grad = (6 * (w - 5)).mean().reshape(1)  # of these three steps alone
        stepper.step()
        assert_close(run.rule.psi.detach(), expected.detach())
    assert len(initializer_of(run).drawn) == 3 * 2


def test_windows_of_persistent_strategies_go_on_until_the_reinitialisation_and_after_a_resumption():
    """Losses of w_N = N psi (up to sigma) tell how far each window's trainings have come."""
    settings = {"inner_steps": 2, "reinitialize_every": 3, "method": Persistent(1e-6, 2)}
    run = descent([1.0], slopes(*[(1.0,)] * 99), lr=1e-9, trainable=True, **settings)
    rows, states = [], []
    for _ in range(7):
        states.append(stored(run.state_dict()))
        rows.append(without_seconds(run.step()))
    assert [row["meta_loss"] for row in rows] == pytest.approx([2, 4, 6, 2, 4, 6, 2], abs=1e-4)
    for done in (2, 3):
        again = descent([1.0], slopes(*[(1.0,)] * 99), lr=1e-9, trainable=True, **settings)
        again.load_state_dict(states[done])
        assert without_seconds(again.step()) == rows[done]


def test_persistent_strategies_refuse_rules_that_lose_coefficients():
    with pytest.raises(MetaError, match="keep all coefficients"):
        descent([1.0], distance(1.0), method=Persistent(), sparsify_from=0)


def test_ungraded_steps_come_first_and_have_no_gradient():
    run = descent([0.5], distance(0.0), start=[1.0], inner_steps=2, ungraded_steps=3)
    row = run.step()
    assert row["first"] == 1.0 + 5 * 0.5
    assert row["hypergradient_norm"] == pytest.approx(2 * 3.5 * 2)
    assert row["inner_steps"] == 2


def test_ungraded_steps_come_once_after_each_reinitialisation():
    run = descent(
        [0.0], slopes(*[(0.0,)] * 6), inner_steps=2, ungraded_steps=3, reinitialize_every=3
    )
    with torch.no_grad():
        run.rule.psi.fill_(1.0)
    for _ in range(6):
        run.step()
    assert torch.cat(outer_loss_of(run).seen).tolist() == [5.0, 7.0, 9.0, 5.0, 7.0, 9.0]


def test_ungraded_steps_come_also_where_a_failure_made_training_start_anew():
    def loss(w, call):
        return (0.0 if call != 1 else math.nan) * w.sum()

    run = descent([1.0], loss, inner_steps=2, ungraded_steps=3, reinitialize_every=4)
    for _ in range(4):
        run.step()
    assert torch.cat(outer_loss_of(run).seen).tolist() == [5.0, 7.0, 5.0, 7.0]


def test_ungraded_steps_may_follow_a_schedule():
    run = descent(
        [1.0], slopes(*[(0.0,)] * 3), ungraded_steps=lambda metastep, generator: 2 * metastep
    )
    assert [run.step()["first"] for _ in range(3)] == [1.0, 3.0, 5.0]


def test_a_run_ends_where_its_accuracy_is_too_low_and_stays_ended():
    run = descent([1.0], slopes((10.0,), (10.0,), (10.0,)), lr=0.4, stop_below=0.5)
    seen = []
    while not run.finished:
        seen.append(run.step()["first"])
    assert len(seen) == 3 and seen[1] >= 0.5 > seen[2]
    assert "meta-step 3, first 0.2 is below 0.5: the last one" in run.warn[-1]
    again = descent([1.0], slopes((1.0,)), stop_below=0.5)
    again.load_state_dict(stored(run.state_dict()))
    assert again.finished
    with pytest.raises(MetaError, match="needs an outer loss that tells an accuracy"):
        silent = Outer(distance(0.0))
        silent.metrics = ()
        check_settings(MetaSettings(stop_below=0.5), replace(run.trainings[0], outer_loss=silent))


def test_outputs_of_samples_are_those_of_the_first_tasks_network():
    class Products(nn.Module):
        def forward(self, x, params):
            return x * params[0]["w"]

    training = Training(
        Products(), Drift([1.0, 2.0]), Start([0.0, 0.0]), ones, Outer(distance(0.0, 0.0))
    )
    settings = MetaSettings(2, lr=1e-9, inner_steps=3, tasks=2)
    run = HypergradientDescent(training, settings, Said(), samples=double([1.0, 1.0], [0.0, -1.0]))
    row = run.step()
    found = {name: value for name, value in row.items() if name.startswith("output/")}
    assert found == {"output/0/0": 3.0, "output/0/1": 6.0, "output/1/0": 0.0, "output/1/1": -6.0}
    run.trainings[0].outer_loss.function = lambda w, call: w.sum() * math.nan
    assert all(math.isnan(run.step()[name]) for name in found)


# ---- sparsification ----


def test_a_coefficient_that_changes_sign_is_removed_and_the_rest_goes_on_as_before():
    psi, target = [0.3, 0.05, -0.04, 0.2], distance(1.0, -1.0, 1.0, 0.5)
    run = descent(psi, target, lr=0.02, sparsify_from=0, average=0.5)
    whole = descent(psi, target, lr=0.02, average=0.5)
    sizes = []
    for _ in range(12):
        run.step()
        whole.step()
        sizes.append(len(run.rule.psi))
        # Adam's moments and the averages of what is kept are those of a run that keeps everything.
        assert_close(run.rule.psi.detach(), whole.rule.psi.detach()[run.rule.places])
        assert_close(run.average["rule.psi"], whole.average["rule.psi"][run.rule.places])
    assert sizes == [4, 3] + [2] * 10 or sizes == [4, 4, 2] + [2] * 9, sizes
    assert run.rule.places.tolist() == [0, 3]
    run.use_average()
    whole.use_average()
    assert_close(run.rule.psi.detach(), whole.rule.psi.detach()[[0, 3]])


def test_nothing_is_removed_before_its_time():
    run = descent([0.01], distance(-1.0), sparsify_from=5)
    values = []
    for _ in range(5):
        run.step()
        values.append(run.rule.psi.item())
    assert values[0] > -1e-3 > values[-1]
    for _ in range(5):  # it has changed sign long ago
        run.step()
    assert len(run.rule.psi) == 1


def test_a_coefficient_that_leaves_zero_is_not_removed():
    run = descent([0.0, 0.0], distance(1.0, -1.0), sparsify_from=0)
    for _ in range(3):
        run.step()
    assert run.rule.psi[0] > 0 > run.rule.psi[1]


def test_a_run_goes_on_when_every_coefficient_is_removed():
    run = descent([0.001, -0.001], distance(-1.0, 1.0), start=[0.0, 0.0], sparsify_from=0)
    for _ in range(3):
        row = run.step()
    assert len(run.rule.psi) == 0
    assert row["meta_loss"] == pytest.approx(2.0) and row["hypergradient_norm"] == 0.0


def test_a_polynomial_rule_loses_the_terms_that_change_sign():
    run = polynomial_run(sparsify_from=2, lr=3e-3, metasteps=30)
    names = set(run.rule.coefficients())
    for _ in range(25):
        run.step()
    left = run.rule.coefficients()
    assert set(left) < names and len(left) == sum(len(p) for p in run.rule.parameters())


def test_only_coefficients_are_removed_and_exponents_go_with_theirs():
    texts = ["x gain", "x gain y", "x gain z", "x gain r", "x gain s", "w"]
    learn = ("eta", "eps", "exponents")
    rules = [UnitStatisticsRule.of_terms(texts, views=1, learn=learn) for _ in range(2)]
    with torch.no_grad():
        for rule in rules:
            rule.w.copy_(torch.linspace(-0.1, 1.0, len(rule.w)))
    run = polynomial_run(PerLayerRule(rules), sparsify_from=1, lr=0.05, l1=0.1, metasteps=30)
    for _ in range(6):
        run.step()
    for rule in rules:
        assert 0 < len(rule.w) == len(rule.exponents["w"]) < 6
        assert rule.moved["eta"].shape == () and rule.moved["eta"] != 0


def test_only_the_rule_is_sparsified():
    run = descent([0.5], distance(-3.0), start=[0.005], trainable=True, sparsify_from=0)
    for _ in range(3):
        run.step()
    assert initializer_of(run).start.item() < 0 and len(run.rule.psi) == 1


# ---- what is not finite ----


def failing(at, how, target=2.0):
    """A distance that fails at some of its calls."""
    return lambda w, call: how(w) if call in at else (w - target).square().sum()


def nan_loss(w):
    return w.sum() * math.nan


def infinite_loss(w):
    return w.sum() + math.inf


def nan_gradient(w):
    return (w * 0).sqrt().sum()


def raising(w):
    raise FloatingPointError("features of the training set: not finite")


FAILURES = [nan_loss, infinite_loss, nan_gradient, raising]
PLACES = ["task 1, outer loss", "task 1, outer loss", "task 1, hypergradient of rule.psi",
          "features of the training set"]  # fmt: skip


@pytest.mark.parametrize("how, place", list(zip(FAILURES, PLACES, strict=True)))
def test_a_skipped_task_is_warned_of_with_its_place(how, place):
    run = descent([0.5], failing({5}, how), tasks=2)
    for _ in range(4):
        run.step()
    (text,) = run.warn
    assert text.startswith("meta-step 3, ") and place in text and "\n" not in text


@pytest.mark.parametrize("how", FAILURES)
def test_a_skipped_meta_step_changes_nothing_but_its_number(how):
    run = descent([0.5], failing({2}, how), average=0.5, l2=0.1)
    without = descent([0.5], failing((), how), average=0.5, l2=0.1)
    for k in range(5):
        before, average = run.rule.psi.item(), run.average["rule.psi"].item()
        row = run.step()
        assert (row["skipped_tasks"], run.metastep) == (int(k == 2), k + 1)
        assert math.isnan(row["meta_loss"]) == (k == 2)
        assert math.isnan(row["hypergradient_norm"]) == (k == 2)
        if k == 2:
            assert (run.rule.psi.item(), run.average["rule.psi"].item()) == (before, average)
        else:
            without.step()
        assert run.rule.psi.item() == without.rule.psi.item()


@pytest.mark.parametrize("how", FAILURES)
def test_the_other_tasks_of_a_meta_step_still_count(how):
    run = descent([0.5], failing({1}, how), tasks=3, spread=1.0)
    row = run.step()
    assert row["skipped_tasks"] == 1
    ends = torch.cat(initializer_of(run).drawn)[[0, 2]] + 0.5
    assert row["meta_loss"] == pytest.approx((ends - 2).square().mean().item())
    assert row["hypergradient_norm"] < math.inf
    (expected,) = by_hand([0.5], [(2 * (ends - 2).mean().item(),)])
    assert_close(run.rule.psi.detach(), expected)


@pytest.mark.parametrize("how, place", list(zip(FAILURES, PLACES, strict=True)))
def test_a_run_that_is_to_stop_says_where(how, place):
    run = descent([0.5], failing({5}, how), tasks=2, nonfinite="stop")
    run.step()
    run.step()
    before = run.rule.psi.item()
    with pytest.raises(NonFiniteError, match=f"^meta-step 3, .*{place}") as error:
        run.step()
    assert "\n" not in str(error.value)
    assert run.rule.psi.item() == before and run.metastep == 2


def test_inner_parameters_that_are_not_finite_are_never_judged():
    def exploding(generator):
        return iter([torch.tensor(1.0, dtype=DOUBLE), torch.tensor(math.inf, dtype=DOUBLE)])

    run = descent([0.5], distance(1.0), batches=exploding, inner_steps=2)
    assert run.step()["skipped_tasks"] == 1
    assert outer_loss_of(run).seen == [] and run.rule.psi.item() == 0.5
    stopping = descent([0.5], distance(1.0), batches=exploding, inner_steps=2, nonfinite="stop")
    with pytest.raises(NonFiniteError, match="meta-step 1, task 0, parameters after 2 inner steps"):
        stopping.step()


def test_after_a_skip_training_starts_anew_instead_of_going_on():
    run = descent([0.0], failing({1}, nan_loss), spread=1.0, reinitialize_every=10, inner_steps=1)
    for _ in range(4):
        run.step()
    assert len(initializer_of(run).drawn) == 2  # at the start, and after the failure


def test_a_skip_leaves_the_moments_of_the_optimizer_alone():
    run = descent([0.5], failing({1, 2}, nan_loss))
    values = [run.rule.psi.item() for _ in range(5) if run.step()]
    expected = by_hand([0.5], [lambda p: 2 * (p - 2)] * 3)
    assert values[0] == values[1] == values[2]
    assert values[2:] == pytest.approx([p.item() for p in expected])


def test_a_window_whose_last_meta_step_fails_leaves_nothing_to_the_next():
    gradients = [(100.0,), (math.nan,), (-1.0,), (-2.0,)]
    run = descent([0.0], slopes(*gradients), accumulate=True, reinitialize_every=2)
    for _ in gradients:
        run.step()
    stepped, dropped = by_hand([0.0], [(100.0,), (-3.0,)])[-1], by_hand([0.0], [(-3.0,)])[-1]
    psi = run.rule.psi.detach()
    assert torch.allclose(psi, stepped) or torch.allclose(psi, dropped), psi


@pytest.mark.parametrize("settings, said", [
    ({"l1": 1e308}, "hypergradient and penalties of rule.psi"),
    ({"l2": math.inf}, "hypergradient and penalties of rule.psi"),
    ({"lr": math.inf}, "rule.psi after a step at rate inf"),
], ids=str)  # fmt: skip
def test_a_step_that_is_not_finite_ends_a_run_before_it_does_harm(settings, said):
    run = descent([0.5], distance(2.0), **settings)
    with pytest.raises(NonFiniteError, match=f"meta-step 1, {said}: not finite"):
        run.step()
    assert run.rule.psi.item() == 0.5 and run.metastep == 0


def test_a_hypergradient_that_overflows_when_squared_does_not_stop_its_coefficient_for_good():
    run = descent([0.0], slopes((1e200,), *[(1.0,)] * 20))
    run.step()
    before = run.rule.psi.item()
    for _ in range(20):
        run.step()
    assert math.isfinite(before) and run.rule.psi.item() < before - 1e-3


# ---- averaging ----


def test_without_averaging_the_last_values_are_used():
    run = descent([0.1], distance(1.0))
    for _ in range(5):
        run.step()
    last = run.rule.psi.item()
    run.use_average()
    assert run.rule.psi.item() == last


def test_the_average_forgets_its_start_and_then_decays():
    run = descent([0.3], distance(1.0), lr=0.1, average=0.9)
    expected, values = 0.3, []
    for k in range(150):
        run.step()
        values.append(run.rule.psi.item())
        decay = min(0.9, (k + 1) / (k + 10))
        expected = decay * expected + (1 - decay) * values[-1]
    run.use_average()
    assert run.rule.psi.item() == pytest.approx(expected, abs=1e-12)
    assert min(values[-40:]) <= run.rule.psi.item() <= max(values[-40:])


def test_the_average_includes_the_initializer():
    run = descent([0.0], distance(1.0), trainable=True, average=0.5)
    for _ in range(5):
        run.step()
    last = initializer_of(run).start.item()
    run.use_average()
    assert 0 < initializer_of(run).start.item() < last


# ---- refusals ----


@pytest.mark.parametrize("settings", [{"reinitialize_every": 2}, {"ungraded_steps": 1}])
def test_training_the_initializer_needs_reinitialisation_and_no_ungraded_steps(settings):
    with pytest.raises(MetaError, match="training the initializer needs reinitialisation"):
        descent([0.0], distance(1.0), trainable=True, **settings)
    descent([0.0], distance(1.0), **settings)


@pytest.mark.parametrize("settings", [
    {"accumulate": True}, {"optimizer": "sgd"}, {"nonfinite": "ignore"}, {"decay": "linear"},
    {"tasks": 0}, {"reinitialize_every": 0}, {"average": 1.0}, {"average": -0.1},
], ids=str)  # fmt: skip
def test_contradictory_settings_are_refused_in_one_line(settings):
    with pytest.raises(MetaError) as error:
        descent([0.0], distance(1.0), **settings)
    assert str(error.value) and "\n" not in str(error.value)
    assert next(iter(settings)).rstrip("e")[:6] in str(error.value)


# ---- evaluation ----


def test_accuracies_are_told_by_mean_and_the_samples_deviation():
    told = mean_and_deviation("test_accuracy", [0.25, 0.5, 0.75])
    assert told == {"test_accuracy_mean": 0.5, "test_accuracy_standard_deviation": 0.25}
    assert accuracy_text(told) == "test accuracy 50.00% +- 25.00%"
    single = mean_and_deviation("test_accuracy", [0.25])
    assert single["test_accuracy_standard_deviation"] is None
    assert accuracy_text(single) == "test accuracy 25.00%"
    assert accuracy_text(single, held_out=True) == "held-out accuracy 25.00%"
    assert set(mean_and_deviation("loss", []).values()) == {None}


def evaluation(seed, psi=(0.5,), steps=3):
    rule, outer = Drift(psi), Outer(distance(2.0))
    initializer = Start([1.0], spread=1.0, trainable=True)
    training = Training(nn.Identity(), rule, initializer, ones, outer)
    row, params = evaluate_training(training, Draw(seed, steps))
    return row, params, initializer


def test_an_evaluation_trains_and_judges_one_draw():
    row, params, initializer = evaluation((0, 7))
    (start,) = initializer.drawn
    end = start.item() + 3 * 0.5
    assert row == pytest.approx({"meta_loss": (end - 2) ** 2, "first": end})
    assert params[0]["w"].item() == pytest.approx(end)
    assert not params[0]["w"].requires_grad


def test_the_same_draw_gives_the_same_evaluation():
    assert evaluation((0, 7))[0] == evaluation((0, 7))[0] != evaluation((0, 8))[0]


@pytest.mark.parametrize("interrupted_in, made", [(None, 3), (1, 2), (2, 3)])
def test_evaluations_that_are_not_finite_are_left_out_and_ctrl_c_ends_after_a_draw(
    tmp_path, capsys, interrupted_in, made
):
    def loss(w, call):
        if call == interrupted_in:
            signal.raise_signal(signal.SIGINT)
        if call == 0:
            raise FloatingPointError("too large")
        return w.sum() * 0 + call

    training = Training(nn.Identity(), Drift([0.0]), Start([2.0]), ones, Outer(loss))
    draws = [Draw((0, k), 1) for k in range(3)]
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        rows, params, finished = evaluate_draws(log, training, draws)
    assert [row["meta_loss"] for row in rows] == [*range(1, made)]
    assert params[0]["w"].item() == 2 and finished == (made == 3)
    assert "evaluation 1, too large; left out" in capsys.readouterr().err


# ---- resumption ----


def polynomial_run(rule=None, **settings):
    """A tiny network under polynomial rules, with a trained initializer where it may be."""
    model = lateral_mlp(3, [3, 2], Activation("sigmoid", 2.0), inh_steps=2)
    fixed = settings.get("reinitialize_every", 1) > 1 or settings.get("ungraded_steps", 0)
    mode = FIXED if fixed else TRAINABLE
    options = {"bound": "tanh", "forward_weight_bound": 1.0}
    rule = rule or PerLayerRule([PolynomialRule.of_degree(2, **options) for _ in range(2)])
    initializer = GaussianInitializer({"b": mode, "m": mode}, {"w": mode})

    def batches(generator):
        while True:
            yield torch.randn(5, 3, generator=generator)

    class Activity:
        metrics = ("activity",)

        def __call__(self, model, params, generator):
            y = model(torch.randn(20, 3, generator=generator), params)
            return (y.mean(0) - 0.3).square().sum() - y.var(0).sum(), {"activity": y.mean().item()}

    options = {"metasteps": 20, "lr": 1e-3, "inner_steps": 3, "warmup_steps": 3, **settings}
    return HypergradientDescent(
        Training(model, rule, initializer, batches, Activity()), MetaSettings(**options)
    )


def stored(state: dict) -> dict:
    """What comes back from a checkpoint on disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def everything(run) -> dict:
    return copy.deepcopy({
        "rule": run.rule.state_dict(),
        "initializer": initializer_of(run).state_dict(),
        "average": run.average,
        "coefficients": run.rule.coefficients(),
    })  # fmt: skip


def assert_same_bits(one, two):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two) and one.dtype == two.dtype
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for name in one:
            assert_same_bits(one[name], two[name])
    else:
        assert one == two or (one != one and two != two)


RESUMABLE = {
    "plain": {},
    "rmsprop": {"optimizer": "rmsprop", "l1": 0.1, "l2": 0.1, "clip_norm": 0.1},
    "cosine, average, tasks": {"decay": "cosine", "average": 0.9, "tasks": 2},
    "fine-tuning": {"metasteps": 6, "finetune_steps": 6},
    "sparsified": {"sparsify_from": 2, "lr": 3e-3, "average": 0.8, "l1": 0.1},
    "accumulating": {"accumulate": True, "reinitialize_every": 4, "tasks": 2},
    "carried on": {"reinitialize_every": 5, "ungraded_steps": 2},
    "everything": {
        "accumulate": True, "reinitialize_every": 3, "sparsify_from": 0, "tasks": 2, "lr": 1e-2,
        "average": 0.9, "optimizer": "rmsprop", "ungraded_steps": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(name):
    settings, total = RESUMABLE[name], 10
    whole, states, rows = polynomial_run(**settings), [], []
    for _ in range(total):
        states.append(stored(whole.state_dict()))
        rows.append(without_seconds(whole.step()))
    if "sparsify_from" in settings:
        assert whole.removals, "nothing was removed: the test would be empty"
    for stop in (1, 5, 8):
        resumed = polynomial_run(**settings)
        resumed.load_state_dict(states[stop])
        assert resumed.metastep == stop
        for expected in rows[stop:]:
            assert_same_bits(without_seconds(resumed.step()), expected)
        assert_same_bits(everything(resumed), everything(whole))
        resumed.use_average()
    again = polynomial_run(**settings)
    again.load_state_dict(stored(resumed.state_dict()))


def test_a_run_may_be_resumed_again_and_again():
    settings = RESUMABLE["sparsified"]
    whole, run = polynomial_run(**settings), polynomial_run(**settings)
    for _ in range(8):
        fresh = polynomial_run(**settings)
        fresh.load_state_dict(stored(run.state_dict()))
        run = fresh
        assert_same_bits(without_seconds(run.step()), without_seconds(whole.step()))
    assert whole.removals
    assert_same_bits(everything(run), everything(whole))


def test_a_run_resumed_within_a_window_ends_it_as_the_uninterrupted_one_if_its_last_step_fails():
    def run_of(calls):
        loss = slopes(*[[(1.0,), (2.0,), (math.nan,), (4.0,), (5.0,), (6.0,)][k] for k in calls])
        return descent([0.0], loss, accumulate=True, reinitialize_every=3)

    whole, resumed = run_of(range(6)), run_of(range(2, 6))
    for k in range(6):
        if k == 2:
            resumed.load_state_dict(stored(whole.state_dict()))
        row = without_seconds(whole.step())
        if k >= 2:
            assert_same_bits(without_seconds(resumed.step()), row)
            assert torch.equal(resumed.rule.psi, whole.rule.psi)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_resumes_from_a_checkpoint_read_to_the_cpu():
    def on_gpu():
        run = descent([0.1], distance(1.0), average=0.9, accumulate=True, reinitialize_every=2)
        run.rule.cuda()
        run.rule.places = run.rule.places.cuda()
        initializer_of(run).cuda()
        return HypergradientDescent(run.trainings[0], run.settings)

    whole = on_gpu()
    whole.step()
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    buffer.seek(0)
    resumed = on_gpu()
    resumed.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))
    for _ in range(4):
        assert without_seconds(resumed.step()) == without_seconds(whole.step())


# ---- the whole loop ----


class Killed(BaseException):
    """Stands for the end of the process."""


def run_loop(log, *, before_call=lambda call: None, checkpoint_every=3, **settings):
    """hypgraddesc with the run's rule; before_call sees the number of the loss about to be met."""
    run = polynomial_run(**settings)
    calls = itertools.count()

    (training,) = run.trainings

    class Watched:
        metrics = training.outer_loss.metrics

        def __call__(self, *arguments):
            before_call(next(calls))
            return training.outer_loss(*arguments)

    history = hypgraddesc(
        replace(training, outer_loss=Watched()), run.settings, log,
        hyperparameters=lambda: run.rule.coefficients() | training.initializer.effective(),
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    return history.finished, run


def at_call(number, action):
    return lambda call: action() if call == number else None


def kill():
    raise Killed


def columns_without_seconds(directory):
    columns = read_metrics(directory)
    del columns["seconds"]
    return {name: values.tolist() for name, values in columns.items()}


def lines_without_seconds(directory):
    """The text of metrics.csv, but for the numbers of one column."""
    lines = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()]
    seconds = lines[0].index("seconds")
    return [line[:seconds] + line[seconds + 1 :] for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Rows and results of runs that were never killed, by settings."""
    known = {}

    def of(name):
        if name not in known:
            directory = tmp_path_factory.mktemp("whole") / "run"
            with RunLog.create(directory, {}, quiet=True) as log:
                finished, run = run_loop(log, **{**RESUMABLE[name], "metasteps": 11})
            assert finished
            known[name] = lines_without_seconds(directory), everything(run)
        return known[name]

    return of


def test_the_loop_records_a_row_for_each_meta_step_with_its_hyperparameters(tmp_path):
    settings = {"metasteps": 5, "finetune_steps": 2}
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        finished, run = run_loop(log, **settings)
    columns = read_metrics(tmp_path / "run")
    assert finished and columns["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    by_step = polynomial_run(**settings)
    for k in range(7):
        seen = by_step.rule.coefficients() | initializer_of(by_step).effective()
        row = without_seconds(by_step.step()) | seen
        assert {name: columns[name][k] for name in row} == row
    assert_same_bits(everything(run)["coefficients"], by_step.rule.coefficients())


def test_the_loop_ends_with_the_average(tmp_path):
    settings = RESUMABLE["cosine, average, tasks"]
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        _, run = run_loop(log, **{**settings, "metasteps": 6})
    by_step = polynomial_run(**{**settings, "metasteps": 6})
    for _ in range(6):
        by_step.step()
    by_step.use_average()
    assert_same_bits(run.rule.coefficients(), by_step.rule.coefficients())
    assert_same_bits(initializer_of(run).state_dict(), initializer_of(by_step).state_dict())


@pytest.mark.parametrize("name", ["plain", "sparsified", "everything"])
@pytest.mark.parametrize("killed_at", [0, 4, 9])
def test_a_killed_and_resumed_loop_leaves_the_same_metrics(
    name, killed_at, uninterrupted, tmp_path
):
    settings, directory = {**RESUMABLE[name], "metasteps": 11}, tmp_path / "run"
    call = killed_at * settings.get("tasks", 1)
    with RunLog.create(directory, {}, quiet=True) as log, pytest.raises(Killed):
        run_loop(log, before_call=at_call(call, kill), **settings)
    with RunLog.reopen(directory, quiet=True) as log:
        finished, run = run_loop(log, **settings)
    rows, results = uninterrupted(name)
    assert finished
    assert lines_without_seconds(directory) == rows
    assert_same_bits(run.rule.coefficients(), results["coefficients"])
    assert_same_bits(initializer_of(run).state_dict(), results["initializer"])


def test_a_loop_killed_many_times_leaves_the_same_metrics(uninterrupted, tmp_path):
    settings, directory = {**RESUMABLE["plain"], "metasteps": 11}, tmp_path / "run"
    RunLog.create(directory, {}, quiet=True).close()
    for call in (3, 2, 1, 4, 1):
        with RunLog.reopen(directory, quiet=True) as log, pytest.raises(Killed):
            run_loop(log, before_call=at_call(call, kill), checkpoint_every=2, **settings)
    with RunLog.reopen(directory, quiet=True) as log:
        run_loop(log, checkpoint_every=2, **settings)
    assert lines_without_seconds(directory) == uninterrupted("plain")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_loop_finishes_its_meta_step_and_can_be_resumed(
    number, uninterrupted, tmp_path
):
    settings, directory = {**RESUMABLE["plain"], "metasteps": 11}, tmp_path / "run"

    def interrupt():
        os.kill(os.getpid(), number)

    with RunLog.create(directory, {}, quiet=True) as log:
        finished, _ = run_loop(log, before_call=at_call(4, interrupt), **settings)
        assert not finished
        assert log.load_checkpoint()[0] == 5
    assert read_metrics(directory)["step"].tolist() == [1, 2, 3, 4, 5]
    with RunLog.reopen(directory, quiet=True) as log:
        finished, _ = run_loop(log, **settings)
    assert finished and lines_without_seconds(directory) == uninterrupted("plain")[0]


def test_a_finished_loop_that_is_resumed_gives_its_results_again(uninterrupted, tmp_path):
    settings, directory = {**RESUMABLE["cosine, average, tasks"], "metasteps": 11}, tmp_path / "run"
    with RunLog.create(directory, {}, quiet=True) as log:
        run_loop(log, **settings)

    def unexpected(call):
        raise AssertionError("a finished run needs no further meta-step")

    with RunLog.reopen(directory, quiet=True) as log:
        finished, run = run_loop(log, before_call=unexpected, **settings)
    rows, results = uninterrupted("cosine, average, tasks")
    assert finished and lines_without_seconds(directory) == rows
    assert_same_bits(run.rule.coefficients(), results["coefficients"])


def test_no_meta_steps_are_a_finished_loop(tmp_path):
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        finished, run = run_loop(log, metasteps=0)
    assert finished and not any(run.rule.coefficients().values())


def test_without_a_log_the_rows_come_back_the_same_and_no_file_is_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        written = failing_loop(log, "skip")
    kept = failing_loop(None, "skip")
    assert written.finished and kept.finished and [*kept.columns] == [*written.columns]
    for name in {*kept.columns} - {"seconds"}:
        assert kept.columns[name].tolist() == pytest.approx(
            written.columns[name].tolist(), rel=0, abs=0, nan_ok=True
        )
    assert kept.columns["step"].tolist() == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    error = capsys.readouterr().err
    assert "meta-step 3, task 0, outer loss" in error and "meta-step 4/4" in error


def failing_loop(log, nonfinite):
    calls = itertools.count()

    class Failing:
        metrics = ()

        def __call__(self, model, params, generator):
            factor = math.nan if next(calls) == 2 else 1.0
            return factor * (params[0]["w"] - 1).square().sum(), {}

    settings = MetaSettings(metasteps=4, inner_steps=1, lr=0.01, nonfinite=nonfinite)
    rule = Drift([0.5])
    training = Training(nn.Identity(), rule, Start([0.0]), ones, Failing())
    return hypgraddesc(training, settings, log, hyperparameters=rule.coefficients)


def test_a_loop_that_is_to_stop_at_what_is_not_finite_stops(tmp_path):
    with (
        RunLog.create(tmp_path / "run", {}, quiet=True) as log,
        pytest.raises(NonFiniteError, match="meta-step 3, task 0, outer loss"),
    ):
        failing_loop(log, "stop")
    assert read_metrics(tmp_path / "run")["step"].tolist() == [1, 2]


def test_a_loop_that_skips_what_is_not_finite_goes_on_and_says_where(tmp_path):
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log:
        failing_loop(log, "skip")
    columns = read_metrics(tmp_path / "run")
    assert columns["skipped_tasks"].tolist() == [0, 0, 1, 0]
    assert math.isnan(columns["meta_loss"][2]) and columns["psi0"][2] == columns["psi0"][3]
    assert "meta-step 3, task 0, outer loss" in (tmp_path / "run" / "log.txt").read_text()


def test_the_loop_says_where_it_goes_on(tmp_path):
    with RunLog.create(tmp_path / "run", {}, quiet=True) as log, pytest.raises(Killed):
        run_loop(log, before_call=at_call(4, kill), metasteps=6)
    with RunLog.reopen(tmp_path / "run", quiet=True) as log:
        run_loop(log, metasteps=6)
    assert "meta-step 3" in (tmp_path / "run" / "log.txt").read_text()


def test_settings_are_values_that_can_be_replaced():
    settings = MetaSettings(metasteps=3)
    assert replace(settings, lr=1.0).metasteps == 3
    with pytest.raises(AttributeError):
        settings.lr = 1.0
