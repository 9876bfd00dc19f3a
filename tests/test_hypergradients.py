"""Hypergradients: closed forms, rates, finite differences, counted matvecs, and wrong use."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DOUBLE, assert_near, normal
from torch.func import functional_call

import hypergradients as hg
from hypergradients import (
    CG,
    Adam,
    CG_normaleq,
    ConjugateGradient,
    DivergenceError,
    DivergenceWarning,
    FixedPoint,
    GradientDescent,
    HeavyBall,
    HypergradientError,
    LinearSolve,
    NormalEquations,
    checkpointed_reverse,
    differentiable_by,
    exact,
    fixed_point,
    forward_mode,
    implicit,
    jvp,
    neumann,
    neumann_lookback,
    nystrom,
    reverse,
    reverse_unroll,
    stoch_AID,
    truncated_reverse,
    update_tensor_grads,
)
from learning_rules import PolynomialRule
from models_fully_local import Activation, lateral_mlp
from train import train


class Ridge:
    """min |X w - y|^2 / 2n + sum_i l_i w_i^2 / 2, all in closed form; hyperparameters l and t.

    Outer loss |Xv w - yv|^2 / 2n + t^2 sum(l). The map is a gradient step of a rate below 2 / L.
    """

    def __init__(self, dtype=DOUBLE, features=4, least=1.0):
        self.x, self.y = (
            normal(0, 40, features).detach().to(dtype),
            normal(1, 40).detach().to(dtype),
        )
        self.xv, self.yv = normal(2, 20, features).detach().to(dtype), normal(3, 20).detach()
        self.yv = self.yv.to(dtype)
        l2 = torch.linspace(least, 2 * least, features, dtype=dtype)
        self.hparams = [l2.requires_grad_(), torch.tensor(0.5, dtype=dtype, requires_grad=True)]
        self.hessian = (self.x.T @ self.x / len(self.x) + l2.diag()).detach()
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        self.condition = float(eigenvalues[-1] / eigenvalues[0])
        self.rate = float(1 / eigenvalues[-1])
        self.contraction = 1 - 1 / self.condition
        self.map = GradientDescent(self.inner_loss, self.rate)
        self.solution = [w.detach() for w in self.solve(self.hparams)]

    def inner_loss(self, params, hparams):
        residual = self.x @ params[0] - self.y
        return residual.square().mean() / 2 + (hparams[0] * params[0].square()).sum() / 2

    def outer_loss(self, params, hparams):
        residual = self.xv @ params[0] - self.yv
        return residual.square().mean() / 2 + hparams[1] ** 2 * hparams[0].sum()

    def solve(self, hparams):
        hessian = self.x.T @ self.x / len(self.x) + hparams[0].diag()
        return [torch.linalg.solve(hessian, self.x.T @ self.y / len(self.x))]

    def adjoint(self):
        """H^-1 grad_w E, which the system's v is up to the rate."""
        w = self.solution[0]
        return torch.linalg.solve(self.hessian, self.xv.T @ (self.xv @ w - self.yv) / len(self.xv))

    def hypergradient(self):
        """- w_i (H^-1 grad E)_i + t^2 and 2 t sum(l)."""
        l2, t = (h.detach() for h in self.hparams)
        return [-self.solution[0] * self.adjoint() + t**2, 2 * t * l2.sum()]


def at_fixed_point(method, **options):
    def run(problem):
        return method(
            params=problem.solution, hparams=problem.hparams, fp_map=problem.map,
            outer_loss=problem.outer_loss, set_grad=False, **options,
        )  # fmt: skip

    return run


def from_start(method, steps, **options):
    def run(problem):
        return method(
            [torch.zeros_like(w) for w in problem.solution], problem.hparams,
            update_maps=[problem.map] * steps, outer_loss=problem.outer_loss, set_grad=False,
            **options,
        )  # fmt: skip

    return run


def unrolled(problem, steps=60):
    params = [torch.zeros_like(w) for w in problem.solution]
    for _ in range(steps):
        params = problem.map(params, problem.hparams)
    return reverse_unroll(params, problem.hparams, problem.outer_loss, set_grad=False)


def from_history(problem, steps=60):
    history = [[torch.zeros_like(w) for w in problem.solution]]
    for _ in range(steps):
        history.append(problem.map(history[-1], problem.hparams, create_graph=False))
    maps = [problem.map] * steps
    return reverse(history, problem.hparams, maps, problem.outer_loss, set_grad=False)


def vectorized(problem):
    problem.map = GradientDescent(problem.inner_loss, problem.rate, gradient="func")
    return from_start(forward_mode, 60, vectorize=True)(problem)


def momentum_on_the_system(problem):
    def build(v, lr):
        return torch.optim.SGD(v, lr=lr, momentum=0.5), None

    return at_fixed_point(
        stoch_AID, K=80, optim_build=build, opt_params={"lr": 0.9}, verbose=False
    )(problem)[0]


def with_inner_loss(problem):
    return stoch_AID(
        problem.solution, problem.hparams, problem.outer_loss, 80, inner_loss=problem.inner_loss,
        optim_build=lambda v: (torch.optim.SGD(v, lr=problem.rate), None), set_grad=False,
        verbose=False,
    )[0]  # fmt: skip


CONVERGED = {
    "exact": lambda p: exact(p.solve, p.hparams, p.outer_loss, set_grad=False),
    "reverse_unroll": unrolled,
    "reverse": from_history,
    "fixed_point": at_fixed_point(fixed_point, K=80),
    "neumann": at_fixed_point(neumann, K=80),
    "CG": at_fixed_point(CG, K=10),
    "CG_normaleq": at_fixed_point(CG_normaleq, K=20),
    "nystrom": at_fixed_point(nystrom, K=10, rank=3),
    "stoch_AID": lambda p: at_fixed_point(stoch_AID, K=80, verbose=False)(p)[0],
    "stoch_AID momentum": momentum_on_the_system,
    "stoch_AID inner_loss": with_inner_loss,
    "checkpointed_reverse": from_start(checkpointed_reverse, 60),
    "truncated_reverse": from_start(truncated_reverse, 80, K=60),
    "neumann_lookback": lambda p: neumann_lookback(
        p.solution, p.hparams, 80, [p.map], p.outer_loss, set_grad=False
    ),
    "forward_mode": from_start(forward_mode, 60),
    "forward_mode vectorized": vectorized,
}


# ---- closed forms and rates ----


@pytest.mark.parametrize("name", CONVERGED)
def test_every_method_converges_to_the_closed_form(name):
    problem = Ridge()
    for got, expected in zip(CONVERGED[name](problem), problem.hypergradient(), strict=True):
        assert (got - expected).abs().max() < 1e-8
        assert not got.requires_grad


@pytest.mark.parametrize("name", CONVERGED)
def test_every_method_works_in_float32(name):
    problem = Ridge(torch.float32)
    for got, expected in zip(CONVERGED[name](problem), problem.hypergradient(), strict=True):
        assert got.dtype == torch.float32
        assert_near(got, expected, 1e-4)


def error(problem, run) -> float:
    return float((run(problem)[0] - problem.hypergradient()[0]).norm())


@pytest.mark.parametrize(
    "method", [fixed_point, functools.partial(from_start, truncated_reverse, 500)]
)
def test_the_error_of_fixed_point_and_reverse_falls_with_the_contraction(method):
    problem = Ridge()
    make = functools.partial(at_fixed_point, fixed_point) if method is fixed_point else method
    errors = [error(problem, make(K=K)) for K in (5, 10, 15)]
    rates = [(b / a) ** 0.2 for a, b in itertools.pairwise(errors)]
    assert rates == pytest.approx([problem.contraction] * 2, rel=0.05)


def test_the_error_of_conjugate_gradients_falls_with_the_root_of_the_condition_number():
    problem = Ridge(features=30, least=0.01)
    root = math.sqrt(problem.condition)
    rate, v = (root - 1) / (root + 1), problem.adjoint() / problem.rate

    def energy(e):
        return float((e @ problem.hessian @ e).sqrt())

    for K in (1, 3, 6, 10, 15, 20):
        _, solve = implicit(
            problem.solution, problem.hparams, problem.map, problem.outer_loss,
            ConjugateGradient(K), set_grad=False,
        )  # fmt: skip
        assert energy(solve.solution[0] - v) <= 2 * rate**K * energy(v) * 1.0001
    # The rate of the contraction, 1 - 1 / condition, is left far behind.
    assert energy(solve.solution[0] - v) < 0.01 * problem.contraction**20 * energy(v)


