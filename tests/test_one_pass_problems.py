"""Data and networks of the one-pass problems, on small files of the real formats."""

import pytest
import torch

from comparison import one_pass_problems
from comparison.choices import MODELS, PROBLEMS
from comparison.one_pass_problems import (
    LanguageModel,
    Network,
    ProblemError,
    TextObjective,
    default_model,
    make_problem,
    read_text,
    text_windows,
)
from data_sets.image_data import DataError
from one_pass import Batch

CPU = torch.device("cpu")


def generators(runs):
    return [torch.Generator().manual_seed(number) for number in range(runs)]


def problem(name, tmp_path, model=None, proportion=0.2):
    return make_problem(
        name, Network(model or default_model(name)), proportion, 1, tmp_path, torch.float64, CPU
    )


def write_text(folder, words=9000):
    (folder / "ptb").mkdir(exist_ok=True)
    text = " ".join(f"w{number * 7 % 30}" for number in range(words))
    for part in ("train", "valid", "test"):
        (folder / "ptb" / f"ptb.{part}.txt").write_text(text)


def test_every_problem_has_a_network():
    for name in PROBLEMS:
        assert default_model(name) in MODELS


def test_regression_is_standardised_and_knows_its_unit(tmp_path):
    found = problem("boston", tmp_path)
    assert [len(part[0]) for part in (found.training, found.validation, found.test)] == [
        364,
        91,
        51,
    ]
    assert found.unit == pytest.approx(84, abs=3)
    assert found.objective.sizes == (13, 50, 1)


@pytest.mark.parametrize("model", ["mlp", "mlp_batch_norm"])
def test_images_are_split_and_standardised_pixel_by_pixel(tmp_path, model):
    found = problem("mnist5k", tmp_path, model, proportion=0.25)
    assert [len(part[0]) for part in (found.training, found.validation)] == [3000, 1000]
    pixels = torch.cat([found.training[0], found.validation[0]])
    assert torch.allclose(pixels.mean(dim=0), torch.zeros(784).double(), atol=1e-5)
    weights, buffers = found.objective.initial(generators(1))
    assert weights.shape[1] == 784 * 50 + 500 + 10 + (100 if model == "mlp_batch_norm" else 50)
    assert bool(buffers) == (model == "mlp_batch_norm")


def test_a_resnet_for_small_images_has_gradients_and_curvature():
    objective = one_pass_problems._image_objective(
        Network("resnet18"), one_pass_problems.ImageData(
            torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10), "none"
        )
    )  # fmt: skip
    weights, buffers = objective.initial(generators(1))
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 9]), shared=True)
    found = objective.linearize(weights.float(), buffers, batch)
    product = found.hessian_product(torch.ones_like(found.gradient))
    assert found.gradient.isfinite().all() and product.isfinite().all()


def test_images_are_split_in_the_order_of_their_files_or_of_a_file_of_numbers(tmp_path):
    def parts(split):
        return make_problem("mnist5k", Network("mlp"), 0.25, split, tmp_path, torch.float32, CPU)

    path, published = tmp_path / "order.txt", parts("published")
    path.write_text("\n".join(map(str, reversed(range(4000)))))
    backwards = parts(str(path))
    assert published.validation[1].equal(backwards.training[1][:1000].flip(0))
    assert published.fingerprint() != backwards.fingerprint()
    path.write_text("\n".join(["0"] * 4000))
    with pytest.raises(DataError, match="must hold each row number once"):
        parts(str(path))


def test_hidden_layers_and_activation_are_those_that_are_asked_for(tmp_path):
    def objective(*network):
        return make_problem(
            "boston", Network("mlp", *network), 0.2, 1, tmp_path, torch.float64, CPU
        ).objective

    assert objective((7, 5)).sizes == (13, 7, 5, 1)
    smooth = objective((7,), "Tanh")
    weights, buffers = smooth.initial(generators(1))
    inputs = torch.randn(4, 13, dtype=torch.float64)
    first, bias, last, end = weights[0].split([91, 7, 7, 1])
    outputs = (inputs @ first.view(7, 13).T + bias).tanh() @ last[:, None] + end
    targets = torch.zeros(4, 1, dtype=torch.float64)
    loss = smooth.linearize(weights, buffers, Batch(inputs, targets, shared=True)).loss
    assert torch.allclose(loss, outputs.square().mean())


def test_channels_are_standardised_as_wholes_where_that_is_asked_for():
    images = torch.arange(48, dtype=torch.uint8).view(2, 3, 2, 4)
    data = one_pass_problems.ImageData(images, torch.arange(2), "none")
    training, test = one_pass_problems._standardised(data, data, {"device": CPU}, "channels")
    channel = images[:, 1].float()
    expected = (channel - channel.mean()) / channel.std(correction=0)
    assert torch.allclose(training[:, 1], expected, atol=1e-6) and torch.equal(training, test)


def test_torchvisions_own_resnet_is_for_three_channels():
    def objective(channels):
        images = torch.zeros(10, channels, 8, 8, dtype=torch.uint8)
        data = one_pass_problems.ImageData(images, torch.arange(10), "none")
        return one_pass_problems._image_objective(Network("resnet18_unmodified"), data)

    assert objective(3).module.conv1.kernel_size == (7, 7)
    with pytest.raises(ProblemError, match="for 3 channels, the images have 1"):
        objective(1)


