"""The learned optimiser as a torch.optim.Optimizer."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from learned_optimizer import (
    LearnedOptimizer,
    NonFiniteError,
    Optimizee,
    OptimizerError,
    image_optimizee,
    make_network,
)
from learned_optimizer.networks import log_and_sign


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def batch(seed: int, size: int = 8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def network(kind="lstm", **settings):
    return make_network(kind, 0, hidden=4, **settings).double()


def steps(model, optimizer, count: int, first: int = 0) -> list[float]:
    losses = []
    for k in range(first, first + count):
        x, y = batch(k)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def by_hand(model, own, count: int, lr: float = 1.0) -> None:
    """torch.nn.LSTM's own forward, coordinates as its batch, one tensor after the other."""
    states: dict = {}
    for k in range(count):
        x, y = batch(k)
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for number, (p, g) in enumerate(zip(model.parameters(), gradients, strict=True)):
            inputs = log_and_sign(g.flatten()).t()[None]
            out, states[number] = own.lstm(inputs, states.get(number))
            with torch.no_grad():
                p.add_(own.out_mul * lr * own.output(out)[0, :, 0].view_as(p))


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_steps_are_those_of_torchs_lstm_tensor_by_tensor(lr):
    torch.manual_seed(0)
    model, own = module(), network()
    slow = copy.deepcopy(model)
    steps(model, LearnedOptimizer(model.parameters(), own, lr), 5)
    by_hand(slow, own, 5, lr)
    for ours, expected in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_a_saved_optimizer_goes_on_as_if_it_had_not_been_saved(tmp_path):
    torch.manual_seed(0)
    model, own = module(), network(extra_inputs=["time", "relative_update"])
    optimizer = LearnedOptimizer(model.parameters(), own)
    steps(model, optimizer, 3)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = steps(model, optimizer, 3, 3)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = module()
    other.load_state_dict(weights)
    resumed = LearnedOptimizer(other.parameters(), own)
    resumed.load_state_dict(state)
    assert steps(other, resumed, 3, 3) == expected


def test_the_state_of_another_network_is_refused():
    model = module()
    optimizer = LearnedOptimizer(model.parameters(), network())
    steps(model, optimizer, 1)
    other = LearnedOptimizer(model.parameters(), network(extra_inputs=["time"]))
    state = optimizer.state_dict()
    with pytest.raises(OptimizerError, match="not that of this network"):
        other.load_state_dict(state)
    raw = LearnedOptimizer(model.parameters(), network(preprocess=False))
    with pytest.raises(OptimizerError, match="not that of this network"):
        raw.load_state_dict(state)
    wider = LearnedOptimizer([nn.Parameter(torch.ones(7)) for _ in range(4)], network())
    with pytest.raises(OptimizerError, match="16 rows and 7 columns"):
        wider.load_state_dict(state)
    del state["network"]  # of an older optimiser
    with pytest.raises(OptimizerError, match="17 rows"):
        other.load_state_dict(state)
    LearnedOptimizer(model.parameters(), network(out_mul=0.5)).load_state_dict(state)


def test_the_memory_of_parameters_of_half_precision_is_saved_and_read_unrounded():
    own, model = make_network("lstm", 0, hidden=3), nn.Linear(4, 2).bfloat16()
    optimizer = LearnedOptimizer(model.parameters(), own)
    model(torch.ones(3, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    other = LearnedOptimizer(model.parameters(), own)
    other.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        ours, theirs = (o.state[p]["memory"] for o in (optimizer, other))
        assert torch.equal(ours, theirs) and theirs.dtype == torch.float32
        assert ours.data_ptr() != theirs.data_ptr()  # it changes in place


def test_groups_have_rates_of_their_own_and_schedulers_change_them():
    torch.manual_seed(0)
    model, own = module(), network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = LearnedOptimizer(groups, own)
    still, moving = model[0].weight.clone(), model[2].weight.clone()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps(model, optimizer, 1)
    scheduler.step()
    assert torch.equal(model[0].weight, still) and not torch.equal(model[2].weight, moving)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.5]


def test_a_closure_is_evaluated_and_its_loss_returned():
    model = module()
    optimizer = LearnedOptimizer(model.parameters(), network())

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0)[0]).square().mean()
        loss.backward()
        return loss

    before = model[0].weight.clone()
    assert optimizer.step(closure).item() > 0 and not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("name", ["conv4-3", "relu6bn", "softplus5-4"])
