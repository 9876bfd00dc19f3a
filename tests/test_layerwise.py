"""Layers one after the other: as trained by hand, and the hypergradient of the last one's rule."""

import itertools
import json

import pytest
import torch
from oracles import DOUBLE, assert_near, normal
from torch import nn

import evaluate
import main
from experiment.errors import NonFiniteError
from initializers import TRAINABLE, GaussianInitializer, PerLayerInitializer, SpreadInitializer
from learning_rules import LearningRule, PerLayerRule, RuleError, SangerRule, classical_rule
from meta_gradients import Forward, Reverse
from models_fully_local import Activation, lateral_mlp, lateral_network
from rules.layerwise import LayerwiseRule, LayerwiseTraining, mean_output, train_layerwise
from rules.unit_statistics import preset
from train import START, Draw, TrainingError, train

SIGMOID = Activation("sigmoid", 4.0)
SIZES = (5, 4, 3)


def network(*layers: int, inputs: int = 6, **options):
    options = {"inhibition": "none", "centred_layers": True, **options}
    return lateral_network((1, 1, inputs), layers, SIGMOID, **options)


def rules(count: int) -> list[LearningRule]:
    """Each of other strengths."""
    return [preset("latent-predictive", a=10.0 + k, eta=0.05 + 0.01 * k).double()
            for k in range(count)]  # fmt: skip


def pairs(*shape: int, count: int = 60):
    """Endless, the same at each call."""
    drawn = [(normal(2 * k, *shape).detach(), normal(2 * k + 1, *shape).detach())
             for k in range(count)]  # fmt: skip
    return itertools.cycle(drawn)


def inputs():
    """Training images in two parts of unequal size."""
    return [normal(900, 7, 1, 1, 6).detach() + 0.3, normal(901, 4, 1, 1, 6).detach() + 0.3]


def start(model):
    generator = torch.Generator().manual_seed(3)
    return SpreadInitializer(0.5).double()(model, generator)


def detached(params):
    return [{n: t.detach() for n, t in layer.items()} for layer in params]


def same(first, second) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        for a, b in zip(first, second, strict=True)
    )


def test_layers_are_trained_as_one_does_it_by_hand():
    model, of_layer, steps = network(*SIZES), rules(3), [3, 5, 2]
    params = train_layerwise(model, start(model), pairs(8, 1, 1, 6), of_layer, steps, inputs)

    drawn = [layer for layer in start(model) if layer]
    batches = ((a.flatten(1), b.flatten(1)) for a, b in pairs(8, 1, 1, 6))
    images, done = torch.cat(inputs()).flatten(1), []
    for k, (units, fan_in) in enumerate(zip(SIZES, (6, 5, 4), strict=True)):
        alone = lateral_mlp(fan_in, [units], SIGMOID, inhibition="none")
        views = _through(done, itertools.islice(batches, steps[k]))
        layer = train(alone, [{}, drawn[k]], views, of_layer[k], steps[k], grad=False)[1]
        images = _response(images, layer)
        mean = images.mean(0)
        images, done = images - mean, [*done, (layer, mean)]
    trained = [layer for layer in params if "w" in layer]
    means = [layer["input_mean"] for layer in params if "input_mean" in layer]
    assert len(means) == 2
    for (layer, mean), new, k in zip(done, trained, range(3), strict=True):
        for name in ("w", "b"):
            assert_near(new[name], layer[name], 1e-12)
        if k < 2:
            assert_near(means[k], mean, 1e-12)


def _response(x, layer):
    return torch.sigmoid(4 * (x @ layer["w"].t() + layer["b"])).detach()


def _through(done, batches):
    for views in batches:
        for layer, mean in done:
            views = tuple(_response(x, layer) - mean for x in views)
        yield views


def test_the_same_draw_gives_the_same_parameters_to_the_last_bit():
    model = network(*SIZES)
    first, second = (
        train_layerwise(model, start(model), pairs(8, 1, 1, 6), rules(3), [3, 5, 2], inputs)
        for _ in range(2)
    )
    assert same(first, second)


