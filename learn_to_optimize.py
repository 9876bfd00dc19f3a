"""Learns an optimiser, and compares it with Adam, SGD with momentum and Lion.

    python learn_to_optimize.py sigmoid20                 an LSTM, meta-trained on 784-20-10 nets
    python learn_to_optimize.py relu20 --compare relu20 relu128 conv16-32
    python learn_to_optimize.py sigmoid20 --dataset fashion --epochs 0 --start_from runs/sigmoid
    python learn_to_optimize.py --resume runs/learn_to_optimize-...
    torchrun --nproc_per_node 2 learn_to_optimize.py relu20 --tasks 4

The optimiser is meta-trained on the first half of the training images and judged on the second, in
runs with new initial parameters, on each optimizee of --compare. Each baseline runs at its default
rate and at the best of ten, found on the first half. The frozen optimiser is written to
optimizer.json, for LearnedOptimizer and --start_from.
"""

import json
import math
from functools import cache, partial
from pathlib import Path

from experiment.command_line import (
    UserError,
    common_parser,
    fraction,
    nonnegative_int,
    parse,
    positive_float,
    positive_int,
    refuse_idle_flags,
    run_command,
)
from experiment.data_names import is_path
from experiment.settings import add_settings, flags_of, settings_of
from learned_optimizer.settings import (
    BATCH_SIZE,
    EXTRA_INPUTS,
    NETWORK_KINDS,
    SMALL_STEPS,
    MetaTrainingSettings,
)


def make_parser():
    """The command's flags."""
    parser = common_parser("Learn an optimiser and compare it.", "learn_to_optimize")
    parser.add_argument("optimizee", nargs="?", metavar="OPTIMIZEE",
        help="network to train on, such as relu20bn, conv16-32 (default: sigmoid20)")  # fmt: skip
    add = parser.add_argument_group("the optimiser").add_argument
    add("--network", choices=NETWORK_KINDS,
        help="architecture of the optimiser (default: as in --start_from, or lstm)")  # fmt: skip
    add("--hidden", type=positive_int, metavar="UNITS",
        help="units of the optimiser's layers (default: 20 for lstm, 32 for mlp)")  # fmt: skip
    add("--raw_gradients", action="store_true",
        help="give the lstm gradients without preprocessing")  # fmt: skip
    add("--preprocess_factor", type=positive_float, default=10.0, metavar="P",
        help="the lstm's preprocessing multiplies gradients below e^-P by e^P")  # fmt: skip
    add("--extra_inputs", choices=EXTRA_INPUTS, nargs="*", default=[],
        help="additional inputs of the lstm")  # fmt: skip
    add("--out_mul", type=positive_float, metavar="FACTOR",
        help="factor of all steps (default: --start_from's, or .01 or .1; mlp .001)")  # fmt: skip
    add("--start_from", type=Path, metavar="RUN", 
        help="start from the optimiser of a run, relu20 (trained) or l2o_optimizer.pt")  # fmt: skip
    add_settings(parser.add_argument_group("meta-training"), MetaTrainingSettings)
    add = parser.add_argument_group("optimizees").add_argument
    add("--batch_size", type=positive_int, default=BATCH_SIZE,
        help="images in a batch of an optimizee's training")  # fmt: skip
    add("--classes", type=nonnegative_int, nargs="+", metavar="CLASS",
        help="use only images of these classes (default: all)")  # fmt: skip
    add("--grey", action="store_true", help="turn images grey, with the mean of their channels")
    add("--resize", type=positive_int, metavar="PIXELS", help="resize images to PIXELS x PIXELS")
    add("--norm_eps", type=positive_float, default=1e-5, help="eps of the optimizees' batch norm")
    add = parser.add_argument_group("comparison").add_argument
    add("--compare", nargs="*", metavar="OPTIMIZEE",
        help="optimizees to compare optimisers on (default: the one trained on)")  # fmt: skip
    add("--test_runs", type=positive_int, default=10,
        help="trainings by each optimiser in the comparison")  # fmt: skip
    add("--test_steps", type=positive_int, default=200,
        help="steps of each training in the comparison")  # fmt: skip
    add("--test_images", type=positive_int, default=1000, metavar="N",
        help="number of test images that trained optimizees are judged on")  # fmt: skip
    add("--test_every", type=nonnegative_int, default=10, metavar="STEPS",
        help="steps between two judgements on test images; 0: none")  # fmt: skip
    add("--running_statistics", action="store_true",
        help="use batch norm statistics of training batches on test images")  # fmt: skip
    add("--lion_shares", type=fraction, nargs="+", default=[], metavar="SHARE",
        help="also compare mixtures of SGD and Lion with these shares of Lion")  # fmt: skip
    add("--tuning_runs", type=positive_int, default=3,
        help="trainings that judge each learning rate of a baseline")  # fmt: skip
    add("--histogram_steps", type=positive_int, nargs="*", default=[1, 5, 10, 30, 100, 500],
        help="steps at which a histogram of |u| is made")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import torch

