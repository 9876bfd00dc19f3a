"""What else BioPyTorch has: one layer's training on anybody's loader, and its saved networks.

    convergence = bio_train(layer, dataset, n_epochs=5, lr_scheduler=(0.007, 0.0001, 0.8))
    network = load_biopytorch("layers1.pt")          # its layers are those of layers.py

Source: https://github.com/Einlar/biopytorch.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from krotov_hopfield.errors import CompetitionError
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


# ---- saved networks ----


class _SavedConv2d(nn.Module):
    """Stands for BioPyTorch's while a file is read; its attributes are those of the file."""

    def ours(self) -> BioConv2d:
        return BioConv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.lebesgue_p,
            self.ranking_param, float(self.delta), self.stride, self.padding, self.dilation, self.groups,
            padding_mode={"constant": "zeros"}.get(self.padding_mode, self.padding_mode),
            dtype=self.weight.dtype,
        )  # fmt: skip


class _SavedLinear(nn.Module):
    """Likewise."""

    def ours(self) -> BioLinear:
        if self.bias is not None:
            raise CompetitionError("its BioLinear has a bias, which responds otherwise here")
        return BioLinear(
            int(self.in_features), self.out_features, False, float(self.delta), self.ranking_param,
            self.lebesgue_p, dtype=self.weight.dtype,
        )  # fmt: skip


_KNOWN = [  # all that its files may ask for
    nn.Sequential, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU, nn.Dropout, nn.Linear,
    nn.Flatten,
    (_SavedConv2d, "biopytorch.bioconv2d.BioConv2d"),
    (_SavedLinear, "biopytorch.biolinear.BioLinear"),
    np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64)),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
]  # fmt: skip


def load_biopytorch(path: Path | str) -> nn.Sequential:
    """A network that BioPyTorch's experiments have saved, with layers of this library, to evaluate.

    Nothing of the file is run: it may ask for torch's layers and BioPyTorch's alone. Raises
    CompetitionError where it is something else.
    """
    try:
        with torch.serialization.safe_globals(_KNOWN):
            network = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(network, nn.Sequential):
            raise CompetitionError(f"a {type(network).__name__}, expected an nn.Sequential")
        return _with_our_layers(network).eval()
    except CompetitionError as problem:
        raise CompetitionError(f"{path} is no network of BioPyTorch: {problem}") from problem
    except (OSError, UnpicklingError, RuntimeError, AttributeError, TypeError, EOFError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise CompetitionError(f"{path} is no network of BioPyTorch: {reason}") from problem


def _with_our_layers(module: nn.Module) -> nn.Module:
    if isinstance(module, _SavedConv2d | _SavedLinear):
        layer = module.ours()
        layer.load_state_dict(module.state_dict())
        return layer
    for name, child in module.named_children():
        module.add_module(name, _with_our_layers(child))
    return module
