"""Reads the files of a run's directory, also while the run is being written.

Files that are required and missing, unreadable or damaged raise a `RunLogError` of one line.
"""

import csv
import io
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import RunLogError, disk_errors
from experiment.files import displayable


def read_metrics(directory: str | Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv as float64 arrays, "step" as int64; {} if there are none.

    A half-written last line, of a run that is being written, is left out.
    """
    path = Path(directory) / "metrics.csv"
    if not path.exists():
        return {}
    with disk_errors(f"can't read {path}"):
        header, rows = metrics_table(path.read_bytes(), path)
    try:
        columns = {
            name: np.array([float(row[i]) for row in rows], dtype=np.float64)
            for i, name in enumerate(header)
        }
        if header:
            columns["step"] = np.array([int(row[0]) for row in rows], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise RunLogError(f"{path} is damaged: {error}") from error
    return columns


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; raises RunLogError if it can't be read."""
    with disk_errors(f"can't read {path}"):
        text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunLogError(f"{path} is damaged: not JSON ({error})") from error


def read_results(directory: str | Path) -> dict[str, Any]:
    """The table in a run's results.json, or {} without that file; RunLogError if it is no table."""
    path = Path(directory) / "results.json"
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise RunLogError(f"{path} is damaged: not a table of results")
    return results


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or {} without that file; RunLogError if it is damaged."""
    path = Path(path)
    if not path.exists():
        return {}
    with disk_errors(f"can't read {path}"):
        content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # from zipfile, zlib or numpy, whichever meets the damage first
        # not numpy's own message, which advises allow_pickle=True
        reason = f"not a file of arrays of numbers ({type(error).__name__})"
        raise RunLogError(f"{path} is damaged: {reason}") from error


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a run; raises RunLogError if `directory` isn't a run's directory."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise RunLogError(f"{directory} is not a run's directory: it holds no config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise RunLogError(f"{path} is damaged: not a table of flags")
    return config


def refuse_links(directory: str | Path) -> None:
    """Raise RunLogError if anything in a run's directory is neither a file nor a folder.

    Writing in a directory that came from somebody else could otherwise follow a symbolic link out
    of it. The directory itself, or a folder above it, may be a link.
    """
    for folder, folders, files in os.walk(directory):
        for path in (Path(folder) / name for name in (*folders, *files)):
            with suppress(FileNotFoundError):  # the run may be writing and removing files
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "no ordinary file"
                    raise RunLogError(
                        f"{path} is {kind}, which has no place inside a run's directory: put what "
                        "it stands for in its place, or remove it"
                    )


def path_within(folder: Path, name: str) -> Path:
    """The path of the file `name` in a folder.

    Raises RunLogError for a name that leads out of it, since names may come from untrusted files.
    """
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise RunLogError(f"{name!r} is not the name of a file in {folder}")
    return folder / name


def run_names(directories: Sequence[str | Path]) -> list[str]:
    """The names of runs in a comparison: their directories' names, or paths if two names agree."""
    names = [displayable(Path(directory).resolve().name) for directory in directories]
    return [
        name if names.count(name) == 1 else displayable(str(directory))
        for name, directory in zip(names, directories, strict=True)
    ]


# ---- the lines of metrics.csv ----


def metrics_table(content: bytes, path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a metrics file, possibly empty; raises RunLogError if it is damaged.

    path: where the content is from, for the message.
    """
    try:
        table = list(csv.reader(line.decode() for line in complete_lines(content)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunLogError(f"{path} is damaged: {error}") from error
    header, rows = (table[0], table[1:]) if table else ([], [])
    if any(len(row) != len(header) for row in rows):
        raise RunLogError(f"{path} is damaged: its rows are not all as long as its header")
    if table and (header[:1] != ["step"] or len({*header}) < len(header)):
        raise RunLogError(f"{path} is damaged: its header is not step and names, each once")
    return header, rows


def step_of(cell: str | bytes, path: Path) -> int:
    """The step in the first cell of a row; raises RunLogError if it isn't a whole number."""
    try:
        return int(cell)
    except ValueError as error:
        raise RunLogError(f"{path} is damaged: {error}") from error


def complete_lines(text: bytes) -> list[bytes]:
    """The lines of `text`, each with its newline; a last line without one is dropped."""
    return [line + b"\n" for line in text.split(b"\n")[:-1]]
