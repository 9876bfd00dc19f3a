"""The real command, small; patches, encoder and methods against slow, obvious forms."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import as_begun_before, outcome, redraw, refused, rows
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import first_layers as example
import learn_filters

from comparison.first_layers import (
    FilterLoss,
    FirstLayer,
    RandomWindows,
    draw_patches,
    standardised,
)
from data_sets.image_data import ImageData, batch_indices
from data_sets.views import Views
from experiment.errors import NonFiniteError
from experiment.seeds import seeded_generator
from experiment.view_strengths import ViewStrengths
from initializers import fixed_initializer
from krotov_hopfield import BioConv2d
from models_fully_local import Activation, lateral_mlp
from rules.choices import zoo_path
from rules.zoo import load_zoo, save_zoo
from train import train

TINY = [
    "--dataset", "mnist5k", "--units", "10", "--train_images", "160", "--held_out", "100",
    "--patches", "500", "--updates", "2", "--evaluations", "1", "--threads", "1", "--quiet",
]  # fmt: skip
FILTERS = [
    "--dataset", "mnist5k", "--units", 6, "--train_images", 200, "--threads", 1, "--batch_size", 8,
    "--windows", 4, "--horizon", 3, 5, "--fit_images", 80, "--outer_images", 60, "--metasteps", 2,
    "--quiet",
]  # fmt: skip
SETTINGS = Namespace(units=10, kernel=3, patches=300, epochs=1.5, hopfield_lr=None,
                     softhebb_lr=0.3, updates=2, batch_size=8, windows=None, whiten=None,
                     mask=None)  # fmt: skip


def run(*flags) -> None:
    example.main([*map(str, flags)])


def small_images(count: int = 24, side: int = 8, channels: int = 3) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, side, side), generator=generator)
    return ImageData(images.to(torch.uint8), torch.arange(count) % 4, "noise")


def test_patches_are_squares_of_the_images():
    data = small_images(5, 7)
    squares = nn.functional.unfold(data.images.float() / 255, 3).movedim(1, 2).reshape(-1, 27)
    known = {tuple(row.tolist()) for row in squares}
    patches = draw_patches(data, 2000, 3, torch.Generator().manual_seed(0))
    found = {tuple(row.tolist()) for row in patches}
    assert found <= known and len(found) == len(known)


def test_principal_directions_are_those_of_a_decomposition_in_both_signs():
    patches = torch.randn(200, 5) @ torch.diag(torch.tensor([1.0, 5, 2, 3, 4]))
    found = example.principal_directions(patches, 5, None)
    expected = np.linalg.svd((patches - patches.mean(0)).double().numpy())[2][:3]
    assert np.allclose(np.abs(found[:3].numpy() @ expected.T), np.eye(3), atol=1e-6)
    assert torch.equal(found[3:], -found[:2])


def test_centroids_are_patterns_whatever_their_brightness_and_contrast():
    generator = torch.Generator().manual_seed(1)
    patterns = torch.eye(9)[:3] - 1 / 9
    which = torch.arange(300) % 3
    contrast, brightness = 0.5 + torch.rand(2, 300, 1, generator=generator)
    found = example.centroids(brightness + contrast * patterns[which], 3, generator)
    cosines = nn.functional.cosine_similarity(found[:, None], patterns[None], dim=2)
    assert torch.allclose(cosines.max(1).values, torch.ones(3), atol=1e-5)
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2]


def test_whitened_centroids_respond_to_patches_as_they_do_to_whitened_ones():
    mixing = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patches = torch.randn(4000, 9, dtype=torch.float64) @ mixing
    found = example.whitened_centroids(patches, 6, torch.Generator().manual_seed(0)).double()
    variances, directions = torch.linalg.eigh(patches.T.cov() + 0.01 * patches.var(0).mean()
                                              * torch.eye(9))  # fmt: skip
    root = (directions * variances.sqrt()) @ directions.T
    centroids = found @ root  # of whitened patches, which have the same variance in all directions
    z = (patches - patches.mean(0)) @ torch.linalg.inv(root)
    nearest = torch.cdist(z, centroids).argmin(1)
    means = torch.stack([z[nearest == k].mean(0) for k in range(6)])
    assert torch.allclose(means, centroids, atol=0.4)


def test_whitened_centroids_of_black_patches_are_finite():
    found = example.whitened_centroids(torch.zeros(30, 9), 4, seeded_generator(0))
    assert found.shape == (4, 9) and torch.isfinite(found).all()


def test_windows_are_those_of_the_images_at_the_same_places_in_both_views():
    x = torch.arange(2 * 3 * 7 * 6).view(2, 3, 7, 6)
    windows = RandomWindows(lambda generator: iter([(x, -x)]), 5, 3)
    ((first, second),) = windows(torch.Generator().manual_seed(0))
    assert torch.equal(first, -second) and first.shape == (10, 3, 3, 3)
    for k, window in enumerate(first):
        of_image = x[k // 5].unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert sum(torch.equal(window, square) for square in of_image) == 1


def test_the_loss_of_filters_is_that_of_ridge_regression_on_the_features_that_judge():
    data, generator = small_images(60), torch.Generator().manual_seed(3)
    weight = torch.randn(4, 27, dtype=torch.float64, generator=generator).requires_grad_()
    loss = FilterLoss(data, 3, fit_images=40, outer_images=20, penalty=0.5)
    params = [{}, {"w": weight, "b": torch.zeros(4)}]
    value, numbers = loss(None, params, torch.Generator().manual_seed(5))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    seen, unseen = FirstLayer(weight.detach().view(4, 3, 3, 3)).features(
        data.subset(order))[0].split([40, 20])  # fmt: skip
    A, B = standardised(seen, unseen)
    Y, T = nn.functional.one_hot(data.labels[order], 4).double().split([40, 20])
    W = torch.linalg.solve(A.T @ A + 20 * torch.eye(64), A.T @ (Y - Y.mean(0)))
    outputs = B @ W + Y.mean(0)
    assert value.item() == pytest.approx((outputs - T).square().sum(1).mean().item())
    right = (outputs.argmax(1) == T.argmax(1)).double().mean().item()
    assert numbers["held_out_accuracy"] == right
    torch.autograd.gradcheck(
        lambda w: loss(None, [{"w": w}], torch.Generator().manual_seed(5))[0],
        weight.detach()[:2].requires_grad_(),
    )


def test_a_rule_for_filters_is_learned_continued_and_judged(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    learn_filters.main([*map(str, FILTERS), "--out", str(once)])
    redraw(once)
    before = outcome(once)
    learn_filters.main(["--resume", str(once), "--quiet"])
    assert outcome(once) == before
    learn_filters.main([*map(str, FILTERS), "--out", str(twice)])
    assert (once / "filters.json").read_text() == (twice / "filters.json").read_text()
    assert load_zoo(once / "filters.json").recipe.conv == ((6, 5),)
    flags = [flag for flag in TINY if flag not in ("--patches", "500")]
    run(*flags, "--methods", "random", once / "filters.json", "--windows", 4, "--out",
        tmp_path / "run")  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["summary"]) == ["random", "once/filters"]


def test_a_run_from_before_units_competed_goes_on(tmp_path):
    flags = [*FILTERS, "--terms", "x gain z'", "w", "--learn", "eta", "--out", tmp_path]
    learn_filters.main([*map(str, flags)])
    before = outcome(tmp_path)
    as_begun_before(tmp_path, "learn", "beta")
    learn_filters.main(["--resume", str(tmp_path), "--quiet"])
    assert outcome(tmp_path) == before


def test_features_are_means_over_squares_of_rectified_responses_of_filters_at_norm_1():
    data, weight = small_images(2), 7 * torch.randn(4, 3, 3, 3, dtype=torch.float64)
    layer = FirstLayer(weight, lambda x: x[:, :, 1:-1, 1:-1])
    features, own = layer.features(data)
    x = data.floats(dtype=torch.float64)
    w = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    u = torch.stack([(x[:, :, r : r + 3, c : c + 3][:, None] * w).sum((2, 3, 4))
                     for r in range(6) for c in range(6)], 2).view(2, 4, 6, 6)  # fmt: skip
    above = (u - u.mean(1, keepdim=True)).clamp(min=0)
    edges = [(0, 2), (1, 3), (3, 5), (4, 6)]  # of four squares over six responses
    expected = torch.stack([above[:, :, a:b, c:d].mean((2, 3)) for a, b in edges
                            for c, d in edges], 2)  # fmt: skip
    assert torch.allclose(features, expected.flatten(1))
    assert own.shape == (2, 3 * 16)


def test_competing_units_are_bioconv2d_with_the_constants_of_their_authors():
    data, generator = small_images(), seeded_generator(1)
    constants = {
        "softhebb": {"gate": "soft", "normalization": "clamp", "rate_exponent": 0.5},
        "krotov-hopfield": {"ranking_param": 9, "delta": 0.08},
    }
    softhebb = example.competing(SETTINGS, "softhebb", data, generator, torch.float32)
    generator = seeded_generator(1)
    layer = BioConv2d(3, 10, 3, 2, **constants["softhebb"])
    layer.reset_parameters(generator, spread=25 / 27**0.5)
    order = [index for _ in range(2) for index in batch_indices(data, 10, generator)]
    for index in order[:3]:  # one and a half epochs of two batches
        layer.training_step(data.floats(index), 0.3)
    assert torch.equal(softhebb.filters, layer.weight)
    u = layer(data.floats())
    assert torch.equal(softhebb.own(data.floats()), (u - u.mean(1, keepdim=True)).relu() ** 0.7)
    made = example.competing_network(SETTINGS, "krotov-hopfield", (3, 8, 8), generator, None)
    expected = BioConv2d(3, 10, 3, 2, **constants["krotov-hopfield"])
    assert repr(made.blocks[0].layer) == repr(expected)


def test_a_learned_rule_on_windows_of_whole_images_is_the_dense_layer():
    data, recipe = small_images(side=5), load_zoo("transfer32").recipe
    settings = Namespace(**vars(SETTINGS) | {"kernel": 5})
    layer = example.by_learned_rule(
        settings, "transfer32", data, seeded_generator(2), torch.float32
    )
    generator = seeded_generator(2)
    model = lateral_mlp(75, [10], Activation("sigmoid", 4.0), inhibition="none")
    params = fixed_initializer(recipe.initial).float()(model, generator)
    views = Views(data, 8, replace(recipe.views, center=False))  # the command centres images itself
    params = train(model, params, views(generator), recipe.rule.float(), 2, grad=False)
    assert torch.allclose(layer.filters.flatten(1), params[1]["w"], atol=1e-5)
    x = data.floats()
    assert torch.allclose(layer.own(x).flatten(1), model(x, params), atol=1e-5)


def test_a_learned_rule_on_whitened_windows_is_the_dense_layer_on_these():
    data, recipe = small_images(side=5), load_zoo("mnist32").recipe
    settings = Namespace(**vars(SETTINGS) | {"kernel": 5, "windows": 1, "whiten": 0.2,
                                             "mask": [0.1, 0.5]})  # fmt: skip
    layer = example.by_learned_rule(settings, "mnist32", data, seeded_generator(2), torch.float32)
    generator = seeded_generator(2)
    patches = draw_patches(data, 300, 5, generator).double()
    variance = patches.var(0).mean()
    variances, directions = torch.linalg.eigh(patches.T.cov() + 0.2 * variance * torch.eye(75))
    whitening = (directions * (variance / variances).sqrt() @ directions.T).float()
    model = lateral_mlp(75, [10], recipe.activation, inhibition="none")
    params = fixed_initializer(recipe.initial).float()(model, generator)
    views = Views(data, 8, ViewStrengths("masks", mask=(0.1, 0.5)))
    windows = RandomWindows(views, 1, 5)(generator)
    white = (tuple(x.flatten(1) @ whitening for x in pair) for pair in windows)
    params = train(model, params, white, recipe.rule.float(), 2, grad=False)
    assert torch.allclose(layer.filters.flatten(1), params[1]["w"] @ whitening, atol=1e-4)
    x = data.floats()
    own = model(x.flatten(1) @ whitening, params)
    assert torch.allclose(layer.own(x).flatten(1), own, atol=1e-4)


def test_every_method_is_learned_judged_and_drawn(tmp_path):
    out = tmp_path / "run"
    run(*TINY, "--epochs", 0.5, "--out", out)
    results = json.loads((out / "results.json").read_text())
    assert list(results["summary"]) == list(example.METHODS) and len(rows(out)) == 10
    assert results["judged_on"] == "held-out training images"
    with_own = {m for m, s in results["summary"].items() if "own/test_accuracy_mean" in s}
    assert with_own == {*example.COMPETING, *example.LEARNED}
    assert all(s["triangle/test_accuracy_mean"] > 0.5 for s in results["summary"].values())
    assert (out / "table.md").read_text().count("\n") == 12
    redraw(out)
    before = outcome(out)
    run("--resume", out, "--quiet")
    assert outcome(out) == before


def test_a_run_from_before_windows_were_whitened_goes_on(tmp_path):
    run(*TINY, "--methods", "PCA", "mnist32", "--out", tmp_path)
    before = rows(tmp_path)
    as_begun_before(tmp_path, "whiten", "mask")
    run("--resume", tmp_path, "--quiet")
    assert rows(tmp_path) == before


def test_a_comparison_goes_on_from_its_state_with_the_same_numbers():
    flags = [*TINY, "--methods", "random", "PCA", "transfer32", "--evaluations", "2"]
    args = example.make_parser().parse_args(flags)
    data = example.centred_images(args, "cpu")
    whole, second = (example.Comparison(args, *data, torch.float32) for _ in range(2))
    steps = [whole.step() for _ in range(2)]
    second.load_state_dict(whole.state_dict())
    while not whole.finished:
        steps.append(whole.step())
        assert repr(second.step()) == repr(steps[-1])
    assert second.finished and len(steps) == 6
    of_random = [step["triangle/test_accuracy"] for step in steps if step["method"] == 0]
    assert of_random[0] != of_random[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "guess"], "guess"),
        (["--methods", __file__], "is no rule of the zoo"),
        (["--methods", zoo_path("mnist256-32")], "is for 2 layers, not for one"),
        (["--methods", "PCA", "mnist32", "PCA"], "twice"),
        (["--methods", "k-means", "--updates", "3"], "--updates needs --methods transfer32 or"),
        (["--kernel", "26"], "too small"),
        (["--kernel", "2", "--methods", "PCA", "mnist32"], "PCA has 8 filters"),
        (["--patches", "9"], "k-means needs at least 10"),
        (["--units", "8"], "8, the number of units"),
        (["--batch_size", "200"], "batches of 200"),
        (["--train_images", "5000"], "there are 3900"),
        (["--whiten", "0.3"], "--whiten needs --windows"),
        (["--windows", "4", "--whiten", "0"], "above 0"),
        (["--mask", "0.9", "0.3"], "0 <= LOW <= HIGH <= 1"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, flags, message):
    out = tmp_path / "run"
    assert message in refused(capsys, example.main, *TINY, *flags, "--out", out)
    assert not out.exists()


def test_one_patch_is_refused_as_it_has_no_covariance(capsys, tmp_path):
    flags = ["--patches", 1, "--methods", "random", "PCA", "--out", tmp_path / "run"]
    data = ["--dataset", "mnist5k", "--units", 10]
    assert "at least 2" in refused(capsys, example.main, *data, *flags)


def test_two_files_of_one_name_are_refused_not_averaged(capsys, tmp_path):
    rules = [tmp_path / place / "filters" / "rule.json" for place in ("a", "b")]
    for number, path in enumerate(rules):
        path.parent.mkdir(parents=True)
        save_zoo(load_zoo(example.LEARNED[number]), path)
    flags = [flag for flag in TINY if flag not in ("--patches", "500")]
    line = refused(capsys, example.main, *flags, "--methods", *rules, "--out", tmp_path / "run")
    assert "filters/rule" in line


def test_a_horizon_for_filters_is_a_smaller_and_a_larger_number(capsys, tmp_path):
    line = refused(capsys, learn_filters.main, "--horizon", 5, 3, "--out", tmp_path / "run")
    assert "--horizon" in line


def test_filters_without_terms_that_compete_have_no_temperature_to_learn(capsys, tmp_path):
    line = refused(capsys, learn_filters.main, "--terms", "x gain", "--out", tmp_path / "run")
    assert "--learn beta needs a term with share or won: give one, or --learn without" in line


def test_a_rule_for_filters_that_overflows_is_reported_as_not_finite(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="of the learned rule: not finite"):
        learn_filters.main([*map(str, FILTERS), "--lr", "1e6", "--warmup_steps", "0", "--out",
                            str(out)])  # fmt: skip
    assert (out / "results.json").exists() and not (out / "filters.json").exists()
