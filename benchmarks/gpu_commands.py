"""Times steps of the commands beside main.py on a GPU, and checks them against the CPU.

    python benchmarks/gpu_commands.py --json gpu_commands.json     # about a minute
    python benchmarks/gpu_commands.py --seconds 20                 # the checks, and the first rows
    python benchmarks/gpu_commands.py --device cpu                 # tiny sizes, to see that it runs

one pass     tune_one_pass.py: a weight step, of ten with a hyperparameter step; perceptrons
resnet18     a gradient, or a product with the Hessian, of one run on 100 images of CIFAR-10's size;
             limit: torch's own gradient of the module, recorded too
lstm         the same of two layers of 650 units on 40 x 70 words; limit: torch's own nn.LSTM
vicreg       baseline_vicreg.py: a step, with its pair of views, and without
window       learn_to_optimize.py: 20 steps of all trainings with their meta-gradient

obvious is a step whose kernels the host starts one by one, as before; ours is replayed from
recordings: CUDA graphs, or, on a CPU, called again. kernels are those of a step. first s is the
time of the first calls, which record. Exit status 1: the devices disagree.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.table import (
    Clock,
    Report,
    Row,
    benchmark_parser,
    peak_gigabytes,
    print_table,
    runs_on_gpu,
    set_up,
)
from comparison.one_pass_problems import LanguageModel, TextObjective, resnet
from comparison.settings import VICRegSettings
from comparison.vicreg import VICReg
from data_sets.image_data import ImageData
from experiment.choices import DEVICE
from experiment.command_line import positive_float, run_command
from experiment.precision import Products, set_tensor_cores
from kernels.recorded_training import recordings
from kernels.recorded_updates import CalledRecording
from learned_optimizer import MetaTraining, MetaTrainingSettings, make_network, make_task
from mnist_datasets import pair_batches
from models_fully_local import Activation, lateral_mlp
from one_pass import (
    Batch,
    FullBatches,
    MLPObjective,
    ModuleObjective,
    ReplayedTuning,
    Settings,
    ShuffledBatches,
    initial_hyperparameters,
    initial_state,
)

LARGEST_DIFFERENCE = 1e-8  # between devices, in float64, relative, after some steps
TUNED = ("lr", "weight_decay", "momentum")
LOOK_BACK = Settings("look_back", TUNED)


@dataclass(frozen=True)
class Sizes:
    """What is measured; the first sizes are for a GPU."""

    units: int = 50
    draws: int = 200
    images: int = 100
    side: int = 32
    words: int = 10_000
    cells: int = 650
    streams: int = 40
    length: int = 70
    pairs: int = 1024
    optimizee: str = "sigmoid20"
    pixels: int = 28
    tasks: tuple[int, ...] = (1, 16)


TINY = Sizes(4, 3, 2, 8, 13, 5, 3, 4, 16, "sigmoid2", 6, (1, 2))


def generators(count: int) -> list[torch.Generator]:
    """One for each run."""
    return [torch.Generator().manual_seed(k) for k in range(count)]


def recorder(device: torch.device) -> Callable:
    """What records: CUDA graphs, or the stand-in."""
    return recordings(device, print) or CalledRecording


def normal(*shape: int, device: torch.device, dtype=torch.float32) -> Tensor:
    """Standard normal numbers, the same on every device."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.to(device, dtype)


# ---- what takes steps: each call makes some, and `tensors` are the numbers that it came to ----


