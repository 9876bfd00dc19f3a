"""Learned rules, classical rules and references side by side, on any images and layer sizes.

A method turns a setting (images, layer sizes, a probe) into a Training (a network, a rule, initial
parameters, batches). It is trained from several draws, and the probe judges it after each of
several numbers of steps. What a method needs beyond its setting (the rate of a classical rule) is
chosen on training images alone. Layers of a learned rule are extended to networks of any depth by

    rule of layer k, in a network of any depth = learned rule of layer min(k, depth when learned)
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from comparison.learned_run import LearnedRun
from comparison.principal_components import principal_components, projection
from comparison.settings import VICRegSettings
from comparison.supervised import supervised_parameters
from comparison.vicreg import VICReg
from data_sets.class_pairs import ClassPairs
from data_sets.views import Views
from experiment.checkpoints import taking_up_state
from experiment.loop import finish_on_interrupt
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, SELECTION
from initializers import GaussianInitializer, fixed_initializer
from kernels.recorded_training import recordings
from learning_rules import LearningRule, PerLayerRule
from linear_probe import ProbeLoss
from mnist_datasets import ImageData, augment, batches, normalize_pixels
from models_fully_local import Activation, Params, has_weights, lateral_network, network_of_flags
from rules.classical import CLASSICAL
from rules.layerwise import LayerwiseRule, LayerwiseTraining, image_inputs
from train import Draw, Training, detached, evaluate_on_the_way

RATES = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))  # for the classical rules
HELD_OUT = 6  # one in so many training images is held out to choose a rate
VICREG = VICRegSettings()
ROTATION = 45.0  # degrees, in either direction

Row = dict[str, Any]


# ---- settings and methods ----


@dataclass(frozen=True)
class Setting:
    """Images, the sizes of a network's layers, and the probe that judges what it has learned.

    train, test: images without normalisation, because each method normalises them in its way.
    layers: units of each layer.
    C, outer_images: as in linear_probe.py.
    batch_size: for methods that don't specify one.
    layerwise: whether layers are trained one after the other, each for all steps; otherwise a rule
        is applied as it was learned.
    held_out: whether the test images are training images, held out to choose a rate.
    """

    dataset: str
    train: ImageData
    test: ImageData
    layers: tuple[int, ...]
    C: float
    outer_images: int
    batch_size: int
    dtype: torch.dtype = torch.float32
    layerwise: bool = False
    held_out: bool = False

    def within_training(self) -> "Setting":
        """The setting in which the last training images take the place of the test images.

        Batches have at most as many images as remain.
        """
        kept = len(self.train) - len(self.train) // HELD_OUT
        train, test = (self.train.subset(part) for part in (slice(kept), slice(kept, None)))
        batch_size = min(self.batch_size, kept)
        return replace(self, train=train, test=test, batch_size=batch_size, held_out=True)

    def probe(self, images: tuple[ImageData, ImageData]) -> ProbeLoss:
        """The probe on training and test images as a method has normalised them."""
        return ProbeLoss(*images, self.C, outer_images=self.outer_images)


@dataclass(frozen=True)
class Method:
    """A method: its training in a setting, and the rates that it chooses from.

    enter: enter(setting) or, if there are rates, enter(setting, rate) returns the training.
    has_steps: whether a rule trains the network; otherwise its initial parameters are judged.
    """

    enter: Callable[..., Training]
    rates: tuple[float, ...] = ()
    has_steps: bool = True


# ---- learned rules ----


def learned(run: LearnedRun, setting: Setting) -> Training:
    """The training by a learned rule, with its run's network, start, normalisation and batches.

    With fewer images than its run's batches have, all of them are a batch.
    """
    images = setting.train, setting.test
    if run.config["pixelwise_normalization"] or run.config.get("center"):
        images = normalize_pixels(*images, unit_variance=run.config["pixelwise_normalization"])
    layerwise = setting.layerwise or run.config.get("layerwise", False)
    flags = run.config | {"layerwise": layerwise}
    model = network_of_flags(flags, setting.train.shape, setting.layers)
    plastic = sum(has_weights(layer.parameter_shapes()) for layer in model.layers)
    rules = [run.rule.rules[min(k, len(run.rule.rules) - 1)] for k in range(plastic)]
    batch_size, dtype = min(run.config["batch_size"], len(images[0])), setting.dtype
    if run.views is None:
        draw_batches = partial(batches, images[0], batch_size, dtype=dtype)
    else:
        draw_batches = Views(images[0], batch_size, run.views, dtype=dtype)
    initializer = fixed_initializer(run.start)
    if not layerwise:
        rule = PerLayerRule(rules)
        return _training(model, rule, initializer, draw_batches, setting, images)
    below = () if setting.layerwise else run.config["steps_below"]
    below = below if len(below) == plastic - 1 else ()
    rule = LayerwiseRule(rules)
    return _training(model, rule, initializer, draw_batches, setting, images, below)


def _training(
    model: nn.Module,
    rule: LearningRule,
    initializer: nn.Module,
    draw_batches: Callable[[torch.Generator], Iterator],
    setting: Setting,
    images: tuple[ImageData, ImageData],
    steps_below: Sequence[int] = (),
) -> Training:
    """A training on normalised images, layer by layer if the rule is a LayerwiseRule."""
    place = (images[0].images.device, setting.dtype)
    parts = (model, rule.to(*place), initializer.to(*place), draw_batches, setting.probe(images))
    if not isinstance(rule, LayerwiseRule):
        return Training(*parts)
    inputs = image_inputs(images[0], setting.dtype)
    return LayerwiseTraining(*parts, inputs=inputs, steps_below=steps_below)


# ---- classical rules ----


def classical(name: str, setting: Setting, rate: float) -> Training:
    """The training by a classical rule in its own kind of network, on pixel-centred images."""
    chosen = CLASSICAL[name]
    images = normalize_pixels(setting.train, setting.test, unit_variance=False)
    options = chosen.network | {"centred_layers": setting.layerwise}
    model = lateral_network(setting.train.shape, setting.layers, **options)
    rule = chosen.make_rule(rate)
    if setting.layerwise:
        rule = LayerwiseRule([rule] * len(setting.layers))
    initializer = GaussianInitializer.with_values(chosen.start)
    draw_batches = partial(batches, images[0], setting.batch_size, dtype=setting.dtype)
    return _training(model, rule, initializer, draw_batches, setting, images)


# ---- references ----


def reference_methods(run: LearnedRun) -> dict[str, Method]:
    """The references for a learned rule; random features are its run's network, untrained."""
    return {
        "random": Method(partial(learned, run), has_steps=False),
        "pca": Method(pca_features, has_steps=False),
        "vicreg": Method(vicreg_features, has_steps=False),
        "class_pairs": Method(partial(by_class_pairs, run)),
        "supervised": Method(supervised_features, has_steps=False),
    }


