"""Meta-gradients of windows, against autograd, slow loops and each other, in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import perturb_in_all_directions
from torch import nn

from experiment.seeds import seeded_generator
from learned_optimizer import (
    EXTRA_INPUTS,
    Optimizee,
    find_symmetries,
    make_network,
    symmetry_penalty,
)
from learned_optimizer.networks import log_and_sign
from learned_optimizer.window_gradients import (
    WindowLoss,
    autograd_gradient,
    inclusion_probabilities,
    persistent_gradient,
    roll_out,
    start,
    strategies_gradient,
    suffix_sum_gradient,
)

NETWORKS = {
    "preprocessed": ("lstm", {"hidden": 4}),
    "raw": ("lstm", {"hidden": 4, "preprocess": False}),
    "extra inputs": ("lstm", {"hidden": 3, "extra_inputs": EXTRA_INPUTS}),
    "mlp": ("mlp", {"hidden": 5, "out_mul": 0.1}),
}


@pytest.fixture
def optimizee():
    return Optimizee(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double())


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        yield x, torch.randint(3, (6,), generator=generator)


def started(network, optimizee, tasks=1):
    theta = [optimizee.flat(optimizee.initial(seeded_generator(k))) for k in range(tasks)]
    return start(network, optimizee, torch.stack(theta), [batches(k) for k in range(tasks)])[0]


def penalty_on(optimizee, kinds, beta, relative=False):
    symmetries = find_symmetries(optimizee, next(batches(0)))
    return symmetry_penalty(optimizee, symmetries, kinds, beta, relative)


def vector(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("penalised", ["no penalty", "penalty", "relative penalty"])
@pytest.mark.parametrize("log", [False, True], ids=["sum", "log"])
@pytest.mark.parametrize("name", NETWORKS)
def test_suffix_sums_are_the_gradient_through_the_unrolled_window(optimizee, name, log, penalised):
    kind, options = NETWORKS[name]
    network = make_network(kind, 0, **options).double()
    penalty = None
    if penalised != "no penalty":
        penalty = penalty_on(optimizee, ("rescale", "translation"), 0.3, "relative" in penalised)
    window_loss = WindowLoss(log, penalty)
    for tasks in (1, 3):
        ends = []
        for method in (suffix_sum_gradient, autograd_gradient):
            first = method(network, optimizee, started(network, optimizee, tasks), 6, window_loss)
            second = method(network, optimizee, first.end, 5, window_loss)  # from a state not 0
            ends.append(second)
        ours, exact = (vector(end.gradient) for end in ends)
        assert (ours - exact).norm() <= 1e-12 * exact.norm()
        torch.testing.assert_close(ends[0].loss, ends[1].loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(ends[0].end.theta, ends[1].end.theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["translation", "scale", "rescale", "norm"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_penalty_on_one_kind_alone_has_the_gradient_of_autograd(kind, relative):
    optimizee = Optimizee(
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(),
            nn.Linear(4, 3),
        ).double()
    )  # fmt: skip
    network = make_network("lstm", 0, hidden=3).double()
    window_loss = WindowLoss(penalty=penalty_on(optimizee, (kind,), 0.3, relative))
    ours, exact = (
        vector(method(network, optimizee, started(network, optimizee), 4, window_loss).gradient)
        for method in (suffix_sum_gradient, autograd_gradient)
    )
    assert (ours - exact).norm() <= 1e-12 * exact.norm()
    strategies_gradient(
        network, optimizee, started(network, optimizee), 2, window_loss,
        sigma=0.01, pairs=1, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_autograd_is_the_gradient_of_an_obvious_loop_over_tensors(optimizee):
    """torch.nn.LSTMCell, each tensor apart, and the parameters as they are in the model."""
    network = make_network("lstm", 2, hidden=4).double()
    cells = [nn.LSTMCell(2, 4).double(), nn.LSTMCell(4, 4).double()]
    for cell, own in zip(cells, network.lstm.all_weights, strict=True):
        cell.load_state_dict(dict(zip(cell.state_dict(), own, strict=True)))
    params = optimizee.initial(seeded_generator(0))
    tensors = [t.requires_grad_() for layer in params for t in layer.values()]
    states = [[(torch.zeros(t.numel(), 4).double(),) * 2] * 2 for t in tensors]
    data, total = batches(0), 0
    loss = optimizee.loss(params, next(data))
    for _ in range(4):
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
        for k, g in enumerate(gradients):
            first = cells[0](log_and_sign(g.flatten()).t(), states[k][0])
            second = cells[1](first[0], states[k][1])
            states[k] = [first, second]
            u = network.output(second[0])[:, 0]
            tensors[k] = tensors[k] + network.out_mul * u.view_as(tensors[k])
        parts = iter(tensors)
        moved = [{n: next(parts) for n in layer} for layer in params]
        loss = optimizee.loss(moved, next(data))
        total = total + loss
    weights = [*cells[0].parameters(), *cells[1].parameters(), *network.output.parameters()]
    expected = vector(torch.autograd.grad(total, weights))
    for method in (suffix_sum_gradient, autograd_gradient):
        trainings = started(network, optimizee)
        ours = vector(method(network, optimizee, trainings, 4, WindowLoss()).gradient)
        assert (ours - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("window_loss", [WindowLoss(), WindowLoss(log=True)], ids=["sum", "log"])
def test_the_gradient_is_that_of_finite_differences_where_no_input_depends_on_the_weights(
    optimizee, window_loss
):
    """One step: its input is given, so that even second-order terms could not matter."""
    network = make_network("lstm", 0, hidden=3).double()
    trainings = started(network, optimizee)
    fixed = [next(batches(9))]

    def loss() -> float:
        window = roll_out(network, optimizee, replaced(trainings, fixed), 1)
        return window_loss.of_losses(window.losses).item()

    found = suffix_sum_gradient(network, optimizee, replaced(trainings, fixed), 1, window_loss)
    for p, g in zip(network.parameters(), found.gradient, strict=True):
        with torch.no_grad():
            p.view(-1)[0] += 1e-5
            above = loss()
            p.view(-1)[0] -= 2e-5
            below = loss()
            p.view(-1)[0] += 1e-5
        assert (above - below) / 2e-5 == pytest.approx(g.flatten()[0].item(), rel=1e-5, abs=1e-10)


def replaced(trainings, data):
    return type(trainings)(trainings.theta, trainings.memory, trainings.gradient, [iter(data)])


def test_a_window_starts_where_the_last_one_ended_and_uses_its_gradient_again(optimizee):
    network = make_network("lstm", 0, hidden=3).double()
    whole = roll_out(network, optimizee, started(network, optimizee, 2), 7)
    first = roll_out(network, optimizee, started(network, optimizee, 2), 3)
    rest = roll_out(network, optimizee, first.end, 4)
    assert torch.equal(whole.losses, torch.cat([first.losses, rest.losses]))
    assert torch.equal(whole.end.theta, rest.end.theta)


def test_sampled_coordinates_leave_the_gradients_mean_where_it_was(optimizee):
    network = make_network("lstm", 0, hidden=3).double()
    exact = vector(
        suffix_sum_gradient(
            network, optimizee, started(network, optimizee), 5, WindowLoss()
        ).gradient
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([
        vector(
            suffix_sum_gradient(
                network, optimizee, started(network, optimizee), 5, WindowLoss(),
                coordinates=12, generator=generator,
            ).gradient
        )
        for _ in range(100)
    ])  # fmt: skip
    error = (drawn.mean(0) - exact).norm()
    assert 0 < error < 4 * drawn.var(0).sum().sqrt() / 100**0.5


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_inclusion_probabilities_add_up_and_are_in_proportion_below_1(norms, expected):
    norms = torch.tensor(norms, dtype=torch.float64)
    likely = inclusion_probabilities(norms, expected)
    positive = int((norms > 0).sum())
    assert likely.min() >= 0 and likely.max() <= 1
    if positive <= expected:
        assert torch.equal(likely, (norms > 0).double())
        return
    assert likely.sum().item() == pytest.approx(expected, rel=1e-9)
    between = (likely > 0) & (likely < 1)
    ratios = (likely / norms)[between & (norms > 1e-300)]
    if len(ratios):
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-6, atol=0)


def test_coordinates_whose_gradient_is_not_finite_are_surely_drawn():
    norms = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.5])
    assert inclusion_probabilities(norms, 2).tolist() == [0, 1, 0, 1, 0]


def smooth():
    return Optimizee(lambda: nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3)).double())


def test_strategies_point_where_the_gradient_does(monkeypatch):
    """Even with detached inputs the two differ by terms of second order, which are small here."""
    network, optimizee = make_network("mlp", 0, hidden=2, out_mul=0.02).double(), smooth()
    pairs = perturb_in_all_directions(monkeypatch, list(network.parameters()))
    options = {"sigma": 0.02, "pairs": pairs, "generator": torch.Generator().manual_seed(1)}
    exact = suffix_sum_gradient(network, optimizee, started(network, optimizee), 4, WindowLoss())
    found = strategies_gradient(
        network, optimizee, started(network, optimizee), 4, WindowLoss(), **options
    )
    assert torch.equal(found.losses, exact.losses)
    assert torch.equal(found.end.theta, exact.end.theta)
    cosine = torch.cosine_similarity(vector(found.gradient), vector(exact.gradient), 0)
    assert cosine > 0.95


def test_the_first_window_of_persistent_strategies_is_that_of_the_others_and_later_ones_go_on(
    optimizee,
):
    network = make_network("mlp", 0, hidden=2).double()
    options = {"sigma": 0.01, "pairs": 2}

    def generators():
        return {**options, "generator": torch.Generator().manual_seed(1)}

    window_loss = WindowLoss(penalty=penalty_on(optimizee, ("rescale",), 0.5))
    plain = strategies_gradient(
        network, optimizee, started(network, optimizee), 3, window_loss, **generators()
    )
    first, pairs = persistent_gradient(
        network, optimizee, started(network, optimizee), 3, window_loss, None, **generators()
    )
    assert torch.equal(vector(plain.gradient), vector(first.gradient))
    assert torch.equal(plain.loss, first.loss)
    second, after = persistent_gradient(
        network, optimizee, first.end, 3, window_loss, pairs, **generators()
    )
    assert not torch.equal(after.above[0][0], second.end.theta)
    for before, summed in zip(pairs.perturbations[0], after.perturbations[0], strict=True):
        assert not torch.equal(before, summed)


def test_the_loss_of_a_penalty_is_the_sum_over_steps_of_its_values(optimizee):
    network = make_network("lstm", 0, hidden=3).double()
    penalty = penalty_on(optimizee, ("rescale",), 2.0)
    window = roll_out(network, optimizee, started(network, optimizee), 4)
    theta, expected = window.start.theta[0], window.losses.sum().item()
    for u in window.u:
        expected += penalty(theta, -network.out_mul * u).item()
        theta = theta + network.out_mul * u
    methods = (
        suffix_sum_gradient,
        autograd_gradient,
        partial(
            strategies_gradient, sigma=0.01, pairs=1, generator=torch.Generator().manual_seed(0)
        ),
    )
    for method in methods:
        found = method(
            network, optimizee, started(network, optimizee), 4, WindowLoss(penalty=penalty)
        )
        assert found.loss.item() == pytest.approx(expected, rel=1e-12)
