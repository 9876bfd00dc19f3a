"""Files of learned optimisers: our own, and those of the original program."""

import json
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from learned_optimizer import (
    CoordinateLSTM,
    LearnedOptimizer,
    OptimizerError,
    load_network,
    make_network,
    save_network,
)
from learned_optimizer.saved_optimizers import TRAINED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("lstm", {"hidden": 3, "extra_inputs": ["time"]}), ("lstm", {"preprocess": False}),
     ("mlp", {"hidden": 5, "out_mul": 0.02})],
)  # fmt: skip
def test_a_saved_network_reads_back_exactly(tmp_path, kind, settings, dtype):
    network = make_network(kind, 7, **settings).to(dtype)
    with torch.no_grad():
        next(network.parameters()).mul_(1 / 3)
    network.out_mul = 0.5
    save_network(network, tmp_path / "optimizer.json")
    back = load_network(tmp_path / "optimizer.json")
    assert back.settings == network.settings and back.kind == kind and back.out_mul == 0.5
    for ours, theirs in zip(network.parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, theirs) and theirs.dtype == dtype


def test_a_file_that_tells_no_type_is_of_float32(tmp_path):
    path = tmp_path / "optimizer.json"
    save_network(CoordinateLSTM(3), path)
    description = json.loads(path.read_text())
    del description["dtype"]
    path.write_text(json.dumps(description))
    assert load_network(path).output.weight.dtype == torch.float32


def spoil(description: dict, how: str) -> str:
    if how == "no json":
        return "{"
    if how == "other shapes":
        description["settings"]["hidden"] = 4
    if how == "other kind":
        description["kind"] = "gru"
    if how == "other type":
        description["dtype"] = "int8"
    if how == "no weights":
        del description["weights"]
    if how == "no table":
        return "[1]"
    if how == "nested":
        return 10**5 * "["
    if how == "many units":
        description["settings"]["hidden"] = 10**9
    if how == "units beyond floats":
        description["settings"]["hidden"] = 10**400
    if how == "factor beyond floats":
        description["settings"]["out_mul"] = 10**400
    if how == "weight beyond floats":
        description["weights"]["output.bias"] = [10**400]
    if how == "not finite":
        description["weights"]["output.bias"] = [math.nan]
    return json.dumps(description)


@pytest.mark.parametrize(
    "how",
    ["no json", "other shapes", "other kind", "other type", "no weights", "no table", "not finite",
     "nested", "many units", "units beyond floats", "factor beyond floats", "weight beyond floats"],
)  # fmt: skip
def test_a_file_that_is_no_such_optimiser_is_refused_in_one_line(tmp_path, how):
    path = tmp_path / "optimizer.json"
    save_network(CoordinateLSTM(3), path)
    path.write_text(spoil(json.loads(path.read_text()), how))
    with pytest.raises(OptimizerError):
        load_network(path)


# ---- the trained one of the package ----


def loss_on_digits(make, seed: int) -> float:
    """The training loss of a small network on sklearn's digits, the mean of steps 191 to 200."""
    torch.manual_seed(seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer, losses = make(model.parameters()), []
    for _ in range(200):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x[rows]), y[rows]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses[-10:]).mean().item()


def test_the_trained_optimiser_beats_adam_of_rate_001_on_data_that_it_never_saw():
    network = load_network("relu20")
    for seed in range(2):
        ours = loss_on_digits(lambda p: LearnedOptimizer(p, network), seed)
        assert ours < 0.8 * loss_on_digits(lambda p: torch.optim.Adam(p, 0.01), seed)


def test_a_file_goes_before_the_trained_optimiser_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(CoordinateLSTM(3), "relu20")
    assert load_network("relu20").kind == "lstm"
    with pytest.raises(OptimizerError, match="cannot read"):
        load_network(tmp_path / "other" / "relu20")


def test_trained_optimisers_are_small_and_tell_their_command():
    for path in TRAINED.glob("*.json"):
        description = json.loads(path.read_text())
        assert path.stat().st_size < 100_000 and load_network(path.stem).settings
        assert description["command"].startswith("python learn_to_optimize.py")


# ---- the original's files: written by classes of its names and attributes ----


