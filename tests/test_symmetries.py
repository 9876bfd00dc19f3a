"""Symmetries: gradients obey the identities to roundoff, controls and other optimisers do not."""

import math

import pytest
import torch
from torch import nn
from torch.func import jvp

from optimizees import Optimizee, image_optimizee
from optimizer_comparison import Lion
from seeds import seeded_generator
from symmetries import (
    covariance_size,
    find_symmetries,
    mean_deviations,
    symmetry_penalty,
    tail_index,
)

EPS = 1e-12


def drawn(optimizee, seed=0, classes=10, shape=(1, 8, 8)):
    """Parameters far from their start and a batch, in float64."""
    generator = seeded_generator(seed)
    params = optimizee.initial(generator, torch.float64)
    for layer in params:
        for name, tensor in layer.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            layer[name] = tensor + 0.3 * noise
    x = torch.randn(24, *shape, generator=generator, dtype=torch.float64)
    return params, (x, torch.randint(classes, (24,), generator=generator))


def gradient_of(optimizee, params, batch):
    return optimizee.unflat(optimizee.gradients(optimizee.flat(params)[None], [batch])[1][0])


def largest(optimizee, v, params, kind, controls=False) -> float:
    return max(
        s.relative(v, params).abs().max().item()
        for s in find_symmetries(optimizee, controls)
        if s.kind == kind
    )


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("relu6", {"rescale": ["1-3"], "translation": ["3.weight", "3.bias"]}),
        ("leaky_relu6-5-4", {"rescale": ["1-3", "3-5", "5-7"]}),
        ("linear6", {"rescale": ["1-3"]}),
        ("relu6bn", {"scale": ["1"], "rescale": ["2-4"]}),
        ("sigmoid6bn", {"scale": ["1"]}),
        ("conv3-4", {"rescale": ["0-3", "3-7"]}),
        ("conv3-4bn", {"scale": ["0", "4"], "rescale": ["1-4", "5-9"]}),
        ("sigmoid6", {"translation": ["3.weight", "3.bias"]}),
        ("softplus6-5", {}),
    ],
)
def test_gradients_obey_every_symmetry_that_the_structure_has(name, places):
    optimizee = image_optimizee(name, (1, 8, 8), 10, EPS)
    found = {}
    for symmetry in find_symmetries(optimizee):
        found.setdefault(symmetry.kind, []).append(symmetry.place)
    last = len(optimizee.layers) - 1
    expected = {"translation": [f"{last}.weight", f"{last}.bias"], **places}
    assert found == expected
    params, batch = drawn(optimizee)
    v = gradient_of(optimizee, params, batch)
    for kind in found:
        assert largest(optimizee, v, params, kind) < (1e-9 if kind == "scale" else 1e-14)


@pytest.mark.parametrize("name", ["relu6-5", "relu6bn", "conv3-4", "conv3bn"])
def test_the_direction_of_each_unit_leaves_the_loss_as_it_is(name):
    """The identity from the other side: the loss along xi, by forward differentiation."""
    optimizee = image_optimizee(name, (1, 8, 8), 10, EPS)
    params, batch = drawn(optimizee)
    theta = optimizee.flat(params)
    for symmetry in find_symmetries(optimizee):
        # d<v, xi>/dv is xi: of unit 0, and of all units at once
        def along(v, symmetry=symmetry):
            return symmetry.deviations(optimizee.unflat(v), params)[0]

        xi = torch.func.grad(along)(torch.zeros_like(theta))
        assert xi.norm() > 0
        _, slope = jvp(lambda t: optimizee.loss(optimizee.unflat(t), batch), (theta,), (xi,))
        assert abs(slope) < 1e-11 * xi.norm()


def test_batch_norms_eps_breaks_its_symmetry_in_proportion():
    sizes = []
    for eps in (1e-3, 1e-5):
        optimizee = image_optimizee("relu6bn", (1, 8, 8), 10, eps)
        params, batch = drawn(optimizee)
        v = gradient_of(optimizee, params, batch)
        sizes.append(largest(optimizee, v, params, "scale"))
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("name", ["sigmoid6", "softplus6", "tanh6-5"])
def test_a_sigmoid_has_no_rescale_symmetry(name):
    optimizee = image_optimizee(name, (1, 8, 8))
    params, batch = drawn(optimizee)
    v = gradient_of(optimizee, params, batch)
    assert not any(s.kind == "rescale" for s in find_symmetries(optimizee))
    assert largest(optimizee, v, params, "rescale", controls=True) > 1e-2


