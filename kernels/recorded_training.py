"""Recordings of a training's steps, where its device has any and its steps can be recorded.

record = recordings(device, log.say)     # None on a CPU, where calling costs nothing
step = record(function, examples)        # a CUDA graph, or the function itself
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.recorded_updates import CudaRecording, RecordingError

Step = Callable[..., list[Tensor]]


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
