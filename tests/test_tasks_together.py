"""Several tasks in one update: the same as one after the other, values and gradients."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from no_copies import NoCopies
from oracles import normal
from torch.func import functional_call

from data_sets.views import Views
from experiment.errors import NonFiniteError
from experiment.meta_settings import MetaSettings
from experiment.view_strengths import ViewStrengths
from hypgraddesc import HypergradientDescent
from initializers import (
    TRAINABLE,
    GaussianInitializer,
    PerLayerInitializer,
    SpreadInitializer,
)
from kernels.recorded_updates import CalledRecording, RecordingError
from learning_rules import LearningRule, PerLayerRule, PolynomialPairRule, PolynomialRule
from linear_probe import RidgeLoss
from meta_gradients import Recorder, Reverse
from mnist_datasets import ImageData, batches, pair_batches
from models_fully_local import Activation, Sequential, TaskError, lateral_network, over_tasks
from rules.competing_units import KrotovHopfieldRule
from rules.layerwise import LayerwiseRule, LayerwiseTraining, image_inputs
from rules.unit_statistics import UnitStatisticsRule, bcm, default_rule, foldiak, preset
from train import OUTER, Draw, Training, train

TASKS, BATCH, SIDE = 3, 9, 6


def leaf(values):
    return values.detach().requires_grad_()


def rows(params, task):
    """The parameters of one task."""
    return [{name: tensor[task] for name, tensor in layer.items()} for layer in params]


def flat(params):
    return [tensor for layer in params for tensor in layer.values()]


def assert_equal(one, other):
    scale = torch.cat([other.detach().flatten().abs(), torch.ones(1)]).max()
    assert one.shape == other.shape and bool(((one - other).abs() <= 1e-12 * scale).all())


class Setup:
    """A rule, a network, and parameters, coefficients and batches of several tasks."""

    def __init__(self, rule, model):
        self.rule, self.model, self.many = rule.double(), model, over_tasks(model)
        count = itertools.count(100)
        self.psi = {
            name: leaf(p.detach() + 0.05 * normal(next(count), TASKS, *p.shape))
            for name, p in rule.named_parameters()
        }
        self.params = [
            {n: leaf(0.15 * normal(next(count), TASKS, *s))
             for n, s in layer.parameter_shapes().items()}
            for layer in model.layers
        ]  # fmt: skip
        self.views = [
            normal(next(count), TASKS, BATCH, 1, SIDE, SIDE)
            for _ in range(rule.views if not hasattr(rule, "rules") else rule.rules[0].views)
        ]

    def update(self, model, psi, params, views):
        batch = tuple(views) if len(views) == 2 else views[0]
        for _ in range(2):
            params = functional_call(self.rule, psi, (model, params, batch))
        return params

    def leaves(self):
        return [*self.psi.values(), *flat(self.params), *self.views]

    def check(self):
        together = flat(self.update(self.many, self.psi, self.params, self.views))
        alone = [
            flat(self.update(
                self.model, {n: p[k] for n, p in self.psi.items()}, rows(self.params, k),
                [v[k] for v in self.views],
            ))
            for k in range(TASKS)
        ]  # fmt: skip
        alone = [torch.stack(of_tasks) for of_tasks in zip(*alone, strict=True)]
        for one, other in zip(together, alone, strict=True):
            assert_equal(one, other)
        weights = [normal(k, *t.shape).detach() for k, t in enumerate(alone)]
        found, expected = (
            torch.autograd.grad(
                sum((w * t).sum() for w, t in zip(weights, tensors, strict=True)),
                self.leaves(), allow_unused=True, materialize_grads=True,
            )
            for tensors in (together, alone)
        )  # fmt: skip
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def network(layers=(5, 4), base="sigmoid", **options):
    return lateral_network(
        (1, SIDE, SIDE), layers, Activation(base, 1.5), inh_steps=3, inh_factor=0.3, **options
    )


@pytest.mark.parametrize("base", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("inhibition", ["lateral", "none", "l1", "l2"])
def test_polynomial_rules_of_every_activation_and_inhibition(base, inhibition):
    rules = [PolynomialRule.of_degree(3, bound="tanh", l2=0.01, forward_weight_bound=1.0)
             for _ in range(2)]  # fmt: skip
    Setup(PerLayerRule(rules), network(base=base, inhibition=inhibition)).check()


@pytest.mark.parametrize("bound", ["none", "tanh", "clamp"])
@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
def test_one_polynomial_rule_for_single_inputs_and_pairs(kind, bound):
    Setup(kind.of_degree(2, bound=bound), network()).check()


def test_layers_that_forbid_self_inhibition_and_excitation():
    Setup(
        PolynomialRule.of_degree(2),
        network((4,), forbid_self_inhibition=True, forbid_excitation=True),
    ).check()


@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
@pytest.mark.parametrize("inhibition", ["lateral", "l2", "l2_image"])
def test_convolutions(kind, inhibition):
    model = network((4,), convolutions=[(3, 3)], inhibition=inhibition)
    Setup(PerLayerRule([kind.of_degree(2) for _ in range(2)]), model).check()


@pytest.mark.parametrize("base", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("name", ["default", "latent-predictive", "cross-view", "bcm", "oja"])
def test_rules_of_unit_statistics(name, base):
    rules = [preset(name) for _ in range(2)]
    Setup(PerLayerRule(rules), network(base=base, inhibition="none")).check()


@pytest.mark.parametrize("inhibition", ["none", "lateral", "l2"])
@pytest.mark.parametrize("learn", [("eta",), ("eta", "eps"), ("eta", "eps", "tau", "exponents")])
def test_numbers_of_the_step_are_those_of_each_task(learn, inhibition):
    rule = default_rule(learn=learn, tau=20.0, decay=0.01)
    Setup(rule, network(inhibition=inhibition)).check()


GENERAL = {
    "w": {"x gain z'": 1.0, "x y": 0.2, "x gain r_exact": 0.1, "w": -0.1, "x s' y": 0.3,
          "y^2 var^-1 w": 0.1, "x gain r_cov' var^-1/2": 0.2, "x s": 0.1,
          "x won": 0.5, "share' s w": -0.2},
    "b": {"y": 0.3, "mean": -1.0},
    "m": {"y_j y_i": -0.1, "z_j c_i": 0.1, "m": -0.1},
}  # fmt: skip


@pytest.mark.parametrize("step", ["plain", "rms"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("inhibition", ["none", "lateral"])
def test_terms_of_every_kind(inhibition, views, step):
    terms = {
        group: {t: v for t, v in of_group.items() if views == 2 or "'" not in t}
        for group, of_group in GENERAL.items()
    }
    rule = UnitStatisticsRule(
        terms, views=views, step=step, decay=0.01, learn=("eta", "decay", "beta")
    )
    Setup(rule, network((4,), inhibition=inhibition)).check()


def test_foldiak():
    Setup(foldiak(), network((4,))).check()


@pytest.mark.parametrize("make", [default_rule, bcm])
def test_convolutions_with_unit_statistics(make):
    model = network((4,), convolutions=[(3, 3)], inhibition="none")
    Setup(PerLayerRule([make() for _ in range(2)]), model).check()


# ---- a meta-step ----

LABELS = torch.arange(60) % 3
IMAGES = ImageData(
    (torch.arange(60 * SIDE * SIDE).view(60, 1, SIDE, SIDE) * 37 % 251).byte(), LABELS, "made"
)


def training_of(rule, model, outer_loss=None, initializer=None, source=batches):
    return Training(
        model, copy.deepcopy(rule).double(),
        initializer or SpreadInitializer(0.4).double(),
        partial(source, IMAGES, 20, dtype=torch.float64),
        outer_loss or RidgeLoss(IMAGES, fit_images=30, outer_images=20),
    )  # fmt: skip


def meta_run(
    rule, model, settings, outer_loss=None, initializer=None, source=batches, recorder=None
):
    """Three meta-steps; their rows, the hyperparameters after them, and what was said."""
    training, said = training_of(rule, model, outer_loss, initializer, source), []
    descent = HypergradientDescent(training, settings, said.append)
    descent.recorder = recorder
    rows = [descent.step() for _ in range(3)]
    return rows, list(training.hyperparameters.values()), said


def assert_runs_agree(rule, model, outer_loss=None, initializer=None, source=batches, **options):
    options = {"lr": 0.01, "tasks": 3, "inner_steps": 4, "clip_norm": 1.0, **options}
    results = [
        meta_run(
            rule, model, MetaSettings(together=together, **options), outer_loss,
            copy.deepcopy(initializer), source, recorder,
        )
        for together, recorder in (
            ("never", None), ("always", None), ("always", Recorder(3, CalledRecording)),
        )
    ]  # fmt: skip
    others, expected, _ = results[0]
    for rows, trained, said in results[1:]:
        assert not said
        for row, other in zip(rows, others, strict=True):
            for name in set(row) - {"seconds"}:
                assert row[name] == pytest.approx(other[name], rel=1e-9), name
        for one, other in zip(trained, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def drawn_steps(metastep, generator):
    return int(torch.randint(2, 7, (), generator=generator))


def statistics_rule():
    return PerLayerRule([default_rule(learn=("eta", "eps")) for _ in range(2)])


@pytest.mark.parametrize("options", [
    {}, {"inner_steps": drawn_steps}, {"inner_steps": drawn_steps, "adjoint_limit": 0.5},
    {"inner_steps": drawn_steps, "loss_times": 2, "memory": "segments"}, {"memory": "recompute"},
    {"ungraded_steps": 2}, {"reinitialize_every": 2}, {"products": "bfloat16"},
], ids=lambda options: " ".join(options) or "defaults")  # fmt: skip
def test_a_meta_step_together_is_that_one_by_one(options):
    fixed = "ungraded_steps" in options or "reinitialize_every" in options
    initializer = SpreadInitializer(0.4, trainable=not fixed).double()
    model = network((4,), inhibition="none")
    assert_runs_agree(default_rule(), model, None, initializer, pair_batches, **options)


def test_one_task_is_replayed_too():
    assert_runs_agree(default_rule(), network((4,), inhibition="none"), tasks=1,
                      source=pair_batches)  # fmt: skip


def test_a_meta_step_of_polynomial_rules_and_a_start_that_is_learned():
    initializer = GaussianInitializer({"b": TRAINABLE, "m": TRAINABLE}, {"w": TRAINABLE}).double()
    rule = PerLayerRule([PolynomialRule.of_degree(2, bound="tanh") for _ in range(2)])
    assert_runs_agree(rule, network((4, 3)), None, initializer, inner_steps=drawn_steps)


def test_a_task_that_is_not_finite_is_left_out_alone():
    class Once:
        """Ridge regression that fails for the network with the smallest weight."""

        metrics = ("train_accuracy", "held_out_accuracy")

        def __call__(self, model, params, generator):
            if generator.initial_seed() == self.worst:
                raise NonFiniteError("made to fail")
            return RidgeLoss(IMAGES, fit_images=30, outer_images=20)(model, params, generator)

    loss = Once()
    loss.worst = Draw((0, 0, 1), 4).generator(OUTER).initial_seed()
    rows, _, said = meta_run(
        default_rule(), network((4,), inhibition="none"),
        MetaSettings(together="always", tasks=3, inner_steps=4), loss, source=pair_batches,
    )  # fmt: skip
    assert [row["skipped_tasks"] for row in rows] == [1, 0, 0]
    assert said == ["meta-step 1, task 1, made to fail; this task is left out"]


class Own(LearningRule):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.1))

    def update_layer(self, layer, old, x, s, y):
        return old | {"w": old["w"] + self.rate * y[0].T @ x[0] / len(y[0])}


@pytest.mark.parametrize("rule, options, why", [
    (Own(), {}, "Own updates one task at a time"),
    (preset("bcm", rho={"square": 0.5}), {}, "a rule of unit statistics has running statistics"),
    (KrotovHopfieldRule(0.1), {}, "KrotovHopfieldRule updates one task at a time"),
    (PolynomialRule.of_degree(1), {"method": "lookback"}, "method lookback takes one task"),
    (PolynomialRule.of_degree(1), {"method": "truncated"}, "method truncated takes one task"),
])  # fmt: skip
def test_what_cannot_be_together_is_done_one_by_one_and_said_once(rule, options, why):
    model = network((4,), inhibition="none")
    settings = MetaSettings(together="always", tasks=2, inner_steps=3, **options)
    fixed = SpreadInitializer(0.4, trainable=False).double()
    rows, _, said = meta_run(rule, model, settings, initializer=fixed)
    assert len(rows) == 3 and len(said) == 1
    assert said[0].startswith("tasks are done one by one: ") and why in said[0]


@pytest.mark.parametrize("model, why", [
    (network((4,), inhibition="equilibrium"), "equilibria are solved for one task at a time"),
    (Sequential([torch.nn.Flatten(), torch.nn.Dropout(0.1)]), "a layer Dropout takes one task"),
])  # fmt: skip
def test_layers_that_take_one_task_say_so(model, why):
    with pytest.raises(TaskError, match=why):
        over_tasks(model)


def test_by_default_nothing_is_together_on_the_cpu():
    results = [
        meta_run(default_rule(), network((4,), inhibition="none"),
                 MetaSettings(tasks=2, inner_steps=3, together=together), source=pair_batches)
        for together in ("auto", "never")
    ]  # fmt: skip
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)


def test_updates_that_cannot_be_recorded_are_done_without_and_said_once():
    class Refused:
        def __init__(self, function, examples):
            raise RecordingError("it waits for the host")

    settings = MetaSettings(together="always", tasks=2, inner_steps=3)
    model = network((4,), inhibition="none")
    recorded, plain = (
        meta_run(default_rule(), model, settings, source=pair_batches, recorder=recorder)
        for recorder in (Recorder(2, Refused), None)
    )
    assert recorded[2] == ["updates are not replayed as a recording: it waits for the host"]
    for one, other in zip(recorded[1], plain[1], strict=True):
        assert torch.equal(one, other)


def test_tasks_that_do_not_fit_into_memory_are_done_one_by_one():
    class Full:
        def train(self, *arguments):
            raise torch.OutOfMemoryError("too much")

    settings = MetaSettings(together="always", tasks=2, inner_steps=3)
    model = network((4,), inhibition="none")
    rows, trained, said = meta_run(
        default_rule(), model, settings, source=pair_batches, recorder=Full()
    )
    assert (
        said == ["tasks are done one by one: together they do not fit into the device's memory"]
        and len(rows) == 3
    )
    _, expected, _ = meta_run(
        default_rule(), model, replace(settings, together="never"), source=pair_batches
    )
    for one, other in zip(trained, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trainings_below", [None, 2])
def test_the_last_of_layers_that_are_trained_one_after_the_other(trainings_below):
    model = network((5, 4), inhibition="none", centred_layers=True)
    rule = LayerwiseRule([default_rule() for _ in range(2)]).double()
    spread = [SpreadInitializer(0.4, trainable=k == 1) for k in range(2)]
    training = LayerwiseTraining(
        model, rule, PerLayerInitializer(spread).double(),
        partial(pair_batches, IMAGES, 20, dtype=torch.float64),
        RidgeLoss(IMAGES, fit_images=30, outer_images=20),
        inputs=image_inputs(IMAGES, torch.float64), steps_below=[2],
        trainings_below=trainings_below,
    )  # fmt: skip
    method, draws = Reverse(), [Draw((0, 0, k), 3 + k) for k in range(TASKS)]
    assert method.one_by_one(training) == ""
    alone = [method(training, draw) for draw in draws]
    for recorder in (None, Recorder(2, CalledRecording)):
        for one, other in zip(method.together(training, draws, recorder), alone, strict=True):
            assert one.numbers == pytest.approx(other.numbers, rel=1e-10)
            for g, expected in zip(one.gradient, other.gradient, strict=True):
                assert torch.allclose(g, expected, rtol=1e-9, atol=1e-12)


def test_a_task_that_diverges_after_its_last_update_spoils_nothing():
    """All tasks are replayed to the end of the longest; what they do after their own is ignored."""
    model, rule = network((4,), base="identity", inhibition="none"), PolynomialRule.of_degree(4)
    rule = rule.double()
    with torch.no_grad():
        rule.w[rule.exponents["w"].index((1, 0, 3, 0))] = 1.0
    training = Training(
        model, rule, None, partial(batches, IMAGES, 20, dtype=torch.float64),
        RidgeLoss(IMAGES, fit_images=30, outer_images=20),
    )  # fmt: skip
    draws = [
        Draw((0, k), steps, start=[{}, {n: t.detach() for n, t in layer.items()}])
        for k, (steps, scale) in enumerate([(2, 0.3), (15, 1e-4)])
        for layer in SpreadInitializer(scale).double()(model, torch.Generator().manual_seed(k))[1:]
    ]
    later = train(model, draws[0].start, training.batches(draws[0].generator(1)), rule, 15)
    assert not torch.isfinite(later[1]["w"]).all()
    together = Reverse().together(training, draws, Recorder(3, CalledRecording))
    for one, draw in zip(together, draws, strict=True):
        for g, other in zip(one.gradient, Reverse()(training, draw).gradient, strict=True):
            assert torch.allclose(g, other, rtol=1e-8) and torch.isfinite(g).all()


# ---- what a CUDA graph cannot record ----


@pytest.mark.parametrize("rule, inhibition", [
    (PolynomialRule.of_degree(3, bound="tanh"), "lateral"),
    (PolynomialPairRule.of_degree(2), "l2"),
    (default_rule(learn=("eta", "eps", "tau", "exponents"), tau=20.0, decay=0.01), "none"),
    (default_rule(), "lateral"),
    (UnitStatisticsRule(GENERAL, step="plain"), "lateral"),
    (foldiak(), "lateral"),
], ids=["polynomial", "pairs", "gated", "laterals", "general", "foldiak"])  # fmt: skip
def test_updates_copy_nothing_from_the_host_and_wait_for_no_number(rule, inhibition):
    rule, model = copy.deepcopy(rule).to("meta"), over_tasks(network((4,), inhibition=inhibition))
    psi = {n: torch.empty(TASKS, *p.shape, device="meta", requires_grad=True)
           for n, p in rule.named_parameters()}  # fmt: skip
    params = [
        {n: torch.empty(TASKS, *s, device="meta", requires_grad=True)
         for n, s in layer.parameter_shapes().items()}
        for layer in network((4,), inhibition=inhibition).layers
    ]  # fmt: skip
    views = [torch.empty(TASKS, BATCH, 1, SIDE, SIDE, device="meta") for _ in range(rule.views)]

    def update_and_back():
        batch = tuple(views) if len(views) == 2 else views[0]
        new = flat(functional_call(rule, psi, (model, params, batch)))
        leaves = [*psi.values(), *flat(params)]
        torch.autograd.grad(sum(t.sum() for t in new), leaves, allow_unused=True)

    update_and_back()  # plans are made once
    with NoCopies():
        update_and_back()


# ---- batches ----


@pytest.mark.parametrize("strengths", [
    ViewStrengths(noise=0.1, crop=(0.5, 1.0)), ViewStrengths("masks", mask=(0.1, 0.5), center=True),
    ViewStrengths("masks", mask=(0.0, 0.5), noise=0.2),
], ids=str)  # fmt: skip
def test_pairs_of_several_tasks_are_those_of_each_to_the_last_bit(strengths):
    views = Views(IMAGES, 20, strengths)
    several, alone = ([views(torch.Generator().manual_seed(k)) for k in range(TASKS)]
                      for _ in range(2))  # fmt: skip
    next(several[1]), next(alone[1])  # one is ahead
    for pair, _ in zip(several[0].of_tasks(several), range(7), strict=False):
        for view, others in zip(pair, zip(*map(next, alone), strict=True), strict=True):
            assert torch.equal(view, torch.stack(others))


def test_batches_of_several_tasks_are_those_of_each_and_are_made_once():
    several, alone = ([batches(IMAGES, 20, torch.Generator().manual_seed(k)) for k in range(TASKS)]
                      for _ in range(2))  # fmt: skip
    found = [x for x, _ in zip(several[0].of_tasks(several), range(7), strict=False)]
    for x in found:
        assert torch.equal(x, torch.stack([next(stream) for stream in alone]))
    assert found[0] is found[3] is found[6] and found[0] is not found[1]


def test_counted_batches_of_several_tasks_are_those_of_each_and_are_made_once():
    counted = partial(batches, IMAGES, 20, random_numbers="device")
    several, alone = ([counted(torch.Generator().manual_seed(k)) for k in range(TASKS)]
                      for _ in range(2))  # fmt: skip
    next(several[1]), next(alone[1])  # one is ahead
    found = [x for x, _ in zip(several[0].of_tasks(several), range(7), strict=False)]
    for x in found:
        assert torch.equal(x, torch.stack([next(stream) for stream in alone]))
    assert found[0] is found[3] is found[6] and found[0] is not found[1]


@pytest.mark.parametrize("options", [{}, {"inner_steps": drawn_steps}, {"tasks": 1}],
    ids=lambda options: " ".join(options) or "defaults")  # fmt: skip
@pytest.mark.parametrize("source", [
    partial(batches, random_numbers="device"),
    *(lambda data, size, generator, dtype, kind=kind: Views(
        data, size, ViewStrengths(kind, mask=(0.1, 0.4), noise=0.1), dtype=dtype,
        random_numbers="device")(generator) for kind in ("geometric", "masks", "mixed")),
], ids=["images", "geometric", "masks", "mixed"])  # fmt: skip
def test_a_meta_step_with_counted_numbers_is_the_same_together(source, options):
    kind = PolynomialRule if isinstance(source, partial) else PolynomialPairRule
    assert_runs_agree(kind.of_degree(2, bound="tanh"), network((4,)), source=source,
                      initializer=SpreadInitializer(0.4).double(), **options)  # fmt: skip


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "images"])
def test_counted_batches_are_made_within_the_recordings_which_hold_no_images(pairs):
    sizes = []

    class Measured(CalledRecording):
        def __call__(self, *tensors):
            sizes.append(max(t.numel() for t in tensors))
            return super().__call__(*tensors)

    counted = {"dtype": torch.float64, "random_numbers": "device"}
    views = Views(IMAGES, 20, ViewStrengths(), **counted)
    recorder = Recorder(3, Measured)
    meta_run(
        default_rule() if pairs else bcm(), network((4,), inhibition="none"),
        MetaSettings(together="always", tasks=TASKS, inner_steps=4), recorder=recorder,
        source=lambda *arguments, **options: (
            views(arguments[2]) if pairs else batches(IMAGES, 20, arguments[2], **counted)
        ),
    )  # fmt: skip
    of_batch = TASKS * 2 * 20 * 6 if pairs else TASKS * 4 * SIDE**2  # affine maps, else weights
    assert sizes and {*sizes} == {of_batch} and len(recorder._recorded) == 1


@pytest.mark.parametrize("random_numbers", ["host", "device"])
@pytest.mark.parametrize("kind", [PolynomialRule, PolynomialPairRule])
def test_recordings_are_made_once_for_all_meta_steps(kind, random_numbers):
    made = []

    class Counted(CalledRecording):
        def __init__(self, function, examples):
            made.append([t.shape for t in examples])
            super().__init__(function, examples)

    views = Views(IMAGES, 20, dtype=torch.float64, random_numbers=random_numbers)
    source = partial(batches, random_numbers=random_numbers)
    if kind is PolynomialPairRule:
        source = lambda *arguments, **options: views(arguments[2])  # noqa: E731
    meta_run(
        kind.of_degree(2), network((4,)), MetaSettings(together="always", tasks=2, inner_steps=6),
        initializer=SpreadInitializer(0.4).double(), source=source, recorder=Recorder(3, Counted),
    )  # fmt: skip
    assert len(made) == 2  # forward, and forward and back


def test_each_of_mixed_views_chooses_its_own_kind():
    stream = Views(IMAGES, 20, ViewStrengths("mixed"))(torch.Generator())
    assert stream.of_tasks is None
    assert_runs_agree(
        default_rule(), network((4,), inhibition="none"),
        source=lambda data, size, generator, dtype: Views(
            data, size, ViewStrengths("mixed", mask=(0.1, 0.4)), dtype=dtype)(generator),
    )  # fmt: skip


def test_tasks_that_did_not_fit_together_stay_apart_in_a_resumed_run(monkeypatch):
    settings = MetaSettings(together="always", tasks=2, inner_steps=3)
    model, said = network((4,), inhibition="none"), []

    def descent():
        training = training_of(default_rule(), model, source=pair_batches)
        return HypergradientDescent(training, settings, said.append)

    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    first, resumed = descent(), descent()
    monkeypatch.setattr(type(first.method), "together", too_large)
    first.step()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert said == ["tasks are done one by one: together they do not fit into the device's memory"]
    assert first.step()["meta_loss"] == resumed.step()["meta_loss"]
    for one, other in zip(
        first.trainings[0].hyperparameters.values(),
        resumed.trainings[0].hyperparameters.values(),
        strict=True,
    ):
        assert torch.equal(one, other)
