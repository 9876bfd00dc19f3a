"""Evolution strategies: their means on problems in closed form, persistence, reproducibility."""

import pytest
import torch
from oracles import DOUBLE, assert_near, normal, perturb_in_all_directions

from hypergradients import (
    HypergradientError,
    Pairs,
    checkpointed_reverse,
    evolution_strategies,
    persistent_evolution_strategies,
)


def step(params, hparams):
    """A leaky sum of the hyperparameters; what they do lasts for many steps."""
    w, (a, b) = params["w"], hparams
    return {"w": 0.95 * w + 0.1 * a * w.cos() + b}


def loss(params, hparams):
    return params["w"].square().sum() + hparams[1].sum()


def problem():
    start = {"w": normal(1, 3).detach()}
    hparams = [torch.tensor(0.5, dtype=DOUBLE, requires_grad=True), normal(2, 3, scale=0.3)]
    return start, hparams


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(gradient):
    return torch.cat([g.reshape(-1) for g in gradient])


def test_antithetic_evolution_strategies_estimate_the_hypergradient(monkeypatch):
    start, hparams = problem()
    pairs = perturb_in_all_directions(monkeypatch, hparams)
    expected = flat(checkpointed_reverse(start, hparams, [step] * 5, loss, set_grad=False))
    found = flat(evolution_strategies(start, hparams, [step] * 5, loss, 1e-4, pairs, seeded()))
    assert_near(found, expected, 1e-6)
    assert torch.equal(flat([h.grad for h in hparams]), found)


def test_a_single_pair_is_the_difference_along_its_perturbation():
    start, hparams = problem()
    found = flat(evolution_strategies(start, hparams, [step] * 3, loss, 0.1, 1, seeded(7)))
    generator = seeded(7)
    noise = [0.1 * torch.randn(h.shape, generator=generator, dtype=DOUBLE) for h in hparams]
    losses = []
    for sign in (1, -1):
        moved = [h.detach() + sign * n for h, n in zip(hparams, noise, strict=True)]
        params = start
        for _ in range(3):
            params = step(params, moved)
        losses.append(loss(params, moved))
    expected = flat(noise) * (losses[0] - losses[1]) / (2 * 0.1**2)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_persistent_strategies_see_what_truncated_ones_do_not(monkeypatch):
    start, hparams = problem()
    unrolls, length = 6, 2
    pairs = perturb_in_all_directions(monkeypatch, hparams, unrolls)
    total = torch.zeros(4, dtype=DOUBLE)
    for k in range(1, unrolls + 1):
        maps = [step] * (k * length)
        total += flat(checkpointed_reverse(start, hparams, maps, loss, set_grad=False))
    state, found, generator = Pairs.start(start, hparams, pairs), 0, seeded()
    truncated, params = 0, start
    for _ in range(unrolls):
        gradient, state = persistent_evolution_strategies(
            state, hparams, [step] * length, loss, 1e-4, generator, set_grad=False
        )
        found = found + flat(gradient)
        args = (hparams, [step] * length, loss)
        truncated = truncated + flat(checkpointed_reverse(params, *args, set_grad=False))
        for _ in range(length):
            params = {"w": step(params, hparams)["w"].detach()}
    error = (found - total).norm() / total.norm()
    assert error < 1e-5 and (truncated - total).norm() / total.norm() > 0.3
    assert all(h.grad is None for h in hparams)


def test_maps_without_derivatives_will_do():
    def rounded(params, hparams):
        return {"w": torch.round(params["w"].detach() * 8 + 8 * hparams[1].detach()) / 8}

    start, hparams = problem()
    found = evolution_strategies(start, hparams, [rounded] * 4, loss, 0.5, 400, seeded())
    assert 0.5 < found[1].norm() / (2 * 4 * (start["w"] + 4 * hparams[1]).norm()).detach() < 1.5


def test_the_same_seed_gives_the_same_bits_and_nothing_is_changed():
    start, hparams = problem()
    before = start["w"].clone()
    arguments = start, hparams, [step] * 3, loss, 0.1, 5
    runs = [flat(evolution_strategies(*arguments, seeded(s), set_grad=False)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(start["w"], before)
    state = Pairs.start(start, hparams, 2)
    persistent_evolution_strategies(state, hparams, [step], loss, 0.1, seeded())
    assert all(n.abs().max() == 0 for pair in state.perturbations for n in pair)


def test_wrong_use_gets_one_line():
    start, hparams = problem()
    with pytest.raises(HypergradientError, match="pairs must be at least 1, got 0"):
        evolution_strategies(start, hparams, [step], loss, 0.1, 0, seeded())
    for sigma in (0.0, float("inf"), 1e-300, 1.001e30):
        with pytest.raises(HypergradientError, match=r"sigma must be from 1e-30 to 1e\+30, got"):
            evolution_strategies(start, hparams, [step], loss, sigma, 2, seeded())
    for sigma in (1e-30, 1e30):  # the limits themselves are taken
        evolution_strategies(start, hparams, [step], loss, sigma, 2, seeded())
    with pytest.raises(HypergradientError, match="update_maps must not be empty"):
        evolution_strategies(start, hparams, [], loss, 0.1, 2, seeded())
    with pytest.raises(HypergradientError, match="requires_grad"):
        evolution_strategies(start, [h.detach() for h in hparams], [step], loss, 0.1, 2, seeded())


def test_a_pair_sees_the_same_random_numbers_and_leaves_no_traces():
    norm = torch.nn.BatchNorm1d(3, affine=False).double()

    def noisy(params, hparams):
        noise = torch.randn(50, 3, dtype=DOUBLE)
        return {"w": params["w"] + hparams[0] + norm(noise).square().mean(0) + noise.mean(0)}

    def outer_loss(params, hparams):
        return params["w"].sum()

    h = [torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)]
    arguments = {"w": torch.zeros(3, dtype=DOUBLE)}, h, [noisy] * 4, outer_loss, 1e-3, 3
    found = evolution_strategies(*arguments, seeded(), set_grad=False)[0]
    without = (arguments[0], h, [lambda p, h: {"w": p["w"] + h[0]}] * 4, *arguments[3:])
    expected = evolution_strategies(*without, seeded(), set_grad=False)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-8)
    assert int(norm.num_batches_tracked) == 0
