"""Optimisers compared: Lion, equal starts and batches, rates, measurements, diverging runs."""

import math
from functools import partial

import pytest
import torch
from test_optimizees import labelled_images
from torch import nn
from traced import TracedRecording

from comparison import optimizer_comparison
from comparison.optimizer_comparison import (
    BASELINES,
    PUBLISHED,
    RATES,
    Contender,
    HeldOut,
    Lion,
    Mixed,
    OptimizerComparison,
    baseline,
    halves,
    learned,
    noise_statistics,
    sgd_and_lion,
    train_all,
)
from data_sets.image_data import ImageData
from experiment.loop import Interrupt
from experiment.seeds import seeded_generator
from kernels.recorded_updates import CalledRecording
from learned_optimizer import find_symmetries, make_network, make_task
from learned_optimizer.window_gradients import roll_out, start

WEIGHTS = torch.zeros((), dtype=torch.float64)
DRAWS = [(0, 7, 0), (0, 7, 1)]


def symmetries_of(task):
    return find_symmetries(task.optimizee, next(task.batches(seeded_generator(0))))


@pytest.fixture(scope="module")
def task():
    return make_task("relu4", *labelled_images(60), 12, torch.float64)


def test_the_halves_share_no_image():
    images, labels = labelled_images(41)
    first, second = halves(ImageData(images, labels, "noise"))
    assert len(first) == 20 and len(second) == 21
    assert torch.equal(torch.cat([first.images, second.images]), images)


def test_lion_follows_its_formula():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=(0.8, 0.6))
    theta, m = p.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for g in torch.randn(5, 3, generator=seeded_generator(0), dtype=torch.float64):
        p.grad = g.clone()
        optimizer.step()
        theta = theta - 0.1 * torch.sign(0.8 * m + 0.2 * g)
        m = 0.6 * m + 0.4 * g
        torch.testing.assert_close(p.detach(), theta)


def test_all_optimisers_see_the_same_starts_and_batches(task):
    still = train_all(
        Contender("still", lambda ps: torch.optim.SGD(ps, 0.0)), task, 3, DRAWS, WEIGHTS
    )
    for name in BASELINES:
        moved = train_all(baseline(name), task, 3, DRAWS, WEIGHTS)
        assert torch.equal(moved.losses[:, 0], still.losses[:, 0])
        assert not torch.equal(moved.losses[:, 1:], still.losses[:, 1:])


def test_the_learned_optimizers_run_is_the_windows(task):
    network = make_network("lstm", 0, hidden=3).double()
    losses = train_all(learned("learned", network), task, 6, DRAWS[:1], WEIGHTS).losses[0]
    theta = task.optimizee.flat(
        task.optimizee.initial(seeded_generator(*DRAWS[0], 0), torch.float64)
    )
    trainings, first = start(
        network, task.optimizee, theta[None], [task.batches(seeded_generator(*DRAWS[0], 1))]
    )
    window = roll_out(network, task.optimizee, trainings, 6)
    torch.testing.assert_close(losses, torch.cat([first, window.losses[:, 0]]), rtol=1e-10, atol=0)


def test_sgd_without_momentum_keeps_the_rescale_symmetry_along_training_and_adam_breaks_it(task):
    symmetries = symmetries_of(task)
    plain = Contender("sgd", lambda ps: torch.optim.SGD(ps, 0.1))
    kept = train_all(plain, task, 5, DRAWS, WEIGHTS, symmetries)
    broken = train_all(baseline("adam"), task, 5, DRAWS, WEIGHTS, symmetries)
    assert kept.update["rescale"].shape == (5,) and kept.update["rescale"].max() < 1e-13
    assert broken.gradient["rescale"].max() < 1e-13 and broken.update["rescale"].min() > 1e-3


def test_histograms_count_every_parameter_once(task):
    curves = train_all(baseline("lion", 0.01), task, 5, DRAWS[:1], WEIGHTS, (), [1, 3, 50])
    assert curves.histograms.shape[0] == 2
    assert curves.histograms.sum(1).tolist() == [sum(task.optimizee.sizes())] * 2
    assert (curves.histograms > 0).sum() <= 4  # all moves of Lion have one size
    still = train_all(baseline("sgd", 1e-300), task, 2, DRAWS[:1], WEIGHTS, (), [1])
    total = sum(task.optimizee.sizes())
    assert still.parameters == total and still.still.tolist() == [total]
    assert still.histograms.sum() == 0


