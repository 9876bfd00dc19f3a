"""Mean and standard deviation of several trainings, as results and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_and_deviation(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The entries <name>_mean and <name>_standard_deviation of results.json for these values.

    The deviation is the sample's (divided by n - 1), None for fewer than two values. The mean of no
    values is None.
    """
    return {
        f"{name}_mean": float(np.mean(values)) if values else None,
        f"{name}_standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def counted_trainings(count: int) -> str:
    """A number of trainings in words, such as "1 training"."""
    return "1 training" if count == 1 else f"{count} trainings"


def accuracy_text(results: Mapping[str, Any], *, held_out: bool = False) -> str:
    """The mean and deviation of "test_accuracy" in `results`, as a text for the screen.

    held_out: it is one of training images that were held out.
    """
    mean, deviation = (results[f"test_accuracy_{n}"] for n in ("mean", "standard_deviation"))
    kind = "held-out" if held_out else "test"
    return f"{kind} accuracy {mean:.2%}" + ("" if deviation is None else f" +- {deviation:.2%}")
