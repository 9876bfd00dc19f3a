"""Test problems of one_pass/tuning.py: data in three parts, a network, batches for many runs.

    network = Network("mlp", hidden_sizes=(50,))
    problem = make_problem("energy", network, 78 / 692, split, "./data", torch.float32, device)
    training = make_samples(problem.training, None, problem.sequential, generators)  # full batches

UCI regression (an MLP of 50 hidden units), Fashion-MNIST and MNIST (784-50-10, also with batch
norm), CIFAR-10 (ResNet-18), Penn Treebank (a two-layer LSTM), and two toys whose losses are
functions of a few weights.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.func import grad_and_value, vjp, vmap

from comparison.choices import HIDDEN_SIZES, IMAGES, PERCEPTRONS, TOYS
from data_sets.image_data import DataError, ImageData
from data_sets.splits import read_order, split_rows
from data_sets.tabular_datasets import load_table, order_from_file, published_order, split_table
from experiment.errors import WrongInputError
from mnist_datasets import import_torchvision, load_images
from one_pass import (
    Batch,
    Buffers,
    CompiledMLPObjective,
    Evaluation,
    FullBatches,
    HeldOut,
    Linearization,
    MLPObjective,
    ModuleObjective,
    Objective,
    Samples,
    SequentialBatches,
    ShuffledBatches,
)
from one_pass.objectives import summed

WORDS = 10_000  # the size of Penn Treebank's vocabulary
CPU = {"dtype": torch.float64, "device": "cpu"}  # for random draws, whatever the default device
STREAMS, WINDOW = 40, 70  # parts of the text read in parallel; words of each part in a batch

Part = tuple[Tensor, Tensor]  # inputs [N, ...], targets [N, ...]


class ProblemError(WrongInputError):
    """A network that does not fit the data; the message is one line."""


@dataclass(frozen=True)
class Network:
    """What is trained.

    Attributes:
        model: one of comparison/choices.py.
        hidden_sizes: units of each hidden layer; none: as published.
        activation: of a perceptron, a class of torch.nn.
    """

    model: str
    hidden_sizes: tuple[int, ...] = ()
    activation: str = "ReLU"

    def sizes(self) -> tuple[int, ...]:
        """Units of each hidden layer."""
        return self.hidden_sizes or HIDDEN_SIZES[self.model]


@dataclass(frozen=True)
class Problem:
    """Data in three parts and an objective.

    Attributes:
        objective: the network and its loss.
        training, validation, test: inputs [N, ...] and targets [N, ...]; validation may be empty.
        source: where the data come from.
        fingerprint: returns a line that identifies the data.
        unit: the factor from the loss to squared units of the raw targets, their variance, in
            regression; 1 otherwise.
        sequential: whether batches must come in the order of the data, as for text.
    """

    objective: Objective
    training: Part
    validation: Part
    test: Part
    source: str
    fingerprint: Callable[[], str]
    unit: float = 1.0
    sequential: bool = False


def default_model(problem: str) -> str:
    """The network that published results for `problem` were obtained with."""
    if problem in TOYS:
        return "toy"
    return {"cifar10": "resnet18", "ptb": "lstm"}.get(problem, "mlp")


def make_problem(
    name: str,
    network: Network,
    validation_proportion: float,
    split: int | str,
    data_dir: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    standardise: str = "pixels",
) -> Problem:
    """The problem `name` with `network`.

    split: the seed of a permutation of the rows (of images: of the training images); "published",
        the order of Clarke et al. (of images: that of the files); or a file of row numbers,
        training rows first, then validation rows, the test rows last.
    standardise: images by the mean and deviation of each of their "pixels" or "channels".

    Raises DataError if the data are missing, ProblemError if the network doesn't fit them.

    validation_proportion: the share of the training samples that is held out, from 0 to 1.
    split_seed: seeds the permutation of the samples before the split.
    """
    where = {"dtype": dtype, "device": device}
    if name in TOYS:
        return _toy(name, network.model, where)
    if name == "ptb":
        return _text(network, Path(data_dir), device)
    if name in IMAGES:
        return _images(name, network, validation_proportion, split, data_dir, where, standardise)
    return _regression(name, network, validation_proportion, split, data_dir, where)


# ---- batches ----


def make_samples(
    part: Part, batch_size: int | None, sequential: bool, generators: Sequence[Generator]
) -> Samples:
    """Batches of `part` for as many runs as there are generators; batch_size None: full batches."""
    if sequential:
        return SequentialBatches(*part)
    if batch_size is None:
        return FullBatches(*part)
    return ShuffledBatches(*part, batch_size, generators)


# ---- regression and images ----


def _regression(
    name: str, network: Network, proportion: float, split: int | str, data_dir: str, where: dict
) -> Problem:
    if network.model != "mlp":
        raise ProblemError(f"model {network.model} is not for {name}: take mlp")
    table = load_table(name, data_dir)
    order = split
    if split == "published":
        order = published_order(name, table, data_dir)
    elif isinstance(split, str):
        order = order_from_file(Path(split), table)
    found = split_table(table, proportion, order)
    parts = [
        tuple(t.to(**where) for t in p) for p in (found.training, found.validation, found.test)
    ]
    objective = _perceptron(network, table.inputs.shape[1], 1, "mse")
    fingerprint = _with_order(table.fingerprint, order)
    return Problem(objective, *parts, table.source, fingerprint, found.target_variance)


def _with_order(fingerprint: Callable[[], str], order: int | Tensor) -> Callable[[], str]:
    """The fingerprint, with a digest of the order where that is one given; a seed is a setting."""
    if isinstance(order, int):
        return fingerprint
    digest = hashlib.sha256(order.numpy()).hexdigest()[:16]
    return lambda: f"{fingerprint()}, their order {digest}"


def _perceptron(network: Network, inputs: int, outputs: int, loss: str) -> Objective:
    """A multilayer perceptron, by the fastest way that there is for it."""
    sizes = (inputs, *network.sizes(), outputs)
    batch_norm = network.model == "mlp_batch_norm"
    if batch_norm or network.activation != "ReLU":
        return ModuleObjective(_layers(sizes, network.activation, batch_norm), loss)
    compiled = len(sizes) == 3 and outputs == 1
    return (CompiledMLPObjective if compiled else MLPObjective)(sizes, loss)


def _layers(sizes: Sequence[int], activation: str, batch_norm: bool) -> nn.Sequential:
    """Linear layers with the activation between; batch norm has the biases of hidden ones."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers.append(nn.Linear(fan_in, fan_out, bias=not batch_norm))
        layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
        layers.append(getattr(nn, activation)())
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def _images(
    name: str,
    network: Network,
    proportion: float,
    split: int | str,
    data_dir: str,
    where: dict,
    standardise: str,
) -> Problem:
    training, test = load_images(name, data_dir)
    objective = _image_objective(network, training)
    order = split
    if split == "published":
        order = torch.arange(len(training))
    elif isinstance(split, str):
        order = read_order(Path(split), len(training))
        if len(order.unique()) < len(order):
            raise DataError(f"{split} must hold each row number once")
    training_rows, validation_rows, _ = split_rows(len(training), 0, proportion, order)
    inputs, test_inputs = _standardised(training, test, where, standardise)
    if network.model in PERCEPTRONS:
        inputs, test_inputs = inputs.flatten(1), test_inputs.flatten(1)
    labels = training.labels.to(where["device"])
    parts = [(inputs[rows], labels[rows]) for rows in (training_rows, validation_rows)]
    test_part = test_inputs, test.labels.to(where["device"])
    fingerprint = _with_order(training.fingerprint, order)
    return Problem(objective, *parts, test_part, training.source, fingerprint)


