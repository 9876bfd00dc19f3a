"""Closed-form and torch.func objectives against autograd on one run after the other."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from one_pass import (
    Batch,
    CompiledMLPObjective,
    MLPObjective,
    ModuleObjective,
    OnePassError,
)


def generators(runs):
    return [torch.Generator().manual_seed(number) for number in range(runs)]


def samples(sizes, loss, rows, runs, shared, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = (rows,) if shared else (runs, rows)
    inputs = torch.randn(*lead, sizes[0], generator=generator, dtype=torch.float64)
    if loss == "mse":
        targets = torch.randn(*lead, sizes[-1], generator=generator, dtype=torch.float64)
    else:
        targets = torch.randint(sizes[-1], lead, generator=generator)
    return Batch(inputs, targets, shared)


def obvious_loss(sizes, loss, flat, inputs, targets):
    """The network written out for one run."""
    start, value = 0, inputs
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        middle = start + fan_in * fan_out
        value = value @ flat[start:middle].view(fan_in, fan_out) + flat[middle : middle + fan_out]
        value = value if layer == len(sizes) - 2 else value.relu()
        start = middle + fan_out
    losses = {"mse": nn.functional.mse_loss, "cross_entropy": nn.functional.cross_entropy}
    return losses[loss](value, targets)


def obvious(sizes, loss, weights, batch, vectors):
    """Loss, gradient and Hessian product of every run by double backward."""
    found = []
    for run, flat in enumerate(weights):
        flat = flat.clone().requires_grad_()
        inputs, targets = ((t if batch.shared else t[run]) for t in (batch.inputs, batch.targets))
        value = obvious_loss(sizes, loss, flat, inputs, targets)
        (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
        (product,) = torch.autograd.grad(gradient, flat, vectors[run])
        found.append((value.detach(), gradient.detach(), product))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    loss=st.sampled_from(["mse", "cross_entropy"]),
    rows=st.integers(1, 6),
    runs=st.integers(1, 3),
    shared=st.booleans(),
)
def test_an_mlp_has_the_gradient_and_curvature_of_double_backward(sizes, loss, rows, runs, shared):
    objective = MLPObjective(tuple(sizes), loss)
    weights, buffers = objective.initial(generators(runs))
    batch = samples(sizes, loss, rows, runs, shared)
    vectors = torch.randn(weights.shape, dtype=torch.float64)
    found = objective.linearize(weights, buffers, batch)
    expected = obvious(sizes, loss, weights, batch, vectors)
    for ours, theirs in zip(
        (found.loss, found.gradient, found.hessian_product(vectors)), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_loops_agree_with_the_matrix_products(dtype):
    sizes, runs = (3, 7, 1), 5
    plain, compiled = MLPObjective(sizes, "mse"), CompiledMLPObjective(sizes, "mse")
    weights = plain.initial(generators(runs))[0].to(dtype)
    batch = samples(sizes, "mse", 11, runs, shared=True)
    batch = Batch(batch.inputs.to(dtype), batch.targets.to(dtype), shared=True)
    ours, theirs = (o.linearize(weights, {}, batch) for o in (compiled, plain))
    vectors = torch.randn_like(weights)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    close = {"rtol": tolerance, "atol": tolerance}
    assert torch.allclose(ours.loss, theirs.loss, **close)
    assert torch.allclose(ours.gradient, theirs.gradient, **close)
    assert torch.allclose(ours.hessian_product(vectors), theirs.hessian_product(vectors), **close)


THREADS = """
import torch
from one_pass import Batch, CompiledMLPObjective
torch.set_num_threads(1)
batch = Batch(torch.ones(3, 3), torch.ones(3, 1), shared=True)
CompiledMLPObjective((3, 7, 1), "mse").linearize(torch.ones(2, 36), {}, batch)
print(torch.get_num_threads())
"""


def test_the_first_compiled_loop_leaves_the_number_of_threads():
    free = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    said = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=free, capture_output=True, text=True
    )
    assert said.stdout == "1\n", said.stderr


def test_a_compiled_run_that_diverged_stays_nan_and_spoils_no_other():
    objective = CompiledMLPObjective((3, 7, 1), "mse")
    weights = objective.initial(generators(2))[0]
    weights[0] = float("nan")
    found = objective.linearize(weights, {}, samples((3, 7, 1), "mse", 6, 2, shared=True))
    assert found.loss[0].isnan() and found.gradient[0].isnan().any()
    assert found.loss[1].isfinite() and found.gradient[1].isfinite().all()


TORCH_LOSSES = {"mse": "mse_loss", "cross_entropy": "cross_entropy"}


def batch_norm_network():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_module_has_the_gradient_and_curvature_of_double_backward(shared, loss):
    network = batch_norm_network().double()
    objective = ModuleObjective(network, loss)
    weights, buffers = objective.initial(generators(2))
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    batch = samples((4, 3), loss, 6, 2, shared)
    vectors = torch.randn_like(weights)
    found = objective.linearize(weights, buffers, batch)
    product = found.hessian_product(vectors)
    for run in range(2):
        flat = weights[run].clone().requires_grad_()
        shapes = [p.shape for p in network.parameters()]
        parts = flat.split([s.numel() for s in shapes])
        named = {
            name: part.view(shape)
            for (name, _), part, shape in zip(
                network.named_parameters(), parts, shapes, strict=True
            )
        }
        network.train()
        inputs, targets = (t if shared else t[run] for t in (batch.inputs, batch.targets))
        own = {name: buffer[run].clone() for name, buffer in buffers.items()}
        value = getattr(nn.functional, TORCH_LOSSES[loss])(
            functional_call(network, {**named, **own}, (inputs,)), targets
        )
        (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
        (expected,) = torch.autograd.grad(gradient, flat, vectors[run])
        assert torch.allclose(found.loss[run], value)
        assert torch.allclose(found.gradient[run], gradient)
        assert torch.allclose(product[run], expected)
        assert torch.allclose(found.buffers["1.running_mean"][run], own["1.running_mean"])


def test_targets_of_another_shape_than_the_outputs_are_refused():
    objective = ModuleObjective(nn.Linear(4, 1).double(), "mse")
    weights, buffers = objective.initial(generators(2))
    batch = Batch(torch.randn(6, 4).double(), torch.randn(6).double(), shared=True)
    for judge, seen in (
        (objective.linearize, [batch]),
        (objective.held_out, [batch]),
        (objective.evaluate, [batch.inputs, batch.targets]),
    ):
        with pytest.raises(OnePassError, match=r"gives \(6, 1\) for targets \(6,\)"):
            judge(weights, buffers, *seen)


def quarter_power(outputs, targets):
    """A loss of one's own, with a curvature that depends on the outputs."""
    return (1 + (outputs - targets).square()).sqrt().sqrt().sum()


