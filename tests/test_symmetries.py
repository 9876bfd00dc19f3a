"""Symmetries: gradients obey the identities to roundoff, controls and other optimisers do not."""

import math

import pytest
import torch
from torch import nn
from torch.func import jvp

from comparison.optimizer_comparison import Lion
from experiment.seeds import seeded_generator
from learned_optimizer import (
    Optimizee,
    OptimizerError,
    covariance_size,
    find_symmetries,
    image_optimizee,
    mean_deviations,
    never_zero,
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


def largest(symmetries, v, params, kind) -> float:
    return max(s.relative(v, params).abs().max().item() for s in symmetries if s.kind == kind)


def found_in(optimizee, classes=10, shape=(1, 8, 8), controls=False) -> dict[str, list[str]]:
    """The places of each label."""
    places = {}
    for symmetry in find_symmetries(optimizee, drawn(optimizee, 1, classes, shape)[1], controls):
        places.setdefault(symmetry.label, []).append(symmetry.place)
    return places


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
    last = len(optimizee.layers) - 1
    expected = {"translation": [f"{last}.weight", f"{last}.bias"], **places}
    assert found_in(optimizee) == expected
    params, batch = drawn(optimizee)
    v, symmetries = gradient_of(optimizee, params, batch), find_symmetries(optimizee, batch)
    for kind in expected:
        assert largest(symmetries, v, params, kind) < (1e-9 if kind == "scale" else 1e-14)


@pytest.mark.parametrize("name", ["relu6-5", "relu6bn", "conv3-4", "conv3bn"])
def test_the_direction_of_each_unit_leaves_the_loss_as_it_is(name):
    """The identity from the other side: the loss along xi, by forward differentiation."""
    optimizee = image_optimizee(name, (1, 8, 8), 10, EPS)
    params, batch = drawn(optimizee)
    theta = optimizee.flat(params)
    for symmetry in find_symmetries(optimizee, batch):
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
        sizes.append(largest(find_symmetries(optimizee, batch), v, params, "scale"))
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("name", ["sigmoid6", "softplus6", "tanh6-5"])
def test_a_sigmoid_has_no_rescale_symmetry(name):
    optimizee = image_optimizee(name, (1, 8, 8))
    params, batch = drawn(optimizee)
    v = gradient_of(optimizee, params, batch)
    assert not any(s.kind == "rescale" for s in find_symmetries(optimizee, batch))
    controls = [s for s in find_symmetries(optimizee, batch, controls=True) if s.control]
    assert {s.label for s in controls} == {"rescale_control"}
    assert largest(controls, v, params, "rescale") > 1e-2


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
    return mean_deviations(find_symmetries(optimizee, batch), update, before)


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
    params, batch = drawn(optimizee, classes=3, shape=(1, 2, 2))
    (rescale,) = [s for s in find_symmetries(optimizee, batch) if s.kind == "rescale"]
    v = [{n: torch.zeros_like(t) for n, t in layer.items()} for layer in params]
    v[1]["weight"][0] = params[1]["weight"][0]
    v[1]["weight"][1] = -params[1]["weight"][1]
    sizes = params[1]["weight"].square().sum(1)
    torch.testing.assert_close(rescale.deviations(v, params), sizes * torch.tensor([1.0, -1.0]))
    expected = rescale.relative(v, params).abs().mean().item()
    assert mean_deviations([rescale], v, params)["rescale"] == pytest.approx(expected)
    assert expected > 0.1


def test_a_layer_without_bias_and_unknown_layers_are_understood():
    optimizee = Optimizee(
        lambda: nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(),
            nn.Linear(4, 3), nn.LogSoftmax(1),
        )
    )  # fmt: skip
    expected = {"rescale": ["0-2"], "translation": ["5.weight", "5.bias"]}
    assert found_in(optimizee, 3, (6,)) == expected


