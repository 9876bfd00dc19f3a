"""What else BioPyTorch offers: one layer's training on anybody's loader, and its padding.

    convergence = bio_train(layer, dataset, n_epochs=5, lr_scheduler=(0.007, 0.0001, 0.8))

Source: https://github.com/Einlar/biopytorch.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from krotov_hopfield.layers import BioConv2d, BioLinear
from krotov_hopfield.recipes import exponential_rate

RATES = (0.01, 0.003, 1.0)  # start, end and speed of the learning rate, where none is told


class TrainingData(Protocol):
    """Where batches come from, such as a LightningDataModule."""

    def train_dataloader(self) -> Iterable:
        """One pass: (inputs, anything) again and again; it has a length."""


def bio_train(
    layer: BioLinear | BioConv2d,
    dataset: TrainingData,
    prev_layers: Iterable[Callable[[Tensor], Tensor]] | None = None,
    n_epochs: int = 10,
    n_batches: int | None = None,
    patience: float = 1.0,
    lr_scheduler: float | Sequence[float] | Callable[[int], float] | None = None,
    convergence_threshold: float = 1e-2,
    epoch_callback: Callable[[Tensor], None] | None = None,
    trial: Any = None,
    run: Any = None,
    device: torch.device | str | None = None,
) -> float:
    """Trains a layer on what layers before it, which stay as they are, make of the inputs.

    n_epochs: passes at most; below 1: until one of the other ends. n_batches: so many batches, in
    place of n_epochs. patience: it ends, after an epoch, once so many epochs' batches in a row have
    not brought the convergence down. lr_scheduler: a rate; (start, end, speed) of
    `exponential_rate`, by default RATES; or a function of the number of the batch, from 0.
    convergence_threshold: it ends, after an epoch, below this. epoch_callback: gets the weights, on
    the CPU, after each epoch. trial: Optuna's; told the convergence of each batch, and raises
    optuna.TrialPruned when it should. run: of wandb, whose `log` is called alike. device: of the
    inputs, by default the layer's.

    Returns the last convergence, inf where there was no batch.
    """
    batches_per_epoch, rate = len(dataset.train_dataloader()), _rate(lr_scheduler)
    device = layer.weight.device if device is None else device
    reached = closest = math.inf
    batch = epoch = without_progress = 0
    while without_progress < patience * batches_per_epoch:
        for x, *_ in dataset.train_dataloader():
            x = x.to(device)
            for before in prev_layers or ():
                x = before(x)
            learning_rate = rate(batch, batches_per_epoch)
            reached = layer.training_step(x, learning_rate).item()
            _tell(trial, run, reached, batch)
            without_progress = 0 if reached <= closest else without_progress + 1
            closest, batch = min(closest, reached), batch + 1
            if batch == n_batches:
                break
        epoch += 1
        if epoch_callback is not None:
            epoch_callback(layer.weight.cpu())
        over = batch == n_batches if n_batches is not None else epoch == n_epochs
        if over or reached < convergence_threshold:
            break
    return reached


def _rate(
    schedule: float | Sequence[float] | Callable[[int], float] | None,
) -> Callable[[int, int], float]:
    """The learning rate of a batch, from its number and that of an epoch's batches."""
    if callable(schedule):
        return lambda batch, _: schedule(batch)
    if isinstance(schedule, int | float):
        return lambda batch, _: schedule
    start, end, speed = RATES if schedule is None else schedule
    return lambda batch, per_epoch: exponential_rate(start, end, speed, batch / per_epoch)


def _tell(trial: Any, run: Any, convergence: float, batch: int) -> None:
    if trial is not None:
        trial.report(convergence, batch)
        if trial.should_prune():
            raise sys.modules["optuna"].TrialPruned()  # loaded, since the trial is its object
    if run is not None:
        run.log({"convergence": convergence}, step=batch)


def same_padding(
    kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> tuple[int, int] | tuple[int, int, int, int]:
    """The padding that keeps the size of images: (rows, columns) where it is as much on both sides.

    Else (left, right, top, bottom), as torch.nn.functional.pad has it, with one more at the right
    and at the bottom.
    """
    rows, columns = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
    if rows % 2 == columns % 2 == 0:
        return rows // 2, columns // 2
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
