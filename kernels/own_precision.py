"""Computations in the type of their tensors, also under autocast.

    with own_precision(params):
        params = rule.update(model, params, batch)

What an update adds up is less than what autocast would round away; and the steps of an autograd
function that torch calls under autocast find tensors of one type, as its forward pass left them.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_precision(tensors: Iterable[Tensor]) -> AbstractContextManager:
    """No autocast on the device of the first of these tensors, by default the CPU."""
    device = next((tensor.device.type for tensor in tensors), "cpu")
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def in_own_precision(step: Callable) -> Callable:
    """The forward or backward pass of an autograd function, of (ctx, ...), without autocast."""

    @functools.wraps(step)
    def run(ctx, *arguments):
        with own_precision(a for a in arguments if isinstance(a, Tensor)):
            return step(ctx, *arguments)

    return run
