"""Many updates and their gradient as few replays of recorded computations.

    theta_{t+1} = update(psi, theta_t, batch_t),   t = 0..N-1

    updates = RecordedUpdates(update, length=10)
    theta = updates(psi, theta, batches)         # differentiable by psi and theta

Two computations are recorded: `length` updates forward, and the same with their backward pass. Both
are replayed N / length times, so that what is kept in memory is the parameters before each replay.
On a CUDA device a recording is a CUDA graph, which the host launches as a whole; elsewhere it is a
function that is called again. Both read from buffers of their own and write to others, which the
next replay overwrites.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
WARM_UPS = 2  # calls before a capture, which make everything that is made once


class RecordingError(RuntimeError):
    """A computation that cannot be recorded; the message is one line."""


class Recording(Protocol):
    """A recorded computation.

    Attributes:
        inputs, outputs: the buffers that it reads from and writes to.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]

    def replay(self) -> None:
        """Compute the outputs from what is in the inputs."""

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The results for these inputs, valid until the next call."""


@contextmanager
def own_workspaces() -> Iterator[None]:
    """A context in which a CUDA graph that is captured gets workspaces of cuBLAS of its own.

    torch keeps one for each thread and stream, and captures all graphs on the same stream; in torch
    2.13 a graph that is deleted frees those of its stream, which the others would go on to use.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:  # from now on they are free memory of the graph's own pool, where only it writes
        torch._C._cuda_clearCublasWorkspaces()