from comparison.optimizer_comparison import (
    BASELINES,
    EDGES,
    PUBLISHED,
    HeldOut,
    OptimizerComparison,
    halves,
    noise_statistics,
)
from data_sets.image_changes import grey, of_classes, resized
from data_sets.image_data import ImageData
from experiment.devices import set_up
from experiment.files import digest
from experiment.loop import finish_on_interrupt, run_steps
from experiment.opening import open_run
from experiment.processes import Team, join_team
from experiment.run_log import RunLog
from experiment.seeds import seeded_generator
from figures.optimizers import plot_optimizer_run
from hypergradients import HypergradientError
from kernels.recorded_training import recordings
from learned_optimizer import (
    CoordinateNetwork,
    MetaTraining,
    OptimizerError,
    Symmetry,
    Task,
    find_symmetries,
    load_network,
    make_network,
    make_task,
    network_to_dict,
)
from learned_optimizer.recorded import Record
from mnist_datasets import load_images

SHOWN = ("meta_loss", "last_window_loss", "seconds")
START = "start.json"  # a copy of the initial optimiser, so that a resumed run has the same
NOISE_STEPS, NOISE_BATCHES = 50, 100  # the tail index: at which step, from how many minibatches


def check(args, parser) -> None:
    """Raise UserError if a flag would have no effect, or has taken the name of the optimizee."""
    if args.optimizee is None and args.compare:
        first = args.compare[0]
        raise UserError(f"--compare takes all names behind it: put OPTIMIZEE, which is trained on, "
                        f"before it, as in {first} --compare {' '.join(args.compare)}")  # fmt: skip
    args.optimizee = args.optimizee or "sigmoid20"
    names = [args.optimizee, *(args.compare or [])]
    refuse_idle_flags(args, parser, [
        (" ".join(f for f in flags_of(MetaTrainingSettings) if f != "epochs"), args.epochs,
         "--epochs of at least 1"),
        ("preprocess_factor", not args.raw_gradients and args.network != "mlp"
         and args.start_from is None, "a new lstm without --raw_gradients"),
        ("sigma pairs", args.estimator in ("es", "pes"), "--estimator es or pes"),
        ("penalty_kinds penalty_relative", args.penalty, "--penalty"),
        ("test_images", args.test_every, "--test_every of at least 1"),
        ("grey", args.dataset == "cifar10" or is_path(args.dataset),
         "--dataset cifar10, or one of your own, whose images have three channels"),
        ("running_statistics", args.test_every and any(n.endswith("bn") for n in names),
         "--test_every, and an optimizee with batch norm, such as relu20bn"),
        ("norm_eps", any(name.endswith("bn") for name in names),
         "an optimizee with batch norm, such as relu20bn"),
    ])  # fmt: skip


def make_optimizer(args) -> CoordinateNetwork:
    """The network to train: a new one, or that of --start_from with its architecture.

    A resumed run takes the copy of the latter that it keeps in START.
    """
    if args.start_from is not None:
        return start_from(args)
    settings = {"hidden": args.hidden} if args.hidden else {}
    kind = args.network or "lstm"
    if kind == "lstm":
        small = args.optimizee.startswith(SMALL_STEPS)
        settings |= {"preprocess": not args.raw_gradients, "extra_inputs": args.extra_inputs}
        settings["preprocess_factor"] = args.preprocess_factor
        settings["out_mul"] = args.out_mul or (0.01 if small else 0.1)
    elif args.raw_gradients or args.extra_inputs:
        raise OptimizerError("--raw_gradients and --extra_inputs are for --network lstm")
    elif args.out_mul:
        settings["out_mul"] = args.out_mul
    return make_network(kind, args.seed, **settings)