def test_convolutions_and_pools_are_trained_and_centred_too():
    options = {"convolutions": [(3, 3), (4, 2)], "pool": 2, "centred_layers": True}
    model = lateral_network((1, 10, 10), [5], SIGMOID, inhibition="none", **options)
    images = [normal(5, 6, 1, 10, 10).detach(), normal(6, 3, 1, 10, 10).detach()]
    drawn = detached(start(model))
    params = train_layerwise(model, drawn, pairs(4, 1, 10, 10), rules(3), [2, 3, 2], lambda: images)
    kinds = [type(getattr(layer, "module", layer)).__name__ for layer in model.layers]
    assert kinds == ["LateralConv2d", "AvgPool2d", "Centre", "LateralConv2d", "AvgPool2d",
                     "Flatten", "Centre", "LateralLinear"]  # fmt: skip
    assert params[2]["input_mean"].shape == (3, 4, 4)
    for k in (3, 7):
        assert mean_output(model, params[:k], images).abs().max() < 1e-12
        assert not torch.equal(params[k]["w"], drawn[k]["w"])
    # the first layer does not know of the others
    alone = lateral_network((1, 10, 10), [], SIGMOID, convolutions=[(3, 3)], inhibition="none")
    expected = train(alone, [drawn[0], {}, {}], pairs(4, 1, 10, 10), rules(1)[0], 2, grad=False)
    assert_near(params[0]["w"], expected[0]["w"], 1e-12)


def test_a_network_that_centres_its_inputs_takes_raw_images():
    raw, centred = network(4, centred_inputs=True), network(4)
    mean = torch.cat(inputs()).mean(0)
    views = ((a + mean, b + mean) for a, b in pairs(8, 1, 1, 6))
    first = train_layerwise(raw, start(raw), views, rules(1), [3], inputs)
    second = train_layerwise(centred, start(centred), pairs(8, 1, 1, 6), rules(1), [3], inputs)
    assert_near(first[2]["w"], second[1]["w"], 1e-10)
    x = normal(7, 3, 1, 1, 6)
    assert_near(raw(x + mean, first), centred(x, second), 1e-10)


def test_a_rule_that_knows_whole_networks_only_trains_layer_by_layer():
    model = lateral_mlp(6, [5, 2], Activation("identity"), inhibition="none")
    batches = lambda: itertools.repeat(normal(1, 9, 6).detach())  # noqa: E731
    params = train_layerwise(
        model, start(model), batches(), [SangerRule(0.1).double()] * 2, [2, 2], inputs
    )
    first = train(lateral_mlp(6, [5], Activation("identity"), inhibition="none"),
                  start(model)[:2], batches(), SangerRule(0.1).double(), 2, grad=False)  # fmt: skip
    assert_near(params[1]["w"], first[1]["w"], 1e-12)


# ---- the last layer's rule, meta-learned ----


def squares(model, params, generator):
    """A loss of what the network makes of some inputs."""
    features = model(torch.cat(inputs()), params)
    weights = normal(11, *features.shape).detach()
    return (features * weights).sum().square(), {}


squares.metrics = ()


class Hebb(LearningRule):
    """A rule of torch's own functions, of which there are derivatives in forward mode."""

    views = 2

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=DOUBLE))

    def update(self, model, params, batch):
        ((first, second), (old,)) = batch, params
        change = model(first, params).t() @ second.flatten(1) - old["w"]
        return [old | {"w": old["w"] + self.rate * change}]


def training(of_layers, **options) -> LayerwiseTraining:
    sizes = SIZES[: len(of_layers)]
    initial = [GaussianInitializer({"b": TRAINABLE}, {"w": TRAINABLE}).double() for _ in sizes]
    for part in initial[:-1]:
        part.requires_grad_(False)
    for part in initial:
        part.set_values({"mean_b": 0.1, "spread_w": 0.5})
    return LayerwiseTraining(
        network(*sizes), LayerwiseRule(of_layers), PerLayerInitializer(initial),
        lambda generator: pairs(8, 1, 1, 6), squares, inputs=inputs, **options,
    )  # fmt: skip


def test_the_gradient_of_the_last_layers_rule_and_start_is_that_of_finite_differences():
    of_run, draw = training(rules(2), steps_below=[3]), Draw((1,), 4)
    gradient = Reverse("recompute")(of_run, draw).gradient
    assert [name.split(".")[2] for name in of_run.hyperparameters] == ["1"] * len(gradient)
    for value, g in zip(of_run.hyperparameters.values(), gradient, strict=True):
        for k, start_of_it in enumerate(value.detach().flatten().tolist()):
            step, losses = 1e-6 * abs(start_of_it or 1), []
            for moved in (start_of_it + step, start_of_it - step, start_of_it):
                value.data.view(-1)[k] = moved
                params, batches = of_run.begin(draw)
                params = train(of_run.model, params, batches, of_run.rule, 4, grad=False)
                losses.append(squares(of_run.model, params, None)[0].item())
            expected = (losses[0] - losses[1]) / (2 * step)
            assert g.flatten()[k].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_forward_mode_gives_the_same_hypergradient():
    of_run, draw = training([Hebb(0.2), Hebb(0.3)]), Draw((1,), 3)
    for g, e in zip(
        Forward()(of_run, draw).gradient, Reverse()(of_run, draw).gradient, strict=True
    ):
        assert_near(g, e, 1e-10)


