"""What runs once more runs as it did: random numbers, precision, and no traces in modules.

    moment = Moment(tensors)          # before the first run
    with moment.repeated():           # around every other one
        ...

Of random numbers only torch's global generators are repeated. Whoever runs a function again has to
compare results, and to refuse a function that draws from elsewhere: an iterator over batches, or
a generator of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Moment:
    """The state of torch's global generators, of the CPU and of the tensors' devices, and autocast.

    tensors: on the devices on which the function computes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        self._devices = sorted(devices, key=lambda device: device.index)
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(device.type for device in self._devices)}
        ]

    def rewind(self) -> None:
        """Puts the generators where they were."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """What runs inside draws what was drawn at this moment, in the same precision.

        Afterwards generators and the buffers of modules are as they were before it.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices))
            stack.enter_context(buffers_kept())
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            self.rewind()
            yield


def another_result(
    start: Sequence[Tensor], result: Sequence[Tensor], first: Sequence[Tensor]
) -> Tensor:
    """Whether a step from `start` has led elsewhere than the first time, a scalar tensor.

    Differences of rounding do not count, which go with the size of the numbers and of the step.
    """
    lengths = torch._foreach_norm(torch._foreach_sub(first, start))
    errors = torch._foreach_norm(torch._foreach_sub(result, first))
    wrong = []
    for error, length, t in zip(errors, lengths, first, strict=True):
        eps = torch.finfo(t.dtype).eps
        wrong.append(error > eps**0.5 * length + 100 * eps * t.norm())
    return torch.stack(wrong).any()


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Puts back the buffers, such as running statistics, of all modules that run inside."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, _: object) -> None:
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in kept:
                kept[id(buffer)] = buffer, buffer.detach().clone()

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        for buffer, value in kept.values():
            buffer.data.copy_(value)  # to its value in the graph, which need not hear of it
