"""benchmarks/gpu_layers.py at tiny sizes on the CPU: rows, checks, the file with the numbers."""

import json

import pytest
import torch
from commands import refused

from benchmarks import gpu_layers
from krotov_hopfield import BioConv2d


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


def test_products_with_patches_are_the_convolutions():
    generator = torch.Generator().manual_seed(0)
    layer = BioConv2d(3, 4, 3, padding=1)
    x = layer._padded(layer._inputs(torch.rand(2, 3, 6, 7, generator=generator)))
    g, rows = layer._respond(x, layer.weight, None), gpu_layers.patches_of(layer, x)
    currents = rows @ layer._weight_rows().t()
    torch.testing.assert_close(currents, g.movedim(1, -1).reshape(-1, 4))
    torch.testing.assert_close(
        layer._as_weight(gpu_layers.contracted(currents, rows)),
        layer._correlate(g, x, layer.weight),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_would_run(capsys):
    assert "no CUDA device: --device cpu runs a small version" in refused(capsys, gpu_layers.main)
