"""Rules and objectives of your own, from a file that is named on the command line."""

import argparse
import json

import numpy as np
import pytest
import torch
from commands import ROOT, refused, rows

import evaluate
import main
import plot
import prune_rule
import sweep
from experiment.command_line import run_command
from experiment.own_code import OwnCodeError, load_own_code, own_code_name
from learning_rules import RuleError, SangerRule, classical_rule
from linear_probe import FunctionLoss, ProbeError
from mnist_datasets import image_data
from models_fully_local import Activation, lateral_mlp
from rules import rule_from_dict

CODE = """
import torch
from torch import nn
from learning_rules import LearningRule

class Decay(LearningRule):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1e-3))
        self.decays = nn.Parameter(torch.tensor([1e-3, 2e-3]))

    def update_layer(self, layer, old, x, s, y):
        change = self.rate * y[0].T @ x[0] / len(x[0]) - self.decays.sum() * old["w"]
        return old | {"w": old["w"] + change}

class Pairs(Decay):
    views = 2

class Whole(LearningRule):
    def update(self, model, params, batch):
        return params

def spread(model, params, images, labels):
    return (model(images, params).mean(0) - 0.5).square().mean()

number = 3
"""
SMALL = [
    "3", "--dataset", "mnist5k", "--metasteps", "2", "--initial_inner_steps", "2",
    "--max_inner_steps", "2", "--batch_size", "32", "--evaluations", "1", "--outer_images", "100",
    "--threads", "1", "--beside", "--quiet", "--no_figures",
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rule.py"
    path.write_text(CODE)
    return path


def test_the_name_of_code_becomes_absolute_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("raise SystemExit")
    assert own_code_name("bad.py:Rule") == f"{tmp_path}/bad.py:Rule"
    form = "must be FILE.py:NAME"
    for text, message in (("bad.py:", form), ("bad.txt:A", form),
                          ("no.py:A", "no.py is not there")):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            own_code_name(text)


@pytest.mark.parametrize("content, message", [
    ("x = 1\n\ny = (", r"my.py, line 3: SyntaxError"),
    ("def f():\n    return 1 / 0\n\nf()\n", r"my.py, line 2: ZeroDivisionError: division by zero"),
    ("import a_package_that_is_not_there", "line 1: ModuleNotFoundError"),
    ("x = 1", "defines no Rule"),
])  # fmt: skip
def test_code_that_does_not_run_is_one_line_with_its_place(tmp_path, content, message):
    (tmp_path / "my.py").write_text(content)
    with pytest.raises(OwnCodeError, match=message):
        load_own_code(f"{tmp_path}/my.py:Rule")


def test_code_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("VALUE = 7")
    (tmp_path / "my.py").write_text("from beside_it import VALUE")
    assert load_own_code(f"{tmp_path}/my.py:VALUE").value == 7


def test_a_rule_with_update_layer_alone_is_written_read_and_started_from(file):
    kind = load_own_code(f"{file}:Decay").value
    rule = kind()
    with torch.no_grad():
        rule.decays.copy_(torch.tensor([0.25, -0.5]))
    assert rule.coefficients() == {
        "rule/rate": pytest.approx(1e-3), "rule/decays 0": 0.25, "rule/decays 1": -0.5,
    }  # fmt: skip
    assert rule.formula() == "Decay, rate = 0.001, decays 0 = 0.25, decays 1 = -0.5"
    assert r"\text{Decay, rate" in rule.tex()
    again = rule_from_dict(json.loads(json.dumps(rule.to_dict())), own=kind)
    assert again.coefficients() == rule.coefficients() and again.rate.dtype == torch.float64
    other = kind()
    other.start_from(rule)
    assert other.coefficients() == rule.coefficients()
    with pytest.raises(RuleError, match="not 'Decay'"):
        rule_from_dict(rule.to_dict())
    with pytest.raises(RuleError, match="the rule is a Pairs, not a Decay"):
        rule.start_from(load_own_code(f"{file}:Pairs").value())
    with pytest.raises(RuleError, match="the hyperparameters are rate, not rate, decays"):
        kind.from_dict({"hyperparameters": {"rate": 1.0}})


def test_a_function_as_outer_loss_is_attached_and_checked():
    data = image_data(torch.randint(256, (6, 2, 2), dtype=torch.uint8), range(6))
    params = [{"w": torch.ones(3, 4, dtype=torch.float64, requires_grad=True)}]
    generator = torch.Generator().manual_seed(0)

    def loss(model, params, images, labels):
        return (images.flatten(1) @ params[0]["w"].T).square().mean() + labels.sum()

    value, numbers = FunctionLoss(loss, data)(None, params, generator)
    x = data.floats(None, torch.float64).flatten(1)
    expected = (x @ params[0]["w"].T).square().mean() + 15
    assert value.item() == pytest.approx(expected.item(), rel=1e-12) and numbers == {}
    for wrong in (lambda *_: 3.0, lambda *_: torch.ones(2), lambda *_: torch.ones(())):
        with pytest.raises(ProbeError, match="a scalar that depends on params is wanted"):
            FunctionLoss(wrong, data)(None, params, generator)


def test_main_learns_a_rule_of_ones_own_by_an_objective_of_ones_own(tmp_path, file, capsys):
    out, judged = tmp_path / "run", tmp_path / "judged"
    code = ["--rule", f"{file}:Decay", "--objective", f"{file}:spread"]
    main.main([*SMALL, *code, "--out", str(out)])
    assert json.loads((out / "rule.json").read_text())["rules"][0]["kind"] == "Decay"
    results = json.loads((out / "results.json").read_text())
    assert 0 < results["test_accuracy_mean"] < 1  # the probe judges what came of it
    spread = max(float(row["meta_loss"]) for row in rows(out))  # of outputs in [0, 1] about 0.5
    assert spread <= 0.25 < results["evaluations"][0]["meta_loss"] < 2.5  # a cross-entropy

    small = ["--steps", "1", "--evaluations", "1", "--quiet", "--no_figures", "--out", judged]
    error = refused(capsys, evaluate.main, out, *small)
    assert "a program: give --rule my_rule.py:Decay" in error and not judged.exists()
    evaluate.main([str(out), "--rule", code[1], *map(str, small)])
    assert (judged / "table.md").exists()
    error = refused(capsys, evaluate.main, out, "--rule", code[1], "--to_zoo", "mine")
    assert "not of a class of your own" in error


def test_a_run_never_runs_code_that_is_not_given_again_or_has_changed(tmp_path, file, capsys):
    out = tmp_path / "run"
    code = ["--rule", f"{file}:Decay", "--objective", f"{file}:spread"]
    main.main([*SMALL, *code, "--out", str(out)])
    for given in ([], code[:2], code[2:]):
        error = refused(capsys, main.main, "--resume", out, *given)
        assert "which is a program: give that again to have it run" in error
    main.main(["--resume", str(out), *code, "--quiet"])
    file.write_text(CODE + "\n")
    error = refused(capsys, main.main, "--resume", out, *code)
    assert "was run with other code of your own" in error
    error = refused(capsys, evaluate.main, out, "--rule", code[1])
    assert "was learned with another version of" in error


@pytest.mark.parametrize("flags, message", [
    (["--rule", "{file}:number"], "is no class of learning_rules.LearningRule"),
    (["--rule", "{file}:Whole"], "Whole has no update_layer"),
    (["--rule", "{file}:Pairs"], "takes 2 view(s) of each input, not 1: give --views geometric"),
    (["--rule", "{file}:Decay", "--views", "geometric"],
     "not 2: give --views none, or write views = 2 in the class"),
    (["--rule", "{file}:Decay", "--sparsify"], "--sparsify needs a rule with a method keep"),
    (["--rule", "{file}:Decay", "--degree", "2"], "--rule polynomial"),
    (["--rule", "nowhere"], "unknown rule 'nowhere'; known are polynomial"),
    (["--objective", "{file}:spread", "--probe", "ridge"], "the probe, without --objective"),
    (["--objective", "{file}:nothing"], "defines no nothing"),
])  # fmt: skip
def test_wrong_uses_are_refused_before_a_folder_is_made(tmp_path, file, capsys, flags, message):
    flags = [flag.format(file=file) for flag in flags]
    out = tmp_path / "run"
    assert message in refused(capsys, main.main, *SMALL, *flags, "--out", out)
    assert not out.exists()


WRONG = """
from learning_rules import LearningRule

def halved(loss):
    return loss / 0

def objective(model, params, images, labels):
    return halved(3)

class Rule(LearningRule):
    def update_layer(self, layer, old, x, s, y):
        return old | {"w": old["w"] + x[0] @ y[0]}

class Absent(LearningRule):
    def update_layer(self, layer, old, x, s, y):
        open("/nowhere/at/all")
"""


@pytest.mark.parametrize("flags, place, error", [
    (["--objective", "objective"], "line 5, in halved", "ZeroDivisionError: division by zero"),
    (["--rule", "Rule"], "line 12, in Rule.update_layer", "RuntimeError: mat1 and mat2 shapes"),
    (["--rule", "Absent"], "line 16, in Absent.update_layer", "FileNotFoundError: [Errno 2] No"),
])  # fmt: skip
def test_an_error_in_code_of_ones_own_ends_in_one_line_below_its_traceback(
    tmp_path, file, capsys, flags, place, error
):
    file.write_text(WRONG)
    flags = [flags[0], f"{file}:{flags[1]}"]
    with pytest.raises(SystemExit) as stop:
        run_command(main.main, [*SMALL, *flags, "--out", str(tmp_path / "run")])
    first, *traced, last = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and last.startswith(f"error: {file}, {place}: {error}")
    assert first.startswith("Traceback") and str(file) in traced[0]  # not that of this program


def test_other_errors_keep_their_whole_traceback(tmp_path, file, monkeypatch):
    def broken(*_):
        raise KeyError("a mistake in this program")

    monkeypatch.setattr(main, "make_initializer", broken)
    with pytest.raises(KeyError, match="a mistake"):
        flags = ["--rule", f"{file}:Decay", "--out", str(tmp_path / "run")]
        run_command(main.main, [*SMALL, *flags])


def test_a_rule_that_writes_into_what_it_was_given_changes_nothing_else(tmp_path, file):
    file.write_text(
        CODE
        + """
class Writing(Decay):
    def update_layer(self, layer, old, x, s, y):
        old["w"] = super().update_layer(layer, dict(old), x, s, y)["w"]
        return old
"""
    )
    for name in ("Decay", "Writing"):
        main.main([*SMALL, "--rule", f"{file}:{name}", "--out", str(tmp_path / name)])
    runs = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("Decay", "Writing")]
    assert runs[0]["evaluations"] == runs[1]["evaluations"]


