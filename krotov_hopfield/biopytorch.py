"""BioPyTorch's other functions: training one layer on any data loader, and "same" padding.

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

RATES = (0.01, 0.003, 1.0)  # default start, end and speed of the learning rate


class TrainingData(Protocol):
    """A source of batches, such as a LightningDataModule."""

    def train_dataloader(self) -> Iterable:
        """One pass over the data: an iterable with a length that yields tuples (inputs, ...)."""


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
    """Train a layer on the outputs of the layers before it, which are not changed.

    Returns the convergence after the last batch, or inf if there was no batch.

    dataset: the source of the batches; only the first element of each, the inputs, is used.
    prev_layers: applied to the inputs in this order.
    n_epochs: the largest number of passes; below 1, there is no limit.
    n_batches: the number of batches, instead of n_epochs.
    patience: stop, at the end of an epoch, after this many epochs' batches in a row without
        progress, which means a convergence that is at most the smallest so far.
    lr_scheduler: a constant learning rate; (start, end, speed) as in `exponential_rate` (default:
        RATES); or a function from the number of the batch, counted from 0, to the rate.
    convergence_threshold: stop, at the end of an epoch, if the convergence is below this.
    epoch_callback: called after each epoch with the weights on the CPU.
    trial: an Optuna trial, which is told the convergence of each batch; optuna.TrialPruned is
        raised if the trial should be pruned.
    run: a wandb run, whose `log` is called after each batch.
    device: the device to move the inputs to (default: the layer's).
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
    """A function from the number of a batch and the batches per epoch to the learning rate."""
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
            raise sys.modules["optuna"].TrialPruned()  # is loaded, because the trial belongs to it
    if run is not None:
        run.log({"convergence": convergence}, step=batch)


def same_padding(
    kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> tuple[int, int] | tuple[int, int, int, int]:
    """The padding that keeps the size of images, as (rows, columns) if both sides get the same.

    Otherwise it is (left, right, top, bottom), as torch.nn.functional.pad takes it, with one more
    on the right and at the bottom if an odd number is to be padded.
    """
    rows, columns = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
    if rows % 2 == columns % 2 == 0:
        return rows // 2, columns // 2
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
