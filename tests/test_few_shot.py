"""Networks of tasks against one network at a time; implicit gradients against dense Hessians."""

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d, relu

from comparison import few_shot
from comparison.few_shot import (
    DOWNSAMPLING,
    METHODS,
    Adaptation,
    ConvolutionalNetworks,
    Points,
    by_groups,
    by_patches,
    conjugate_gradients,
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=random(seed), dtype=torch.float64)


@pytest.fixture
def narrow(monkeypatch):
    """Networks of three filters a layer, of some hundred weights."""
    monkeypatch.setattr(few_shot, "CHANNELS", 3)


def tasks(count: int = 3, ways: int = 4, shots: int = 2) -> tuple[Points, Points]:
    labels = torch.arange(ways).repeat_interleave(shots).expand(count, -1)
    x = normal(2, count, ways * shots, 1, 28, 28, seed=5)
    return Points(x[0], labels), Points(x[1], labels)


def theta_of(network: ConvolutionalNetworks) -> Tensor:
    """Initial weights with a linear layer that is not 0."""
    theta = network.initial(random()).double()
    return theta + 0.1 * normal(*theta.shape, seed=1)


def plain_logits(network: ConvolutionalNetworks, w: Tensor, x: Tensor) -> Tensor:
    """One network on points [n, 1, 28, 28], in the usual functions."""
    parts, start = [], 0
    for shape in network.shapes:
        size = torch.Size(shape).numel()
        parts.append(w[start : start + size].view(shape))
        start += size
    pooled = network.downsampling == "pool"
    for filters, gain, shift in zip(parts[:-2:3], parts[1:-2:3], parts[2:-2:3], strict=True):
        kernels = filters.view(len(filters), -1, 3, 3)
        y = conv2d(x, kernels, stride=1 if pooled else 2, padding=1)
        mean = y.mean((0, 2, 3), keepdim=True)
        deviation = ((y - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        y = relu((y - mean) / deviation * gain[:, None, None] + shift[:, None, None])
        x = max_pool2d(y, 2) if pooled else y
    return linear(x.flatten(1), parts[-2], parts[-1])


def plain_loss(network, w: Tensor, points: Points, task: int) -> Tensor:
    return cross_entropy(plain_logits(network, w, points.x[task]), points.labels[task])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 14])
def test_convolutions_of_tasks_are_those_of_each_task(stride, side):
    x, filters = normal(3, 2, 5, side, side), normal(3, 4, 18, seed=1)

    def one(points: Tensor, kernels: Tensor) -> Tensor:
        y = conv2d(points.transpose(0, 1), kernels.view(4, 2, 3, 3), stride=stride, padding=1)
        return y.transpose(0, 1)

    expected = vmap(one)(x, filters)
    for way in (by_patches, by_groups):
        assert torch.allclose(way(x, filters, stride), expected, atol=1e-12), way


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
@pytest.mark.parametrize("way", [by_patches, by_groups])
def test_logits_are_those_of_each_network_alone(monkeypatch, narrow, downsampling, way):
    monkeypatch.setattr(few_shot, "convolved", way)
    network, (support, _) = ConvolutionalNetworks(4, downsampling), tasks()
    w = theta_of(network) + 0.1 * normal(3, 1, seed=2)
    found = network.logits(w, support.x)
    for task in range(3):
        expected = plain_logits(network, w[task], support.x[task])
        assert torch.allclose(found[task], expected, atol=1e-10)


@pytest.mark.parametrize(("downsampling", "features"), [("pool", 64), ("stride", 256)])
def test_the_network_has_the_published_sizes_and_begins_without_an_opinion(downsampling, features):
    network, (support, _) = ConvolutionalNetworks(5, downsampling), tasks(2, 5, 1)
    assert network.shapes[-2] == (5, features) and network.shapes[3] == (64, 64 * 9)
    theta = network.initial(random())
    logits = network.logits(theta.expand(2, -1), support.x.float())
    assert logits.shape == (2, 5, 5) and not logits.any()