@pytest.mark.parametrize("body, message", [
    ("return None", "Wrong returned a NoneType for a layer"),
    ("return {'w': old['w']}", "Wrong returned no b for a layer"),
    ("return old | {'w': old['w'][:1]}", "Wrong returned w of shape [1, 784], not [3, 784]"),
])  # fmt: skip
def test_what_is_no_update_of_a_layer_is_said(tmp_path, file, capsys, body, message):
    file.write_text(
        CODE
        + f"""
class Wrong(Decay):
    def update_layer(self, layer, old, x, s, y):
        {body}
"""
    )
    out = tmp_path / "run"
    assert message in refused(capsys, main.main, *SMALL, "--rule", f"{file}:Wrong", "--out", out)


def test_a_file_that_ends_the_program_does_not_end_it_silently(tmp_path):
    (tmp_path / "my.py").write_text("import sys\nsys.exit()\n")
    with pytest.raises(OwnCodeError, match=r"my\.py, line 2: SystemExit"):
        load_own_code(f"{tmp_path}/my.py:Rule")


def test_code_and_images_are_found_again_where_they_are_now(tmp_path, file, capsys):
    images = tmp_path / "tiny.npz"
    generator = np.random.default_rng(0)
    np.savez(images, x=generator.integers(256, size=(300, 4, 4)), y=np.arange(300) % 3)
    given = ["--rule", f"{file}:Decay", "--dataset", str(images)]
    out = tmp_path / "run"
    main.main([SMALL[0], *SMALL[3:], *given, "--out", str(out)])
    images.rename(tmp_path / "moved.npz")
    file.rename(tmp_path / "moved.py")
    code = ["--rule", f"{tmp_path}/moved.py:Decay"]
    error = refused(capsys, main.main, "--resume", out, *code)
    assert f"was run on --dataset {images}, which is not there any more" in error
    main.main(["--resume", str(out), *code, "--dataset", str(tmp_path / "moved.npz"), "--quiet"])
    np.savez(
        tmp_path / "moved.npz", x=generator.integers(256, size=(300, 4, 4)), y=np.arange(300) % 3
    )
    moved = ["--dataset", tmp_path / "moved.npz"]
    assert "was run with other data" in refused(capsys, main.main, "--resume", out, *code, *moved)


