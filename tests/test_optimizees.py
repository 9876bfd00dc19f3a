"""Optimizees: their networks, gradients, initial parameters and data."""

import itertools

import pytest
import torch
from torch import nn

from learned_optimizer import Optimizee, OptimizerError, image_optimizee, make_task, optimizees
from learned_optimizer.optimizees import LabelledBatches, activation_of, quadratic_batches
from learned_optimizer.seeds import seeded_generator


def labelled_images(count: int = 40, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sigmoid20", 784 * 20 + 20 + 210),
        ("relu128-128", 784 * 128 + 128 + 128 * 129 + 1290),
        ("leaky_relu20", 15910),
        ("softplus20", 15910),
        ("sigmoid20-20", 15910 + 420),
        ("relu20bn", 15910 + 40),
        ("conv16-32", 16 * 9 + 16 + 32 * 145 + 32 * 49 * 10 + 10),
        ("conv16k3-32k5", 18_122),
        ("gelu20", 15910),
        ("sigmoid+tanh+relu20", 15910),
    ],
)
def test_a_name_tells_the_layers(name, parameters):
    assert sum(image_optimizee(name).sizes()) == parameters


def test_lenet_has_its_published_size_on_images_of_its_size_alone():
    assert sum(image_optimizee("lenet", (1, 32, 32)).sizes()) == 61_706
    with pytest.raises(OptimizerError, match="32 x 32 pixels, not 28 x 28"):
        image_optimizee("lenet", (1, 28, 28))


@pytest.mark.parametrize("name", optimizees.ACTIVATIONS)
def test_any_activation_may_be_named(name):
    module = image_optimizee(f"{name}3", (1, 2, 2)).make_module()
    x = torch.rand(5, 1, 2, 2)
    hidden = module[2](module[1](x.flatten(1)))
    torch.testing.assert_close(module(x), module[3](hidden))
    by_functions = {"linear": lambda x: x, "hardtanh": lambda x: x.clamp(-1, 1),
                    "prelu": lambda x: torch.where(x > 0, x, 0.25 * x)}  # fmt: skip
    function = by_functions.get(name) or getattr(nn.functional, name.replace("log_", "log"))
    torch.testing.assert_close(hidden, function(module[1](x.flatten(1))))


def test_units_have_the_activations_of_a_mixture_in_turn():
    mixture, x = activation_of([nn.Sigmoid, nn.Tanh, nn.ReLU]), torch.randn(4, 7)
    y = mixture(x)
    for unit in range(7):
        function = (torch.sigmoid, torch.tanh, torch.relu)[unit % 3]
        assert torch.equal(y[:, unit], function(x[:, unit]))


def test_there_may_be_more_classes_than_the_images_show():
    images, labels = labelled_images(40)
    task = make_task("relu3", images, labels % 2, 8, classes=10)
    assert task.optimizee.layers[-1].out_features == 10


@pytest.mark.parametrize(
    "name", ["sigmoid6", "relu5-4", "softplus5", "relu6bn", "conv3-4", "conv2k3-3k2", "tanh+gelu5"]
)
@pytest.mark.parametrize("tasks", [1, 3])
def test_gradients_are_those_of_the_module_itself(name, tasks):
    optimizee = image_optimizee(name, (1, 8, 8), 10)
    make = make_task(name, *labelled_images(), 16).batches
    data = [next(make(seeded_generator(k))) for k in range(tasks)]
    params = [optimizee.initial(seeded_generator(k)) for k in range(tasks)]
    losses, gradients = optimizee.gradients(torch.stack([*map(optimizee.flat, params)]), data)
    for k, (x, y) in enumerate(data):
        module = optimizee.make_module()
        with torch.no_grad():
            values = (t for layer in params[k] for t in layer.values())
            for p, value in zip(module.parameters(), values, strict=True):
                p.copy_(value)
        loss = nn.functional.cross_entropy(module(x), y)
        expected = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(losses[k], loss.detach())
        torch.testing.assert_close(gradients[k], torch.cat([g.flatten() for g in expected]))


