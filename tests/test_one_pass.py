"""The one-pass algorithm against its published numbers, autograd and finite differences."""

import math

import pytest
import torch

from comparison.one_pass_problems import LanguageModel, TextObjective
from one_pass import (
    DEFAULT_TRANSFORMS,
    NAMES,
    Batch,
    FullBatches,
    Linearization,
    MLPObjective,
    OnePassError,
    SequentialBatches,
    Settings,
    ShuffledBatches,
    Tuning,
    initial_hyperparameters,
    initial_state,
)
from one_pass.tuning import (
    TRANSFORMS,
    adam,
    clip_product,
    clipped,
    look_back_hypergradients,
    look_back_vector,
    successive_gradients,
    unrolled_hypergradients,
    weight_step,
)

SIZES = (3, 4, 1)


def generators(runs, first=0):
    return [torch.Generator().manual_seed(number) for number in range(first, first + runs)]


def hyperparameters(weights, lr=0.1, decay=0.01, momentum=0.5, per_weight=()):
    values = {"lr": lr, "weight_decay": decay, "momentum": momentum}
    return {
        name: torch.full_like(weights if name in per_weight else weights[:, :1], value)
        for name, value in values.items()
    }


def regression(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, SIZES[0], generator=generator, dtype=torch.float64)
    return inputs, torch.randn(rows, 1, generator=generator, dtype=torch.float64)


def test_the_golden_case_to_seven_digits():
    one = torch.ones(1, 1, dtype=torch.float64)
    found = Linearization(one[0], 2 * one, {}, lambda vectors: 2 * vectors)  # of w^2 at w = 1
    natural = hyperparameters(one, 0.1, 0.1, 0.5)
    step = weight_step(found, None, one, {}, 0.3 * one, False, natural, None)
    assert step.after.item() == pytest.approx(0.775, abs=1e-12)
    vector = look_back_vector(step, step.after, terms=5)  # the gradient of w'^2 / 2
    assert vector.item() == pytest.approx(2.55489585, abs=1e-8)
    found = look_back_hypergradients(step, vector)
    expected = {"lr": -5.74851567, "weight_decay": -0.25548959, "momentum": -0.07664688}
    raw = {"lr": -1.32364465, "weight_decay": -0.05882865, "momentum": -0.01916172}
    for name in NAMES:
        derivative = TRANSFORMS[DEFAULT_TRANSFORMS[name]][2](natural[name])
        assert found[name].item() == pytest.approx(expected[name], abs=1e-8)
        assert (found[name] * derivative).item() == pytest.approx(raw[name], abs=1e-8)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("per_weight", [(), ("lr",), NAMES])
def test_the_series_is_autograds_through_the_weight_update(clip_norm, fresh, per_weight):
    objective = MLPObjective(SIZES, "mse")
    weights, _ = objective.initial(generators(2))
    buffer = torch.randn_like(weights)
    batch, target = Batch(*regression(6, 0), shared=True), torch.randn_like(weights)
    natural = {
        name: (value * (1 + 0.1 * torch.rand_like(value))).requires_grad_()
        for name, value in hyperparameters(weights, per_weight=per_weight).items()
    }
    plain = {name: value.detach() for name, value in natural.items()}
    found = objective.linearize(weights, {}, batch)
    step = weight_step(found, batch, weights, {}, buffer, fresh, plain, clip_norm)
    vector = look_back_vector(step, target, terms=4)
    ours = look_back_hypergradients(step, vector)

    w = weights.clone().requires_grad_()
    gradient = _differentiable_gradient(objective, w, batch)
    if clip_norm is not None:
        length = gradient.norm(dim=1, keepdim=True)
        gradient = gradient * (clip_norm / (length + 1e-6)).clamp_max(1)
    eta, xi, mu = (natural[name] for name in NAMES)
    update = eta * (gradient + xi * w + (0 if fresh else mu * buffer))
    assert torch.allclose(step.after, weights - update)
    term, total = target, target.clone()
    for _ in range(3):
        (product,) = torch.autograd.grad(update, w, term, retain_graph=True)
        term = term - product
        total = total + term
    assert torch.allclose(vector, total, atol=1e-12)
    for name in NAMES:
        if fresh and name == "momentum":
            assert (ours[name] == 0).all()
            continue
        (expected,) = torch.autograd.grad(update, natural[name], -total, retain_graph=True)
        summed = ours[name] if name in per_weight else ours[name].sum(dim=1, keepdim=True)
        assert torch.allclose(summed, expected, atol=1e-12)