def test_evaluate_notices_changed_images_and_a_class_that_no_run_needs(tmp_path, file, capsys):
    images, out = tmp_path / "tiny.npz", tmp_path / "run"
    generator = np.random.default_rng(0)
    np.savez(images, x=generator.integers(256, size=(300, 4, 4)), y=np.arange(300) % 3)
    main.main([SMALL[0], *SMALL[3:], "--dataset", str(images), "--out", str(out)])
    error = refused(capsys, evaluate.main, out, "--steps", 1, "--rule", f"{file}:Decay")
    assert "--rule needs a RUN whose rule is of a class of your own" in error
    np.savez(images, x=generator.integers(256, size=(300, 4, 4)), y=np.arange(300) % 3)
    error = refused(capsys, evaluate.main, out, "--steps", 1)
    assert "tiny.npz has changed since run learned on it" in error


def test_a_sweep_never_runs_code_that_its_directory_names(tmp_path, file, capsys):
    out = tmp_path / "sweep"
    config = {
        "command": "sweep",
        "trial_command": [str(ROOT / "main.py"), "--rule", f"{file}:Decay"],
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    assert "which is a program" in refused(capsys, sweep.main, "--resume", out)


def test_a_rule_of_ones_own_is_neither_pruned_nor_drawn_term_by_term(tmp_path, file, capsys):
    out = tmp_path / "run"
    main.main([*SMALL, "--rule", f"{file}:Decay", "--out", str(out)])
    said = "is a class of your own, my_rule.py:Decay: only rules of the families here can be "
    assert said + "pruned" in refused(capsys, prune_rule.main, out, "--out", tmp_path / "pruned")
    assert said + "drawn" in refused(capsys, plot.main, "rules", out)


def test_a_run_without_any_hypergradient_says_so_at_its_end(tmp_path, file, capsys):
    """Of three kinds: none is finite, all are 0, and as it should be."""
    file.write_text(
        CODE
        + """
class Broken(Decay):
    def update_layer(self, layer, old, x, s, y):
        return super().update_layer(layer, old, x, s, y) | {"b": old["b"] / 0}

class Silent(Decay):
    def update_layer(self, layer, old, x, s, y):
        return {name: value * 0 * self.rate for name, value in old.items()}
"""
    )
    for name, said in (("Broken", "left out"), ("Silent", "0"), ("Decay", None)):
        main.main([*SMALL, "--rule", f"{file}:{name}", "--out", str(tmp_path / name)])
        lines = [n for n in capsys.readouterr().err.splitlines() if n.startswith("every hyper")]
        assert len(lines) == (said is not None)
        assert said is None or lines[0].startswith(f"every hypergradient was {said}: nothing")


def example(name: str):
    return load_own_code(f"{ROOT}/examples/own_rules.py:{name}").value().double()


def of_linear_units():
    """A model, its parameters and a batch."""
    generator = torch.Generator().manual_seed(3)
    model = lateral_mlp(6, [4], Activation("identity"), inhibition="none")
    options = {"generator": generator, "dtype": torch.float64}
    params = [{}, {"w": torch.randn(4, 6, **options), "b": torch.zeros(4, dtype=torch.float64)}]
    return model, params, torch.randn(20, 6, **options)


def test_the_examples_decorrelation_begins_as_ojas_rule_and_holds_sangers_and_the_subspace_rule():
    model, params, x = of_linear_units()
    rule, w = example("Decorrelation"), params[1]["w"]
    rate = rule.log_rate.exp().item()
    y = x @ w.T
    subspace = w + rate * (y.T @ x - y.T @ y @ w) / len(x)
    for shares, expected in (
        ([1.0, 0.0, 0.0], classical_rule("oja", rate).double().update(model, params, x)[1]["w"]),
        ([0.0, 1.0, 0.0], SangerRule(rate).double().update(model, params, x)[1]["w"]),
        ([0.0, 0.0, 1.0], subspace),
    ):
        with torch.no_grad():
            rule.shares.copy_(torch.tensor(shares))
        torch.testing.assert_close(rule.update(model, params, x)[1]["w"], expected)


def test_the_examples_threshold_is_a_running_mean_that_begins_at_0():
    model, params, x = of_linear_units()
    rule = example("SlidingThreshold")
    seen = (x @ params[1]["w"].T).square().mean(0)
    (_, first), (_, again) = (rule.update(model, [{}, p], x) for p in (
        params[1], params[1] | {"threshold": torch.zeros(4, dtype=torch.float64)},
    ))  # fmt: skip
    torch.testing.assert_close(first["threshold"], seen / (1 + rule.log_span.exp()))
    for name, value in first.items():
        assert torch.equal(value, again[name])


def test_the_examples_decorrelation_improves_by_hypergradients(tmp_path):
    out = tmp_path / "run"
    main.main([
        "16", "--rule", f"{ROOT}/examples/own_rules.py:Decorrelation", "--inhibition", "none",
        "--pixelwise_normalization", "mean", "--batch_size", "50", "--horizon", "80", "80",
        "--probe", "ridge", "--tasks", "1", "--metasteps", "25", "--warmup_steps", "1",
        "--lr", "3e-4", "--dataset", "mnist5k", "--evaluations", "1", "--beside", "--threads", "1",
        "--quiet", "--no_figures", "--out", str(out),
    ])  # fmt: skip
    losses = [float(row["meta_loss"]) for row in rows(out)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_examples_threshold_has_the_same_hypergradients_in_forward_mode(tmp_path):
    """Which begins it at 0; reverse mode begins it with the first update."""
    example = ["--rule", f"{ROOT}/examples/own_rules.py:SlidingThreshold", "--inhibition", "none"]
    flags = [*SMALL, *example, "--dtype", "float64"]
    for method in ("reverse", "forward"):
        main.main([*flags, "--method", method, "--out", str(tmp_path / method)])
    reverse, forward = (rows(tmp_path / method) for method in ("reverse", "forward"))
    for one, other in zip(reverse, forward, strict=True):
        norms = [float(row["hypergradient_norm"]) for row in (one, other)]
        assert norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-9)