def test_a_loss_that_is_a_function_has_the_curvature_of_double_backward(monkeypatch):
    network = batch_norm_network().double()
    objective = ModuleObjective(network, quarter_power)
    weights, buffers = objective.initial(generators(3))
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    batch = samples((4, 3), "mse", 6, 3, shared=True)
    vectors = torch.randn_like(weights)
    found = objective.linearize(weights, buffers, batch)
    product = found.hessian_product(vectors)
    monkeypatch.setattr("one_pass.objectives.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("one_pass.objectives.RUNS_AT_ONCE", 2)
    judged = objective.evaluate(weights, buffers, batch.inputs, batch.targets)
    held_out = objective.held_out(weights, buffers, batch)
    assert not objective.classifies and not judged.accuracy.any()
    for run in range(3):
        network.load_state_dict(objective.state_dict(weights, buffers, run))
        trained = [*network.parameters()]
        value = quarter_power(network.train()(batch.inputs), batch.targets)
        gradient = torch.autograd.grad(value, trained, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])
        curved = torch.autograd.grad(flat @ vectors[run], trained)
        assert torch.allclose(found.loss[run], value)
        assert torch.allclose(found.gradient[run], flat)
        assert torch.allclose(product[run], torch.cat([g.flatten() for g in curved]))
        network.load_state_dict(objective.state_dict(weights, buffers, run))
        value = quarter_power(network.eval()(batch.inputs), batch.targets)
        assert torch.allclose(judged.loss[run], value) and torch.allclose(held_out.loss[run], value)


@pytest.mark.parametrize("loss", ["mse_loss", "huber_loss"])
def test_a_loss_that_torch_cannot_differentiate_twice_is_refused(loss):
    objective = ModuleObjective(nn.Linear(4, 3), getattr(nn.functional, loss))
    weights, buffers = objective.present(2)
    batch = Batch(torch.randn(6, 4), torch.randn(6, 3), shared=True)
    found = objective.linearize(weights, buffers, batch)
    with pytest.raises(OnePassError, match="cannot differentiate this loss twice") as refused:
        found.hessian_product(weights)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("loss, message", [
    (lambda outputs, targets: (outputs > targets).sum(), "the loss gives torch.int64"),
    (lambda outputs, targets: outputs.mean() if outputs.sum().item() else targets.mean(),
     "it is mapped over the runs"),
])  # fmt: skip
def test_a_loss_that_cannot_be_differentiated_for_all_runs_is_refused(loss, message):
    objective = ModuleObjective(nn.Linear(4, 3), loss)
    batch = Batch(torch.randn(6, 4), torch.randn(6, 3), shared=True)
    with pytest.raises(OnePassError, match=message):
        objective.linearize(*objective.present(2), batch)