def test_the_nystrom_preconditioner_makes_up_for_a_few_large_eigenvalues():
    problem = Ridge(features=30)
    problem.x = torch.diag(torch.tensor([30.0] * 5 + [0.3] * 25, dtype=DOUBLE)) @ normal(5, 30, 30)
    problem.x, problem.y = problem.x.detach(), problem.y[:30]
    problem.rate = 1e-4
    problem.map = GradientDescent(problem.inner_loss, problem.rate)
    problem.solution = [w.detach() for w in problem.solve(problem.hparams)]
    expected = exact(problem.solve, problem.hparams, problem.outer_loss, set_grad=False)[0]
    plain, preconditioned = (
        (at_fixed_point(method, K=12, **options)(problem)[0] - expected).norm()
        for method, options in ((CG, {}), (nystrom, {"rank": 6}))
    )
    assert preconditioned < 1e-6 * expected.norm() < plain


def test_neumann_is_fixed_point_with_one_iteration_more():
    problem = Ridge()
    for K in (1, 2, 7):
        for a, b in zip(
            at_fixed_point(neumann, K=K)(problem),
            at_fixed_point(fixed_point, K=K + 1)(problem),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_fixed_point_is_reverse_through_repeated_steps_at_the_fixed_point():
    problem = Ridge()
    for K in (1, 2, 5):
        states, maps = [problem.solution] * (K + 1), [problem.map] * K
        expected = reverse(states, problem.hparams, maps, problem.outer_loss, set_grad=False)
        found = at_fixed_point(fixed_point, K=K)(problem)
        looked_back = neumann_lookback(
            problem.solution, problem.hparams, K, [problem.map] * max(1, K - 1),
            problem.outer_loss, set_grad=False,
        )  # fmt: skip
        for a, b, c in zip(found, expected, looked_back, strict=True):
            assert_near(a, b, 1e-12)
            assert_near(c, b, 1e-12)


def test_neumann_lookback_reproduces_a_step_of_one_pass_optimisation():
    # L_train = w^2, L_val = w'^2 / 2, momentum buffer .3 constant, 5 terms.
    eta, xi, mu = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.1, 0.1, 0.5))

    def step(params, hparams):
        (w,), (eta, xi, mu) = params, hparams
        return [w - eta * (0.3 * mu + 2 * w + xi * w)]

    w = [torch.tensor(1.0, dtype=DOUBLE)]
    gradient = neumann_lookback(
        w, [eta, xi, mu], 5, [step], lambda p, _: p[0] ** 2 / 2, set_grad=False
    )
    expected = torch.tensor([-5.74851567, -0.25548959, -0.07664688], dtype=DOUBLE)
    assert_near(torch.stack(gradient), expected, 1e-8)


def test_neumann_lookback_runs_the_last_maps_backwards():
    def scaled(factor):
        return lambda params, hparams: [factor * params[0] + hparams[0]]

    h = [torch.tensor(0.0, dtype=DOUBLE, requires_grad=True)]
    w = [torch.tensor(1.0, dtype=DOUBLE)]
    maps = [scaled(f) for f in (7.0, 5.0, 3.0, 2.0)]
    gradient = neumann_lookback(w, h, 4, maps, lambda p, _: p[0])
    assert gradient[0] == 1 + 2 + 2 * 3 + 2 * 3 * 5


# ---- maps that are not symmetric, not smooth, not deterministic ----


class Equilibrium:
    """h = tanh(A h + B) with a state of two tensors; hyperparameters A and B."""

    def __init__(self, gain, size=5):
        a = normal(11, size, size).detach()
        a = gain * a / torch.linalg.matrix_norm(a, 2)
        self.hparams = {"A": a.requires_grad_(), "B": normal(12, size)}
        h = torch.zeros(size, dtype=DOUBLE)
        for _ in range(3000):
            h = 0.9 * h + 0.1 * torch.tanh(self.hparams["A"] @ h + self.hparams["B"]).detach()
        self.solution = {"low": h[:2], "high": h[2:]}
        self.size = size

    def map(self, params, hparams):
        h = torch.cat([params["low"], params["high"]])
        new = torch.tanh(hparams["A"] @ h + hparams["B"])
        return {"high": new[2:], "low": new[:2]}  # in another order than it came

    def outer_loss(self, params, hparams):
        return params["low"].square().sum() + params["high"].sum() + hparams["B"].sum()

    def hypergradient(self):
        """By the dense (I - J^T)^-1."""
        h = torch.cat([self.solution["low"], self.solution["high"]])
        slope = 1 - h.square()
        jacobian = slope[:, None] * self.hparams["A"].detach()
        b = torch.cat([2 * self.solution["low"], torch.ones_like(self.solution["high"])])
        v = slope * torch.linalg.solve(torch.eye(self.size, dtype=DOUBLE) - jacobian.T, b)
        return {"A": v.outer(h), "B": v + 1}


@pytest.mark.parametrize("run", [at_fixed_point(fixed_point, K=200, tol=1e-14),
                                 at_fixed_point(CG_normaleq, K=60, tol=1e-14)])  # fmt: skip
def test_a_map_that_is_not_symmetric_and_works_on_a_tree(run):
    problem = Equilibrium(gain=0.8)
    found, expected = run(problem), problem.hypergradient()
    assert list(found) == ["A", "B"]
    for name in expected:
        assert_near(found[name], expected[name], 1e-10)


def test_normal_equations_solve_what_is_no_contraction():
    problem = Equilibrium(gain=3.0)
    problem.hparams["B"].data.mul_(0.05)
    problem.hparams["A"].data.copy_(-1.5 * torch.eye(5, dtype=DOUBLE))
    h = torch.cat([problem.solution["low"], problem.solution["high"]]) * 0
    for _ in range(200):
        h = 0.5 * h + 0.5 * torch.tanh(problem.hparams["A"] @ h + problem.hparams["B"]).detach()
    problem.solution = {"low": h[:2], "high": h[2:]}
    found, expected = at_fixed_point(CG_normaleq, K=60)(problem), problem.hypergradient()
    for name in expected:
        assert_near(found[name], expected[name], 1e-9)
    with pytest.raises(DivergenceError, match="residual"):
        at_fixed_point(fixed_point, K=40)(problem)


def test_a_nonlinear_fixed_point_agrees_with_finite_differences():
    def solve(value):
        problem = Equilibrium.__new__(Equilibrium)
        problem.hparams = {"A": base.hparams["A"].detach(), "B": value}
        params = base.solution
        for _ in range(500):
            params = problem.map(params, problem.hparams)
        return base.outer_loss(params, problem.hparams)

    base = Equilibrium(gain=0.8)
    found = at_fixed_point(fixed_point, K=200, tol=1e-14)(base)["B"]
    with torch.no_grad():
        value = base.hparams["B"].detach()
        for i, direction in enumerate(1e-5 * torch.eye(5, dtype=DOUBLE)):
            difference = (solve(value + direction) - solve(value - direction)) / 2e-5
            assert found[i] == pytest.approx(difference.item(), rel=1e-7)


def branching_step(params, hparams):
    """Newton's iteration for a root, halved until it helps: loops and branches on values."""
    w, (a, rate) = params[0], hparams
    step = rate * (w - a / w) / 2
    while (w - step).abs().max() > 1.5 * w.abs().max():
        step = step / 2
    return [w - step if w.sum() > 0 else w + step, params[1] * 0.5]


def test_methods_follow_the_control_flow_of_the_map():
    hparams = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (2.0, 0.7)]
    start = [torch.tensor([0.1, 2.0], dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)]

    def loss(params, hparams):
        return (params[0] * torch.tensor([1.0, -2.0], dtype=DOUBLE)).sum()

    def value():
        params = start
        for _ in range(6):
            params = branching_step(params, hparams)
        return loss(params, hparams)

    maps = [branching_step] * 6
    expected = []
    with torch.no_grad():
        for h in hparams:
            losses = []
            for shift in (1e-6, -2e-6):
                h += shift
                losses.append(value())
            h += 1e-6
            expected.append((losses[0] - losses[1]) / 2e-6)
    for method in (checkpointed_reverse, forward_mode):
        for a, b in zip(method(start, hparams, maps, loss, set_grad=False), expected, strict=True):
            assert_near(a, b, 1e-7)