@pytest.mark.parametrize("kind", ["baseline", "learned"])
def test_a_run_that_leaves_the_finite_is_infinite_from_there(task, kind):
    if kind == "baseline":
        contender = baseline("sgd", 1e200)
    else:
        network = make_network("lstm", 0, hidden=3, out_mul=1e308).double()
        contender = learned("learned", network)
    curves = train_all(contender, task, 6, DRAWS, WEIGHTS)
    assert curves.losses.shape == (2, 7) and curves.losses[:, 0].isfinite().all()
    assert curves.losses[:, -1].isinf().all() and curves.summary()["loss"] == math.inf


def test_the_best_rate_is_the_one_with_the_smallest_loss_and_the_default_stays(task):
    comparison = OptimizerComparison(0, 8, 2, 2, WEIGHTS)
    contenders, losses = comparison.at_default_and_best_rate("adam", task, Interrupt())
    assert {float(rate) for rate in losses} == {*RATES, 0.03}
    best = min(losses, key=losses.get)
    assert [c.name for c in contenders] == list(dict.fromkeys(["adam 0.03", f"adam {best}"]))
    rate = float(best)
    again = train_all(baseline("adam", rate), task, 8, [(0, 2**31 + 1, k) for k in (0, 1)], WEIGHTS)
    assert again.at(8).mean().item() == losses[best]


def test_no_rate_is_tried_once_the_comparison_is_interrupted(task, monkeypatch):
    interrupt, tried = Interrupt(), []

    def train(contender, *rest, **options):
        tried.append(contender.name)
        interrupt.requested = len(tried) == 2
        return train_all(contender, *rest, **options)

    monkeypatch.setattr(optimizer_comparison, "train_all", train)
    comparison = OptimizerComparison(0, 2, 1, 1, WEIGHTS)
    assert comparison.contenders("adam", None, task, interrupt) == ([], {}) and len(tried) == 2
    assert comparison.contenders("learned", None, task, interrupt) == ([], {})