def test_a_loss_that_gives_no_number_is_refused():
    objective = ModuleObjective(nn.Linear(4, 3), lambda outputs, targets: outputs - targets)
    weights, buffers = objective.present(2)
    inputs, targets = torch.randn(6, 4), torch.randn(6, 3)
    for judge, seen in (
        (objective.linearize, [Batch(inputs, targets, shared=True)]),
        (objective.evaluate, [inputs, targets]),
    ):
        with pytest.raises(OnePassError, match=r"the loss gives \(6, 3\)"):
            judge(weights, buffers, *seen)


@pytest.mark.parametrize("make", [
    lambda: MLPObjective((4, 5, 1), "mse"),
    lambda: CompiledMLPObjective((4, 5, 1), "mse"),
    lambda: ModuleObjective(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), "mse"),
])  # fmt: skip
def test_types_that_do_not_go_together_are_told_in_one_line(make):
    objective = make()
    weights, buffers = objective.initial(generators(2))
    inputs, targets = torch.randn(6, 4), torch.randn(6, 1)
    for judge, seen in (
        (objective.linearize, [Batch(inputs, targets, shared=True)]),
        (objective.held_out, [Batch(inputs, targets, shared=True)]),
        (objective.evaluate, [inputs, targets]),
    ):
        with pytest.raises(OnePassError, match="differ: weights float64, inputs float32; ") as told:
            judge(weights, buffers, *seen)
        assert "\n" not in str(told.value)
        assert told.value.__suppress_context__ or told.value.__context__ is None
    objective.linearize(weights.float(), buffers, Batch(inputs, targets, shared=True))


