"""Features of a network that learns with labels, by backpropagation: what its units can say.

    params = supervised_parameters(model, data, generator)
    features = model(x, params)

A linear classifier is learned on the features and with them, by Adam (Kingma, Ba 2015, ICLR) on the
mean cross-entropy. Only the network is kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from comparison.vicreg import uniform_parameters
from data_sets.image_data import ImageData, batch_indices
from models_fully_local import Params
from train import detached


@dataclass(frozen=True)
class SupervisedSettings:
    """How a network is trained with labels; the rate falls to zero as half a cosine."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 3e-3


SUPERVISED = SupervisedSettings()


def supervised_parameters(
    model: nn.Module,
    data: ImageData,
    generator: Generator,
    settings: SupervisedSettings = SUPERVISED,
    *,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """Trained parameters of a model; a batch has at most all images.

    model: called as model(x, params) on float [B, C, H, W], returns [B, D].
    generator: a generator on the CPU.
    """
    device = data.images.device
    params = [
        {name: t.to(device, dtype).requires_grad_() for name, t in layer.items()}
        for layer in uniform_parameters(model, generator)
    ]
    classifier = _classifier(model, params, data)
    leaves = [t for layer in params for t in layer.values()] + classifier
    batch_size = min(settings.batch_size, len(data))
    steps = settings.epochs * (len(data) // batch_size)
    optimizer = torch.optim.Adam(leaves, settings.lr)
    for step, rows in zip(range(steps), _endless_rows(data, batch_size, generator), strict=False):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * step / steps)) / 2
        weight, bias = classifier
        logits = model(data.floats(rows, dtype), params).flatten(1) @ weight.mT + bias
        loss = nn.functional.cross_entropy(logits, data.labels[rows])
        for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.grad = slope
        optimizer.step()
    return detached(params)


def _classifier(model: nn.Module, params: Params, data: ImageData) -> list[Tensor]:
    """Weight [classes, D] and bias [classes] of a classifier that says nothing yet."""
    with torch.no_grad():
        one = model(data.floats(slice(1), params[-1]["w"].dtype), params).flatten(1)
    return [
        one.new_zeros(shape).requires_grad_()
        for shape in ((data.classes, one.shape[1]), (data.classes,))
    ]


def _endless_rows(data: ImageData, batch_size: int, generator: Generator):
    """The rows of batches, epoch after epoch, each in a new order."""
    while True:
        yield from batch_indices(data, batch_size, generator)
