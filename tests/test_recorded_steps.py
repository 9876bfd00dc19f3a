"""Steps replayed from recordings: the steps themselves, and trainings of layers and classifiers."""

from dataclasses import replace

import pytest
import torch
from counted_recording import Counted
from oracles import normal
from test_layerwise_training import TINY, run, training

from kernels.recorded_updates import CalledRecording, RecordingError
from krotov_hopfield import LayerPlan, layers
from krotov_hopfield.recorded_steps import NotRecordedError, RecordedSteps

SOFT = replace(
    TINY,
    layers=(
        LayerPlan(4, 3, 0.05, padding=1, activation="triangle", power=0.7, pool="max"),
        LayerPlan(6, 3, 0.02, activation="triangle", inverse_temperature=0.5),
        LayerPlan(5, 0, 0.05),
    ),
    gate="soft", normalization="clamp", rate_exponent=0.5, padding_mode="reflect", together=True,
    batch_size=4,
)  # fmt: skip
KINDS = {  # of trainings whose batches differ in what determines them
    "one by one": TINY,
    "together": replace(TINY, together=True, schedule="exponential"),
    "soft": SOFT,
    "losers, images": replace(TINY, gate="losers", feature_norm="image", schedule="linear"),
    "winner, no dropout": replace(TINY, gate="winner", dropout=0.0),
    "crop": replace(TINY, augmentation="crop"),
    "flip, no dropout": replace(TINY, augmentation="flip", dropout=0.0),
}


def weighted_sum(state):
    """A step that changes two tensors in place, one of them by a remembered number."""
    w, v = state

    def step(x, rate):
        v.mul_(0.5).add_(x.sin())
        w.add_(rate * v * w)
        return torch.stack([w.sum(), v.norm()])

    return step


@pytest.mark.parametrize("count, length", [(1, 1), (6, 3), (7, 3), (2, 5), (5, 5)])
def test_replays_are_the_steps_one_after_the_other(count, length):
    start = [normal(1, 4).detach(), normal(2, 4).detach()]
    batches = [[normal(3 + k, 4).detach(), torch.tensor(0.1 * k)] for k in range(2 * count)]
    state, plain = ([t.clone() for t in start] for _ in range(2))
    steps = RecordedSteps(weighted_sum(state), state, CalledRecording, length)
    found = [steps(count, lambda k, f=first: batches[f + k]) for first in (0, count)]
    step = weighted_sum(plain)
    expected = torch.stack([step(*batch) for batch in batches])
    assert torch.equal(torch.cat(found), expected)
    assert all(map(torch.equal, state, plain))


def test_a_state_that_is_put_back_is_that_of_its_copies():
    state = [normal(1, 4).detach(), normal(2, 4).detach()]
    steps = RecordedSteps(weighted_sum(state), state, CalledRecording, 2)
    before = steps.copies()
    first = steps(5, lambda k: [normal(k, 4).detach(), torch.tensor(0.1)])
    steps.put_back(before)
    assert torch.equal(first, steps(5, lambda k: [normal(k, 4).detach(), torch.tensor(0.1)]))


@pytest.mark.parametrize(
    "problem, seen",
    [(RecordingError("no"), NotRecordedError), (torch.OutOfMemoryError("full"),) * 2],
)
def test_where_no_recording_can_be_made_the_state_is_as_before(problem, seen):
    class Refused:
        def __init__(self, function, examples):
            function(*examples)
            raise problem

    state = [normal(1, 4).detach(), normal(2, 4).detach()]
    before = [t.clone() for t in state]
    kind = seen if isinstance(seen, type) else type(seen)
    with pytest.raises(kind, match=str(problem)):
        steps = RecordedSteps(weighted_sum(state), state, Refused, 2)
        steps(2, lambda k: [normal(k, 4).detach(), torch.tensor(0.1)])
    assert all(map(torch.equal, state, before))


@pytest.mark.parametrize("kind", ["one by one", "soft", "losers, images"])
def test_recorded_steps_never_ask_a_device_for_a_number(kind):
    """On "meta", tensors have shapes and no numbers: to ask one for a number is an error."""
    part = training(replace(KINDS[kind], dropout=0.0), after=(3,))
    while part.classifier is None:
        part.train_round()
    for module in (part.network, part.classifier):
        module.to("meta")
    part.images, part.labels = part.images.to("meta"), part.labels.to("meta")
    part.velocities = [t.to("meta") for t in part.velocities]
    index = torch.empty(4, dtype=torch.int64, device="meta")
    rates = torch.empty(3, dtype=torch.float64, device="meta")
    crops = [torch.empty(4, 12, dtype=torch.int64, device="meta") for _ in range(2)]
    for drawn in ([index], [index, *crops]):
        assert part._learn((1, 2, 3), rates, *drawn).device.type == "meta"
        part.record, part.cache_bytes = CalledRecording, 0
        assert part._recorded_classifier(3).step(rates[0], *drawn).shape == (2,)