def _differentiable_gradient(objective, weights, batch):
    found = []
    for flat in weights:
        first = flat[:12].view(3, 4), flat[12:16]
        second = flat[16:20].view(4, 1), flat[20:]
        hidden = (batch.inputs @ first[0] + first[1]).relu()
        loss = (hidden @ second[0] + second[1] - batch.targets).square().mean()
        found.append(torch.autograd.grad(loss, flat, create_graph=True)[0])
    return torch.stack(found)


def train_steps(objective, weights, natural, batches, clip_norm, entering=None):
    """`entering`: the network's buffers at each step; none: it has none."""
    buffer, steps = torch.zeros_like(weights), []
    for number, batch in enumerate(batches):
        buffers = entering[number] if entering else {}
        found = objective.linearize(weights, buffers, batch)
        step = weight_step(found, batch, weights, buffers, buffer, number == 0, natural, clip_norm)
        weights, buffer = step.after, step.new_buffer
        steps.append(step)
    return steps


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_the_unrolled_derivative_is_a_finite_difference(clip_norm):
    objective = MLPObjective(SIZES, "mse")
    weights, _ = objective.initial(generators(1))
    batches = [Batch(*regression(6, seed), shared=True) for seed in range(5)]
    held_out = Batch(*regression(9, 99), shared=True)
    natural = hyperparameters(weights)

    def final_loss(changed):
        last = train_steps(objective, weights, changed, batches, clip_norm)[-1].after
        return objective.held_out(last, {}, held_out).loss.item()

    steps = train_steps(objective, weights, natural, batches, clip_norm)
    gradient = objective.held_out(steps[-1].after, {}, held_out).gradient
    found = unrolled_hypergradients(steps, gradient, objective.linearize)
    for name in NAMES:
        change = 1e-6
        above, below = (
            final_loss({**natural, name: natural[name] + sign * change}) for sign in (1, -1)
        )
        assert found[name].sum().item() == pytest.approx((above - below) / (2 * change), rel=1e-5)


def text(windows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, (2, windows, 4, 5), generator=generator).unbind()


def text_tuning(method="unrolled", runs=1, **changes):
    settings = Settings(method, NAMES, every=3, look_back=3, lr=0.5, final_lr=0.5, **changes)
    objective = TextObjective(LanguageModel(8, 6, 4), "cross_entropy")
    weights, buffers = objective.initial(generators(runs))
    buffers = {name: buffer.double() for name, buffer in buffers.items()}
    drawn = {**hyperparameters(weights, lr=0.5), "factor": torch.ones(runs, 1)}
    state = initial_state(3 * weights, buffers, drawn, settings)
    samples = SequentialBatches(*text(6, 0)), SequentialBatches(*text(4, 1))
    return Tuning(objective, *samples, settings, state)


def test_the_unrolled_derivative_takes_the_hidden_states_that_each_step_began_with(monkeypatch):
    tuning, found, entering = text_tuning(), {}, []
    batches = [Batch(*window, shared=True) for window in zip(*text(6, 0), strict=True)][:3]
    held_out = Batch(*(part[0] for part in text(4, 1)), shared=True)
    start, natural = tuning.state.weights, tuning.hyperparameters
    for _ in range(3):
        entering.append(tuning.state.buffers)
        tuning._weight_step()
    tuning = text_tuning()
    monkeypatch.setattr(tuning, "_descend", lambda each, step: found.update(each))
    tuning.advance(3)

    def final_loss(changed):
        last = train_steps(tuning.objective, start, changed, batches, None, entering)[-1].after
        return tuning.objective.held_out(last, tuning.state.start[1], held_out).loss.item()

    for name in NAMES:
        change = 1e-6
        above, below = (
            final_loss({**natural, name: natural[name] + sign * change}) for sign in (1, -1)
        )
        assert found[name].sum().item() == pytest.approx((above - below) / (2 * change), rel=1e-5)


