"""Times updates, meta-steps, probes and a classifier on a GPU, and checks them against the CPU.

    python benchmarks/gpu.py --json gpu.json          # at most five minutes
    python benchmarks/gpu.py --device cpu             # tiny sizes, to see that it runs

update       the cubic rule, or unit statistics of pairs of half batches, forward and backward, a
             step of all tasks:
    one by one    a task at a time; obvious: one product per monomial (tests/oracles.py)
    together      all tasks in batched products; obvious: one by one, for each task
    replayed      the same from recordings: CUDA graphs, or, on a CPU, called again
    compiled      the same, compiled by torch (--compile)
    limit         only the products that no formulation can avoid, in batches of all tasks, recorded
    Images are gathered in a recording, as in main.py; pairs are copied into it, where main.py makes
    them: see the rows of views.
meta-step    of many trainings with their probes; the first, which records, is told apart
images       a batch, and views: pairs of them, for one update of all tasks; obvious: random
             numbers of CPU generators; ours: counted on the device, pairs also recorded
probe        logistic regression of all tasks; obvious: one by one
classifier   a step of train_krotov_hopfield.py's classifiers

tasks/s is task-updates per second, kernels are those of one update, GB the most memory of tensors.
No row begins after four and a half minutes. Exit status 1: the devices disagree.
"""

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracles
import torch
from torch import Tensor

from benchmarks.table import (
    Clock,
    Report,
    Row,
    benchmark_parser,
    kernels_of,
    peak_gigabytes,
    print_table,
    runs_on_gpu,
    set_up,
)
from data_sets.image_data import ImageData
from data_sets.views import Views
from experiment.choices import DEVICE, HOST, RANDOM_NUMBERS
from experiment.command_line import run_command
from experiment.meta_settings import MetaSettings
from experiment.view_strengths import ViewStrengths
from hypgraddesc import HypergradientDescent
from initializers import TRAINABLE, GaussianInitializer
from kernels.logistic_regression import fit_logistic
from kernels.logistic_tasks import fit_logistic_tasks
from kernels.recorded_updates import Recording, recording_for
from kernels.task_products import contracted
from krotov_hopfield import KrotovHopfieldNetwork, LayerPlan, LayerwiseTraining, Recipe
from learning_rules import LearningRule, PolynomialRule
from linear_probe import ProbeLoss, RidgeLoss
from meta_gradients import Recorder, Reverse
from mnist_datasets import batches
from models_fully_local import Activation, Params, Sequential, lateral_mlp
from rules.unit_statistics import default_rule, preset
from train import Draw, Training

KINDS = ("cubic", "pairs")
INH_STEPS = 10
FEW = 10  # updates in a recording
BENCHMARKED_VIEWS = ("geometric", "masks", "mixed")
NOISE = 2.3  # of features, so that about a quarter of the images is misjudged, as after updates
LARGEST_DIFFERENCE = 1e-10  # between devices, in float64, relative
LARGEST_IN_FLOAT32 = 1e-3  # of compiled updates, whose sums are taken in another order


@dataclass(frozen=True)
class Sizes:
    """What is measured; the first sizes are for a GPU."""

    tasks: tuple[int, ...] = (1, 16, 64)
    units: int = 32
    side: int = 28
    batch: int = 1024
    steps: int = 50
    meta_tasks: tuple[int, ...] = (16, 64)
    meta_steps: int = 250
    images: int = 60_000
    channels: int = 96
    seconds: float = 270.0
    pairs: int = 40


TINY = Sizes((1, 2), 4, 6, 16, 4, (2,), 5, 200, 4, 60.0, 2)


class Squares:
    """The sum of the squares of all parameters, an outer loss that takes no time."""

    metrics = ()

    def __call__(self, model, params: Params, generator) -> tuple[Tensor, dict[str, float]]:
        return sum(t.square().sum() for layer in params for t in layer.values()), {}

    def of_tasks(self, model, params: Params, generators) -> tuple[Tensor, list]:
        tensors = [t for layer in params for t in layer.values()]
        return sum(t.flatten(1).square().sum(1) for t in tensors), [{} for _ in generators]


