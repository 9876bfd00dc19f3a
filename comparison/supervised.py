"""Features of a network that learns with labels, by backpropagation: what its units can say.

    params = supervised_parameters(model, data, generator)
    features = model(x, params)

A linear classifier is learned on the features and with them, by Adam (Kingma, Ba 2015, ICLR) on the
mean cross-entropy. Only the network is kept.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from comparison.vicreg import uniform_parameters
from data_sets.image_data import ImageData, batch_indices
from models_fully_local import Params
from train import detached

EPOCHS, BATCH_SIZE = 30, 128
LEARNING_RATE = 3e-3  # the first one; it falls to zero as half a cosine


def supervised_parameters(
    model: nn.Module, data: ImageData, generator: Generator, dtype: torch.dtype = torch.float32
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
    with torch.no_grad():
        units = model(data.floats(slice(1), dtype), params).flatten(1).shape[1]
    weight = torch.zeros(data.classes, units, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(data.classes, dtype=dtype, device=device, requires_grad=True)
    leaves = [t for layer in params for t in layer.values()] + [weight, bias]
    batch_size = min(BATCH_SIZE, len(data))
    steps = EPOCHS * (len(data) // batch_size)
    optimizer = torch.optim.Adam(leaves)
    for step, rows in zip(range(steps), _endless_rows(data, batch_size, generator), strict=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        logits = model(data.floats(rows, dtype), params).flatten(1) @ weight.mT + bias
        loss = nn.functional.cross_entropy(logits, data.labels[rows])
        for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.grad = slope
        optimizer.step()
    return detached(params)


def _endless_rows(data: ImageData, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """The rows of batches, epoch after epoch, each in a new order."""
    while True:
        yield from batch_indices(data, batch_size, generator)