def _image_objective(network: Network, data: ImageData) -> Objective:
    if network.model in PERCEPTRONS:
        return _perceptron(network, data.images[0].numel(), data.classes, "cross_entropy")
    if network.model in ("resnet18", "resnet18_unmodified"):
        small = network.model == "resnet18"
        return ModuleObjective(resnet(data.shape[0], data.classes, small), "cross_entropy")
    raise ProblemError(
        f"model {network.model} is not for images: take mlp, mlp_batch_norm, resnet18 or "
        f"resnet18_unmodified"
    )


def resnet(channels: int, classes: int, small: bool) -> nn.Module:
    """torchvision's ResNet-18.

    small: for images of about 32 x 32, a 3 x 3 first convolution and no pooling after it.
    """
    import_torchvision()
    from torchvision.models import resnet18

    network = resnet18(num_classes=classes)
    if small:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        raise ProblemError(
            f"resnet18_unmodified is for 3 channels, the images have {channels}: take resnet18"
        )
    return network


def _standardised(
    training: ImageData, test: ImageData, where: dict, standardise: str
) -> tuple[Tensor, Tensor]:
    """Pixels less their mean over the training images, divided by their standard deviation.

    standardise: both are those of each of the "pixels", or of each of the "channels".
    """
    pixels = training.images.to(dtype=torch.float32).div_(255)
    over = {"dim": (0, 2, 3) if standardise == "channels" else 0, "keepdim": True}
    mean, deviation = pixels.mean(**over), pixels.std(**over, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)  # border pixels never change
    pixels.sub_(mean).div_(deviation)
    test_pixels = test.images.to(dtype=torch.float32).div_(255).sub_(mean).div_(deviation)
    return pixels.to(**where), test_pixels.to(**where)


