"""Linear solvers on dense matrices that are known, in vectors of several tensors."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DOUBLE, assert_near, normal

from hypergradients import (
    ConjugateGradient,
    DivergenceError,
    FixedPoint,
    HypergradientError,
    NormalEquations,
    NystromConjugateGradient,
    Optimizer,
)
from hypergradients.linear_solvers import norm

SHAPES = [(2, 3), (), (4,)]
SIZE = 11


def shaped(flat):
    pieces = flat.split([torch.Size(s).numel() for s in SHAPES])
    return [p.view(s) for p, s in zip(pieces, SHAPES, strict=True)]


def flat(vector):
    return torch.cat([t.reshape(-1) for t in vector])


class Dense:
    """M as a matrix; counts its products."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def matvec(self, x):
        self.products += 1
        return shaped(self.matrix @ flat(x))

    def adjoint(self, x):
        return shaped(self.matrix.T @ flat(x))

    def solution(self, b):
        return torch.linalg.solve(torch.eye(SIZE, dtype=DOUBLE) - self.matrix, flat(b))

    def solved(self, solver, b):
        adjoint = [self.adjoint] if isinstance(solver, NormalEquations) else []
        return solver.solve(self.matvec, b, *adjoint)


def with_eigenvalues(values, seed=0):
    """A symmetric matrix."""
    basis = torch.linalg.qr(normal(seed, SIZE, SIZE).detach())[0]
    return basis @ torch.as_tensor(values, dtype=DOUBLE).diag() @ basis.T


def right_side(seed=3):
    return shaped(normal(seed, SIZE).detach())


def adam(v):
    optimizer = torch.optim.Adam(v, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


@pytest.mark.parametrize("solver, tolerance", [
    (FixedPoint(200), 1e-9),
    (ConjugateGradient(SIZE), 1e-10),
    (NystromConjugateGradient(SIZE, rank=4), 1e-10),
    (NormalEquations(3 * SIZE), 1e-9),
    (Optimizer(200), 1e-9),
    (Optimizer(2000, adam), 1e-6),
])  # fmt: skip
def test_every_solver_solves_a_symmetric_contraction(solver, tolerance):
    system, b = Dense(with_eigenvalues(torch.linspace(-0.5, 0.8, SIZE))), right_side()
    v, residuals = system.solved(solver, b)
    assert [t.shape for t in v] == [t.shape for t in b]
    assert_near(flat(v), system.solution(b), tolerance)
    assert not solver.diverges([*residuals, 1e-12], norm(b))


@given(seed=st.integers(0, 10**6), scale=st.floats(0.5, 3.0))
@settings(max_examples=20, deadline=None)
def test_normal_equations_solve_any_regular_system_with_falling_residuals(seed, scale):
    system, b = Dense(scale * normal(seed, SIZE, SIZE).detach() / SIZE**0.5), right_side(seed + 1)
    identity = torch.eye(SIZE, dtype=DOUBLE)
    v, residuals = system.solved(NormalEquations(8 * SIZE), b)
    condition = torch.linalg.cond(identity - system.matrix)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(residuals))
    if condition < 100:
        assert_near(flat(v), system.solution(b), 1e-6)


def test_conjugate_gradients_need_as_many_matvecs_as_there_are_eigenvalues():
    values = [0.9, 0.5, -0.5] + [0.2] * (SIZE - 3)
    system, b = Dense(with_eigenvalues(values)), right_side()
    v, _ = system.solved(ConjugateGradient(4), b)
    assert system.products == 4
    assert_near(flat(v), system.solution(b), 1e-10)


def test_a_nystrom_approximation_of_the_large_eigenvalues_leaves_the_small_ones():
    values = [-900.0, -500.0, -100.0] + [0.5] * (SIZE - 3)  # of M; 901, 501, 101, .5 of I - J
    b = right_side()

    def error(solver, products):
        system = Dense(with_eigenvalues(values))
        solution = system.solution(b)
        v, _ = system.solved(solver, b)
        assert system.products == products
        return float((flat(v) - solution).norm() / solution.norm())

    assert error(ConjugateGradient(2), 2) > 0.5
    assert error(NystromConjugateGradient(2, rank=3), 3 + 2) < 0.05
    assert error(NystromConjugateGradient(1, rank=100), SIZE + 1) < 1e-7


def test_the_test_matrix_comes_from_the_generator():
    system, b = Dense(with_eigenvalues(torch.linspace(-30, 0.5, SIZE))), right_side()

    def solved(seed):
        generator = torch.Generator().manual_seed(seed)
        return flat(system.solved(NystromConjugateGradient(2, rank=3, generator=generator), b)[0])

    assert torch.equal(solved(1), solved(1)) and not torch.equal(solved(1), solved(2))


def test_a_right_side_of_zero_is_solved_by_zero():
    system, b = Dense(with_eigenvalues([0.5] * SIZE)), shaped(torch.zeros(SIZE, dtype=DOUBLE))
    for solver in (FixedPoint(5, 0.0), ConjugateGradient(5, 0.0), NormalEquations(5, 0.0)):
        v, residuals = system.solved(solver, b)
        assert flat(v).abs().max() == 0
        assert not solver.diverges([*residuals, 0.0], 0.0)


def test_single_precision_ends_at_its_rounding_error():
    matrix, b = with_eigenvalues(torch.linspace(-0.5, 0.8, SIZE)).float(), right_side()
    b = [t.float() for t in b]
    for solver in (ConjugateGradient(1000), NormalEquations(1000)):
        system = Dense(matrix)
        v, _ = system.solved(solver, b)
        assert system.products < 60 and v[0].dtype == torch.float32
        assert_near(flat(v), Dense(matrix.double()).solution([t.double() for t in b]).float(), 1e-5)


