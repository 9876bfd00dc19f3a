"""Meta-training: it learns, selects, resumes bit for bit, never steps on what is not finite."""

import copy
import math

import pytest
import torch
from test_optimizees import labelled_images
from traced import TracedRecording

from experiment.seeds import seeded_generator
from kernels.recorded_updates import CalledRecording
from learned_optimizer import (
    ESTIMATORS,
    MetaTraining,
    MetaTrainingSettings,
    OptimizerError,
    Task,
    find_symmetries,
    make_network,
    make_task,
)
from learned_optimizer.window_gradients import steps_of_adam

SMALL = {"runs_per_epoch": 2, "inner_steps": 7, "unroll": 3, "validation_runs": 2}


def training(warn=None, data=None, **settings) -> MetaTraining:
    task = make_task("relu3", *(data or labelled_images(60)), 10)
    network = make_network("lstm", 0, hidden=4)
    chosen = MetaTrainingSettings(**SMALL | settings)
    symmetries = find_symmetries(task.optimizee, next(task.batches(seeded_generator(0))))
    return MetaTraining(network, task, symmetries, chosen, warn or pytest.fail)


def numbers(row: dict) -> dict:
    return {name: repr(value) for name, value in row.items() if name != "seconds"}


def test_the_optimiser_learns_to_minimise_quadratics():
    task = make_task("quadratic", *labelled_images())
    network = make_network("lstm", 0)
    settings = MetaTrainingSettings(runs_per_epoch=10, inner_steps=40, tasks=4, validation_runs=8)
    learning = MetaTraining(network, task, [], settings)
    rows = [learning.train_run() for _ in range(20)]
    assert learning.best_loss < 0.7 * learning.curves[0].sum()
    assert rows[-1]["validation_loss"] == pytest.approx(learning.curves[-1].sum().item(), rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resumed_run_goes_on_bit_for_bit(estimator):
    settings = {"estimator": estimator, "tasks": 2, "pairs": 1}
    plain = training(**settings)
    rows = [numbers(plain.train_run()) for _ in range(4)]
    first = training(**settings)
    assert [numbers(first.train_run()) for _ in range(3)] == rows[:3]
    resumed = training(**settings)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert numbers(resumed.train_run()) == rows[3]
    for ours, theirs in zip(plain.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        *({"estimator": name, "random_start": True} for name in ESTIMATORS),
        {"coordinates": 20},
        {"log_loss": True, "penalty": 0.1},
    ],
    ids=str,
)
def test_replayed_windows_are_those_one_by_one(settings, tasks):
    learning = [training(tasks=tasks, **settings) for _ in range(2)]
    for each in learning:
        each.network.double()
        each.task = make_task("relu3", *labelled_images(60), 10, torch.float64)
    learning[1].calls.record = CalledRecording
    for _ in range(3):
        rows = [each.train_run() for each in learning]
        assert rows[1] == pytest.approx(rows[0] | {"seconds": rows[1]["seconds"]}, rel=1e-12,
                                        nan_ok=True)  # fmt: skip
    for one, other in zip(*(each.network.parameters() for each in learning), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    for name, curves in learning[0].deviations.items():
        for one, other in zip(curves, learning[1].deviations[name], strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-15)
    assert learning[1].calls.recordings


def test_windows_whose_operations_are_frozen_are_those_one_by_one():
    learning = [training() for _ in range(2)]
    for each in learning:
        each.network.double()
        each.task = make_task("relu3", *labelled_images(60), 10, torch.float64)
    learning[1].calls.record = TracedRecording
    for _ in range(2):
        rows = [numbers(each.train_run()) for each in learning]
        assert rows[0].keys() == rows[1].keys()
    for one, other in zip(*(each.network.parameters() for each in learning), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_a_resumed_run_of_replayed_windows_goes_on_bit_for_bit():
    whole, resumed = training(), training()
    for each in (whole, resumed):
        each.calls.record = CalledRecording
    rows = [numbers(whole.train_run()) for _ in range(3)]
    first = training()
    first.calls.record = CalledRecording
    assert [numbers(first.train_run()) for _ in range(2)] == rows[:2]
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert numbers(resumed.train_run()) == rows[2]


def test_suffix_sums_and_autograd_train_alike_up_to_rounding():
    ours, exact = training(), training(estimator="autograd")
    rows = [(ours.train_run(), exact.train_run()) for _ in range(2)]
    for a, b in rows:
        assert a["meta_loss"] == pytest.approx(b["meta_loss"], rel=1e-3)


def test_windows_cover_all_steps_and_validation_comes_at_the_end_of_an_epoch():
    learning = training()
    first, second = learning.train_run(), learning.train_run()
    assert first["skipped_windows"] == 0 and math.isnan(first["validation_loss"])
    assert not math.isnan(second["validation_loss"])
    assert len(learning.curves) == 2 and learning.curves[0].shape == (7,)
    assert {name: len(values) for name, values in learning.deviations.items()} == {
        f"{what}/{kind}": 2
        for what in ("update", "gradient")
        for kind in ("rescale", "translation")
    }
    assert max(values.max() for values in learning.deviations["gradient/rescale"]) < 1e-5


def test_a_random_start_is_where_steps_of_adam_have_led():
    plain = training(random_start=True)
    begun = [plain._start_of(run) for run in range(40)]
    assert set(begun) == set(range(SMALL["inner_steps"]))
    run = next(run for run, steps in enumerate(begun) if steps == 5)
    task, K = plain.task, 2
    before = plain._started(run, range(K))
    after = steps_of_adam(task.optimizee, plain._started(run, range(K)), 5, 0.05)
    for k in range(K):  # the obvious training
        theta = before.theta[k].clone().requires_grad_()
        adam = torch.optim.Adam([theta], 0.05)
        batches = task.batches(seeded_generator(0, run, k, 1))
        for _ in range(5):
            adam.zero_grad()
            task.optimizee.loss(task.optimizee.unflat(theta), next(batches)).backward()
            adam.step()
        torch.testing.assert_close(after.theta[k], theta.detach(), rtol=1e-5, atol=1e-6)
    plain.run, seen = run, []
    plain.task = Task(task.optimizee, lambda g: (seen.append(1) or b for b in task.batches(g)))
    assert plain.train_run()["skipped_windows"] == 0
    assert len(seen) == (SMALL["validation_runs"] + 1) * (SMALL["inner_steps"] + 1)


def test_the_best_weights_are_those_of_the_smallest_validation_loss():
    learning = training(lr=0.5)
    losses = [learning.train_run()["validation_loss"] for _ in range(6)][1::2]
    smallest = min(learning.curves[0].sum().item(), *losses)
    assert learning.best_loss == pytest.approx(smallest, rel=1e-5)
    learning.select()
    assert learning.validate().losses.sum(1).mean().item() == learning.best_loss


def test_the_best_weights_may_be_those_with_the_smallest_loss_at_the_end():
    learning = training(lr=0.5, inner_steps=24, selection="end")
    rows = [learning.train_run() for _ in range(6)][1::2]
    untrained = learning.curves[0][-10:].mean().item()
    smallest = min(untrained, *(row["validation_end"] for row in rows))
    assert learning.best_loss == pytest.approx(smallest, rel=1e-5)
    learning.select()
    assert learning.validate().losses[:, -10:].mean().item() == learning.best_loss


def test_a_window_that_is_not_finite_ends_the_run_and_is_not_stepped_on():
    warnings: list[str] = []
    learning = training(warnings.append)
    with torch.no_grad():
        learning.network.output.bias.fill_(1e38)
        learning.network.out_mul = 1e38
    before = copy.deepcopy(learning.network.state_dict())
    row = learning.train_run()
    assert row["skipped_windows"] == 3 and len(warnings) == 1 and "run 1" in warnings[0]
    assert all(torch.equal(before[n], p) for n, p in learning.network.state_dict().items())


def test_replayed_windows_from_one_that_is_not_finite_on_change_nothing():
    warnings: list[list[str]] = [[], []]
    learning = [training(told.append, unroll=2) for told in warnings]
    learning[1].calls.record = CalledRecording
    for each in learning:
        each.train_run()
        each.network.out_mul = 1e19  # the squares of a later loss overflow
        assert each.train_run()["skipped_windows"] > 0
        each.network.out_mul = 0.1
    assert warnings[0] == warnings[1] and "run 2" in warnings[0][0]
    states = [each.optimizer.state_dict()["state"] for each in learning]
    assert states[0][0]["step"] == states[1][0]["step"]
    rows = [numbers(each.train_run()) for each in learning]
    assert rows[0].keys() == rows[1].keys()
    for one, other in zip(*(each.network.parameters() for each in learning), strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_the_penalty_lessens_deviations():
    plain, held = (
        training(inner_steps=12, runs_per_epoch=16, penalty=beta, penalty_relative=True)
        for beta in (0.0, 10.0)
    )
    for _ in range(16):
        plain.train_run(), held.train_run()
    sizes = [learning.validate().update["rescale"].mean() for learning in (plain, held)]
    assert sizes[1] < 0.7 * sizes[0]


def test_the_rate_falls_as_a_cosine_where_asked():
    settings = MetaTrainingSettings(epochs=2, runs_per_epoch=5, lr=0.1, decay="cosine")
    assert settings.rate(0) == 0.1 and settings.rate(5) == pytest.approx(0.05)
    assert settings.rate(10) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    "settings",
    [{"unroll": 0}, {"estimator": "x"}, {"coordinates": 5, "estimator": "pes"}, {"decay": "x"}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(OptimizerError):
        MetaTrainingSettings(**settings)