@pytest.fixture(params=[False, True], ids=["compiled", "products"])
def products(request, monkeypatch):
    """Whether layers learn by products, as they do on a GPU, in the place of compiled loops."""
    if request.param:
        monkeypatch.setattr(layers, "COMPILED_TYPES", ())


def agree(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-12, abs=1e-12)


def weights(part):
    return list(part.network.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_batches", [5, 100])
def test_recorded_trainings_are_those_that_are_not(kind, round_batches, products):
    plain, recorded = (
        training(KINDS[kind], round_batches=round_batches, record=record)
        for record in (None, CalledRecording)
    )
    agree(run(recorded), run(plain))
    for one, other in zip(weights(recorded), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for depth, outcome in plain.outcomes.items():
        for name, value in outcome["state"].items():
            other = recorded.outcomes[depth]["state"][name]
            torch.testing.assert_close(other, value, rtol=1e-11, atol=1e-12)


def test_features_that_are_not_kept_are_extracted_within_the_recording():
    agree(run(training(cache_bytes=0, record=CalledRecording)), run(training(cache_bytes=0)))


@pytest.mark.parametrize(
    "limits",
    [
        {"patience": 2}, {"patience": 7}, {"threshold": 0.3}, {"patience_epochs": 1.0},
        {"schedule": "exponential", "rate_waits_above": 20.0},
        {"schedule": "exponential", "rate_waits_above": 20.0, "patience": 9, "together": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("round_batches", [1, 7, 100])
def test_where_a_layer_ends_and_its_rate_waits_is_found_within_a_replay(limits, round_batches):
    plans = tuple(replace(plan, lr=0.2) for plan in TINY.layers)
    recipe = replace(TINY, layers=plans, epochs=20, **limits)
    plain, recorded = (
        training(recipe, after=(3,), round_batches=round_batches, record=record)
        for record in (None, CalledRecording)
    )
    agree(run(recorded), run(plain))
    assert recorded.counted == plain.counted
    for one, other in zip(weights(recorded), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["one by one", "soft", "flip, no dropout"])
def test_a_recorded_training_taken_up_after_any_round_goes_on_as_if_never_left(kind):
    options = {"round_batches": 5, "record": CalledRecording}
    whole = run(training(KINDS[kind], **options))
    for stop in range(1, len(whole)):
        first = training(KINDS[kind], **options)
        for _ in range(stop):
            first.train_round()
        rest = training(KINDS[kind], **options)
        rest.load_state_dict(first.state_dict())
        assert run(rest) == whole[stop:]


def test_a_stage_has_two_recordings_and_few_replays():
    Counted.from_zero()
    recipe = replace(TINY, layers=TINY.layers[:1], batch_size=1, classifier_batch_size=1)
    run(training(recipe, after=(1,), record=Counted))  # 60 batches, and 3 epochs of 30
    assert (Counted.made, Counted.calls) == (2, 6 + 9)
    Counted.from_zero()
    run(training(replace(recipe, epochs=1.5), after=(), round_batches=45, record=Counted))
    assert (Counted.made, Counted.calls) == (2, 4 + 5)


def test_steps_that_cannot_be_recorded_are_taken_one_by_one_and_the_reason_is_told():
    class Refused(CalledRecording):
        def __init__(self, function, examples):
            super().__init__(function, examples)
            raise RecordingError("it waits for the device")

    told = []
    part = training(record=Refused, warn=told.append)
    assert run(part) == run(training())
    assert told == ["steps are not replayed as a recording: it waits for the device"]


def test_recorded_classifiers_go_on_from_the_momentum_of_a_checkpoint_made_without():
    plain = training(after=(1,))
    while plain.classifier is None or plain.done < 1:
        plain.train_round()
    recorded = training(after=(1,), record=CalledRecording)
    recorded.load_state_dict(plain.state_dict())
    agree(run(recorded), run(plain))