def test_layers_below_are_those_of_the_draw_and_nothing_of_them_is_learned():
    rule = rules(1)[0]
    of_run = training([rule, rule])
    assert all(p.requires_grad for p in rule.w)  # copies are frozen
    params, batches = of_run.begin(Draw((1,), 5))
    drawn = of_run.initializer(of_run.model, Draw((1,), 5).generator(START))
    below = train_layerwise(of_run.model, drawn, pairs(8, 1, 1, 6), [rule], [5], inputs)
    assert same(detached(params), detached(below))
    assert params[3]["w"].requires_grad and not params[1]["w"].requires_grad
    after = of_run.rule.update(of_run.model, params, next(batches))
    assert same(after[:3], params[:3]) and not torch.equal(after[3]["w"], params[3]["w"])
    assert of_run.follows_the_draw and not training([rule, rule], steps_below=[2]).follows_the_draw
    assert of_run.rule.to_dict() == PerLayerRule([rule, rule]).to_dict()


def test_trainings_below_are_made_once_and_drawn_by_each_task():
    rule = rules(1)[0]
    pooled = training([rule, rule], steps_below=[3], trainings_below=2)
    begun = [pooled.begin(Draw((1, k), 5))[0] for k in range(6)]
    below = {params[1]["w"].sum().item() for params in begun}
    assert len(below) == 2 and len({params[3]["w"].sum().item() for params in begun}) == 6
    assert all(params[3]["w"].requires_grad for params in begun)
    # a later process, which begins with another task, makes the same ones
    again = training([rule, rule], steps_below=[3], trainings_below=2)
    assert same(detached(again.begin(Draw((1, 4), 5))[0]), detached(begun[4]))
    own = training([rule, rule], steps_below=[3])
    assert {own.begin(Draw((1, k), 5))[0][1]["w"].sum().item() for k in range(6)} - below
    with pytest.raises(TrainingError, match="needs steps_below"):
        training([rule, rule], trainings_below=2)


def test_what_does_not_fit_or_diverges_is_said():
    model = network(4)
    with pytest.raises(RuleError, match="at most a rule for each layer with weights, 1, got 2"):
        train_layerwise(model, start(model), pairs(8, 1, 1, 6), rules(2), [1, 1], inputs)
    with pytest.raises(RuleError, match="a rule for each layer with weights, 1, got 2"):
        LayerwiseRule(rules(2)).update(model, start(model), next(pairs(8, 1, 1, 6)))
    single = itertools.repeat(1e200 * torch.ones(2, 6, dtype=DOUBLE))
    explosive = classical_rule("oja", 1e300).double()
    with pytest.raises(NonFiniteError, match="layer 1 after 3 updates: not finite"):
        train_layerwise(model, start(model), single, [explosive], [3], inputs)


# ---- the commands ----


def test_main_learns_the_last_layers_rule_and_evaluate_judges_it_as_it_was_trained(tmp_path):
    common = ["--threads", "1", "--quiet", "--no_figures", "--dataset", "mnist5k", "--lr", "0.02",
              "--metasteps", "2", "--initial_inner_steps", "3", "--batch_size", "64",
              "--rule", "krotov_hopfield", "--beside"]  # fmt: skip
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    main.main(["6", *common, "--out", str(first), "--evaluations", "1"])
    flags = ["--layerwise", "--steps_below", "4", "--start_from", str(first), "--evaluations", "2"]
    main.main(["6", "5", *common, *flags, "--out", str(second)])
    learned = [json.loads((run / "rule.json").read_text())["rules"] for run in (first, second)]
    assert learned[1][0] == learned[0][0] != learned[1][1]
    evaluate.main([str(second), "--steps", "3", "--threads", "1", "--quiet", "--no_figures",
                   "--evaluations", "2", "--out", str(out)])  # fmt: skip
    results = [json.loads((run / "results.json").read_text()) for run in (second, out)]
    names = ("meta_loss", "test_accuracy")
    expected, judged = (
        [[row[name] for name in names] for row in rows]
        for rows in (results[0]["evaluations"], results[1]["trainings"])
    )
    assert judged == expected
