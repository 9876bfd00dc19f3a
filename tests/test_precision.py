"""Products in bfloat16 against rounded factors; what stays exact; what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from experiment.precision import PrecisionError, Products
from experiment.seeds import seeded_generator
from initializers import TRAINABLE, GaussianInitializer
from kernels.logistic_regression import fit_logistic
from learning_rules import PolynomialRule
from models_fully_local import Activation, lateral_network
from train import train

EPSILON = 2**-8  # of a rounding to bfloat16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    return x.bfloat16().double()


def assert_rounded(actual, expected, terms=None):
    """Equal but for the rounding of products; `terms`: what was added to them exactly."""
    assert actual.dtype == torch.float32
    rest = expected if terms is None else expected - terms
    bound = EPSILON * rest.abs() + 1e-5 * (1 + expected.abs())
    assert ((actual.double() - expected).abs() <= bound).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_factors_are_rounded_and_sums_are_not(n, k, m, seed):
    a, b, total = normal(n, k, seed=seed), normal(k, m, seed=seed + 1), normal(n, m, seed=seed + 2)
    product = rounded(a) @ rounded(b)
    with Products("bfloat16"):
        assert_rounded(a @ b, product)
        assert_rounded(torch.mm(a, b, out=torch.empty(n, m)), product)
        assert_rounded((a[None] @ b[None])[0], product)
        added = torch.addmm(total, a, b, beta=0.5, alpha=2)
        assert_rounded(added, total.double() / 2 + 2 * product, total.double() / 2)
        inplace = total.clone().addmm_(a, b)
        assert_rounded(inplace, total.double() + product, total.double())
        batched = torch.baddbmm(total[None], a[None], b[None])[0]
        assert_rounded(batched, total.double() + product, total.double())
        assert torch.equal(a + a, 2 * a) and (a.double() @ b.double()).dtype == torch.float64


def test_convolutions_and_their_gradients():
    x, w = normal(2, 3, 6, 6).requires_grad_(), normal(4, 3, 3, 3, seed=1).requires_grad_()
    exact = [rounded(t.detach()).requires_grad_() for t in (x, w)]
    with Products("bfloat16"):
        y = functional.conv2d(x, w)
        found = torch.autograd.grad(y.sum(), [x, w])
    expected = functional.conv2d(*exact)
    assert_rounded(y.detach(), expected.detach())
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_rounded(ours, theirs)


def hypergradient(kind, convolutions=(), steps=20):
    model = lateral_network((1, 9, 9), [6], Activation(), convolutions=convolutions)
    rule = PolynomialRule.of_degree(3, bound="tanh", forward_weight_bound=1.0)
    with torch.no_grad():
        for group in ("w", "b", "m"):
            p = getattr(rule, group)
            p.copy_(1e-3 * normal(len(p), seed=3))
    initializer = GaussianInitializer({"b": TRAINABLE}, {"w": TRAINABLE})
    stream = iter([torch.rand(32, 1, 9, 9, generator=seeded_generator(k)) for k in range(steps)])
    x = torch.rand(16, 1, 9, 9, generator=seeded_generator(99))
    with Products(kind) as products:
        theta = train(model, initializer(model, seeded_generator(1)), stream, rule, steps)
        with products.exact():
            loss = model(x, theta).square().mean()
        return torch.cat(torch.autograd.grad(loss, list(rule.parameters())))


@pytest.mark.parametrize("convolutions", [(), [(3, 4)]])
def test_hypergradients_change_by_rounding_only(convolutions):
    exact = hypergradient("float32", convolutions)
    change = (hypergradient("bfloat16", convolutions) - exact).norm() / exact.norm()
    assert 1e-6 < change < 0.03


def test_what_is_exact_within_is_bit_for_bit_what_it_is_without():
    features, labels = normal(300, 8), torch.randint(3, (300,), generator=seeded_generator(0))
    alone = fit_logistic(features, labels, 3, 10.0)
    with Products("bfloat16") as products, products.exact():
        within = fit_logistic(features, labels, 3, 10.0)
    assert torch.equal(alone.weight, within.weight)


def test_after_it_products_are_exact_again_also_after_an_error():
    a, b = normal(4, 5), normal(5, 6)
    exact = a @ b
    with pytest.raises(ZeroDivisionError), Products("bfloat16"):
        assert not torch.equal(a @ b, exact)
        raise ZeroDivisionError
    assert torch.equal(a @ b, exact)


def test_unknown_kinds_and_tensor_cores_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(PrecisionError, match="choose from float32, tf32, bfloat16"):
        Products("fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PrecisionError, match="tf32 need a CUDA device"):
        Products("tf32")