def test_adaptation_is_gradient_descent_of_each_task_with_the_pull(narrow):
    network, (support, queries) = ConvolutionalNetworks(4), tasks()
    theta, adaptation = theta_of(network), Adaptation(network, 3, 0.05, 2.0)
    found = adaptation.adapted(theta, support)
    scores = adaptation.accuracies_over_steps(theta, support, queries)
    assert scores.shape == (3, 4)
    for task in range(3):
        w = theta
        for step in range(4):
            answers = plain_logits(network, w, queries.x[task]).argmax(1)
            right = (answers == queries.labels[task]).double().mean()
            assert float(scores[task, step]) == pytest.approx(float(right))
            if step < 3:
                w = w.detach().requires_grad_()
                loss = plain_loss(network, w, support, task) + (w - theta).square().sum()
                w = w - 0.05 * torch.autograd.grad(loss, w)[0]
        assert torch.allclose(found[task], w, atol=1e-10)


@pytest.mark.parametrize(("downsampling", "way"), [("stride", by_groups), ("pool", by_patches)])
def test_the_implicit_gradient_solves_with_the_dense_hessian_of_each_task(
    monkeypatch, narrow, downsampling, way
):
    monkeypatch.setattr(few_shot, "convolved", way)
    network, (support, queries) = ConvolutionalNetworks(4, downsampling), tasks(2)
    theta, pull, damping = theta_of(network), 20.0, 10.0
    adaptation = Adaptation(network, 2, 0.01, pull, damping, 200)
    found, w = adaptation.meta_gradient(theta, support, queries), adaptation.adapted(theta, support)
    total = torch.zeros_like(theta)
    for task in range(2):
        of = w[task].detach()
        hessian = torch.autograd.functional.hessian(
            lambda v, task=task: plain_loss(network, v, support, task), of
        )
        of.requires_grad_()
        loss = plain_loss(network, of, queries, task)
        slope = torch.autograd.grad(loss, of)[0]
        assert float(found.losses[task]) == pytest.approx(float(loss.detach()))
        total += torch.linalg.solve(torch.eye(len(theta)) + hessian / (pull + damping), slope) / 2
    assert not found.ended_early.any() and float(found.residuals.max()) < 1e-8
    assert torch.allclose(found.gradient, total, atol=1e-8 * float(total.norm()))


def test_the_first_order_gradient_is_that_of_the_queries_at_the_adapted_weights(narrow):
    network, (support, queries) = ConvolutionalNetworks(4), tasks()
    theta, adaptation = theta_of(network), Adaptation(network, 2, 0.05, 2.0, method="first_order")
    slopes = adaptation.gradient(adaptation.adapted(theta, support), queries)[0]
    found = adaptation.meta_gradient(theta, support, queries)
    assert torch.equal(found.gradient, slopes.mean(0))


@pytest.mark.parametrize("method", METHODS)
def test_descent_along_each_gradient_lowers_the_query_losses_at_each_step(narrow, method):
    network, (support, queries) = ConvolutionalNetworks(4), tasks()
    theta, adaptation = theta_of(network), Adaptation(network, 4, 0.05, 2.0, 22.0, 5, method)
    losses = []
    for _ in range(8):
        found = adaptation.meta_gradient(theta, support, queries)
        losses.append(float(found.losses.mean()))
        theta = theta - 0.05 * found.gradient
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_conjugate_gradients_solve_each_system_and_end_at_negative_curvature():
    root, b = normal(4, 6, 6), normal(4, 6, seed=1)
    systems = root @ root.transpose(1, 2) + torch.eye(6)
    systems[1] = -systems[1]
    systems[2] = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, -0.5]).double())
    solution = conjugate_gradients(lambda v: torch.einsum("sij,sj->si", systems, v), b, 8)
    for good in (0, 3):
        assert torch.allclose(solution.x[good], torch.linalg.solve(systems[good], b[good]))
    assert torch.equal(solution.x[1], b[1])
    assert solution.ended_early.tolist()[1:3] == [1.0, 1.0]
    assert solution.x.isfinite().all() and float(solution.residuals[[0, 3]].max()) < 1e-8


def test_conjugate_gradients_that_have_converged_stay_where_they_are():
    b = normal(2, 3)
    solution = conjugate_gradients(lambda v: 2 * v, b, 50)
    assert torch.allclose(solution.x, b / 2) and solution.x.isfinite().all()