def test_initial_parameters_follow_the_generator_and_leave_torchs_own_alone():
    optimizee, before = image_optimizee("sigmoid6", (1, 8, 8)), torch.random.get_rng_state()
    first, same, other = (optimizee.flat(optimizee.initial(seeded_generator(k))) for k in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_flat_and_unflat_are_inverse():
    optimizee = image_optimizee("relu6bn", (1, 8, 8))
    params = optimizee.initial(seeded_generator(0))
    assert [{*layer} for layer in params] == [
        set(), {"weight", "bias"}, {"weight", "bias"}, set(), {"weight", "bias"},
    ]  # fmt: skip
    back = optimizee.unflat(optimizee.flat(params))
    for layer, same in zip(params, back, strict=True):
        assert all(torch.equal(layer[name], same[name]) for name in layer)
    assert sum(optimizee.sizes_by_layer()) == sum(optimizee.sizes())


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_parameter_that_layers_share_counts_once():
    optimizee = Optimizee(Tied)
    params, x = optimizee.initial(seeded_generator(0)), torch.randn(3, 4)
    w = params[0]["weight"]
    assert optimizee.sizes() == [16] and params[1] == {}
    torch.testing.assert_close(optimizee(x, params), (x @ w.T).tanh() @ w.T)


def test_running_statistics_are_not_updated():
    optimizee = Optimizee(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    params, x = optimizee.initial(seeded_generator(0)), torch.randn(6, 4)
    before = [b.clone() for b in optimizee._module[0].buffers()]
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    first = optimizee.gradients(torch.stack([optimizee.flat(params)] * 2), [(x, y)] * 2)[0]
    assert first[0] == first[1]
    for old, new in zip(before, optimizee._module[0].buffers(), strict=True):
        assert torch.equal(old, new)


def test_running_statistics_are_taken_in_the_parameters_type():
    optimizee = Optimizee(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval()))
    params = optimizee.initial(seeded_generator(0), torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert optimizee(x, params).dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [nn.Dropout, nn.RReLU, nn.AlphaDropout, lambda: nn.MultiheadAttention(4, 2, dropout=0.1)],
)
def test_layers_that_draw_random_numbers_are_refused_unless_they_are_in_eval_mode(make):
    with pytest.raises(OptimizerError, match="draws random numbers"):
        Optimizee(lambda: nn.Sequential(nn.Linear(4, 4), make()))
    Optimizee(lambda: nn.Sequential(nn.Linear(4, 4), make().eval()))


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_gradient_of_a_parameter_that_the_loss_does_not_use_is_0(tasks):
    class Idle(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.idle = nn.Parameter(torch.ones(5))

    optimizee = Optimizee(Idle)
    theta = torch.stack([optimizee.flat(optimizee.initial(seeded_generator(0)))] * tasks)
    data = [(torch.randn(3, 4), torch.tensor([0, 1, 2]))] * tasks
    gradient = optimizee.unflat(optimizee.gradients(theta, data)[1][-1])[0]
    assert torch.equal(gradient["idle"], torch.zeros(5)) and gradient["weight"].any()


def test_batches_of_one_pass_hold_every_image_once_with_its_label():
    images, all_labels = labelled_images(40)
    made = LabelledBatches(images, all_labels, 8, seeded_generator(0), torch.float32)
    found = list(itertools.islice(made, 5))
    rows = torch.cat([x for x, _ in found]).flatten(1)
    labels = torch.cat([y for _, y in found])
    order = (rows[:, None] - (images / 255).flatten(1)[None]).abs().sum(2).argmin(1)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(all_labels[order], labels)


def test_images_of_floating_point_numbers_are_taken_as_they_are():
    images, labels = labelled_images(12)
    made = LabelledBatches(-3.0 * images, labels, 12, seeded_generator(0), torch.float64)
    bytes_made = LabelledBatches(images, labels, 12, seeded_generator(0), torch.float64)
    (x, _), (pixels, _) = next(made), next(bytes_made)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, -3 * 255 * pixels)


def test_the_quadratic_is_the_same_problem_at_every_step():
    task = make_task("quadratic", *labelled_images(), dtype=torch.float64)
    optimizee, data = task.optimizee, task.batches(seeded_generator(0))
    (W, y), (same, _) = next(data), next(data)
    assert torch.equal(W, same)
    theta = optimizee.flat(optimizee.initial(seeded_generator(1), torch.float64))
    loss, gradient = optimizee.gradients(theta[None], [(W, y)])
    torch.testing.assert_close(loss[0], (W @ theta - y).square().sum())
    torch.testing.assert_close(gradient[0], 2 * W.T @ (W @ theta - y))
    other = next(quadratic_batches(seeded_generator(5), torch.float64, "cpu"))[0]
    assert not torch.equal(W, other)


@pytest.mark.parametrize(
    "name",
    ["sigmoid", "relu0", "gru20", "relu20-", "conv8-8-8-8", "conv8k9", "relu+gru5", "relu+5", "",
     f"relu{10**23}"],
)  # fmt: skip
def test_an_unknown_name_is_refused(name):
    with pytest.raises(OptimizerError):
        image_optimizee(name, (1, 8, 8))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(OptimizerError, match="40"):
        make_task("relu4", *labelled_images(40), 41)


def test_images_without_a_label_each_are_refused():
    images, labels = labelled_images(40)
    for wrong in ((images, labels[1:]), (images[:, 0], labels)):
        with pytest.raises(OptimizerError, match=r"expected images \[N, C, H, W\] and labels"):
            make_task("relu4", *wrong, 8)


@pytest.mark.parametrize("tasks", [1, 3])
def test_frozen_parameters_stay_and_are_not_optimised(tasks):
    def make():
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        net[0].weight.requires_grad_(False)
        return net

    optimizee = Optimizee(make)
    assert optimizee.sizes() == [3, 6, 2]
    drawn = [optimizee.initial(seeded_generator(k), torch.float64) for k in range(tasks)]
    theta = torch.stack([*map(optimizee.flat, drawn)])
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    losses, gradients = optimizee.gradients(theta, [(x, y)] * tasks)
    assert gradients.shape == theta.shape
    frozen = optimizee.layers[0].weight.double()
    bias, params = drawn[0][0]["bias"], drawn[0][2]
    outputs = (x @ frozen.T + bias).tanh() @ params["weight"].T + params["bias"]
    assert losses[0] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-12)
    with pytest.raises(OptimizerError, match="no parameters"):
        Optimizee(lambda: nn.Linear(2, 2).requires_grad_(False))


def test_random_numbers_of_no_layer_are_refused_too():
    class Noisy(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5)

    optimizee = Optimizee(lambda: Noisy(4, 3))
    theta = optimizee.flat(optimizee.initial(seeded_generator(0)))[None]
    with pytest.raises(OptimizerError, match="draws random numbers"):
        optimizee.gradients(theta, [(torch.ones(2, 4), torch.tensor([0, 1]))])


def test_batch_norm_of_a_single_number_is_refused():
    images, labels = labelled_images(size=2)
    with pytest.raises(OptimizerError, match="relu4bn needs batches of at least 2"):
        make_task("relu4bn", images, labels, 1)
    make_task("conv3bn", images, labels, 1)
    make_task("relu4", images, labels, 1)


def test_another_default_device_leaves_draws_where_their_generators_are():
    task = make_task("relu4", *labelled_images(), 8)
    expected = next(task.batches(seeded_generator(0)))
    with torch.device("meta"):
        x, y = next(task.batches(seeded_generator(0)))
        next(quadratic_batches(seeded_generator(0), torch.float32, "cpu"))
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
