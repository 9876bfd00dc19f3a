"""Eight UCI regression sets: where their rows come from, and how they are split.

    table = load_table("energy", "./data")
    split = split_table(table, validation_proportion=78 / 692)

A set is read from DATA_DIR/uci/<name>.txt (rows of numbers, the target in the last column). If that
is missing, it is fetched from OpenML or the UCI repository (Boston from mlxtend, if installed) and
saved there. If that fails, it is read from ../shared/data/uci beside the sources.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_sets.choices import TABLES
from data_sets.image_data import DataError
from experiment.files import in_place

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "uci"


@dataclass(frozen=True)
class Table:
    """A regression data set.

    Attributes:
        inputs: float64 [N, F].
        targets: float64 [N, 1].
        test_rows: the number of rows held out for the test.
        source: where the rows come from and how many there are.
    """

    inputs: Tensor
    targets: Tensor
    test_rows: int
    source: str

    def fingerprint(self) -> str:
        """The number of rows and a digest of them, as a text."""
        rows = torch.cat([self.inputs, self.targets], dim=1).contiguous().numpy()
        return f"{len(rows)}, sha256 {hashlib.sha256(rows).hexdigest()[:16]}"


@dataclass(frozen=True)
class Split:
    """Standardised training, validation and test rows.

    Attributes:
        training, validation, test: (inputs [N, F], targets [N, 1]), float64.
        target_variance: the factor from squared errors of standardised targets to squared units of
            the raw targets.
    """

    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    target_variance: float


def load_table(name: str, data_dir: str | Path = "./data") -> Table:
    """The rows of the set `name`.

    Raises DataError if the name is unknown, the file is damaged, or no source has the set.
    """
    if name not in TABLES:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(TABLES)}")
    path = Path(data_dir).expanduser() / "uci" / f"{name}.txt"
    if path.exists():
        return _as_table(name, _read_rows(path), str(path))
    failures = []
    for title, fetch in _fetchers(name):
        try:
            table = _as_table(name, fetch(), title)
        except Exception as error:  # the libraries' errors are of many types
            failures.append(f"{title}: {' '.join(str(error).split())[:120]}")
        else:
            with suppress(OSError):  # if the folder can't be written, rows are fetched each time
                _keep(path, table)
            return table
    last = SHARED / path.name
    if last.exists():
        return _as_table(name, _read_rows(last), str(last))
    raise DataError(
        f"no {name} data: put it at {path}, rows of numbers, the target last "
        f"(tried {'; '.join(failures)})"
    )


def split_table(table: Table, validation_proportion: float, seed: int = 1) -> Split:
    """Split permuted rows: test rows first, then validation rows, the rest for training.

    Inputs and targets are standardised by the mean and standard deviation of all but the test rows.

    validation_proportion: the share of validation rows among all but the test rows.
    seed: seeds the permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(table.inputs), generator=generator, device="cpu")
    test, rest = order[: table.test_rows], order[table.test_rows :]
    count = round(validation_proportion * len(rest))
    inputs, _ = _standardised(table.inputs, rest)
    targets, scale = _standardised(table.targets, rest)
    validation, training = ((inputs[rows], targets[rows]) for rows in (rest[:count], rest[count:]))
    return Split(training, validation, (inputs[test], targets[test]), float(scale**2))


def _standardised(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = columns[rows].std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1)  # naval has two constant columns
    return (columns - columns[rows].mean(dim=0)) / scale, scale


def _read_rows(path: Path) -> np.ndarray:
    try:
        return np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _as_table(name: str, rows: np.ndarray, source: str) -> Table:
    """The table of these rows, checked; the second target in naval's last column is dropped."""
    known = TABLES[name]
    if name == "naval" and rows.shape[1] == known.inputs + 2:
        rows = rows[:, :-1]
    if rows.shape != (known.rows, known.inputs + 1):
        raise DataError(
            f"{source} holds {rows.shape[0]} rows of {rows.shape[1]} numbers, "
            f"{name} has {known.rows} of {known.inputs + 1}"
        )
    if not np.isfinite(rows).all():
        raise DataError(f"{source} holds numbers that are not finite")
    values = torch.tensor(rows, dtype=torch.float64)
    description = f"{known.rows:,} rows of {name} from {source}"
    return Table(values[:, :-1], values[:, -1:], known.test_rows, description)


def _fetchers(name: str) -> list[tuple[str, Callable[[], np.ndarray]]]:
    known = TABLES[name]
    fetchers: list[tuple[str, Callable[[], np.ndarray]]] = []
    if name == "boston":
        fetchers.append(("mlxtend", _boston))
    if known.openml_id is not None:
        fetchers.append(("OpenML", lambda: _from_openml(known.openml_id)))
    if known.uci_id is not None:
        fetchers.append(("the UCI repository", lambda: _from_uci(name, known.uci_id)))
    return fetchers


def _boston() -> np.ndarray:
    from mlxtend.data import boston_housing_data

    return np.column_stack(boston_housing_data())


def _from_openml(number: int) -> np.ndarray:
    from sklearn.datasets import fetch_openml

    fetched = fetch_openml(data_id=number, as_frame=False, parser="liac-arff")
    return np.column_stack([fetched.data, fetched.target]).astype(np.float64)


def _from_uci(name: str, number: int) -> np.ndarray:
    from ucimlrepo import fetch_ucirepo

    fetched = fetch_ucirepo(id=number).data
    inputs, targets = fetched.features, fetched.targets
    if name == "wine":  # the repository's set also contains white wines
        red = fetched.original["color"] == "red"
        inputs, targets = inputs[red], targets[red]
    return np.column_stack([inputs.to_numpy(float), targets.to_numpy(float)[:, :1]])


def _keep(path: Path, table: Table) -> None:
    """Write the rows atomically to the file that the next call reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_place(path) as new:
        np.savetxt(new, torch.cat([table.inputs, table.targets], dim=1).numpy(), fmt="%.17g")
