"""Times layers that learn by competition, and their classifiers, on a GPU; checks the numbers.

    python benchmarks/gpu_layers.py --json layers.json        # about a minute
    python benchmarks/gpu_layers.py --device cpu              # tiny sizes, to see that it runs

A row is a step of train_krotov_hopfield.py, the mean of a round: of each layer of the preset deep
(batches of 64), of the three layers of softhebb together (batches of 10), of a classifier behind 96
channels (64 images), on features that are kept and on crops.

obvious      steps that are launched one by one
ours         replayed from recordings: CUDA graphs, or, on a CPU, functions that are called again
limit        the layers' products alone: currents and g^T x, as convolutions
patches      the same products as matrix products with patches, patches included

kernels is their number in a step, first s the first round, with its recordings. Exit status 1: the
numbers of the GPU are not those of the CPU, or recorded steps not those that are taken one by one.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.table import (
    Clock,
    Report,
    Row,
    benchmark_parser,
    kernels_of,
    median_text,
    peak_gigabytes,
    print_table,
    runs_on_gpu,
    set_up,
)
from experiment.command_line import run_command
from experiment.devices import set_up as set_up_as_commands_do
from kernels.recorded_updates import CalledRecording, CudaRecording
from krotov_hopfield import (
    RECIPES,
    KrotovHopfieldNetwork,
    LayerPlan,
    LayerwiseTraining,
    Recipe,
)

LARGEST_DIFFERENCE = 1e-8  # relative, in float64
PRODUCTS = 10  # how often the limit's products are taken in a replay


@dataclass(frozen=True)
class Sizes:
    """What is measured; the first sizes are for a GPU."""

    side: int = 32
    images: int = 12_800
    round_batches: int = 100
    units: int = 0  # of each layer; 0: those of the presets
    softhebb: int = 10  # images in a batch


TINY = Sizes(24, 128, 2, 6, 4)


@functools.cache
def made_images(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Images of noise around a mean for each of ten classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    means = torch.rand(10, 3, side, side, generator=generator)
    noise = torch.rand(count, 3, side, side, generator=generator)
    return (0.3 * means[labels] + 0.7 * noise).mul_(255).byte(), labels


def training_of(
    recipe: Recipe, sizes: Sizes, device: torch.device, recorded: bool, dtype=torch.float32
) -> LayerwiseTraining:
    """An untrained network with made images; a tenth of them validates."""
    images, labels = (t.to(device) for t in made_images(sizes.images, sizes.side))
    network = KrotovHopfieldNetwork(
        tuple(images.shape[1:]), recipe, torch.Generator().manual_seed(0), dtype=dtype
    ).to(device)
    first = len(images) // 10
    record = CudaRecording if device.type == "cuda" else CalledRecording
    return LayerwiseTraining(
        network, (images[first:], labels[first:]), (images[:first], labels[:first]),
        [len(recipe.layers)], 0, classes=10, round_batches=sizes.round_batches,
        record=record if recorded else None,
    )  # fmt: skip


def finish(training: LayerwiseTraining) -> LayerwiseTraining:
    """The same, after all its rounds."""
    while not training.finished:
        training.train_round()
    return training


# ---- checks ----

SMALL = Recipe(
    (
        LayerPlan(8, 3, 0.02, padding=1, pool="max", ranking_param=3, lebesgue_p=3),
        LayerPlan(6, 3, 0.02),
        LayerPlan(5, 0, 0.05),
    ),
    epochs=1.2, batch_size=8, classifier_batch_size=8, classifier_epochs=2,
)  # fmt: skip
CHECKED = {
    "ranked": SMALL,
    "soft, together": replace(
        SMALL, gate="soft", normalization="clamp", rate_exponent=0.5, padding_mode="reflect",
        together=True, schedule="constant",
    ),
    "patience": replace(SMALL, epochs=4, patience=9),
    "losers": replace(SMALL, gate="losers", feature_norm="image"),
}  # fmt: skip


def differences(device: torch.device) -> dict[str, float]:
    """The largest relative difference of weights in float64, for each kind of training.

    To the CPU's of trainings that draw nothing; otherwise to those of steps taken one by one.
    """
    found, small = {}, Sizes(16, 200, 7)
    for name, recipe in CHECKED.items():
        ours = finish(training_of(recipe, small, device, True, torch.float64))
        cpu = finish(training_of(recipe, small, torch.device("cpu"), False, torch.float64))
        found[f"{name}, to the CPU"] = _difference(ours, cpu)
        drawing = replace(recipe, dropout=0.3, augmentation="flip")
        one, other = (
            finish(training_of(drawing, small, device, recorded, torch.float64))
            for recorded in (True, False)
        )
        found[f"{name}, dropout and flips, to one by one"] = _difference(one, other)
    return found


def _difference(one: LayerwiseTraining, other: LayerwiseTraining) -> float:
    """The largest relative difference of two trainings' tensors; inf if one was not recorded."""
    if one.record is None:
        return math.inf
    found = 0.0
    for a, b in zip(_tensors(one), _tensors(other), strict=True):
        found = max(found, float((a.cpu() - b.cpu()).norm() / b.norm().cpu().clamp_min(1e-300)))
    return found


