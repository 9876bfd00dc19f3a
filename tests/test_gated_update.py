"""A whole update in one step: its loops and its tensor operations, against finite differences."""

import pytest
import torch
from oracles import DOUBLE, assert_near, gradients, normal, weighted_sum
from torch.autograd import gradcheck

from kernels import gated_update as module
from kernels.gated_update import GatedTerms, gated_update
from models_fully_local import Activation

SAMPLES, UNITS, INPUTS = 4, 2, 3


def per_view(views: int, width: int, seed: int) -> list[torch.Tensor]:
    return [normal(seed + v, SAMPLES, width) for v in range(views)]


class Problem:
    """Terms and everything else that an update needs."""

    def __init__(self, views, rows, factors=("1",), more=False, base="sigmoid") -> None:
        self.views, self.activation = views, Activation(base, 2.0)
        self.terms = GatedTerms(rows, factors, of_s=more, of_w=more)
        count = sum(1 if kind == "1" else views for kind in rows) * len(factors)
        numbers = [torch.tensor(n, dtype=DOUBLE).requires_grad_() for n in (0.3, 0.2)]
        self.leaves = [
            normal(0, count + more * (views + 1)), normal(1, UNITS, INPUTS), normal(2, UNITS),
            *numbers, *per_view(views, INPUTS, 10),
        ]  # fmt: skip

    def __call__(self, *leaves):
        return gated_update(self.terms, *leaves[:5], leaves[5:], self.activation)


ROWS = [("c", "r", "1"), ("r_cov",), ("c", "r", "r_cov", "1"), ("c", "1"), ("c",), ("1",)]


@pytest.mark.parametrize("views, rows", [
    *((1, rows) for rows in ROWS), *((2, rows) for rows in ROWS),
    (2, ("c", "r", "r_cov", "r_cross", "1")), (2, ("r_cross",)),
])  # fmt: skip
@pytest.mark.parametrize("factors", [
    ("1", "mean", "d", "d2"), ("1",), ("mean",), ("1", "d", "rz"), ("rz",),
])  # fmt: skip
@pytest.mark.parametrize("more", [True, False])
def test_gradients_are_finite_differences_and_those_of_tensor_operations(
    views, rows, factors, more, monkeypatch
):
    problem = Problem(views, rows, factors, more)
    assert gradcheck(problem, problem.leaves, atol=1e-6)
    assert_loops_and_tensor_operations_agree(problem, monkeypatch)


def assert_loops_and_tensor_operations_agree(problem, monkeypatch) -> None:
    results = []
    for _ in range(2):
        new = problem(*problem.leaves)
        results.append([*new, *gradients(weighted_sum(new), problem.leaves)])
        monkeypatch.setattr(module, "NUMPY_TYPES", {})  # without loops
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("base", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("factors", [("1", "mean", "d", "d2"), ("d", "rz")])
def test_loops_and_tensor_operations_agree(views, base, factors, monkeypatch):
    rows = ("c", "r", "r_cov", *(("r_cross",) if views == 2 else ()), "1")
    problem = Problem(views, rows, factors, True, base)
    assert_loops_and_tensor_operations_agree(problem, monkeypatch)


def test_what_needs_no_gradient_gets_none():
    problem = Problem(2, ("c", "r", "1"))
    fixed = [leaf.detach() if k in (3, 4, 5, 6) else leaf for k, leaf in enumerate(problem.leaves)]
    needing = [leaf for leaf in fixed if leaf.requires_grad]
    assert all(grad.any() for grad in gradients(weighted_sum(problem(*fixed)), needing))