def updates_of(optimizer_of, name="relu6bn", steps=4):
    """Relative deviations of the last of a few updates."""
    optimizee = image_optimizee(name, (1, 8, 8), 10, EPS)
    params, batch = drawn(optimizee)
    leaves = [t.requires_grad_() for layer in params for t in layer.values()]
    optimizer = optimizer_of(leaves)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizee.loss(params, batch).backward()
        before = [{n: t.detach().clone() for n, t in layer.items()} for layer in params]
        optimizer.step()
    update = [
        {n: t - after[n].detach() for n, t in layer.items()}
        for layer, after in zip(before, params, strict=True)
    ]
    return mean_deviations(find_symmetries(optimizee), update, before)


def test_sgd_keeps_all_sgd_with_momentum_only_translation_adam_and_lion_none():
    plain = updates_of(lambda leaves: torch.optim.SGD(leaves, 0.01))
    momentum = updates_of(lambda leaves: torch.optim.SGD(leaves, 0.01, momentum=0.9))
    adam = updates_of(lambda leaves: torch.optim.Adam(leaves, 0.01))
    lion = updates_of(lambda leaves: Lion(leaves, 0.01))
    assert max(plain.values()) < 1e-9
    assert momentum["translation"] < 1e-13
    assert min(momentum["scale"], momentum["rescale"]) > 1e-5
    for broken in (adam, lion):
        assert min(broken.values()) > 1e-3


def test_units_deviations_do_not_cancel_in_the_mean():
    optimizee = image_optimizee("relu2", (1, 2, 2), 3)
    params, _ = drawn(optimizee, classes=3)
    (rescale,) = [s for s in find_symmetries(optimizee) if s.kind == "rescale"]
    v = [{n: torch.zeros_like(t) for n, t in layer.items()} for layer in params]
    v[1]["weight"][0] = params[1]["weight"][0]
    v[1]["weight"][1] = -params[1]["weight"][1]
    sizes = params[1]["weight"].square().sum(1)
    torch.testing.assert_close(rescale.deviations(v, params), sizes * torch.tensor([1.0, -1.0]))
    found = mean_deviations([rescale], v, params, relative=False)
    assert found["rescale"] == pytest.approx(sizes.mean().item())


def test_a_layer_without_bias_and_unknown_layers_are_understood():
    optimizee = Optimizee(
        lambda: nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(),
            nn.Linear(4, 3), nn.LogSoftmax(1),
        )
    )  # fmt: skip
    places = [(s.kind, s.place) for s in find_symmetries(optimizee)]
    assert places == [("rescale", "0-2")]
    params, batch = drawn(optimizee, classes=3, shape=(6,))
    v = gradient_of(optimizee, params, batch)
    assert largest(optimizee, v, params, "rescale") < 1e-14


def test_relative_deviations_are_cosines_and_0_for_no_update():
    optimizee = image_optimizee("relu6", (1, 8, 8))
    params, _ = drawn(optimizee)
    still = [{n: torch.zeros_like(t) for n, t in layer.items()} for layer in params]
    for symmetry in find_symmetries(optimizee):
        assert torch.equal(symmetry.relative(still, params), symmetry.deviations(still, params))
        assert symmetry.relative(params, params).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("relative", [False, True])
def test_the_penalty_is_beta_times_the_sum_over_units(relative):
    optimizee = image_optimizee("relu6bn", (1, 8, 8))
    theta, v = torch.randn(2, sum(optimizee.sizes()), generator=seeded_generator(0))
    expected = 0.0
    for symmetry in find_symmetries(optimizee):
        if symmetry.kind in ("scale", "rescale"):
            of = symmetry.relative if relative else symmetry.deviations
            expected += of(optimizee.unflat(v), optimizee.unflat(theta)).abs().sum().item()
    found = symmetry_penalty(optimizee, ("scale", "rescale"), 0.5, relative)(theta, v)
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_the_tail_index_is_2_for_normal_and_1_for_cauchys_samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, 300, generator=generator)
    cauchy = torch.empty(1000, 300).cauchy_(generator=generator)
    for block in (2, 5, 10):
        assert tail_index(normal, block) == pytest.approx(2, abs=0.03)
        assert tail_index(cauchy, block) == pytest.approx(1, abs=0.03)
    assert math.isnan(tail_index(torch.zeros(10, 3), 2))
    with pytest.raises(ValueError, match="blocks of 20"):
        tail_index(normal[:10], 20)


def test_the_covariances_size_is_that_of_numpys_matrix():
    samples = torch.randn(20, 7, generator=seeded_generator(0)).double()
    matrix = samples.T.cov()
    trace, largest_value = covariance_size(samples)
    assert trace == pytest.approx(matrix.trace().item())
    assert largest_value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item())
