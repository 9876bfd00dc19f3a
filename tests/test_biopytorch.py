"""BioPyTorch's training of a layer and its padding; what its layers have beside a step."""

import math
from types import SimpleNamespace

import optuna
import pytest
import torch
from torch import nn

from krotov_hopfield import (
    BioConv2d,
    BioLinear,
    CompetitionError,
    bio_train,
    same_padding,
)


def loader(batches: int = 5, shape: tuple[int, ...] = (6,)):
    """Data whose every pass is the same batches."""
    x = torch.randn(batches, 8, *shape, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(train_dataloader=lambda: [(part, None) for part in x])


def new_layer(**options) -> BioLinear:
    torch.manual_seed(0)
    layer = BioLinear(6, 5, delta=0.2, **options)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    return layer


def steps(layer: BioLinear, data, rates) -> float:
    """The obvious training: a step for each rate."""
    parts = [x for x, _ in data.train_dataloader()]
    for number, rate in enumerate(rates):
        reached = layer.training_step(parts[number % len(parts)], rate)
    return float(reached)


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        (0.02, lambda i: 0.02),
        (None, lambda i: 0.003 + 0.007 * math.exp(-i / 5)),
        ((0.1, 0.005, 0.3), lambda i: 0.005 + 0.095 * math.exp(-0.3 * i / 5)),
        (lambda i: 0.1 / (1 + i), lambda i: 0.1 / (1 + i)),
    ],
    ids=["number", "default", "tuple", "function"],
)
def test_a_layer_makes_the_steps_of_its_schedule(schedule, rate):
    ours, plain, seen = new_layer(), new_layer(), []
    reached = bio_train(
        ours, loader(), n_epochs=3, patience=math.inf, lr_scheduler=schedule,
        epoch_callback=seen.append,
    )  # fmt: skip
    assert reached == steps(plain, loader(), map(rate, range(15)))
    assert torch.equal(ours.weight, plain.weight) and len(seen) == 3


def test_layers_before_it_make_its_inputs_and_stay_as_they_are():
    before = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).requires_grad_(False)
    kept, ours, plain = before[0].weight.clone(), new_layer(), new_layer()
    bio_train(ours, loader(shape=(4,)), before, n_batches=7, lr_scheduler=0.02)
    parts = [before(x) for x, _ in loader(shape=(4,)).train_dataloader()]
    for number in range(7):
        plain.training_step(parts[number % 5], 0.02)
    assert torch.equal(ours.weight, plain.weight) and torch.equal(before[0].weight, kept)


def test_training_ends_with_patience_or_at_rest():
    told = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers["convergence"])))
    data = loader()
    bio_train(new_layer(), data, n_epochs=-1, patience=1.0, lr_scheduler=0.05, run=run)
    values = [value for _, value in told]
    assert [step for step, _ in told] == [*range(len(values))] and len(values) % 5 == 0
    assert all(value > min(values[:-5]) for value in values[-5:])
    assert bio_train(new_layer(), data, convergence_threshold=1e9, run=run) == told[-1][1]
    assert len(told) == len(values) + 5  # one epoch


def test_a_trial_is_told_and_may_end_it():
    trial = SimpleNamespace(report=lambda value, step: None, should_prune=lambda: True)
    with pytest.raises(optuna.TrialPruned):
        bio_train(new_layer(), loader(), trial=trial)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("size", [(6, 6), (6, 8), (10, 4), (5, 3), (7, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (1, 3), (4, 2)])
def test_same_padding_keeps_the_size_and_is_torchs(size, dilation):
    x = torch.randn(1, 2, 32, 27)
    weight, padding = torch.randn(3, 2, *size), same_padding(size, dilation)
    if len(padding) == 2:
        y = nn.functional.conv2d(x, weight, dilation=dilation, padding=padding)
    else:
        y = nn.functional.conv2d(nn.functional.pad(x, padding), weight, dilation=dilation)
    expected = nn.functional.conv2d(x, weight, dilation=dilation, padding="same")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "bias", "conv"])
def test_delta_weights_is_what_a_step_adds_at_a_rate_of_1(kind):
    if kind == "conv":
        layer = BioConv2d(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64)
    else:
        layer = BioLinear(6, 5, kind == "bias", dtype=torch.float64)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(7, 4, 8, 8) if kind == "conv" else torch.randn(7, 6)
    x = x.double()
    over = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    z, weight = (x - mean) / (variance + 1e-5).sqrt(), layer.weight.clone()
    if kind == "bias":
        z = torch.cat([z, torch.ones(7, 1, dtype=z.dtype)], 1)
        weight = torch.cat([weight, layer.bias[:, None]], 1)
    before, change = weight.clone(), layer.delta_weights(z, weight)
    layer.training_step(x, 1.0)
    after = layer.weight if layer.bias is None else torch.cat(
        [layer.weight, layer.bias[:, None]], 1
    )  # fmt: skip
    torch.testing.assert_close(after, before + change, rtol=1e-9, atol=1e-12)
    assert torch.equal(weight, before)


def test_delta_and_k_may_be_set_and_are_checked_as_at_the_beginning():
    layer, other = new_layer(), new_layer(ranking_param=3)
    layer.delta, layer.ranking_param, other.delta = 0.4, 3, 0.4
    x = torch.randn(8, 6)
    layer.training_step(x, 0.1), other.training_step(x, 0.1)
    assert torch.equal(layer.weight, other.weight) and "delta=0.4" in repr(layer)
    for name, value in (("ranking_param", 6), ("ranking_param", 1), ("delta", math.nan)):
        with pytest.raises(CompetitionError):
            setattr(layer, name, value)
    assert (layer.delta, layer.ranking_param) == (0.4, 3)
