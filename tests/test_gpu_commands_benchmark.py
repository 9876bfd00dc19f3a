"""benchmarks/gpu_commands.py at tiny sizes on the CPU: rows, checks, and the file of numbers."""

import json

import pytest
import torch
from commands import refused

from benchmarks import gpu_commands


@pytest.fixture(autouse=True)
def few_ways(monkeypatch):
    """Without the large network and the slow estimators; torch's settings are put back."""
    every, mode = gpu_commands.ways, torch.get_deterministic_debug_mode()

    def few(sizes):
        slow = "resnet18", "window, autograd", "window, es"
        return {name: make for name, make in every(sizes).items() if not name[0].startswith(slow)}

    monkeypatch.setattr(gpu_commands, "ways", few)
    yield
    torch.set_deterministic_debug_mode(mode)


def test_the_table_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    gpu_commands.main(["--device", "cpu", "--repeat", "1", "--json", str(path)])
    told = json.loads(path.read_text())
    whats = [row["what"] for row in told["rows"]]
    assert whats == [
        "one pass", "one pass", "vicreg", "vicreg", "window, suffix_sum", "window, suffix_sum",
        "lstm, gradient", "lstm, Hessian product",
    ]  # fmt: skip
    assert len(told["differences"]) == 8 and max(told["differences"].values()) < 1e-12
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(what) for line in lines) for what in whats)


def test_devices_that_disagree_end_with_status_one(monkeypatch):
    monkeypatch.setattr(gpu_commands, "differences", lambda device: {"vicreg": 1e-3})
    monkeypatch.setattr(gpu_commands, "rows", lambda *arguments: iter(()))
    with pytest.raises(SystemExit) as stop:
        gpu_commands.main(["--device", "cpu", "--repeat", "1"])
    assert stop.value.code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_would_run(capsys):
    assert "no CUDA device: --device cpu runs a small version" in refused(capsys, gpu_commands.main)