def test_held_out_text_is_read_with_hidden_states_of_its_own():
    tuning = text_tuning()
    tuning.advance(3)
    windows = [part[0] for part in text(4, 1)]
    weights, zero = tuning.state.weights, tuning.state.start[1]
    read = tuning.objective.held_out(weights, zero, Batch(*windows, shared=True)).buffers
    assert torch.equal(tuning.state.held_out_buffers["hidden"], read["hidden"])
    assert not torch.equal(tuning.state.buffers["hidden"], read["hidden"])
    (evaluated, from_zero) = (
        tuning.objective.evaluate(weights, buffers, *text(4, 1)).loss
        for buffers in (tuning.state.buffers, zero)
    )
    assert torch.equal(evaluated, from_zero)


def test_a_run_that_recovers_reads_held_out_text_from_the_start():
    tuning = text_tuning("look_back", runs=2, recover=True)
    tuning.advance(3)
    tuning.state.weights = tuning.state.weights.index_fill(0, torch.tensor([1]), math.nan)
    tuning.advance(3)
    assert (tuning.state.held_out_buffers["hidden"][1] == 0).all()
    assert (tuning.state.held_out_buffers["hidden"][0] != 0).any()


def test_the_jacobian_of_clipping_is_autograds():
    gradient = torch.randn(3, 5, dtype=torch.float64) * torch.tensor([[0.01], [1.0], [5.0]])
    vectors = torch.randn(3, 5, dtype=torch.float64)
    leaf = gradient.double().requires_grad_()
    (expected,) = torch.autograd.grad(clipped(leaf, 0.7), leaf, vectors)
    assert torch.allclose(clip_product(gradient.double(), 0.7, vectors), expected)


def test_adam_is_torchs():
    values = torch.randn(3, 4, dtype=torch.float64)
    theirs = values.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.05)
    ours, moments = values, (torch.zeros_like(values), torch.zeros_like(values))
    for count in range(1, 6):
        gradient = torch.randn_like(values)
        theirs.grad = gradient.clone()
        optimizer.step()
        counts = torch.full((3, 1), float(count), dtype=torch.float64)
        ours, moments = adam(ours, gradient, moments, counts, torch.tensor(0.05))
    assert torch.allclose(ours, theirs.detach())


def test_weight_steps_are_those_of_torch_sgd():
    objective = MLPObjective(SIZES, "mse")
    weights, _ = objective.initial(generators(1))
    batches = [Batch(*regression(6, seed), shared=True) for seed in range(4)]
    leaf = weights.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.1, momentum=0.5, weight_decay=0.01)
    for batch in batches:
        leaf.grad = objective.linearize(leaf.detach(), {}, batch).gradient
        optimizer.step()
    ours = train_steps(objective, weights, hyperparameters(weights), batches, None)[-1].after
    assert torch.allclose(ours, leaf.detach())


# ---- runs ----


def make_tuning(runs=3, first=0, batch_size=None, **changes):
    settings = Settings(**{"method": "look_back", "optimised": NAMES, "every": 5, **changes})
    objective = MLPObjective(SIZES, "mse")
    drawn = initial_hyperparameters(generators(runs, first))
    weights, buffers = objective.initial(generators(runs, first + 100))
    state = initial_state(weights, buffers, drawn, settings)
    parts = []
    for seed in (0, 1):
        data = regression(20, seed)
        streams = generators(runs, first + 200 + 100 * seed)
        parts.append(
            ShuffledBatches(*data, batch_size, streams) if batch_size else FullBatches(*data)
        )
    return Tuning(objective, *parts, settings, state)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("method", ["look_back", "unrolled", "stepped_lr", "fixed"])
@pytest.mark.parametrize("high_dimensional", [(), ("lr",)])
def test_runs_together_are_the_runs_one_by_one(batch_size, method, high_dimensional):
    options = {
        "batch_size": batch_size, "method": method, "high_dimensional": high_dimensional
    }  # fmt: skip
    together = make_tuning(3, **options)
    together.advance(20)
    for run in range(3):
        alone = make_tuning(1, first=run, **options)
        alone.advance(20)
        assert torch.allclose(together.state.weights[run], alone.state.weights[0], rtol=1e-9)
        for name in NAMES:
            assert torch.allclose(together.state.raw[name][run], alone.state.raw[name][0])


