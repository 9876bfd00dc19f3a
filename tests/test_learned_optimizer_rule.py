"""A learned optimiser as a learning rule of this program."""

import copy

import pytest
import torch
from test_learned_optimizer import batch, module, network

from comparison.vicreg import uniform_parameters
from experiment.errors import NonFiniteError
from experiment.seeds import seeded_generator
from learned_optimizer import LearnedOptimizer, Optimizee
from learned_optimizer.window_gradients import WindowLoss, autograd_gradient, start
from models_fully_local import Activation, lateral_mlp
from rules.learned_optimizer_rule import MEMORY, LearnedRule
from train import train


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_the_rule_the_optimizer_and_the_window_make_the_same_steps(kind):
    own, optimizee = network(kind), Optimizee(module)
    params = optimizee.initial(seeded_generator(1))
    leaves = [t.clone().requires_grad_() for layer in params for t in layer.values()]
    optimizer = LearnedOptimizer(leaves, own)
    for k in range(4):
        loss = optimizee.loss(optimizee.unflat(torch.cat([t.flatten() for t in leaves])), batch(k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = train(optimizee, params, map(batch, range(4)), LearnedRule(own), 4, grad=False)
    with_graph = train(optimizee, params, map(batch, range(4)), LearnedRule(own), 4)
    expected = torch.cat([t.detach().flatten() for t in leaves])
    for found in (trained, with_graph):
        torch.testing.assert_close(optimizee.flat(found), expected, rtol=1e-12, atol=1e-14)


def test_the_rules_hyperparameters_get_the_gradient_of_the_window_through_train():
    own, optimizee = network(), Optimizee(module)
    params = optimizee.initial(seeded_generator(1))
    data, total = [batch(k) for k in range(4)], 0
    for steps_done in (1, 2, 3):
        end = train(optimizee, params, iter(data), LearnedRule(own), steps_done, memory="recompute")
        total = total + optimizee.loss(end, data[steps_done])
    ours = torch.autograd.grad(total, list(own.parameters()))
    theta = optimizee.flat(params)[None]
    trainings, _ = start(own, optimizee, theta, [iter(data)])
    expected = autograd_gradient(own, optimizee, trainings, 3, WindowLoss()).gradient
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_an_update_of_the_rule_changes_nothing_in_place_and_remembers_in_params():
    own, optimizee = network(), Optimizee(module)
    rule, params = LearnedRule(own), optimizee.initial(seeded_generator(1))
    with torch.no_grad():
        once = rule.update(optimizee, params, batch(0))
        kept = copy.deepcopy(once)
        twice = rule.update(optimizee, once, batch(1))
        again = rule.update(optimizee, kept, batch(1))
    assert once[0][MEMORY].shape == (16, sum(optimizee.sizes()))
    for first, second in ((once, kept), (twice, again)):
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_rule_trains_any_model_of_this_program():
    model = lateral_mlp(5, [3], Activation("sigmoid"))
    params = uniform_parameters(model, seeded_generator(0))

    def loss(model, params, x):
        return model(x, params).square().mean()

    rule, x = LearnedRule(network(), loss), batch(0)[0]
    new = train(model, params, iter([x, x]), rule, 2, grad=False)
    assert {*new[1]} == {"w", "b", "m", MEMORY}
    assert not torch.equal(new[1]["w"], params[1]["w"]) and model(x, new).shape == (8, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    x, y = batch(0)
    params = Optimizee(module).initial(seeded_generator(0))
    with pytest.raises(NonFiniteError):
        LearnedRule(network()).update(Optimizee(module), params, (x * bad, y))