class TheirOptimizer(nn.Module):
    """Its optimiser, whose preprocessing is written as a loop."""

    __module__, __qualname__ = "l2o.optimizer", "Optimizer"

    def __init__(self, preproc: bool, factor: float, hidden: int = 20) -> None:
        super().__init__()
        self.recurs = nn.LSTMCell(1 + preproc, hidden)
        self.recurs2 = nn.LSTMCell(hidden, hidden)
        self.output = nn.Linear(hidden, 1)
        self.preproc, self.factor = preproc, factor

    def inputs(self, g: Tensor) -> Tensor:
        def of(x: float) -> tuple[float, float]:
            if abs(x) >= math.exp(-self.factor):
                return math.log(abs(x) + 1e-8) / self.factor, math.copysign(1, x)
            return -1.0, math.exp(self.factor) * x

        return torch.tensor([of(x) if self.preproc else [x] for x in g.tolist()])

    def updates(self, gradients: list[Tensor]) -> list[Tensor]:
        first = second = None
        updates = []
        for g in gradients:
            first = self.recurs(self.inputs(g), first)
            second = self.recurs2(first[0], second)
            updates.append(self.output(second[0])[:, 0])
        return updates


def some_function() -> None:
    """Stands for what a configuration names."""


@pytest.fixture
def their_module(monkeypatch):
    module = ModuleType("l2o.optimizer")
    module.Optimizer, module.regularize = TheirOptimizer, some_function
    monkeypatch.setattr(some_function, "__module__", "l2o.optimizer")
    monkeypatch.setattr(some_function, "__qualname__", "regularize")
    for name in ("l2o", "l2o.optimizer"):
        monkeypatch.setitem(sys.modules, name, module)


def their_file(path, network: TheirOptimizer, **config) -> None:
    """What meta_train.py saves."""
    config = {"opter_cls": TheirOptimizer, "opter_config": config,
              "meta_training": {"optee_updates_lr": 0.3, "reg": some_function}}  # fmt: skip
    metrics = [{"meta_training": {"train_loss": {"sum": np.sum([1.0]), "last": np.float64(2)}},
                "curve": np.arange(3.0)}]  # fmt: skip
    content = {"state_dict": network.state_dict(), "config": config, "loss": 1.5}
    torch.save(content | {"metrics": metrics}, path)


@pytest.mark.parametrize(("preproc", "factor"), [(True, 10.0), (True, 5.0), (False, 10.0)])
def test_the_originals_optimiser_makes_the_steps_it_made_there(
    tmp_path, their_module, preproc, factor
):
    torch.manual_seed(0)
    theirs, path = TheirOptimizer(preproc, factor, 7), tmp_path / "l2o_optimizer.pt"
    their_file(path, theirs, preproc=preproc, preproc_factor=factor, additional_inp_dim=0)
    p = nn.Parameter(torch.zeros(6))
    optimizer = LearnedOptimizer([p], load_network(path))
    gradients = [torch.randn(6) * 10.0 ** torch.arange(-6, 0) for _ in range(4)]
    expected = torch.zeros(6)
    for g, u in zip(gradients, theirs.updates(gradients), strict=True):
        p.grad = g
        optimizer.step()
        expected = expected + 0.3 * u.detach()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_the_originals_checkpoints_and_bare_weights_are_read_too(tmp_path, their_module):
    weights = TheirOptimizer(True, 10.0).state_dict()
    for content in (weights, {"best_opter": weights, "best_loss": np.float64(1), "metrics": []}):
        torch.save(content, tmp_path / "40.pt")
        network = load_network(tmp_path / "40.pt")
        assert torch.equal(network.lstm.weight_hh_l1, weights["recurs2.weight_hh"])
        assert network.out_mul == 0.1


def test_the_originals_optimisers_with_other_inputs_and_other_files_are_refused(
    tmp_path, their_module
):
    their_file(tmp_path / "time.pt", TheirOptimizer(True, 10.0), additional_inp_dim=1)
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name, message in (("time", "additional_inp_dim 0"), ("other", "no learned optimiser"),
                          ("tensor", "no learned optimiser")):  # fmt: skip
        with pytest.raises(OptimizerError, match=message):
            load_network(tmp_path / f"{name}.pt")
