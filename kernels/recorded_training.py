"""Recordings of a training's steps, where its device has any and its steps can be recorded.

record = recordings(device, log.say)     # None on a CPU, where calling costs nothing
step = record(function, examples)        # a CUDA graph, or the function itself

descent = Descent(loss, lr=1e-3, weight_decay=0.01, record=record)
state, numbers = descent(state, batches)     # a step for each batch; nothing is awaited
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.recorded_updates import CudaRecording, RecordingError

Step = Callable[..., list[Tensor]]
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, torch's own


def recordings(
    device: torch.device, tell: Callable[[str], None]
) -> Callable[[Step, Sequence[Tensor]], Step] | None:
    """What records functions of tensors on this device: a function (function, examples) -> replay.

    A function that cannot be recorded is returned as it is. On a CPU there is None.

    tell: told in one line why something is not recorded; once for each reason.
    """
    if device.type != "cuda":
        return None
    told: set[str] = set()

    def record(function: Step, examples: Sequence[Tensor]) -> Step:
        try:
            return CudaRecording(function, examples)
        except RecordingError as problem:
            if str(problem) not in told:
                tell(f"steps are not replayed as a recording: {problem}")
            told.add(str(problem))
            return function

    return record


@dataclass(frozen=True)
class AdamWState:
    """Parameters, and what AdamW remembers of their steps; all on one device.

    Attributes:
        theta, first, second: the parameters and their moments, lists of tensors of the same shapes.
        count: steps that were taken, a float64 scalar.
        sound: whether no loss or gradient was infinite or nan so far, a scalar of bool.
    """

    theta: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    count: Tensor
    sound: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in this order."""
        return [*self.theta, *self.first, *self.second, self.count, self.sound]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "AdamWState":
        """The state with these tensors, in the order of `tensors`."""
        size = (len(tensors) - 2) // 3
        theta, first, second = (list(tensors[k * size : (k + 1) * size]) for k in range(3))
        return cls(theta, first, second, *tensors[3 * size :])


@dataclass
class Descent:
    """Steps of AdamW, a group of which is recorded once and replayed for each group of batches.

    From the first loss or gradient on that is not finite, parameters stay as they are.

    Attributes:
        loss: (theta, batch) -> the loss and further numbers, all scalars; lists of tensors.
        lr, weight_decay: as torch.optim.AdamW has them.
        record: makes the recordings.
        length: the steps of a group; what is left over is a smaller group.
    """

    loss: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
    lr: float
    weight_decay: float
    record: Callable[[Step, Sequence[Tensor]], Step]
    length: int = 10
    recordings: dict[tuple, Step] = field(default_factory=dict)

    def __call__(
        self, state: AdamWState, batches: Iterable[Sequence[Tensor]]
    ) -> tuple[AdamWState, Tensor]:
        """The state after a step for each batch, and numbers [steps, 2 + others] on the device.

        The numbers of a step are the gradient's norm, the loss, and the others that `loss` gives.
        """
        rows, tensors, left = [], state.tensors(), iter(batches)
        while group := list(itertools.islice(left, self.length)):
            given = [*tensors, *itertools.chain(*group)]
            shapes = len(group), *((t.shape, t.dtype) for t in given)
            if shapes not in self.recordings:
                self.recordings[shapes] = self.record(self._steps(len(group), len(tensors)), given)
            *tensors, of_group = [t.clone() for t in self.recordings[shapes](*given)]
            rows.append(of_group)
        return AdamWState.of(tensors), torch.cat(rows)

    def _steps(self, steps: int, size: int) -> Step:
        def function(*tensors: Tensor) -> list[Tensor]:
            state, batches, rows = AdamWState.of(tensors[:size]), tensors[size:], []
            width = len(batches) // steps
            for k in range(steps):
                state, row = self._step(state, list(batches[k * width : (k + 1) * width]))
                rows.append(row)
            return [*state.tensors(), torch.stack(rows)]

        return function

    def _step(self, state: AdamWState, batch: list[Tensor]) -> tuple[AdamWState, Tensor]:
        theta = [t.detach().requires_grad_() for t in state.theta]
        with torch.enable_grad():
            loss, others = self.loss(theta, batch)
        gradient = torch.autograd.grad(loss, theta)
        row = torch.stack([t.detach() for t in (_norm(gradient), loss, *others)])
        sound = state.sound & row[:2].isfinite().all()
        stepped = adamw(state, gradient, self.lr, self.weight_decay)
        pairs = zip(stepped.tensors()[:-1], state.tensors()[:-1], strict=True)
        kept = [torch.where(sound, new, old) for new, old in pairs]
        return AdamWState.of([*kept, sound]), row


def adamw(
    state: AdamWState, gradient: Sequence[Tensor], lr: float, weight_decay: float
) -> AdamWState:
    """The state after a step of AdamW (Loshchilov, Hutter 2019), as torch.optim.AdamW makes it."""
    count = state.count + 1
    first = torch._foreach_lerp(state.first, list(gradient), 1 - BETAS[0])
    second = torch._foreach_mul(state.second, BETAS[1])
    torch._foreach_addcmul_(second, list(gradient), list(gradient), 1 - BETAS[1])
    rate = lr / (1 - BETAS[0] ** count)
    root = (1 - BETAS[1] ** count).sqrt()
    theta = []
    for t, m, v in zip(state.theta, first, second, strict=True):
        size = v.sqrt().div_(root.to(v.dtype)).add_(EPS)
        theta.append((t * (1 - lr * weight_decay)).sub_(m.div(size).mul_(rate.to(t.dtype))))
    return AdamWState(theta, first, second, count, state.sound)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).norm()