class OnePass:
    """Steps of a Tuning of perceptrons, ten and a hyperparameter step at each call."""

    steps = 10

    def __init__(self, sizes, runs, batch, device, dtype, recorded: bool) -> None:
        classes = sizes[-1] > 1
        objective = MLPObjective(sizes, "cross_entropy" if classes else "mse")
        count = 2000 if batch else 692
        x = normal(count, sizes[0], device=device, dtype=dtype)
        y = (torch.arange(count) % sizes[-1]).to(device) if classes else x[:, :1].sin()
        parts = (x[: count // 2], y[: count // 2]), (x[count // 2 :], y[count // 2 :])
        samples = [
            ShuffledBatches(*part, batch, generators(runs)) if batch else FullBatches(*part)
            for part in parts
        ]
        hyperparameters = initial_hyperparameters(generators(runs))
        hyperparameters["lr"].fill_(0.01)
        weights, buffers = objective.initial(generators(runs))
        state = initial_state(weights.to(device, dtype), buffers, hyperparameters, LOOK_BACK)
        self.tuning = ReplayedTuning(objective, *samples, LOOK_BACK, state)
        if recorded:
            self.tuning.calls.record = recorder(device)

    def __call__(self) -> None:
        self.tuning.advance(self.steps)

    def tensors(self) -> list[Tensor]:
        return [self.tuning.state.weights, *self.tuning.state.raw.values()]


class OfNetwork:
    """A gradient of a network at fixed weights, or with `product` a product with the Hessian."""

    steps = 1

    def __init__(self, make, batch, product, device, dtype, recorded: bool) -> None:
        torch.manual_seed(0)
        self.objective, self.product = make(), product
        if recorded:
            self.objective.calls.record = recorder(device)
        weights, buffers = self.objective.initial(generators(1))
        self.weights = weights.to(device, dtype)
        self.buffers = {
            name: b.to(device, dtype if b.is_floating_point() else b.dtype)
            for name, b in buffers.items()
        }
        inputs, targets = (t.to(device) for t in batch)
        shared = not inputs.is_floating_point()
        self.batch = Batch(inputs if shared else inputs.to(dtype), targets, shared)
        self.found: Tensor | None = None

    def __call__(self) -> None:
        objective, given = self.objective, (self.weights, self.buffers, self.batch)
        if self.product:
            self.found = objective.product_with_hessian(*given, self.weights)
        else:
            self.found = objective.linearize(*given).gradient

    def tensors(self) -> list[Tensor]:
        return [self.found]


class OwnGradient:
    """torch's own gradient of a module's mean loss, recorded."""

    steps = 1

    def __init__(self, module: nn.Module, batch, device: torch.device) -> None:
        module.to(device)
        parameters = list(module.parameters())

        def gradient(inputs: Tensor, targets: Tensor) -> list[Tensor]:
            outputs = module(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            return list(torch.autograd.grad(loss, parameters))

        self.batch = [t.to(device) for t in batch]
        self.gradient = recorder(device)(gradient, self.batch)

    def __call__(self) -> None:
        self.gradient(*self.batch)


class OwnLanguageModel(nn.Module):
    """The language model with torch's own LSTM."""

    def __init__(self, words: int, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.lstm = nn.LSTM(units, units, 2, batch_first=True)
        self.decoder = nn.Linear(units, words)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [streams, vocabulary, length]."""
        return self.decoder(self.lstm(self.embedding(words))[0]).movedim(-1, 1)


class Pairs:
    """Ten steps of VICReg at each call, with new pairs of views or without."""

    steps = 10

    def __init__(self, side, batch, with_views, device, dtype, recorded: bool) -> None:
        pixels = torch.randint(256, (10 * batch, 1, side, side), generator=generators(1)[0])
        data = ImageData(pixels.byte().to(device), torch.arange(10 * batch).to(device) % 10, "made")
        network = lateral_mlp(side**2, [256, 32], Activation("sigmoid"), inhibition="none")
        settings = VICRegSettings(batch_size=batch)
        self.training = VICReg(network, data, 0, settings, dtype=dtype, random_numbers=DEVICE)
        if recorded:
            self.training.record = recorder(device)
        self.pairs = None
        if not with_views:
            pairs = pair_batches(data, batch, generators(1)[0], dtype)
            self.pairs = list(itertools.islice(pairs, self.steps))

    def __call__(self) -> None:
        if self.pairs is None:
            self.training.train_epoch()
        else:
            self.training.train_on(iter(self.pairs), self.steps)

    def tensors(self) -> list[Tensor]:
        return [t.detach() for layer in self.training.params for t in layer.values()]


class Windows:
    """A run of two windows of meta-training at each call."""

    steps = 2

    def __init__(self, sizes, tasks, estimator, device, dtype, recorded: bool) -> None:
        count, side = 1280, sizes.pixels
        images = torch.rand(count, 1, side, side, generator=generators(1)[0], dtype=torch.float64)
        labels = torch.arange(count).to(device) % 10
        task = make_task(sizes.optimizee, images.to(device, dtype), labels, dtype=dtype)
        settings = MetaTrainingSettings(
            inner_steps=40, tasks=tasks, estimator=estimator, validation_runs=1
        )
        network = make_network("lstm", 0).to(device, dtype)
        self.training = MetaTraining(network, task, [], settings)
        if recorded:
            self.training.calls.record = recorder(device)

    def __call__(self) -> None:
        self.training.train_run()

    def tensors(self) -> list[Tensor]:
        return [p.detach() for p in self.training.network.parameters()]


def images_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """A batch of one run."""
    x = normal(1, sizes.images, 3, sizes.side, sizes.side, device="cpu")
    return x, torch.arange(sizes.images)[None] % 10


def words_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """A window of text, and the words that follow."""
    shape, generator = (sizes.streams, sizes.length + 1), generators(1)[0]
    words = torch.randint(sizes.words, shape, generator=generator)
    return words[:, :-1], words[:, 1:]


def resnet18() -> ModuleObjective:
    """ResNet-18 for small images."""
    return ModuleObjective(resnet(3, 10, small=True), "cross_entropy")


def language_model(sizes: Sizes) -> TextObjective:
    """The two-layer LSTM."""
    model = LanguageModel(sizes.words, sizes.cells, sizes.streams)
    return TextObjective(model, "cross_entropy")


# ---- the rows, and the checks ----


def ways(sizes: Sizes) -> dict[tuple[str, str], Callable]:
    """What is timed, by name and sizes: (device, dtype, recorded) -> what takes steps."""

    def made(kind: type, *settings) -> Callable:
        return lambda *where: kind(*settings, *where)

    image, text = sizes.pixels**2, f"{sizes.streams} x {sizes.length} words"
    images, words = f"{sizes.images} x 3 x {sizes.side}^2", partial(language_model, sizes)
    perceptrons = {
        f"{image}-{sizes.units}-10, 1 draw": ((image, sizes.units, 10), 1, 50),
        f"8-{sizes.units}-1, {sizes.draws} draws": ((8, sizes.units, 1), sizes.draws, None),
    }
    found = {("one pass", name): made(OnePass, *given) for name, given in perceptrons.items()}
    for what, product in (("gradient", False), ("Hessian product", True)):
        given = resnet18, images_of(sizes), product
        found[f"resnet18, {what}", images] = made(OfNetwork, *given)
    for what, with_views in (("pairs", False), ("pairs, views too", True)):
        given = sizes.pixels, sizes.pairs, with_views
        found["vicreg", f"{sizes.pairs} {what}"] = made(Pairs, *given)
    windows = [(tasks, "suffix_sum") for tasks in sizes.tasks] + [(1, "autograd"), (1, "es")]
    for tasks, estimator in windows:
        name = f"{sizes.optimizee}, {tasks} tasks"
        found[f"window, {estimator}", name] = made(Windows, sizes, tasks, estimator)
    for what, product in (("gradient", False), ("Hessian product", True)):
        found[f"lstm, {what}", text] = made(OfNetwork, words, words_of(sizes), product)
    return found


def rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each way, in milliseconds per step; networks also in tf32."""
    for (what, sized), make in ways(sizes).items():
        kinds = ["float32"]
        if clock.device.type == "cuda" and what.startswith("resnet18"):
            kinds.append("tf32")
        for kind in kinds:
            with Products(kind):
                name = what if kind == "float32" else f"{what}, {kind}"
                yield timed(name, sized, make, limit_of(what, sizes, clock.device), repeat, clock)
    if clock.device.type == "cuda":
        yield from channels_last_rows(sizes, repeat, clock)


def timed(
    what: str, sized: str, make: Callable, limit: Callable | None, repeat: int, clock: Clock
) -> Row:
    """A row of the table."""
    runs = {
        name: make(clock.device, torch.float32, recorded)
        for name, recorded in (("obvious", False), ("ours", True))
    }
    first = clock.milliseconds(runs["ours"]) + clock.milliseconds(runs["ours"])
    steps, kernels = runs["ours"].steps, kernels_of(runs["obvious"], clock.device)
    times = clock.in_turns(runs | ({} if limit is None else {"limit": limit}), repeat)
    each = {name: [t / (1 if name == "limit" else steps) for t in of] for name, of in times.items()}
    more = {
        "kernels": "-" if kernels is None else f"{kernels / steps:.0f}",
        "first s": f"{first / 1e3:.2f}",
        "GB": f"{peak_gigabytes(clock.device):.2f}",
    }
    return Row(what, sized, **each, more=more)


def limit_of(what: str, sizes: Sizes, device: torch.device) -> OwnGradient | None:
    """torch's own gradient, for rows of gradients of networks."""
    if what == "resnet18, gradient":
        inputs, targets = images_of(sizes)
        return OwnGradient(resnet(3, 10, small=True), (inputs[0], targets[0]), device)
    if what == "lstm, gradient":
        return OwnGradient(OwnLanguageModel(sizes.words, sizes.cells), words_of(sizes), device)
    return None


def channels_last_rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """torch's own gradient of ResNet-18 with channels last, as what one could hope for."""
    for kind in ("float32", "tf32"):
        with Products(kind):
            module = resnet(3, 10, small=True).to(memory_format=torch.channels_last)
            inputs, targets = images_of(sizes)
            inputs = inputs[0].contiguous(memory_format=torch.channels_last)
            own = OwnGradient(module, (inputs, targets[0]), clock.device)
            times = clock.in_turns({"ours": own}, repeat)
            more = {"kernels": "-", "first s": "-", "GB": "-"}
            yield Row(f"torch's own, {kind}", "resnet18, channels last", **times, more=more)


def kernels_of(run: Callable[[], object], device: torch.device) -> int | None:
    """The number of kernels of a call."""
    run()
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profiled.events())


def differences(device: torch.device) -> dict[str, float]:
    """The largest relative difference of ours to the obvious way on the CPU, in float64, by way."""
    found = {}
    for (what, sized), make in ways(TINY).items():
        ours = make(device, torch.float64, True)
        theirs = make(torch.device("cpu"), torch.float64, False)
        for run in (ours, theirs):
            for _ in range(3):
                run()
        pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
        found[f"{what}, {sized}"] = max(float((a.cpu() - b).norm() / b.norm()) for a, b in pairs)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the checks and the table, and write both as JSON after each row."""
    parser = benchmark_parser(__doc__, repeat=3)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    add("--seconds", type=positive_float, default=75.0, metavar="S",
        help="begin no row after so many seconds")  # fmt: skip
    arguments = parser.parse_args(argv)
    begin, clock = time.perf_counter(), set_up(arguments, wall=True)
    torch.set_deterministic_debug_mode("warn")  # as in the commands, and so are products
    set_tensor_cores("ieee")
    sizes = Sizes() if runs_on_gpu(arguments, clock) else TINY
    checked = differences(clock.device)
    for name, difference in checked.items():
        print(f"{name}: {difference:.1e} from the CPU's, float64")
    report = Report(clock, checked, arguments.json)
    lines = rows(sizes, arguments.repeat, clock)
    end = begin + arguments.seconds
    print_table(report.until(end, lines), clock, "milliseconds of a step")
    report.end_unless(lambda check, difference: difference <= LARGEST_DIFFERENCE)


if __name__ == "__main__":
    run_command(main)