class NoisyMap:
    """A contraction whose matrix and shift are drawn anew at each call, with known means."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.mean = 0.5 * torch.eye(3, dtype=DOUBLE) + 0.1 * normal(21, 3, 3).detach()
        self.hparams = [normal(22, 3)]
        self.solution = [torch.linalg.solve(torch.eye(3, dtype=DOUBLE) - self.mean,
                                            self.hparams[0].detach())]  # fmt: skip

    def noise(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=DOUBLE)

    def map(self, params, hparams):
        matrix = self.mean + 0.1 * self.noise(3, 3)
        return [matrix @ params[0] + (1 + 0.3 * self.noise(3)) * hparams[0]]

    def outer_loss(self, params, hparams):
        return (params[0] * (1 + 0.3 * self.noise(3))).sum()

    def hypergradient(self):
        identity = torch.eye(3, dtype=DOUBLE)
        return torch.linalg.solve(identity - self.mean.T, torch.ones(3, dtype=DOUBLE))


def test_stochastic_fixed_point_has_the_gradient_of_the_mean_map_as_its_mean():
    problem = NoisyMap()
    draws = torch.stack([
        at_fixed_point(fixed_point, K=20, stochastic=True)(problem)[0] for _ in range(200)
    ])  # fmt: skip
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (draws.mean(0) - problem.hypergradient()).abs().div(standard_error).max() < 4
    assert standard_error.max() < 0.1


def test_stochastic_linear_solve_converges_with_falling_rates_and_averaged_draws():
    problem = NoisyMap()

    def build(v, lr):
        optimizer = torch.optim.SGD(v, lr=lr)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k / 20))

    gradient, v = at_fixed_point(
        stoch_AID, K=1500, J_inner=400, J_outer=400, stoch_outer=True, stoch_inner=True,
        optim_build=build, opt_params={"lr": 0.5}, verbose=False,
    )(problem)  # fmt: skip
    assert_near(v[0], problem.hypergradient(), 0.1)
    assert_near(gradient[0], problem.hypergradient(), 0.1)


def test_a_stochastic_map_is_drawn_for_each_product_and_any_other_once():
    problem, calls = NoisyMap(), []

    def counted(params, hparams):
        calls.append(params)
        return problem.map(params, hparams)

    def run(method, **options):
        calls.clear()
        method(problem.solution, problem.hparams, fp_map=counted, tol=0.0,
               outer_loss=problem.outer_loss, set_grad=False, **options)  # fmt: skip
        return len(calls)

    assert run(fixed_point, K=10, stochastic=True) == 10
    assert run(fixed_point, K=10) == 1
    assert run(CG_normaleq, K=3) == 1


def test_linear_solve_starts_where_it_is_told_and_reports_progress(capsys):
    problem = Ridge()
    _, v = at_fixed_point(stoch_AID, K=80, verbose=False)(problem)
    assert capsys.readouterr().out == ""
    gradient, again = at_fixed_point(stoch_AID, K=1, linsys_start=v)(problem)
    assert capsys.readouterr().out.startswith("k=0: |v - J^T v - grad_w E| = ")
    assert_near(again[0], v[0], 1e-9)
    assert_near(gradient[0], problem.hypergradient()[0], 1e-9)
    assert v[0].grad is None


# ---- counted matvecs, reported residuals ----


class Counted(torch.autograd.Function):
    forwards = backwards = 0

    @staticmethod
    def forward(ctx, x):
        Counted.forwards += 1
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.backwards += 1
        return grad.clone()


def counts(run) -> tuple[int, int]:
    """How often the map of a ridge problem runs, and is differentiated."""
    problem = Ridge(features=30, least=0.01)
    inner = problem.map
    problem.map = lambda params, hparams: [Counted.apply(w) for w in inner(params, hparams)]
    Counted.forwards = Counted.backwards = 0
    run(problem)
    return Counted.forwards, Counted.backwards


@pytest.mark.parametrize("K", [1, 4, 9])
def test_implicit_methods_run_the_map_once_and_differentiate_it_once_per_iteration(K):
    assert counts(at_fixed_point(fixed_point, K=K)) == (1, K)
    assert counts(at_fixed_point(neumann, K=K)) == (1, K + 1)
    assert counts(at_fixed_point(CG, K=K)) == (1, K + 1)
    assert counts(at_fixed_point(nystrom, K=K, rank=3)) == (1, 3 + K + 1)
    assert counts(at_fixed_point(stoch_AID, K=K, verbose=False)) == (1, K + 1)
    # Each product with J differentiates the one backward pass with a graph.
    forwards, backwards = counts(at_fixed_point(CG_normaleq, K=K))
    assert forwards == 1 and backwards == K + 1 + 1


def test_reverse_methods_run_each_map_as_often_as_they_say():
    assert counts(from_start(checkpointed_reverse, 9)) == (18, 9)
    assert counts(from_start(checkpointed_reverse, 10, segment_length=4)) == (20, 10)
    assert counts(from_start(truncated_reverse, 9, K=4)) == (13, 4)

    def again(problem):
        states, maps = [problem.solution] * 8, [problem.map] * 7
        reverse(states, problem.hparams, maps, problem.outer_loss, set_grad=False)

    assert counts(again) == (7, 7)


def test_the_report_holds_the_residuals_of_all_iterates():
    problem = Ridge()
    system = problem.rate * problem.hessian  # I - J
    b = problem.hessian @ problem.adjoint()
    for solver in (FixedPoint(9), ConjugateGradient(4), NormalEquations(4)):
        gradient, solve = implicit(
            problem.solution, problem.hparams, problem.map, problem.outer_loss, solver,
            set_grad=False,
        )  # fmt: skip
        assert isinstance(solve, LinearSolve) and gradient[0].shape == problem.hparams[0].shape
        assert solve.iterations == solver.iterations == len(solve.residuals) - 1
        assert solve.residuals[0] == pytest.approx(b.norm().item())
        true = (b - system @ solve.solution[0]).norm().item()
        assert solve.residual == pytest.approx(true, abs=1e-14)
        assert solve.residuals[-1] < solve.residuals[0]


def test_conjugate_gradients_return_their_last_iterate_when_they_stop_early():
    problem = Ridge()
    _, solve = implicit(
        problem.solution, problem.hparams, problem.map, problem.outer_loss,
        ConjugateGradient(100, tol=1e-3), set_grad=False,
    )  # fmt: skip
    assert solve.iterations < 10
    assert solve.residual < 1e-3 <= solve.residuals[-2]


def test_tolerances_end_the_iterations():
    problem = Ridge()
    _, solve = implicit(
        problem.solution, problem.hparams, problem.map, problem.outer_loss,
        FixedPoint(1000, tol=1e-4), set_grad=False,
    )  # fmt: skip
    assert solve.iterations < 100
    assert solve.residual < solve.residuals[-2] < 1e-4 <= solve.residuals[-3]


# ---- divergence ----


def test_a_diverging_linear_system_is_reported_with_its_residual():
    problem = Ridge()
    for factor, K in ((2.1, 40), (2.5, 10), (1e3, 300)):
        problem.map = GradientDescent(problem.inner_loss, factor * problem.rate)
        for method in (fixed_point, neumann, functools.partial(stoch_AID, verbose=False)):
            with pytest.raises(DivergenceError, match=r"diverges: residual .* after .* iterations"):
                at_fixed_point(method, K=K)(problem)
    assert problem.hparams[0].grad is None
    assert issubclass(DivergenceError, FloatingPointError)


def test_conjugate_gradients_refuse_a_system_that_is_not_positive_definite():
    problem = Ridge()
    problem.map = GradientDescent(problem.inner_loss, -problem.rate)
    for method in (CG, functools.partial(nystrom, rank=2)):
        with pytest.raises(DivergenceError, match="symmetric positive definite"):
            at_fixed_point(method, K=5)(problem)


class Asymmetric:
    """p = W p + h u with W of norm .9, outer loss |p|^2: d / dh = 2 h |(I - W)^-1 u|^2."""

    def __init__(self, size=30):
        W = normal(31, size, size).detach()
        self.W, self.u = 0.9 * W / torch.linalg.matrix_norm(W, 2), normal(32, size).detach()
        self.hparams = [torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)]
        self.solution = [torch.linalg.solve(torch.eye(size, dtype=DOUBLE) - self.W, self.u)]

    def map(self, params, hparams):
        return [self.W @ params[0] + hparams[0] * self.u]

    def outer_loss(self, params, hparams):
        return params[0].square().sum()

    def hypergradient(self):
        return 2 * self.solution[0] @ self.solution[0]


@pytest.mark.parametrize("method, options", [
    (CG, {}), (nystrom, {}), (implicit, {"solver": ConjugateGradient(20)}),
])  # fmt: skip
def test_conjugate_gradients_refuse_a_map_that_is_not_symmetric(method, options):
    problem = Asymmetric()
    options = options or {"K": 20}
    with pytest.raises(HypergradientError, match=r"symmetric.* take CG_normaleq, or fixed_point"):
        at_fixed_point(method, **options)(problem)
    solve = differentiable_by(method, fp_map=problem.map, **options)(lambda p, h: problem.solution)
    with pytest.raises(HypergradientError, match="symmetric"):
        problem.outer_loss(solve(problem.solution, problem.hparams), None).backward()
    momentum = Ridge()
    momentum.map = HeavyBall(momentum.inner_loss, momentum.rate, 0.5)
    momentum.solution = momentum.map.get_opt_params(momentum.solution)
    outer_loss = momentum.outer_loss
    momentum.outer_loss = lambda params, hparams: outer_loss(params[:1], hparams)
    with pytest.raises(HypergradientError, match="symmetric"):
        at_fixed_point(method, **options)(momentum)
    for right, K in ((fixed_point, 400), (CG_normaleq, 200)):
        assert_near(at_fixed_point(right, K=K)(problem)[0], problem.hypergradient(), 1e-8)


def test_nan_is_reported_as_divergence():
    problem = Ridge()
    problem.solution = [problem.solution[0] * torch.nan]
    for method in (fixed_point, CG, CG_normaleq):
        for on_divergence in ("raise", "warn"):
            with pytest.raises(DivergenceError):
                at_fixed_point(method, K=5, on_divergence=on_divergence)(problem)


# ---- what HyperTorch accepts ----


def test_the_lines_of_hypertorchs_logistic_regression_run_with_the_import_changed():
    x, y = normal(51, 30, 3).detach(), (normal(52, 30).detach() > 0).double()
    hparams, T = [torch.ones(3, dtype=DOUBLE).requires_grad_(True)], 60

    def val_loss(params, hparams):
        return torch.nn.functional.binary_cross_entropy_with_logits(x[20:] @ params[0], y[20:])

    def fp_map(params, hparams):
        w = params[0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x[:20] @ w, y[:20])
        loss = loss + 0.5 * (w.unsqueeze(0) @ torch.diag(hparams[0]) @ w.unsqueeze(1)).sum()
        return [params[0] - 0.5 * torch.autograd.grad(loss, params, create_graph=True)[0]]

    params_history = [[torch.zeros(3, dtype=DOUBLE).requires_grad_(True)]]
    for _ in range(T):
        params_history.append(fp_map(params_history[-1], hparams))
    unrolled = hg.reverse_unroll(params_history[-1], hparams, val_loss)
    outer_opt = torch.optim.SGD(lr=1.0, momentum=0.9, params=hparams)
    for k in (0, 10, T):
        outer_opt.zero_grad()
        h_grad = hg.reverse(params_history[-k - 1 :], hparams, [fp_map] * k, val_loss)
        assert torch.equal(hparams[0].grad, h_grad[0])
    assert_near(h_grad[0], unrolled[0], 1e-12)
    for alg in (hg.fixed_point, hg.CG, hg.CG_normaleq, hg.neumann):
        found = [alg(params_history[-1], hparams, k, fp_map, val_loss)[0] for k in (0, 1, 40)]
        assert_near(found[-1], unrolled[0], 1e-6)


def test_no_iteration_is_the_direct_gradient_or_that_of_one_term():
    problem = Ridge()
    l2, t = (h.detach() for h in problem.hparams)
    direct = [torch.full_like(l2, float(t**2)), 2 * t * l2.sum()]
    for method in (fixed_point, CG, CG_normaleq):
        for a, b in zip(at_fixed_point(method, K=0)(problem), direct, strict=True):
            assert_near(a, b, 1e-12)
    one_state = reverse([problem.solution], problem.hparams, [], problem.outer_loss, set_grad=False)
    assert_near(one_state[0], direct[0], 1e-12)
    first, one = at_fixed_point(neumann, K=0)(problem), at_fixed_point(fixed_point, K=1)(problem)
    assert torch.equal(first[0], one[0]) and not torch.equal(first[0], direct[0])
    start = [normal(4, 4).detach()]
    unmoved = at_fixed_point(stoch_AID, K=0, linsys_start=start, verbose=False)(problem)[1]
    assert torch.equal(unmoved[0], start[0])


class Indefinite:
    """p = (I - A) p + h u, A symmetric with eigenvalues of both signs; outer loss |p|^2 / 2."""

    def __init__(self):
        basis = torch.linalg.qr(normal(41, 4, 4).detach())[0]
        self.A = basis @ torch.tensor([3.0, 2.0, -1.0, -2.5], dtype=DOUBLE).diag() @ basis.T
        self.u = normal(42, 4).detach()
        self.hparams = [torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)]
        self.solution = [torch.linalg.solve(self.A, self.u)]

    def map(self, params, hparams):
        return [params[0] - self.A @ params[0] + hparams[0] * self.u]

    def outer_loss(self, params, hparams):
        return params[0].square().sum() / 2


def test_a_truncated_solve_is_accepted_with_a_warning_where_it_is_asked_for():
    problem = Indefinite()
    w, jacobian = problem.solution[0], torch.eye(4, dtype=DOUBLE) - problem.A
    series = sum(torch.linalg.matrix_power(jacobian, k) @ w for k in range(6))
    for method, K in ((fixed_point, 6), (neumann, 5)):
        with pytest.raises(DivergenceError):
            at_fixed_point(method, K=K)(problem)
        with pytest.warns(DivergenceWarning, match="residual .* after 6 iterations"):
            found = at_fixed_point(method, K=K, on_divergence="warn")(problem)
        assert_near(found[0], series @ problem.u, 1e-10)
    with pytest.raises(DivergenceError):
        at_fixed_point(CG, K=4)(problem)
    with pytest.warns(DivergenceWarning, match="the curvature -"):
        found = at_fixed_point(CG, K=4, on_divergence="warn")(problem)
    assert_near(found[0], torch.linalg.solve(problem.A, w) @ problem.u, 1e-8)
    rates = {"optim_build": lambda v: (torch.optim.SGD(v, lr=0.5), None), "verbose": False}
    with pytest.warns(DivergenceWarning):
        at_fixed_point(stoch_AID, K=9, on_divergence="warn", **rates)(problem)
    with pytest.raises(HypergradientError, match="on_divergence is raise or warn, not 'ignore'"):
        at_fixed_point(CG, K=4, on_divergence="ignore")(problem)


def test_a_product_with_the_jacobian_is_that_of_torch_func_and_is_attached():
    def phi(params):
        a, b = params
        return [(a * b).sin() * a.sum(), b.pow(3)]

    params = [normal(1, 3, 3).detach(), normal(2, 3).detach()]
    directions = [normal(3, 3, 3).detach(), normal(4, 3).detach()]

    expected = torch.func.jvp(phi, (params,), (directions,))[1]
    found = jvp(phi, params, directions)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-12)
    assert all(t.requires_grad for t in found)


def test_gradients_are_added_and_none_counts_as_zero():
    hparams = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    for _ in range(2):
        update_tensor_grads(hparams, [torch.tensor([1.0, 2.0]), None])
    assert hparams[0].grad.tolist() == [2.0, 4.0] and hparams[1].grad.tolist() == [0.0]


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_the_passing_growth_of_a_map_with_momentum_is_not_taken_for_divergence(momentum):
    problem = Ridge()
    problem.map = HeavyBall(problem.inner_loss, problem.rate, momentum)
    problem.solution = problem.map.get_opt_params(problem.solution)
    inner = problem.outer_loss
    problem.outer_loss = lambda params, hparams: inner(params[:1], hparams)
    for K in range(1, 40):
        at_fixed_point(fixed_point, K=K)(problem)
    found = at_fixed_point(fixed_point, K=4000, tol=1e-13)(problem)
    for a, b in zip(found, problem.hypergradient(), strict=True):
        assert_near(a, b, 1e-9)


# ---- maps that depend on no hyperparameter, hyperparameters given twice ----


def without_create_graph(params, hparams, rate=0.1):
    """A gradient step whose gradient nothing can be differentiated through."""
    w = [p.detach().requires_grad_() for p in params]
    loss = noisy_outer_loss(w, hparams) + hparams[0] * w[0].square().sum()
    gradients = torch.autograd.grad(loss, w)
    return [p - rate * g for p, g in zip(params, gradients, strict=True)]


AT_A_POINT = {
    "fixed_point": fixed_point, "neumann": neumann, "CG": CG, "CG_normaleq": CG_normaleq,
    "nystrom": nystrom, "stoch_AID": functools.partial(stoch_AID, verbose=False),
    "stochastic": functools.partial(fixed_point, stochastic=True),
}  # fmt: skip
ALONG_MAPS = {
    "checkpointed_reverse": checkpointed_reverse,
    "truncated_reverse": functools.partial(truncated_reverse, K=3),
    "neumann_lookback": functools.partial(neumann_lookback, K=3),
}


@pytest.mark.parametrize("name", [*AT_A_POINT, *ALONG_MAPS, "reverse"])
def test_a_map_that_depends_on_no_hyperparameter_is_refused(name):
    hparams = [torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)]
    arguments = {"hparams": hparams, "outer_loss": noisy_outer_loss}
    history = [noisy_start()]
    for _ in range(4):
        history.append([p.detach() for p in without_create_graph(history[-1], hparams)])
    with pytest.raises(
        HypergradientError, match=r"depends on no hyperparameter.*create_graph=True"
    ):
        if name == "reverse":
            reverse(history, update_map_history=[without_create_graph] * 4, **arguments)
        elif name in ALONG_MAPS:
            maps = [without_create_graph] * 4
            ALONG_MAPS[name](params=noisy_start(), update_maps=maps, **arguments)
        else:
            AT_A_POINT[name](params=noisy_start(), K=5, fp_map=without_create_graph, **arguments)


def test_forward_mode_refuses_maps_that_ignore_the_hyperparameters_they_are_given():
    problem = Ridge()
    closed = lambda params, _: problem.map(params, problem.hparams)  # noqa: E731
    functional = GradientDescent(problem.inner_loss, problem.rate, gradient="func")
    for vectorize, maps in (
        (False, [closed]),
        (True, [lambda p, _: functional(p, problem.hparams)]),
    ):
        with pytest.raises(HypergradientError, match="depends on no hyperparameter"):
            forward_mode(
                problem.solution, problem.hparams, maps * 3, problem.outer_loss, vectorize=vectorize
            )


def test_forward_mode_takes_derivatives_that_happen_to_be_zero():
    def still(params, hparams):
        return [params[0] + 0 * hparams[0]]

    h = [torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)]
    for vectorize in (False, True):
        gradient = forward_mode(
            [torch.ones(2, dtype=DOUBLE)], h, [still] * 2, lambda p, h: p[0].sum() + h[0] ** 2,
            set_grad=False, vectorize=vectorize,
        )  # fmt: skip
        assert gradient[0] == 4


def test_one_map_that_depends_on_the_hyperparameters_is_enough():
    h = [torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)]
    maps = [lambda p, h: [p[0] + h[0]], lambda p, _: [3 * p[0]], lambda p, _: [p[0].sin()]]
    arguments = h, maps, lambda p, _: p[0]
    start = [torch.tensor(1.0, dtype=DOUBLE)]
    for method in (checkpointed_reverse, functools.partial(truncated_reverse, K=3), forward_mode):
        result = method(start, hparams=h, update_maps=maps, outer_loss=arguments[2], set_grad=False)
        assert_near(result[0], 3 * torch.tensor(9.0, dtype=DOUBLE).cos(), 1e-12)


@pytest.mark.parametrize("name", AT_A_POINT)
def test_a_jacobian_of_one_where_the_rate_is_the_hyperparameter_is_refused(name):
    hparams = [torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)]

    def step(params, hparams):
        return without_create_graph(params, [0.1], rate=hparams[0])

    with pytest.raises(HypergradientError):
        AT_A_POINT[name](
            params=noisy_start(), hparams=hparams, K=5, fp_map=step, outer_loss=noisy_outer_loss
        )


def test_a_hyperparameter_given_twice_is_refused():
    problem = Ridge()
    twice = {"a": problem.hparams[0], "b": [problem.hparams[1], problem.hparams[0]]}

    def step(params, hparams):
        return problem.map(params, [hparams["a"], hparams["b"][0]])

    def loss(params, hparams):
        return problem.outer_loss(params, [hparams["a"], hparams["b"][0]])

    for run in (
        lambda: fixed_point(problem.solution, twice, 5, step, loss),
        lambda: checkpointed_reverse(problem.solution, twice, [step], loss),
        lambda: forward_mode(problem.solution, twice, [step], loss),
        lambda: exact(lambda h: problem.solve([h["a"], h["b"][0]]), twice, loss),
    ):
        with pytest.raises(HypergradientError, match="hyperparameter 2 is hyperparameter 0 again"):
            run()


@pytest.mark.parametrize("vectorize", [False, True])
def test_forward_mode_takes_hyperparameters_of_another_type_than_the_params(vectorize):
    problem = Ridge()
    low = [h.detach().float().requires_grad_() for h in problem.hparams]
    step = GradientDescent(problem.inner_loss, problem.rate, gradient="func")
    start = [torch.zeros(4, dtype=DOUBLE)]
    expected = checkpointed_reverse(start, low, [step] * 9, problem.outer_loss, set_grad=False)
    result = forward_mode(
        start, low, [step] * 9, problem.outer_loss, set_grad=False, vectorize=vectorize
    )
    for a, b in zip(result, expected, strict=True):
        assert_near(a, b, 1e-6)


# ---- trees, unused tensors, .grad ----


def test_unused_parameters_and_hyperparameters_get_zeros():
    def step(params, hparams):
        return [0.5 * params[0] + hparams[0], params[1].detach() * 0 + 1, params[2]]

    def loss(params, hparams):
        return params[0].sum() + 3 * hparams[2].sum()

    hparams = [normal(k, 2) for k in range(3)]
    params = [2 * hparams[0].detach(), torch.ones(3, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)]
    maps = [step] * 50
    results = [
        fixed_point(params, hparams, 60, step, loss),
        neumann(params, hparams, 60, step, loss),
        stoch_AID(params, hparams, loss, 60, fp_map=step, verbose=False)[0],
        reverse([params] * 51, hparams, maps, loss),
        checkpointed_reverse(params, hparams, maps, loss),
        forward_mode(params, hparams, maps, loss),
        forward_mode(params, hparams, maps, loss, vectorize=True),
        exact(lambda h: [2 * h[0], h[0], h[0]], hparams, loss),
    ]

    def without_the_free_one(method, **options):
        # params[2] = params[2] makes I - J singular, but no b points there.
        return method(params, hparams, 5, step, loss, **options)

    results += [without_the_free_one(method) for method in (CG, CG_normaleq)]
    for result in results:
        for got, expected in zip(result, (2.0, 0.0, 3.0), strict=True):
            assert_near(got, torch.full((2,), expected, dtype=DOUBLE), 1e-9)


def test_set_grad_adds_to_what_is_there():
    problem = Ridge()
    for number, name in enumerate(("fixed_point", "CG", "CG_normaleq", "neumann"), 1):
        method = {"fixed_point": fixed_point, "CG": CG, "CG_normaleq": CG_normaleq,
                  "neumann": neumann}[name]  # fmt: skip
        arguments = problem.solution, problem.hparams, 300, problem.map, problem.outer_loss
        result = method(*arguments)
        assert type(result) is list
        for h, g, expected in zip(problem.hparams, result, problem.hypergradient(), strict=True):
            assert_near(h.grad, number * expected, 1e-8)
            assert h.grad is not g
    before = [h.grad for h in problem.hparams]
    reverse([problem.solution] * 4, problem.hparams, [problem.map] * 3, problem.outer_loss)
    assert all(h.grad is g for h, g in zip(problem.hparams, before, strict=True))


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    hyper=st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=3),
)
@settings(max_examples=10, deadline=None)
def test_any_tree_of_any_shapes_gives_what_the_flat_list_gives(shapes, hyper):
    params = [normal(k, *shape).detach() for k, shape in enumerate(shapes)]
    hparams = [normal(50 + k, *shape) for k, shape in enumerate(hyper)]

    def step(params, hparams):
        drive = sum((h * h).sum() for h in hparams)
        return [0.3 * torch.sin(p) + 0.1 * drive for p in params]

    def loss(params, hparams):
        return sum(p.square().sum() for p in params) + hparams[0].sum()

    def tree(leaves):
        return [{"only": leaves[0]}, tuple(leaves[1:]), {}]

    def flat(tree):
        return [tree[0]["only"], *tree[1]]

    def tree_step(params, hparams):
        return tree(step(flat(params), [hparams[str(k)] for k in range(len(hparams))]))

    def tree_loss(params, hparams):
        return loss(flat(params), [hparams[str(k)] for k in range(len(hparams))])

    named = {str(k): h for k, h in enumerate(hparams)}
    for method in (fixed_point, CG, CG_normaleq):
        expected = method(params, hparams, 4, step, loss, set_grad=False)
        found = method(tree(params), named, 4, tree_step, tree_loss, set_grad=False)
        assert list(found) == list(named)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    for method in (checkpointed_reverse, forward_mode):
        expected = method(params, hparams, [step] * 2, loss, set_grad=False)
        found = method(tree(params), named, [tree_step] * 2, tree_loss, set_grad=False)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_the_params_given_are_left_as_they_are():
    problem = Ridge()
    before = problem.solution[0].clone()
    for run in CONVERGED.values():
        run(problem)
    assert torch.equal(problem.solution[0], before)
    assert not problem.solution[0].requires_grad and problem.solution[0].grad is None


# ---- trajectories ----


def nonlinear_step(params, hparams):
    w, v = params
    rate, mix = hparams
    return [w - rate * torch.sin(w + v), torch.tanh(mix @ v) + 0.1 * w.square()]


def trajectory_value(start, hparams, steps):
    params = start
    for _ in range(steps):
        params = nonlinear_step(params, hparams)
    return trajectory_loss(params, hparams)


def trajectory_loss(params, hparams):
    return params[0].square().sum() + params[1].sum() + hparams[0] ** 2


def test_trajectory_methods_agree_with_finite_differences_and_each_other():
    start = [normal(1, 3).detach(), normal(2, 3).detach()]
    hparams = [torch.tensor(0.3, dtype=DOUBLE, requires_grad=True), normal(3, 3, 3, scale=0.5)]
    maps = [nonlinear_step] * 11
    expected = checkpointed_reverse(start, hparams, maps, trajectory_loss, set_grad=False)
    with torch.no_grad():
        for h, gradient in zip(hparams, expected, strict=True):
            for entry, g in zip(h.view(-1), gradient.view(-1), strict=True):
                value, losses = entry.item(), []
                for multiple in (-2, -1, 1, 2):
                    entry.fill_(value + multiple * 1e-3)
                    losses.append(trajectory_value(start, hparams, 11))
                entry.fill_(value)
                difference = (8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / 12e-3
                assert g.item() == pytest.approx(difference.item(), rel=1e-8, abs=1e-9)
    others = [
        checkpointed_reverse(start, hparams, maps, trajectory_loss, n, set_grad=False)
        for n in (1, 3, 11, 100)
    ]
    others += [
        truncated_reverse(start, hparams, 11, maps, trajectory_loss, set_grad=False),
        forward_mode(start, hparams, maps, trajectory_loss, set_grad=False),
        forward_mode(start, hparams, maps, trajectory_loss, set_grad=False, vectorize=True),
    ]
    for other in others:
        for a, b in zip(other, expected, strict=True):
            assert_near(a, b, 1e-12)


def test_truncated_reverse_is_reverse_on_the_end_of_the_history():
    start = [normal(1, 3).detach(), normal(2, 3).detach()]
    hparams = [torch.tensor(0.3, dtype=DOUBLE, requires_grad=True), normal(3, 3, 3, scale=0.5)]
    history, maps = [start], [nonlinear_step] * 8
    for step in maps:
        history.append([t.detach() for t in step(history[-1], hparams)])
    for K in (1, 3, 8):
        found = truncated_reverse(start, hparams, K, maps, trajectory_loss, set_grad=False)
        for update_maps in (maps, maps[:K]):
            expected = reverse(
                history[-K - 1 :], hparams, update_maps, trajectory_loss, set_grad=False
            )
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


def test_reverse_unroll_can_be_called_again_on_the_same_graph():
    problem = Ridge()
    params = problem.map([torch.zeros(4, dtype=DOUBLE)], problem.hparams)
    first, second = (reverse_unroll(params, problem.hparams, problem.outer_loss) for _ in range(2))
    for h, a, b in zip(problem.hparams, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(h.grad, a + b)


# ---- in a graph ----


@pytest.mark.parametrize("method, options", [
    (CG, {"K": 20}), (fixed_point, {"K": 80}), (CG_normaleq, {"K": 30}), (nystrom, {"K": 20}),
])  # fmt: skip
def test_a_decorated_solver_is_differentiated_by_the_chosen_method(method, options):
    problem = Ridge()

    @differentiable_by(method, fp_map=problem.map, **options)
    def solve(params, hparams):
        """Found by no gradient at all."""
        return [w.detach().numpy() for w in problem.solve(hparams)] and problem.solve(hparams)

    raw = normal(9, 4)  # hyperparameters inside a larger graph
    l2 = 0.3 + torch.nn.functional.softplus(raw)
    found = torch.autograd.grad(
        problem.outer_loss(solve(problem.solution, [l2, problem.hparams[1]]), [l2, 0.0]), raw,
        retain_graph=True,
    )  # fmt: skip
    expected = torch.autograd.grad(
        problem.outer_loss(problem.solve([l2, problem.hparams[1]]), [l2, 0.0]), raw
    )
    assert_near(found[0], expected[0], 1e-8)
    assert solve.__doc__ == "Found by no gradient at all."


def test_a_decorated_solver_can_be_differentiated_along_its_trajectory():
    problem = Ridge()
    start, maps = [torch.zeros(4, dtype=DOUBLE)], [problem.map] * 7

    def run(params, hparams):
        for update in maps:
            params = update(params, hparams, create_graph=False)
        return params

    for method in (checkpointed_reverse, forward_mode):
        solve = differentiable_by(method, update_maps=maps)(run)
        problem.outer_loss(solve(start, problem.hparams), problem.hparams).backward()
        for h, expected in zip(problem.hparams, unrolled(problem, 7), strict=True):
            assert_near(h.grad, expected, 1e-12)
            h.grad = None


def test_a_decorated_solver_returns_trees_and_refuses_hyperparameters_changed_since():
    problem = Equilibrium(gain=0.8)
    solve = differentiable_by(fixed_point, K=200, fp_map=problem.map)(lambda p, h: p)
    solution = solve(problem.solution, problem.hparams)
    assert list(solution) == ["low", "high"] and solution["low"].requires_grad
    loss = problem.outer_loss(solution, problem.hparams)
    gradient = torch.autograd.grad(loss, problem.hparams["A"], retain_graph=True)[0]
    assert_near(gradient, problem.hypergradient()["A"], 1e-8)
    with torch.no_grad():
        problem.hparams["A"] += 1
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_decorated_solver_makes_no_graph_by_inner_optimizers():
    problem = Ridge()

    def run(params, hparams):
        assert not any(h.requires_grad for h in hparams)
        for _ in range(7):
            params = problem.map(params, hparams)
            assert not params[0].requires_grad
        return params

    solve = differentiable_by(checkpointed_reverse, update_maps=[problem.map] * 7)(run)
    start = [torch.zeros(4, dtype=DOUBLE)]
    problem.outer_loss(solve(start, problem.hparams), problem.hparams).backward()
    for h, expected in zip(problem.hparams, unrolled(problem, 7), strict=True):
        assert_near(h.grad, expected, 1e-12)


def test_a_decorated_solver_may_train_params_by_torch_optim():
    problem = Ridge()
    params = [torch.zeros(4, dtype=DOUBLE, requires_grad=True)]

    def run(params, hparams):
        optimizer = torch.optim.SGD(params, problem.rate)
        for _ in range(300):
            optimizer.zero_grad()
            problem.inner_loss(params, hparams).backward()
            optimizer.step()
        return params

    solve = differentiable_by(CG, K=20, fp_map=problem.map)(run)
    problem.outer_loss(solve(params, problem.hparams), problem.hparams).backward()
    for h, expected in zip(problem.hparams, problem.hypergradient(), strict=True):
        assert_near(h.grad, expected, 1e-8)


def test_update_maps_that_lead_elsewhere_than_the_decorated_solver_are_refused():
    problem = Ridge()
    start = [torch.zeros(4, dtype=DOUBLE)]
    for steps, method in ((3, checkpointed_reverse), (8, forward_mode)):
        solve = differentiable_by(method, update_maps=[problem.map] * steps)(
            lambda params, hparams: problem.map(problem.map(params, hparams), hparams)
        )
        with pytest.raises(HypergradientError, match="lead elsewhere than the solver"):
            problem.outer_loss(solve(start, problem.hparams), problem.hparams).backward()


# ---- what runs again: random numbers, iterators, statistics, frozen parameters ----


def dropout_loss(params, hparams):
    hidden = torch.nn.functional.dropout((INPUTS @ params[0]).tanh(), 0.3)
    return (hidden @ params[1] - TARGETS).square().mean() + hparams[0] * params[0].square().sum()


INPUTS, TARGETS = normal(60, 20, 4).detach(), normal(61, 20).detach()
NOISY_STEPS = [GradientDescent(dropout_loss, 0.1, gradient=g) for g in ("graph", "func")]


def noisy_start():
    return [normal(62, 4, 3, scale=0.3).detach(), normal(63, 3, scale=0.3).detach()]


def noisy_outer_loss(params, hparams):
    return ((INPUTS @ params[0]).tanh() @ params[1] - TARGETS).square().mean()


def through_noise(method, step, steps=5, **options):
    """The gradient by a method through steps with dropout, and what torch draws after them."""
    torch.manual_seed(7)
    hparams = [torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)]
    if method is reverse_unroll:
        params = noisy_start()
        for _ in range(steps):
            params = step(params, hparams)
        gradient = reverse_unroll(params, hparams, noisy_outer_loss, set_grad=False)
    elif method is differentiable_by:

        @differentiable_by(options["by"], update_maps=[step] * steps)
        def solve(params, hparams):
            for _ in range(steps):
                params = step(params, hparams)
            return params

        loss = noisy_outer_loss(solve(noisy_start(), hparams), hparams)
        gradient = torch.autograd.grad(loss, hparams)
    else:
        gradient = method(
            noisy_start(), hparams, update_maps=[step] * steps, outer_loss=noisy_outer_loss,
            set_grad=False, **options,
        )  # fmt: skip
    return gradient[0], torch.rand(())


@pytest.mark.parametrize("method, options", [
    (checkpointed_reverse, {"segment_length": 1}), (checkpointed_reverse, {"segment_length": 2}),
    (truncated_reverse, {"K": 5}), (forward_mode, {}), (forward_mode, {"vectorize": True}),
    (differentiable_by, {"by": checkpointed_reverse}), (reverse_unroll, {}),
    (differentiable_by, {"by": forward_mode}),
])  # fmt: skip
def test_what_runs_again_draws_the_same_random_numbers(method, options):
    expected, following = through_noise(reverse_unroll, NOISY_STEPS[0])
    for step in NOISY_STEPS:
        if step.gradient != "func" and "vectorize" in options:
            continue  # cannot be vectorised
        gradient, drawn = through_noise(method, step, **options)
        assert_near(gradient, expected, 1e-12)
        assert drawn == following  # and leaves the generator where one run does


def test_what_cannot_be_repeated_is_refused():
    generator = torch.Generator().manual_seed(0)

    def own_noise(params, hparams):
        noise = 1 + torch.randn(4, generator=generator, dtype=DOUBLE)
        return (params[0].square().sum(1) * noise).sum() + hparams[0] * params[1].square().sum()

    def of_batch(params, hparams, rows):
        return hparams[0] * ((INPUTS[rows] @ params[0]) @ params[1] - TARGETS[rows]).square().mean()

    own = GradientDescent(own_noise, 0.1)
    hparams = [torch.tensor(0.1, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    names, arguments = (
        ("hparams", "update_maps", "outer_loss"),
        (hparams, [own] * 5, noisy_outer_loss),
    )
    for method, options in (
        (checkpointed_reverse, {}), (truncated_reverse, {"K": 2}), (forward_mode, {}),
    ):  # fmt: skip
        options = dict(zip(names, arguments, strict=True)) | options
        with pytest.raises(HypergradientError, match="what runs again must do the same"):
            method(noisy_start(), **options)
    batches = GradientDescent(of_batch, 0.1, iter(torch.arange(20).split(2)))
    with pytest.raises(HypergradientError, match=r"update 0 leads .* not an iterator"):
        checkpointed_reverse(noisy_start(), hparams, [batches] * 4, noisy_outer_loss)
    with pytest.raises(HypergradientError, match="data have ended"):
        checkpointed_reverse(noisy_start(), hparams, [batches] * 4, noisy_outer_loss)
    for step in (NOISY_STEPS[0], own):
        history = [noisy_start()]
        for _ in range(3):
            history.append(step(history[-1], hparams, create_graph=False))
        with pytest.raises(HypergradientError, match="update 0 leads"):
            reverse(history, hparams, [step] * 3, noisy_outer_loss)


def test_a_history_of_other_rounding_is_no_other_history():
    problem = Ridge(torch.float32)
    history = [[torch.zeros(4)]]
    for _ in range(20):
        w = history[-1][0].double()
        step = problem.x.double().T @ (problem.x.double() @ w - problem.y.double()) / 40
        history.append([(w - problem.rate * (step + problem.hparams[0].detach() * w)).float()])
    gradient = reverse(
        history, problem.hparams, [problem.map] * 20, problem.outer_loss, set_grad=False
    )
    assert_near(gradient[0], unrolled(problem, 20)[0], 1e-4)


class FrozenNetwork:
    """A frozen layer, batch norm with running statistics, and a layer that learns."""

    def __init__(self):
        layers = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)
        self.net = torch.nn.Sequential(*layers).double()
        self.net[0].requires_grad_(False)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.hparams = [torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)]

    def inner_loss(self, params, hparams):
        values = dict(zip(self.names, params, strict=True))
        outputs = functional_call(self.net, values, (INPUTS,))
        penalty = sum(p.square().sum() for p in params)
        return (outputs[:, 0] - TARGETS).square().mean() + hparams[0] * penalty

    def outer_loss(self, params, hparams):
        return sum(p.square().sum() for p in params[:6])

    @property
    def counted(self):
        """How many batches the running statistics have seen."""
        return int(self.net[1].num_batches_tracked)


FROZEN_METHODS = {
    "checkpointed_reverse": checkpointed_reverse,
    "truncated_reverse": functools.partial(truncated_reverse, K=5),
    "forward_mode": forward_mode,
}


@pytest.mark.parametrize("make", [
    lambda loss: GradientDescent(loss, 0.1),
    lambda loss: HeavyBall(loss, 0.1, 0.5),
    lambda loss: Adam(loss, 0.1),
])  # fmt: skip
def test_frozen_parameters_stay_and_five_steps_move_statistics_five_times(make):
    problem, results = FrozenNetwork(), []
    optimizer = make(problem.inner_loss)
    given = list(problem.net.parameters())

    def start():
        return optimizer.get_opt_params(given)

    for create_graph in (True, False):
        before, params = problem.counted, start()
        history = [params]
        for _ in range(5):
            params = optimizer(params, problem.hparams, create_graph=create_graph)
            history.append(params)
        assert params[0] is given[0] and params[1] is given[1]
        assert not torch.equal(params[4], given[4])
        if create_graph:
            results.append(reverse_unroll(params, problem.hparams, problem.outer_loss, False))
        assert problem.counted == before + 5
    maps = [optimizer] * 5
    results.append(reverse(history, problem.hparams, maps, problem.outer_loss, False))
    assert problem.counted == before + 5
    for name, method in FROZEN_METHODS.items():
        before = problem.counted
        results.append(method(
            start(), problem.hparams, update_maps=maps, outer_loss=problem.outer_loss,
            set_grad=False,
        ))  # fmt: skip
        assert problem.counted == before + 5, name
    for result in results[1:]:
        assert_near(result[0], results[0][0], 1e-11)


def test_derivatives_at_a_point_move_no_statistics_and_no_frozen_parameter():
    problem = FrozenNetwork()
    step, params = GradientDescent(problem.inner_loss, 0.01), list(problem.net.parameters())
    before = problem.counted, [b.clone() for b in problem.net.buffers()]
    gradient, solve = implicit(
        params, problem.hparams, step, problem.outer_loss, FixedPoint(3), set_grad=False
    )
    neumann_lookback(params, problem.hparams, 3, [step], problem.outer_loss, set_grad=False)
    assert gradient[0] != 0 and solve.solution[0].abs().max() == 0
    assert problem.counted == before[0]
    assert all(map(torch.equal, problem.net.buffers(), before[1]))

    def moving(params, hparams):
        return [p * hparams[0] for p in params]

    with pytest.raises(HypergradientError, match="moves tensor 0 of params, a frozen"):
        fixed_point(params, problem.hparams, 3, moving, problem.outer_loss)


# ---- learning rules as maps ----


class RuleProblem:
    """A polynomial rule with decay, whose fused kernels have one derivative and no forward mode."""

    def __init__(self):
        self.model = lateral_mlp(4, [3], Activation("sigmoid", 2.0), inh_steps=3)
        self.rule = PolynomialRule.of_degree(2, l2=0.2, bound="tanh").double()
        with torch.no_grad():
            for k, p in enumerate(self.rule.parameters()):
                p.copy_(normal(k, *p.shape, scale=0.02))
        self.hparams = list(self.rule.parameters())
        self.start = [{}, {"w": normal(30, 3, 4), "b": normal(31, 3), "m": normal(32, 3, 3)}]
        self.start[1] = {name: t.detach() for name, t in self.start[1].items()}
        self.batches = [normal(40 + t, 6, 4).detach() for t in range(5)]
        self.maps = [
            lambda params, _, batch=batch: self.rule.update(self.model, params, batch)
            for batch in self.batches
        ]

    def loss(self, params, _):
        return self.model(self.batches[0], params).square().sum()

    def epoch(self, params, hparams):
        for update in self.maps:
            params = update(params, hparams)
        return params


def test_a_learning_rule_with_batches_is_a_map_for_reverse_methods():
    problem = RuleProblem()
    params = train(problem.model, problem.start, iter(problem.batches), problem.rule, 5)
    expected = torch.autograd.grad(problem.loss(params, None), problem.hparams)
    found = checkpointed_reverse(
        problem.start, problem.hparams, problem.maps, problem.loss, set_grad=False
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-12)


def test_a_learning_rule_at_its_fixed_point_is_differentiated_implicitly():
    problem = RuleProblem()
    params = problem.start
    with torch.no_grad():
        for _ in range(60):
            params = problem.epoch(params, None)
    found = fixed_point(params, problem.hparams, 40, problem.epoch, problem.loss, set_grad=False)
    expected = truncated_reverse(
        params, problem.hparams, 40, [problem.epoch] * 40, problem.loss, set_grad=False
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-8)


def test_the_fused_rule_runs_in_forward_mode_and_is_not_differentiated_twice():
    problem = RuleProblem()
    names = [name for name, _ in problem.rule.named_parameters()]

    def update(params, hparams):
        arguments = problem.model, params, problem.batches[0]
        return functional_call(problem.rule, dict(zip(names, hparams, strict=True)), arguments)

    expected = truncated_reverse(
        problem.start, problem.hparams, 1, [update], problem.loss, set_grad=False
    )
    for vectorize in (False, True):
        found = forward_mode(
            problem.start, problem.hparams, [update], problem.loss, False, vectorize=vectorize
        )
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b, 1e-10)
    with pytest.raises(HypergradientError, match="cannot be differentiated twice"):
        CG_normaleq(problem.start, problem.hparams, 5, problem.epoch, problem.loss)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_hyperparameter_without_elements_is_no_obstacle_to_forward_mode(vectorize):
    rate = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    hparams = [torch.zeros(0, dtype=DOUBLE, requires_grad=True), rate]
    found = forward_mode(
        [torch.ones(2, dtype=DOUBLE)], hparams, [lambda w, h: [w[0] * h[1] + h[0].sum()]] * 2,
        lambda w, h: w[0].sum(), False, vectorize=vectorize,
    )  # fmt: skip
    assert found[0].shape == (0,) and found[1].item() == pytest.approx(2 * 2 * 0.3)


# ---- wrong use ----


def wrong(change) -> dict:
    problem = Ridge()
    arguments = {
        "params": problem.solution, "hparams": problem.hparams, "K": 5, "fp_map": problem.map,
        "outer_loss": problem.outer_loss,
    }  # fmt: skip
    return arguments | change(problem)


@pytest.mark.parametrize("change, message", [
    (lambda p: {"K": -1}, "K must be a whole number of at least 0, got -1"),
    (lambda p: {"hparams": [p.hparams[0].detach(), p.hparams[1]]},
     r"hyperparameter 0 has requires_grad=False; call requires_grad_\(\)"),
    (lambda p: {"hparams": [p.hparams[0], 0.5]}, "hparams must be .* entry 1 is float"),
    (lambda p: {"hparams": iter(p.hparams)}, "entry 0 is list_iterator"),
    (lambda p: {"hparams": []}, "hparams holds no tensors"),
    (lambda p: {"params": [torch.arange(4)]}, "params must be .* entry 0 is torch.int64"),
    (lambda p: {"fp_map": lambda w, h: [w[0][:3]]}, r"must be \(4,\), .* got \(\(3,\)"),
    (lambda p: {"fp_map": lambda w, h: [w[0].float()]}, "must be .*float64.* got .*float32"),
    (lambda p: {"fp_map": lambda w, h: [w[0], w[0]]}, "is not a tree like params"),
    (lambda p: {"fp_map": lambda w, h: w[0]}, "is not a tree like params"),
    (lambda p: {"fp_map": lambda w, h: [None]}, "got <class 'NoneType'>"),
    (lambda p: {"fp_map": lambda w, h: [w[0].detach()]}, "the map's result is detached"),
    (lambda p: {"outer_loss": lambda w, h: w[0]}, r"outer_loss must be a scalar .* got \(4,\)"),
    (lambda p: {"outer_loss": lambda w, h: 1.0}, "outer_loss must be a scalar .* got float"),
    (lambda p: {"outer_loss": lambda w, h: w[0].sum().detach()}, "detached"),
])  # fmt: skip
@pytest.mark.parametrize("method", [fixed_point, neumann, CG, CG_normaleq, nystrom, stoch_AID])
def test_wrong_arguments_of_implicit_methods_get_one_line(method, change, message):
    with pytest.raises(HypergradientError, match=message) as caught:
        method(**wrong(change))
    assert "\n" not in str(caught.value)


def test_wrong_use_of_the_stochastic_linear_solve_gets_one_line():
    for options, message in [
        ({"fp_map": None}, "give fp_map or inner_loss"),
        ({"J_inner": 2}, "J_inner needs stoch_inner"),
        ({"J_outer": 2}, "J_outer needs stoch_outer"),
        ({"J_inner": 0, "stoch_inner": True}, "at least 1"),
        ({"linsys_start": [torch.zeros(2)]}, "tensor 0 of linsys_start must be"),
        ({"linsys_start": []}, "linsys_start is not a tree like params"),
    ]:
        with pytest.raises(HypergradientError, match=message):
            stoch_AID(**(wrong(lambda p: {}) | options))


def test_wrong_use_of_reverse_methods_gets_one_line():
    p = Ridge()
    start, maps = p.solution, [p.map] * 3
    arguments = p.hparams, maps, p.outer_loss
    for run, message in [
        (lambda: reverse([], *arguments), "too short"),
        (lambda: reverse([start] * 5, *arguments), "5 states need 4 update maps and there are 3"),
        (lambda: reverse([start, [start[0][:2]]], *arguments), "."),
        (lambda: truncated_reverse(start, p.hparams, 4, maps, p.outer_loss), "K = 4 needs as many"),
        (lambda: truncated_reverse(start, p.hparams, 0, maps, p.outer_loss), "K must be a whole"),
        (lambda: checkpointed_reverse(start, p.hparams, [], p.outer_loss), "number of update_maps"),
        (lambda: checkpointed_reverse(start, *arguments, 0), "segment_length must be a whole"),
        (lambda: forward_mode(start, p.hparams, [], p.outer_loss), "number of update_maps"),
        (lambda: neumann_lookback(start, p.hparams, 5, maps, p.outer_loss), "too short: 5 terms"),
        (lambda: neumann_lookback(start, p.hparams, 1, [], p.outer_loss), "too short"),
        (lambda: reverse_unroll(start, p.hparams, lambda w, h: w[0].sum()), "detached"),
    ]:
        with pytest.raises((HypergradientError, RuntimeError), match=message):
            run()
    attached = [start[0].clone().requires_grad_()]
    with pytest.raises(HypergradientError, match="depends on no hyperparameter"):
        reverse_unroll(attached, p.hparams, lambda w, h: w[0].sum())


def test_forward_mode_says_when_a_map_cannot_be_vectorised():
    p = Ridge()
    with pytest.raises(HypergradientError, match="leave vectorize out"):
        forward_mode(p.solution, p.hparams, [p.map], p.outer_loss, vectorize=True)


def _towards(target):
    """Gradient descent on |w - target|^2 / 2 + h |w|^2."""

    def phi(params, hparams):
        w, h = params[0], hparams[0]
        loss = 0.5 * (w - target).square().sum() + h * w.square().sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        return [w - 0.1 * g]

    return phi


TARGET = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)


def _at_fixed_point():
    h = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    return [(TARGET / 2).requires_grad_()], [h], _towards(TARGET)


def _distance(params, hparams):
    return (params[0] - 1).square().sum()


@pytest.mark.parametrize("method", [CG, CG_normaleq, nystrom, fixed_point])
def test_an_outer_gradient_that_is_not_finite_is_refused(method):
    w, h, phi = _at_fixed_point()
    for outer in (
        lambda p, _: (p[0] - w[0].detach()).sqrt().sum(),
        lambda p, _: ((p[0] - 1) * 1e200).square().sum(),
    ):
        with pytest.raises(DivergenceError, match="not finite"):
            method(w, h, 10, phi, outer, set_grad=False)


@pytest.mark.parametrize("K", [float("nan"), 2.5, -1, "3", None])
@pytest.mark.parametrize("method", [CG, CG_normaleq, nystrom, fixed_point, neumann])
def test_iterations_are_a_whole_number(method, K):
    w, h, phi = _at_fixed_point()
    with pytest.raises(HypergradientError, match="K must be a whole number"):
        method(w, h, K, phi, _distance, set_grad=False)


def test_tolerances_ranks_and_draws_that_there_are_not_are_refused():
    w, h, phi = _at_fixed_point()
    for method in (CG, CG_normaleq, fixed_point):
        with pytest.raises(HypergradientError, match="tol must be at least 0"):
            method(w, h, 9, phi, _distance, tol=float("nan"), set_grad=False)
    for rank in (0, -1):
        with pytest.raises(HypergradientError, match="rank must be a whole number"):
            nystrom(w, h, 9, phi, _distance, rank=rank, set_grad=False)
    for draws in ((0, 1), (1, 0)):
        with pytest.raises(HypergradientError, match="draws must be a whole number"):
            implicit(w, h, phi, _distance, FixedPoint(3), False, False, *draws)
    with pytest.raises(HypergradientError, match="K must be a whole number"):
        truncated_reverse(w, h, 2.5, [phi] * 3, _distance, set_grad=False)


@pytest.mark.parametrize("method", [fixed_point, neumann])
def test_a_map_that_does_not_contract_in_one_direction_is_refused(method):
    keeps = torch.tensor([0.5, 0.5, 1.0], dtype=DOUBLE)
    h = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(DivergenceError, match="contraction"):
        method(
            [TARGET.clone().requires_grad_()], [h], 20,
            lambda p, hparams: [keeps * p[0] - TARGET * hparams[0]], _distance, set_grad=False,
        )  # fmt: skip


# ---- the table of all functions ----


def test_the_table_has_all_public_functions_with_their_arguments_in_order():
    text = (ROOT / "docs/hypergradients.md").read_text()
    table = text.split("| function | arguments")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    functions = {name for name in hg.__all__ if inspect.isfunction(getattr(hg, name))}
    assert {name for name, *_ in rows} == functions and len(rows) == len(functions)
    for name, said, returns, adds, _ in rows:
        if name == "differentiable_by":
            continue
        signature = inspect.signature(getattr(hg, name))
        parameters = signature.parameters.values()
        needed = ", ".join(p.name for p in parameters if p.default is p.empty)
        optional = ", ".join(p.name for p in parameters if p.default is not p.empty)
        assert said == (f"{needed}; {optional}" if optional else needed), name
        assert (adds == "adds") == ("set_grad" in said or name == "update_tensor_grads"), name
        assert (", and " in returns) == ("tuple" in str(signature.return_annotation)), name