def by_class_pairs(run: LearnedRun, setting: Setting) -> Training:
    """The training by a learned rule of pairs, each of two images of one class."""
    training = learned(run, setting)
    return replace(training, batches=ClassPairs(training.batches))


def pca_features(setting: Setting) -> Training:
    """As many principal components as the last layer has units, or as there are pixels if fewer."""
    principal = principal_components(setting.train)
    count = min(setting.layers[-1], len(principal.components))
    model, params = projection(principal, count, setting.dtype)
    return _without_steps(model, lambda model, generator: params, setting)


def vicreg_features(setting: Setting) -> Training:
    """Sigmoid units trained with VICReg by backpropagation, whatever the setting's steps."""

    def trained(model: nn.Module, generator: torch.Generator) -> Params:
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        device = setting.train.images.device
        settings = replace(VICREG, batch_size=min(VICREG.batch_size, len(setting.train)))
        training = VICReg(model, setting.train, seed, settings, dtype=setting.dtype)
        training.record = recordings(device, warnings.warn)
        while training.epoch < VICREG.epochs:
            training.train_epoch()
        return detached(training.params)

    model = lateral_network(
        setting.train.shape, setting.layers, Activation("sigmoid"), inhibition="none"
    )
    return _without_steps(model, trained, setting)


def supervised_features(setting: Setting) -> Training:
    """Units sigmoid(4 s) trained with labels by backpropagation, whatever the setting's steps."""

    def trained(model: nn.Module, generator: torch.Generator) -> Params:
        return supervised_parameters(model, setting.train, generator, setting.dtype)

    model = lateral_network(
        setting.train.shape, setting.layers, Activation("sigmoid", 4.0), inhibition="none"
    )
    return _without_steps(model, trained, setting)


def _without_steps(
    model: nn.Module, initial: Callable[[nn.Module, torch.Generator], Params], setting: Setting
) -> Training:
    probe = setting.probe((setting.train, setting.test))
    return Training(model, LearningRule(), initial, lambda generator: iter(()), probe)


# ---- images ----


def rotated(data: ImageData, generator: torch.Generator, degrees: float = ROTATION) -> ImageData:
    """The images, each rotated by its own angle, uniform in [-degrees, degrees]."""
    turn = partial(
        augment, generator=generator, padding=0, degrees=degrees, scale=(1.0, 1.0),
        ratio=(1.0, 1.0), brightness=0.0, contrast=0.0,
    )  # fmt: skip
    turned = [turn(images).mul_(255).round_().byte() for images in data.images.split(4096)]
    source = f"{data.source}, each rotated by up to {degrees:g} degrees"
    return replace(data, images=torch.cat(turned), source=source)


# ---- training and judging ----


def trajectory(
    training: Training, steps: Sequence[int], key: tuple[int, ...]
) -> list[dict[str, float]]:
    """The outer loss and its metrics after each of `steps` (increasing) of one training.

    They are what `evaluate_training` returns for the same key and as many steps, and nan once the
    parameters or the loss are no longer finite. If the layers below the last train for as many
    steps as the last, each number of steps needs a separate training.
    """
    rows = []
    below = isinstance(training, LayerwiseTraining) and training.follows_the_draw
    with suppress(FloatingPointError):  # the missing rows are filled with nan below
        for together in [[count] for count in steps] if below else [steps]:
            for numbers, _ in evaluate_on_the_way(training, Draw(key, together[-1]), together):
                rows.append(numbers)
    nothing = dict.fromkeys(("meta_loss", *training.outer_loss.metrics), math.nan)
    return rows + [nothing] * (len(steps) - len(rows))


