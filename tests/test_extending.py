"""The blocks of code in the guides and in README.md run as they stand, and stay short."""

import re

import torch
from commands import ROOT

from experiment.own_code import load_own_code
from models_fully_local import Activation, lateral_mlp

GUIDE, ONE_PASS, README = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    for name in ("docs/extending.md", "docs/one_pass.md", "README.md")
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
    assert len(GUIDE) == 9 and len(ONE_PASS) == 2
    assert all(block.count("\n") < 20 for block in GUIDE + ONE_PASS)


def test_of_one_pass_tuning_too_where_a_rate_that_is_a_matrix_becomes_the_inverse_hessian():
    torch.manual_seed(0)
    names = {}
    for block in ONE_PASS:
        exec(compile(block, "one_pass.md", "exec"), names)
    assert names["tuning"].state.step == 100
    rate = names["root"].detach().tril() @ names["root"].detach().tril().T
    assert torch.allclose(rate, names["hessian"].inverse(), rtol=0.02)


def test_the_first_example_makes_features_that_are_good_for_something(capsys):
    (block,) = README
    exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.9
