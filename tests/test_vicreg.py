"""The loss against loops over its formula, training against torch's own modules, and resumption."""

import copy
import io
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DOUBLE, assert_near, normal
from torch import Tensor, nn
from traced import TracedRecording

from comparison.settings import VICRegSettings
from comparison.vicreg import EPSILON, TERMS, VICReg, uniform_parameters, vicreg_loss
from data_sets.image_data import DataError, ImageData
from experiment.choices import DEVICE
from experiment.errors import NonFiniteError
from experiment.seeds import seeded_generator
from kernels.recorded_updates import CalledRecording
from mnist_datasets import pair_batches
from models_fully_local import Activation, lateral_mlp

SMALL = VICRegSettings(batch_size=8)
WEIGHTS = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}


def images(count: int = 40, size: int = 6) -> ImageData:
    """Random images with arbitrary labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, size, size), generator=generator)
    return ImageData(pixels.to(torch.uint8), torch.arange(count) % 10, "random")


def network(*sizes: int) -> nn.Module:
    return lateral_mlp(36, sizes, Activation("sigmoid"), inhibition="none")


def two_epochs(seed: int = 0) -> VICReg:
    training = VICReg(network(5, 3), images(), seed, SMALL)
    for _ in range(2):
        training.train_epoch()
    return training


def leaves(training: VICReg) -> list[Tensor]:
    return [tensor for layer in training.params for tensor in layer.values()]


def unweighted_terms(z1: Tensor, z2: Tensor, hinge: float) -> dict[str, float]:
    """The three terms, one number after the other."""
    terms = dict.fromkeys(TERMS, 0.0)
    count, features = z1.shape
    for b, i in itertools.product(range(count), range(features)):
        terms["invariance"] += float(z1[b, i] - z2[b, i]) ** 2 / (count * features)
    for z in (z1.tolist(), z2.tolist()):
        means = [sum(row[i] for row in z) / count for i in range(features)]
        for i, j in itertools.product(range(features), repeat=2):
            products = ((row[i] - means[i]) * (row[j] - means[j]) for row in z)
            cov = sum(products) / (count - 1)
            if i == j:
                terms["variance"] += max(0.0, hinge - math.sqrt(cov + EPSILON)) / features
            else:
                terms["covariance"] += cov**2 / features
    return terms


# ---- the loss ----


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(2, 9),
    features=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 0.05, 0.5]),
    hinge=st.sampled_from([0.05, 0.1, 1.0]),
)
def test_loss_and_terms_are_those_of_the_formula_written_as_loops(count, features, scale, hinge):
    z1, z2 = (normal(seed, count, features, scale=scale) for seed in (1, 2))
    expected = unweighted_terms(z1.detach(), z2.detach(), hinge)
    loss, terms = vicreg_loss(z1, z2, **WEIGHTS, hinge=hinge)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert loss.item() == pytest.approx(sum(WEIGHTS[name] * expected[name] for name in TERMS))
    assert not any(term.requires_grad for term in terms.values())


def test_the_defaults_are_250_25_1000_and_a_hinge_at_a_tenth():
    z1, z2 = (normal(seed, 20, 4, scale=0.1) for seed in (1, 2))
    terms = unweighted_terms(z1.detach(), z2.detach(), 0.1)
    expected = 250 * terms["invariance"] + 25 * terms["variance"] + 1000 * terms["covariance"]
    assert vicreg_loss(z1, z2)[0].item() == pytest.approx(expected)


def test_the_gradient_is_that_of_finite_differences():
    scales = torch.tensor([0.02, 0.09, 0.3], dtype=DOUBLE)  # below and above the hinge
    views = [(normal(seed, 7, 3).detach() * scales).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(lambda *z: vicreg_loss(*z)[0], views)


def test_the_loss_is_unchanged_when_views_swap_images_permute_and_features_shift():
    z1, z2 = (normal(seed, 12, 4, scale=0.1) for seed in (1, 2))
    order, shift = torch.randperm(12, generator=seeded_generator(0)), normal(3, 4)
    loss, _ = vicreg_loss(z1, z2)
    for same in ((z2, z1), (z1[order], z2[order]), (z1 + shift, z2 + shift)):
        assert_near(vicreg_loss(*same)[0], loss)


def test_equal_views_cost_no_invariance_and_uncorrelated_features_no_covariance():
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    loss, terms = vicreg_loss(z, z)
    assert loss == 0 and all(term == 0 for term in terms.values())
    correlated = torch.stack([z[:, 0], z[:, 0] + z[:, 1]], 1)
    assert vicreg_loss(correlated, correlated)[1]["covariance"] > 0


@pytest.mark.parametrize(("deviation", "cost"), [(0.0, 0.09), (0.05, 0.0490098), (0.2, 0.0)])
def test_a_feature_costs_what_its_standard_deviation_lacks_to_the_hinge(deviation, cost):
    z = torch.tensor([[-1.0], [1.0]], dtype=DOUBLE) * deviation / math.sqrt(2)
    assert vicreg_loss(z, z)[1]["variance"].item() == pytest.approx(2 * cost, rel=1e-6)


def test_the_gradient_is_finite_where_all_features_are_constant():
    z = torch.full((6, 3), 0.5, requires_grad=True)
    vicreg_loss(z, z)[0].backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((1, 3),) * 2, ((4,),) * 2])
def test_other_shapes_are_refused_with_what_was_received_and_expected(shapes):
    with pytest.raises(ValueError, match=r"expected the same \[B, D\] twice"):
        vicreg_loss(*(torch.zeros(shape) for shape in shapes))


# ---- training ----


def test_initial_parameters_are_distributed_as_those_of_torch_linear():
    _, first, second = uniform_parameters(network(400, 200), seeded_generator(0))
    for fan_in, layer in ((36, first), (400, second)):
        bound = 1 / math.sqrt(fan_in)
        for values in (layer["w"], layer["b"]):
            quantiles = values.flatten().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE))
            assert_near(quantiles / bound, torch.tensor([-0.5, 0, 0.5], dtype=DOUBLE), 0.25)
            assert 0.95 * bound < values.abs().max() <= bound


def test_training_is_that_of_torch_modules_with_adamw_on_the_same_pairs():
    training = VICReg(network(5, 3), images(), 4, replace(SMALL, weight_decay=0.1), dtype=DOUBLE)
    modules = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sigmoid()
    )
    modules = modules.to(DOUBLE)
    with torch.no_grad():
        for parameter, start in zip(modules.parameters(), leaves(training), strict=True):
            parameter.copy_(start)
    optimizer = torch.optim.AdamW(modules.parameters(), 1e-3, weight_decay=0.1)
    for epoch in range(2):
        row, losses = training.train_epoch(), []
        pairs = pair_batches(images(), 8, seeded_generator(4, epoch, 1), DOUBLE)
        for x1, x2 in itertools.islice(pairs, 5):
            loss, _ = vicreg_loss(modules(x1), modules(x2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert row["loss"] == pytest.approx(sum(losses) / 5)
    for parameter, trained in zip(modules.parameters(), leaves(training), strict=True):
        assert_near(trained, parameter)


def test_a_resumed_run_goes_on_bit_for_bit():
    whole, buffer = two_epochs(), io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    buffer.seek(0)
    resumed = VICReg(network(5, 3), images(), settings=SMALL)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.epoch == 2
    rows = [training.train_epoch() | {"seconds": 0} for training in (whole, resumed)]
    assert rows[0] == rows[1]
    assert all(torch.equal(*pair) for pair in zip(leaves(whole), leaves(resumed), strict=True))


def test_training_on_leaves_a_state_that_was_loaded_as_it_was():
    state = copy.deepcopy(two_epochs().state_dict())
    numbers = []
    for _ in range(2):
        training = VICReg(network(5, 3), images(), settings=SMALL)
        training.load_state_dict(state)
        numbers.append(training.train_epoch()["loss"])
    assert numbers[0] == numbers[1]


def test_another_seed_gives_other_starts_and_other_pairs():
    starts = [leaves(VICReg(network(3), images(), seed, SMALL))[0] for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert not torch.equal(leaves(two_epochs(0))[0], leaves(two_epochs(1))[0])


def test_a_loss_that_is_not_finite_is_reported_with_its_epoch_before_a_step_on_it():
    training = two_epochs()
    training.loss = lambda z1, z2: (math.nan * z1.sum(), {})
    before = [tensor.clone() for tensor in leaves(training)]
    with pytest.raises(NonFiniteError, match="epoch 3, loss nan"):
        training.train_epoch()
    assert all(torch.equal(*pair) for pair in zip(before, leaves(training), strict=True))


def test_a_gradient_that_is_not_finite_is_reported_though_the_loss_is_finite():
    training = two_epochs()
    training.loss = lambda z1, z2: ((z1 - z1.detach()).abs().sum().sqrt(), {})
    with pytest.raises(NonFiniteError, match="epoch 3, loss 0 with a gradient of norm nan"):
        training.train_epoch()


@pytest.mark.parametrize("batch_size", [1, 41])
def test_a_batch_size_that_the_data_do_not_allow_is_refused(batch_size):
    with pytest.raises(DataError, match="from 2, for a variance, to 40"):
        VICReg(network(3), images(), settings=replace(SMALL, batch_size=batch_size))


def test_training_lowers_the_loss():
    training = VICReg(network(8), images(), settings=replace(SMALL, batch_size=20, lr=0.03))
    losses = [training.train_epoch()["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ---- replayed steps ----


def replayed(plain: VICReg, record=CalledRecording) -> VICReg:
    """Another training in the same state, whose steps are recorded."""
    training = VICReg(plain.model, plain.data, plain.seed, SMALL, dtype=leaves(plain)[0].dtype)
    training.load_state_dict(copy.deepcopy(plain.state_dict()))
    training.record = record
    return training


@pytest.mark.parametrize("record", [CalledRecording, TracedRecording])
@pytest.mark.parametrize("epochs", [0, 1])
def test_replayed_steps_are_those_one_by_one(epochs, record):
    plain = VICReg(network(5, 3), images(90), 4, SMALL, dtype=DOUBLE)  # 11 steps: ten, and one
    for _ in range(epochs):
        plain.train_epoch()
    other = replayed(plain, record)
    for _ in range(2):
        rows = [training.train_epoch() for training in (plain, other)]
        assert rows[0] | {"seconds": 0} == pytest.approx(rows[1] | {"seconds": 0}, rel=1e-12)
    for one, two in zip(leaves(plain), leaves(other), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-15)
        for name, value in plain.optimizer.state[one].items():
            assert_near(other.optimizer.state[two][name], value, 1e-12)


def test_replayed_steps_make_their_views_by_counted_numbers():
    trainings = [
        VICReg(network(5, 3), images(90), 4, SMALL, dtype=DOUBLE, random_numbers=DEVICE)
        for _ in range(2)
    ]
    trainings[1].record = CalledRecording
    for _ in range(2):
        rows = [training.train_epoch() | {"seconds": 0} for training in trainings]
        assert rows[0] == pytest.approx(rows[1], rel=1e-12)
    for one, two in zip(*map(leaves, trainings), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-15)


def test_two_recordings_serve_every_epoch():
    made = []

    def record(function, examples):
        made.append(function)
        return CalledRecording(function, examples)

    training = replayed(VICReg(network(5, 3), images(90), 4, SMALL), record)
    for _ in range(3):
        training.train_epoch()
    assert len(made) == 2


def test_a_resumed_run_of_replayed_steps_goes_on_bit_for_bit():
    whole = replayed(VICReg(network(5, 3), images(), 0, SMALL))
    whole.train_epoch()
    resumed = replayed(whole)
    for training in (whole, resumed):
        training.train_epoch()
    assert all(torch.equal(*pair) for pair in zip(leaves(whole), leaves(resumed), strict=True))


def test_parameters_stay_as_they_were_before_a_replayed_step_that_is_not_finite():
    plain = VICReg(network(5, 3), images(), 4, SMALL, dtype=DOUBLE)
    loss = plain.loss

    def spoilt(z1, z2):
        """Not finite for the fourth pair of the epoch."""
        value, terms = loss(z1, z2)
        return value * torch.where((z1.detach() - third).abs().sum() < 1e-9, math.nan, 1), terms

    pairs = pair_batches(images(), 8, seeded_generator(4, 0, 1), DOUBLE)
    before = replayed(plain)
    for number, pair in enumerate(itertools.islice(pairs, 4)):
        if number == 3:
            third = before.model(pair[0], before.params).detach()
        else:
            before._step(*pair)
    trainings = [plain, replayed(plain)]
    for training in trainings:
        training.loss = spoilt
        with pytest.raises(NonFiniteError, match="epoch 1, loss nan with a gradient of norm nan"):
            training.train_epoch()
        assert training.epoch == 0
        for one, other in zip(leaves(before), leaves(training), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
