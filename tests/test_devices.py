"""Inner loops keep to their device, and never wait for it.

Tensors on "meta" have shapes and no numbers: to ask one for a number, which on a GPU would make the
host wait, is an error. No operation may join one with a tensor that was left on the CPU. What tells
CPU code from device code (compiled loops, blocks for the cache) treats "meta" as a GPU.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from comparison.optimizer_comparison import (
    BASELINES,
    _Training,
    baseline,
    learned,
    sgd_and_lion,
)
from comparison.vicreg import vicreg_loss
from data_sets.image_data import ImageData
from data_sets.tabular_datasets import Table, split_table
from data_sets.views import Views
from experiment.seeds import log_uniform_integer
from experiment.view_strengths import ViewStrengths
from hypergradients import reverse
from initializers import TRAINABLE, GaussianInitializer
from kernels.recorded_training import AdamWState, Descent
from kernels.recorded_updates import CalledRecording
from learned_optimizer import LearnedOptimizer, image_optimizee, make_network, make_task
from learned_optimizer.recorded import RecordedCalls
from learned_optimizer.window_gradients import (
    Trainings,
    WindowLoss,
    autograd_gradient,
    roll_out,
    start,
    suffix_sum_gradient,
)
from learning_rules import PolynomialPairRule, PolynomialRule
from linear_probe import ProbeLoss, RidgeLoss, SampledProbeLoss
from mnist_datasets import batches, pair_batches
from models_fully_local import Activation, lateral_mlp, lateral_network
from one_pass import (
    NAMES,
    Batch,
    FullBatches,
    MLPObjective,
    ModuleObjective,
    ReplayedTuning,
    Settings,
    ShuffledBatches,
    Tuning,
    initial_hyperparameters,
    initial_state,
)
from rules import preset
from rules.competing_units import KrotovHopfieldRule
from sweeps.points import random_point
from sweeps.space import searched_flag
from train import train

META = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, unless they move one to the other."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = tree_leaves((arguments, options))
        devices = {t.device.type for t in found if isinstance(t, torch.Tensor) and t.dim()}
        assert len(devices) < 2 or function in MOVES, f"{function} of tensors on {devices}"
        return function(*arguments, **(options or {}))


@pytest.fixture(autouse=True)
def on_one_device():
    with OneDevice():
        yield


def images(count=64):
    pixels = torch.empty(count, 1, 12, 12, dtype=torch.uint8, device=META)
    return ImageData(pixels, torch.empty(count, dtype=torch.long, device=META), "no numbers")


def parameters(model):
    return [
        {n: torch.empty(s, device=META, requires_grad=True) for n, s in part.items()}
        for part in (layer.parameter_shapes() for layer in model.layers)
    ]


@pytest.mark.parametrize("memory", ["fit", "segments"])
@pytest.mark.parametrize("convolutions", [(), [(4, 3)]])
@pytest.mark.parametrize("inhibition", ["lateral", "l2"])
def test_updates_and_their_gradients(memory, convolutions, inhibition):
    model = lateral_network(
        (1, 12, 12), [8, 6], Activation(), convolutions=convolutions, inhibition=inhibition
    )
    generator, steps = torch.Generator().manual_seed(0), 3 if memory == "segments" else 2
    for rule, source in (
        (PolynomialRule.of_degree(3, bound="tanh"), batches),
        (PolynomialPairRule.of_degree(2), pair_batches),
        (KrotovHopfieldRule(0.1), batches),
    ):
        rule.to(META)
        params = train(
            model, parameters(model), source(images(), 16, generator), rule, steps, memory=memory
        )
        loss = sum(tensor.square().sum() for layer in params for tensor in layer.values())
        trained = [p for p in rule.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, trained, materialize_grads=True)
        assert all(gradient.device == META for gradient in found)


class Samples:
    """The same batch again and again, each run its own."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def next(self):
        return Batch(self.inputs, self.targets, shared=True)