def test_tuning_lowers_the_validation_loss():
    fixed, tuned = make_tuning(6, method="fixed"), make_tuning(6, lr=0.2)
    for tuning in (fixed, tuned):
        tuning.advance(300)
    losses = [
        tuning.objective.evaluate(
            tuning.state.weights, {}, tuning.validation.inputs, tuning.validation.targets
        ).loss.median()
        for tuning in (fixed, tuned)
    ]
    assert losses[1] < losses[0]


def test_a_hypergradient_that_is_not_finite_never_reaches_the_hyperparameters():
    tuning = make_tuning(3)
    tuning.state.weights[1] = math.nan
    before = {name: values.clone() for name, values in tuning.state.raw.items()}
    tuning.advance(10)
    assert tuning.state.skipped[:, 0].tolist() == [0, 2, 0]
    for name in NAMES:
        assert torch.equal(tuning.state.raw[name][1], before[name][1])
        assert not torch.equal(tuning.state.raw[name][0], before[name][0])
        assert all(moment.isfinite().all() for moment in tuning.state.moments[name])


def test_a_hypergradient_whose_square_overflows_leaves_adam_as_it_was():
    tuning = make_tuning(2)
    tuning.advance(5)
    before = {name: values.clone() for name, values in tuning.state.raw.items()}
    step = tuning._weight_step()
    huge = {name: torch.ones_like(step.before) for name in NAMES}
    huge["lr"][1] = 1e200
    tuning._descend(huge, step)
    assert tuning.state.skipped[:, 0].tolist() == [0, 1]
    assert tuning.state.updates[:, 0].tolist() == [2, 1]
    for name in NAMES:
        assert torch.equal(tuning.state.raw[name][1], before[name][1])
        assert all(moment.isfinite().all() for moment in tuning.state.moments[name])


def test_the_momentum_is_reset_with_the_weights():
    tuning = make_tuning(2, reset=True, updates=4)
    start = tuning.state.weights.clone()
    tuning.advance(5)
    assert torch.equal(tuning.state.weights, start) and tuning.state.fresh
    tuning.advance(15)
    assert not torch.equal(tuning.state.weights, start)  # not after the last update


def test_the_start_is_renewed_at_intervals_in_the_place_of_a_reset():
    tuning = make_tuning(2, reset=True, renew=2, updates=5)
    first = tuning.state.weights.clone()
    tuning.advance(5)
    assert torch.equal(tuning.state.weights, first)
    tuning.advance(5)
    renewed = tuning.state.weights.clone()
    assert torch.equal(tuning.state.start[0], renewed) and not torch.equal(renewed, first)
    assert not tuning.state.fresh
    tuning.advance(5)
    assert torch.equal(tuning.state.weights, renewed) and tuning.state.fresh


def test_sgd_moves_raw_values_by_its_rate_times_the_derivative():
    by_sgd = make_tuning(
        2, method="successive_gradients", optimised=("lr",), every=1, optimizer="sgd", lr=0.003,
        chain_rule=False,
    )  # fmt: skip
    raw = by_sgd.state.raw["lr"].clone()
    by_sgd.advance(1)
    old = by_sgd.state.previous_gradient
    by_sgd.advance(1)
    product = (old * by_sgd.state.previous_gradient).sum(dim=1, keepdim=True)
    assert torch.allclose(by_sgd.state.raw["lr"], raw + 0.003 * product, rtol=1e-12)
    with pytest.raises(OnePassError, match="optimizer 'lbfgs' is unknown; choose from adam, sgd"):
        Settings("fixed", optimizer="lbfgs")


def test_successive_gradients_give_minus_their_product():
    old, new = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(successive_gradients(old, new)["lr"], -new * old)
    tuning = make_tuning(2, method="successive_gradients", optimised=("lr",), every=1)
    tuning.advance(1)
    assert (tuning.state.updates == 0).all()
    tuning.advance(3)
    assert (tuning.state.updates == 3).all()


