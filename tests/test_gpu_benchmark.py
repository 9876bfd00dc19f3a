"""benchmarks/gpu.py at tiny sizes on the CPU: rows, checks, and the file with the numbers."""

import json
from dataclasses import replace

import pytest
import torch
from commands import refused

from benchmarks import gpu


def test_the_table_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    gpu.main(["--device", "cpu", "--repeat", "1", "--json", str(path)])
    told = json.loads(path.read_text())
    whats = [row["what"] for row in told["rows"]]
    assert whats == [
        *(
            f"{kind}, {way}"
            for kind in gpu.KINDS
            for way in ("one by one", "together", "replayed", "together", "replayed")
        ),
        "meta-step, cubic", "meta-step, pairs", "probe", "classifier, a step", "images",
        *(f"views, {kind}{way}" for kind in gpu.BENCHMARKED_VIEWS for way in ("", ", recorded")),
    ]  # fmt: skip
    ways = {
        f"hypergradients, {kind}, {way}"
        for kind in gpu.KINDS
        for way in ("one_by_one", "together", "replayed")
    }
    ways |= {f"meta-steps, numbers of the {numbers}" for numbers in ("host", "device")}
    assert set(told["differences"]) == ways | {"views", "views_recorded"}
    assert max(told["differences"].values()) < 1e-12
    assert (told["device"], told["torch"]) == ("cpu", torch.__version__)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(what) for line in lines) for what in whats)


def test_rows_for_which_no_time_is_left_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, seconds=0.0))
    gpu.main(["--device", "cpu", "--repeat", "1"])
    assert "the other rows are left out" in capsys.readouterr().out


def test_devices_that_disagree_end_with_status_one(monkeypatch):
    monkeypatch.setattr(gpu, "differences", lambda *arguments: {"together": 1e-3})
    monkeypatch.setattr(gpu, "update_rows", lambda *arguments: iter(()))
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, seconds=0.0))
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--repeat", "1"])
    assert stop.value.code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_would_run(capsys):
    assert "no CUDA device: --device cpu runs a small version" in refused(capsys, gpu.main)
