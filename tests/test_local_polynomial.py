"""The factored sum against one product per monomial, values and every gradient."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, gradients, monomial_sum, normal, weighted_sum

from kernels.local_polynomial import LocalPolynomials, LocalSum, written_out

hypothesis_settings = settings(deadline=None, max_examples=80, derandomize=True)


def local_polynomials(sums, post):
    """delta of each sum (exponents, psi, weight, presynaptic) with these postsynaptic tensors."""
    tensors, layouts = list(post), []
    for exponents, _, _, pre in sums:
        numbers = []
        for p in pre:
            known = [k for k, tensor in enumerate(tensors) if tensor is p]
            numbers += known or [len(tensors)]
            tensors += [] if known else [p]
        layouts.append(LocalSum(tuple(exponents), tuple(numbers)))
    evaluate = LocalPolynomials(layouts, range(len(post)), post[0].device)
    return evaluate([psi for _, psi, _, _ in sums], [weight for _, _, weight, _ in sums], tensors)


def local_polynomial(exponents, psi, weight, pre, post):
    """A sum that is evaluated alone."""
    return local_polynomials([(exponents, psi, weight, pre)], post)[0]


def sum_and_gradients(function, exponents, psi, weight, pre, post):
    """The value, and its gradients by psi, weight and every variable."""
    delta = function(tuple(exponents), psi, weight, pre, post)
    return delta, gradients(weighted_sum([delta]), [psi, weight, *pre, *post])


def assert_equals_oracle(exponents, psi, weight, pre, post, relative=1e-10):
    delta, grads = sum_and_gradients(local_polynomial, exponents, psi, weight, pre, post)
    expected, expected_grads = sum_and_gradients(monomial_sum, exponents, psi, weight, pre, post)
    assert_near(delta, expected, relative)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_near(grad, expected_grad, relative)


def problem(exponents, inputs, outputs, batch, fan_in, fan_out, seed=0):
    """psi, weight, presynaptic and postsynaptic tensors."""
    return (
        normal(seed, len(exponents)),
        normal(seed + 1, fan_out, fan_in),
        [normal(seed + 2 + k, batch, fan_in) for k in range(inputs)],
        [normal(seed + 10 + k, batch, fan_out) for k in range(outputs)],
    )


def all_powers(variables, total=math.inf, partial=math.inf):
    """Brute force: every tuple of powers within the degrees."""
    highest = int(min(total, partial))
    every = itertools.product(range(highest + 1), repeat=variables)
    return [powers for powers in every if sum(powers) <= total]


@st.composite
def sums(draw):
    """A random sparse set of exponents and tensors of random small shapes."""
    inputs, outputs = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    term = st.tuples(*[st.integers(0, 3)] * (inputs + outputs), st.integers(0, 3))
    exponents = draw(st.lists(term, unique=True, max_size=12))
    batch, fan_out = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    fan_in = draw(st.integers(1, 4)) if inputs else 1
    seed = 100 * draw(st.integers(0, 1000))
    return exponents, *problem(exponents, inputs, outputs, batch, fan_in, fan_out, seed)


@hypothesis_settings
@given(sums())
def test_a_random_sparse_sum_equals_one_product_per_monomial(arguments):
    assert_equals_oracle(*arguments)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("inputs, outputs", [(1, 2), (0, 1), (1, 1), (2, 4), (2, 2)])
def test_every_total_degree_equals_one_product_per_monomial(degree, inputs, outputs):
    degree = min(degree, 3) if inputs + outputs > 4 else degree
    exponents = all_powers(inputs + outputs + 1, total=degree)
    fan_in = 3 if inputs else 1
    assert_equals_oracle(exponents, *problem(exponents, inputs, outputs, 6, fan_in, 2))


@pytest.mark.parametrize("total, partial", [(math.inf, 1), (math.inf, 2), (4, 2), (3, 1)])
def test_partial_degrees_equal_one_product_per_monomial(total, partial):
    exponents = all_powers(4, total, partial)
    assert_equals_oracle(exponents, *problem(exponents, 1, 2, 5, 4, 3))


@pytest.mark.parametrize(
    "exponents",
    [
        [],
        [(0, 0, 0, 0)],
        [(0, 0, 0, 2)],
        [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 3)],
        [(0, 1, 0, 0), (0, 0, 2, 1), (0, 1, 2, 2)],
        [(1, 0, 0, 0), (2, 0, 0, 1), (3, 0, 0, 2)],
        [(2, 0, 0, 0), (0, 0, 1, 0)],
        [(3, 2, 2, 0)],
        [(1, 1, 1, 5)],
        [(1, 0, 1, 0), (0, 0, 2, 1)],
    ],
    ids=["empty", "1", "w^2", "powers of w", "a=0", "c=d=0", "x^2, y", "high", "w^5", "oja"],
)
@pytest.mark.parametrize("batch, fan_in, fan_out", [(4, 3, 2), (1, 3, 2), (4, 1, 1), (1, 1, 1)])
def test_special_sets_of_terms_equal_one_product_per_monomial(exponents, batch, fan_in, fan_out):
    assert_equals_oracle(exponents, *problem(exponents, 1, 2, batch, fan_in, fan_out))


def test_the_order_of_the_terms_does_not_matter():
    exponents = all_powers(4, total=3)
    arguments = problem(exponents, 1, 2, 5, 4, 3)
    assert_equals_oracle(exponents[::-1], *arguments)
    assert_equals_oracle(exponents[::2] + exponents[1::2], *arguments)


@pytest.mark.parametrize("batch", [1025, 9000])
def test_a_batch_of_thousands_equals_one_product_per_monomial(batch):
    exponents = all_powers(4, total=3)
    assert_equals_oracle(exponents, *problem(exponents, 1, 2, batch, 3, 8))


def test_a_batch_of_many_megabytes_equals_one_product_per_monomial():
    # More than fits into a processor's cache, and not a whole number of equal blocks.
    exponents = [(0, 1, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 2, 0, 1), (2, 0, 1, 2), (3, 1, 0, 0)]
    assert_equals_oracle(exponents, *problem(exponents, 1, 2, 5003, 130, 2))


def test_a_large_batch_of_pairs_equals_one_product_per_monomial():
    exponents = all_powers(7, total=2)
    assert_equals_oracle(exponents, *problem(exponents, 2, 4, 4001, 2, 4))


@st.composite
def joint_sums(draw):
    """Several sums over the same postsynaptic tensors, and what each of them needs."""
    outputs, batch, fan_out = draw(st.integers(1, 3)), draw(st.integers(1, 5)), 3
    seed = 100 * draw(st.integers(0, 1000))
    sums = []
    for number in range(draw(st.integers(1, 3))):
        inputs = draw(st.integers(0, 2))
        term = st.tuples(*[st.integers(0, 2)] * (inputs + outputs + 1))
        exponents = tuple(draw(st.lists(term, unique=True, max_size=6)))
        fan_in = draw(st.integers(1, 4)) if inputs else 1
        arguments = problem(exponents, inputs, 0, batch, fan_in, fan_out, seed + 20 * number)
        sums.append((exponents, *arguments[:3]))
    return sums, [normal(seed + 90 + k, batch, fan_out) for k in range(outputs)]


@hypothesis_settings
@given(joint_sums(), st.data())
def test_sums_evaluated_together_equal_those_evaluated_alone(problem, data):
    sums, post = problem
    leaves = [t for _, psi, weight, pre in sums for t in (psi, weight, *pre)] + post
    wanted = [leaf.requires_grad_(data.draw(st.booleans())) for leaf in leaves[1:]]
    wanted = [leaves[0], *(leaf for leaf in wanted if leaf.requires_grad)]
    deltas = local_polynomials(sums, post)
    expected = [monomial_sum(*arguments, post) for arguments in sums]
    for delta, expected_delta in zip(deltas, expected, strict=True):
        assert_near(delta, expected_delta)
    # A loss may use only some of the sums, and ask for only some of the gradients.
    used = data.draw(st.lists(st.integers(0, len(sums) - 1), unique=True, min_size=1))
    found, expected_grads = (
        gradients(weighted_sum([d[k] for k in used]) + 0 * leaves[0].sum(), wanted)
        for d in (deltas, expected)
    )
    for grad, expected_grad in zip(found, expected_grads, strict=True):
        assert_near(grad, expected_grad)


@pytest.mark.parametrize("degree, inputs, outputs", [(0, 1, 2), (2, 0, 1), (3, 1, 2), (2, 2, 4)])
def test_the_sum_written_out_for_tasks_is_that_of_each(degree, inputs, outputs):
    exponents = all_powers(inputs + outputs + 1, degree)
    alone = [problem(exponents, inputs, outputs, 4, 3, 2, seed=100 * k) for k in range(2)]

    def written(exponents, psi, weight, pre, post):
        layout = LocalSum(tuple(exponents), tuple(range(len(post), len(post) + len(pre))))
        plan = LocalPolynomials([layout], range(len(post)), torch.device("cpu"))
        return written_out(plan.joint, [psi], [weight], [*post, *pre])[0]

    psi, weight, pre, post = (
        [torch.stack(t) for t in zip(*parts, strict=True)]
        if isinstance(parts[0], list)
        else torch.stack(parts)
        for parts in zip(*alone, strict=True)
    )
    leaves = [t.requires_grad_() for t in (psi, weight, *pre, *post)]
    delta = written(exponents, psi, weight, pre, post)
    found = gradients(weighted_sum(delta.unbind()[:1]) + weighted_sum(delta.unbind()[1:]), leaves)
    for k, task in enumerate(alone):
        expected, of_each = sum_and_gradients(monomial_sum, exponents, *task)
        assert_near(delta[k], expected)
        for ours, theirs in zip(found, of_each, strict=True):
            assert_near(ours[k], theirs)


def test_the_same_tensors_may_send_and_receive():
    exponents = all_powers(3, total=3)
    psi, weight, _, (y,) = problem(exponents, 1, 1, 7, 4, 4)
    results = []
    for function in (local_polynomial, monomial_sum):
        delta = function(tuple(exponents), psi, weight, [y], [y])
        results.append([delta, *gradients(weighted_sum([delta]), [psi, weight, y])])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=5)))
def test_only_the_gradients_asked_for_are_needed(asked):
    exponents = all_powers(4, total=3)
    psi, weight, pre, post = problem(exponents, 1, 2, 5, 4, 3)
    tensors = [psi, weight, *pre, *post]
    for tensor, wanted in zip(tensors, asked, strict=True):
        tensor.requires_grad_(wanted)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    delta = local_polynomial(tuple(exponents), psi, weight, pre, post)
    expected = monomial_sum(exponents, psi, weight, pre, post)
    assert_near(delta, expected)
    assert delta.requires_grad == bool(wanted)
    if wanted:
        found = gradients(weighted_sum([delta]), wanted)
        for grad, expected_grad in zip(
            found, gradients(weighted_sum([expected]), wanted), strict=True
        ):
            assert_near(grad, expected_grad)


def test_tensors_need_not_be_contiguous():
    exponents = all_powers(4, total=3)
    psi, weight = normal(0, 2 * len(exponents)), normal(1, 4, 3)
    x, s, y = normal(2, 4, 6), normal(3, 6, 6), normal(4, 1, 3)
    views = (psi[::2], weight.t(), [x.t()], [s[:, ::2], y.expand(6, 3)])
    leaves = [psi, weight, x, s, y]
    delta = local_polynomial(tuple(exponents), *views)
    expected = monomial_sum(exponents, *views)
    assert_near(delta, expected)
    for scalar in (weighted_sum, lambda deltas: deltas[0].sum()):
        found, expected_grads = (
            gradients(scalar([f(tuple(exponents), *views)]), leaves)
            for f in (local_polynomial, monomial_sum)
        )
        for grad, expected_grad in zip(found, expected_grads, strict=True):
            assert_near(grad, expected_grad)


def test_gradients_agree_with_finite_differences():
    exponents = tuple(all_powers(4, total=3))
    psi, weight, (x,), (s, y) = problem(exponents, 1, 2, 3, 2, 2)

    def function(psi, weight, x, s, y):
        return local_polynomial(exponents, psi, weight, [x], [s, y])

    assert torch.autograd.gradcheck(function, (psi, weight, x, s, y))


def test_nothing_given_is_changed_forward_or_backward():
    exponents = tuple(all_powers(4, total=3))
    psi, weight, pre, post = problem(exponents, 1, 2, 5, 4, 3)
    cotangent = normal(99, 3, 4).detach()
    tensors = [psi, weight, *pre, *post, cotangent]
    before = [tensor.detach().clone() for tensor in tensors]
    delta = local_polynomial(exponents, psi, weight, pre, post)
    value = delta.detach().clone()
    delta.backward(cotangent)
    for tensor, copy in zip([*tensors, delta], [*before, value], strict=True):
        assert torch.equal(tensor, copy)


def test_backward_can_run_twice_through_a_kept_graph():
    exponents = tuple(all_powers(4, total=3))
    psi, weight, pre, post = problem(exponents, 1, 2, 5, 4, 3)
    loss = weighted_sum([local_polynomial(exponents, psi, weight, pre, post)])
    first = torch.autograd.grad(loss, [psi, weight, *pre, *post], retain_graph=True)
    second = torch.autograd.grad(loss, [psi, weight, *pre, *post])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused():
    exponents = tuple(all_powers(4, total=2))
    psi, weight, pre, post = problem(exponents, 1, 2, 3, 2, 2)
    delta = local_polynomial(exponents, psi, weight, pre, post)
    (grad,) = torch.autograd.grad(delta.square().sum(), [psi], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_grad_gives_the_same_bits():
    exponents = tuple(all_powers(4, total=3))
    arguments = problem(exponents, 1, 2, 700, 4, 3)
    with torch.no_grad():
        without = local_polynomial(exponents, *arguments)
    assert torch.equal(without, local_polynomial(exponents, *arguments))
    assert not without.requires_grad


@pytest.mark.parametrize("batch", [32, 3000])
def test_float32_is_close_to_float64(batch):
    exponents = tuple(all_powers(4, total=3))
    double = problem(exponents, 1, 2, batch, 5, 4)

    def single(tensor):
        return tensor.detach().float().requires_grad_()

    psi, weight, pre, post = double
    singles = (single(psi), single(weight), [single(t) for t in pre], [single(t) for t in post])
    delta, grads = sum_and_gradients(local_polynomial, exponents, *singles)
    expected, expected_grads = sum_and_gradients(local_polynomial, exponents, *double)
    assert delta.dtype == torch.float32
    assert_near(delta, expected.float(), 1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_near(grad, expected_grad.float(), 1e-5)