def test_an_indefinite_or_singular_system_is_refused_with_the_residual():
    b = right_side()
    indefinite = Dense(with_eigenvalues([3.0] * 5 + [0.5] * (SIZE - 5)))
    with pytest.raises(DivergenceError, match=r"curvature -.* residual .* at the start"):
        indefinite.solved(ConjugateGradient(20), b)
    with pytest.raises(DivergenceError, match="Nystrom approximation needs"):
        indefinite.solved(NystromConjugateGradient(20, rank=8), b)
    with pytest.raises(DivergenceError, match="curvature 0"):
        Dense(torch.eye(SIZE, dtype=DOUBLE)).solved(ConjugateGradient(20), b)


def asymmetric(share, seed=0):
    """A contraction of norm .9, its skew part by `share` of that of a random matrix."""
    matrix = normal(seed, SIZE, SIZE).detach()
    matrix = (matrix + matrix.T) / 2 + share * (matrix - matrix.T) / 2
    return 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(share=st.sampled_from([1.0, 0.3, 0.1]), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_system_that_is_not_symmetric_is_refused_by_conjugate_gradients(dtype, share, seed):
    system, b = Dense(asymmetric(share, seed).to(dtype)), [t.to(dtype) for t in right_side(seed)]
    for solver in (ConjugateGradient(SIZE), NystromConjugateGradient(SIZE, rank=4)):
        with pytest.raises(HypergradientError, match=r"symmetric.* take CG_normaleq"):
            system.solved(solver, b)


def test_a_skew_part_that_only_distant_directions_see_is_noticed():
    matrix = torch.diag(torch.linspace(-0.5, 0.8, SIZE, dtype=DOUBLE))
    matrix[0, -1], matrix[-1, 0] = 0.3, -0.3
    with pytest.raises(HypergradientError, match="symmetric"):
        Dense(matrix).solved(ConjugateGradient(SIZE), right_side())


def test_symmetry_is_taken_for_granted_on_request():
    system, b = Dense(asymmetric(1.0)), right_side()
    solver = ConjugateGradient(2, assume_symmetric=True)
    assert len(system.solved(solver, b)[1]) == 2


@given(exponent=st.floats(0, 6), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_no_symmetric_system_is_refused_however_it_is_conditioned(exponent, seed):
    values = 1 - torch.logspace(-exponent, 1, SIZE, dtype=DOUBLE)  # of M
    for dtype in (torch.float32, torch.float64):
        matrix = with_eigenvalues(values, seed).to(dtype)
        system, b = Dense((matrix + matrix.T) / 2), [t.to(dtype) for t in right_side(seed)]
        with contextlib.suppress(DivergenceError):  # rounded, it may be indefinite
            system.solved(ConjugateGradient(3 * SIZE), b)


def test_a_preconditioner_that_is_not_positive_definite_is_refused():
    system = Dense(with_eigenvalues([0.5] * SIZE))
    solver = ConjugateGradient(5, precondition=lambda r: [-t for t in r])
    with pytest.raises(HypergradientError, match="must be above 0"):
        system.solved(solver, right_side())


def test_normal_equations_refuse_a_singular_system_unless_b_is_in_its_range():
    matrix = with_eigenvalues([1.0, *torch.linspace(-0.5, 0.8, SIZE - 1).tolist()])
    b = right_side()
    with pytest.raises(DivergenceError, match="singular"):
        Dense(matrix).solved(NormalEquations(5 * SIZE), b)
    in_range = shaped(flat(b) - matrix @ flat(b))
    x = flat(Dense(matrix).solved(NormalEquations(5 * SIZE), in_range)[0])
    assert_near(x - matrix @ x, flat(in_range), 1e-9)


def test_matvecs_that_contradict_each_other_are_refused():
    system = Dense(with_eigenvalues(torch.linspace(-0.5, 0.8, SIZE)))
    system.adjoint = lambda v: [torch.zeros_like(t) for t in v]
    with pytest.raises(HypergradientError, match="differentiated twice"):
        system.solved(NormalEquations(5), right_side())


def residuals_of(matrix, b, iterations):
    """|b - (I - M) x_k| = |M^k b| with M = matrix^T."""
    norms, term = [], flat(b)
    for _ in range(iterations + 1):
        norms.append(float(term.norm()))
        term = matrix.T @ term
    return norms


@given(radius=st.floats(1.05, 3.0), seed=st.integers(0, 10**6), iterations=st.integers(60, 90))
@settings(max_examples=30, deadline=None)
def test_growth_of_a_symmetric_map_is_always_divergence(radius, seed, iterations):
    matrix = with_eigenvalues([radius, *torch.linspace(-0.9, 0.9, SIZE - 1).tolist()], seed)
    residuals = residuals_of(matrix, right_side(seed + 1), iterations)
    diverges = FixedPoint(iterations).diverges(residuals, residuals[0])
    assert diverges == (residuals[-1] > 1.01 * residuals[0])


@pytest.mark.parametrize("coupling", [0.5, 1.0, 3.0])
def test_passing_growth_of_a_contraction_is_no_divergence(coupling):
    matrix = 0.9 * torch.eye(SIZE, dtype=DOUBLE)
    matrix[0, 1] = coupling  # a Jordan block
    b = shaped(torch.eye(SIZE, dtype=DOUBLE)[0])
    for iterations in range(8, 60):  # the growth of the first few may speed up
        residuals = residuals_of(matrix, b, iterations)
        assert not FixedPoint(iterations).diverges(residuals, residuals[0])
