"""Functions of tensors in nested containers, called at once or recorded and replayed.

A recording, such as a CUDA graph, is launched as a whole: the many small computations of a
network's gradient then cost what they take on the device, not what it takes the host to start each.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Record(Protocol):
    """Makes recordings of functions of tensors."""

    def __call__(
        self, function: Callable[..., list[Tensor]], examples: Sequence[Tensor]
    ) -> Callable[..., list[Tensor]]:
        """A function with the same results as `function`, valid until its next call.

        examples: inputs, whose shapes are those of all calls.
        """


@dataclass
class RecordedCalls:
    """Calls of functions of tensors; see the module's docstring.

    Attributes:
        record: makes recordings; None: functions are called at once.
        recordings: and the form of their results, by the function's name and the inputs' forms.
    """

    record: Record | None = None
    recordings: dict[Hashable, tuple[Callable[..., list[Tensor]], Any]] = field(
        default_factory=dict
    )

    def __call__(self, name: Hashable, function: Callable, arguments: tuple) -> Any:
        """function(*arguments).

        name: the same only for functions whose results are the same for the same arguments.
        arguments: tensors in nested containers; so are the results.
        """
        if self.record is None:
            return function(*arguments)
        tensors, form = tree_flatten(arguments)
        key = name, str(form), *((t.shape, t.dtype, t.device) for t in tensors)
        if key not in self.recordings:
            self.recordings[key] = self._recorded(function, form, tensors)
        recording, results = self.recordings[key]
        return tree_unflatten([t.clone() for t in recording(*tensors)], results)

    def _recorded(self, function: Callable, form: Any, tensors: list[Tensor]) -> tuple:
        """A recording of the function, and the form of its results."""
        results = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            found, results[:] = _flattened(function(*tree_unflatten(list(tensors), form)))
            return found

        return self.record(flat, tensors), results[0]


def _flattened(value: Any) -> tuple[list[Tensor], list]:
    tensors, form = tree_flatten(value)
    return tensors, [form]