@pytest.mark.parametrize(
    ("name", "model"),
    [("boston", "resnet18"), ("mnist5k", "lstm"), ("ptb", "mlp"), ("two_weights", "resnet18")],
)
def test_a_network_that_does_not_fit_is_refused(tmp_path, name, model):
    with pytest.raises(ProblemError, match=f"model {model} is not for"):
        problem(name, tmp_path, model)


# ---- text ----


def test_text_is_numbered_by_the_training_file_and_cut_into_streams(tmp_path):
    write_text(tmp_path)
    parts, words = read_text(tmp_path / "ptb")
    assert words == 30 and all(len(part) == 9000 for part in parts)
    inputs, targets = text_windows(parts[0])
    assert inputs.shape == targets.shape == (3, 40, 70)
    assert torch.equal(inputs[0, :, 1:], targets[0, :, :-1])
    assert torch.equal(inputs[1, :, 0], targets[0, :, -1])


def test_text_that_is_missing_or_too_short_or_has_new_words_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"put its text files at .*ptb\.train\.txt"):
        read_text(tmp_path)
    write_text(tmp_path)
    (tmp_path / "ptb" / "ptb.valid.txt").write_bytes(b"w1 \xff")
    with pytest.raises(DataError, match=r"ptb\.valid\.txt is damaged"):
        read_text(tmp_path / "ptb")
    write_text(tmp_path)
    (tmp_path / "ptb" / "ptb.test.txt").write_text("unheard")
    with pytest.raises(DataError, match="'unheard', which is not in the training file"):
        read_text(tmp_path / "ptb")
    with pytest.raises(DataError, match="too short"):
        text_windows(torch.arange(100))


def test_the_language_model_is_torchs_lstm_and_goes_on_where_it_ended():
    words, units, streams = 7, 5, 3
    model = LanguageModel(words, units, streams).double()
    theirs = torch.nn.LSTM(units, units, num_layers=2, batch_first=True).double()
    with torch.no_grad():
        for layer, gates in enumerate(model.gates):
            for part, linear in zip(("ih", "hh"), gates, strict=True):
                getattr(theirs, f"weight_{part}_l{layer}").copy_(linear.weight)
                getattr(theirs, f"bias_{part}_l{layer}").copy_(linear.bias)
    text = torch.randint(words, (streams, 8))
    pieces = torch.cat([model(text[:, :5]), model(text[:, 5:])], dim=2)
    expected = model.decoder(theirs(model.embedding(text))[0]).movedim(-1, 1)
    assert torch.allclose(pieces, expected)


class InWaves(LanguageModel):
    """The language model as it is on a GPU."""

    word_by_word = LanguageModel.in_waves


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_in_waves_are_layers_word_by_word(layers, length):
    found, text = [], torch.randint(7, (3, length), generator=torch.Generator().manual_seed(0))
    for kind in (LanguageModel, InWaves):
        objective = TextObjective(kind(7, 5, 3, layers).double(), "cross_entropy")
        generators = [torch.Generator().manual_seed(run) for run in range(2)]
        weights, buffers = objective.initial(generators)
        buffers = {name: buffer + 0.3 for name, buffer in buffers.items()}
        at = objective.linearize(weights, buffers, Batch(text, text, shared=True))
        product = at.hessian_product(weights)
        found.append((at.loss, at.gradient, at.buffers["hidden"], product))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_a_language_model_is_evaluated_in_the_order_of_the_text():
    objective = TextObjective(LanguageModel(7, 5, 3).double(), "cross_entropy")
    weights, buffers = objective.initial(generators(2))
    buffers = {name: buffer.double() for name, buffer in buffers.items()}
    text = torch.randint(7, (3, 9))
    inputs, targets = (
        t.reshape(3, 2, 4).movedim(0, 1).contiguous() for t in (text[:, :-1], text[:, 1:])
    )
    pieces = objective.evaluate(weights, buffers, inputs, targets)
    whole = objective.evaluate(weights, buffers, text[None, :, :-1], text[None, :, 1:])
    assert torch.allclose(pieces.loss, whole.loss)
    assert (buffers["hidden"] == 0).all()


# ---- toys ----


@pytest.mark.parametrize("name", ["quadratic", "two_weights"])
def test_a_toys_gradient_and_curvature_are_finite_differences(tmp_path, name):
    found = problem(name, tmp_path)
    weights, _ = found.objective.initial(generators(2))
    batch = Batch(found.training[0][:1], found.training[1][:1], shared=True)
    at = found.objective.linearize(weights, {}, batch)
    vectors, change = torch.randn_like(weights), 1e-6
    ahead, behind = (
        found.objective.linearize(weights + sign * change * vectors, {}, batch) for sign in (1, -1)
    )
    slopes = (ahead.loss - behind.loss) / (2 * change)
    assert torch.allclose((at.gradient * vectors).sum(dim=1), slopes, atol=1e-6)
    bends = (ahead.gradient - behind.gradient) / (2 * change)
    assert torch.allclose(at.hessian_product(vectors), bends, atol=1e-6)


def test_two_weights_have_the_published_losses(tmp_path):
    found = problem("two_weights", tmp_path)
    weights = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    training = found.objective.evaluate(weights, {}, *found.training).loss.item()
    validation = found.objective.evaluate(weights, {}, *found.validation).loss.item()
    sine = torch.tensor(-1.0, dtype=torch.float64).sin().item()
    assert training == pytest.approx((0.5 + sine) ** 2 + 0.2)
    assert validation == pytest.approx(0.25 + 4)
