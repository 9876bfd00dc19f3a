"""Baseline: a sigmoid network trained by backpropagation so that views of an image agree (VICReg).

    python baseline_vicreg.py                          784-256-32
    python baseline_vicreg.py 32                       784-32
    python baseline_vicreg.py --resume runs/baseline_vicreg-...

It learns from pairs of augmented views, without labels; a linear probe on the features of the
unchanged images measures how useful they have become. Local rules are compared with this: it has
the same pairs and the same probe, but a loss and its exact gradient.
"""

import math

from comparison.settings import VICRegSettings
from experiment.choices import HOST, RANDOM_NUMBERS
from experiment.command_line import (
    common_parser,
    nonnegative_int,
    parse,
    positive_float,
    positive_int,
    run_command,
)
from experiment.settings import add_settings, settings_of
from experiment.view_flags import OF_GEOMETRIC
from experiment.view_strengths import ViewStrengths


def make_parser():
    """The command's flags."""
    parser = common_parser("Train a network by VICReg on augmented pairs.", "baseline_vicreg")
    parser.add_argument(
        "layers", type=positive_int, nargs="*", default=[256, 32], help="units of each layer"
    )
    group = parser.add_argument_group("training and loss")
    add_settings(group, VICRegSettings)
    add_settings(parser.add_argument_group("views"), ViewStrengths, OF_GEOMETRIC)
    add = group.add_argument
    add("--random_numbers", choices=RANDOM_NUMBERS, default=HOST,
        help="where random numbers of views are made")  # fmt: skip
    add("--pixelwise_normalization", action="store_true",
        help="give each pixel mean 0 and variance 1")  # fmt: skip
    add = parser.add_argument_group("probe").add_argument
    add("--C", type=positive_float, default=1e6, help="inverse strength of the probe's penalty")
    add("--probe_every", type=nonnegative_int, default=10, metavar="EPOCHS",
        help="epochs between two probes of the features during training; 0: none")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import torch

from comparison.vicreg import VICReg
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from figures.baselines import plot_vicreg_run
from kernels.recorded_training import recordings
from linear_probe import linear_probe
from mnist_datasets import load_images, normalize_pixels
from models_fully_local import Activation, lateral_mlp
from train import detached

ACCURACIES = ("train_accuracy", "test_accuracy")
NOT_PROBED = dict.fromkeys(ACCURACIES, math.nan)


def make_training(args, data, dtype: torch.dtype) -> VICReg:
    """The untrained network and its optimiser."""
    sizes = math.prod(data.shape), args.layers
    network = lateral_mlp(*sizes, Activation("sigmoid"), inhibition="none")
    settings = settings_of(args, VICRegSettings)
    return VICReg(
        network, data, args.seed, settings, views=settings_of(args, ViewStrengths),
        dtype=dtype, random_numbers=args.random_numbers,
    )  # fmt: skip


def probe(training: VICReg, test_data, C: float) -> dict[str, float]:
    """The accuracies, in [0, 1], of a linear probe on the features of the unchanged images."""
    result = linear_probe(training.model, detached(training.params), training.data, test_data, C)
    return {name: getattr(result, name) for name in ACCURACIES}


class ProbedTraining:
    """VICReg's epochs, with a probe every few epochs and after the last; see `run_steps`."""

    def __init__(self, args, training: VICReg, test_data) -> None:
        self.args, self.training, self.test_data = args, training, test_data

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.training.epoch >= self.args.epochs

    def step(self) -> dict[str, float]:
        """Train for one epoch; returns its numbers and those of the probe, NaN if none was due."""
        row, every = self.training.train_epoch(), self.args.probe_every
        due = every and (self.finished or self.training.epoch % every == 0)
        return row | (probe(self.training, self.test_data, self.args.C) if due else NOT_PROBED)

    def state_dict(self) -> dict:
        """The state of the training."""
        return self.training.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Resume the training from the result of `state_dict`."""
        self.training.load_state_dict(state)


def report(args, training: VICReg, test_data, log: RunLog) -> None:
    """Print the accuracy; write parameters, results and figures."""
    accuracies = probe(training, test_data, args.C)
    log.write_parameters(training.params, training.data.shape)
    results = {"data": training.data.source, "epochs": training.epoch, **accuracies}
    log.write_results(results)
    log.plot(plot_vicreg_run)
    log.say(
        f"test accuracy {accuracies['test_accuracy']:.2%}, training accuracy "
        f"{accuracies['train_accuracy']:.2%} after {training.epoch} epochs"
    )


def main(argv: list[str] | None = None) -> None:
    """Data; network, optimiser and loss; the loop over epochs; the report."""
    args = parse(make_parser(), argv)
    device, dtype = set_up(args)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    if args.pixelwise_normalization:
        train_data, test_data = normalize_pixels(train_data, test_data)
    training = make_training(args, train_data, dtype)
    with open_run(args, "baseline_vicreg", train_data) as log:
        log.say(train_data.source)
        training.record = recordings(device, log.say)
        probed = ProbedTraining(args, training, test_data)
        finished = run_steps(log, probed, "epoch", args.epochs)
        report(args, training, test_data, log)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
