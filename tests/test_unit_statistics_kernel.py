"""Moments, currents, products and steps, against finite differences and each other."""

import pytest
import torch
from oracles import DOUBLE, assert_near, gradients, normal, weighted_sum
from torch.autograd import gradcheck

from kernels.gated_update import GatedTerms, gated_update
from kernels.unit_statistics import (
    correlate,
    currents,
    gain,
    gated_currents,
    moments,
    rms_step,
)
from models_fully_local import Activation

SAMPLES, UNITS, INPUTS = 5, 3, 4


def per_view(views: int, width: int, seed: int) -> list[torch.Tensor]:
    return [normal(seed + v, SAMPLES, width) for v in range(views)]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("wanted", ["gram", "variance", "mean"])
def test_moments_are_those_of_all_samples_of_all_views(views, wanted):
    y = per_view(views, UNITS, 0)
    c, mean, second = moments(y, wanted)
    both = torch.cat(y)
    assert_near(mean, both.mean(0))
    centred = [v - both.mean(0) for v in y]
    expected = centred if views == 1 else [centred[0] + centred[1], centred[0] - centred[1]]
    assert_near(c, torch.stack(expected))
    covariance = sum(v.T @ v for v in centred) / len(both)
    if wanted == "gram":
        assert_near(second.sum(0), covariance)
    if wanted == "gram" and views == 2:
        across = centred[0].T @ centred[1] / len(both)
        assert_near(second[0] - second[1], across + across.T)
    if wanted == "variance":
        assert_near(second.sum(0), covariance.diagonal())
    assert gradcheck(lambda *y: moments(y, wanted), y)


@pytest.mark.parametrize("base", ["sigmoid", "tanh", "relu", "identity", None])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("per_unit", [True, False, None])
def test_currents_have_the_gradients_of_finite_differences(base, views, dense, per_unit):
    c = torch.stack(per_view(views, UNITS, 0)).detach().requires_grad_()
    k = normal(10, views, *([UNITS] * (1 + dense)))
    s, const = per_view(views, UNITS, 20), normal(11, UNITS)
    of_s = None if per_unit is None else normal(12, views, UNITS if per_unit else 1)
    sigma = [v.sigmoid().detach().requires_grad_() for v in per_view(views, UNITS, 30)]
    inputs = [c, k, const, *([] if of_s is None else [of_s, *s]), *(sigma if base else [])]

    def function(c, k, const, *others):
        others = list(others)
        weights = None if of_s is None else others.pop(0)
        preactivations = s if of_s is None else [others.pop(0) for _ in range(views)]
        if base is None:
            return currents(c, k, const, preactivations, weights)
        activation = Activation(base, 2.0)
        return gated_currents(c, k, const, preactivations, weights, others, activation)

    assert gradcheck(function, inputs)
    if base is not None:
        slope = torch.stack([gain(y, Activation(base, 2.0)) / 2 for y in sigma])
        assert_near(function(*inputs), slope * currents(c, k, const, s, of_s))


@pytest.mark.parametrize("views", [1, 2])
def test_products_and_steps_have_the_gradients_of_finite_differences(views):
    h = torch.stack(per_view(views, UNITS, 0)).detach().requires_grad_()
    x = per_view(views, INPUTS, 10)
    dw, db = correlate(h, x)
    assert_near(dw, sum(a.T @ b for a, b in zip(h, x, strict=True)))
    assert_near(db, h.sum((0, 1)))
    assert gradcheck(lambda h, *x: correlate(h, x), [h, *x])
    arguments = [normal(20, UNITS, INPUTS), normal(21, UNITS), *(t.detach() for t in (dw, db))]
    arguments += [torch.tensor(n, dtype=DOUBLE) for n in (0.3, 0.2)]
    arguments = [t.requires_grad_() for t in arguments]
    w, b, dw, db, rate, eps = arguments
    root = (dw.square().mean(1) + eps**2).sqrt()
    new = rms_step(*arguments)
    assert_near(new[0], w + rate * dw / root[:, None])
    assert_near(new[1], b + rate * db / root)
    assert gradcheck(rms_step, arguments)


ROWS = [("c", "r", "1"), ("r_cov",), ("c", "r", "r_cov", "1"), ("c", "1"), ("c",), ("1",)]


@pytest.mark.parametrize("views, rows", [
    *((1, rows) for rows in ROWS), *((2, rows) for rows in ROWS),
    (2, ("c", "r", "r_cov", "r_cross", "1")), (2, ("r_cross",)),
])  # fmt: skip
@pytest.mark.parametrize("factors", [("1", "mean", "d", "d2"), ("1",), ("mean",)])
@pytest.mark.parametrize("more", [True, False])
def test_an_update_at_once_has_the_gradients_of_finite_differences(views, rows, factors, more):
    terms = GatedTerms(rows, factors, of_s=more, of_w=more)
    count = sum(1 if kind == "1" else views for kind in rows) * len(factors)
    weights = normal(0, count + more * (views + 1))
    w, b = normal(1, UNITS, INPUTS), normal(2, UNITS)
    rate, eps = (torch.tensor(n, dtype=DOUBLE).requires_grad_() for n in (0.3, 0.2))
    x, s = per_view(views, INPUTS, 10), per_view(views, UNITS, 20)
    activation = Activation("sigmoid", 2.0)

    def function(weights, w, b, rate, eps, *tensors):
        x, s = tensors[:views], tensors[views:]
        y = [torch.sigmoid(2 * v) for v in s]
        return gated_update(terms, weights, w, b, rate, eps, x, s, y, activation)

    assert gradcheck(function, [weights, w, b, rate, eps, *x, *s], atol=1e-6)


def test_inputs_that_need_no_gradient_get_none():
    terms = GatedTerms(("c", "r", "1"), ("1",), of_s=False, of_w=False)
    x = [v.detach() for v in per_view(2, INPUTS, 10)]
    s, weights = per_view(2, UNITS, 20), normal(0, 5)
    w, b = normal(1, UNITS, INPUTS), normal(2, UNITS)
    rate, eps = (torch.tensor(n, dtype=DOUBLE) for n in (0.3, 0.2))
    new = gated_update(terms, weights, w, b, rate, eps, x, s, s, Activation("identity"))
    assert all(grad.any() for grad in gradients(weighted_sum(new), [weights, w, b, *s]))
