"""What several trainings of one kind come to: mean and deviation, as results and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_and_deviation(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Of the values by this name, for results.json.

    The deviation is the sample's (n - 1): None where there are less than two values, as the mean
    is where there is none.
    """
    return {
        f"{name}_mean": float(np.mean(values)) if values else None,
        f"{name}_standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def accuracy_text(results: Mapping[str, Any]) -> str:
    """For the screen, what `mean_and_deviation` says of test accuracies."""
    mean, deviation = (results[f"test_accuracy_{n}"] for n in ("mean", "standard_deviation"))
    return f"test accuracy {mean:.2%}" + ("" if deviation is None else f" +- {deviation:.2%}")
