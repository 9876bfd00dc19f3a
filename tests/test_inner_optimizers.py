"""Inner optimisers: torch.optim's numbers, derivatives of steps, trees, data, memory."""

import functools

import pytest
import torch
from oracles import DOUBLE, assert_near, normal

from hypergradients import (
    Adam,
    DifferentiableOptimizer,
    GradientDescent,
    HeavyBall,
    HypergradientError,
    Momentum,
    Nesterov,
    checkpointed_reverse,
    forward_mode,
    gd_step,
    reverse,
    reverse_unroll,
)
from hypergradients.inner_optimizers import GRADIENTS


def loss(params, hparams):
    """A loss of two tensors that is neither quadratic nor separable."""
    a, b = params
    return (a @ b).sin().sum() + hparams[0] * (a.square().sum() + b.pow(4).sum())


def start():
    return [normal(1, 2, 3).detach(), normal(2, 3).detach()]


def hyperparameters():
    return [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.1, 0.05, 0.8)]


def step_size(hparams):
    return hparams[1]


def momentum(hparams):
    return hparams[2]


OPTIMIZERS = {
    "GradientDescent": functools.partial(GradientDescent, step_size=step_size),
    "HeavyBall": functools.partial(HeavyBall, step_size=step_size, momentum=momentum),
    "Momentum": functools.partial(Momentum, step_size=step_size, momentum=momentum),
    "Nesterov": functools.partial(Nesterov, step_size=step_size, momentum=momentum),
    "Adam": functools.partial(Adam, step_size=step_size, beta1=momentum, beta2=0.9),
}


