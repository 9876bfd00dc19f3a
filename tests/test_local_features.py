"""LocalFeatures as scikit-learn has it, and what it makes of tables and images."""

import pickle
import re

import numpy as np
import pytest
import torch
from commands import ROOT
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from data_sets.image_data import ImageData
from data_sets.views import Views
from experiment.seeds import seeded_generator
from experiment.view_strengths import ViewStrengths
from initializers import SpreadInitializer
from learning_rules import PerLayerRule
from models_fully_local import Activation, lateral_mlp
from rules import LocalFeatures, load_zoo, names, save_zoo
from rules.classical import CLASSICAL
from rules.local_features import for_rows
from rules.unit_statistics import preset
from train import train


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def images(count: int = 30) -> np.ndarray:
    """Bytes [count, 8, 8], bright in one of two rows."""
    values = (100 * random(1, count, 8, 8)).astype(np.uint8)
    values[np.arange(count), 2 + 3 * (np.arange(count) % 2)] += 150
    return values


def features(X, rule="latent-predictive", units=5, **options) -> np.ndarray:
    options = {"steps": 4, "batch_size": 10, **options}
    return LocalFeatures(rule, units, **options).fit(X).transform(X)


@parametrize_with_checks([
    LocalFeatures(units=3, steps=3, batch_size=16),
    LocalFeatures("sanger", units=(3, 2), steps=3, batch_size=16),
])  # fmt: skip
def test_it_is_a_transformer_as_scikit_learn_checks_them(estimator, check):
    check(estimator)


def test_features_are_those_of_a_training_by_hand():
    X = images()
    data = ImageData(torch.from_numpy(X).unsqueeze(1), torch.zeros(30, dtype=torch.int64), "")
    mean = (data.floats().double()).mean(0)
    model = lateral_mlp(64, [5], Activation("sigmoid", 4.0), inhibition="none")
    rule, seed = preset("latent-predictive"), np.random.RandomState(3).randint(2**31 - 1)
    start = SpreadInitializer(0.167)(model, seeded_generator(seed, 0))
    views = Views(data, 10)(seeded_generator(seed, 1))
    pairs = (tuple(x - mean.float() for x in pair) for pair in views)
    params = train(model, start, pairs, rule, 6, grad=False)
    expected = model(data.floats() - mean.float(), params).numpy()
    found = features(X, steps=6, random_state=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [*CLASSICAL, *names()])
def test_every_rule_gives_finite_features_of_images_and_tables_always_the_same(rule):
    units = 4 if rule == "krotov_hopfield" else (4, 3)
    for X in (images(), random(5, 30, 6), 40 * random(6, 30, 6) - 7):
        found = features(X, rule, units)
        assert found.shape == (30, 4 if units == 4 else 3) and np.isfinite(found).all()
        np.testing.assert_array_equal(found, features(X, rule, units))
        assert not np.array_equal(found, features(X, rule, units, random_state=1))


def test_images_in_any_form_give_the_same():
    X = images()
    expected = features(X)
    flat = features(X.reshape(30, 64), image_shape=(8, 8))
    for same in (features(X[:, None]), flat, features(X / 255.0)):
        np.testing.assert_allclose(same, expected, rtol=1e-5)
    fitted = LocalFeatures("latent-predictive", units=5, steps=4, batch_size=10).fit(X)
    np.testing.assert_array_equal(fitted.transform(X.reshape(30, 64)), expected)
    table = features(X.reshape(30, 64))  # other views
    assert table.shape == expected.shape and not np.allclose(table, expected)


def test_a_table_of_any_scale_is_standardised():
    X = random(2, 40, 5)
    scaled = (X - 3) * [1, 10, 100, 1e3, 1e4]
    np.testing.assert_allclose(features(2 * scaled + 7), features(scaled), rtol=1e-4)
    assert np.isfinite(features(np.full((20, 3), 5.0))).all()
    colour = random(3, 20, 3, 6, 6)
    assert features(colour).shape == (20, 5)


def test_rows_of_a_table_get_masks_and_noise_in_the_place_of_geometric_views():
    assert for_rows(ViewStrengths()) == ViewStrengths("masks", mask=(0.0, 0.5), noise=0.1)
    mixed = ViewStrengths("mixed", mask=(0.2, 0.6), noise=0.3)
    assert for_rows(mixed) == ViewStrengths("masks", mask=(0.2, 0.6), noise=0.3)
    assert for_rows(ViewStrengths("none", noise=0.2)) == ViewStrengths("none", noise=0.2)


