"""The blocks of code in docs/extending.md and README.md run as they stand, and stay short."""

import re

import torch
from commands import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_every_block_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len((tmp_path / "runs/own_rule/metrics.csv").read_text().splitlines()) == 4
    assert not torch.equal(names["training"].rule.rates, torch.tensor([1e-3, 1e-3]))


def test_every_block_is_shorter_than_twenty_lines():
    assert len(BLOCKS) == 5 and all(block.count("\n") < 20 for block in BLOCKS)