def test_a_buffer_of_another_type_is_named():
    objective = ModuleObjective(batch_norm_network(), "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    with pytest.raises(OnePassError, match=r"weights float64, 1\.running_mean float32"):
        objective.linearize(weights, buffers, samples((4, 3), "cross_entropy", 6, 2, shared=True))


class Tied(nn.Module):
    """A layer that comes twice, one with its weights, a frozen one, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.norm, self.again, self.second = nn.BatchNorm1d(3), self.first, nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.last(self.second(self.again(self.norm(self.first(x)) * self.scale)))


def test_the_weights_of_a_run_are_loaded_back_into_the_module():
    torch.manual_seed(0)
    network, other = Tied(), Tied()
    objective = ModuleObjective(network, "mse")
    weights, buffers = objective.present(2)
    assert weights.shape == (2, 12 + 3 + 3 + 3)
    before, inputs, targets = network.state_dict(), torch.randn(6, 3), torch.randn(6, 3)
    for key, entry in objective.state_dict(weights, buffers, 1).items():
        assert torch.equal(entry, before[key])
    weights = weights + torch.tensor([[0.1], [0.2]])
    buffers = objective.linearize(weights, buffers, Batch(inputs, targets, shared=True)).buffers
    entries = objective.state_dict(weights, buffers, 1)
    other.load_state_dict(entries)
    loss = (other.eval()(inputs) - targets).square().mean()
    assert torch.allclose(objective.evaluate(weights, buffers, inputs, targets).loss[1], loss)
    assert torch.equal(other.second.weight, network.first.weight + 0.2)
    assert torch.equal(other.last.weight, network.last.weight)
    assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())
    weights.zero_()
    assert torch.equal(entries["first.weight"], network.first.weight + 0.2)


def test_validation_leaves_the_statistics_of_batch_norm_alone():
    objective = ModuleObjective(batch_norm_network(), "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    weights = weights.float()
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    batch = samples((4, 3), "cross_entropy", 6, 2, shared=True)
    inputs = batch.inputs.float()
    objective.held_out(weights, buffers, Batch(inputs, batch.targets, shared=True))
    objective.evaluate(weights, buffers, inputs, batch.targets)
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    trained = objective.linearize(weights, buffers, Batch(inputs, batch.targets, shared=True))
    assert not torch.equal(trained.buffers["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_an_evaluation_in_pieces_is_the_mean_over_all(loss, monkeypatch):
    monkeypatch.setattr("one_pass.objectives.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("one_pass.objectives.RUNS_AT_ONCE", 2)
    sizes = (3, 4, 2)
    objective = MLPObjective(sizes, loss)
    weights, _ = objective.initial(generators(3))
    batch = samples(sizes, loss, 11, 3, shared=True)
    found = objective.evaluate(weights, {}, batch.inputs, batch.targets)
    expected = [obvious_loss(sizes, loss, w, batch.inputs, batch.targets) for w in weights]
    assert torch.allclose(found.loss, torch.stack(expected))
    assert (found.accuracy >= 0).all() and (found.accuracy <= 1).all()


def test_a_run_starts_the_same_whatever_runs_are_beside_it():
    for objective in (MLPObjective((3, 4, 2), "mse"), ModuleObjective(batch_norm_network(), "mse")):
        together = objective.initial(generators(3))[0]
        alone = objective.initial(generators(3)[2:])[0]
        assert torch.equal(together[2:], alone)


class Frozen(nn.Sequential):
    """A frozen layer and a batch norm whose statistics are frozen, before a layer that learns."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        self[0].requires_grad_(False)
        self[1].eval()


def test_frozen_parameters_stay_and_belong_to_no_run():
    network = Frozen().double()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    objective = ModuleObjective(network, "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    assert weights.shape == (2, 5 + 5 + 15 + 3)
    batch = samples((4, 3), "cross_entropy", 6, 2, shared=True)
    found = objective.linearize(weights, buffers, batch)
    objective.evaluate(weights, buffers, batch.inputs, batch.targets)
    objective.held_out(weights, buffers, batch)
    again = objective.linearize(weights, buffers, batch)
    assert network.training and not network[1].training and torch.equal(found.loss, again.loss)
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(network.state_dict()[name], before[name])
    assert all(torch.equal(found.buffers[name], buffer) for name, buffer in buffers.items())
    for run, flat in enumerate(weights):
        gamma, beta, weight, bias = flat.split([5, 5, 15, 3])
        hidden = nn.functional.linear(batch.inputs, before["0.weight"], before["0.bias"])
        hidden = (hidden / (1 + 1e-5) ** 0.5 * gamma + beta).relu()
        value = nn.functional.cross_entropy(hidden @ weight.view(3, 5).T + bias, batch.targets)
        assert found.loss[run].item() == pytest.approx(value.item(), rel=1e-12)


def test_random_numbers_in_training_are_refused():
    batch = samples((4, 3), "cross_entropy", 6, 2, shared=True)
    network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    objective = ModuleObjective(network, "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    with pytest.raises(OnePassError, match="draws random numbers"):
        objective.linearize(weights, buffers, batch)
    objective.held_out(weights, buffers, batch)
    network[1].p = 0.0
    objective.linearize(weights, buffers, batch)


def test_five_training_steps_move_the_statistics_five_times():
    objective = ModuleObjective(batch_norm_network().double(), "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    batch = samples((4, 3), "cross_entropy", 6, 2, shared=True)
    for _ in range(5):
        found = objective.linearize(weights, buffers, batch)
        found.hessian_product(weights)
        objective.held_out(weights, found.buffers, batch)
        buffers = found.buffers
    assert buffers["1.num_batches_tracked"].tolist() == [5, 5]
    assert int(objective.module[1].num_batches_tracked) == 0


@pytest.mark.parametrize("make, message", [
    (lambda: MLPObjective((3, 1), "hinge"), "loss 'hinge' is unknown"),
    (lambda: MLPObjective((3,), "mse"), "sizes are at least two"),
    (lambda: MLPObjective((3, 0, 1), "mse"), "sizes are at least two"),
    (lambda: CompiledMLPObjective((3, 4, 2), "mse"), "take MLPObjective"),
    (lambda: CompiledMLPObjective((3, 4, 1), "cross_entropy"), "take MLPObjective"),
    (lambda: ModuleObjective(nn.Linear(2, 2), "hinge"), "loss 'hinge' is unknown"),
    (lambda: ModuleObjective(nn.Linear(2, 2).requires_grad_(False), "mse"), "no parameters"),
])  # fmt: skip
def test_what_an_objective_cannot_be_made_of_is_refused(make, message):
    with pytest.raises(OnePassError, match=message):
        make()


def test_another_default_device_leaves_draws_where_their_generators_are():
    objective = MLPObjective((3, 4, 1), "mse")
    expected = objective.initial(generators(2))[0]
    with torch.device("meta"):
        assert torch.equal(objective.initial(generators(2))[0], expected)
