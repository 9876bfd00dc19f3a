"""The real command, small; its tasks; recorded against called meta-steps."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from commands import kill_at_row, redraw, refused, rows
from no_copies import NoCopies
from omniglot_files import write_small_sets

from comparison import few_shot
from data_sets.omniglot import load_omniglot
from kernels.recorded_updates import CalledRecording, RecordingError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "omniglot.py"
TINY = ["--threads", "1", "--quiet", "--device", "cpu", "--ways", "3", "--tasks", "2", "--steps",
        "2", "--K", "2", "--metasteps", "3", "--test_tasks", "3"]  # fmt: skip

spec = importlib.util.spec_from_file_location("example_of_omniglot", SCRIPT)
example = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = example  # dataclasses look it up there
spec.loader.exec_module(example)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_small_sets(tmp_path / "data")
    return tmp_path / "data"


def run(*flags) -> None:
    example.main([*TINY, *map(str, flags)])


def test_a_task_has_different_characters_turned_alike_and_no_drawing_twice(folder):
    characters = load_omniglot(folder).train
    sizes = Namespace(ways=5, shots=1, queries=2)
    tasks = example.Tasks(characters, sizes, torch.float64, torch.device("cpu"))
    drawn = tasks.draw(40, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 5, 5) and drawn[..., 1].unique().tolist() == [0, 1, 2, 3]
    support, queries = tasks.points(drawn)
    assert support.x.shape == (40, 5, 1, 28, 28) and queries.x.shape == (40, 10, 1, 28, 28)
    assert support.labels[0].tolist() == [0, 1, 2, 3, 4]
    assert queries.labels[7].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for task in range(40):
        assert len(drawn[task, :, 0].unique()) == 5
        for way, (character, turns, *order) in enumerate(drawn[task].tolist()):
            assert len({*order}) == 3
            of_way = [support.x[task, way], *queries.x[task, 2 * way : 2 * way + 2]]
            for number, picture in zip(order, of_way, strict=True):
                expected = characters.images[character, number].rot90(turns, (1, 2)).double() / 255
                assert torch.equal(picture, expected)


def test_a_run_compares_learned_with_initial_weights_and_leaves_its_files(folder, tmp_path):
    out = tmp_path / "run"
    run("--data-dir", folder, "--out", out)
    results = json.loads((out / "results.json").read_text())
    assert results["chance"] == pytest.approx(1 / 3)
    for name in ("initial", "learned"):
        assert len(results[name]["over_steps"]) == 3
        assert results[name]["unadapted"] == results[name]["over_steps"][0]
        assert results[name]["mean"] == results[name]["over_steps"][-1]
        assert results[name]["confidence"] >= 0
    assert [*rows(out)[0]] == [
        "step", "meta_loss", "accuracy", "hypergradient_norm", "residual", "ended_early",
    ]  # fmt: skip
    redraw(out)


def test_a_first_order_run_differs_from_an_implicit_one(folder, tmp_path):
    run("--data-dir", folder, "--out", tmp_path / "implicit", "--no_figures", "--damping", 0)
    first_order = ["--method", "first_order", "--K", 5]
    run("--data-dir", folder, "--out", tmp_path / "first_order", "--no_figures", *first_order)
    first, second = (rows(tmp_path / name)[:2] for name in ("implicit", "first_order"))
    assert first[0]["meta_loss"] == second[0]["meta_loss"]
    assert first[0]["hypergradient_norm"] != second[0]["hypergradient_norm"]
    assert first[1]["meta_loss"] != second[1]["meta_loss"]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(folder, tmp_path):
    flags = [*TINY, "--data-dir", folder, "--no_figures", "--metasteps", 53]
    example.main([*map(str, [*flags, "--out", tmp_path / "whole"])])
    kill_at_row(51, str(SCRIPT), *flags, "--out", tmp_path / "killed")
    example.main(["--resume", str(tmp_path / "killed"), "--quiet", "--no_figures"])
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    results = [(tmp_path / name / "results.json").read_text() for name in ("killed", "whole")]
    assert results[0] == results[1]


def test_recorded_meta_steps_and_tests_give_the_numbers_of_called_ones(
    folder, tmp_path, monkeypatch
):
    run("--data-dir", folder, "--out", tmp_path / "called", "--no_figures")
    recordings = []

    def record(function, examples):
        recordings.append(CalledRecording(function, examples))
        return recordings[-1]

    monkeypatch.setattr(example, "recording_on", lambda device: record)
    run("--data-dir", folder, "--out", tmp_path / "recorded", "--no_figures")
    assert len(recordings) == 2
    assert rows(tmp_path / "called") == rows(tmp_path / "recorded")
    results = [(tmp_path / name / "results.json").read_text() for name in ("called", "recorded")]
    assert results[0] == results[1]


@pytest.mark.parametrize("downsampling", few_shot.DOWNSAMPLING)
def test_a_meta_step_neither_waits_for_the_device_nor_copies_from_the_host(
    folder, monkeypatch, downsampling
):
    monkeypatch.setattr(few_shot, "convolved", few_shot.by_patches)
    sizes, device = Namespace(ways=3, shots=1, queries=1), torch.device("meta")
    tasks = example.Tasks(load_omniglot(folder).train, sizes, torch.float32, device)
    drawn = torch.empty(2, 3, 4, dtype=torch.int64, device=device)
    network = few_shot.ConvolutionalNetworks(3, downsampling)
    theta = network.initial(torch.Generator()).to(device)
    adaptation = few_shot.Adaptation(network, 2, 0.1, 2.0, 22.0, 2)
    with NoCopies():
        found = adaptation.meta_gradient(theta, *tasks.points(drawn))
        scores = adaptation.accuracies_over_steps(theta, *tasks.points(drawn))
    assert found.gradient.shape == theta.shape and found.losses.shape == (2,)
    assert scores.shape == (2, 3)


def test_what_cannot_be_recorded_is_called_with_one_line_that_says_why():
    def refuse(function, examples):
        raise RecordingError("no CUDA graph of it can be captured: a wait")

    said = []
    replayed = example.Replayed(lambda t: [2 * t], refuse, said.append)
    for value in (1.0, 3.0):
        assert float(replayed(torch.tensor(value))[0]) == 2 * value
    assert said == [
        "each operation is launched by itself: no CUDA graph of it can be captured: a wait"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", 4], "there are 3 characters for training or tests"),
        (["--ways", 1], "it takes 2 to tell apart"),
        (["--test_tasks", 1], "it takes 2 for a deviation"),
        (["--shots", 3], "there are 4 drawings of a character"),
        (["--method", "first_order"], "--K needs --method implicit"),
        (["--method", "first_order", "--K", 5, "--damping", 0], "--damping needs --method"),
        (["--data-dir", "nowhere"], "Omniglot is not in nowhere"),
        (["--downsampling", "mean"], "mean"),
        (["--pull", 0], "above 0"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, folder, tmp_path, flags, message):
    flags = [*TINY, "--data-dir", folder, "--out", tmp_path / "run", *flags]
    assert message in refused(capsys, example.main, *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_with_status_1(capsys, folder, tmp_path):
    flags = [*TINY, "--data-dir", folder, "--rate", "1e30", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        example.run_command(example.main, [*map(str, flags)], wrong_input=())
    assert stop.value.code == 1 and len(capsys.readouterr().err.strip().splitlines()) == 1
