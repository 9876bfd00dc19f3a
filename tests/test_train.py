"""Unrolled training: its meta-gradient by finite differences, and every memory policy."""

import gc
import itertools

import oracles
import pytest
import torch
from oracles import DOUBLE, assert_near, normal
from torch import nn

from initializers import TRAINABLE, GaussianInitializer
from learning_rules import LearningRule, PerLayerRule, PolynomialPairRule, PolynomialRule
from models_fully_local import Activation, lateral_mlp
from rules import preset
from train import MEMORY, AdjointLimit, TrainingError, graph_bytes, train, train_on_the_way

STEPS, BATCH, INPUTS, SIZES = 7, 6, 4, (3, 2)


class Problem:
    """N updates of a two-layer network from a drawn start, and a smooth loss of where they end."""

    def __init__(self, kind=PolynomialRule, degree=2, **options):
        self.model = lateral_mlp(
            INPUTS, SIZES, Activation("sigmoid", 2.0), inh_steps=3, inh_factor=0.2, **options
        )
        settings = {"bound": "tanh", "l2": 0.01, "forward_weight_bound": 0.7}
        self.rule = PerLayerRule([kind.of_degree(degree, **settings) for _ in SIZES]).double()
        self.initializer = GaussianInitializer(
            {"b": TRAINABLE, "m": TRAINABLE}, {"w": TRAINABLE, "m": TRAINABLE}
        ).double()
        with torch.no_grad():
            for k, p in enumerate(self.rule.parameters()):
                p.copy_(normal(k, *p.shape, scale=0.05))
            self.initializer.mean_b.fill_(0.002)
            self.initializer.mean_m.fill_(-0.003)
        self.views, self.inputs = kind.views, normal(77, 5, INPUTS).detach()

    def batches(self):
        for step in itertools.count():
            views = [normal(200 + 2 * step + v, BATCH, INPUTS).detach() for v in range(self.views)]
            yield views[0] if self.views == 1 else tuple(views)

    def start(self):
        return self.initializer(self.model, torch.Generator().manual_seed(3))

    def loss(self, params):
        return self.model(self.inputs, params).square().sum() + 0.1 * sum(
            t.square().sum() for layer in params for t in layer.values()
        )

    def named_hyperparameters(self):
        yield from self.rule.named_parameters(prefix="rule")
        yield from self.initializer.named_parameters(prefix="initializer")

    def trained(self, **options):
        return train(self.model, self.start(), self.batches(), self.rule, STEPS, **options)

    def loss_and_gradient(self, **options):
        loss = self.loss(self.trained(**options))
        names, hyperparameters = zip(*self.named_hyperparameters(), strict=True)
        grads = torch.autograd.grad(loss, hyperparameters)
        return loss.detach(), dict(zip(names, grads, strict=True))