def start_from(args) -> CoordinateNetwork:
    """The network of --start_from; raises OptimizerError if the flags ask for another one."""
    directory = args.resume or args.out  # args.out if torchrun has restarted the run
    path = args.start_from
    if path.is_dir():
        theirs = path / "l2o_optimizer.pt"
        path = theirs if theirs.exists() else path / "optimizer.json"
    if directory is not None and (directory / START).exists():
        path = directory / START
    network = load_network(path)
    same_kind = args.network in (None, network.kind)
    if not same_kind or args.hidden not in (None, network.settings["hidden"]):
        raise OptimizerError(
            f"{path} is an optimiser of another architecture: {network.kind} "
            f"({network.extra_repr()}); leave out --network and --hidden"
        )
    if args.raw_gradients or args.extra_inputs:
        raise OptimizerError("--start_from keeps its inputs: leave out those flags")
    if args.out_mul:
        network.out_mul = args.out_mul
    return network


class SteppedMetaTraining(MetaTraining):
    """A MetaTraining whose step is a run; see `run_steps`."""

    step = MetaTraining.train_run

    @property
    def finished(self) -> bool:
        """Whether all runs are done."""
        return self.run >= self.settings.runs


def meta_train(training: SteppedMetaTraining, team: Team, log: RunLog) -> bool:
    """Do all runs, and select the best epoch; False if interrupted by Ctrl-C."""
    total = training.settings.runs
    finished = run_steps(log, training, "run", total, shown=SHOWN, team=team)
    if total:
        training.select()
    return finished


def save(training: MetaTraining, source: str, log: RunLog) -> dict:
    """Write the optimiser and its validation; returns what results.json contains so far."""
    log.write_json("optimizer.json", network_to_dict(training.network))
    validated = math.isfinite(training.best_loss)
    results = {
        "data": source,
        "best_validation_loss": training.best_loss if validated else None,
        "best_epoch": training.best_epoch if validated else None,
    }
    log.write_results(results)
    arrays = {name: torch.stack(values).numpy() for name, values in training.deviations.items()}
    if training.curves:
        arrays["losses"] = torch.stack(training.curves).numpy(force=True)
    log.write_arrays("validation.npz", arrays)
    if training.settings.runs:
        log.say(f"best validation loss {training.best_loss:.4g} after epoch {training.best_epoch}")
    return results


def compare(
    args,
    network: CoordinateNetwork,
    make,
    test: HeldOut | None,
    results: dict,
    log: RunLog,
    record: Record | None,
) -> bool:
    """Run every optimiser on every optimizee of --compare; False if interrupted by Ctrl-C.

    make: make(name, half) -> Task, on half 0 or 1 of the training images.
    test: test images, for optimizees of images.
    results: the content of results.json, which is extended and written with the curves after each
        optimiser.
    record: makes recordings of steps.
    """
    weights = next(network.parameters())
    names = [args.optimizee] if args.compare is None else args.compare
    comparison = OptimizerComparison(
        args.seed, args.test_steps, args.test_runs, args.tuning_runs, weights, args.lion_shares,
        record,
    )  # fmt: skip
    arrays = {"edges": EDGES.numpy()}
    with (
        finish_on_interrupt() as interrupt,
        log.progress(len(names) * len(comparison.names), 0, "comparison") as progress,
    ):
        for name in names:
            task, outcome = make(name, 1), {"optimizers": {}, "tuning": {}}
            outcome["tensors"] = task.optimizee.names()
            judged_on = None if name == "quadratic" else test
            symmetries = symmetries_of(task, args.seed)
            for optimizer in comparison.names:
                contenders, rates = comparison.contenders(
                    optimizer, network, make(name, 0), interrupt
                )
                if not contenders:
                    return False
                for contender in contenders:
                    curves = comparison.curves(
                        contender, task, symmetries, args.histogram_steps, judged_on
                    )
                    outcome["optimizers"][contender.name] = curves.summary()
                    recorded = curves.arrays().items()
                    arrays |= {f"{name}/{contender.name}/{key}": array for key, array in recorded}
                if rates:
                    outcome["tuning"][optimizer] = rates
                write_comparison(name, outcome, arrays, args, results, log)
                progress.advance(
                    {c.name: outcome["optimizers"][c.name]["loss"] for c in contenders}
                )
            outcome["noise"] = noise_statistics(
                network, task, min(NOISE_STEPS, args.test_steps), NOISE_BATCHES, (args.seed, 0),
                weights,
            )  # fmt: skip
            write_comparison(name, outcome, arrays, args, results, log)
            say_losses(name, outcome["optimizers"], args, log)
    return True


