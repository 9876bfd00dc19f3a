"""Logistic regression of several tasks at once: the same as one by one."""

from functools import partial

import pytest
import torch
from oracles import normal

from data_sets.image_data import ImageData
from kernels.logistic_regression import NonFiniteFeatures, ProbeError, fit_logistic
from kernels.logistic_tasks import _Problem, fit_logistic_tasks
from linear_probe import FunctionLoss, ProbeLoss, RidgeLoss, SampledProbeLoss
from models_fully_local import Activation, lateral_network, of_task, over_tasks

TASKS, N = 3, 90


def problem(features=4, classes=3, scale=1.0, seed=0):
    """Features that say something about the labels, more so in the later tasks."""
    labels = torch.arange(N).remainder(classes).expand(TASKS, N)
    centres = normal(seed, classes, features).detach()
    strength = torch.linspace(0.2, 1.5, TASKS, dtype=torch.float64).view(-1, 1, 1)
    noise = normal(seed + 1, TASKS, N, features).detach()
    return scale * (strength * centres[labels] + noise), labels


@pytest.mark.parametrize("C", [0.1, 10.0, 1e4])
@pytest.mark.parametrize("features, classes, scale", [
    (1, 2, 1.0), (4, 3, 1.0), (20, 5, 1e-3), (12, 10, 300.0),
])  # fmt: skip
def test_every_task_has_the_optimum_that_it_has_alone(features, classes, scale, C):
    x, labels = problem(features, classes, scale)
    together = fit_logistic_tasks(x, labels, classes, C)
    for k in range(TASKS):
        alone = fit_logistic(x[k], labels[k], classes, C, tolerance=1e-14)
        logits, expected = together.logits(x)[k], alone.logits(x[k])
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        objective = C * torch.nn.functional.cross_entropy(logits, labels[k], reduction="sum")
        objective += 0.5 * together.weight[k].square().sum()
        assert objective <= alone.objective * (1 + 1e-9)


@pytest.mark.parametrize("rows, hessians", [
    ("all alike", 4), ("few without a class", 10), ("few that mislead", 8),
])  # fmt: skip
def test_few_rows_are_only_where_to_begin(rows, hessians, monkeypatch):
    """With so many rows the first steps are on every eighth, which need not be like the others."""
    x, labels = (t.repeat(1, 40, *[1] * (t.dim() - 2)) for t in problem(4, 3))
    x = x + 0.5 * normal(7, *x.shape).detach()
    labels = labels.clone()
    few = labels[:, ::8]
    if rows == "few without a class":
        few[few == 2] = 1
    if rows == "few that mislead":
        x[:, ::8] = 3 * torch.nn.functional.one_hot((few + 1) % 3, 4) + 0.1 * x[:, ::8]
    made, hessian = [], _Problem.hessian

    def counted(self, P):
        made.append(P.shape[1])
        return hessian(self, P)

    monkeypatch.setattr(_Problem, "hessian", counted)
    together = fit_logistic_tasks(x, labels, 3, 1000.0)
    assert made.count(labels.shape[1]) <= hessians  # of all rows
    assert (len(few[0]) in made) == (rows != "few without a class")
    for k in range(TASKS):
        alone = fit_logistic(x[k], labels[k], 3, 1000.0, tolerance=1e-14)
        assert torch.allclose(together.logits(x)[k], alone.logits(x[k]), rtol=1e-4, atol=1e-5)