@pytest.mark.parametrize("per_weight", [(), ("lr",)])
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize(
    "method", ["fixed", "stepped_lr", "look_back", "successive_gradients", "unrolled", "population"]
)
def test_weight_steps_and_hyperparameter_steps(method, recover, per_weight):
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    generators = [torch.Generator().manual_seed(k) for k in range(5)]
    samples = Samples(torch.empty(20, 6, device=META), torch.empty(20, dtype=int, device=META))
    for objective in (
        MLPObjective((6, 5, 3), "cross_entropy"),
        ModuleObjective(module, "cross_entropy"),
    ):
        weights, buffers = objective.initial(generators)
        settings = Settings(
            method, ("lr",) if method == "successive_gradients" else NAMES, per_weight,
            every=2, recover=recover, clip_norm=1.0, look_back=2,
        )  # fmt: skip
        state = initial_state(
            weights.float().to(META),
            {name: buffer.to(META) for name, buffer in buffers.items()},
            {n: v.to(META) for n, v in initial_hyperparameters(generators).items()},
            settings,
        )
        tuning = Tuning(objective, samples, samples, settings, state)
        tuning.advance(4)
        assert tuning.state.weights.device == META and tuning.state.step == 4


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
@pytest.mark.parametrize("name", ["relu20", "relu8bn", "conv4-4"])
@pytest.mark.parametrize("together", [1, 2])
def test_steps_of_a_learned_optimiser(kind, name, together):
    network = make_network(kind, 0).to(META)
    optimizee = image_optimizee(name, (1, 12, 12), 10)
    theta = torch.empty(together, sum(optimizee.sizes()), device=META)
    batch = torch.empty(8, 1, 12, 12, device=META), torch.empty(8, dtype=int, device=META)
    trainings = Trainings(
        theta, network.memory(theta.numel(), theta), torch.empty_like(theta),
        [itertools.repeat(batch)] * together,
    )  # fmt: skip
    assert roll_out(network, optimizee, trainings, 3).losses.device == META


@pytest.mark.parametrize("estimate", [suffix_sum_gradient, autograd_gradient])
@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_recorded_windows_of_a_learned_optimiser(estimate, kind):
    network, optimizee = make_network(kind, 0).to(META), image_optimizee("relu3", (1, 4, 4), 10)
    theta = torch.empty(2, sum(optimizee.sizes()), device=META)
    batch = torch.empty(8, 1, 4, 4, device=META), torch.empty(8, dtype=int, device=META)
    batches = [itertools.repeat(batch)] * 2
    trainings, _ = start(network, optimizee, theta, batches)
    calls = RecordedCalls(CalledRecording)
    window = estimate(network, optimizee, trainings, 3, WindowLoss(), calls=calls)
    assert window.loss.device == window.gradient[0].device == META and calls.recordings


@pytest.mark.parametrize(
    "contender",
    [learned("lstm", make_network("lstm", 0)), *map(baseline, BASELINES), sgd_and_lion(0.1)],
    ids=lambda c: c.name,
)
def test_recorded_steps_of_optimisers(contender):
    images = torch.arange(320).remainder(7).view(20, 1, 4, 4).byte()
    task = make_task("relu3", images, torch.arange(20) % 10, 4)
    run = _Training(contender, task, (0,), torch.zeros(()), None)
    run._take(0, 1, None)
    tensors = run.leaves, run._state_of(run.optimizer, run.leaves), torch.tensor(True)
    here = tree_map(
        lambda t: t.detach().to(META) if t.dim() else t, (*tensors, [next(run.batches)])
    )
    if isinstance(run.optimizer, LearnedOptimizer):
        run.optimizer.network.to(META)
    leaves, _, _, losses, _ = run._steps(*here)
    assert leaves[0].device == losses[0].device == META


def test_recorded_steps_of_adamw():
    model, pairs = lateral_mlp(36, [4], Activation(), inhibition="none"), []
    theta = [t.detach() for layer in parameters(model) for t in layer.values()]
    for _ in range(3):
        pairs.append([torch.empty(8, 1, 6, 6, device=META) for _ in range(2)])

    def loss(theta, pair):
        params = [{}, dict(zip("wb", theta, strict=True))]
        value, terms = vicreg_loss(*(model(x, params) for x in pair))
        return value, [*terms.values()]

    count = torch.zeros((), dtype=torch.float64, device=META)
    begin = AdamWState(theta, theta, theta, count, count > 0)
    state, numbers = Descent(loss, 1e-3, 0.1, CalledRecording, 2)(begin, pairs)
    assert state.theta[0].device == META and numbers.shape == (3, 5)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("method", ["look_back", "unrolled", "population", "stepped_lr"])
def test_replayed_weight_steps(method, size):
    generators = [torch.Generator().manual_seed(k) for k in range(5)]
    data = torch.empty(20, 6, device=META), torch.empty(20, dtype=int, device=META)
    if size is None:
        samples = [FullBatches(*data) for _ in range(2)]
    else:
        samples = [ShuffledBatches(*data, size, generators) for _ in range(2)]
    objective, settings = MLPObjective((6, 5, 3), "cross_entropy"), Settings(method, NAMES, every=5)
    natural = {n: v.to(META) for n, v in initial_hyperparameters(generators).items()}
    weights, _ = objective.initial(generators)
    state = initial_state(weights.float().to(META), {}, natural, settings)
    tuning = ReplayedTuning(objective, *samples, settings, state)
    tuning.calls.record = CalledRecording
    tuning.advance(30)
    assert tuning.state.weights.device == META and tuning.calls.recordings