def made_images(sizes: Sizes, device: torch.device) -> ImageData:
    """Images of ten classes, noise around a mean for each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(sizes.images, generator=generator) % 10
    means = torch.rand(10, 1, sizes.side, sizes.side, generator=generator)
    noise = torch.rand(sizes.images, 1, sizes.side, sizes.side, generator=generator)
    images = (0.3 * means[labels] + 0.7 * noise).mul_(255).byte()
    return ImageData(images.to(device), labels.to(device), "made")


def new_rule(kind: str) -> LearningRule:
    """The cubic rule as main.py makes it, or the default rule of pairs of views."""
    if kind == "cubic":
        return PolynomialRule.of_degree(3, bound="tanh", forward_weight_bound=1.0)
    return default_rule()


def new_model(kind: str, sizes: Sizes) -> Sequential:
    """A layer of units, with lateral dynamics for the cubic rule."""
    return lateral_mlp(
        sizes.side**2, [sizes.units], Activation("sigmoid", 4.0), inh_factor=0.2,
        inh_steps=INH_STEPS, inhibition="lateral" if kind == "cubic" else "none",
    )  # fmt: skip


class Updates:
    """The same training for several tasks, in each of the ways."""

    def __init__(
        self, kind: str, sizes: Sizes, tasks: int, device: torch.device, dtype=torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        self.kind, self.sizes, self.inputs = kind, sizes, sizes.side**2
        cubic = kind == "cubic"
        self.model, self.rule = new_model(kind, sizes), new_rule(kind)
        if cubic:
            for psi in self.rule.parameters():
                torch.nn.init.normal_(psi, std=1e-4, generator=generator)
        self.rule.to(device, dtype)
        data = made_images(replace(sizes, images=4 * sizes.batch), device)
        pair = tuple(data.floats(slice(sizes.batch), dtype=dtype).chunk(2))
        self.training = Training(
            self.model, self.rule, None,
            partial(batches, data, sizes.batch, dtype=dtype, random_numbers=DEVICE)
            if cubic else lambda generator: itertools.repeat(pair),
            Squares(),
        )  # fmt: skip
        scales = {"w": self.inputs**-0.5, "b": 0.1, "m": 0.01}
        shapes = self.model.layers[1].parameter_shapes()
        self.draws = [
            Draw((0, k), sizes.steps, start=[{}, {
                name: normal(*shape, scale=scales[name]) for name, shape in shapes.items()
            }])
            for k in range(tasks)
        ]  # fmt: skip
        self.method, self.recorder = Reverse(memory="keep"), Recorder(FEW)
        self.fast: torch.nn.Module | None = None
        self.recording: Recording | None = None

    def few(self) -> "Updates":
        """The same with FEW updates, a recording's, to count kernels."""
        few = copy.copy(self)
        few.draws = [replace(draw, steps=FEW) for draw in self.draws]
        return few

    def one_by_one(self) -> list[list[Tensor]]:
        return [self.method(self.training, draw).gradient for draw in self.draws]

    def together(self) -> list[list[Tensor]]:
        return [h.gradient for h in self.method.together(self.training, self.draws)]

    def replayed(self) -> list[list[Tensor]]:
        results = self.method.together(self.training, self.draws, self.recorder)
        return [h.gradient for h in results]

    def obvious(self) -> None:
        """The first task of the cubic rule by one product per monomial."""
        batch, params = next(self.training.batches(torch.Generator())), self.draws[0].start
        for _ in range(self.sizes.steps):
            params = oracles.update([self.rule], self.model, params, batch)
        loss, _ = Squares()(self.model, params, None)
        torch.autograd.grad(loss, list(self.rule.parameters()))

    def products(self) -> None:
        """The products of all tasks' updates, forward and backward, replayed."""
        if self.recording is None:
            layer, tasks = self.draws[0].start[1], len(self.draws)
            images = torch.rand(tasks, self.sizes.batch, self.inputs).to(layer["w"])
            given = [images, layer["w"].expand(tasks, -1, -1).contiguous()]
            self.recording = recording_for(images.device)(self._products, given)
        for _ in range(self.sizes.steps):
            self.recording.replay()

    def _products(self, x: Tensor, w: Tensor) -> list[Tensor]:
        """Those of one update; the last of each kind."""
        units, cubic = self.sizes.units, self.kind == "cubic"
        m, t = x.new_ones(len(x), units, units), x.new_ones(*x.shape[:2], units)
        for _ in range(4 if cubic else 2):  # with the inputs
            projected, correlated = torch.bmm(x, w.mT), contracted(t, x)
        for _ in range(2 * INH_STEPS + 4 if cubic else 3):  # between units
            spread = torch.bmm(t, m)
        for _ in range(INH_STEPS + 2 if cubic else 2):
            moments = contracted(t, t)
        return [projected, correlated, spread, moments]

    def compiled(self) -> list[list[Tensor]]:
        """`replayed` with a rule whose update torch compiles."""
        if self.fast is None:
            self.fast = compiled(copy.deepcopy(self.rule), self.training, self.draws[0].start)
        training = Training(self.model, self.fast, None, self.training.batches, Squares())
        return [h.gradient for h in self.method.together(training, self.draws, self.recorder)]


