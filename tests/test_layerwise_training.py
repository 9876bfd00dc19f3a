"""The parts of a layerwise training, on a few small images; the command has tests of its own."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from krotov_hopfield import (
    DEEPEST,
    RECIPES,
    BioConv2d,
    Classifier,
    CompetitionError,
    KrotovHopfieldNetwork,
    LayerPlan,
    LayerwiseTraining,
    NonFiniteError,
    Recipe,
    exponential_rate,
    learning_rate,
    split_validation,
)
from krotov_hopfield.layerwise_training import crop_and_flip, restarting_rate, stages_of

TINY = Recipe(
    (LayerPlan(4, 3, 0.01, pool="max"), LayerPlan(6, 3, 0.01), LayerPlan(5, 0, 0.05)),
    epochs=2, batch_size=8, classifier_batch_size=8, classifier_epochs=3, dropout=0.3,
    schedule="constant",
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled_images(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(256, (count, 2, 12, 12), generator=generator(3))
    return images.to(torch.uint8), torch.arange(count) % 4


def training(recipe: Recipe = TINY, **options) -> LayerwiseTraining:
    train, validation = split_validation(labelled_images(), 0.25)
    network = KrotovHopfieldNetwork((2, 12, 12), recipe, generator(), dtype=torch.float64)
    after = options.pop("after", (1, 3))
    return LayerwiseTraining(network, train, validation, after, 0, classes=4, **options)


def run(part: LayerwiseTraining) -> list[dict[str, float]]:
    rows = []
    while not part.finished:
        row = part.train_round()
        rows.append({k: -1 if v != v else v for k, v in row.items() if k != "seconds"})
    return rows


@pytest.mark.parametrize("preset", list(RECIPES))
def test_every_preset_fits_small_and_large_images_at_every_depth(preset):
    for depth in range(1, DEEPEST[preset] + 1):
        recipe = RECIPES[preset](depth)
        small = tuple(replace(plan, units=12, ranking_param=2) for plan in recipe.layers)
        recipe = replace(recipe, layers=small)
        for shape in ((1, 28, 28), (3, 32, 32)):
            features = KrotovHopfieldNetwork(shape, recipe, generator())(torch.rand(2, *shape))
            assert features.shape[:2] == (2, 12) and features.isfinite().all()


def test_the_deep_preset_has_the_sizes_of_its_source():
    network = KrotovHopfieldNetwork((3, 32, 32), RECIPES["deep"](5), generator())
    shapes = [tuple(block.layer.weight.shape) for block in network.blocks]
    assert shapes == [
        (96, 3, 5, 5), (128, 96, 3, 3), (192, 128, 3, 3), (256, 192, 3, 3), (300, 2304),
    ]  # fmt: skip


def test_initial_weights_have_the_spread_of_the_recipe():
    recipe = RECIPES["softhebb"](1)
    weight = KrotovHopfieldNetwork((3, 32, 32), recipe, generator()).blocks[0].layer.weight
    assert weight.std().item() == pytest.approx(25 / math.sqrt(75), rel=0.03)


def test_images_that_are_too_small_are_refused_with_the_layer():
    with pytest.raises(CompetitionError, match="too small for layer 3"):
        KrotovHopfieldNetwork((1, 10, 10), RECIPES["deep"](3), generator())


def test_places_that_are_fewer_than_the_pooled_squares_are_refused_and_no_other_error_is(
    monkeypatch,
):
    recipe = Recipe((LayerPlan(4, 3, 0.01, pool="max", pool_size=4),))
    assert (
        KrotovHopfieldNetwork((1, 4, 4), recipe, generator())(torch.zeros(1, 1, 4, 4)).shape[2] == 1
    )
    with pytest.raises(CompetitionError, match="too small for layer 1"):
        KrotovHopfieldNetwork((1, 3, 3), recipe, generator())

    def out_of_memory(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(BioConv2d, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        KrotovHopfieldNetwork((1, 10, 10), recipe, generator())


def test_every_layer_has_the_competition_of_its_own_plan():
    plans = zip(TINY.layers, (2, 3, 4), (2, 3, 2), (0.1, 0.2, 0.3), strict=True)
    layers = tuple(replace(plan, lebesgue_p=p, ranking_param=k, delta=d) for plan, p, k, d in plans)
    network = KrotovHopfieldNetwork((2, 12, 12), replace(TINY, layers=layers), generator())
    found = [
        (layer.lebesgue_p, layer.ranking_param, layer.delta)
        for layer in (block.layer for block in network.blocks)
    ]
    assert found == [(2, 2, 0.1), (3, 3, 0.2), (4, 2, 0.3)]


def test_learning_rates_follow_their_schedules():
    plan = LayerPlan(4, 3, 0.1, 0.01, 2.0)
    recipe = replace(TINY, epochs=10)
    assert learning_rate(plan, recipe, 3.5) == 0.1
    assert learning_rate(plan, replace(recipe, schedule="linear"), 3.5) == pytest.approx(0.07)
    exponential = learning_rate(plan, replace(recipe, schedule="exponential"), 0.5)
    assert exponential == pytest.approx(0.01 + 0.09 * math.exp(-1))


def test_restarting_rates_are_those_of_torchs_scheduler():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2)
    for epoch in range(75):
        assert restarting_rate(0.05, epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_the_validation_images_are_always_the_same_and_none_is_in_both_parts():
    data = labelled_images()
    first, second = split_validation(data, 0.25), split_validation(data, 0.25)
    assert [len(images) for images, _ in first] == [30, 10]
    for part, same in zip(first, second, strict=True):
        assert all(map(torch.equal, part, same))
    label_of = {image.numpy().tobytes(): label for image, label in zip(*data, strict=True)}
    found = {i.numpy().tobytes(): y for part in first for i, y in zip(*part, strict=True)}
    assert found == label_of and len(found) == 40
    for wrong in (0.0, 1.0, 0.001):
        with pytest.raises(CompetitionError, match="between 0 and 1"):
            split_validation(data, wrong)


def test_crops_come_from_the_reflected_image_and_half_are_mirrored():
    data = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    padded = nn.functional.pad(data[:1].float(), (4, 4, 4, 4), "reflect")[0, 0]
    crops = {
        padded[i : i + 8, j : j + 8].to(torch.uint8).numpy().tobytes()
        for i in range(9) for j in range(9)
    }  # fmt: skip
    # Four of nine mirrored crops are crops as well, for the reflected image is its own mirror image
    for flip, expected in ((False, 200), (True, 144)):
        made = crop_and_flip(data, generator(), flip)
        assert made.shape == data.shape and made.dtype == torch.uint8
        straight = sum(image[0].contiguous().numpy().tobytes() in crops for image in made)
        assert abs(straight - expected) <= 40 * flip
        for image in made:
            sides = (image[0].contiguous(), image[0].flip(1).contiguous())
            assert any(side.numpy().tobytes() in crops for side in sides)


def test_stages_come_layer_by_layer_or_all_layers_first():
    layers, classifier = "layers", "classifier"
    assert stages_of(2, (1, 2), together=False) == [
        (layers, (1,)), (classifier, (1,)), (layers, (2,)), (classifier, (2,)),
    ]  # fmt: skip
    assert stages_of(3, (1, 3), together=True) == [
        (layers, (1, 2, 3)), (classifier, (1,)), (classifier, (3,)),
    ]  # fmt: skip


def test_layers_before_the_one_that_learns_and_those_behind_it_stay_as_they_are():
    part = training(after=(3,))
    for learning in range(3):
        before = [block.layer.weight.clone() for block in part.network.blocks]
        part.train_round()
        changed = [
            not torch.equal(block.layer.weight, old)
            for block, old in zip(part.network.blocks, before, strict=True)
        ]
        assert changed == [k == learning for k in range(3)]


def test_all_at_once_changes_every_layer_in_every_round():
    part = training(replace(TINY, together=True), after=(3,))
    before = [block.layer.weight.clone() for block in part.network.blocks]
    row = part.train_round()
    assert all(
        not torch.equal(block.layer.weight, old)
        for block, old in zip(part.network.blocks, before, strict=True)
    )
    assert row["layer"] == 0 and all(math.isfinite(row[f"convergence/{k}"]) for k in (1, 2, 3))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_a_training_taken_up_after_any_round_goes_on_as_if_never_left(together, augmentation):
    recipe = replace(TINY, together=together, augmentation=augmentation)
    options = {"round_batches": 2}
    whole = run(training(recipe, **options))
    for stop in (1, 4, len(whole) - 1):
        first = training(recipe, **options)
        rows = [first.train_round() for _ in range(stop)]
        rest = training(recipe, **options)
        rest.load_state_dict(first.state_dict())
        assert len(rows) + len(rest_rows := run(rest)) == len(whole)
        assert rest_rows == whole[stop:]


def test_kept_features_change_no_number():
    kept, anew = run(training()), run(training(cache_bytes=0))
    for a, b in zip(kept, anew, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_a_layer_ends_early_once_nothing_brings_it_closer_to_rest_or_it_is_there():
    plans = tuple(replace(plan, lr=0.2) for plan in TINY.layers)
    patient = replace(TINY, layers=plans, epochs=100)
    rows = run(training(replace(patient, patience=20), after=(3,), round_batches=10))
    of_first = [row for row in rows if row["layer"] == 1 and not row["classifier"]]
    assert 20 <= of_first[-1]["epoch"] * 3 < 300
    rows = run(training(replace(patient, threshold=1e9), after=(3,), round_batches=2))
    assert [row["epoch"] for row in rows if not row["classifier"]] == [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize("limit", [{"patience": 2}, {"threshold": 0.3}])
def test_where_a_layer_ends_does_not_depend_on_how_many_batches_are_a_round(limit):
    def ends(round_batches: int) -> tuple[list[float], torch.Tensor]:
        recipe = replace(TINY, layers=plans, epochs=20, **limit)
        part = training(recipe, after=(3,), round_batches=round_batches)
        last = {row["layer"]: row["epoch"] for row in run(part) if not row["classifier"]}
        return last, part.network.blocks[0].layer.weight

    plans = tuple(replace(plan, lr=0.2) for plan in TINY.layers)
    (one, weight), *others = [ends(count) for count in (1, 7, 100)]
    assert one[1] < 20
    for last, other in others:
        assert last == one and torch.equal(weight, other)


def test_patience_may_be_told_in_epochs():
    restless = replace(TINY, epochs=20, classifier_epochs=0, layers=(LayerPlan(4, 3, 30.0),))
    by_batches = run(training(replace(restless, patience=6), after=()))
    assert run(training(replace(restless, patience_epochs=2), after=())) == by_batches
    ends = [run(training(replace(restless, patience_epochs=e), after=()))[-1]["epoch"]
            for e in (1, 1.5)]  # fmt: skip
    assert ends[0] < ends[1] < by_batches[-1]["epoch"]


def test_the_rate_falls_only_while_a_layer_is_near_rest():
    recipe = replace(TINY, schedule="exponential", together=True, classifier_epochs=0)
    for limit, counts in ((0.0, [6, 6, 6]), (1e-9, [0, 0, 0])):
        part = training(replace(recipe, rate_waits_above=limit), after=())
        part.round_batches = 5
        part.train_round()
        assert part.counted == [min(count, 5) for count in counts]
    part, near = training(replace(recipe, rate_waits_above=20.0), after=(), round_batches=1), 0
    for _ in range(5):
        row = part.train_round()
        plan = recipe.layers[0]
        assert row["learning_rate"] == exponential_rate(plan.lr, 0.0, 1.0, near / 3)
        near += row["convergence/1"] < 20
    assert part.counted[0] == near


def test_without_epochs_of_a_classifier_there_is_none():
    part = training(replace(TINY, classifier_epochs=0, classifier_batch_size=1000))
    rows = run(part)
    assert part.outcomes == {} and len(rows) == 3
    assert part.reached == {k: rows[k - 1][f"convergence/{k}"] for k in (1, 2, 3)}


def test_a_layer_is_at_rest_where_its_convergence_is_now_and_not_where_it_once_was():
    part = training(replace(TINY, threshold=0.5))
    part._judge((1,), [0.4])
    assert part._need_no_more((1,))
    part._judge((1,), [0.6])
    assert not part._need_no_more((1,)) and part.closest[0] == 0.4


@pytest.mark.parametrize(("rounds", "busy"), [(1, "network"), (3, "classifier")])
def test_a_saved_state_shares_nothing_with_the_training(rounds, busy):
    recipe = replace(TINY, patience=100)
    part, other = (training(recipe, round_batches=3) for _ in range(2))
    for _ in range(rounds):
        part.train_round()
    state = part.state_dict()
    saved = copy.deepcopy(state)
    other.load_state_dict(state)
    for each in (part, other):
        each.train_round()
    assert state["closest"] == saved["closest"]
    assert all(torch.equal(saved[busy][name], value) for name, value in state[busy].items())


def test_classifiers_know_classes_that_no_training_image_shows():
    images, labels = labelled_images()
    train, validation = ((images[rows], labels[rows]) for rows in (labels < 2, labels == 3))
    network = KrotovHopfieldNetwork((2, 12, 12), TINY, generator(), dtype=torch.float64)
    part = LayerwiseTraining(network, train, validation, (1,), 0, classes=4)
    run(part)
    assert part.outcomes[1]["state"]["linear.bias"].shape == (4,)
    assert 0 <= part.test_accuracy(1, images[:2], labels[:2]) <= 1


def test_of_augmented_images_only_the_features_that_are_kept_count():
    one = 4 * 5 * 5 * 8  # bytes behind the first layer, in float64
    for augmentation, cache, kept in (("flip", 10, [True]), ("flip", 9, []), ("none", 10, []),
                                      ("none", 40, [False, True])):  # fmt: skip
        recipe = replace(TINY, augmentation=augmentation)
        part = training(recipe, after=(1,), cache_bytes=cache * one)
        part.train_round()
        part.train_round()
        found = {validation for (_, validation), t in part._kept.items() if t is not None}
        assert sorted(found) == kept


def test_the_best_classifier_is_kept_and_judged():
    part = training(replace(TINY, classifier_epochs=8), after=(2,))
    rows = [row for row in run(part) if row["classifier"]]
    best = max(rows, key=lambda row: row["validation_accuracy"])
    outcome = part.outcomes[2]
    assert outcome["validation_accuracy"] == best["validation_accuracy"]
    assert outcome["epoch"] == best["epoch"]
    assert part.test_accuracy(2, *part.validation) == outcome["validation_accuracy"]


def test_the_classifier_drops_features_in_training_only_and_keeps_their_mean():
    classifier = Classifier((3, 4, 4), 5, 0.5, generator(), dtype=torch.float64)
    x = torch.randn(20, 3, 4, 4, generator=generator(1), dtype=torch.float64)
    made = torch.stack([classifier(x, generator(seed)) for seed in range(400)]).mean(0)
    undropped = classifier.linear(classifier.norm(x).flatten(1))
    torch.testing.assert_close(made, undropped, atol=0.15, rtol=0)
    classifier.eval()
    assert torch.equal(classifier(x), classifier(x))


def test_features_of_an_image_are_divided_by_their_root_mean_square_also_when_they_are_tiny():
    classifier = Classifier((50,), 5, 0.0, generator(), feature_norm="image")
    x = torch.rand(6, 50, generator=generator(1))
    expected = classifier.linear(x / x.square().mean(1, keepdim=True).sqrt())
    for size in (1.0, 1e-9, 1e9):
        torch.testing.assert_close(classifier(size * x), expected)
    assert classifier(0 * x).isfinite().all()


def test_no_epochs_leave_the_initial_weights():
    part = training(replace(TINY, epochs=0), after=(3,))
    before = part.network.blocks[0].layer.weight.clone()
    run(part)
    assert torch.equal(before, part.network.blocks[0].layer.weight) and 3 in part.outcomes


def test_a_training_that_diverges_says_which_layer():
    plans = tuple(replace(plan, lr=1e200) for plan in TINY.layers)
    with pytest.raises(NonFiniteError, match=r"layers \[1\] diverged.*rate, lebesgue_p or delta"):
        run(training(replace(TINY, layers=plans)))


def test_more_images_in_a_batch_than_there_are_is_refused():
    for name in ("batch_size", "classifier_batch_size"):
        with pytest.raises(CompetitionError, match="above 30, the training images"):
            training(replace(TINY, **{name: 31}))


def test_batches_of_one_image_are_refused_where_a_classifier_could_not_normalise_them():
    single = replace(TINY, batch_size=1, classifier_batch_size=1, epochs=0.1, classifier_epochs=1)
    assert len(run(training(single, after=(1,)))) == 4
    with pytest.raises(CompetitionError, match="no variance behind layer 3"):
        training(single, after=(1, 3))


def test_images_and_labels_of_another_type_or_number_are_refused():
    images, labels = labelled_images()
    network = KrotovHopfieldNetwork((2, 12, 12), TINY, generator())
    for wrong in ((images.float(), labels), (images[0], labels), (images, labels[1:]),
                  (images, labels.float())):  # fmt: skip
        for train, validation in ((wrong, (images, labels)), ((images, labels), wrong)):
            with pytest.raises(CompetitionError, match=r"must be (uint8|int64) \["):
                LayerwiseTraining(network, train, validation, (1,), 0, classes=4)