class RuleComparison:
    """All trainings of all methods in all settings; `run` makes those that have no rows yet.

    The key of a draw is (seed, EVALUATION, number), as in main.py, so that no training depends on
    another. All rates of a search share the key (seed, SELECTION, 0).

    rows: one for each number of steps of each training (only the last in the search for a rate), in
        the order of the trainings, with method, dataset, layers, held_out, rate, draw, inner_steps
        (0: nothing was trained), meta_loss, train_accuracy, test_accuracy.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        settings: Sequence[Setting],
        steps: Sequence[int],
        draws: int,
        seed: int,
        rows: Sequence[Row] = (),
    ) -> None:
        self.methods, self.settings = dict(methods), list(settings)
        self.steps, self.draws, self.seed = sorted(steps), draws, seed
        self.rows = list(rows)

    @property
    def trainings(self) -> int:
        """The number of trainings in all."""
        return len(self.settings) * sum(self.draws + len(m.rates) for m in self.methods.values())

    @property
    def done(self) -> int:
        """The number of trainings that have rows."""
        return len({tuple(_name(row).values()) for row in self.rows})

    def run(self) -> Iterator[list[Row]]:
        """Run the missing trainings one by one, and yield the new rows of each."""
        for setting, (name, method) in itertools.product(self.settings, self.methods.items()):
            rate = None
            if method.rates:
                within = setting.within_training()
                for candidate in method.rates:
                    yield from self._train(name, within, candidate, 0)
                rate = self.best_rate(name, setting)
            for draw in range(self.draws):
                yield from self._train(name, setting, rate, draw)

    def _train(
        self, name: str, setting: Setting, rate: float | None, draw: int
    ) -> Iterator[list[Row]]:
        place = {
            "method": name,
            "dataset": setting.dataset,
            "layers": layers_text(setting.layers),
            "held_out": setting.held_out,
            "rate": rate,
            "draw": draw,
        }
        if any(_name(row) == place for row in self.rows):
            return
        method = self.methods[name]
        training = method.enter(setting) if rate is None else method.enter(setting, rate)
        steps, kind = self.steps if method.has_steps else [0], EVALUATION
        if setting.held_out:
            steps, kind = steps[-1:], SELECTION
        numbers = trajectory(training, steps, (self.seed, kind, draw))
        new = [
            {**place, "inner_steps": count, **row}
            for count, row in zip(steps, numbers, strict=True)
        ]
        self.rows += new
        yield new

    def best_rate(self, name: str, setting: Setting) -> float:
        """The rate with the highest accuracy on held-out training images after the last step."""
        where = {"method": name, "dataset": setting.dataset, "held_out": True}
        where["layers"] = layers_text(setting.layers)
        trials = [row for row in self.rows if where.items() <= row.items()]
        return max(trials, key=lambda row: np.nan_to_num(row["test_accuracy"]))["rate"]


NAME = ("method", "dataset", "layers", "held_out", "rate", "draw")


def _name(row: Row) -> Row:
    """The entries of a row that identify its training."""
    return {key: row[key] for key in NAME}


def layers_text(layers: Sequence[int]) -> str:
    """Layer sizes as a text such as 256-32."""
    return "-".join(map(str, layers))


def run_comparison(comparison: RuleComparison, log: RunLog) -> bool:
    """Run all trainings that are not in the log's checkpoint; return whether none is missing now.

    In metrics.csv, numbers from 0 stand for methods, data sets and layer sizes, in the order of the
    comparison.
    """
    saved = log.load_checkpoint()
    if saved is not None:
        with taking_up_state():
            comparison.rows = saved[1]["rows"]
            log.say(f"going on from training {comparison.done} of {comparison.trainings}")
    with (
        finish_on_interrupt() as interrupt,
        log.progress(comparison.trainings, comparison.done, "training") as progress,
    ):
        for new in comparison.run():
            first = len(comparison.rows) - len(new) + 1
            for number, row in enumerate(new, first):
                log.record(number, _as_numbers(comparison, row))
            log.save_checkpoint(len(comparison.rows), {"rows": comparison.rows})
            last = new[-1]
            what = f"{last['method']} {last['dataset']} {last['layers']}: test_accuracy"
            progress.advance({what: last["test_accuracy"]})
            if interrupt.requested:
                break
    return comparison.done == comparison.trainings


def _as_numbers(comparison: RuleComparison, row: Row) -> dict[str, float]:
    places = {
        "method": list(comparison.methods),
        "dataset": list(dict.fromkeys(s.dataset for s in comparison.settings)),
        "layers": list(dict.fromkeys(layers_text(s.layers) for s in comparison.settings)),
    }
    numbers = row | {key: names.index(row[key]) for key, names in places.items()}
    return numbers | {"rate": math.nan if row["rate"] is None else row["rate"]}
