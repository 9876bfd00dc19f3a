"""Trainings are those of evaluate_training; a rate is chosen on training images alone."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import DOUBLE

import main
from comparison import rule_comparison
from comparison.learned_run import LearnedRun, load_run
from comparison.principal_components import principal_components
from comparison.references import beside
from comparison.rule_comparison import (
    CLASSICAL,
    Method,
    RuleComparison,
    Setting,
    classical,
    learned,
    pca_features,
    reference_methods,
    rotated,
    supervised_features,
    trajectory,
    vicreg_features,
)
from comparison.settings import VICRegSettings
from comparison.vicreg import uniform_parameters
from experiment.errors import RunLogError
from experiment.seeds import EVALUATION, seeded_generator
from experiment.view_strengths import ViewStrengths
from initializers import GaussianInitializer
from learning_rules import PerLayerRule, PolynomialPairRule, PolynomialRule
from linear_probe import extract_features
from mnist_datasets import load_images
from train import Draw, evaluate_training

CONFIG = {
    "layers": [6, 5], "inhibition": "lateral", "inh_steps": 3, "inh_factor": 0.2,
    "forbid_self_inhibition": True, "forbid_excitation": False, "pixelwise_normalization": True,
    "batch_size": 50,
}  # fmt: skip
START = {"mean_b": -0.1, "mean_m": -0.05, "spread_w": 1.5}
DRAW = (3, EVALUATION, 1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    train, test = load_images("mnist5k", tmp_path_factory.mktemp("data"))
    return part_of(train, 600), part_of(test, 200)


def part_of(data, count: int):
    return replace(data, images=data.images[:count], labels=data.labels[:count])


@pytest.fixture
def setting(digits):
    return Setting("digits", *digits, layers=(6, 5), C=10.0, outer_images=64, batch_size=50)


def a_run(kind=PolynomialRule, layers: int = 2) -> LearnedRun:
    """What a run could have learned: small normal coefficients."""
    rule = PerLayerRule([
        kind.of_degree(2, bound="tanh", forward_weight_bound=1.0) for _ in range(layers)
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.003 * torch.randn(p.shape, generator=generator))
    return LearnedRun("some", CONFIG, rule, START, 5, ViewStrengths() if kind.views == 2 else None)


# ---- training ----


@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
def test_numbers_on_the_way_are_exactly_those_of_separate_evaluations(setting, kind):
    training = learned(a_run(kind), setting)
    steps = [1, 4, 6]
    rows = trajectory(training, steps, DRAW)
    for count, row in zip(steps, rows, strict=True):
        alone, _ = evaluate_training(training, Draw(DRAW, count))
        assert row == alone
    assert len({row["meta_loss"] for row in rows}) == 3


def test_a_training_that_diverges_leaves_numbers_up_to_there_and_nan_after(setting):
    training = classical("oja", setting, 1e3)
    before, *after = trajectory(training, [1, 50, 60], DRAW)
    assert math.isfinite(before["test_accuracy"])
    assert len(after) == 2 and all(math.isnan(value) for row in after for value in row.values())


def test_features_that_overflow_are_no_error(setting):
    training = classical("sanger", setting, 1e30)
    assert math.isnan(trajectory(training, [1], DRAW)[0]["test_accuracy"])


# ---- learned rules in other networks ----


@pytest.mark.parametrize(
    ("layers", "expected"), [((4,), [0]), ((4, 3), [0, 1]), ((4, 5, 3, 2), [0, 1, 1, 1])]
)
def test_layers_beyond_those_learned_use_the_last_rule(setting, layers, expected):
    run = a_run()
    training = learned(run, replace(setting, layers=layers))
    assert [run.rule.rules[k].to_dict() for k in expected] == [
        rule.to_dict() for rule in training.rule.rules
    ]
    params = training.initializer(training.model, seeded_generator(0))
    assert [len(layer["b"]) for layer in params[1:]] == list(layers)
    (row,) = trajectory(training, [2], DRAW)
    assert 0 < row["test_accuracy"] <= 1


def test_a_convolution_of_the_run_comes_before_other_layers(setting):
    run = a_run()
    run = replace(run, config=run.config | {"conv": [[3, 5]], "pool": 2})
    training = learned(run, replace(setting, layers=(4, 3)))
    assert len(training.rule.rules) == 3
    (row,) = trajectory(training, [1], DRAW)
    assert 0 < row["test_accuracy"] <= 1


# ---- reading a run ----


def flags(out, *more) -> list[str]:
    return [
        "--dataset", "mnist5k", "--metasteps", "2", "--initial_inner_steps", "2",
        "--max_inner_steps", "3", "--raise_by", "1", "--raise_every", "1", "--batch_size", "64",
        "--evaluations", "1", "--lr", "1e-3", "--beside", "--quiet", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    main.main(["4", *flags(out, "--pixelwise_normalization", "--inh_steps", "4")])
    return out


def test_a_run_is_read_with_its_rule_its_start_and_its_last_number_of_steps(trained):
    run = load_run(trained)
    assert (run.name, run.steps) == ("trained", 3)
    assert run.start == json.loads((trained / "results.json").read_text())["initializer"]
    assert run.rule.to_dict() == json.loads((trained / "rule.json").read_text())


def test_a_run_judged_as_it_was_trained_gives_its_own_numbers(trained):
    run = load_run(trained)
    images = load_images("mnist5k", trained)
    own = Setting("mnist5k", *images, layers=(4,), C=1000.0, outer_images=4096, batch_size=64)
    numbers = trajectory(learned(run, own), [3], (0, EVALUATION, 0))[0]
    (saved,) = json.loads((trained / "results.json").read_text())["evaluations"]
    assert saved == {"inner_steps": 3, **numbers}


def test_a_directory_without_a_finished_run_of_main_is_refused(trained, tmp_path):
    def refusal(**files) -> str:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        for name in ("config", "rule", "results"):
            content = files.get(name, json.loads((trained / f"{name}.json").read_text()))
            if content is not None:
                (directory / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises((RunLogError, ValueError)) as refused:
            load_run(directory)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    config = json.loads((trained / "config.json").read_text())
    (rule,) = json.loads((trained / "rule.json").read_text())["rules"]
    assert "config.json" in refusal(config=None)
    assert "find_oja" in refusal(config=config | {"command": "find_oja"})
    assert "not finished" in refusal(rule=None)
    assert "not finished" in refusal(results=None)
    assert "one for each layer" in refusal(rule=rule)
    assert "learning rule" in refusal(rule={"kind": "other"})
    assert "initializer" in refusal(results={})
    assert "parameters are w, b, m" in refusal(results={"initializer": {"mean_q": 1.0}})
    assert "inh_steps" in refusal(config={k: v for k, v in config.items() if k != "inh_steps"})
    assert "whole run" in refusal(config=config | {"layers": "many"})
    for name in ("C", "outer_images", "batch_size", "pixelwise_normalization", "dataset"):
        assert name in refusal(config={k: v for k, v in config.items() if k != name})
    for name, value in (
        ("batch_size", "x"), ("outer_images", 0), ("layers", [8.5]), ("layers", []), ("C", -1),
        ("layers", None), ("pixelwise_normalization", 1), ("inh_factor", "x"),
        ("initial_inner_steps", -4), ("initial_inner_steps", 1e400), ("inhibition", "none at all"),
        ("conv", [["a", 1]]), ("conv", [[4, 1e9]]), ("conv", [[1e9, 5]]), ("conv", [[4]]),
        ("conv", [[10**12, 5]]), ("conv", 5), ("pool", 0), ("pool", 1.5), ("inh_steps", 10**9),
        ("layers", [10**12]),
    ):  # fmt: skip
        assert "whole run" in refusal(config=config | {name: value}), (name, value)
    for value in (1e400, "x", None, 10**400):
        start = {"mean_b": 0.0, "mean_m": 0.0, "spread_w": value}
        assert "whole run" in refusal(results={"initializer": start})


# ---- classical rules and references ----


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_rules_see_centred_images_in_the_network_they_belong_to(setting, name):
    training = classical(name, setting, 0.01)
    layer = training.model.layers[-1]
    bases = {"oja": "identity", "sanger": "identity", "krotov_hopfield": "relu"}
    assert layer.activation.base == bases.get(name, "sigmoid")
    assert layer.inhibition == ("none" if name in bases else "lateral")
    if name not in bases:
        assert layer.forbid_self_inhibition
        assert layer.forbid_excitation == (name == "foldiak")
    everything = replace(setting, batch_size=len(setting.train))
    batch = next(classical(name, everything, 0.01).batches(seeded_generator(0)))
    assert batch.mean(0).abs().max() < 1e-5
    (row,) = trajectory(training, [3], DRAW)
    assert 0 < row["test_accuracy"] <= 1


def test_sanger_comes_near_the_principal_components(setting):
    wide = replace(setting, layers=(3,), dtype=DOUBLE, batch_size=300)
    training = classical("sanger", wide, 0.05)
    params = training.initializer(training.model, seeded_generator(0))
    batches = training.batches(seeded_generator(1))
    with torch.no_grad():
        for _ in range(600):
            params = training.rule.update(training.model, params, next(batches))
    w = params[1]["w"]
    cosines = (w * principal_components(setting.train).components[:3]).sum(1) / w.norm(dim=1)
    assert cosines.abs().min() > 0.9


def test_random_features_are_those_of_the_learned_network_before_any_step(setting):
    run = a_run()
    random = reference_methods(run)["random"]
    training = random.enter(setting)
    assert not random.has_steps
    assert trajectory(training, [0], DRAW) == trajectory(learned(run, setting), [0], DRAW)


def test_the_features_of_pca_are_the_first_components(setting):
    training = pca_features(replace(setting, dtype=DOUBLE))
    params = training.initializer(training.model, seeded_generator(0))
    mean, components, _ = principal_components(setting.train)
    x = setting.test.floats(dtype=DOUBLE).flatten(1)
    expected = (x - mean) @ components[:5].T
    assert torch.allclose(extract_features(training.model, params, setting.test), expected)
    wide = pca_features(replace(setting, layers=(1000,)))
    assert len(wide.initializer(wide.model, seeded_generator(0))[1]["b"]) == 784


def test_vicreg_is_trained_anew_for_each_draw(setting, monkeypatch):
    monkeypatch.setattr(rule_comparison, "VICREG", VICRegSettings(epochs=1, batch_size=100))
    training = vicreg_features(setting)
    first, again = (trajectory(training, [0], DRAW) for _ in range(2))
    other = trajectory(training, [0], (3, EVALUATION, 2))
    assert first == again != other


def test_vicreg_takes_all_images_where_there_are_fewer_than_a_batch(setting, monkeypatch):
    monkeypatch.setattr(rule_comparison, "VICREG", VICRegSettings(epochs=1, batch_size=1024))
    few = replace(setting, train=part_of(setting.train, 30))
    assert math.isfinite(trajectory(vicreg_features(few), [0], DRAW)[0]["meta_loss"])


def test_labels_and_backpropagation_find_features_that_tell_the_classes(setting):
    training = supervised_features(setting)
    first, again = (trajectory(training, [0], DRAW)[0] for _ in range(2))
    other = trajectory(training, [0], (3, EVALUATION, 2))[0]
    assert first == again != other
    start = replace(training, initializer=uniform_parameters)
    untrained = trajectory(start, [0], DRAW)[0]
    assert first["train_accuracy"] > untrained["train_accuracy"] + 0.05


# ---- images ----


def test_rotated_images_are_turned_about_their_centre_within_the_angle(digits):
    images = torch.zeros(500, 1, 29, 29, dtype=torch.uint8)
    images[:, :, 3:6, 13:16] = 255  # ten pixels above the centre
    data = replace(digits[0], images=images, labels=torch.arange(500))
    turned = rotated(data, seeded_generator(0))
    assert turned.images.dtype == torch.uint8 and torch.equal(turned.labels, data.labels)
    weight = turned.images.double() / turned.images.double().sum((1, 2, 3), keepdim=True)
    offset = torch.arange(29, dtype=DOUBLE) - 14
    across, up = (weight.sum(2) * offset).sum((1, 2)), -(weight.sum(3) * offset).sum((1, 2))
    assert (torch.hypot(across, up) - 10).abs().max() < 0.05
    angle = torch.rad2deg(torch.atan2(across, up))
    assert -45.5 < angle.min() < -40 and 40 < angle.max() < 45.5
    assert abs(angle.mean()) < 5 and 23 < angle.std() < 29  # 90 / sqrt(12) = 26


def test_images_rotated_by_nothing_are_the_same_and_the_generator_decides_the_rest(digits):
    data = part_of(digits[0], 50)
    assert torch.equal(rotated(data, seeded_generator(0), 0.0).images, data.images)
    one, two, other = (rotated(data, seeded_generator(seed)).images for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert "rotated" in rotated(data, seeded_generator(0)).source


# ---- comparisons ----


RATES = (1e-3, 1e-2, 1e4)


def comparison_of(settings, draws: int = 2, rows=()) -> RuleComparison:
    run = a_run()
    methods = {
        "learned": Method(partial(learned, run)),
        "oja": Method(partial(classical, "oja"), RATES),
        "random": reference_methods(run)["random"],
    }
    return RuleComparison(methods, settings, [3, 1], draws, 7, rows)


def test_held_out_images_are_training_images_that_are_not_trained_on(setting):
    within = setting.within_training()
    assert torch.equal(torch.cat([within.train.images, within.test.images]), setting.train.images)
    assert torch.equal(torch.cat([within.train.labels, within.test.labels]), setting.train.labels)
    assert (len(within.train), len(within.test)) == (500, 100)
    assert within.held_out and not setting.held_out


def test_the_choice_of_a_rate_never_sees_the_test_images(setting):
    poisoned = replace(
        setting.test, images=setting.test.images * 0, labels=setting.test.labels.flip(0)
    )
    trials = []
    for test in (setting.test, poisoned):
        comparison = comparison_of([replace(setting, test=test)])
        list(comparison.run())
        trials.append([row for row in comparison.rows if row["held_out"]])
    assert trials[0] == trials[1] and len(trials[0]) == len(RATES)


def test_the_rate_with_the_highest_accuracy_after_the_last_step_is_taken(setting):
    comparison = comparison_of([setting])
    rows = [
        {"method": "oja", "dataset": "digits", "layers": "6-5", "held_out": held_out,
         "rate": rate, "draw": 0, "inner_steps": steps, "test_accuracy": accuracy}
        for rate, held_out, steps, accuracy in [
            (1e-3, True, 3, 0.5), (1e-2, True, 3, 0.6), (1e4, True, 3, math.nan),
            (1e-3, False, 1, 0.9), (1e-3, False, 3, 0.95),
        ]
    ]  # fmt: skip
    comparison.rows = rows
    assert comparison.best_rate("oja", setting) == 1e-2


def test_every_training_has_a_row_for_each_number_of_steps(setting):
    other = replace(setting, layers=(4,))
    comparison = comparison_of([setting, other])
    made = list(comparison.run())
    assert len(made) == comparison.trainings == comparison.done == 2 * (2 + 2 + 3 + 2)
    assert [row for new in made for row in new] == comparison.rows
    steps = {"learned": [1, 3], "oja": [1, 3], "random": [0]}
    for new in made:
        expected = [3] if new[0]["held_out"] else steps[new[0]["method"]]
        assert [row["inner_steps"] for row in new] == expected
    chosen = {row["rate"] for row in comparison.rows if not row["held_out"]}
    assert chosen <= {None, *RATES[:2]}
    assert list(comparison.run()) == []


def test_no_training_depends_on_those_before_it(setting):
    other = replace(setting, layers=(4,))
    forth, back = comparison_of([setting, other]), comparison_of([other, setting], draws=1)
    for comparison in (forth, back):
        list(comparison.run())
    assert set(_comparable(back.rows)) < set(_comparable(forth.rows))
    for kept in (2, 6, 11):
        resumed = comparison_of([setting, other], rows=forth.rows[:kept])
        list(resumed.run())
        assert _comparable(resumed.rows) == _comparable(forth.rows)


def _comparable(rows) -> list[str]:
    return [json.dumps(row) for row in rows]  # NaN equals NaN there


def test_learned_starts_are_those_of_the_run(setting):
    training = learned(a_run(), setting)
    assert isinstance(training.initializer, GaussianInitializer)
    assert training.initializer.effective() == pytest.approx(START)


def test_references_of_fewer_images_than_a_batch_take_all_of_them(digits):
    few = Setting(
        "digits", *(part_of(part, 40) for part in digits), layers=(4,), C=10.0, outer_images=20,
        batch_size=40,
    )  # fmt: skip
    found = beside(["oja", "latent-predictive"], None, few, draws=1, steps=2, seed=0)
    assert {name: len(values) for name, values in found.items()} == {
        "oja": 1, "latent-predictive": 1,
    }  # fmt: skip