def test_the_loss_of_pairs():
    loss, terms = vicreg_loss(torch.empty(8, 4, device=META), torch.empty(8, 4, device=META))
    assert loss.device == META and all(term.device == META for term in terms.values())


def test_a_tensor_left_behind_is_noticed():
    with pytest.raises(AssertionError, match="mm"):
        torch.mm(torch.empty(2, 2, device=META), torch.ones(2, 2))


# ---- a default device: what comes from a CPU generator, or goes with given tensors, stays ----

DIGITS = ImageData(
    torch.arange(40 * 144).view(40, 1, 12, 12).remainder(251).byte(), torch.arange(40) % 10, "made"
)
TABLE = Table(torch.randn(20, 3, dtype=torch.float64), torch.ones(20, 1).double(), 5, "made")
UNITS = lateral_mlp(144, [4], Activation("sigmoid", 2.0))
EQUILIBRIUM = lateral_mlp(144, [4], Activation(), inhibition="equilibrium")
START = GaussianInitializer({"b": TRAINABLE, "m": TRAINABLE}, {"w": TRAINABLE})
RULE, STATISTICS = PolynomialRule.of_degree(2), preset("default")
SEARCHED = [searched_flag("lr=log:1e-3:1")]


def numbered() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def views(strengths: ViewStrengths):
    return next(Views(DIGITS, 8, strengths)(numbered()))


def meta_step(outer_loss):
    """A training and its gradient through the loss."""
    params = train(UNITS, START(UNITS, numbered()), batches(DIGITS, 8, numbered()), RULE, 2)
    loss, _ = outer_loss(UNITS, params, numbered())
    return torch.autograd.grad(loss, [*START.parameters(), *RULE.parameters()])


def through_a_map():
    w = [torch.full((3,), 0.5, dtype=torch.float64, device="cpu")]
    h = [torch.ones(3, dtype=torch.float64, device="cpu", requires_grad=True)]
    maps = [lambda p, h: [0.5 * p[0] + 0 * h[0] + 0.25]] * 3
    return reverse([w] * 4, h, maps, lambda p, h: (p[0] * h[0]).sum())


ON_THE_CPU = {
    "batches": lambda: next(batches(DIGITS, 8, numbered())),
    "pairs": lambda: next(pair_batches(DIGITS, 8, numbered())),
    "geometric views": lambda: views(ViewStrengths(noise=0.1)),
    "masked views": lambda: views(ViewStrengths(kind="masks", center=True)),
    "mixed views": lambda: views(ViewStrengths(kind="mixed")),
    "views in float64": lambda: next(pair_batches(DIGITS, 8, numbered(), dtype=torch.float64)),
    "a table's rows": lambda: vars(split_table(TABLE, 0.2)),
    "a sweep's values": lambda: random_point(SEARCHED, 0, 3),
    "a horizon": lambda: log_uniform_integer(3, 9, numbered()),
    "equilibria": lambda: EQUILIBRIUM(DIGITS.floats(), START(EQUILIBRIUM, numbered())),
    "a probe": lambda: meta_step(ProbeLoss(DIGITS, DIGITS, 1.0, outer_images=9)),
    "a drawn probe": lambda: meta_step(SampledProbeLoss(DIGITS, 1.0, images=30)),
    "ridge regression": lambda: meta_step(RidgeLoss(DIGITS, fit_images=20, outer_images=10)),
    "updates of unit statistics": lambda: train(
        lateral_mlp(144, [4], Activation(), inhibition="none"),
        [{}, {"w": DIGITS.images[:4].flatten(1) / 255, "b": DIGITS.images[0, 0, 0, :4] / 255}],
        pair_batches(DIGITS, 8, numbered()), copy.deepcopy(STATISTICS), 2,
    ),
    "a trajectory": through_a_map,
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_a_default_device_changes_nothing(name):
    with torch.device("meta"):
        under = tree_leaves(ON_THE_CPU[name]())
    for one, other in zip(under, tree_leaves(ON_THE_CPU[name]()), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.device.type == "cpu" and torch.equal(one, other)
        else:
            assert one == other