@pytest.mark.parametrize("ours, theirs", [
    (GradientDescent(loss, 0.05), functools.partial(torch.optim.SGD, lr=0.05)),
    (HeavyBall(loss, 0.05, 0.8), functools.partial(torch.optim.SGD, lr=0.05, momentum=0.8)),
    (Momentum(loss, 0.05, 0.8), functools.partial(torch.optim.SGD, lr=0.05, momentum=0.8)),
    (Nesterov(loss, 0.05, 0.8),
     functools.partial(torch.optim.SGD, lr=0.05, momentum=0.8, nesterov=True)),
    (Adam(loss, 0.05, 0.8, 0.9), functools.partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.9))),
])  # fmt: skip
def test_steps_are_those_of_torch_optim(ours, theirs):
    params, hparams = ours.get_opt_params(start()), hyperparameters()
    leaves = [t.clone().requires_grad_() for t in start()]
    optimizer = theirs(leaves)
    for _ in range(6):
        params = ours(params, hparams, create_graph=False)
        optimizer.zero_grad()
        loss(leaves, hparams).backward()
        optimizer.step()
        for a, b in zip(params[:2], leaves, strict=True):
            assert_near(a, b.detach(), 1e-12)
            assert not a.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradients_through_the_steps_agree_with_finite_differences(name, gradient):
    optimizer = OPTIMIZERS[name](loss, gradient=gradient)

    def outer(*hparams):
        params = optimizer.get_opt_params(start())
        for _ in range(4):
            params = optimizer(params, list(hparams))
        return params[0].square().sum() + params[1].sum()

    assert torch.autograd.gradcheck(outer, hyperparameters(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_a_map_for_every_kind_of_method(name):
    def outer_loss(params, hparams):
        return params[0].square().sum() + params[1].sum() + hparams[2]

    hparams, results = hyperparameters(), []
    for gradient in GRADIENTS:
        optimizer = OPTIMIZERS[name](loss, gradient=gradient)
        history = [optimizer.get_opt_params(start())]
        for _ in range(4):
            history.append(optimizer(history[-1], hparams, create_graph=False))
        maps = [optimizer] * 4
        results.append(reverse(history, hparams, maps, outer_loss, set_grad=False))
        results.append(checkpointed_reverse(history[0], hparams, maps, outer_loss, set_grad=False))
        params = history[0]
        for _ in range(4):
            params = optimizer(params, hparams)
        results.append(reverse_unroll(params, hparams, outer_loss, set_grad=False))
    results.append(forward_mode(history[0], hparams, maps, outer_loss, False, vectorize=True))
    for result in results:
        for a, b in zip(result, results[0], strict=True):
            assert_near(a, b, 1e-11)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_may_be_a_dict_per_layer(name, gradient):
    def tree_loss(params, hparams):
        return loss([params[0]["a"], params[2]["b"]], hparams["all"])

    hparams = hyperparameters()
    optimizer = OPTIMIZERS[name](loss, gradient=gradient)
    expected = optimizer.get_opt_params(start())
    settings = {key: functools.partial(lambda s, h: s(h["all"]), s) if callable(s) else s
                for key, s in optimizer.settings.items()}  # fmt: skip
    optimizer_on_trees = type(optimizer)(tree_loss, **settings, gradient=gradient)
    a, b = start()
    params = optimizer_on_trees.get_opt_params([{"a": a}, {}, {"b": b}])
    for _ in range(3):
        expected = optimizer(expected, hparams)
        params = optimizer_on_trees(params, {"all": hparams})
    assert len(params) == optimizer.dim_mult * 3 + optimizer.extra and params[1] == {}
    assert torch.equal(params[0]["a"], expected[0]) and torch.equal(params[2]["b"], expected[1])
    found = torch.autograd.grad(params[0]["a"].sum(), hparams[0])[0]
    assert torch.equal(found, torch.autograd.grad(expected[0].sum(), hparams[0])[0])


def test_data_come_from_an_iterator_or_are_the_same_at_every_step():
    seen = []

    def data_loss(params, hparams, data):
        seen.append(data)
        return (params[0] * data).sum()

    w, h = [torch.zeros(2, dtype=DOUBLE)], hyperparameters()
    batches = [torch.full((2,), v, dtype=DOUBLE) for v in (1.0, 2.0, 3.0)]
    optimizer = GradientDescent(data_loss, 1.0, iter(batches))
    for _ in range(3):
        w = optimizer(w, h)
    assert seen == batches and torch.equal(w[0].detach(), -sum(batches))
    repeated = GradientDescent(data_loss, 1.0, batches[1])
    assert torch.equal(repeated(repeated(w, h), h)[0].detach(), w[0].detach() - 4)


def test_a_parameter_without_influence_stays_and_always_zero_gradients_stay_finite():
    h = hyperparameters()
    for name, make in OPTIMIZERS.items():
        optimizer = make(lambda params, h: h[0] * (params[0] * torch.tensor([0.0, 1.0])).sum())
        params = optimizer.get_opt_params([torch.ones(2, dtype=DOUBLE), normal(0, 3).detach()])
        for _ in range(3):
            params = optimizer(params, h)
        assert torch.equal(params[1].detach(), normal(0, 3).detach()), name
        assert torch.autograd.grad(params[0].sum(), h[0])[0].isfinite(), name


def test_heavy_ball_starts_at_rest():
    h = hyperparameters()
    ball, plain = HeavyBall(loss, 0.05, 0.9), GradientDescent(loss, 0.05)
    for a, b in zip(ball(ball.get_opt_params(start()), h)[:2], plain(start(), h), strict=True):
        assert torch.equal(a, b)


def test_the_loss_of_the_last_call_is_kept_with_the_graph_of_its_step():
    for create_graph in (True, False):
        h = hyperparameters()
        optimizer = GradientDescent(loss, 0.05)
        assert optimizer.curr_loss is None
        optimizer(start(), h, create_graph)
        assert optimizer.curr_loss.detach() == loss(start(), h).detach()
        assert optimizer.curr_loss.requires_grad == create_graph
    attached = GradientDescent(loss, 0.05)
    attached(start(), h)
    expected = sum((t.square().sum() for t in start()[:1]), start()[1].pow(4).sum())
    assert_near(torch.autograd.grad(attached.curr_loss, h[0])[0], expected, 1e-12)


def test_a_differentiable_optimizer_of_ones_own_is_a_map_for_the_methods():
    class WithPrevious(DifferentiableOptimizer):
        def __init__(self, loss_f, data_or_iter=None):
            super().__init__(loss_f, dim_mult=2, data_or_iter=data_or_iter)

        def step(self, params, hparams, create_graph):
            half = len(params) // 2
            value = self.get_loss(params[:half], hparams)
            new = gd_step(params[:half], value, hparams[1], create_graph=create_graph)
            return [*new, *params[:half]]

    h = hyperparameters()
    ours, plain = WithPrevious(lambda p, h, data: loss(p, h), [1]), GradientDescent(loss, step_size)
    history = [ours.get_opt_params([t.requires_grad_() for t in start()])]
    assert [t.shape for t in history[0]] == [t.shape for t in start() * 2]
    for _ in range(3):
        history.append(ours(history[-1], h))
    found = reverse(history, h, [ours] * 3, lambda p, h: p[0].sum(), set_grad=False)
    plainly = [start()]
    for _ in range(3):
        plainly.append(plain(plainly[-1], h, create_graph=False))
    expected = reverse(plainly, h, [plain] * 3, lambda p, h: p[0].sum(), set_grad=False)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-12)


def test_a_step_makes_a_graph_where_anything_in_it_wants_a_gradient_only():
    plain = [h.detach() for h in hyperparameters()]
    wanting = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)

    def closed(params, hparams):
        return wanting * loss(params, hparams)

    assert not any(t.requires_grad for t in GradientDescent(loss, 0.05)(start(), plain))
    for make, params, hparams in (
        (GradientDescent(loss, wanting), start(), plain),
        (GradientDescent(loss, 0.05), start(), [wanting, *plain[1:]]),
        (GradientDescent(loss, 0.05), [normal(1, 2, 3), start()[1]], plain),
    ):
        assert all(t.requires_grad for t in make(params, hparams))
    moved = GradientDescent(closed, 0.05)(start(), plain)
    assert torch.autograd.grad(moved[0].sum(), wanting)[0] != 0


def test_wrong_use_gets_one_line():
    h = hyperparameters()
    with pytest.raises(HypergradientError, match="'tape' is unknown; choose from graph, func"):
        GradientDescent(loss, 0.1, gradient="tape")
    for optimizer, params in ((Momentum(loss, 0.1, 0.9), [torch.zeros(2)]), (Adam(loss, 0.1), [])):
        with pytest.raises(HypergradientError, match=r"start with get_opt_params\(params\)"):
            optimizer(params, h)
    with pytest.raises(HypergradientError, match="has not the shapes"):
        Momentum(loss, 0.1, 0.9)([torch.zeros(2), torch.zeros(3)], h)
    with pytest.raises(HypergradientError, match="the inner loss must be a scalar"):
        GradientDescent(lambda p, h: p[0], 0.1)([torch.zeros(2)], h)
    with pytest.raises(HypergradientError, match="detached"):
        GradientDescent(lambda p, h: p[0].sum().detach(), 0.1)([torch.zeros(2)], h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_refuses_parameters_that_hold_no_beta2(dtype):
    with pytest.raises(HypergradientError, match="take float32, or Momentum"):
        Adam(loss, 0.1).get_opt_params([torch.zeros(2, dtype=dtype)])
