"""Tests of linear_probe.py, against scikit-learn, finite differences and closed forms."""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

import linear_probe as module
from kernels.logistic_regression import (
    LogisticFit,
    NonFiniteFeatures,
    ProbeError,
    fit_logistic,
    solve_hessian,
)
from linear_probe import (
    ProbeLoss,
    RidgeLoss,
    SampledProbeLoss,
    extract_features,
    linear_probe,
    ridge_regression,
)


def mixture(N=400, D=6, classes=4, spread=1.0, seed=0):
    """Overlapping clouds, one a class: float64 features [N, D] and labels [N], all present."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (N,), generator=generator)
    labels[:classes] = torch.arange(classes)
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * noise, labels


def objective(features, labels, weight, bias, C):
    """The formula of the module's docstring, as it reads."""
    logits = features.double() @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(C * loss + 0.5 * weight.square().sum())


def scikit_learn(features, labels, C):
    model = LogisticRegression(C=C, tol=1e-10, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(features.numpy(), labels.numpy())


def objective_of_scikit_learn(features, labels, C):
    model = scikit_learn(features, labels, C)
    weight, bias = (torch.from_numpy(a).double() for a in (model.coef_, model.intercept_))
    return objective(features, labels, weight, bias, C)


def collinear():
    features, labels = mixture()
    copies = [features[:, :1], features[:, :1] + 1e-6 * features[:, 1:2], 1 - features[:, 2:3]]
    return torch.cat([features, *copies], 1), labels


def with_constant_columns():
    features, labels = mixture()
    return torch.cat([features, torch.full((400, 1), 0.7), torch.zeros(400, 2)], 1), labels


def tiny_spread():
    features, labels = mixture()
    return 0.5 + 1e-4 * torch.sigmoid(features), labels


def separable():
    features, labels = mixture(spread=0.02)
    return features, labels


PROBLEMS = {
    "plain": mixture,
    "collinear": collinear,
    "constant columns": with_constant_columns,
    "tiny spread": tiny_spread,
    "separable": separable,
    "one feature": lambda: mixture(D=1),
    "fewer rows than features": lambda: mixture(N=30, D=50, classes=3),
    "many parameters": lambda: mixture(N=600, D=100, classes=10, spread=2.0),
}


@pytest.mark.parametrize("C", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_optimum_is_that_of_scikit_learn(name, C):
    features, labels = PROBLEMS[name]()
    fit = fit_logistic(features, labels, int(labels.max()) + 1, C, tolerance=1e-12)
    expected = objective_of_scikit_learn(features, labels, C)
    assert fit.converged
    assert fit.objective <= expected * (1 + 1e-8)
    # scikit-learn stops far away on what its solver finds ill-conditioned
    if name not in ("tiny spread", "collinear"):
        assert fit.objective >= expected * (1 - 1e-6)


def test_hundreds_of_features_converge_to_the_optimum_of_scikit_learn():
    features, labels = mixture(N=900, D=560, classes=3, spread=4.0)
    features *= torch.linspace(0, 1, 560).square()  # variances as uneven as of pixels, one is 0
    fit = fit_logistic(features.float(), labels, 3, C=10.0)
    assert fit.converged and fit.iterations < 200  # 476 without blocks of the Hessian
    expected = objective_of_scikit_learn(features.float().double(), labels, C=10.0)
    assert fit.objective == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tight_tolerance_brings_gradient_to_rounding_level(name):
    features, labels = PROBLEMS[name]()
    classes = int(labels.max()) + 1
    fit = fit_logistic(features, labels, classes, tolerance=1e-20)
    zero = LogisticFit(
        torch.zeros(classes, features.shape[1]), torch.zeros(classes), 0, 0, 0, False
    )
    at_zero = fit_logistic(features, labels, classes, max_iterations=0, start=zero).gradient_norm
    assert fit.gradient_norm < 1e-8 * at_zero


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_features_reach_the_optimum_of_the_same_features_in_float64(name):
    features, labels = PROBLEMS[name]()
    features = features.float()
    classes = int(labels.max()) + 1
    single = fit_logistic(features, labels, classes)
    double = fit_logistic(features.double(), labels, classes, tolerance=1e-13)
    assert single.objective == pytest.approx(double.objective, rel=1e-6)


def test_objective_and_gradient_norm_are_those_of_the_returned_classifier():
    features, labels = mixture()
    fit = fit_logistic(features, labels, 4, C=2.0, tolerance=1e-3)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    value = 2.0 * loss + 0.5 * weight.square().sum()
    slopes = torch.autograd.grad(value, [weight, bias])
    assert fit.objective == pytest.approx(value.item(), rel=1e-12)
    norm = float(torch.cat([slope.flatten() for slope in slopes]).norm())
    assert fit.gradient_norm == pytest.approx(norm, rel=1e-6)


def test_two_classes_equal_scikit_learn_at_twice_the_inverse_penalty():
    features, labels = mixture(classes=2)
    fit = fit_logistic(features, labels, 2, C=0.5, tolerance=1e-14)
    binary = scikit_learn(features, labels, C=1.0)
    difference = (fit.weight[1] - fit.weight[0]).numpy()
    np.testing.assert_allclose(difference, binary.coef_[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fit.bias[1] - fit.bias[0], binary.intercept_[0], rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_result_is_never_worse_than_its_start(scale):
    features, labels = mixture()
    generator = torch.Generator().manual_seed(1)
    weight = scale * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = scale * torch.randn(4, generator=generator, dtype=torch.float64)
    start = LogisticFit(weight, bias, 0.0, 0.0, 0, False)
    before = objective(features, labels, weight, bias, 1000.0)
    optimum = fit_logistic(features, labels, 4).objective
    for limit in (0, 1, 2, 5):
        fit = fit_logistic(features, labels, 4, max_iterations=limit, start=start)
        assert fit.objective <= before * (1 + 1e-12)
    assert fit_logistic(features, labels, 4, start=start).objective == pytest.approx(
        optimum, rel=1e-6
    )


def test_start_at_the_optimum_takes_hardly_an_iteration():
    features, labels = mixture()
    cold = fit_logistic(features, labels, 4)
    warm = fit_logistic(features, labels, 4, start=cold)
    assert warm.iterations <= 2 < cold.iterations
    assert warm.objective <= cold.objective * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_rows_than_features_reach_the_optimum_of_scikit_learn(dtype):
    features, labels = mixture(N=60, D=3000, classes=3, spread=20.0)
    features = features.to(dtype)
    fit = fit_logistic(features, labels, 3, 0.01, tolerance=1e-12)
    best = objective_of_scikit_learn(features.double(), labels, 0.01)
    assert fit.objective == pytest.approx(best, rel=1e-5)


LARGE_COLUMNS = [
    (19, 20, 1e7), (19, 20, 1e12), (60, 100, 1e6), (60, 100, 1e-7), (40, 60, 1e18), (40, 20, 1e12),
    (400, 300, 1e9),
]  # fmt: skip


def one_large_column(N, D, factor, dtype=torch.float64):
    """Classes that the first column tells; the sixth has this factor."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] > 0).long()
    features[:, 5] *= factor
    return features.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N, D, factor", LARGE_COLUMNS)
def test_a_large_column_hides_no_other(N, D, factor, dtype):
    features, labels = one_large_column(N, D, factor, dtype)
    fit = fit_logistic(features, labels, 2, 10.0)
    assert fit.converged and bool((fit.logits(features).argmax(1) == labels).all())
    # Apart from that column, whose weight costs next to nothing, it is an ordinary problem
    ordinary = features.double().clone()
    ordinary[:, 5] *= min(1e3, factor) / factor
    best = fit_logistic(ordinary, labels, 2, 10.0, tolerance=1e-12).objective
    assert fit.objective == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("N", [19, 60])
def test_what_tells_columns_apart_counts_however_much_they_share(N):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, 30, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] > features[:, 1]).long()
    features += 1e7 * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    fit = fit_logistic(features, labels, 2, 10.0)
    assert fit.converged and bool((fit.logits(features).argmax(1) == labels).all())
    # Rows twice at half the C: the same objective, by way of the covariance of columns
    doubled = fit_logistic(features.repeat(2, 1), labels.repeat(2), 2, 5.0, tolerance=1e-12)
    assert fit.objective == pytest.approx(doubled.objective, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_without_labels_gets_no_probability_and_leaves_the_others_alone(dtype):
    features, labels = mixture(classes=3)
    features = features.to(dtype)
    all_present = fit_logistic(features, labels, 3)
    spread_out = fit_logistic(features, torch.tensor([0, 2, 3])[labels], 5)
    present = [0, 2, 3]
    torch.testing.assert_close(spread_out.weight[present], all_present.weight)
    assert spread_out.objective == pytest.approx(all_present.objective, rel=1e-12)
    probability = spread_out.logits(features).softmax(1)
    assert float(probability[:, [1, 4]].max()) < 1e-16


def test_single_class_is_certain():
    fit = fit_logistic(torch.randn(20, 3).double(), torch.full((20,), 2), 4)
    assert fit.converged and fit.objective == 0.0
    assert bool((fit.logits(torch.randn(5, 3)).argmax(1) == 2).all())


def test_same_input_gives_the_same_bits():
    features, labels = mixture(N=5000, D=20, classes=10)
    first, second = (fit_logistic(features.float(), labels, 10) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert first.objective == second.objective


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 60),
    D=st.integers(1, 12),
    classes=st.integers(1, 6),
    C=st.sampled_from([1e-4, 1.0, 1e3, 1e8]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_any_shape_gives_a_finite_classifier_no_worse_than_the_constant_one(
    N, D, classes, C, scale, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(N, D, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (N,), generator=generator)
    fit = fit_logistic(features, labels, classes, C)
    assert fit.weight.shape == (classes, D) and fit.bias.shape == (classes,)
    assert bool(torch.isfinite(fit.weight).all() and torch.isfinite(fit.bias).all())
    share = torch.bincount(labels).double() / N
    entropy = float(-torch.special.xlogy(share, share).sum())
    assert fit.objective <= C * N * entropy * (1 + 1e-9) + 1e-9


def test_more_features_than_are_whitened_reach_the_same_optimum(monkeypatch):
    features, labels = mixture(D=30)
    whitened = fit_logistic(features, labels, 4, C=1.0)
    monkeypatch.setattr("kernels.logistic_regression.WHITEN_UP_TO", 8)
    scaled = fit_logistic(features, labels, 4, C=1.0, tolerance=1e-10)
    assert scaled.objective == pytest.approx(whitened.objective, rel=1e-6)


def wrong_inputs():
    features, labels = mixture(N=10, D=2, classes=3)
    other = LogisticFit(torch.zeros(3, 5), torch.zeros(3), 0.0, 0.0, 0, False)
    yield "labels run", (features, labels + 1, 3), {}
    yield "labels run", (features, labels - 1, 3), {}
    yield "labels have shape", (features, labels[:5], 3), {}
    yield "expected integers", (features, labels.double(), 3), {}
    yield "features have shape", (features[:0], labels[:0], 3), {}
    yield "features have shape", (features[:, :0], labels, 3), {}
    yield "features have shape", (features[:, :, None], labels, 3), {}
    yield "expected float32", (features.long(), labels, 3), {}
    yield "C is", (features, labels, 3, 0.0), {}
    yield "C is", (features, labels, 3, -1.0), {}
    yield "C is", (features, labels, 3, float("nan")), {}
    yield "start has weight", (features, labels, 3), {"start": other}


@pytest.mark.parametrize("message, arguments, options", list(wrong_inputs()))
def test_wrong_input_is_refused_in_one_line(message, arguments, options):
    with pytest.raises(ProbeError, match=message) as error:
        fit_logistic(*arguments, **options)
    assert "expected" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_are_named(value):
    features, labels = mixture(N=10, D=2, classes=3)
    features[[3, 7], 1] = value
    with pytest.raises(NonFiniteFeatures, match=r"2 of 10 rows.*first in row 3"):
        fit_logistic(features, labels, 3)


def test_classifier_refuses_features_of_another_width():
    features, labels = mixture()
    with pytest.raises(ProbeError, match=r"expected \[B, 6\]"):
        fit_logistic(features, labels, 4).logits(features[:, :5])


@dataclass
class Images:
    """What the probe asks of a data set."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: int

    def __len__(self):
        return len(self.images)

    def floats(self, index=None, dtype=torch.float32):
        return (self.images if index is None else self.images[index]).to(dtype)


def images(N, seed):
    features, labels = mixture(N=N, D=16, classes=3)
    noise = torch.randn(N, 16, generator=torch.Generator().manual_seed(seed))
    return Images((features + 0.1 * noise).view(N, 1, 4, 4), labels, 3)


def sigmoid_layer(x, params):
    return torch.sigmoid(x.flatten(1) @ params[1]["w"].T + params[1]["b"])


def sigmoid_params(dtype=torch.float64, D=5):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(D, 16, generator=generator, dtype=torch.float64).to(dtype)
    return [{}, {"w": w.requires_grad_(), "b": torch.zeros(D, dtype=dtype, requires_grad=True)}]


def test_gradient_of_the_loss_is_that_of_the_batch_loss_with_the_classifier_frozen():
    params, train = sigmoid_params(), images(300, 0)
    draw = torch.randperm(300, generator=torch.Generator().manual_seed(5))[:64]
    result = linear_probe(
        sigmoid_layer,
        params,
        train,
        images(100, 1),
        outer_images=64,
        generator=torch.Generator().manual_seed(5),
    )
    x, labels = train.floats(draw, dtype=torch.float64), train.labels[draw]

    def frozen(w, b):
        logits = result.fit.logits(sigmoid_layer(x, [{}, {"w": w, "b": b}]))
        return torch.nn.functional.cross_entropy(logits, labels)

    w, b = params[1]["w"].detach(), params[1]["b"].detach()
    assert result.loss.item() == pytest.approx(frozen(w, b).item(), rel=1e-12)
    slopes = torch.autograd.grad(result.loss, [params[1]["w"], params[1]["b"]])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        dw, db = (torch.randn(a.shape, generator=generator).double() for a in (w, b))
        h = 1e-5
        difference = float(frozen(w + h * dw, b + h * db) - frozen(w - h * dw, b - h * db))
        expected = float((slopes[0] * dw).sum() + (slopes[1] * db).sum())
        assert difference / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_gradient_over_all_images_is_that_of_the_fitted_objective():
    """The envelope theorem: refitting the probe does not change the slope (small penalty)."""
    train = images(300, 0)
    params = sigmoid_params()

    def refitted(w):
        features = sigmoid_layer(train.floats(dtype=torch.float64), [{}, {"w": w, "b": 0.0}])
        return fit_logistic(features, train.labels, 3, 1e3, tolerance=1e-16).objective / 3e5

    result = linear_probe(sigmoid_layer, params, train, train, outer_images=300)
    (slope,) = torch.autograd.grad(result.loss, [params[1]["w"]])
    w = params[1]["w"].detach()
    dw = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).double()
    difference = (refitted(w + 1e-4 * dw) - refitted(w - 1e-4 * dw)) / 2e-4
    assert float((slope * dw).sum()) == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("C", [0.1, 1000.0])
@pytest.mark.parametrize("absent, N, D, factor", [
    (False, 300, 4, 1), (True, 300, 4, 1), (False, 12, 30, 1), (False, 12, 30, 1e7),
    (False, 60, 30, 1e7),
])  # fmt: skip
def test_the_hessian_is_inverted(C, absent, N, D, factor):
    features, labels = mixture(N=N, D=D, classes=3)
    features[:, 2] *= factor
    if absent:
        labels = torch.where(labels == 1, 0, labels)
    fit = fit_logistic(features, labels, 3, C, tolerance=1e-14)
    generator = torch.Generator().manual_seed(0)
    kept = torch.tensor([1.0, 0.0 if absent else 1.0, 1.0]).double()[:, None]
    right = torch.randn(3, D + 1, generator=generator, dtype=torch.float64) * kept
    right[:, 2] *= factor
    right = (right - kept * right.sum(0) / kept.sum()) * kept

    def objective(both):
        logits = features @ both[:, :D].T + both[:, D]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return (C * loss + 0.5 * both[:, :D].square().sum()) / (C * N)

    both = torch.cat([fit.weight, fit.bias[:, None]], 1)
    weight, bias = solve_hessian(features, labels, C, fit, right[:, :D], right[:, D])
    solved = torch.cat([weight, bias[:, None]], 1)
    product = torch.autograd.functional.hvp(objective, both, solved)[1]
    product[:, 2] /= factor
    right[:, 2] /= factor
    torch.testing.assert_close(product, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("C", [0.05, 1.0, 1000.0])
def test_implicit_gradient_is_that_of_a_held_out_loss_with_the_probe_fitted_anew(monkeypatch, C):
    exactly = functools.partial(fit_logistic, tolerance=1e-16)
    monkeypatch.setattr(module, "fit_logistic", exactly)
    monkeypatch.setattr(module, "ROWS_WITH_GRAPH", 70)
    train, params = images(300, 0), sigmoid_params()

    def held_out(w, b):
        options = {"outer_images": 64, "probe_gradient": "implicit"}
        generator = torch.Generator().manual_seed(5)
        point = [{}, {"w": w, "b": b}]
        return linear_probe(sigmoid_layer, point, train, train, C, generator=generator, **options)

    result = held_out(params[1]["w"], params[1]["b"])
    slopes = torch.autograd.grad(result.loss, [params[1]["w"], params[1]["b"]])
    w, b = params[1]["w"].detach(), params[1]["b"].detach()
    assert held_out(w, b).loss.item() == pytest.approx(result.loss.item(), rel=1e-12)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        dw, db = (torch.randn(a.shape, generator=generator).double() for a in (w, b))
        above, below = (held_out(w + h * dw, b + h * db).loss.item() for h in (1e-4, -1e-4))
        expected = float((slopes[0] * dw).sum() + (slopes[1] * db).sum())
        assert (above - below) / 2e-4 == pytest.approx(expected, rel=1e-5)


def test_implicit_gradient_reaches_through_a_graph_behind_the_params():
    train, params = images(200, 0), sigmoid_params()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    scaled = [{}, {name: scale * t.detach() for name, t in params[1].items()}]
    loss = ProbeLoss(train, train, 1.0, outer_images=50, probe_gradient="implicit")

    def gradients(point, by):
        value, numbers = loss(sigmoid_layer, point, torch.Generator().manual_seed(1))
        assert set(numbers) == {"train_accuracy", "test_accuracy"}
        return torch.autograd.grad(value, by)

    at = [{}, {name: (1.3 * t.detach()).requires_grad_() for name, t in params[1].items()}]
    by_params = gradients(at, [at[1]["w"], at[1]["b"]])
    pairs = zip(by_params, (params[1]["w"], params[1]["b"]), strict=True)
    expected = sum(float((g * t.detach()).sum()) for g, t in pairs)
    assert float(gradients(scaled, [scale])[0]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("options", [
    {"probe_gradient": "exact"}, {"probe_gradient": "implicit", "outer_images": 300},
])  # fmt: skip
def test_a_gradient_that_cannot_be_had_is_refused(options):
    train = images(300, 0)
    with pytest.raises(ProbeError, match="expected"):
        linear_probe(sigmoid_layer, sigmoid_params(), train, train, **options)
    with pytest.raises(ProbeError, match="expected"):
        ProbeLoss(train, train, 1.0, **options)


# ---- judges that see drawn training images alone ----


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_slopes_are_differences(loss, params, relative, h=1e-5):
    """The gradient of loss(params), which draws the same images each time, by central ones."""
    w, b = (params[1][name] for name in "wb")
    slopes = torch.autograd.grad(loss(params), [w, b])
    for seed in range(3):
        dw, db = (torch.randn(a.shape, generator=seeded(seed)).double() for a in (w, b))
        above, below = (
            loss([{}, {"w": w.detach() + k * dw, "b": b.detach() + k * db}]).item() for k in (h, -h)
        )
        expected = float((slopes[0] * dw).sum() + (slopes[1] * db).sum())
        assert (above - below) / (2 * h) == pytest.approx(expected, rel=relative)


@pytest.mark.parametrize("N, D", [(300, 6), (20, 30), (5, 5)])
def test_ridge_regression_is_that_of_scikit_learn(N, D):
    features, labels = mixture(N=N, D=D, classes=3)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    weight, bias = ridge_regression(features, targets, 0.7)
    model = Ridge(alpha=0.7, solver="svd").fit(features.numpy(), targets.numpy())
    torch.testing.assert_close(weight.T, torch.from_numpy(model.coef_), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(bias, torch.from_numpy(model.intercept_), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fit_images", [150, 4])  # more than the five features, and fewer
def test_the_ridge_loss_has_the_gradient_through_the_fit(fit_images):
    judge = RidgeLoss(images(300, 0), fit_images=fit_images, outer_images=60)
    assert_slopes_are_differences(
        lambda params: judge(sigmoid_layer, params, seeded(4))[0], sigmoid_params(), 1e-6
    )


def test_the_ridge_loss_is_judged_on_images_that_it_was_not_fitted_to():
    data, params = images(300, 0), sigmoid_params()
    judge = RidgeLoss(data, fit_images=200, outer_images=100, penalty=2.0)
    loss, numbers = judge(sigmoid_layer, params, seeded(4))
    index = torch.randperm(300, generator=seeded(4))
    features = sigmoid_layer(data.floats(dtype=torch.float64), params).detach().numpy()
    one_hot = torch.nn.functional.one_hot(data.labels, 3).numpy()
    seen, judged = index[:200], index[200:]
    model = Ridge(alpha=2.0).fit(features[seen], one_hot[seen])
    outputs = model.predict(features[judged])
    expected = ((outputs - one_hot[judged]) ** 2).sum(1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    right = (outputs.argmax(1) == data.labels[judged].numpy()).mean()
    assert set(numbers) == set(judge.metrics)
    assert numbers["held_out_accuracy"] == pytest.approx(right)
    assert numbers["train_accuracy"] == pytest.approx(
        (model.predict(features[seen]).argmax(1) == data.labels[seen].numpy()).mean()
    )


@pytest.mark.parametrize("sizes", [(200, 101), (0, 5), (5, 0)])
def test_a_ridge_loss_without_enough_images_is_refused(sizes):
    with pytest.raises(ProbeError, match="of 300 training images"):
        RidgeLoss(images(300, 0), fit_images=sizes[0], outer_images=sizes[1])


def test_the_envelope_gradient_of_a_sampled_probe_is_exact(monkeypatch):
    exactly = functools.partial(fit_logistic, tolerance=1e-16)
    monkeypatch.setattr(module, "fit_logistic", exactly)
    judge = SampledProbeLoss(images(300, 0), 1e6, images=120)
    assert_slopes_are_differences(
        lambda params: judge(sigmoid_layer, params, seeded(4))[0], sigmoid_params(), 1e-4, 1e-4
    )


def test_a_sampled_probe_is_fitted_to_and_judged_on_the_same_drawn_images():
    data, params = images(300, 0), sigmoid_params()
    seen = []

    def model(x, params):
        seen.append(x)
        return sigmoid_layer(x, params)

    judge = SampledProbeLoss(data, 10.0, images=120)
    loss, numbers = judge(model, params, seeded(4))
    index = torch.randperm(300, generator=seeded(4))[:120]
    (x,) = seen
    assert torch.equal(x, data.floats(index, dtype=torch.float64))
    alone = Images(data.images[index], data.labels[index], 3)
    expected = linear_probe(sigmoid_layer, params, alone, alone, 10.0, outer_images=120)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert numbers == {"train_accuracy": pytest.approx(expected.train_accuracy)}
    assert judge(model, params, seeded(5))[0].item() != loss.item()
    every = SampledProbeLoss(data, 10.0, images=1000)(model, params, seeded(4))
    whole = linear_probe(sigmoid_layer, params, data, data, 10.0, outer_images=300)
    assert every[0].item() == pytest.approx(whole.loss.item(), rel=1e-12)


@pytest.mark.parametrize("judge", [SampledProbeLoss(images(300, 0), 1.0), RidgeLoss(
    images(300, 0), fit_images=100, outer_images=100)], ids=["sampled", "ridge"])  # fmt: skip
def test_drawn_images_with_features_that_are_not_finite_raise(judge):
    params = sigmoid_params()
    params[1]["b"].data[0] = float("nan")
    with pytest.raises(NonFiniteFeatures):
        judge(sigmoid_layer, params, seeded(0))
    loss, _ = judge(sigmoid_layer, sigmoid_params(torch.float32), seeded(0))
    assert loss.dtype == torch.float32


def test_accuracies_are_those_of_scikit_learn():
    params, train, test = sigmoid_params(), images(300, 0), images(200, 1)
    result = linear_probe(sigmoid_layer, params, train, test, C=1.0)
    train_features, test_features = (
        sigmoid_layer(data.floats(dtype=torch.float64), params).detach() for data in (train, test)
    )
    model = scikit_learn(train_features, train.labels, C=1.0)
    assert result.train_accuracy == model.score(train_features.numpy(), train.labels.numpy())
    assert result.test_accuracy == model.score(test_features.numpy(), test.labels.numpy())


def test_every_image_is_used_when_there_are_no_more_than_asked_for():
    params, train = sigmoid_params(), images(300, 0)
    result = linear_probe(sigmoid_layer, params, train, train)
    features = extract_features(sigmoid_layer, params, train)
    penalty = 0.5 * float(result.fit.weight.square().sum())
    mean = (result.fit.objective - penalty) / (1000 * 300)
    assert result.loss.item() == pytest.approx(mean, rel=1e-9)
    assert features.shape == (300, 5) and not features.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_has_the_dtype_of_the_params(dtype):
    params, train = sigmoid_params(dtype), images(50, 0)
    result = linear_probe(sigmoid_layer, params, train, train)
    assert result.loss.dtype == dtype and result.loss.shape == ()
    result.loss.backward()
    assert bool(torch.isfinite(params[1]["w"].grad).all())


def test_chunks_of_any_size_give_the_same_features():
    params, train = sigmoid_params(), images(50, 0)
    whole = extract_features(sigmoid_layer, params, train)
    torch.testing.assert_close(extract_features(sigmoid_layer, params, train, batch_size=7), whole)


def test_image_features_are_flattened():
    train = images(50, 0)
    assert extract_features(lambda x, params: x, [{}], train).shape == (50, 16)


def test_probe_of_non_finite_features_raises():
    params, train = sigmoid_params(), images(50, 0)
    bad = images(20, 1)
    bad.images[0] = float("nan")
    with pytest.raises(NonFiniteFeatures):
        linear_probe(sigmoid_layer, params, bad, train)
    with pytest.raises(NonFiniteFeatures):
        linear_probe(sigmoid_layer, params, train, bad)


def test_probe_of_no_images_is_refused():
    params, train = sigmoid_params(), images(50, 0)
    with pytest.raises(ProbeError, match="empty"):
        linear_probe(sigmoid_layer, params, images(3, 0), Images(train.images[:0], train.labels, 3))
    with pytest.raises(ProbeError, match="outer_images"):
        linear_probe(sigmoid_layer, params, train, train, outer_images=0)


def test_a_row_far_larger_than_the_others_does_not_end_the_fit_early():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(19, 20, dtype=torch.float64, generator=generator)
    labels = (features[:, 0] > 0).long()
    features[3] *= 1e7
    fits = [fit_logistic(features, labels, 2, 10.0, tolerance=t) for t in (1e-8, 1e-15)]
    assert all(fit.converged for fit in fits)
    assert fits[0].objective == pytest.approx(fits[1].objective, rel=1e-8)
