"""Steps replayed from recordings against steps taken one by one, on the CPU."""

import copy

import pytest
import torch
from counted_recording import Counted
from torch import nn
from traced import TracedRecording

from comparison.one_pass_problems import LanguageModel, TextObjective
from one_pass import (
    Batch,
    FullBatches,
    MLPObjective,
    ModuleObjective,
    OnePassError,
    ReplayedTuning,
    SequentialBatches,
    Settings,
    ShuffledBatches,
    Tuning,
    initial_hyperparameters,
    initial_state,
    objectives,
)

SIZES = (3, 4, 1)
TUNED = ("lr", "weight_decay", "momentum")


def generators(runs, first=0):
    return [torch.Generator().manual_seed(number) for number in range(first, first + runs)]


def parts(rows, seed, size):
    """Samples of a regression: all of them, or shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZES[0], generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return FullBatches(x, y) if size is None else ShuffledBatches(x, y, size, generators(5, seed))


def make(kind, settings, size):
    objective = MLPObjective(SIZES, "mse")
    hyperparameters = initial_hyperparameters(generators(5))
    hyperparameters["lr"].fill_(0.1)
    state = initial_state(*objective.initial(generators(5)), hyperparameters, settings)
    return kind(objective, parts(11, 1, size), parts(9, 2, size), settings, state)


def assert_same(one, other):
    """Two states are equal to the last bit."""
    a, b = (torch.utils._pytree.tree_flatten(vars(tuning.state)) for tuning in (one, other))
    assert str(a[1]) == str(b[1])
    for x, y in zip(a[0], b[0], strict=True):
        same = isinstance(x, torch.Tensor) and torch.allclose(x, y, 0, 0, equal_nan=True)
        assert same or x == y


@pytest.fixture
def counted():
    return Counted.from_zero()


METHODS = [
    Settings("fixed"),
    Settings("look_back", TUNED),
    Settings("look_back", TUNED, ("lr",), every=3, look_back=3, final_lr=0.01, updates=9),
    Settings("look_back", TUNED, every=25, clip_norm=0.1),
    Settings("look_back", TUNED, every=5, recover=True, bounds={"lr": (-2, 3)}, lr=2.0),
    Settings("look_back", TUNED, every=4, reset=True, renew=3, updates=12),
    Settings("unrolled", TUNED, every=6, look_back=4),
    Settings("unrolled", TUNED, every=12, look_back=12, reset=True, updates=4),
    Settings("successive_gradients", ("lr",), every=1, optimizer="sgd", chain_rule=False),
    Settings("stepped_lr", every=4),
    Settings("population", TUNED, every=15),
]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s.method}-{s.every}")
def test_replayed_steps_are_those_taken_one_by_one(settings, size, counted):
    plain, replayed = make(Tuning, settings, size), make(ReplayedTuning, settings, size)
    replayed.calls.record = counted
    length = 12 if settings.method == "unrolled" else 10
    for steps in (60, length, 60):
        plain.advance(steps)
        replayed.advance(steps)
        assert_same(plain, replayed)
    assert counted.made > 0 and counted.calls > 5
    for samples in ("training", "validation"):
        for a, b in zip(*(getattr(t, samples).state_dict().values() for t in (plain, replayed)),
                        strict=True):  # fmt: skip
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("settings", [METHODS[2], METHODS[4], METHODS[6]], ids=lambda s: s.method)
def test_steps_whose_operations_are_frozen_are_those_taken_one_by_one(settings):
    plain, replayed = make(Tuning, settings, 4), make(ReplayedTuning, settings, 4)
    replayed.calls.record = TracedRecording
    for steps in (24, 30):
        plain.advance(steps)
        replayed.advance(steps)
    assert replayed.calls.recordings
    assert_same(plain, replayed)


def test_what_is_recorded_serves_all_steps_but_the_first(counted):
    replayed = make(ReplayedTuning, Settings("look_back", TUNED), 4)
    replayed.calls.record = counted
    replayed.advance(100)
    assert (counted.made, counted.calls) == (1, 8)  # of the first ten, the next ten, eight tens


def test_a_run_that_goes_on_elsewhere_is_one_that_was_never_interrupted(counted):
    settings = Settings("look_back", TUNED, every=5)
    whole, first, second = (make(ReplayedTuning, settings, 4) for _ in range(3))
    for tuning in (whole, first, second):
        tuning.calls.record = counted
    whole.advance(80)
    first.advance(35)
    second.restore(copy.deepcopy(first.state))
    for part in ("training", "validation"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.advance(45)
    assert_same(whole, second)


def test_long_windows_are_taken_one_by_one(counted):
    settings = Settings("unrolled", TUNED, every=201, look_back=1)
    replayed = make(ReplayedTuning, settings, 4)
    replayed.calls.record = counted
    replayed.advance(603)
    assert counted.made == 0


def batch_norm():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def test_gradients_of_a_network_are_replayed(counted):
    found = []
    for record in (None, counted):
        objective = ModuleObjective(batch_norm().double(), "cross_entropy")
        objective.calls.record = record
        settings = Settings("look_back", TUNED, every=3)
        start = initial_hyperparameters(generators(5))
        state = initial_state(*objective.initial(generators(5)), start, settings)
        samples = [
            ShuffledBatches(part.inputs, (part.targets > 0)[:, 0].long(), 4, generators(5))
            for part in (parts(11, 1, None), parts(9, 2, None))
        ]
        found.append(Tuning(objective, *samples, settings, state))
        found[-1].advance(9)
    assert_same(*found)
    assert counted.made == 3  # the gradient, the product with the Hessian, the held-out gradient
    assert counted.calls == 9 + 3 * 4 + 3


def test_windows_of_a_text_are_replayed_in_training_and_evaluation(counted):
    found, text = [], torch.arange(240).view(10, 4, 6) % 13
    for record in (None, counted):
        objective = TextObjective(LanguageModel(13, 5, 4).double(), "cross_entropy")
        objective.calls.record = record
        settings = Settings("look_back", TUNED, every=2, clip_norm=0.25)
        start = initial_hyperparameters(generators(2))
        state = initial_state(*objective.initial(generators(2)), start, settings)
        samples = [SequentialBatches(text, (text + k) % 13) for k in (1, 2)]
        found.append(Tuning(objective, *samples, settings, state))
        found[-1].advance(6)
        judged = objective.evaluate(state.weights, state.buffers, text, text)
        found[-1].judged = judged.loss, judged.accuracy
    assert_same(*found)
    assert all(map(torch.equal, found[0].judged, found[1].judged))
    assert counted.made == 4 and counted.calls == 6 + 3 * 4 + 3 + 10


def test_windows_that_are_drawn_are_those_that_come_next():
    text = torch.arange(24).view(4, 2, 3)
    one, other = (SequentialBatches(text, text + 1) for _ in range(2))
    for number in (*other.draw(3), *other.draw(2)):
        a, b = one.next(), other.batch(number)
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and b.shared
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("shared", [True, False])
def test_a_single_run_without_vmap_is_one_with_it(shared, monkeypatch):
    found, rows = [], (7,) if shared else (1, 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 3, generator=generator, dtype=torch.float64)
    batch = Batch(x, torch.randint(2, rows, generator=generator), shared)
    for alone in (False, True):
        monkeypatch.setattr(objectives, "_without_vmap", lambda weights, alone=alone: alone)
        objective = ModuleObjective(batch_norm().double(), "cross_entropy")
        weights, buffers = objective.initial(generators(1))
        at = objective.linearize(weights, buffers, batch)
        held_out = objective.held_out(weights, at.buffers, batch)
        product = at.hessian_product(weights)
        found.append([at.loss, at.gradient, *at.buffers.values(), product, held_out.gradient])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_a_single_run_of_a_module_that_draws_numbers_is_refused(monkeypatch):
    monkeypatch.setattr(objectives, "_without_vmap", lambda weights: True)
    objective = ModuleObjective(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), "cross_entropy")
    weights, buffers = objective.initial(generators(1))
    batch = Batch(torch.ones(7, 3).double(), torch.zeros(7, dtype=torch.long), shared=True)
    with pytest.raises(OnePassError, match="the module draws random numbers"):
        objective.linearize(weights, buffers, batch)
