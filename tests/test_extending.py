"""The blocks of code in the guides and in README.md run as they stand, and stay short."""

import json
import re
from statistics import median

import pytest
import torch
from commands import ROOT

from experiment.own_code import load_own_code
from models_fully_local import Activation, lateral_mlp

NAMES = "extending", "one_pass", "hypergradients", "learned_optimizer"
GUIDE, ONE_PASS, HYPERGRADIENTS, LEARNED, README = (
    re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    for page in (*(f"docs/{name}.md" for name in NAMES), "README.md")
)


def test_every_block_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for block in GUIDE:
        exec(compile(block, "extending.md", "exec"), names)
    assert len((tmp_path / "runs/own_rule/metrics.csv").read_text().splitlines()) == 4
    assert not torch.equal(names["training"].rule.rates, torch.tensor([1e-3, 1e-3]))


def test_the_guides_rules_are_those_of_the_examples():
    """Its threshold has no scale, whose logarithm begins at 0."""
    names = {"__name__": "guide"}
    for block in (block for block in GUIDE if "update_layer" in block):
        exec(compile(block, "extending.md", "exec"), names)
    generator = torch.Generator().manual_seed(0)
    model = lateral_mlp(5, [3], Activation("sigmoid", 4.0), inhibition="none")
    w, x = (torch.randn(n, 5, generator=generator) for n in (3, 20))
    params = [{}, {"w": w, "b": torch.zeros(3)}]
    for name in ("Decorrelation", "SlidingThreshold"):
        rule = load_own_code(f"{ROOT}/examples/own_rules.py:{name}").value()
        _, expected = rule.update(model, params, x)
        _, found = names[name]().update(model, params, x)
        assert found.keys() == expected.keys() and not torch.equal(found["w"], w)
        for entry, value in expected.items():
            torch.testing.assert_close(found[entry], value)
    same = names["CrossedViews"]().update(model, params, (x, x))
    torch.testing.assert_close(
        same[1]["w"], names["Decorrelation"]().update(model, params, x)[1]["w"]
    )


def test_every_block_is_shorter_than_twenty_lines():
    assert len(GUIDE) == 9 and len(ONE_PASS) == 3
    assert all(block.count("\n") < 20 for block in GUIDE + ONE_PASS)


def run_alone(block: str) -> dict:
    """The names that a block leaves behind that runs by itself, on the same random numbers."""
    names = {"__name__": "block"}
    torch.manual_seed(0)
    exec(compile(block, "block", "exec"), names)
    return names


def test_every_block_on_one_pass_tuning_runs_alone_and_prints(capsys):
    first, module, matrix = ONE_PASS
    assert run_alone(first)["tuned"].state.step == 100
    assert "momentum" in capsys.readouterr().out
    names = run_alone(module)
    begun, *_, ended = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert min(ended) < min(begun) and median(ended) < median(begun) / 2
    x, y = names["validation"]
    loss = (names["model"](x) - y).square().mean()
    assert loss.item() == pytest.approx(ended[names["best"]], rel=1e-5)
    names = run_alone(matrix)
    rate = names["root"].detach().tril() @ names["root"].detach().tril().T
    assert torch.allclose(rate, names["hessian"].inverse(), rtol=0.02)


def test_every_block_on_hypergradients_runs_alone_and_the_loop_lowers_its_outer_loss(capsys):
    first, loop = HYPERGRADIENTS
    assert run_alone(first)["penalty"].grad < 0
    capsys.readouterr()
    run_alone(loop)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    said = re.search(r"print\(.*# (.*)", loop)[1]
    assert losses == pytest.approx([float(value) for value in said.split(", ")], abs=0.01)


def test_the_trained_optimiser_brings_the_loss_to_what_its_page_says(capsys):
    (block,) = LEARNED
    run_alone(block)
    assert float(capsys.readouterr().out) < float(re.search("# below (.*)", block)[1])


def test_the_first_example_makes_features_that_are_good_for_something(capsys):
    (block,) = README
    exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.9
