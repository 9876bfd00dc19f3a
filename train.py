"""Applies a learning rule many times, with a graph through all updates or without.

Under a graph the steps fall into segments of equal length. The last one is kept for the backward
pass; of those before, only the first parameters are, and each runs again when the backward pass
arrives there. The memory policy is the length of the segments:

    keep       all steps: fastest, memory grows with every step
    fit        as many as fit into memory_limit bytes
    segments   sqrt(steps): memory of about 2 sqrt(steps) steps
    recompute  one: memory of the parameters of all steps and of one step's graph
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from learning_rules import LearningRule
from models_fully_local import Params

MEMORY = ("fit", "keep", "segments", "recompute")
MEMORY_LIMIT = 5 * 2**29  # peak below 4 GB with the networks of main.py


def train(
    model: nn.Module,
    params: Params,
    batches: Iterator,
    rule: LearningRule,
    steps: int,
    *,
    grad: bool = True,
    memory: str = "fit",
    memory_limit: int = MEMORY_LIMIT,
) -> Params:
    """Parameters after `steps` updates of the rule, each on the next of the batches.

    With grad, the result is attached to the parameters given and to the rule's hyperparameters;
    without, it is detached. memory and memory_limit (bytes of one unrolled graph, for "fit") never
    change the result or its gradient. Raises ValueError for an unknown memory policy.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory policy {memory!r} is unknown; choose from {', '.join(MEMORY)}")
    if not grad:
        with torch.no_grad():
            for _ in range(steps):
                params = rule.update(model, params, next(batches))
        return detached(params)
    used = [next(batches) for _ in range(steps)]
    length = _segment_length(model, params, used, rule, memory, memory_limit)
    for start, stop in _segments(steps, length):
        if stop == steps:
            params = _run(model, params, used[start:stop], rule)
        else:
            params = checkpoint(
                _run, model, params, used[start:stop], rule,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
    return params


def detached(params: Params) -> Params:
    """The same parameters without their graph."""
    return [{name: tensor.detach() for name, tensor in layer.items()} for layer in params]


def _run(model: nn.Module, params: Params, batches: Sequence, rule: LearningRule) -> Params:
    for batch in batches:
        params = rule.update(model, params, batch)
    return params


def _segments(steps: int, length: int) -> list[tuple[int, int]]:
    """(start, stop) of segments of `length` steps; the first takes what is left over."""
    starts = range(steps - length, -length, -length)
    return [(max(0, start), start + length) for start in reversed(starts)]


def _segment_length(model, params, used, rule, memory: str, memory_limit: int) -> int:
    steps = max(1, len(used))
    if memory == "keep" or not used:
        return steps
    if memory == "recompute":
        return 1
    if memory == "segments":
        return math.isqrt(steps - 1) + 1
    # The second step is measured: the first parameters may need no gradient yet.
    first = rule.update(model, params, used[0])
    size = graph_bytes(lambda: rule.update(model, first, used[-1]))
    return min(steps, max(1, memory_limit // max(1, size)))


def graph_bytes(function) -> int:
    """Bytes of all tensors that the graph of a call of `function` keeps for its backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Without its graph: an output that its own graph held would never be freed.
        saved = kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