def test_gradients_at_weights_that_were_left_are_compared_with_none():
    tuning = make_tuning(
        2, method="successive_gradients", optimised=("lr",), every=1, recover=True
    )  # fmt: skip
    tuning.advance(3)
    tuning.state.weights = tuning.state.weights.index_fill(0, torch.tensor([1]), math.nan)
    tuning.advance(1)
    assert (tuning.state.previous_gradient[1] == 0).all()
    assert (tuning.state.previous_gradient[0] != 0).any()
    tuning._reset_or_renew()
    assert tuning.state.previous_gradient is None


def test_a_stepped_rate_is_multiplied_and_stays_in_its_bounds():
    tuning = make_tuning(2, method="stepped_lr", optimised=())
    before = tuning.hyperparameters["lr"].clone()
    tuning.advance(5)
    assert torch.allclose(tuning.hyperparameters["lr"], before * tuning.state.factor)


def test_the_worst_runs_of_a_population_go_on_from_the_best():
    tuning = make_tuning(10, method="population", every=5)
    tuning.advance(4)
    tuning.state.weights[3] = 100.0
    tuning.advance(1)
    assert tuning.state.weights.abs().max() < 50
    pairs = (tuning.state.weights[:, None] == tuning.state.weights).all(dim=2).sum(dim=1)
    assert (pairs > 1).sum() == 4  # two runs were copied over two others


def test_what_a_population_draws_depends_on_the_seed():
    rates = []
    for seed in (0, 0, 1):
        tuning = make_tuning(20, method="population", every=1, seed=seed)
        tuning.advance(3)
        rates.append(tuning.state.raw["lr"])
    assert torch.equal(rates[0], rates[1]) and not torch.equal(rates[0], rates[2])


@pytest.mark.parametrize("method", ["look_back", "population", "stepped_lr"])
def test_raw_values_stay_in_their_bounds(method):
    bounds = {"lr": (-3.0, -2.9), "weight_decay": (-4.0, -3.9)}
    tuning = make_tuning(10, method=method, lr=30.0, every=1, bounds=bounds)
    tuning.state.raw["lr"][:] = -2.95
    tuning.state.raw["weight_decay"][:] = -3.95
    tuning.state.factor[:] = 0.5
    tuning.advance(20)
    for name in ("lr", "weight_decay"):
        lowest, highest = bounds[name]
        assert (tuning.state.raw[name] >= lowest).all()
        assert (tuning.state.raw[name] <= highest).all()


def test_a_run_that_diverges_goes_on_from_its_last_good_weights_slower():
    tuning = make_tuning(3, recover=True)
    tuning.advance(10)
    good, rate = tuning.state.good[0].clone(), tuning.state.raw["lr"].clone()
    tuning.state.weights = tuning.state.weights.index_fill(0, torch.tensor([1]), math.nan)
    tuning.advance(5)
    assert torch.equal(tuning.state.weights[1], good[1])
    assert torch.equal(tuning.state.good[0][1], good[1])
    assert torch.allclose(tuning.state.raw["lr"][1], rate[1] - math.log10(3))
    assert (tuning.state.momentum_buffer[1] == 0).all()
    assert not torch.allclose(tuning.state.raw["lr"][0], rate[0] - math.log10(3))
    tuning.advance(5)
    assert tuning.state.weights.isfinite().all()


def test_a_recovery_keeps_to_the_bounds_and_is_no_skipped_update():
    tuning = make_tuning(2, recover=True, bounds={"lr": (-2.0, 0.0)})
    tuning.state.raw["lr"][:] = -1.9
    tuning.restore(tuning.state)
    tuning.advance(5)
    tuning.state.sound_loss = torch.tensor([math.inf, 0.0])
    tuning.advance(5)
    assert tuning.state.raw["lr"][1] == -2
    assert tuning.state.updates[:, 0].tolist() == [2, 1]
    assert (tuning.state.skipped == 0).all()


def test_unrolled_steps_begin_between_two_hyperparameter_steps():
    tuning = make_tuning(method="unrolled", every=10)
    tuning.advance(7)
    with pytest.raises(OnePassError, match="multiple of every = 10"):
        tuning.advance(3)
