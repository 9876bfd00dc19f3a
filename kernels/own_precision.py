"""Computations in the dtype of their tensors, also under autocast.

    with own_precision(params):
        params = rule.update(model, params, batch)

The changes of an update are so small that autocast would round them away. And the backward pass of
an autograd function, if torch calls it under autocast, must find the dtypes of its forward pass.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# once, because torch.compile does not see through the question
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


def own_precision(tensors: Iterable[Tensor]) -> AbstractContextManager:
    """A context without autocast on the device of the first tensor, by default the CPU."""
    device = next((tensor.device.type for tensor in tensors), "cpu")
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def in_own_precision(step: Callable) -> Callable:
    """A decorator that runs a forward or backward pass of an autograd function without autocast."""

    @functools.wraps(step)
    def run(ctx, *arguments):
        with own_precision(a for a in arguments if isinstance(a, Tensor)):
            return step(ctx, *arguments)

    return run