class Forward(nn.Module):
    """Layers with what forward does between them."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        self.along = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.along(self, x)


def residual(m, x):
    h = m.a(x)
    return m.c(h + m.b(h.relu()))


def tied(**layers):
    layers["b"].weight = layers["a"].weight
    return Forward(lambda m, x: m.c(m.b(m.a(x).relu())), **layers)


def four(*names):
    return {name: nn.Linear(4, 3 if name == "c" else 4) for name in names}


@pytest.mark.parametrize(
    ("make", "rescale"),
    [
        (lambda: Forward(lambda m, x: m.c(m.a(x).sigmoid()), **four("a", "c")), None),
        (lambda: Forward(lambda m, x: m.c(m.a(x).relu()), **four("a", "c")), ["0-1"]),
        (lambda: Forward(residual, **four("a", "b", "c")), None),
        (lambda: Forward(lambda m, x: m.c(m.s(m.a(x))), **four("a", "c"), s=nn.Sigmoid()), None),
        (lambda: Forward(lambda m, x: m.c(m.a(x).relu()), **four("c", "a")), ["1-0"]),
        (lambda: tied(**four("a", "b", "c")), None),
        (lambda: Forward(lambda m, x: m.c(m.b(m.b(m.a(x)))), **four("a", "b", "c")), None),
    ],
    ids=["function", "relu function", "residual", "late", "other order", "tied", "used twice"],
)  # fmt: skip
def test_only_symmetries_that_hold_are_told_whatever_forward_does(make, rescale):
    torch.manual_seed(0)
    found = found_in(Optimizee(make), 3, (4,))
    assert found.get("rescale") == rescale and len(found["translation"]) == 2


def test_an_activation_that_layers_share_stands_wherever_it_is_used():
    def make(act):
        return Optimizee(
            lambda: nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3))
        )

    assert found_in(make(nn.ReLU()), 3, (4,))["rescale"] == ["0-2", "2-3"]
    found = found_in(make(nn.Sigmoid()), 3, (4,), controls=True)
    assert found["rescale_control"] == ["0-2", "2-3"] and "rescale" not in found


def convolutions(*between):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *between, nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.PReLU(), nn.PReLU(4), nn.Dropout().eval(), nn.AvgPool2d(2)]
)
def test_grouped_convolutions_and_further_homogeneous_layers_keep_the_rescale_symmetry(layer):
    assert found_in(Optimizee(lambda: convolutions(layer)), 3)["rescale"] == ["0-2", "2-6"]


@pytest.mark.parametrize(
    "layer", [nn.CELU(), nn.ReLU6(), nn.Mish(), nn.Hardtanh(), nn.Softsign(), nn.SELU()]
)
def test_further_activations_are_negative_controls(layer):
    found = found_in(Optimizee(lambda: convolutions(layer)), 3, controls=True)
    assert found["rescale_control"] == ["0-2"] and found["rescale"] == ["2-6"]


def test_batch_norm_takes_away_the_scale_of_one_before_it():
    def make():
        return nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)
        )

    assert found_in(Optimizee(make), 3, (4,))["scale"] == ["0", "1"]
    assert "scale" not in found_in(Optimizee(lambda: make().eval()), 3, (4,))


@pytest.mark.parametrize(
    ("last", "loss_of", "translates"),
    [
        (nn.Identity(), nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (nn.LogSoftmax(1), nn.functional.nll_loss, True),
        (nn.Identity(), lambda z, y: (z.sigmoid()[:, 0] - y).square().mean(), False),
    ],
)
def test_logits_are_translated_wherever_a_softmax_follows(last, loss_of, translates):
    optimizee = Optimizee(lambda: nn.Sequential(nn.Linear(4, 3), last), loss_of)
    assert ("translation" in found_in(optimizee, 3, (4,))) == translates


def test_relative_deviations_are_cosines_and_0_for_no_update():
    optimizee = image_optimizee("relu6", (1, 8, 8))
    params, batch = drawn(optimizee)
    still = [{n: torch.zeros_like(t) for n, t in layer.items()} for layer in params]
    for symmetry in find_symmetries(optimizee, batch):
        assert torch.equal(symmetry.relative(still, params), symmetry.deviations(still, params))
        assert symmetry.relative(params, params).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("relative", [False, True])
def test_the_penalty_is_beta_times_the_sum_over_units(relative):
    optimizee = image_optimizee("relu6bn", (1, 8, 8))
    theta, v = torch.randn(2, sum(optimizee.sizes()), generator=seeded_generator(0))
    expected, symmetries = 0.0, find_symmetries(optimizee, drawn(optimizee)[1])
    for symmetry in symmetries:
        if symmetry.kind in ("scale", "rescale"):
            of = symmetry.relative if relative else symmetry.deviations
            expected += of(optimizee.unflat(v), optimizee.unflat(theta)).abs().sum().item()
    found = symmetry_penalty(optimizee, symmetries, ("scale", "rescale"), 0.5, relative)(theta, v)
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_a_penalty_on_a_symmetry_that_is_not_there_is_refused():
    optimizee = image_optimizee("sigmoid6", (1, 8, 8))
    symmetries = find_symmetries(optimizee, drawn(optimizee)[1], controls=True)
    with pytest.raises(OptimizerError, match="no rescale symmetry; it has translation"):
        symmetry_penalty(optimizee, symmetries, ("rescale",), 1.0)
    with pytest.raises(OptimizerError, match="it has none"):
        symmetry_penalty(optimizee, [], ("scale",), 1.0)


def test_the_tail_index_is_2_for_normal_and_1_for_cauchys_samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, 300, generator=generator)
    cauchy = torch.empty(1000, 300).cauchy_(generator=generator)
    for block in (2, 5, 10):
        assert tail_index(normal, block) == pytest.approx(2, abs=0.03)
        assert tail_index(cauchy, block) == pytest.approx(1, abs=0.03)
    sparse = normal * (torch.rand(normal.shape, generator=generator) < 0.5)
    sparse[:, ::2] = normal[:, ::2]  # so that half of the coordinates are 0 in some draws
    assert tail_index(sparse, 5) == tail_index(normal[:, ::2], 5)
    assert never_zero(sparse).double().mean() == 0.5
    assert math.isnan(tail_index(torch.zeros(10, 3), 2))
    with pytest.raises(ValueError, match="blocks of 20"):
        tail_index(normal[:10], 20)


def test_the_covariances_size_is_that_of_numpys_matrix():
    samples = torch.randn(20, 7, generator=seeded_generator(0)).double()
    matrix = samples.T.cov()
    trace, largest_value = covariance_size(samples)
    assert trace == pytest.approx(matrix.trace().item())
    assert largest_value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item())
    samples[3, 2] = math.inf
    assert all(map(math.isnan, covariance_size(samples)))


@pytest.mark.parametrize("relative", [False, True])
def test_a_penalty_on_norms_is_the_sum_over_tensors(relative):
    optimizee = image_optimizee("relu3", (1, 4, 4), 5)
    theta, v = (torch.randn(sum(optimizee.sizes())) for _ in range(2))
    penalty = symmetry_penalty(optimizee, [], ["norm"], 0.3, relative)
    pairs = zip(v.split(optimizee.sizes()), theta.split(optimizee.sizes()), strict=True)
    expected = sum(0.3 * a.norm() / (b.norm() if relative else 1) for a, b in pairs)
    torch.testing.assert_close(penalty(theta, v), expected)
    assert penalty(torch.zeros_like(theta), v).isfinite()
