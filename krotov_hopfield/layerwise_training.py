"""Trains a network of competing layers without labels, and classifiers on the layers' features.

    train, validation = split_validation((images, labels), 0.2)
    training = LayerwiseTraining(network, train, validation, (1, 2), seed=0, classes=10)
    while not training.finished:
        row = training.train_round()

A training is a list of stages: layer 1, the classifier on its features if there is to be one,
layer 2, and so on; or all layers at once, then the classifiers. A stage consists of rounds: about a
hundred batches of a layer, or one epoch of a classifier. The features that earlier layers extract
are computed once per stage and kept, if they fit into memory and the images are not augmented.

All random numbers come from generators with the key (seed, purpose, stage, epoch or batch), so that
a training can be resumed without the states of generators. Dropout and crops are drawn on the
device of the images, so that no step waits for the host; the order of the images is that of the CPU
on all devices.

With `record`, the steps of a round are replayed from recordings of several (recorded_steps.py),
from the same random numbers. What they reach is read once a round; where a layer turns out to have
needed no more within it, the round is taken again up to there.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from krotov_hopfield.errors import CompetitionError, NonFiniteError
from krotov_hopfield.network import Classifier, KrotovHopfieldNetwork
from krotov_hopfield.recipes import learning_rate
from krotov_hopfield.recorded_steps import STEPS, NotRecordedError, RecordedSteps, Recording
from krotov_hopfield.saved_networks import classifying
from krotov_hopfield.seeds import seeded_generator

Labelled = tuple[Tensor, Tensor]  # images, uint8 [N, C, H, W], and their labels, int64 [N]

CROP_PADDING = 4
FIRST_RESTART, LONGER = 10, 2  # epochs until a classifier's rate restarts; their factor afterwards
MOMENTUM = 0.9
EXTRACTED_AT_ONCE, ON_A_GPU = 256, 1024  # images
ORDER, AUGMENTATION, DROPOUT, START, SPLIT = range(5)  # the purposes of generators


def split_validation(data: Labelled, fraction: float) -> tuple[Labelled, Labelled]:
    """Training and validation images with their labels, split at random but always in the same way.

    Raises CompetitionError if one of the two would be empty.

    fraction: the share of the images that is held out for validation.
    """
    images, labels = data
    held_out = round(len(images) * fraction)
    if not 0 < held_out < len(images):
        raise CompetitionError(f"{fraction:g} of {len(images)} images leaves no image on one side: "
                               "expected a fraction between 0 and 1")  # fmt: skip
    order = torch.randperm(len(images), generator=seeded_generator(SPLIT), device="cpu")
    order = order.to(images.device)
    train, validation = order[held_out:], order[:held_out]
    return (images[train], labels[train]), (images[validation], labels[validation])


def pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as numbers in [0, 1], divided in float32 or wider, then rounded to `dtype`."""
    return images.to(torch.promote_types(dtype, torch.float32)).div_(255).to(dtype)


