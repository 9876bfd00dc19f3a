"""What a run of tune_one_pass.py recorded of every draw; tables and figures of several such runs.

draws.npz holds `step`, `seconds` (training alone) and `evaluation_seconds`, one value for each
record, and for every metric an array [records, draws].

A draw has diverged when its final loss is not finite or above ten times what it was at the start.
Means are of those that did not, medians of all, a diverged one counting as infinite; each is
averaged over 1000 bootstraps of the draws, +- their standard deviation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run_log import RunLogError, read_config

BOOTSTRAPS = 1000
ENVELOPE = (10, 90)  # percent of the bootstrapped medians
DIVERGED = 10.0  # times the loss at the start


class Columns:
    """The numbers of every draw, record by record."""

    def __init__(self, saved: Mapping[str, Tensor] | None = None) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}
        for name, values in (saved or {}).items():
            self._rows[name] = list(values.numpy())

    def append(
        self, step: int, seconds: float, evaluation: float, row: Mapping[str, np.ndarray]
    ) -> None:
        """One more record: `row` has an array [draws] for each metric."""
        times = {"step": step, "seconds": seconds, "evaluation_seconds": evaluation}
        for name, value in {**times, **row}.items():
            self._rows.setdefault(name, []).append(np.asarray(value, dtype=np.float64))

    def last(self, name: str) -> float:
        """The latest value of a column that has one for each record."""
        return float(self._rows[name][-1])

    def arrays(self) -> dict[str, np.ndarray]:
        """Each column, [records] or [records, draws]."""
        return {name: np.stack(values) for name, values in self._rows.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """What makes the same columns again."""
        return {name: torch.from_numpy(values) for name, values in self.arrays().items()}


# ---- numbers ----


def final_losses(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each draw's last test loss, in the units of the data; inf where it has diverged."""
    name = next(
        name for name in ("Unnormalised_Loss/Test", "Perplexity/Test", "Loss/Test")
        if name in columns
    )  # fmt: skip
    losses = columns[name]
    start, end = np.nanmedian(losses[0]), losses[-1]
    with np.errstate(invalid="ignore"):
        diverged = ~np.isfinite(end) | (end > DIVERGED * start)
    return np.where(diverged, math.inf, end)


def summary(losses: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean, median, their bootstrap deviations and the share of draws that diverged."""
    generator = np.random.default_rng(seed)
    samples = losses[generator.integers(len(losses), size=(BOOTSTRAPS, len(losses)))]
    medians = np.median(samples, axis=1)
    means = _means_of_finite(samples)
    return {
        "mean": _finite_or(means, np.mean),
        "mean_deviation": _finite_or(means, np.std),
        "median": _finite_or(medians, np.mean),
        "median_deviation": _finite_or(medians, np.std),
        "best": float(losses.min()),
        "diverged": float(np.mean(~np.isfinite(losses))),
    }


def best_of_groups(losses: np.ndarray, validation: np.ndarray, size: int) -> np.ndarray:
    """Of each `size` draws in turn the test loss of the one with the least validation loss."""
    count = len(losses) // size
    order = np.where(np.isfinite(validation), validation, math.inf)[: count * size]
    chosen = order.reshape(count, size).argmin(axis=1)
    return losses[: count * size].reshape(count, size)[np.arange(count), chosen]


def _means_of_finite(samples: np.ndarray) -> np.ndarray:
    finite = np.isfinite(samples)
    totals = np.where(finite, samples, 0).sum(axis=1)
    counts = finite.sum(axis=1)
    return np.divide(totals, counts, out=np.full(len(samples), math.inf), where=counts > 0)


def _finite_or(values: np.ndarray, statistic) -> float:
    """`statistic` of the finite values, inf where most are not."""
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if len(finite) > len(values) / 2 else math.inf


# ---- runs, read back ----


@dataclass(frozen=True)
class Recorded:
    """One run read back: its configuration and draws.npz; `title` names it in tables."""

    title: str
    config: dict
    columns: dict[str, np.ndarray]


def read_run(directory: str | Path) -> Recorded:
    """The run in `directory`; RunLogError where it is none of tune_one_pass.py."""
    directory = Path(directory)
    config = read_config(directory)
    path = directory / "draws.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = dict(file)
    except (OSError, ValueError) as error:
        raise RunLogError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    return Recorded(directory.name, config, columns)


def table(runs: Sequence[Recorded]) -> str:
    """Markdown: mean and median of the final test loss of each run, and how many diverged.

    A run of fixed hyperparameters that has a validation loss also gets a line for the best of each
    three draws, "3-batched".
    """
    lines = [
        "| run | data | draws | mean | median | best | diverged | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        losses = final_losses(run.columns)
        lines.append(_line(run, run.title, losses))
        validation = run.columns["Loss/Validation"][-1]
        if run.config["method"] == "fixed" and np.isfinite(validation).any() and len(losses) > 2:
            best = best_of_groups(losses, validation, 3)
            lines.append(_line(run, f"{run.title}, 3-batched", best))
    return "\n".join(lines) + "\n"


def _line(run: Recorded, title: str, losses: np.ndarray) -> str:
    found = summary(losses)
    mean = f"{found['mean']:.4g} ± {found['mean_deviation']:.2g}"
    median = f"{found['median']:.4g} ± {found['median_deviation']:.2g}"
    seconds = run.columns["seconds"][-1]
    return (
        f"| {title} | {run.config['dataset']} | {len(losses)} | {mean} | {median} | "
        f"{found['best']:.4g} | {found['diverged']:.1%} | {seconds:.0f} |"
    )
