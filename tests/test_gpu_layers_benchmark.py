"""benchmarks/gpu_layers.py at tiny sizes on the CPU: rows, checks, the file with the numbers."""

import json

import pytest
import torch
from commands import refused

from benchmarks import gpu_layers


def test_the_table_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    gpu_layers.main(["--device", "cpu", "--repeat", "1", "--json", str(path)])
    told = json.loads(path.read_text())
    whats = [row["what"] for row in told["rows"]]
    assert whats == [
        *(f"deep, layer {k}" for k in range(1, 6)), "softhebb, all layers",
        "kept features, classifier", "crops and flips, classifier",
    ]  # fmt: skip
    assert len(told["differences"]) == 8 and max(told["differences"].values()) < 1e-12
    assert (told["device"], told["torch"]) == ("cpu", torch.__version__)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(what) for line in lines) for what in whats)


def test_numbers_that_differ_end_with_status_one(monkeypatch):
    monkeypatch.setattr(gpu_layers, "differences", lambda device: {"ranked": 1e-3})
    monkeypatch.setattr(gpu_layers, "measured", lambda sizes, rounds: {})
    with pytest.raises(SystemExit) as stop:
        gpu_layers.main(["--device", "cpu", "--repeat", "1"])
    assert stop.value.code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_would_run(capsys):
    assert "no CUDA device: --device cpu runs a small version" in refused(capsys, gpu_layers.main)
