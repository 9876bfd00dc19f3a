"""A recording on the CPU whose operations are frozen, as those of a CUDA graph are.

What is no tensor when a function is recorded (a count, a rate, a choice), and tensors that it does
not take as inputs, stay as they are in every replay; a function that asks for a number while it is
recorded is refused.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

WARM_UPS = 2  # as on a GPU: what is recorded is not the first call


class TracedRecording:
    """See the module's docstring; the interface is that of kernels.recorded_updates.Recording."""

    def __init__(self, function: Callable[..., list[Tensor]], examples: Sequence[Tensor]) -> None:
        self.inputs = [t.detach().clone() for t in examples]
        for _ in range(WARM_UPS):
            function(*self.inputs)
        self.graph = make_fx(lambda *tensors: list(function(*tensors)))(*self.inputs)
        self.outputs: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, [t.detach() for t in tensors])
        self.replay()
        return self.outputs

    @torch.no_grad()
    def replay(self) -> None:
        """Compute the outputs from what is in the inputs."""
        self.outputs = [t.clone() for t in self.graph(*self.inputs)]