def test_separable_tasks_converge():
    x, labels = problem(6, 3, scale=30.0)
    x = x + 100.0 * torch.nn.functional.one_hot(labels, 6)
    together = fit_logistic_tasks(x, labels, 3, 1000.0)
    for k in range(TASKS):
        alone = fit_logistic(x[k], labels[k], 3, 1000.0, tolerance=1e-13)
        assert torch.allclose(together.weight[k], alone.weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", ["a class is missing", "many features", "constant features"])
def test_what_newton_does_not_take_is_fitted_too(change):
    x, labels = problem(400 if change == "many features" else 4)
    if change == "a class is missing":
        labels = labels.clone()
        labels[1, labels[1] == 2] = 0
    if change == "constant features":
        x[1] = 1.0
    together = fit_logistic_tasks(x, labels, 3, 10.0)
    for k in range(TASKS):
        alone = fit_logistic(x[k], labels[k], 3, 10.0, tolerance=1e-13)
        assert torch.allclose(together.logits(x)[k], alone.logits(x[k]), rtol=1e-3, atol=1e-3)


def test_wrong_input_is_refused():
    x, labels = problem()
    with pytest.raises(ProbeError, match=r"expected \[tasks, N, D\]"):
        fit_logistic_tasks(x[0], labels, 3)
    x[2, 3, 1] = torch.nan
    with pytest.raises(NonFiniteFeatures):
        fit_logistic_tasks(x, labels, 3)


# ---- as outer losses ----

IMAGES = ImageData(
    (torch.arange(80 * 25).view(80, 1, 5, 5) * 53 % 251).byte(), torch.arange(80) % 4, "made"
)
MODEL = lateral_network((1, 5, 5), [3], Activation("sigmoid", 2.0))
LOSSES = {
    "ridge": (partial(RidgeLoss, IMAGES, fit_images=40, outer_images=30), 1e-12),
    "ridge, fewer images than features": (
        partial(RidgeLoss, IMAGES, fit_images=2, outer_images=9), 1e-12),
    "sampled": (partial(SampledProbeLoss, IMAGES, 10.0, images=60), 1e-4),
    "logistic": (partial(ProbeLoss, IMAGES, IMAGES, 10.0, outer_images=30), 1e-4),
}  # fmt: skip


@pytest.mark.parametrize("random_numbers", ["host", "device"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_tasks_are_those_one_by_one(name, random_numbers):
    make, tolerance = LOSSES[name]
    loss = make(random_numbers=random_numbers)
    params = [
        {n: (0.3 * normal(9 + k, TASKS, *s)).detach().requires_grad_()
         for k, (n, s) in enumerate(layer.parameter_shapes().items())}
        for layer in MODEL.layers
    ]  # fmt: skip

    def generators():
        return [torch.Generator().manual_seed(k) for k in range(TASKS)]

    together, numbers = loss.of_tasks(over_tasks(MODEL), params, generators())
    alone = [loss(MODEL, of_task(params, k), g) for k, g in enumerate(generators())]
    expected = torch.stack([one for one, _ in alone])
    assert torch.allclose(together, expected, rtol=tolerance)
    assert [list(row) for row in numbers] == [list(loss.metrics)] * TASKS
    for row, (_, other) in zip(numbers, alone, strict=True):
        assert row == pytest.approx(other, abs=0.03 if name == "logistic" else 1e-12)
    leaves = [t for layer in params for t in layer.values()]
    found, wanted = (torch.autograd.grad(t.sum(), leaves) for t in (together, expected))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=100 * tolerance, atol=tolerance)


def mean_square(model, params, x, labels):
    return model(x, params).square().mean()


@pytest.mark.parametrize("name", [*LOSSES, "function"])
def test_images_drawn_by_counted_numbers_are_others_and_each_only_once(name):
    makers = {n: make for n, (make, _) in LOSSES.items()}
    makers["function"] = partial(FunctionLoss, mean_square, IMAGES, images=30)
    seen = []

    class Seeing(torch.nn.Module):
        def forward(self, x, params):
            seen.append((x[:, 0, 0, 0] * 255).round().tolist())  # tells which image it is
            return MODEL(x, params)

    params = [{n: 0.3 * normal(3, *s) for n, s in layer.parameter_shapes().items()}
              for layer in MODEL.layers]  # fmt: skip
    for random_numbers in ("host", "device"):
        loss = makers[name](random_numbers=random_numbers)
        loss(Seeing(), params, torch.Generator().manual_seed(1))
    drawn = [images for images in seen if len(images) < len(IMAGES)]
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    assert all(len({*images}) == len(images) for images in drawn)
