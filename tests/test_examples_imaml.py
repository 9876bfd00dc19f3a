"""The real command, small; implicit against unrolled gradients; the tasks; Omniglot's files."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from commands import kill_at_row, redraw
from omniglot_files import files, write_folder

from experiment.command_line import run_command

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "imaml.py"
TINY = ["--threads", "1", "--quiet", "--tasks", "2", "--test_tasks", "3", "--steps", "2"]
FEW = [*TINY, "--metasteps", "2", "--queries", "2"]
PICTURES = [*FEW, "--dataset", "mnist5k"]
WAVES = [*TINY, "--problem", "sinusoid", "--metasteps", "3"]

spec = importlib.util.spec_from_file_location("example_of_imaml", SCRIPT)
example = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = example  # dataclasses look it up there
spec.loader.exec_module(example)


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    example.main([*map(str, flags)])


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves():
    return example.SinusoidTasks(5, 7, torch.float64, torch.device("cpu"))


def marked_pictures(kinds: int = 3, each: int = 6):
    """Pictures of one colour, kind * 10 + number, but for a corner of 255."""
    values = torch.arange(kinds)[:, None] * 10 + torch.arange(each)
    pictures = values[..., None, None, None].expand(-1, -1, 1, 8, 8).to(torch.uint8).clone()
    pictures[..., 0, 0] = 255
    return example.PictureTasks(list(pictures), 5, 2, 3, torch.float64, torch.device("cpu"))


def levels_near_the_start(count: int = 2):
    """Two levels, weights theta whose output is not 0, and the flags of exact solutions."""
    tasks = waves()
    hparams = [t.double() for t in tasks.initial(random())]
    hparams[-2] += 0.05 * torch.randn(1, 40, generator=random(1), dtype=torch.float64)
    levels = example.TwoLevels(tasks, tasks.draw(count, random(2)), 6.0)
    return levels, [h.requires_grad_() for h in hparams]


def unrolled(levels, hparams, steps: int, rate: float) -> list[torch.Tensor]:
    """The hypergradient by backpropagation, task by task, without the code under test."""
    (x, y), (queries, targets) = levels.batch.support, levels.batch.queries
    total = 0
    for i in range(len(x)):
        w = [h.clone() for h in hparams]
        for _ in range(steps):
            pull = sum((a - b).square().sum() for a, b in zip(w, hparams, strict=True))
            loss = (levels.tasks.outputs(w, x[i]) - y[i]).square().mean() + 3.0 * pull
            gradient = torch.autograd.grad(loss, w, create_graph=True)
            w = [a - rate * g for a, g in zip(w, gradient, strict=True)]
        total += (levels.tasks.outputs(w, queries[i]) - targets[i]).square().mean() / len(x)
    return torch.autograd.grad(total, hparams)


@pytest.mark.parametrize(("method", "K"), [("CG", 40), ("CG_normaleq", 80), ("fixed_point", 200)])
def test_the_implicit_gradient_is_that_of_long_unrolled_descents(method, K):
    levels, hparams = levels_near_the_start()
    args = example.make_parser().parse_args(["--method", method, "--K", str(K), "--rate", "0.04"])
    params = levels.adapted(hparams, 150, 0.04)[-1]
    solve = example.hypergradient(args, levels, params, hparams)
    assert solve.residual < 1e-6
    for h, expected in zip(hparams, unrolled(levels, hparams, 150, 0.04), strict=True):
        assert torch.allclose(h.grad, expected, atol=1e-6 * float(expected.norm()) + 1e-9)


def test_conjugate_gradients_end_one_iteration_before_negative_curvature(monkeypatch):
    levels, hparams = levels_near_the_start()
    params = levels.adapted(hparams, 20, 0.04)[-1]

    class Refusing(example.ConjugateGradient):
        def solve(self, system, b):
            if self.iterations > 3:
                raise example.DivergenceError("negative curvature")
            return super().solve(system, b)

    monkeypatch.setitem(example.METHODS, "CG", Refusing)
    args = example.make_parser().parse_args(["--K", "5"])
    assert example.hypergradient(args, levels, params, hparams).iterations == 3


def test_tasks_do_not_see_each_other():
    levels, hparams = levels_near_the_start(3)
    together = levels.adapted(hparams, 4, 0.04)[-1]
    (x, y), queries = levels.batch.support, levels.batch.queries
    for i in range(3):
        one = example.Batch((x[i : i + 1], y[i : i + 1]), tuple(t[i : i + 1] for t in queries))
        alone = example.TwoLevels(levels.tasks, one, 6.0).adapted(hparams, 4, 0.04)[-1]
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[i], b[0], rtol=1e-12)


def test_a_task_has_different_classes_and_never_the_same_picture_twice():
    batch = marked_pictures().draw(20, random())
    (x, labels), (queries, query_labels) = batch.support, batch.queries
    assert x.shape == (20, 10, 1, 8, 8) and queries.shape == (20, 15, 1, 8, 8)
    seen = torch.cat([x, queries], dim=1).mul(255).round().long()[:, :, 0]
    marks = torch.cat([labels, query_labels], dim=1)
    corners = torch.stack([seen[..., i, j] == 255 for i in (0, -1) for j in (0, -1)], dim=-1)
    classes = corners.long().argmax(-1) * 100 + seen[..., 4, 4] // 10
    for task in range(20):
        pairs = set(zip(marks[task].tolist(), classes[task].tolist(), strict=True))
        assert len(pairs) == 5 == len({kind for _, kind in pairs})
        pictures = classes[task] * 10 + seen[task, :, 4, 4] % 10
        assert len(pictures.unique()) == 25


def test_sine_waves_have_amplitudes_and_phases_as_published():
    batch = example.SinusoidTasks(500, 1, torch.float64, torch.device("cpu")).draw(200, random())
    x, y = batch.support
    assert -5 <= float(x.min()) < -4.9 and 4.9 < float(x.max()) <= 5
    basis = torch.cat([x.sin(), x.cos()], dim=-1)
    found = torch.linalg.lstsq(basis, y)[0][..., 0]
    assert torch.allclose(basis @ found[..., None], y, atol=1e-9)
    amplitude, phase = found.norm(dim=1), torch.atan2(found[:, 1], found[:, 0])
    assert float(amplitude.min()) >= 0.1 and 4 < float(amplitude.max()) <= 5
    assert float(phase.min()) >= 0 and 2.8 < float(phase.max()) <= math.pi


def test_kinds_for_testing_are_never_seen_in_training():
    args = example.make_parser().parse_args(["--dataset", "mnist5k"])
    train, test, pool = example.load_kinds(args)
    assert len(train) == 7 and len(test) == 3 and len(pool) == 4000
    own = example.load_images("mnist5k")[0]
    for label, kind in enumerate([*train, *test]):
        assert torch.equal(kind, own.images[own.labels == label])


def test_omniglot_is_read_where_it_is(tmp_path):
    place = tmp_path / "omniglot-py"
    write_folder(place / "images_background", files({"a": 2, "b": 2}, 5))
    write_folder(place / "images_evaluation", files({"c": 2, "d": 2}, 5))
    args = example.make_parser().parse_args(["--dataset", "omniglot", "--data-dir", str(tmp_path)])
    train, test, pool = example.load_kinds(args)
    assert [k.shape for k in (*train, *test)] == [(5, 1, 28, 28)] * 8 and len(pool) == 40
    assert int(train[0][4, 0, 1, 0]) == 255 and int(train[0][4, 0, 20, 0]) == 0
    run(*TINY, "--metasteps", 1, "--dataset", "omniglot", "--data-dir", tmp_path, "--queries", 4,
        "--out", tmp_path / "run")  # fmt: skip
    assert "Omniglot" in json.loads((tmp_path / "run" / "results.json").read_text())["data"]


@pytest.mark.parametrize(
    ("flags", "score"), [(PICTURES, "accuracy"), (WAVES, "mean squared error")]
)
def test_a_run_compares_learned_with_initial_weights_and_leaves_its_files(tmp_path, flags, score):
    out = tmp_path / "run"
    run_with_figures(*flags, "--out", out)
    results = json.loads((out / "results.json").read_text())
    assert results["score"] == score
    for name in ("initial", "learned"):
        assert len(results[name]["over_steps"]) == 3
        assert results[name]["mean"] == pytest.approx(results[name]["over_steps"][-1])
    assert results["initial"]["over_steps"] != results["learned"]["over_steps"]
    assert (out / "figures" / "meta_learning.png").stat().st_size > 1000
    redraw(out)


def test_meta_learning_of_sine_waves_beats_the_start(tmp_path):
    flags = ["--metasteps", 60, "--steps", 8, "--tasks", 8, "--test_tasks", 48, "--lr", 0.01]
    run(*WAVES, *flags, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    initial, learned = results["initial"], results["learned"]
    assert learned["mean"] + learned["standard_error"] < initial["mean"]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path):
    flags = [*WAVES, "--metasteps", "5"]
    run(*flags, "--out", tmp_path / "whole")
    kill_at_row(2, str(SCRIPT), *flags, "--out", tmp_path / "killed")
    assert len(rows(tmp_path / "killed")) == 2
    run("--resume", tmp_path / "killed", "--quiet")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    results = [(tmp_path / name / "results.json").read_text() for name in ("killed", "whole")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "13"], "12 classes"),
        (["--shots", "5000"], "the least of a class"),
        (["--method", "nystrom"], "nystrom"),
        (["--pull", "0"], "above 0"),
        (["--dataset", "omniglot", "--data-dir", "nowhere"], "Omniglot is not in"),
        (["--dataset", "omniglot", "mnist5k"], "stands alone"),
        (["--dataset", "mnist5k", "--dataset", "fashion"], "give all values after one"),
        (["--problem", "sinusoid"], "--dataset needs --problem pictures"),
        (["--problem", "sinusoid", "--dataset", "mnist", "fashion", "--ways", "3"], "--ways needs"),
        (["--seed", "9" * 26], "below 2^63"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        few = FEW if "--dataset" in flags else PICTURES
        run_command(example.main, [*few, *flags, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_with_status_1(capsys, tmp_path):
    flags = [*WAVES, "--rate", "1e30", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        run_command(example.main, flags)
    assert stop.value.code == 1 and len(capsys.readouterr().err.strip().splitlines()) == 1