def crop_and_flip(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Images padded by reflection and cropped at random; with `flip`, each is mirrored at random.

    images: uint8 [B, C, H, W]; the result has the same shape and type.
    generator: on any device.
    flip: mirror each image with probability 1/2.
    """
    return cropped(images, *drawn_crops(images.shape, generator, flip))


def drawn_crops(
    shape: Sequence[int], generator: torch.Generator, flip: bool
) -> tuple[Tensor, Tensor]:
    """The rows [B, H] and the columns [B, W] of padded images that `crop_and_flip` takes.

    shape: of the images, [B, C, H, W].
    """
    count, _, height, width = shape
    place = {"device": generator.device}
    shift = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator, **place)
    rows = shift[0] + torch.arange(height, **place)
    columns = shift[1] + torch.arange(width, **place)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, **place) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return rows, columns


def cropped(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """These rows and columns of images uint8 [B, C, H, W], after their padding by reflection."""
    device = images.device
    padded = functional.pad(images.float(), (CROP_PADDING,) * 4, "reflect").to(torch.uint8)
    each = torch.arange(len(images), device=device)[:, None, None]
    rows, columns = rows.to(device)[:, :, None], columns.to(device)[:, None, :]
    return padded.permute(0, 2, 3, 1)[each, rows, columns].permute(0, 3, 1, 2)


def restarting_rate(rate: float, epoch: int) -> float:
    """The learning rate in an epoch: a cosine from `rate` to 0 over 10 epochs, then 20 and so on.

    Source: Loshchilov, Hutter 2017, SGDR, equation 5.
    """
    length = FIRST_RESTART
    while epoch >= length:
        epoch, length = epoch - length, length * LONGER
    return rate * (1 + math.cos(math.pi * epoch / length)) / 2


class LayerwiseTraining:
    """The state of a training, which `train_round` advances.

    Raises CompetitionError if images or labels have another type or shape, or a batch size does not
    suit the images.

    network: on the device of the images.
    train, validation: images uint8 [N, C, H, W], with 255 for white, and labels int64 [N].
    classify_after: the numbers of the layers, counted from 1, on whose features a classifier is
        trained.
    classes: the number of classes; there need not be images of all of them.
    round_batches: the largest number of batches in a round of a layer.
    cache_bytes: the most memory that kept features may take.
    record: how steps are recorded; None: they are not.
    warn: called with the reason why they cannot be, before they are taken one by one.

    Attributes:
        reached: for each layer's number, its convergence after its last batch.
        outcomes: for each finished classifier, by the number of layers before it, a dict of its
            best epoch by validation accuracy: epoch, train_accuracy, validation_accuracy and state.
    """

    def __init__(
        self,
        network: KrotovHopfieldNetwork,
        train: Labelled,
        validation: Labelled,
        classify_after: Sequence[int],
        seed: int,
        *,
        classes: int,
        round_batches: int = 100,
        cache_bytes: int = 4 * 2**30,
        record: type[Recording] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.network, self.recipe = network, network.recipe
        for images, labels in (train, validation):
            _check_images(images, labels)
        self.images, self.labels = train
        self.validation, self.seed = validation, seed
        self.classes = classes
        self.round_batches, self.cache_bytes = round_batches, cache_bytes
        self.record, self.warn = record, warn
        classify_after = classify_after if self.recipe.classifier_epochs else ()
        self._check_batch_sizes(classify_after)
        self.stages = stages_of(len(network.blocks), classify_after, self.recipe.together)
        self.stage, self.outcomes, self.reached = 0, {}, {}
        self._order, self._order_of = None, None  # the order of the images, and its stage and epoch
        self._kept: dict[tuple[int, bool], Tensor | None] = {}
        self._begin_stage()

    def _check_batch_sizes(self, classify_after: Sequence[int]) -> None:
        """Raises CompetitionError if a batch exceeds the data or a classifier's has no variance."""
        count, of_classifier = len(self.images), self.recipe.classifier_batch_size
        for size in (self.recipe.batch_size, of_classifier if classify_after else 0):
            if size > count:
                raise CompetitionError(f"batch size {size} is above {count}, the training images")
        alone = of_classifier == 1 and self.recipe.feature_norm == "batch"
        for depth in classify_after if alone else ():
            if self._features(self.images[:1], depth)[0, 0].numel() == 1:
                raise CompetitionError(
                    f"a classifier's batch of one image has no variance behind layer {depth}, a "
                    "number for each unit: take at least 2"
                )

    @property
    def finished(self) -> bool:
        return self.stage == len(self.stages)

    @property
    def rounds(self) -> int:
        """The largest possible number of rounds."""
        of_layers = math.ceil(self._batches / self.round_batches)
        return sum(
            self.recipe.classifier_epochs if kind == "classifier" else max(1, of_layers)
            for kind, _ in self.stages
        )

    @property
    def batch_size(self) -> int:
        """Images in a batch of this stage."""
        of_classifier = self.stages[self.stage][0] == "classifier"
        return self.recipe.classifier_batch_size if of_classifier else self.recipe.batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch of this stage; an incomplete last batch is dropped."""
        return len(self.images) // self.batch_size

    def _begin_stage(self) -> None:
        self.done = 0  # batches of layers, epochs of a classifier
        self.convergence = [math.inf] * len(self.network.blocks)  # of each layer, if it is judged
        self.closest = list(self.convergence)
        self.without_progress = 0
        self.counted = [0] * len(self.network.blocks)  # batches that count in the schedules
        self.classifier = self.best = None
        self.velocities: list[Tensor] = []  # of the classifier's parameters
        self._kept = {}
        self._steps: RecordedSteps | None = None  # of this stage, once they have been recorded
        if self.finished:
            return
        kind, layers = self.stages[self.stage]
        if kind == "classifier":
            self.classifier = self._make_classifier(layers[0])
            # not torch.optim.SGD, which takes seconds to import torch's compiler
            self.velocities = [torch.zeros_like(p) for p in self.classifier.parameters()]

    def _make_classifier(self, depth: int) -> Classifier:
        """A new classifier for the features of the first `depth` layers."""
        shape = self._features(self.images[:1], depth).shape[1:]
        classifier = Classifier(
            shape, self.classes, self.recipe.dropout, seeded_generator(self.seed, START, depth),
            feature_norm=self.recipe.feature_norm, dtype=next(self.network.parameters()).dtype,
        )  # fmt: skip
        return classifier.to(self.images.device)

    def train_round(self) -> dict[str, float]:
        """Train for one round and return its numbers, NaN if they don't belong to this stage.

        layer: the layer that learned, 0 for several at once; for a classifier, the last before it.
        classifier: whether a classifier was trained.
        epoch: how many epochs are done.
        learning_rate: of the round's last batch, for the first of the layers that learned.
        convergence/<layer>: after the last batch.
        loss, train_accuracy: of a classifier, means over the epoch's batches, before each step.
        validation_accuracy: of a classifier, after the epoch.
        seconds: the time that the round took.

        Raises NonFiniteError if a convergence or the loss is not finite.
        """
        begin = time.perf_counter()
        kind, layers = self.stages[self.stage]
        if kind == "classifier":
            numbers = self._train_classifier(layers[0])
        else:
            numbers = self._train_layers(layers)
        names = [f"convergence/{k}" for k in range(1, len(self.network.blocks) + 1)]
        names = ["epoch", "learning_rate", *names, "loss", "train_accuracy", "validation_accuracy"]
        row = {"layer": layers[0] if len(layers) == 1 else 0, "classifier": kind == "classifier"}
        row |= {name: numbers.get(name, math.nan) for name in names}
        if self._stage_is_over():
            self.stage += 1
            self._begin_stage()
        return row | {"seconds": time.perf_counter() - begin}

    def _stage_is_over(self) -> bool:
        kind, layers = self.stages[self.stage]
        if kind == "classifier":
            over = self.done >= self.recipe.classifier_epochs
            if over:
                self.outcomes[layers[0]] = self.best
            return over
        return self.done >= self._batches or self._need_no_more(layers)

    def _need_no_more(self, layers: Sequence[int]) -> bool:
        """Whether the patience with these layers is exhausted, or all of them are at rest."""
        recipe, idle = self.recipe, self.without_progress
        at_rest = all(self.convergence[k - 1] < recipe.threshold for k in layers)
        epochs = idle / self.batches_per_epoch
        return at_rest or 0 < recipe.patience <= idle or 0 < recipe.patience_epochs <= epochs

    # ---- layers ----

    @property
    def _batches(self) -> int:
        """The largest number of batches that a layer learns from."""
        return round(self.recipe.epochs * (len(self.images) // self.recipe.batch_size))

    @property
    def _judged(self) -> bool:
        """Whether the next batch depends on the convergence after this one."""
        recipe = self.recipe
        ends = recipe.patience or recipe.patience_epochs or recipe.threshold
        return bool(ends or recipe.rate_waits_above)

    def _train_layers(self, layers: Sequence[int]) -> dict[str, float]:
        last = min(self.done + self.round_batches, self._batches)
        rate, values = self._recorded_or_not(self._replay_layers, self._step_layers, layers, last)
        if not values:
            return {"epoch": 0.0}
        self._check_finite(layers, values)
        self.reached |= dict(zip(layers, values[-1], strict=True))
        numbers = {"epoch": self.done / self.batches_per_epoch, "learning_rate": rate}
        return numbers | {f"convergence/{k}": self.reached[k] for k in layers}

    def _recorded_or_not(self, recorded: Callable, one_by_one: Callable, *arguments):
        """The result of the first, or of the second if steps are not, or cannot be, recorded."""
        if self.record is not None:
            try:
                return recorded(*arguments)
            except NotRecordedError as problem:
                self.warn(f"steps are not replayed as a recording: {problem}")
                self.record = self._steps = None
        return one_by_one(*arguments)

    def _step_layers(self, layers: Sequence[int], last: int) -> tuple[float, list[list[float]]]:
        """Train until batch `last`, or until layers need no more.

        Returns the first layer's last learning rate, and the convergences [layers] of each batch.
        """
        rows, rate = [], math.nan
        while self.done < last and not self._need_no_more(layers):
            rate = self._rate(layers[0])
            rows.append(self._step(layers, self.done))
            self.done += 1
            if self._judged:  # reading the convergence after each batch waits for the device
                self._judge(layers, rows[-1].tolist())
            self._count(layers)
        return rate, torch.stack(rows).tolist() if rows else []

    def _replay_layers(self, layers: Sequence[int], last: int) -> tuple[float, list[list[float]]]:
        """The same by recorded steps, whose convergences are read for several of them at once."""
        if self._steps is None:
            self._keep(layers[0] - 1, validation=False)  # not within a recording
            state = [t for k in layers for t in _state_of(self.network.blocks[k - 1].layer)]
            self._steps = RecordedSteps(
                lambda rates, *drawn: self._learn(layers, rates, *drawn), state, self.record
            )
        rows, rate = [], math.nan
        while self.done < last and not self._need_no_more(layers):
            count = last - self.done
            if self.recipe.rate_waits_above:
                count = min(count, STEPS)
            taken, values = self._replay_ahead(layers, count)
            rate, rows = taken[-1][0], rows + values
        return rate, rows

    def _replay_ahead(
        self, layers: Sequence[int], count: int
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Take at most so many steps; returns the rates and the convergences [layers] of each.

        They are taken as if layers went on counting batches, or not, as they do now, and never
        needed no more. Where that turns out wrong, they are taken again up to there.
        """
        before = self._steps.copies() if self._judged else None
        first, counted, waiting = self.done, list(self.counted), self._waiting(layers)
        rates = []
        for _ in range(count):
            rates.append([self._rate(k) for k in layers])
            self._count(layers)
        ahead, self.counted = self.counted, counted
        place = {"dtype": next(self.network.parameters()).dtype, "device": self.images.device}
        on_device = torch.tensor(rates, **place)

        def batch(k: int) -> list[Tensor]:
            return [on_device[k], *self._drawn(first + k)]

        values = self._steps(count, batch)
        if not self._judged:
            self.done, self.counted = first + count, ahead
            return rates, values.tolist()
        values = values.tolist()
        for row in values:
            self.done += 1
            self._judge(layers, row)
            self._count(layers)
            if self._need_no_more(layers) or self._waiting(layers) != waiting:
                break
        valid = self.done - first
        if valid < count:
            self._steps.put_back(before)
            self._steps(valid, batch)
        return rates[:valid], values[:valid]

    def _rate(self, layer: int) -> float:
        """The learning rate of a layer's next batch."""
        epochs = self.counted[layer - 1] / self.batches_per_epoch
        return learning_rate(self.recipe.layers[layer - 1], self.recipe, epochs)

    def _waiting(self, layers: Sequence[int]) -> list[bool]:
        """Whether the convergence of each layer is too large for its schedule to advance."""
        limit = self.recipe.rate_waits_above
        return [limit > 0 and not self.convergence[k - 1] < limit for k in layers]

    def _count(self, layers: Sequence[int]) -> None:
        """Advance the schedule of each layer by a batch, unless its convergence is too large."""
        for k, waiting in zip(layers, self._waiting(layers), strict=True):
            self.counted[k - 1] += not waiting

    def _step(self, layers: Sequence[int], batch: int) -> Tensor:
        """Update these layers from the batch with this number; returns convergences [layers]."""
        return self._learn(layers, [self._rate(k) for k in layers], *self._drawn(batch))

    @torch.no_grad()
    def _learn(
        self, layers: Sequence[int], rates: Sequence[float] | Tensor, *drawn: Tensor
    ) -> Tensor:
        """Update layers at their rates from a batch of `_drawn`; returns convergences [layers]."""
        x = self._inputs(layers[0] - 1, *drawn)
        reached = []
        for k, rate in zip(layers, rates, strict=True):
            block = self.network.blocks[k - 1]
            reached.append(block.layer.training_step(x, rate))
            if k != layers[-1]:
                x = block(x)
        return torch.stack(reached)

    def _judge(self, layers: Sequence[int], row: Sequence[float]) -> None:
        """Record the layers' convergence, and whether it is a new minimum for any of them."""
        self._check_finite(layers, [row])
        closer = [value < self.closest[k - 1] for k, value in zip(layers, row, strict=True)]
        self.without_progress = 0 if any(closer) else self.without_progress + 1
        for k, value in zip(layers, row, strict=True):
            self.convergence[k - 1] = value
            self.closest[k - 1] = min(self.closest[k - 1], value)

    def _check_finite(self, layers: Sequence[int], rows: Sequence[Sequence[float]]) -> None:
        """Raises NonFiniteError if a convergence isn't finite; `rows` has one row per batch."""
        for row in rows:
            if not all(map(math.isfinite, row)):
                raise NonFiniteError(
                    f"layers {list(layers)} diverged: convergence {row} within the {self.done} "
                    "batches so far; take a smaller learning rate, lebesgue_p or delta"
                )

    # ---- classifiers ----

    def _train_classifier(self, depth: int) -> dict[str, float]:
        """Train a classifier for one epoch and return its numbers."""
        rate = restarting_rate(self.recipe.classifier_lr, self.done)
        self.classifier.train()
        loss, right = self._recorded_or_not(
            self._replay_classifier, self._step_classifier, depth, rate
        )
        self.done += 1
        numbers = {
            "epoch": self.done,
            "learning_rate": rate,
            "loss": loss,
            "train_accuracy": right,
            "validation_accuracy": self._accuracy(self.classifier, *self.validation, depth),
        }
        if not math.isfinite(numbers["loss"]):
            raise NonFiniteError(f"the classifier's loss is not finite in epoch {self.done}")
        if self.best is None or numbers["validation_accuracy"] > self.best["validation_accuracy"]:
            state = {name: t.clone() for name, t in self.classifier.state_dict().items()}
            kept = ("epoch", "train_accuracy", "validation_accuracy")
            self.best = {name: numbers[name] for name in kept} | {"state": state}
        return numbers

    def _step_classifier(self, depth: int, rate: float) -> tuple[float, float]:
        """Train for an epoch; returns the means of loss and accuracy over its batches."""
        losses, accuracies = [], []
        first = self.done * self.batches_per_epoch
        for batch in range(first, first + self.batches_per_epoch):
            drawn = *self._drawn(batch), *self._dropout(batch)
            loss, accuracy = self._descend(depth, rate, *drawn)
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()

    def _replay_classifier(self, depth: int, rate: float) -> tuple[float, float]:
        """The same by recorded steps."""
        if self._steps is None:
            self._keep(depth, validation=False)  # not within a recording
            self._steps = self._recorded_classifier(depth)
        weight, first = self.classifier.linear.weight, self.done * self.batches_per_epoch
        on_device = torch.full((), rate, dtype=weight.dtype, device=weight.device)

        def batch(k: int) -> list[Tensor]:
            return [on_device, *self._drawn(first + k), *self._dropout(first + k)]

        return tuple(self._steps(self.batches_per_epoch, batch).mean(0).tolist())

    def _recorded_classifier(self, depth: int) -> RecordedSteps:
        """The classifier's steps, which give loss and accuracy, in float64."""

        def step(*drawn: Tensor) -> Tensor:
            return torch.stack([t.double() for t in self._descend(depth, *drawn)])

        return RecordedSteps(step, [*_state_of(self.classifier), *self.velocities], self.record)

    def _descend(self, depth: int, rate: float | Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """A step of SGD with momentum; returns loss and accuracy before it."""
        loss, accuracy = self._classify(depth, *drawn)
        parameters = list(self.classifier.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for w, v, g in zip(parameters, self.velocities, gradients, strict=True):
                v.mul_(MOMENTUM).add_(g)
                if isinstance(rate, Tensor):
                    w.addcmul_(v, -rate)
                else:
                    w.add_(v, alpha=-rate)
        return loss.detach(), accuracy

    def _classify(self, depth: int, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and, in float64, the accuracy on a batch of `_drawn` and `_dropout`."""
        places, uniform = (drawn[:-1], drawn[-1]) if self.classifier.dropout else (drawn, None)
        labels = self.labels[places[0]]
        logits = self.classifier.logits(self._inputs(depth, *places), uniform)
        accuracy = (logits.argmax(1) == labels).double().mean()
        return functional.cross_entropy(logits, labels), accuracy

    def _dropout(self, batch: int) -> list[Tensor]:
        """The uniform numbers of a batch that decide what is dropped, if anything is."""
        if not self.classifier.dropout:
            return []
        generator = self._on_device(DROPOUT, batch)
        return [self.classifier.uniform(self.batch_size, generator)]

    def test_accuracy(self, depth: int, images: Tensor, labels: Tensor) -> float:
        """The accuracy, in [0, 1], of the best state of the classifier on `depth` layers.

        images: uint8 [N, C, H, W].
        labels: int64 [N].
        """
        return self._accuracy(self._best_classifier(depth), images, labels, depth)

    def classifying_network(self, depth: int) -> nn.Sequential:
        """The first `depth` layers followed by the best state of their classifier."""
        return classifying(self.network, self._best_classifier(depth), depth)

    def _best_classifier(self, depth: int) -> Classifier:
        classifier = self._make_classifier(depth)
        classifier.load_state_dict(self.outcomes[depth]["state"])
        return classifier

    @torch.no_grad()
    def _accuracy(self, classifier: nn.Module, images: Tensor, labels: Tensor, depth: int) -> float:
        classifier.eval()
        kept = self._keep(depth, validation=True) if images is self.validation[0] else None
        right = 0
        for rows in torch.arange(len(images), device=images.device).split(self._at_once):
            x = self._features(images[rows], depth) if kept is None else chosen(kept, rows)
            right += (classifier(x).argmax(1) == labels[rows]).sum()
        return int(right) / len(images)

    # ---- batches and features ----

    def _index(self, batch: int) -> Tensor:
        """The indices of the images in a batch of this stage, int64 [batch]."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        if self._order_of != (self.stage, epoch):
            generator = seeded_generator(self.seed, ORDER, self.stage, epoch)
            order = torch.randperm(len(self.images), generator=generator, device="cpu")
            self._order, self._order_of = order.to(self.images.device), (self.stage, epoch)
        size = self.batch_size
        return self._order[place * size : (place + 1) * size]

    def _on_device(self, purpose: int, batch: int) -> torch.Generator:
        """The generator of a batch of this stage, on the device of the images."""
        seed = seeded_generator(self.seed, purpose, self.stage, batch).initial_seed()
        return torch.Generator(self.images.device).manual_seed(seed)

    @property
    def _at_once(self) -> int:
        """How many images features are extracted from, or judged, at once."""
        return ON_A_GPU if self.images.is_cuda else EXTRACTED_AT_ONCE

    def _drawn(self, batch: int) -> list[Tensor]:
        """What determines the images of a batch of this stage: their indices, and their crops."""
        index, augmentation = self._index(batch), self.recipe.augmentation
        if augmentation == "none":
            return [index]
        generator, shape = self._on_device(AUGMENTATION, batch), self.images.shape[1:]
        return [index, *drawn_crops((len(index), *shape), generator, augmentation == "flip")]

    @torch.no_grad()
    def _inputs(self, depth: int, index: Tensor, *crops: Tensor) -> Tensor:
        """The first `depth` layers' features of a batch of training images, from `_drawn`."""
        if not crops:
            kept = self._keep(depth, validation=False)
            if kept is not None:
                return chosen(kept, index)
            return self._features(self.images[index], depth)
        return self._features(cropped(self.images.index_select(0, index), *crops), depth)

    @torch.no_grad()
    def _features(self, images: Tensor, depth: int) -> Tensor:
        """The first `depth` layers' features of images, [N, units] or [N, channels, H, W]."""
        x = self.network.prepared(pixels(images, next(self.network.parameters()).dtype))
        for block in self.network.blocks[:depth]:
            x = block(x)
        return x

    def _keep(self, depth: int, *, validation: bool) -> Tensor | None:
        """Features of all training or validation images, channels last; None if not kept."""
        images = self.validation[0] if validation else self.images
        if depth == 0:
            return None
        if (depth, validation) not in self._kept:
            self._kept[depth, validation] = self._all_features(images, depth)
        return self._kept[depth, validation]

    def _all_features(self, images: Tensor, depth: int) -> Tensor | None:
        """Features of all these images, channels last; None if there is no room to keep them."""
        one = self._features(images[:1], depth)
        plain = self.recipe.augmentation == "none"
        training = len(self.images) if plain else 0  # or never kept
        size = one.numel() * one.element_size() * (training + len(self.validation[0]))
        if size > self.cache_bytes:
            return None
        kept = one.movedim(1, -1).new_empty(len(images), *one.movedim(1, -1).shape[1:])
        for first in range(0, len(images), self._at_once):
            part = slice(first, min(first + self._at_once, len(images)))
            kept[part] = self._features(images[part], depth).movedim(1, -1)
        return kept

    # ---- state ----

    def state_dict(self) -> dict:
        """A copy of everything that a resumed training needs, in plain containers of tensors."""
        busy = self.classifier is not None
        return copy.deepcopy({
            "stage": self.stage,
            "done": self.done,
            "closest": self.closest,
            "without_progress": self.without_progress,
            "counted": self.counted,
            "reached": self.reached,
            "network": self.network.state_dict(),
            "classifier": self.classifier.state_dict() if busy else None,
            "velocities": self.velocities,
            "best": self.best,
            "outcomes": self.outcomes,
        })  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Resume a training from the result of `state_dict`, which is copied."""
        state = copy.deepcopy(state)
        self.network.load_state_dict(state["network"])
        self.stage, self.outcomes = state["stage"], state["outcomes"]
        self._begin_stage()
        self.done, self.best = state["done"], state["best"]
        self.closest, self.without_progress = state["closest"], state["without_progress"]
        self.counted, self.reached = state["counted"], state["reached"]
        if self.classifier is not None:
            self.classifier.load_state_dict(state["classifier"])
            for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
                velocity.copy_(saved)


def _state_of(module: nn.Module) -> list[Tensor]:
    """All tensors of a module that its training changes in place."""
    return [*module.parameters(), *module.buffers()]


def _check_images(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise CompetitionError(
            f"images must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise CompetitionError(
            f"labels must be int64 [{len(images)}], one for each image, not {labels.dtype} "
            f"{list(labels.shape)}"
        )


def stages_of(
    layers: int, classify_after: Sequence[int], together: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """The stages in order: ("layers", those that learn) and ("classifier", (layers before it,))."""
    numbers = range(1, layers + 1)
    if together:
        behind = [("classifier", (k,)) for k in numbers if k in classify_after]
        return [("layers", tuple(numbers)), *behind]
    stages = []
    for k in numbers:
        stages.append(("layers", (k,)))
        if k in classify_after:
            stages.append(("classifier", (k,)))
    return stages


def chosen(kept: Tensor, index: Tensor) -> Tensor:
    """Rows of features that are stored with channels last, as [batch, channels, ...]."""
    return kept.index_select(0, index).movedim(-1, 1)
