"""Moments, currents, products and steps, against finite differences and each other."""

import pytest
import torch
from oracles import DOUBLE, assert_near, normal
from torch.autograd import gradcheck

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
