"""Where the random numbers of several tasks come from: a CPU generator each, or counted numbers.

    HostNumbers([generator]).uniforms(1024, 26)        # float64 [1, 1024, 26]
    CountedNumbers(keys).uniforms(1024, 26)            # float64 [tasks, 1024, 26], on their device

With either, the numbers of a task are those that it would get alone.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Generator, Size, Tensor

from data_sets.counted_numbers import normals, uniforms, words


class Numbers(Protocol):
    """Random numbers [tasks, ...]; each call gives new ones."""

    tasks: int

    def uniforms(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float64 [tasks, *shape]."""

    def normals(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers, [tasks, *shape]; of which type, the source decides."""

    def bytes(self, *shape: int) -> Tensor:
        """Random bytes, uint8 [tasks, *shape]."""


class HostNumbers:
    """Numbers that each task's CPU generator draws, one task after the other, on the CPU."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        self.generators, self.tasks = generators, len(generators)

    def uniforms(self, *shape: int) -> Tensor:
        double = {"dtype": torch.float64, "device": "cpu"}
        return self._of_each(lambda g: torch.rand(shape, generator=g, **double))

    def normals(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Of type float32, whatever `dtype` is."""
        single = {"dtype": torch.float32, "device": "cpu"}
        return self._of_each(lambda g: torch.randn(shape, generator=g, **single))

    def bytes(self, *shape: int) -> Tensor:
        count = Size(shape).numel()

        def drawn(generator: Generator) -> Tensor:
            words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu")
            words.random_(-(2**63), None, generator=generator)
            return words.view(torch.uint8)[:count].view(shape)

        return self._of_each(drawn)

    def _of_each(self, draw: Callable[[Generator], Tensor]) -> Tensor:
        drawn = [draw(generator) for generator in self.generators]
        return drawn[0].unsqueeze(0) if len(drawn) == 1 else torch.stack(drawn)


class CountedNumbers:
    """Numbers counted from each task's key, int64 [tasks], on the keys' device."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.tasks, self._used = keys, len(keys), 0

    def uniforms(self, *shape: int) -> Tensor:
        return uniforms(self._words(Size(shape).numel())).unflatten(1, shape)

    def normals(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Of type `dtype`, at least float32."""
        count = Size(shape).numel()
        return normals(self._words(-(-count // 2)), dtype)[:, :count].unflatten(1, shape)

    def bytes(self, *shape: int) -> Tensor:
        count = Size(shape).numel()
        drawn = self._words(-(-count // 8)).view(torch.uint8)
        return drawn[:, :count].unflatten(1, shape)

    def _words(self, count: int) -> Tensor:
        begin, self._used = self._used, self._used + count
        return words(self.keys, count, begin)
