"""The real command, small; hypergradients against backpropagation through many iterations."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from commands import kill_at_row, redraw
from torch import nn
from torch.nn.functional import cross_entropy

from experiment import command_line
from experiment.command_line import run_command

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "equilibrium_network.py"
TINY = [
    *(
        "--threads",
        "1",
        "--quiet",
        "--units",
        "20",
        "--train_images",
        "600",
        "--T",
        "8",
        "--K",
        "8",
    ),
    *("--epochs", "3", "--batch_size", "100", "--lr", "0.1"),
]

spec = importlib.util.spec_from_file_location("example_of_equilibrium_network", SCRIPT)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
METHODS = (*example.IMPLICIT, *example.ALONG_ITERATIONS)


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    example.main([*map(str, flags)])


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def small_network(*flags: str, recurrent: bool = True):
    """5 inputs, 6 hidden states, 3 classes; and a batch. In float64."""
    args = example.make_parser().parse_args(["--units", "6", "--spread", "0.3", *flags])
    network = example.Network(args, 5, 3, recurrent, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return network, x, torch.arange(7) % 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_gradient_through_the_iterations(method):
    network, x, labels = small_network("--method", method, "--T", "150", "--K", "150", "--lr", "1")
    before = [w.detach().clone().requires_grad_() for w in network.weights]
    A, B, c, W, b = before
    h = torch.zeros(7, 6, dtype=torch.float64)
    for _ in range(150):
        h = torch.tanh(h @ A + x @ B + c)
    loss = cross_entropy(h @ W + b, labels)
    loss.backward()
    assert network.train_batch(x, labels) == pytest.approx(float(loss.detach()), rel=1e-12)
    for weight, old in zip(network.weights[1:], before[1:], strict=True):
        assert torch.allclose(weight, old.detach() - old.grad, atol=1e-8)
    expected = example.projected(A.detach() - A.grad, 0.99)
    assert torch.allclose(network.weights[0], expected, atol=1e-8)


def test_the_ordinary_network_is_trained_by_backpropagation():
    network, x, labels = small_network(recurrent=False)
    hidden, readout = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()
    model = nn.Sequential(hidden, nn.Tanh(), readout)
    for layer, (w, b) in ((hidden, network.weights[1:3]), (readout, network.weights[3:])):
        layer.weight.data, layer.bias.data = w.detach().T.clone(), b.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        assert network.train_batch(x, labels) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.allclose(network.weights[1], hidden.weight.T, atol=1e-12)
    right = (model(x).argmax(1) == labels).double().mean()
    assert network.judge(x, labels)[1] == pytest.approx(float(right))


def test_projection_cuts_singular_values_and_nothing_else():
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix)
    cut = example.projected(matrix, 0.99)
    assert torch.allclose(cut, u @ s.clamp(max=0.99).diag() @ v)
    assert torch.allclose(example.projected(cut, 0.99), cut)


def test_the_hidden_states_come_to_rest():
    network, x, _ = small_network("--T", "150")
    assert network.distance_from_fixed_point(x) < 1e-12


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without further flags."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run_with_figures(*TINY, "--out", out)
    return out


def test_a_run_learns_and_leaves_its_files(plain):
    results = json.loads((plain / "results.json").read_text())
    assert results["epochs"] == 3 and "600 images" in results["data"]
    for name in example.NETWORKS:
        losses = [float(row[f"{name}/train_loss"]) for row in rows(plain)]
        assert losses[2] < losses[0] and results[f"{name}/test_accuracy"] > 0.3
    assert results["equilibrium/test_loss"] != results["ordinary/test_loss"]
    assert (plain / "figures" / "training.png").stat().st_size > 1000
    redraw(plain)


@pytest.mark.parametrize("flags", [["--T", "2"], ["--K", "1"], ["--radius", "0.1"]], ids=" ".join)
def test_flags_of_the_fixed_point_change_only_the_equilibrium_network(tmp_path, plain, flags):
    run(*TINY, *flags, "--out", tmp_path / "run")
    first, second = rows(plain)[-1], rows(tmp_path / "run")[-1]
    assert first["equilibrium/test_loss"] != second["equilibrium/test_loss"]
    assert first["ordinary/test_loss"] == second["ordinary/test_loss"]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*TINY, "--epochs", "4"]
    run(*flags, "--out", tmp_path / "whole")
    kill_at_row(2, str(SCRIPT), *flags, "--out", tmp_path / "killed")
    assert len(rows(tmp_path / "killed")) == 2
    run("--resume", tmp_path / "killed", "--quiet")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_one_image_trains_a_network_for_all_classes(tmp_path):
    run(*TINY, "--train_images", "1", "--out", tmp_path / "run")
    assert rows(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "CG"], "not symmetric"),
        (["--method", "forward_mode"], "each of its weights"),
        (["--method", "guess"], "guess"),
        (["--radius", "0"], "above 0"),
        (["--T", "0"], "at least 1"),
        (["--train_images", "1000000"], "there are 4000"),
        (["--seed", "9" * 26], "below 2^40"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_command(example.main, [*TINY, *flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_with_status_1(capsys, tmp_path, monkeypatch):
    # tanh bounds the states: only a rate that no flag takes leads out of float32
    monkeypatch.setattr(command_line, "LARGEST", 1e38)
    flags = [*TINY, "--lr", "1e38", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        run_command(example.main, flags)
    assert stop.value.code == 1 and len(capsys.readouterr().err.strip().splitlines()) == 1
