"""Running a function again exactly as before: random numbers, precision, no traces in modules.

    moment = Moment(tensors)          # before the first run
    with moment.repeated():           # around every other run
        ...

Only random numbers from torch's global generators are repeated. Callers have to compare the results
and refuse functions that draw from other sources, such as an iterator over batches or a generator
of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Moment:
    """The state of torch's global generators on the CPU and the tensors' devices, and of autocast.

    tensors: any on the devices that the function computes on.
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
        """Restore the state of the generators."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Code inside draws the random numbers of this moment, and computes in the same precision.

        The generators, and the buffers of modules, are restored afterwards.
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
    """Whether a repeated step from `start` has led elsewhere than the first time, a scalar tensor.

    Rounding errors, in proportion to the size of the numbers and of the step, do not count.
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
    """Restore the buffers, such as running statistics, of all modules that run inside."""
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
            buffer.data.copy_(value)  # .data: in the graph it already has this value