def test_accuracies_and_test_losses_are_those_of_the_parameters_before_each_step(task):
    inputs, targets = next(task.batches(seeded_generator(9)))
    test = HeldOut(inputs, targets, every=3)
    curves = train_all(baseline("sgd"), task, 7, DRAWS, WEIGHTS, test=test)
    assert curves.test_steps.tolist() == [0, 3, 6]
    assert curves.accuracies.shape == (2, 8) and curves.test_losses.shape == (2, 3)
    for run, draw in enumerate(DRAWS):  # the obvious training
        params = task.optimizee.initial(seeded_generator(*draw, 0), torch.float64)
        leaves = [t.requires_grad_() for layer in params for t in layer.values()]
        sgd, batches = (
            torch.optim.SGD(leaves, 0.1, momentum=0.9),
            task.batches(seeded_generator(*draw, 1)),
        )
        for step in range(8):
            x, y = next(batches)
            logits = task.optimizee(x, params)
            assert curves.accuracies[run, step] == (logits.argmax(1) == y).double().mean()
            if step in (0, 3, 6):
                logits = task.optimizee(inputs, params)
                loss = nn.functional.cross_entropy(logits, targets).item()
                assert curves.test_losses[run, step // 3].item() == pytest.approx(loss)
                share = (logits.argmax(1) == targets).double().mean()
                assert curves.test_accuracies[run, step // 3] == share
            sgd.zero_grad()
            task.optimizee.loss(params, (x, y)).backward()
            sgd.step()
    summary = curves.summary()
    assert summary["test_loss"] == curves.test_losses[:, -1].mean().item()
    assert summary["train_accuracy"] == pytest.approx(curves.accuracies.mean().item())


def test_running_statistics_are_those_of_torchs_batch_norm():
    task = make_task("relu4bn", *labelled_images(60), 12, torch.float64)
    inputs, targets = next(task.batches(seeded_generator(9)))
    found = [
        train_all(baseline("sgd"), task, 5, DRAWS[:1], WEIGHTS,
                  test=HeldOut(inputs, targets, 1, running))
        for running in (True, False)
    ]  # fmt: skip
    assert torch.equal(found[0].losses, found[1].losses)
    assert not torch.equal(found[0].test_losses, found[1].test_losses)
    module = task.optimizee.make_module().double()
    module[2] = nn.BatchNorm1d(4).double()  # the obvious training
    params = task.optimizee.initial(seeded_generator(*DRAWS[0], 0), torch.float64)
    with torch.no_grad():
        values = (t for layer in params for t in layer.values())
        for p, value in zip(module.parameters(), values, strict=True):
            p.copy_(value)
    sgd = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    batches = task.batches(seeded_generator(*DRAWS[0], 1))
    for step in range(6):
        x, y = next(batches)
        loss = nn.functional.cross_entropy(module.train()(x), y)
        tested = nn.functional.cross_entropy(module.eval()(inputs), targets)
        torch.testing.assert_close(found[0].test_losses[0, step], tested.detach())
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def test_what_has_no_classes_has_no_accuracy_and_a_lost_training_none_from_there(task):
    quadratic = make_task("quadratic", *labelled_images(), dtype=torch.float64)
    curves = train_all(baseline("adam"), quadratic, 3, DRAWS, WEIGHTS)
    assert curves.accuracies.isnan().all() and "train_accuracy" not in curves.summary()
    test = HeldOut(*next(task.batches(seeded_generator(9))), every=2)
    lost = train_all(baseline("sgd", 1e200), task, 6, DRAWS, WEIGHTS, test=test)
    assert lost.test_losses[:, -1].isinf().all() and lost.test_accuracies[:, -1].isnan().all()
    assert lost.test_losses.shape == (2, 4)


def test_norms_are_of_each_tensor_along_the_first_run(task):
    curves = train_all(Contender("sgd", lambda ps: torch.optim.SGD(ps, 0.1)), task, 4, DRAWS,
                       WEIGHTS)  # fmt: skip
    tensors = len(task.optimizee.names())
    assert all(norms.shape == (4, tensors) for norms in curves.norms.values())
    torch.testing.assert_close(curves.norms["update"], 0.1 * curves.norms["gradient"])
    params = task.optimizee.initial(seeded_generator(*DRAWS[0], 0), torch.float64)
    first = [t.norm() for layer in params for t in layer.values()]
    torch.testing.assert_close(curves.norms["parameter"][0], torch.stack(first))


def test_mixed_steps_are_the_sum_of_their_shares_each_with_its_own_memory():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    parts = [(0.75, partial(torch.optim.SGD, lr=0.1, momentum=0.5)), (0.25, partial(Lion, lr=0.2))]
    mixed, theta = Mixed([p], parts), p.detach().clone()
    momentum = m = torch.zeros(2, dtype=torch.float64)
    for g in torch.randn(4, 2, generator=seeded_generator(0), dtype=torch.float64):
        p.grad = g.clone()
        mixed.step()
        momentum = 0.5 * momentum + g
        theta = theta - 0.75 * 0.1 * momentum - 0.25 * 0.2 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        torch.testing.assert_close(p.detach(), theta)


@pytest.mark.parametrize(("share", "name", "rate"), [(0.0, "sgd", 0.5), (1.0, "lion", 0.005)])
def test_all_of_one_optimiser_is_that_optimiser(task, share, name, rate):
    comparison = OptimizerComparison(0, 4, 2, 1, WEIGHTS, (share,))
    (mixed,), _ = comparison.contenders("sgd-lion", None, task, Interrupt())
    found = comparison.curves(mixed, task, (), ()).losses
    torch.testing.assert_close(found, comparison.curves(baseline(name, rate), task, (), ()).losses)


def test_a_summary_is_of_the_last_ten_losses():
    comparison = OptimizerComparison(3, 20, 4, 1, WEIGHTS)
    task = make_task("quadratic", *labelled_images(), dtype=torch.float64)
    curves = comparison.curves(baseline("adam"), task, [], [])
    summary = curves.summary()
    expected = curves.losses[:, -10:].mean(1)
    assert summary["runs"] == expected.tolist()
    assert summary["loss"] == pytest.approx(expected.mean().item())
    assert summary["deviation"] == pytest.approx(expected.std().item())


def test_of_long_trainings_the_loss_at_the_published_step_is_told_too(task):
    curves = train_all(baseline("adam"), task, PUBLISHED + 1, DRAWS, WEIGHTS)
    early = curves.losses[:, PUBLISHED - 9 : PUBLISHED + 1].mean(1)
    found = curves.summary()
    assert found["loss_at_200"] == pytest.approx(early.mean().item())
    assert found["deviation_at_200"] == pytest.approx(early.std().item())
    short = train_all(baseline("adam"), task, 3, DRAWS, WEIGHTS).summary()
    assert "loss_at_200" not in short


def test_what_is_measured_of_a_diverging_training_is_of_every_step(task):
    curves = train_all(baseline("sgd", 1e200), task, 6, DRAWS, WEIGHTS, symmetries_of(task), [1, 6])
    assert curves.update["rescale"].shape == (6,) and len(curves.histograms) == 2


def test_noise_is_told_per_layer_of_gradients_and_updates():
    task = make_task("sigmoid4", *labelled_images(60), 12, torch.float64)
    network = make_network("lstm", 0, hidden=3).double()
    found = noise_statistics(network, task, 3, 30, (0, 1), WEIGHTS)
    for what in ("gradient", "update"):
        of = found[what]
        assert len(of["trace"]) == len(of["largest_eigenvalue"]) == 2
        assert all(0 < e <= t for e, t in zip(of["largest_eigenvalue"], of["trace"], strict=True))
        assert set(of["tail_index"]) == {2, 5, 10} and of["tail_index_share"] == [1, 1]


def test_the_noise_of_a_diverging_optimiser_is_not_a_number(task):
    network = make_network("lstm", 0, hidden=3, out_mul=1e308).double()
    found = noise_statistics(network, task, 3, 30, (0, 1), WEIGHTS)
    assert all(map(math.isnan, found["update"]["trace"] + found["update"]["largest_eigenvalue"]))


CONTENDERS = [
    learned("lstm", make_network("lstm", 0).double()),
    learned("mlp", make_network("mlp", 0).double()),
    *(baseline(name) for name in BASELINES),
    sgd_and_lion(0.3),
]


@pytest.mark.parametrize("every", [None, 3, 12])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_replayed_trainings_are_those_step_by_step(task, contender, every):
    inputs, targets = next(task.batches(seeded_generator(9)))
    test = every and HeldOut(inputs, targets, every)
    draws = [(0, 7, k) for k in range(3)]
    plain, replayed = (
        train_all(contender, task, 25, draws, WEIGHTS, (), (2,), test, record)
        for record in (None, CalledRecording)
    )
    for name in ("losses", "accuracies", "test_losses", "test_accuracies", "histograms"):
        pair = getattr(plain, name), getattr(replayed, name)
        assert torch.allclose(*pair, rtol=1e-12, equal_nan=True), name


@pytest.mark.parametrize("contender", [CONTENDERS[0], baseline("sgd")], ids=lambda c: c.name)
def test_trainings_whose_operations_are_frozen_are_those_step_by_step(task, contender):
    plain, replayed = (
        train_all(contender, task, 11, DRAWS, WEIGHTS, record=record)
        for record in (None, TracedRecording)
    )
    assert torch.allclose(plain.losses, replayed.losses, rtol=1e-12)


def test_only_what_is_measured_is_not_replayed(task):
    made = []

    def record(function, examples):
        made.append(function)
        return CalledRecording(function, examples)

    train_all(baseline("adam"), task, 25, DRAWS, WEIGHTS, record=record)
    assert len(made) == 3  # of ten steps, nine before the first ten, four in the end


@pytest.mark.parametrize("contender", [CONTENDERS[0], baseline("sgd", 1e200)], ids=["lstm", "sgd"])
def test_replayed_trainings_end_where_numbers_are_not_finite(contender):
    def data():
        images, labels = labelled_images(60)
        images = images.double()
        images[40] = math.inf
        return images, labels

    task = make_task("relu4", *data(), 12, torch.float64)
    plain, replayed = (
        train_all(contender, task, 25, DRAWS, WEIGHTS, (), (), None, record)
        for record in (None, CalledRecording)
    )
    assert plain.losses[:, -1].isinf().all() and plain.losses[:, 0].isfinite().any()
    assert torch.allclose(plain.losses, replayed.losses, rtol=1e-12)
    assert torch.allclose(plain.accuracies, replayed.accuracies, equal_nan=True)