def _tensors(training: LayerwiseTraining) -> list[Tensor]:
    (outcome,) = training.outcomes.values()
    return [t.double() for t in (*training.network.state_dict().values(),
                                 *outcome["state"].values())]  # fmt: skip


# ---- rows ----


def measured(sizes: Sizes, rounds: int) -> dict[str, Recipe]:
    """The trainings that are timed, by name, each with so many rounds of all that learns."""
    deep = replace(RECIPES["deep"](5), augmentation="none", classifier_epochs=0)
    softhebb = replace(RECIPES["softhebb"](3), batch_size=sizes.softhebb, classifier_epochs=0)
    first = replace(
        RECIPES["deep"](1), epochs=0, augmentation="none", classifier_epochs=rounds
    )  # fmt: skip
    recipes = {
        "deep": deep, "softhebb": softhebb, "kept features": first,
        "crops and flips": replace(first, augmentation="flip"),
    }  # fmt: skip
    return {name: _sized(recipe, sizes, rounds) for name, recipe in recipes.items()}


def _sized(recipe: Recipe, sizes: Sizes, rounds: int) -> Recipe:
    """A recipe with these sizes, and so many rounds of each layer if it has any."""
    batches = (sizes.images - sizes.images // 10) // recipe.batch_size
    layers = recipe.layers
    if sizes.units:
        layers = tuple(replace(p, units=sizes.units, ranking_param=2) for p in layers)
    epochs = rounds * sizes.round_batches / batches if recipe.epochs else 0
    return replace(recipe, layers=layers, epochs=epochs)


Learner = tuple[int, bool]  # the layer that learns (0: all), or that the classifier follows


def steps_of(training: LayerwiseTraining) -> tuple[Learner, int]:
    """What learns in the next round, and in how many steps."""
    kind, layers = training.stages[training.stage]
    if kind == "classifier":
        return (layers[0], True), training.batches_per_epoch
    return (layers[0] if len(layers) == 1 else 0, False), training.round_batches


def round_times(training: LayerwiseTraining, clock: Clock) -> dict[Learner, list[float]]:
    """Milliseconds of a step in each round."""
    found: dict[Learner, list[float]] = {}
    while not training.finished:
        learner, steps = steps_of(training)
        spent = clock.milliseconds(training.train_round)
        found.setdefault(learner, []).append(spent / steps)
    return found


def kernel_numbers(
    name: str, sizes: Sizes, device: torch.device, most: int = 10
) -> dict[Learner, str]:
    """The number of kernels in a step, of a round of so many steps of each."""
    few = replace(sizes, images=min(most * 100, sizes.images), round_batches=most)
    training, found = training_of(measured(few, 1)[name], few, device, False), {}
    while not training.finished:
        learner, steps = steps_of(training)
        found[learner] = kernels_of(training.train_round, steps, device)
    return found


def rows_of(name: str, recipe: Recipe, sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """A row for each layer that learns by itself, for all together, or for the classifier."""
    plain, recorded = (training_of(recipe, sizes, clock.device, kind) for kind in (False, True))
    obvious, ours = round_times(plain, clock), round_times(recorded, clock)
    kernels = kernel_numbers(name, sizes, clock.device)
    for learner, times in ours.items():
        layer, classifies = learner
        if not classifies and not recipe.epochs:
            continue
        limit, patches, steps = None, "-", len(plain.images) // recipe.classifier_batch_size
        if not classifies:
            numbers, steps = (
                [layer] if layer else range(1, len(recipe.layers) + 1),
                sizes.round_batches,
            )
            ways = products(plain, numbers, recipe.batch_size)
            limits = {
                way: [t / PRODUCTS for t in of_way]
                for way, of_way in clock.in_turns(ways, len(times) - 1).items()
            }
            limit, patches = limits["convolutions"], median_text(limits["patches"])
        more = {
            "patches ms": patches, "kernels": kernels[learner],
            "first s": f"{times[0] * steps / 1e3:.2f}",
            "GB": f"{peak_gigabytes(clock.device):.2f}",
        }  # fmt: skip
        what = "classifier" if classifies else f"layer {layer}" if layer else "all layers"
        images = recipe.classifier_batch_size if classifies else recipe.batch_size
        yield Row(
            f"{name}, {what}", f"{images} images", times[1:], obvious[learner][1:], limit, more
        )


def products(training: LayerwiseTraining, numbers: Sequence[int], size: int) -> dict:
    """Functions that take the products of so many steps of these layers, in two ways, replayed."""
    pairs, x = [], training.network.prepared(training.images[:size].float() / 255)
    with torch.no_grad():
        for k, block in enumerate(training.network.blocks, 1):
            layer = block.layer
            if k in numbers:
                pairs.append((layer, layer._padded(layer._inputs(x))))
            x = block(x)

    def convolutions(layer, inputs: Tensor) -> Tensor:
        return layer._correlate(layer._respond(inputs, layer.weight, None), inputs, layer.weight)

    def patches(layer, inputs: Tensor) -> Tensor:
        rows = layer._patches(inputs) if inputs.dim() == 4 else inputs
        return layer._correlate(
            layer._respond(rows, layer._weight_rows(), None), rows, layer.weight
        )

    kind = CudaRecording if x.is_cuda else CalledRecording
    none = x.new_zeros(())

    def replayed(product: Callable[..., Tensor]) -> Callable[[], object]:
        def several(_: Tensor) -> list[Tensor]:
            for _, (layer, inputs) in itertools.product(range(PRODUCTS), pairs):
                found = product(layer, inputs)
            return [found]

        return functools.partial(kind(several, [none]), none)

    return {product.__name__: replayed(product) for product in (convolutions, patches)}


def main(argv: list[str] | None = None) -> None:
    """Print the checks and the table, and write both as JSON."""
    parser = benchmark_parser(__doc__, repeat=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    arguments = parser.parse_args(argv)
    clock = set_up(arguments, wall=True)
    set_up_as_commands_do(argparse.Namespace(**vars(arguments), dtype="float32"))
    sizes = Sizes() if runs_on_gpu(arguments, clock) else TINY
    checked = differences(clock.device)
    for name, difference in checked.items():
        print(f"{name}: {difference:.1e}, float64")
    lines = itertools.chain.from_iterable(
        rows_of(name, recipe, sizes, clock)
        for name, recipe in measured(sizes, 1 + arguments.repeat).items()
    )
    report = Report(clock, checked, arguments.json, sizes=asdict(sizes))
    common = f"images of {sizes.side} x {sizes.side} pixels"
    print_table(report.until(math.inf, lines), clock, common)
    report.end_unless(lambda check, difference: difference <= LARGEST_DIFFERENCE)


if __name__ == "__main__":
    run_command(main)