def changed(args, data: ImageData) -> ImageData:
    """The images as optimizees see them."""
    if args.classes is not None:
        data = of_classes(data, args.classes)
    if args.grey:
        data = grey(data)
    return data if args.resize is None else resized(data, args.resize)


def held_out(args, test_data: ImageData, dtype: torch.dtype) -> HeldOut | None:
    """The first test images; None if optimizees are not judged on them."""
    if not args.test_every:
        return None
    first = slice(args.test_images)
    inputs, labels = test_data.floats(first, dtype), test_data.labels[first]
    return HeldOut(inputs, labels, args.test_every, args.running_statistics)


def symmetries_of(task: Task, seed: int) -> list[Symmetry]:
    """The symmetries of the task's optimizee, and its negative controls."""
    batch = next(task.batches(seeded_generator(seed)))
    return find_symmetries(task.optimizee, batch, controls=True)


def write_comparison(name: str, outcome: dict, arrays: dict, args, results: dict, log) -> None:
    """Write comparison.npz, and results.json with the outcome for this optimizee."""
    results.setdefault("optimizees", {})[name] = outcome
    log.write_arrays("comparison.npz", arrays)
    log.write_results(results | {"steps": args.test_steps})


def say_losses(name: str, summaries: dict, args, log: RunLog) -> None:
    """Print a line per optimiser; for long trainings also the losses at step PUBLISHED."""
    keys = {args.test_steps: ("loss", "deviation")}
    if args.test_steps > PUBLISHED:
        early = (f"loss_at_{PUBLISHED}", f"deviation_at_{PUBLISHED}")
        keys = {PUBLISHED: early} | keys
    tested = "test_loss" in next(iter(summaries.values()))
    also = "; loss and accuracy on test images" if tested else ""
    kinds = [contender.split()[0] for contender in summaries]
    if any(kinds.count(kind) > 1 for kind in BASELINES):
        also += "; of an optimiser's two rates the first is its default, the other the best tried"
    log.say(f"{name}: training loss at step {' and '.join(map(str, keys))}, mean and deviation of "
            f"{args.test_runs} runs{also}")  # fmt: skip
    for contender, summary in summaries.items():
        texts = [f"{summary[loss]:.4f} +- {summary[spread]:.4f}" for loss, spread in keys.values()]
        if tested:
            texts.append(f"{summary['test_loss']:.4f} {summary['test_accuracy']:.2%}")
        log.say(f"  {contender:14} {'   '.join(texts)}")


def main(argv: list[str] | None = None) -> None:
    """Data; optimiser and optimizee; meta-training; the comparison; the report."""
    parser = make_parser()
    args = parse(parser, argv)
    check(args, parser)
    device, dtype = set_up(args)
    team = join_team()
    loaded = team.first_then_others(partial(load_images, args.dataset, args.data_dir))
    data, test_data = (changed(args, images) for images in loaded)
    classes = loaded[0].classes
    parts = [half.to(device) for half in halves(data)]

    @cache
    def make(name: str, half: int) -> Task:
        images, labels = parts[half].images, parts[half].labels
        return make_task(name, images, labels, args.batch_size, dtype, args.norm_eps, classes)

    network, task = make_optimizer(args), make(args.optimizee, 0)
    start = network_to_dict(network)
    if args.start_from is not None:
        args.start_found = digest(json.dumps(start).encode())
    symmetries = symmetries_of(task, args.seed)
    settings = settings_of(args, MetaTrainingSettings)
    training = SteppedMetaTraining(network.to(device, dtype), task, symmetries, settings, team=team)
    for name in args.compare or []:
        make(name, 0)
    with open_run(args, "learn_to_optimize", data, team) as log:
        log.say(data.source)
        record = recordings(device, log.say)
        training.warn, training.calls.record = log.warn, record
        if args.start_from is not None and team.first:
            log.write_json(START, start)
        finished = meta_train(training, team, log)
        if not team.first:
            return
        results = save(training, data.source, log)
        test = held_out(args, test_data.to(device), dtype)
        finished = finished and compare(args, network, make, test, results, log, record)
        log.plot(plot_optimizer_run)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(OptimizerError, HypergradientError))