def test_a_rule_may_be_an_object_and_stays_as_it_is(tmp_path):
    rule, X = preset("latent-predictive").double(), random(4, 30, 6)
    found = features(X, rule)
    np.testing.assert_array_equal(found, features(X, PerLayerRule([rule])))
    assert rule.w.dtype == torch.float64
    kept = load_zoo("latent-predictive")
    save_zoo(kept, tmp_path / "mine.json")
    np.testing.assert_array_equal(features(X, tmp_path / "mine.json"), features(X, kept.name))


def test_tensors_and_images_with_their_channels_last_are_taken_like_others():
    X = images()
    expected = features(X)
    np.testing.assert_array_equal(features(torch.from_numpy(X)), expected)
    floats = np.float32(X / 255)
    np.testing.assert_array_equal(features(torch.from_numpy(floats)), features(floats))
    np.testing.assert_array_equal(features(X[..., None]), expected)
    coloured = random(5, 12, 3, 6, 7)
    last = np.moveaxis(coloured, 1, 3)
    np.testing.assert_array_equal(features(last), features(coloured))
    fitted = LocalFeatures("oja", 3, steps=2).fit(last)
    np.testing.assert_array_equal(fitted.transform(last.reshape(12, -1)), fitted.transform(last))
    half = torch.from_numpy(coloured).bfloat16()
    np.testing.assert_array_equal(features(half), features(half.float()))
    with pytest.raises(ValueError, match="X is a tensor that is no array"):
        features(torch.eye(5).to_sparse())
    table = last.reshape(12, -1)
    np.testing.assert_array_equal(features(table, image_shape=(6, 7, 3)), features(coloured))


def test_it_is_cloned_pickled_and_named():
    X = random(8, 25, 6)
    fitted = LocalFeatures("oja", (4, 3), steps=3).fit(X)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(X), fitted.transform(X))
    np.testing.assert_array_equal(clone(fitted).fit_transform(X), fitted.transform(X))
    assert fitted.get_feature_names_out().tolist() == [f"localfeatures{k}" for k in range(3)]
    assert fitted.n_features_in_ == 6 and LocalFeatures("oja", steps=1).fit(
        images()
    ).n_features_in_ == 64  # fmt: skip
    pipeline = make_pipeline(LocalFeatures(units=6, steps=30), LogisticRegression(C=100))
    assert pipeline.fit(images(), np.arange(30) % 2).score(images(), np.arange(30) % 2) > 0.9


@pytest.mark.parametrize(("options", "X", "expected"), [
    ({"rule": "nothing"}, images(), "no rule is called 'nothing'; choose from"),
    ({"rate": 0.1}, images(), "rate is of oja, sanger"),
    ({"units": 0}, images(), "units is 0, expected whole numbers"),
    ({"units": (3, 2.5)}, images(), "units is"),
    ({"steps": True}, images(), "steps is True"),
    ({"batch_size": -1}, images(), "batch_size is -1"),
    ({"image_shape": (7, 8)}, images().reshape(30, 64), "no images"),
    ({}, images() * 1.0, "images are uint8 or within 0 to 1, not"),
    ({}, np.zeros((2, 1, 4, 4, 4)), "no images"),
    ({"rule": "oja", "rate": 1e30}, images(), "not finite"),
])  # fmt: skip
def test_what_is_wrong_is_said(options, X, expected):
    with pytest.raises((ValueError, FloatingPointError), match=expected):
        features(X, **options)


def test_transform_takes_what_fit_took():
    fitted = LocalFeatures("oja", 3, steps=2).fit(images())
    with pytest.raises(ValueError, match=re.escape("images (1, 7, 8), expected (1, 8, 8)")):
        fitted.transform(images()[:, :7])
    with pytest.raises(NotFittedError):
        LocalFeatures().transform(images())


def test_the_loop_of_the_documentation_trains_as_a_transformer_does():
    text = (ROOT / "docs" / "learned_rules.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "rule.update" in b]
    names = {}
    exec(compile(block.replace("range(250)", "range(10)"), "learned_rules.md", "exec"), names)
    assert names["features"].shape == (1000, 32) and names["weights"].shape == (32, 784)
    fitted = LocalFeatures("mnist32", 32, steps=10, random_state=0)
    found = fitted.fit(names["train"].images).transform(names["test"].images)
    assert abs(found.std() / names["features"].std().item() - 1) < 0.1


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "learned_rules.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "LocalFeatures" in b]
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("steps=250", "steps=10"), "learned_rules.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.5