def finite_differences(problem) -> dict[str, torch.Tensor]:
    """Central differences of the loss by every single hyperparameter, of fourth order."""
    found = {}
    for name, p in problem.named_hyperparameters():
        found[name] = torch.zeros_like(p)
        step = 2e-4 * (0.001 if name.startswith("initializer") else 1.0)
        for entry, grad in zip(p.detach().view(-1), found[name].view(-1), strict=True):
            value, losses = entry.item(), []
            for multiple in (-2, -1, 1, 2):
                entry.fill_(value + multiple * step)
                losses.append(problem.loss(problem.trained(grad=False)).item())
            entry.fill_(value)
            grad.fill_((8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / (12 * step))
    return found


@pytest.fixture(scope="module", params=[PolynomialRule, PolynomialPairRule], ids=["single", "pair"])
def problem_and_differences(request):
    problem = Problem(request.param, 2 if request.param is PolynomialRule else 1)
    with torch.no_grad():
        return problem, finite_differences(problem)


# ---- the meta-gradient ----


@pytest.mark.parametrize("memory", MEMORY)
def test_the_meta_gradient_agrees_with_finite_differences(problem_and_differences, memory):
    problem, differences = problem_and_differences
    _, gradient = problem.loss_and_gradient(memory=memory)
    for name, grad in gradient.items():
        assert_near(grad, differences[name], 1e-6)
        assert grad.abs().max() > 1e-4, f"{name} has no influence: the test would be empty"


def test_the_finite_differences_are_of_a_clamped_weight_too(problem_and_differences):
    problem, _ = problem_and_differences
    weights = torch.cat([layer["w"].flatten() for layer in problem.trained()[1:]])
    assert (weights.abs() == 0.7).any() and (weights.abs() < 0.7).any()


@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
def test_the_meta_gradient_equals_that_of_the_plain_formulas(kind):
    problem = Problem(kind, forbid_self_inhibition=True, forbid_excitation=True)
    loss, gradient = problem.loss_and_gradient()
    params, batches = problem.start(), problem.batches()
    for _ in range(STEPS):
        params = oracles.update(problem.rule.rules, problem.model, params, next(batches))
    expected = problem.loss(params)
    assert_near(loss, expected.detach())
    names, hyperparameters = zip(*problem.named_hyperparameters(), strict=True)
    for name, grad in zip(names, torch.autograd.grad(expected, hyperparameters), strict=True):
        assert_near(gradient[name], grad)


# ---- memory policies ----


def test_all_memory_policies_give_equal_values_and_gradients():
    problem = Problem(degree=3)
    expected_loss, expected = problem.loss_and_gradient(memory="keep")
    size = one_step_bytes(problem)
    policies = [{"memory": memory} for memory in MEMORY]
    policies += [{"memory": "fit", "memory_limit": limit} for limit in (1, 2 * size, 3 * size)]
    for policy in policies:
        loss, gradient = problem.loss_and_gradient(**policy)
        assert torch.equal(loss, expected_loss)
        for name, grad in gradient.items():
            assert_near(grad, expected[name], 1e-12)


def one_step_bytes(problem) -> int:
    params, batch = problem.start(), next(problem.batches())
    first = problem.rule.update(problem.model, params, batch)
    return graph_bytes(lambda: problem.rule.update(problem.model, first, batch))


class Counting(LearningRule):
    """w + rate w batch, with a known number of bytes kept; counts its updates."""

    def __init__(self):
        super().__init__()
        self.rate, self.updates = nn.Parameter(torch.tensor(0.1, dtype=DOUBLE)), 0

    def update(self, model, params, batch):
        self.updates += 1
        w = params[0]["w"]
        return [{"w": w + self.rate * torch.sin(w) * batch}]


def runs_again(steps: int, **policy) -> int:
    """How many updates the backward pass has to repeat."""
    rule, w = Counting(), normal(0, 1000)
    batches = (torch.tensor(0.1 * t, dtype=DOUBLE) for t in range(steps))
    params = train(nn.Identity(), [{"w": w}], batches, rule, steps, **policy)
    before = rule.updates
    grads = torch.autograd.grad(params[0]["w"].sum(), [w, rule.rate])
    assert all(torch.isfinite(g).all() for g in grads)
    return rule.updates - before


def test_each_policy_repeats_the_updates_that_it_did_not_keep():
    assert runs_again(9, memory="keep") == 0
    assert runs_again(9, memory="segments") == 6
    assert runs_again(10, memory="segments") == 6
    assert runs_again(9, memory="recompute") == 8
    assert runs_again(1, memory="recompute") == 0


def test_fit_keeps_as_many_updates_as_the_limit_allows():
    rule, w = Counting(), normal(0, 1000)
    size = graph_bytes(lambda: rule.update(None, [{"w": w}], torch.ones((), dtype=DOUBLE)))
    assert size > 1000 * 8
    again = [
        runs_again(9, memory="fit", memory_limit=limit)
        for limit in (1, size + 1, 4 * size + 1, 8 * size + 1, 9 * size + 1, 2**40)
    ]
    assert again == [8, 8, 5, 1, 0, 0]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_is_left_behind_by_a_training_and_its_backward_pass(memory):
    problem = Problem()
    problem.loss_and_gradient(memory=memory)  # lays out the sums
    before = live_tensors()
    for _ in range(3):
        problem.loss_and_gradient(memory=memory)
    assert live_tensors() == before


def test_the_default_keeps_everything_that_is_small():
    assert runs_again(9) == 0


def test_less_memory_keeps_a_smaller_graph():
    problem, size = Problem(), one_step_bytes(Problem())

    def kept(**policy) -> int:
        return graph_bytes(lambda: problem.trained(**policy))

    policies = [kept(memory=memory) for memory in ("recompute", "segments", "keep")]
    assert policies == sorted(policies) and len(set(policies)) == 3
    assert policies[0] <= 2 * size
    # To measure it, "fit" runs a step more, whose graph does not stay.
    assert policies[0] <= kept(memory="fit", memory_limit=1) <= policies[0] + 2 * size
    limited = kept(memory="fit", memory_limit=3 * size)
    assert policies[0] < limited < policies[2] and limited <= 5 * size


def test_graph_bytes_counts_each_storage_once():
    a, b = normal(0, 50), normal(1, 50)

    def function():
        return (a * b).sum() + (a[:10] * b[:10]).sum() + (a * b.view(50)).sum()

    assert graph_bytes(function) == 2 * 50 * 8
    assert graph_bytes(lambda: a + b) == 0
    with torch.no_grad():
        assert graph_bytes(function) == 0


@pytest.mark.parametrize("inh_steps", [0, 10])
def test_the_graph_of_a_step_is_little_more_than_its_tensors(inh_steps):
    batch, fan_in, fan_out = 200, 60, 20
    model = lateral_mlp(fan_in, [fan_out], Activation("sigmoid", 4.0), inh_steps=inh_steps)
    rule = PolynomialRule.of_degree(3, bound="tanh", forward_weight_bound=1.0).double()
    params = [{}, {"w": normal(0, fan_out, fan_in), "b": normal(1, fan_out)}]
    params[1]["m"] = normal(2, fan_out, fan_out)
    x = normal(3, batch, fan_in).detach()
    activations = (inh_steps + 1) * batch * fan_out  # sigma's outputs
    # Besides: x, s and y; for each parameter itself, three correlations, the step and the result.
    allowed = batch * fan_in + activations + 4 * batch * fan_out + 8 * fan_out * (fan_in + fan_out)
    assert graph_bytes(lambda: rule.update(model, params, x)) <= 1.1 * 8 * allowed


# ---- limited adjoints ----


class Expanding(LearningRule):
    """w' = gain sin(A w) + goal b, b' = 0.8 b + 0.3 w'^2: chaos, in which adjoints grow."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.5, dtype=DOUBLE))
        self.goal = nn.Parameter(normal(5, 4, scale=0.1).detach())

    def update(self, model, params, batch):
        w, b = params[1]["w"], params[1]["b"]
        w = self.gain * torch.sin(batch @ w) + self.goal * b
        return [{}, {"w": w, "b": 0.8 * b + 0.3 * w.square(), "count": params[1]["count"] + 1}]


def expanding(steps: int):
    """The rule, where it starts, its batches, and a loss of where it ends."""
    start = [{}, {"w": normal(6, 4, scale=0.02), "b": normal(7, 4, scale=0.02)}]
    start[1]["count"] = torch.zeros((), dtype=torch.int64)
    matrices = [normal(300 + t, 4, 4, scale=0.7).detach() for t in range(steps)]
    return Expanding(), start, matrices


def end_loss(params):
    return params[1]["w"].square().sum() + 0.5 * params[1]["b"].sin().sum()


def limited_by_vjps(steps: int, factor: float):
    """The hypergradient and dL/dtheta_0, one vector-Jacobian product after the other."""
    rule, start, matrices = expanding(steps)
    points = [start]
    for matrix in matrices:
        points.append(train(None, points[-1], iter([matrix]), rule, 1, grad=False))

    def leaves(params):
        return {name: params[1][name].detach().requires_grad_() for name in "wb"}

    end, names = leaves(points[-1]), ("w", "b")
    adjoint = torch.autograd.grad(end_loss([{}, end]), list(end.values()))
    norms = [a.norm() for a in adjoint]
    total, acted = [torch.zeros_like(p) for p in rule.parameters()], 0
    for point, matrix in zip(reversed(points[:-1]), reversed(matrices), strict=True):
        for a, norm in zip(adjoint, norms, strict=True):
            if a.norm() > factor * norm:
                a *= factor * norm / a.norm()
                acted += 1
        old = leaves(point)
        new = rule.update(None, [{}, old | {"count": point[1]["count"]}], matrix)[1]
        variables = [*old.values(), *rule.parameters()]
        parts = torch.autograd.grad([new[n] for n in names], variables, list(adjoint))
        adjoint = list(parts[:2])
        for sum_, part in zip(total, parts[2:], strict=True):
            sum_ += part
    return total, adjoint, acted


def limited(steps: int, limit: AdjointLimit | None, **policy):
    """The hypergradient and dL/dtheta_0 by `train`."""
    rule, start, matrices = expanding(steps)
    params = train(None, start, iter(matrices), rule, steps, adjoint_limit=limit, **policy)
    variables = [*rule.parameters(), start[1]["w"], start[1]["b"]]
    grads = torch.autograd.grad(end_loss(params), variables)
    return grads[:2], grads[2:]


POLICIES = [{"memory": memory} for memory in MEMORY] + [{"memory": "fit", "memory_limit": 1}]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_limited_adjoints_are_those_of_a_loop_of_vector_jacobian_products(policy):
    steps = 11
    for factor in (1.0, 2.0):
        total, adjoint, acted = limited_by_vjps(steps, factor)
        assert 3 < acted < 2 * steps, "the limit acts on some adjoints and not on others"
        hypergradient, at_start = limited(steps, AdjointLimit(factor), **policy)
        for g, e in zip((*hypergradient, *at_start), (*total, *adjoint), strict=True):
            assert_near(g, e, 1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_limit_that_never_acts_changes_no_bit(policy):
    for found, expected in zip(
        limited(11, AdjointLimit(1e12), **policy), limited(11, None, **policy), strict=True
    ):
        assert all(torch.equal(g, e) for g, e in zip(found, expected, strict=True))
    problem = Problem(degree=3)
    _, expected = problem.loss_and_gradient(**policy)
    _, gradient = problem.loss_and_gradient(adjoint_limit=AdjointLimit(1e12), **policy)
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)


def test_a_limit_keeps_the_gradient_small_where_the_training_expands():
    (gain, _), (w, _) = limited(60, None)
    assert gain.abs() > 1e4 and w.norm() > 1e4
    (gain, _), (w, _) = limited(60, AdjointLimit(1.0))
    assert gain.abs() < 1e3 and w.norm() < 1e2


def test_adjoints_are_held_alike_on_every_device():
    on_cpu, elsewhere = AdjointLimit(1.5), AdjointLimit(1.5)
    adjoints = [torch.zeros(4), *(scale * torch.randn(4) for scale in (0.1, 1.0, 0.12, 0.05))]
    adjoints += [torch.tensor([torch.inf, 0.0, 1.0, 1.0]), torch.full((4,), torch.nan)]
    for adjoint in adjoints:
        norm = torch.linalg.vector_norm(adjoint, dtype=torch.float64)
        expected = elsewhere._held_elsewhere(adjoint, (0, "w"), norm)
        torch.testing.assert_close(
            on_cpu.held(adjoint, (0, "w")), expected, rtol=0, atol=0, equal_nan=True
        )


def test_an_adjoint_of_zero_stays_zero():
    limit, zeros = AdjointLimit(2.0), torch.zeros(3)
    assert torch.equal(limit.held(zeros, (0, "b")), zeros)
    first = torch.tensor([3.0, 0.0, 4.0])  # what is not 0 sets the norm
    assert torch.equal(limit.held(first, (0, "b")), first)
    assert torch.equal(limit.held(zeros, (0, "b")), zeros)
    assert_near(limit.held(10 * first, (0, "b")), 2 * first, 1e-7)
    assert limit.held(first / 0.0, (0, "b")).isnan().any()  # and is noticed later


# ---- several times of one training ----


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_training_seen_on_the_way_is_that_of_each_number_of_steps(policy):
    problem, times = Problem(), [2, 3, STEPS]
    start, batches = problem.start(), problem.batches()
    passed = train_on_the_way(problem.model, start, batches, problem.rule, times, **policy)
    loss, expected = sum(map(problem.loss, passed)), 0
    for steps, params in zip(times, passed, strict=True):
        alone = train(problem.model, problem.start(), problem.batches(), problem.rule, steps)
        expected = expected + problem.loss(alone)
        for layer, other in zip(params, alone, strict=True):
            assert all(torch.equal(layer[name], other[name]) for name in other)
    _, hyperparameters = zip(*problem.named_hyperparameters(), strict=True)
    for g, e in zip(
        torch.autograd.grad(loss, hyperparameters),
        torch.autograd.grad(expected, hyperparameters),
        strict=True,
    ):
        assert_near(g, e, 1e-12)


def test_a_training_seen_on_the_way_runs_no_update_twice_and_keeps_what_one_graph_keeps():
    def again(steps, **policy):
        rule, w = Counting(), normal(0, 1000)
        batches = (torch.tensor(0.1 * t, dtype=DOUBLE) for t in range(steps[-1]))
        passed = train_on_the_way(None, [{"w": w}], batches, rule, steps, **policy)
        before = rule.updates
        torch.autograd.grad(sum(params[0]["w"].sum() for params in passed), rule.rate)
        return before, rule.updates - before

    assert again([3, 6, 9], memory="keep") == (9, 0)
    assert again([3, 6, 9], memory="segments") == (9, 6)
    assert again([4, 9], memory="recompute") == (9, 8)


# ---- what train does ----


def test_without_a_graph_the_result_is_the_same_and_detached():
    problem = Problem(degree=3)
    with_graph, without = problem.trained(memory="keep"), problem.trained(grad=False)
    for layer, other in zip(with_graph, without, strict=True):
        for name, tensor in layer.items():
            assert torch.equal(tensor, other[name])
            assert tensor.requires_grad and not other[name].requires_grad


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_one_batch_is_taken_for_each_step_and_no_more(grad, steps):
    problem = Problem()
    taken = []

    def batches():
        for batch in problem.batches():
            taken.append(batch)
            yield batch

    train(problem.model, problem.start(), batches(), problem.rule, steps, grad=grad)
    assert len(taken) == steps


def test_training_goes_on_where_it_stopped():
    problem, batches = Problem(), Problem().batches()
    params = train(problem.model, problem.start(), batches, problem.rule, 3)
    params = train(problem.model, params, batches, problem.rule, STEPS - 3)
    for layer, expected in zip(params, problem.trained(), strict=True):
        assert all(torch.equal(layer[name], expected[name]) for name in expected)


@pytest.mark.parametrize("memory", MEMORY)
def test_no_steps_return_the_parameters_still_attached(memory):
    problem = Problem()
    start = problem.start()
    params = train(problem.model, start, problem.batches(), problem.rule, 0, memory=memory)
    for layer, expected in zip(params, start, strict=True):
        assert all(layer[name] is expected[name] for name in expected)


def test_no_steps_without_a_graph_are_detached_too():
    problem = Problem()
    params = train(problem.model, problem.start(), problem.batches(), problem.rule, 0, grad=False)
    assert not any(t.requires_grad for layer in params for t in layer.values())


@pytest.mark.parametrize("grad", [True, False])
def test_training_changes_nothing_that_it_was_given(grad):
    problem = Problem()
    start = problem.start()
    tensors = [t for layer in start for t in layer.values()]
    before = [t.detach().clone() for t in tensors]
    train(problem.model, start, problem.batches(), problem.rule, STEPS, grad=grad)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))


def test_truncation_is_training_without_a_graph_and_then_with_one():
    problem, batches = Problem(), Problem().batches()
    params = train(problem.model, problem.start(), batches, problem.rule, 4, grad=False)
    detached = [{n: t.clone() for n, t in layer.items()} for layer in params]
    params = train(problem.model, params, batches, problem.rule, 3)
    loss = problem.loss(params)
    hyperparameters = list(problem.rule.parameters())
    grads = torch.autograd.grad(loss, hyperparameters)
    later = itertools.islice(problem.batches(), 4, None)
    expected = problem.loss(train(problem.model, detached, later, problem.rule, 3))
    assert torch.equal(loss, expected)
    for grad, other in zip(grads, torch.autograd.grad(expected, hyperparameters), strict=True):
        assert torch.equal(grad, other)
    assert not any(p.grad is not None for p in problem.initializer.parameters())


def test_an_unknown_memory_policy_is_refused_with_those_that_exist():
    problem = Problem()
    for grad in (True, False):
        with pytest.raises(ValueError, match="'all' is unknown; choose from fit, keep, segments"):
            problem.trained(memory="all", grad=grad)


def test_float32_training_is_close_to_float64():
    problem = Problem()
    expected = problem.trained(grad=False)
    problem.rule.float()
    problem.initializer.float()
    batches = (batch.float() for batch in problem.batches())
    params = train(problem.model, problem.start(), batches, problem.rule, STEPS)
    for layer, other in zip(params, expected, strict=True):
        for name in other:
            assert_near(layer[name], other[name].float(), 1e-5)


# ---- what runs again: random numbers, statistics; batches; autocast ----


class NoisyRule(LearningRule):
    """Decay by a learned rate of what dropout leaves, behind a norm with running statistics.

    generator: of noise of its own, else torch's.
    """

    def __init__(self, generator=None):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=DOUBLE))
        self.norm = nn.BatchNorm1d(INPUTS, affine=False).double()
        self.generator = generator

    def update(self, model, params, batch):
        w = params[0]["w"]
        noise = torch.randn(w.shape, generator=self.generator, dtype=w.dtype)
        change = nn.functional.dropout(w.sin(), 0.5) + noise + self.norm(batch).square().mean(0)
        return [{"w": w - self.rate * change}]


def trained_with_noise(rule, batches=None, **options):
    """What torch draws after the training, its result and its gradient by the rate."""
    torch.manual_seed(5)
    start = [{"w": normal(1, 3, INPUTS).detach()}]
    batches = (normal(k, 6, INPUTS).detach() for k in range(5)) if batches is None else batches
    params = train(None, start, batches, rule, 5, **options)
    (gradient,) = torch.autograd.grad(params[0]["w"].square().sum(), rule.rate)
    return torch.rand(()), params[0]["w"].detach(), gradient


@pytest.mark.parametrize("memory", [m for m in MEMORY if m != "keep"])
def test_no_policy_changes_what_is_drawn_nor_moves_statistics_more_often(memory):
    rules = NoisyRule(), NoisyRule()
    expected = trained_with_noise(rules[0], memory="keep")
    limit = {"memory_limit": 1} if memory == "fit" else {}
    for ours, theirs in zip(
        trained_with_noise(rules[1], memory=memory, **limit), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    for rule in rules:
        assert int(rule.norm.num_batches_tracked) == 5
    assert torch.equal(rules[0].norm.running_var, rules[1].norm.running_var)


def test_random_numbers_of_a_rule_itself_are_refused_where_it_runs_again():
    for memory in ("fit", "segments", "recompute"):
        rule = NoisyRule(torch.Generator().manual_seed(0))
        with pytest.raises(TrainingError, match="gives another result"):
            trained_with_noise(rule, memory=memory)
    trained_with_noise(NoisyRule(torch.Generator().manual_seed(0)), memory="keep")


@pytest.mark.parametrize("grad", [True, False])
def test_batches_that_end_or_are_empty_are_refused(grad):
    for sizes, message in (
        ((6, 6, 6), "end after 3 updates"),
        ((6, 0, 6, 6, 6), "batch 1 is empty"),
    ):
        batches = (normal(k, size, INPUTS).detach() for k, size in enumerate(sizes))
        with pytest.raises(TrainingError, match=message):
            train(None, [{"w": normal(1, 3, INPUTS)}], batches, NoisyRule(), 5, grad=grad)


@pytest.mark.parametrize("inhibition", ["lateral", "equilibrium", "none"])
@pytest.mark.parametrize("kind", ["polynomial", "latent-predictive", "running"])
def test_a_graph_is_gone_through_under_autocast(kind, inhibition):
    model = lateral_mlp(INPUTS, [3], Activation("sigmoid", 2.0), inhibition=inhibition)
    rule = PolynomialRule.of_degree(2, bound="tanh", lateral=inhibition != "none")
    if kind != "polynomial":
        running = {"rho": {"cov": 0.5}} if kind == "running" else {}
        rule = preset("latent-predictive", **running)
    with torch.no_grad():
        for k, p in enumerate(rule.parameters()):
            p.add_(normal(k, *p.shape, scale=0.01))
    shapes = {"w": (3, INPUTS), "b": (3,)} | ({} if inhibition == "none" else {"m": (3, 3)})
    start = [{}, {n: normal(k, *s).detach().float() for k, (n, s) in enumerate(shapes.items())}]
    xs = [normal(9 + k, 6, INPUTS).detach().float() for k in range(3)]
    batches = [x if rule.views == 1 else (x, x + 0.1) for x in xs]

    def gradient(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            params = start
            for batch in batches:
                params = rule.update(model, params, batch)
            assert params[1]["w"].dtype == torch.float32
            return torch.autograd.grad(params[1]["w"].square().sum(), next(rule.parameters()))[0]

    assert torch.allclose(gradient(True), gradient(False), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("memory", MEMORY)
def test_autocast_leaves_updates_in_the_type_of_the_parameters(memory):
    model = lateral_mlp(INPUTS, [3], Activation("sigmoid", 2.0), inh_steps=3)
    rule = PolynomialRule.of_degree(1, l2=0.01)
    with torch.no_grad():
        for k, p in enumerate(rule.parameters()):
            p.copy_(normal(k, *p.shape, scale=0.05))
    start = [{}, {"w": normal(1, 3, INPUTS), "b": normal(2, 3), "m": normal(3, 3, 3)}]
    start[1] = {name: t.detach().float() for name, t in start[1].items()}
    xs = [normal(9 + k, 6, INPUTS).detach().float() for k in range(5)]

    def gradient(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            params = train(model, start, iter(xs), rule, 5, memory=memory)
            plain = train(model, start, iter(xs), rule, 5, grad=False)
        assert all(map(torch.equal, params[1].values(), plain[1].values()))
        coefficients = next(iter(rule.parameters()))
        return torch.autograd.grad(params[1]["w"].square().sum(), coefficients)[0]

    assert torch.equal(gradient(True), gradient(False))