class CudaRecording:
    """A function of tensors as a CUDA graph. Raises RecordingError if it cannot be captured.

    function: (tensors) -> list of tensors; does not wait for the device, nor copy from the host.
    examples: inputs, whose shapes are those of all replays.
    """

    def __init__(self, function: Callable[..., list[Tensor]], examples: Tensors) -> None:
        self.inputs = [t.detach().clone() for t in examples]
        self.function = function  # a graph does not keep the tensors that its function refers to
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with own_workspaces(), torch.cuda.graph(self.graph):
                self.outputs = function(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            reason = str(problem).strip().splitlines()[0]
            raise RecordingError(f"no CUDA graph of it can be captured: {reason}") from problem

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.replay()
        return self.outputs

    def replay(self) -> None:
        """Compute the outputs from what is in the inputs."""
        self.graph.replay()


class CalledRecording:
    """The same interface and the same buffers, but the function is called at each replay."""

    def __init__(self, function: Callable[..., list[Tensor]], examples: Tensors) -> None:
        self.inputs, self.function = [t.detach().clone() for t in examples], function
        self.outputs = function(*self.inputs)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.replay()
        return self.outputs

    def replay(self) -> None:
        """Compute the outputs from what is in the inputs."""
        torch._foreach_copy_(self.outputs, self.function(*self.inputs))


def recording_for(device: torch.device) -> type[Recording]:
    """The kind of recording of a device."""
    return CudaRecording if device.type == "cuda" else CalledRecording


@dataclass
class RecordedUpdates:
    """See the module's docstring.

    Attributes:
        update: (psi, theta, batch) -> theta, lists of tensors; theta keeps its shapes.
        length: the updates of a recording; those that are left over are replayed one by one.
        hold: (adjoints, state) -> (adjoints, state), lists of tensors: changes dL / d theta_t
            before it goes back through an update; the state goes from the last one to the first.
        record: the kind of recording; None: that of the device.
        recordings: by direction, number of updates and shapes; they serve any numbers of updates.
    """

    update: Callable[[Tensors, Tensors, Tensors], list[Tensor]]
    length: int
    hold: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]] | None = None
    record: type[Recording] | None = None
    recordings: dict[tuple, Recording] = field(default_factory=dict)

    def __call__(
        self, psi: Tensors, theta: Tensors, batches: Sequence[Tensors], state: list[Tensor]
    ) -> list[Tensor]:
        """theta after one update for each batch. Raises RecordingError.

        state: the state of `hold`, replaced in the backward pass.
        """
        left = len(batches) % self.length
        starts = [*range(left), *range(left, len(batches), self.length), len(batches)]
        segments = [batches[a:b] for a, b in itertools.pairwise(starts)]
        return list(_Replays.apply(self, segments, state, len(psi), *psi, *theta))

    def replayed(self, function: Callable, count: int, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of the results of a recorded function of `count` updates."""
        key = (function.__name__, count, *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self.recordings:
            record = self.record or recording_for(tensors[0].device)
            self.recordings[key] = record(function, tensors)
        return [t.clone() for t in self.recordings[key](*tensors)]


class _Replays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, updates: RecordedUpdates, segments, state, count: int, *tensors):
        psi, theta = list(tensors[:count]), list(tensors[count:])
        starts = []
        for batches in segments:
            starts.append(theta)
            advance = _advance(updates, count, len(theta), len(batches))
            given = [*psi, *theta, *itertools.chain(*batches)]
            theta = updates.replayed(advance, len(batches), given)
        ctx.updates, ctx.segments, ctx.state, ctx.starts = updates, segments, state, starts
        ctx.save_for_backward(*psi)
        return tuple(theta)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *adjoints):
        updates, psi, state = ctx.updates, list(ctx.saved_tensors), ctx.state
        adjoints, total = list(adjoints), [torch.zeros_like(t) for t in psi]
        for batches, theta in zip(reversed(ctx.segments), reversed(ctx.starts), strict=True):
            sizes = len(psi), len(theta), len(batches), len(state)
            given = [*psi, *theta, *adjoints, *state, *itertools.chain(*batches)]
            found = updates.replayed(_go_back(updates, *sizes), len(batches), given)
            torch._foreach_add_(total, found[: len(psi)])
            adjoints = found[len(psi) : len(psi) + len(theta)]
            state[:] = found[len(psi) + len(theta) :]
        return None, None, None, None, *total, *adjoints


def _advance(updates: RecordedUpdates, psi: int, theta: int, steps: int) -> Callable:
    """A function of psi, theta and the batches of `steps` updates, in so many tensors."""

    def forward(*tensors: Tensor) -> list[Tensor]:
        of_psi, now, batches = _split(tensors, psi, theta)
        with torch.no_grad():
            for batch in _parts(batches, steps):
                now = updates.update(of_psi, now, batch)
        return [t.clone() for t in now]

    return forward


def _go_back(updates: RecordedUpdates, psi: int, theta: int, steps: int, state: int) -> Callable:
    """A function of psi, theta, its adjoints at the end, the state of `hold`, and the batches.

    It gives the gradients of psi and theta, and the state.
    """

    def backward(*tensors: Tensor) -> list[Tensor]:
        of_psi, now, adjoints, held, batches = _split(tensors, psi, theta, theta, state)
        leaves, passed = [t.detach().requires_grad_() for t in of_psi], []
        with torch.enable_grad():
            for batch in _parts(batches, steps):
                before = [t.detach().requires_grad_() for t in now]
                now = updates.update(leaves, before, batch)
                passed.append((before, now))
        total = [torch.zeros_like(t) for t in of_psi]
        for before, after in reversed(passed):
            if updates.hold is not None:
                adjoints, held = updates.hold(adjoints, held)
            found = torch.autograd.grad(after, [*leaves, *before], adjoints, materialize_grads=True)
            torch._foreach_add_(total, found[:psi])
            adjoints = list(found[psi:])
        return [t.clone() for t in (*total, *adjoints, *held)]

    return backward


def _split(tensors: Tensors, *counts: int) -> list[list[Tensor]]:
    """The tensors in parts of these numbers, and the rest."""
    ends = [0, *itertools.accumulate(counts), len(tensors)]
    return [list(tensors[a:b]) for a, b in itertools.pairwise(ends)]


def _parts(batches: list[Tensor], steps: int) -> list[list[Tensor]]:
    """The tensors of each of `steps` batches."""
    size = len(batches) // steps
    return [batches[k * size : (k + 1) * size] for k in range(steps)]
