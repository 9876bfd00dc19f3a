"""The real command with a tiny budget, and that its verdict knows Oja's rule when it sees it."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from commands import redraw

import find_oja
from comparison.principal_components import principal_components
from learning_rules import PerLayerRule, classical_rule
from mnist_datasets import batches, load_images, normalize_pixels
from train import Draw, Training, evaluate_training

TINY = [
    "--dataset", "mnist5k", "--metasteps", "3", "--inner_steps", "4", "--pairs", "1",
    "--batch_size", "256", "--threads", "1", "--clip_norm", "100", "--sparsify_from", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    data = load_images("mnist5k", tmp_path_factory.mktemp("data"))
    return normalize_pixels(*data, unit_variance=False)[0]


def test_the_command_shows_a_table_both_cosines_and_a_verdict(tmp_path, capsys):
    find_oja.main([*TINY, "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    for part in ("relative", "learned rule", "Oja's rule", "not Oja's rule", "everything is in"):
        assert part in shown
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < len(results["coefficients"]) <= 27 and len(results["cosine_oja"]) == 2
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    for name in ("features", "directions", "coefficients", "meta_loss"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 1000
    redraw(tmp_path / "run")


def test_the_loss_is_the_squared_distance_to_the_nearer_of_both_directions():
    loss = find_oja.DirectionLoss(torch.tensor([1.0, 0.0]))
    weights = [([0.5, 1.0], 1.25), ([-0.5, 1.0], 1.25), ([-1.0, 0.0], 0.0)]
    for w, distance in weights:
        value, numbers = loss(None, [{}, {"w": torch.tensor([w])}], None)
        assert math.isclose(value.item(), distance)
        assert math.isclose(numbers["cosine"], abs(w[0]) / math.hypot(*w), rel_tol=1e-6)
    together, _ = loss(None, [{}, {"w": torch.tensor([w for w, _ in weights])}], None)
    assert math.isclose(together.item(), sum(d for _, d in weights) / 3, rel_tol=1e-6)


def test_starts_come_in_opposite_pairs():
    w = find_oja.OppositeStarts()(find_oja.make_neurons(400, 50))[-1]["w"]
    assert torch.equal(w[:50], -w[50:])
    assert abs(w.square().mean() * 400 - 1) < 0.05


def test_ojas_own_rule_reaches_the_principal_direction(digits):
    training = Training(
        find_oja.make_neurons(784, 3),
        PerLayerRule([classical_rule("oja", 0.03)]),
        find_oja.OppositeStarts(),
        lambda generator: batches(digits, 1024, generator),
        find_oja.DirectionLoss(principal_components(digits).components[0].float()),
    )
    cosine, params = evaluate_training(training, Draw((0,), 300))
    assert cosine["cosine"] > 0.99
    assert ((params[-1]["w"].norm(dim=1) - 1).abs() < 0.1).all()


def test_rules_together_are_those_one_by_one(digits):
    double = digits.subset(slice(512))
    training = Training(
        find_oja.make_neurons(784, 3),
        None,
        find_oja.OppositeStarts().double(),
        lambda generator: batches(double, 64, generator, torch.float64),
        find_oja.DirectionLoss(principal_components(digits).components[0].double()),
    )
    options = {"bound": "tanh", "bound_size": 0.1}
    rules = [PerLayerRule([classical_rule("oja", rate, **options)]) for rate in (1e-3, 0.1, 1.0)]
    rules, draw = [rule.double() for rule in rules], Draw((0,), 20)
    found = find_oja.together(replace(training, rule=rules[0]), rules, draw)
    for weights, rule in zip(found, rules, strict=True):
        _, params = evaluate_training(replace(training, rule=rule), draw)
        assert torch.allclose(weights, params[-1]["w"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"1/w/x y": -1e-3}, False),
        ({"1/w/y^2 w": 1e-3}, False),
        ({"1/w/y^2 w": -2e-4}, False),
        ({"1/w/x w": 2e-4}, False),
        ({"1/w/x w": 2e-3}, False),
        ({"1/w/x w": 5e-5}, True),
    ],
)
def test_the_verdict_is_for_ojas_two_terms_and_nothing_else(changes, found):
    rule = find_oja.make_rule(0.1)
    coefficients = rule.coefficients() | {"1/w/x y": 1e-3, "1/w/y^2 w": -9e-4} | changes
    assert find_oja.verdict(coefficients)[0] == found


@pytest.mark.slow
def test_the_whole_run_recovers_ojas_rule(tmp_path):
    flags = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--threads", "1"]
    find_oja.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["is_oja"]
    means = [sum(results[k]) / len(results[k]) for k in ("cosine_learned", "cosine_oja")]
    assert means[0] > means[1] - 0.005


def test_the_verdict_stands_when_only_two_terms_are_left_and_falls_when_none_is():
    assert find_oja.verdict({"1/w/x y": 1e-2, "1/w/y^2 w": -9e-3})[0]
    assert not find_oja.verdict({"1/w/x y": 1e-2})[0]
    assert not find_oja.verdict({})[0]