def test_other_modules_are_trained_too(name):
    model = image_optimizee(name, (1, 8, 8), 3).make_module()
    optimizer = LearnedOptimizer(model.parameters(), make_network("mlp", 0))
    x = torch.randn(7, 1, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_parameters_of_half_precision_leave_the_networks_weights_as_they_are():
    own, model = make_network("lstm", 0, hidden=3), nn.Linear(4, 2).bfloat16()
    before = own.output.weight.clone()
    optimizer = LearnedOptimizer(model.parameters(), own)
    for _ in range(2):
        model(torch.ones(3, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert torch.equal(before, own.output.weight) and model.weight.dtype == torch.bfloat16
    assert optimizer.state[model.weight]["memory"].dtype == torch.float32


def test_parameters_without_a_gradient_stay():
    model = module()
    optimizer = LearnedOptimizer(model.parameters(), network())
    model[0](batch(0)[0]).square().mean().backward()
    before = model[2].weight.clone()
    optimizer.step()
    assert torch.equal(before, model[2].weight) and len(optimizer.state) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_stepped_on_a_gradient_that_is_not_finite(bad):
    model = module()
    optimizer = LearnedOptimizer(model.parameters(), network())
    steps(model, optimizer, 1)
    before = [t.clone() for t in (*model.parameters(), optimizer.state[model[0].weight]["memory"])]
    model[2].bias.grad[1] = bad
    with pytest.raises(NonFiniteError):
        optimizer.step()
    after = [*model.parameters(), optimizer.state[model[0].weight]["memory"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_nothing_is_stepped_on_a_gradient_that_overflows_in_the_networks_type(kind):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e200)
    with pytest.raises(NonFiniteError):
        LearnedOptimizer([p], make_network(kind, 0)).step()
    assert torch.equal(p, torch.ones_like(p))


def test_empty_parameters_are_passed_over():
    empty, p = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(3))
    empty.grad, p.grad = torch.ones_like(empty), torch.ones_like(p)
    LearnedOptimizer([empty, p], make_network("lstm", 0)).step()
    assert not torch.equal(p, torch.ones(3))


def test_wrong_input_is_refused():
    with pytest.raises(OptimizerError, match="no parameters"):
        LearnedOptimizer(nn.ReLU().parameters(), network())
    with pytest.raises(OptimizerError, match="no parameters"):
        Optimizee(nn.ReLU)
    with pytest.raises(OptimizerError, match="lr"):
        LearnedOptimizer(module().parameters(), network(), -1.0)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match="dense ones"), warnings.catch_warnings():
        LearnedOptimizer([table.weight], network()).step()
    own = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.complex64)]
    optimizer = LearnedOptimizer(own[:1], network())
    for group, message in (
        ({"params": own[1:]}, "complex"),
        ({"params": []}, "no parameters"),
        ({"params": [nn.Parameter(torch.ones(1))], "lr": -3.0}, "lr"),
    ):
        with pytest.raises(OptimizerError, match=message):
            optimizer.add_param_group(group)
        with pytest.raises(OptimizerError, match=message):
            LearnedOptimizer([{"params": own[:1]}, group], network())
        assert len(optimizer.param_groups) == 1


def reloaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), reloaded,
])  # fmt: skip
def test_a_copy_of_model_and_optimizer_goes_on_with_the_same_steps(copied):
    model, net = module(), network()
    optimizer = LearnedOptimizer(model.parameters(), net)
    steps(model, optimizer, 3)
    twin, twin_optimizer = copied((model, optimizer))
    assert steps(twin, twin_optimizer, 3, 3) == steps(model, optimizer, 3, 3)
    assert twin_optimizer.network is not net
    assert copied(twin_optimizer).state_dict()["network"] == optimizer.state_dict()["network"]


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_counts_its_steps_and_takes_any_gradient(kind, dtype):
    extra = {"extra_inputs": ("time", "relative_update")} if kind == "lstm" else {}
    net = make_network(kind, 0, hidden=4, **extra).to(dtype)
    p = nn.Parameter(torch.zeros(3))
    optimizer = LearnedOptimizer([p], net)
    for k in range(300):
        p.grad = torch.tensor([0.0, 1e-6, 300.0 if k % 2 else -3.0])
        optimizer.step()
    counts = {"lstm": net.state_rows, "mlp": -1}
    assert optimizer.state[p]["memory"][counts[kind]].tolist() == [300.0] * 3
    assert p.isfinite().all()


def test_a_parameter_given_twice_is_refused():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(OptimizerError, match="twice"):
        LearnedOptimizer([p, p], network())