# ---- text ----


class LanguageModel(nn.Module):
    """An LSTM that predicts the next word: words [B, length] to logits [B, words, length].

    Its states are a buffer [layers, 2 (output, cell), streams, units], so that in training a window
    continues where the last one ended.
    """

    def __init__(
        self, words: int = WORDS, units: int = 650, streams: int = STREAMS, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        # of what enters, and of the last output: each with a bias, as nn.LSTM has two
        self.gates = nn.ModuleList(
            [nn.ModuleList([nn.Linear(units, 4 * units) for _ in range(2)]) for _ in range(layers)]
        )
        self.decoder = nn.Linear(units, words)
        self.register_buffer("hidden", torch.zeros(layers, 2, streams, units))

    def forward(self, words: Tensor) -> Tensor:
        """Logits [streams, vocabulary, length] of the words that follow words [streams, length]."""
        outputs = self.word_by_word(words) if words.device.type == "cpu" else self.in_waves(words)
        return self.decoder(outputs).movedim(-1, 1)

    def word_by_word(self, words: Tensor) -> Tensor:
        """Outputs [streams, length, units] of the last layer; each layer reads each word alone."""
        states = [tuple(layer) for layer in self.hidden.detach().clone()]
        outputs = []
        for step in self.embedding(words).unbind(dim=1):
            entering = step
            for index, gates in enumerate(self.gates):
                states[index] = _lstm_cell(gates, entering, states[index])
                entering = states[index][0]
            outputs.append(entering)
        self.hidden.copy_(torch.stack([torch.stack(state) for state in states]).detach())
        return torch.stack(outputs, dim=1)

    def in_waves(self, words: Tensor) -> Tensor:
        """The same up to rounding, where the number of operations counts rather than their sizes.

        In wave k all layers are one product: layer l reads what is below it of word k - l.
        """
        layers, length = len(self.gates), words.shape[1]
        rows = [
            torch.cat([x.weight, h.weight, (x.bias + h.bias)[:, None]], 1) for x, h in self.gates
        ]
        weights = torch.stack(rows).mT
        output, cell = self.hidden.detach().clone().unbind(1)
        ones = torch.ones_like(output[..., :1])
        entering, outputs = self.embedding(words).unbind(dim=1), []
        below = output.unbind()
        for wave in range(length + layers - 1):
            first, last = max(0, wave - length + 1), min(layers, wave + 1)
            read = [below[k - 1] if k else entering[wave] for k in range(first, last)]
            before = [t if last - first == layers else t[first:last]
                      for t in (weights, output, cell, ones)]  # fmt: skip
            moved = _cells(torch.stack(read), *before)
            output, cell = (
                new if len(new) == layers else torch.cat([old[:first], new, old[last:]])
                for new, old in zip(moved, (output, cell), strict=True)
            )
            below = output.unbind()
            if last == layers:
                outputs.append(below[-1])
        self.hidden.copy_(torch.stack([output, cell], dim=1).detach())
        return torch.stack(outputs, dim=1)


def _lstm_cell(
    gates: nn.ModuleList, entering: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The next output and cell state; in plain operations, since vmap can't batch nn.LSTMCell."""
    output, cell = state
    i, f, g, o = (gates[0](entering) + gates[1](output)).chunk(4, dim=1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _cells(
    entering: Tensor, weights: Tensor, output: Tensor, cell: Tensor, ones: Tensor
) -> tuple[Tensor, Tensor]:
    """The next outputs and cell states [layers, streams, units] of several layers.

    weights: [layers, 2 units + 1, 4 units], of [entering, output, 1].
    """
    i, f, g, o = torch.bmm(torch.cat([entering, output, ones], 2), weights).chunk(4, dim=2)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


class TextObjective(ModuleObjective):
    """A language model, evaluated window by window because its states carry over."""

    recurrent = True

    def evaluate(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> Evaluation:
        """Mean loss and accuracy [runs] over windows [windows, streams, length], read in order.

        States are 0 at the first window, whatever they are in `buffers`.
        """
        self.module.eval()
        buffers = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
        sums = []
        for window in zip(inputs, targets, strict=True):
            *found, buffers = self.calls("window", self._judged, (weights, buffers, *window))
            sums.append(found)
        losses, correct = (torch.stack(part).sum(dim=0) for part in zip(*sums, strict=True))
        return Evaluation(losses / targets[..., 0].numel(), correct / targets[..., 0].numel())

    def _judged(
        self, weights: Tensor, buffers: Buffers, window: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor, Buffers]:
        """Losses and numbers of correct answers [runs] of one window, and the buffers after it."""
        each = vmap(self._outputs, in_dims=(0, 0, None))
        outputs, after = each(weights, buffers, window)
        return *summed(outputs, following), after


def read_text(folder: Path) -> tuple[list[Tensor], int]:
    """Penn Treebank's three files as word numbers [N], and the size of the vocabulary.

    Words are numbered in the order of their first appearance in the training file; each line ends
    with <eos>. Raises DataError if a file is missing or damaged, or holds unknown words.
    """
    paths = [folder / f"ptb.{part}.txt" for part in ("train", "valid", "test")]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"no Penn Treebank: put its text files at {', '.join(missing)}")
    numbers: dict[str, int] = {}
    parts = []
    for path in paths:
        try:
            words = path.read_text(encoding="utf-8").replace("\n", " <eos> ").split()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not parts:
            numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        unknown = next((word for word in words if word not in numbers), None)
        if unknown is not None:
            raise DataError(f"{path} holds {unknown!r}, which is not in the training file")
        parts.append(torch.tensor([numbers[word] for word in words]))
    return parts, len(numbers)


def text_windows(words: Tensor) -> Part:
    """Inputs and targets [windows, STREAMS, WINDOW] of a text [N], cut into STREAMS parts.

    Raises DataError if the text is too short for one window.
    """
    length = (len(words) - 1) // STREAMS // WINDOW * WINDOW
    if length == 0:
        raise DataError(
            f"a text of {len(words)} words is too short: {STREAMS * WINDOW + 1} at least"
        )

    def folded(some: Tensor) -> Tensor:
        streams = some[: STREAMS * length].view(STREAMS, -1, WINDOW)
        return streams.movedim(0, 1).contiguous()

    return folded(words[:-1]), folded(words[1:])


def _text(network: Network, data_dir: Path, device: torch.device) -> Problem:
    if network.model != "lstm":
        raise ProblemError(f"model {network.model} is not for text: take lstm")
    units, *others = network.sizes()
    if any(size != units for size in others):
        raise ProblemError(f"hidden_sizes of an lstm are equal, not {[units, *others]}")
    parts, words = read_text(data_dir.expanduser() / "ptb")
    windows = [tuple(t.to(device) for t in text_windows(part)) for part in parts]
    counts = " + ".join(f"{len(part):,}" for part in parts)
    model = LanguageModel(words, units, layers=len(network.sizes()))
    objective = TextObjective(model, "cross_entropy")
    source = f"{counts} words of Penn Treebank in {data_dir / 'ptb'}"

    def fingerprint() -> str:
        digest = hashlib.sha256(torch.cat(parts).numpy()).hexdigest()[:16]
        return f"{counts} words, sha256 {digest}"

    return Problem(objective, *windows, source, fingerprint, sequential=True)


# ---- toys ----

TRAINING_LOSS, VALIDATION_LOSS = 0, 1  # values of a toy's targets, which select one of two losses


@dataclass(frozen=True)
class FunctionObjective:
    """A loss that is a function of a few weights, without a network.

    loss: a function of weights [P], inputs [B, ...] and targets [B].
    size: the number P of weights.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    size: int

    classifies = False
    recurrent = False

    def initial(self, generators: Sequence[Generator]) -> tuple[Tensor, Buffers]:
        """Standard normal weights [runs, P], float64, and no buffers."""
        rows = [torch.randn(self.size, generator=g, **CPU) for g in generators]
        return torch.stack(rows), {}

    def linearize(self, weights: Tensor, buffers: Buffers, batch: Batch) -> Linearization:
        """The loss at `weights` [runs, P], with its gradient and Hessian-vector products."""
        samples = (None, None) if batch.shared else (0, 0)
        gradients = vmap(grad_and_value(self.loss), in_dims=(0, *samples))

        def gradient_of(some: Tensor) -> tuple[Tensor, Tensor]:
            return gradients(some, batch.inputs, batch.targets)

        gradient, product, loss = vjp(gradient_of, weights, has_aux=True)
        return Linearization(loss, gradient, buffers, lambda vectors: product(vectors)[0])

    def held_out(self, weights: Tensor, buffers: Buffers, batch: Batch) -> HeldOut:
        """Loss and gradient as in `linearize`, since there are no buffers."""
        linearization = self.linearize(weights, buffers, batch)
        return HeldOut(linearization.loss, linearization.gradient, buffers)

    def evaluate(
        self, weights: Tensor, buffers: Buffers, inputs: Tensor, targets: Tensor
    ) -> Evaluation:
        """The loss [runs] on all samples; the accuracy is 0."""
        loss = self.held_out(weights, buffers, Batch(inputs, targets, shared=True)).loss
        return Evaluation(loss, torch.zeros_like(loss))


def _toy(name: str, model: str, where: dict) -> Problem:
    if model != "toy":
        raise ProblemError(f"model {model} is not for {name}: take toy")
    loss, size, noise = _QUADRATIC if name == "quadratic" else _TWO_WEIGHTS
    inputs = noise.to(**where)

    def part(rows: Tensor, which: int) -> Part:
        return rows, torch.full((len(rows),), which, device=rows.device)

    quiet = torch.zeros_like(inputs[:1])
    held_out = part(quiet, VALIDATION_LOSS)
    objective = FunctionObjective(loss, size)
    training = part(inputs, TRAINING_LOSS)
    return Problem(objective, training, held_out, held_out, f"the toy {name}", lambda: name)


def _quadratic_toy(size: int = 10, deviation: float = 0.1) -> tuple[Callable, int, Tensor]:
    """w^T A w / 2 with A a rotated diag(1, 1/2, ..., 1/size); training adds noise to w.

    Returns the loss, the number of weights and the noise [1000, size].
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(size, size, generator=generator, **CPU)
    rotation = torch.linalg.qr(drawn).Q
    curvature = rotation @ torch.diag(1 / torch.arange(1, size + 1, **CPU)) @ rotation.T
    noise = deviation * torch.randn(1000, size, generator=generator, **CPU)

    def loss(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        seen = weights - inputs
        return (seen @ curvature.to(weights) * seen).sum(dim=1).mean() / 2

    return loss, size, noise


def _two_weights_toy() -> tuple[Callable, int, Tensor]:
    """Training loss (w1 + sin w2)^2 + .2 (w2 + 2)^2, validation loss (w1 - 1)^2 + (w2 - 1)^2."""

    def loss(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        first, second = weights[0], weights[1]
        training = (first + second.sin()).square() + 0.2 * (second + 2).square()
        validation = (first - 1).square() + (second - 1).square()
        return torch.where(targets == TRAINING_LOSS, training, validation).mean()

    return loss, 2, torch.zeros(1, 2, dtype=torch.float64)


_QUADRATIC, _TWO_WEIGHTS = _quadratic_toy(), _two_weights_toy()