def compiled(rule: LearningRule, training: Training, params: Params) -> LearningRule:
    """The rule, whose update is compiled from now on."""
    torch._dynamo.reset()  # one function is compiled at most eight times, for other shapes too
    # prepares its sums, which can't be traced
    rule.update(training.model, params, next(iter(training.batches(torch.Generator()))))
    rule.update = torch.compile(rule.update, dynamic=False)
    return rule


def update_rows(kind: str, sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each way and number of tasks, in milliseconds per update of all tasks."""
    alone = None
    for tasks in sizes.tasks:
        updates = Updates(kind, sizes, tasks, clock.device)
        ways = ["together", "replayed"] if tasks > 1 else ["one by one", "together", "replayed"]
        others = {"limit": updates.products} | (
            {"obvious": updates.obvious} if tasks == 1 and kind == "cubic" else {}
        )
        first, each = timed_updates(updates, ways, others, repeat, clock)
        alone = each.get("one by one", alone)
        for name in ways:
            obvious = each.get("obvious") if name == "one by one" else [t * tasks for t in alone]
            yield update_row(updates, name, first[name], each, obvious, clock)


def compiled_rows(
    sizes: Sizes, repeat: int, clock: Clock, checked: dict[str, float]
) -> Iterator[Row]:
    """The compiled update and meta-step of the cubic rule, the largest numbers of tasks first.

    The differences of the compiled hypergradients to the replayed ones are added to `checked`.
    """
    data = made_images(sizes, clock.device)
    for tasks in sorted(sizes.tasks, reverse=True):
        updates = Updates("cubic", sizes, tasks, clock.device)
        first, each = timed_updates(
            updates, ["compiled"], {"limit": updates.products}, repeat, clock
        )
        found = largest_difference(updates.compiled(), updates.replayed())
        checked[f"compiled, {tasks} tasks, float32"] = found
        print(f"compiled, {tasks} tasks: {found:.1e} from those replayed, float32")
        yield update_row(updates, "compiled", first["compiled"], each, None, clock)
        if tasks in sizes.meta_tasks:
            yield meta_row("cubic", tasks, sizes, data, repeat, clock, compile_rule=True)


def timed_updates(
    updates: Updates, ways: list[str], others: dict[str, Callable], repeat: int, clock: Clock
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The milliseconds of the first run of each way, then of an update of each, others too."""
    runs = {name: getattr(updates, name.replace(" ", "_")) for name in ways}
    first = {name: clock.milliseconds(run) for name, run in runs.items()}
    times = clock.in_turns(runs | others, repeat)
    steps = updates.sizes.steps
    return first, {name: [t / steps for t in values] for name, values in times.items()}


def update_row(updates: Updates, name: str, first: float, each, obvious, clock: Clock) -> Row:
    """The row of one way."""
    tasks = len(updates.draws)
    per_second = f"{1e3 * tasks / min(each[name]):,.0f}"
    kernels = kernels_of(getattr(updates.few(), name.replace(" ", "_")), FEW, clock.device)
    more = columns(per_second, kernels, first, clock)
    sized = f"{tasks} x {updates.sizes.units} units"
    return Row(f"{updates.kind}, {name}", sized, each[name], obvious, each["limit"], more)


def columns(tasks_per_second: str, kernels: str, first: float, clock: Clock) -> dict[str, str]:
    """This benchmark's own columns."""
    return {
        "tasks/s": tasks_per_second, "kernels": kernels, "first s": f"{first / 1e3:.2f}",
        "GB": f"{peak_gigabytes(clock.device):.2f}",
    }  # fmt: skip


def meta_rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each number of tasks: a meta-step with the logistic probe on all images."""
    data = made_images(sizes, clock.device)
    for kind, tasks in itertools.product(KINDS, sizes.meta_tasks):
        yield meta_row(kind, tasks, sizes, data, repeat, clock)


def meta_row(
    kind: str,
    tasks: int,
    sizes: Sizes,
    data: ImageData,
    repeat: int,
    clock: Clock,
    compile_rule=False,
) -> Row:
    """The row of a meta-step; compile_rule: the rule's update is compiled."""
    rule, lateral = new_rule(kind).to(clock.device), {}
    if kind == "cubic":
        source, lateral = partial(batches, data, sizes.batch, random_numbers=DEVICE), {"m"}
    else:
        source = Views(data, sizes.batch // 2, random_numbers=DEVICE)
    start = GaussianInitializer(dict.fromkeys({"b", *lateral}, TRAINABLE), {"w": TRAINABLE})
    training = Training(
        new_model(kind, sizes), rule, start.to(clock.device), source,
        ProbeLoss(
            data, data, 1000.0, outer_images=min(4096, sizes.images), random_numbers=DEVICE
        ),
    )  # fmt: skip
    if compile_rule:
        compiled(rule, training, training.initializer(training.model))
    settings = MetaSettings(tasks=tasks, inner_steps=sizes.meta_steps, together="always")
    descent = HypergradientDescent(training, settings)
    descent.recorder = Recorder(FEW)
    first = clock.milliseconds(descent.step)
    times = [clock.milliseconds(descent.step) for _ in range(repeat)]
    per_second = f"{1e3 * tasks * sizes.meta_steps / min(times):,.0f}"
    return Row(
        f"meta-step, {kind}{', compiled' if compile_rule else ''}",
        f"{tasks} x {sizes.meta_steps} updates", times, more=columns(per_second, "-", first, clock),
    )  # fmt: skip


def recorded(make: Callable, parts: dict[str, Tensor], record: type[Recording]) -> Recording:
    """The making of pairs from such parts as a recording, which takes their values."""
    return record(lambda *t: [*make(dict(zip(parts, t, strict=True)))], [*parts.values()])


class Batches:
    """The batches of several tasks, of images or, with strengths, pairs of views, in each way."""

    def __init__(self, data: ImageData, size: int, tasks: int, strengths: ViewStrengths | None):
        self.data, self.size, self.tasks, self.strengths = data, size, tasks, strengths

    def streams(self, random_numbers: str) -> list[Iterator]:
        """A new stream for each task."""
        options = {"random_numbers": random_numbers}
        if self.strengths is None:
            draw = partial(batches, self.data, self.size, **options)
        else:
            draw = Views(self.data, self.size, self.strengths, **options)
        return [draw(torch.Generator().manual_seed(k)) for k in range(self.tasks)]

    def drawn(self, random_numbers: str, steps: int) -> None:
        """All tasks' batches of some updates; those of mixed views by generators one by one."""
        streams = self.streams(random_numbers)
        if streams[0].of_tasks is None:
            for _ in range(steps * self.tasks):
                next(streams[0])
        else:
            for _ in itertools.islice(streams[0].of_tasks(streams), steps):
                pass

    def recorded(self) -> Callable[[int], None]:
        """A function that replays as many pairs of all tasks."""
        streams = self.streams(DEVICE)
        parts, make = streams[0].parts_of_tasks(streams), streams[0].make
        replay = recorded(make, next(parts), recording_for(self.data.images.device))

        def replayed(steps: int) -> None:
            for of_batch in itertools.islice(parts, steps):
                replay(*of_batch.values())

        return replayed


def batch_rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each kind of batches and number of tasks, in milliseconds for an update of all.

    An epoch's batches of images are made once, so that these are of the updates of a meta-step.
    """
    data = made_images(sizes, clock.device)
    kinds = {"images": None} | {f"views, {k}": ViewStrengths(k) for k in BENCHMARKED_VIEWS}
    for (name, strengths), tasks in itertools.product(kinds.items(), sizes.meta_tasks):
        of_tasks = Batches(data, sizes.batch, tasks, strengths)
        steps = sizes.meta_steps if strengths is None else sizes.pairs
        counts = {HOST: max(1, steps // 10) if strengths else steps, DEVICE: steps}
        ways = {way: partial(of_tasks.drawn, way, count) for way, count in counts.items()}
        if strengths is not None:
            counts["recorded"], ways["recorded"] = steps, partial(of_tasks.recorded(), steps)
        ours = list(ways)[1:]
        kernels = {way: kernels_of(ways[way], steps, clock.device) for way in ours}
        first = {way: clock.milliseconds(ways[way]) for way in ours}
        times = clock.in_turns(ways, repeat)
        each = {way: [t / counts[way] for t in values] for way, values in times.items()}
        for way in ours:
            more = columns("-", kernels[way], first[way], clock)
            told = name if way == DEVICE else f"{name}, {way}"
            yield Row(told, f"{tasks} x {sizes.batch}", each[way], each[HOST], more=more)


def probe_rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each number of tasks: logistic regression on the features of all images."""
    for tasks in sizes.meta_tasks:
        generator = torch.Generator().manual_seed(0)
        labels = (torch.randperm(sizes.images, generator=generator) % 10).to(clock.device)
        means = torch.rand(10, sizes.units, generator=generator).to(clock.device)
        noise = NOISE * torch.rand(tasks, sizes.images, sizes.units, generator=generator)
        features, of_all = means[labels] + noise.to(clock.device), labels.expand(tasks, -1)

        def one_by_one(features=features, labels=labels) -> None:
            fit_logistic(features[0], labels, 10)

        def together(features=features, labels=of_all) -> None:
            fit_logistic_tasks(features, labels, 10)

        first = clock.milliseconds(together)
        times = clock.in_turns({"obvious": one_by_one, "ours": together}, repeat)
        yield Row(
            "probe", f"{tasks} x {sizes.images:,} images", times["ours"],
            [t * tasks for t in times["obvious"]], more=columns("-", "-", first, clock),
        )  # fmt: skip


def classifier_rows(sizes: Sizes, repeat: int, clock: Clock) -> Iterator[Row]:
    """A step of a classifier on the features of a convolution, 64 images in a batch."""
    data = made_images(sizes, clock.device)
    images = data.images[: min(10_000, len(data))]
    recipe = Recipe(
        (LayerPlan(sizes.channels, 5, 0.01, pool="max"),),
        batch_size=64, classifier_batch_size=64, classifier_epochs=repeat + 1, epochs=0,
        dropout=0.5,
    )  # fmt: skip
    labelled = images, data.labels[: len(images)]
    network = KrotovHopfieldNetwork(
        tuple(images.shape[1:]), recipe, torch.Generator().manual_seed(0)
    ).to(clock.device)
    training = LayerwiseTraining(network, labelled, labelled, (1,), 0, classes=10)
    while training.stages[training.stage][0] != "classifier":
        training.train_round()
    steps = training.batches_per_epoch
    first = clock.milliseconds(training.train_round)
    times = [clock.milliseconds(training.train_round) / steps for _ in range(repeat)]
    yield Row("classifier, a step", "64 images", times, more=columns("-", "-", first, clock))


def differences(kind: str, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The largest relative difference of the hypergradients to the CPU's, in float64, by way."""
    small = Sizes((), min(8, sizes.units), 8, 64, 12)
    cpu = Updates(kind, small, 3, torch.device("cpu"), torch.float64).one_by_one()
    ours = Updates(kind, small, 3, device, torch.float64)
    found = {}
    for name in ("one_by_one", "together", "replayed"):
        found[f"hypergradients, {kind}, {name}"] = largest_difference(getattr(ours, name)(), cpu)
    return found


def largest_difference(ours: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """The largest relative difference of the tasks' hypergradients, tensor by tensor."""
    pairs = zip(itertools.chain(*ours), itertools.chain(*other), strict=True)
    return max(float((a.to(b) - b).norm() / b.norm()) for a, b in pairs if b.numel())


def differences_of_views(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The largest difference of counted pairs of views to the CPU's, in float64, by way."""
    strengths, options = ViewStrengths("mixed", noise=0.1, shift=1.0), {"dtype": torch.float64}
    cpu = torch.device("cpu")
    data = made_images(replace(sizes, images=200), cpu)

    def made(device: torch.device, record: type | None) -> list[Tensor]:
        views = Views(data.to(device), 64, strengths, random_numbers=DEVICE, **options)
        streams = [views(torch.Generator().manual_seed(k)) for k in range(3)]
        parts, make = [*itertools.islice(streams[0].parts_of_tasks(streams), 4)], streams[0].make
        if record is not None:
            replay = recorded(make, parts[0], record)
            return [x.to(cpu, copy=True) for of_batch in parts for x in replay(*of_batch.values())]
        return [x.to(cpu) for of_batch in parts for x in make(of_batch)]

    expected = made(cpu, None)
    ways = {"views": None, "views_recorded": recording_for(device)}
    return {
        name: max(
            float((a - b).abs().max()) for a, b in zip(made(device, way), expected, strict=True)
        )
        for name, way in ways.items()
    }


def differences_of_meta_steps(device: torch.device) -> dict[str, float]:
    """The largest relative difference of meta-steps' hypergradients to the CPU's, in float64.

    Each is of three tasks, replayed through pairs of views, whose numbers of updates differ; the
    next one replays the same recordings. Images are small: updates of larger ones are chaotic.
    """
    data = made_images(replace(TINY, images=200), torch.device("cpu"))

    def found(device: torch.device, numbers: str, recorder: Recorder | None) -> list:
        training = small_training(data.to(device), numbers)
        found, method = [], Reverse(memory="keep")
        for metastep in range(3):
            draws = [Draw((metastep, task), steps) for task, steps in enumerate((23, 12, 7))]
            if recorder is None:
                found += [method(training, draw) for draw in draws]
            else:
                found += method.together(training, draws, recorder)
        return [hypergradient.gradient for hypergradient in found]

    return {
        f"meta-steps, numbers of the {numbers}": largest_difference(
            found(device, numbers, Recorder(FEW)), found(torch.device("cpu"), numbers, None)
        )
        for numbers in RANDOM_NUMBERS
    }


def small_training(data: ImageData, numbers: str) -> Training:
    """Four units that learn from pairs of views, in float64, judged by ridge regression."""
    device = data.images.device
    start = GaussianInitializer({"b": TRAINABLE}, {"w": TRAINABLE}).double()
    return Training(
        new_model("pairs", Sizes(units=4, side=data.shape[-1])),
        preset("latent-predictive").double().to(device), start.to(device),
        Views(data, 32, dtype=torch.float64, random_numbers=numbers),
        RidgeLoss(data, fit_images=60, outer_images=60, random_numbers=numbers),
    )  # fmt: skip


def is_small(check: str, difference: float) -> bool:
    """Whether the check may find such a difference."""
    return difference <= (LARGEST_IN_FLOAT32 if check.endswith("float32") else LARGEST_DIFFERENCE)


def main(argv: list[str] | None = None) -> None:
    """Print the checks and the table, and write both as JSON, anew after each row."""
    parser = benchmark_parser(__doc__, repeat=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--compile", action="store_true", help="also compile updates")
    arguments = parser.parse_args(argv)
    begin, clock = time.perf_counter(), set_up(arguments, wall=True)
    sizes = Sizes() if runs_on_gpu(arguments, clock) else TINY
    checked = differences_of_views(sizes, clock.device)
    checked |= differences_of_meta_steps(clock.device)
    for kind in KINDS:
        checked |= differences(kind, sizes, clock.device)
    for name, difference in checked.items():
        print(f"{name.replace('_', ' ')}: {difference:.1e} from the CPU's, float64")
    report = Report(clock, checked, arguments.json, sizes=asdict(sizes))
    given = sizes, arguments.repeat, clock
    lines = itertools.chain(
        *(update_rows(kind, *given) for kind in KINDS),
        meta_rows(*given),
        probe_rows(*given),
        classifier_rows(*given),
        batch_rows(*given),
        compiled_rows(*given, checked) if arguments.compile else (),
    )
    common = f"{sizes.side**2} inputs, batch {sizes.batch}"
    print_table(report.until(begin + sizes.seconds, lines), clock, common)
    report.end_unless(is_small)


if __name__ == "__main__":
    run_command(main)
