"""Writes the directory of a run: configuration, metrics, TensorBoard events, checkpoints, results.

    with RunLog.create("runs/first", {"seed": 0}) as log:
        finished = run_steps(log, algorithm, "epoch", 100)      # experiment/loop.py
        log.write_results({"accuracy": 0.9})

A run may be killed at any moment. Once the first checkpoint has been saved, a good one is on disk
at all times, and `load_checkpoint` cuts metrics.csv back to it, so that a resumed run leaves the
same file as an uninterrupted one. Errors of the disk are raised as a `RunLogError` of one line.
Run directories are read by run_reader.py.
"""

import csv
import fcntl
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from experiment import checkpoints
from experiment.checkpoints import Checkpoint, configuration_digest
from experiment.environment import describe_environment
from experiment.errors import RunLogError, disk_errors
from experiment.files import NEW, finite_or_null, json_text, remove_leftovers, write_whole
from experiment.progress import Progress, show_above_the_bar, shown_progress
from experiment.run_reader import (
    complete_lines,
    metrics_table,
    path_within,
    read_config,
    read_json,
    read_metrics,
    refuse_links,
    step_of,
)
from experiment.tensorboard_events import EventFile

OF_A_RUN = (  # names of what this module writes, and its callers by way of it
    "config.json", "environment.json", "log.txt", "metrics.csv", "results.json", "parameters.npz",
    "rule.json", "rule.txt", "rule.tex", checkpoints.LAST, checkpoints.PREVIOUS, checkpoints.NEW,
    "checkpoint.damaged.pt",
)  # fmt: skip


class RunLog:
    """The directory of one run, opened by `create` or `reopen` and closed by `close` or `with`.

    directory: where everything is written.
    config: the configuration as saved in config.json.
    quiet: print no progress and nothing on stdout; log.txt is written all the same.
    figures: whether `plot` draws.
    step: the last step recorded, or that of the checkpoint loaded; -1 before the first.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], lock: BinaryIO, quiet: bool, figures: bool
    ) -> None:
        self.directory = directory
        self.config = config
        self.quiet = quiet
        self.figures = figures
        self._lock = lock
        self._metrics: BinaryIO | None = None
        self._columns: list[str] | None = None
        self.step = -1
        self._written, self._digest = 0, hashlib.sha256()  # bytes of metrics.csv, and their digest
        self._first_step: int | None = None
        self._events: EventFile | None = None

    @classmethod
    def create(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        quiet: bool = False,
        figures: bool = True,
        overwrite: bool = False,
    ) -> Self:
        """Start a run in a new or empty directory; raises RunLogError if it is neither.

        overwrite: remove a run in the directory first. Raises RunLogError, and removes nothing, if
            a process is writing it or anything there is not of a run.
        """
        directory = Path(directory)
        replaced = overwrite and (directory / "config.json").exists()
        with disk_errors(f"can't write the run directory {directory}"):
            if not replaced:
                _refuse_occupied(directory)
            directory.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(directory)
        try:
            if replaced:
                _remove_run(directory)
            _refuse_occupied(directory)
            _remove_leftovers(directory)
            _write(directory / "config.json", json_text(dict(config)))
            log = cls(directory, read_json(directory / "config.json"), lock, quiet, figures)
            log._describe_environment()
        except BaseException:
            lock.close()
            raise
        return log

    @classmethod
    def reopen(cls, directory: str | Path, quiet: bool = False, figures: bool = True) -> Self:
        """Resume the run in `directory`; call `load_checkpoint` before recording anything.

        Raises RunLogError if it is not the directory of a run, or another process writes in it.
        """
        directory = Path(directory)
        config = read_config(directory)
        refuse_links(directory)
        lock = _take_lock(directory)
        try:
            _remove_leftovers(directory)
            log = cls(directory, config, lock, quiet, figures)
            log._describe_environment()
        except BaseException:
            lock.close()
            raise
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file and release the directory; nothing may be written afterwards."""
        try:
            with disk_errors(f"can't write to {self.directory}"):
                if self._metrics is not None:
                    self._metrics.close()
                if self._events is not None:
                    self._events.close()
        finally:
            self._lock.close()

    def path(self, name: str) -> Path:
        """The path of this run's file `name`; RunLogError for a name that leads elsewhere."""
        return path_within(self.directory, name)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` to the file `name`, atomically.

        Numbers that are not finite become null, other objects that JSON doesn't know their `str`.
        """
        _write(self.path(name), json_text(finite_or_null(value)))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json as `write_json` does; TensorBoard shows its numbers."""
        self.write_json("results.json", results)
        numbers = {
            name: float(value) for name, value in results.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }  # fmt: skip
        settings = {name: value for name, value in self.config.items() if value is not None}
        self._show(lambda events: events.add_results(max(self.step, 0), settings, numbers))

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the file `name`, atomically."""
        _write(self.path(name), text)

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write `arrays` to the .npz file `name`, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        _write(self.path(name), buffer.getvalue())

    def write_parameters(
        self, params: Iterable[Mapping[str, torch.Tensor]], input_shape: Sequence[int]
    ) -> None:
        """Write parameters.npz: the tensors of each layer, and the shape of one input.

        Layers that have parameters are numbered from 1: "1.w" is w of the first of them, and
        "1.input_mean" is subtracted from its inputs. "input_shape" is the inputs' shape.

        params: one dict of tensors per layer.
        """
        arrays, number = {}, 1
        for layer in params:
            for name, tensor in layer.items():
                arrays[f"{number}.{name}"] = tensor.numpy(force=True)
            number += bool(layer.keys() - {"input_mean"})
        self.write_arrays("parameters.npz", arrays | {"input_shape": np.array(input_shape)})
        self.show_distributions(
            max(self.step, 0), {f"parameters/{name}": values for name, values in arrays.items()}
        )

    def show_distributions(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Add the distribution of each array's finite numbers to what TensorBoard shows."""
        self._show(lambda events: events.add_histograms(step, arrays))

    # ---- metrics ----

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row to metrics.csv and to the TensorBoard events.

        Floats are written so that they read back exactly. Raises RunLogError if `step` is not
        above that of the last row, or if the columns are not those of the first row.
        """
        if step <= self.step:
            raise RunLogError(
                f"can't record step {step}: {self.path('metrics.csv')} already reaches step "
                f"{self.step}"
            )
        columns = list(row)
        lines = []
        if self._columns is None:
            lines.append(["step", *columns])
            self._columns = columns
        elif columns != self._columns:
            raise RunLogError(_other_columns(columns, self._columns))
        lines.append([str(int(step)), *(repr(float(value)) for value in row.values())])
        with disk_errors(f"can't write {self.path('metrics.csv')}"):
            self._append(lines)
        self._show(lambda events: events.add(step, row))
        self.step = step

    def _append(self, lines: list[list[str]]) -> None:
        if self._metrics is None:
            self._metrics = self.path("metrics.csv").open("ab")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        content = text.getvalue().encode()
        self._metrics.write(content)
        self._metrics.flush()
        self._count(content)

    def _count(self, content: bytes) -> None:
        self._written += len(content)
        self._digest.update(content)

    def _show(self, add: Callable[[EventFile], None]) -> None:
        """Add to what TensorBoard shows of the run."""
        with disk_errors(f"can't write to {self.directory}"):
            if self._events is None:
                self._events = EventFile(self.directory, self._first_step)
            add(self._events)

    def _rows_until(self, checkpoint: Checkpoint | None) -> bytes:
        """The complete rows up to the checkpoint; a resumed run writes the later ones again.

        Raises RunLogError if they are not the rows that were there when the checkpoint was saved.
        If the last of them are missing, or the checkpoint holds no digest of them, their content
        can't be checked.
        """
        path = self.path("metrics.csv")
        if checkpoint is None or not path.exists():
            return b""
        with disk_errors(f"can't read {path}"):
            content = path.read_bytes()
        if checkpoint.metrics is not None:
            length, digest = checkpoint.metrics
            if hashlib.sha256(content[:length]).hexdigest() == digest:
                return content[:length]
        header, *lines = complete_lines(content) or [b""]
        steps = [step_of(line.split(b",", 1)[0], path) for line in lines]
        kept = [line for line, step in zip(lines, steps, strict=True) if step <= checkpoint.step]
        complete = max(steps, default=-1) >= checkpoint.last_row
        if checkpoint.metrics is not None and complete:
            raise RunLogError(
                f"{path} is damaged: its rows up to step {checkpoint.step} are not those that the "
                "checkpoint was saved after; put them back, or remove it to go on without them"
            )
        return b"".join([header, *kept]) if kept else b""

    def _keep_rows(self, rows: bytes) -> None:
        """Cut metrics.csv back to these rows, possibly none."""
        path = self.path("metrics.csv")
        header, table = metrics_table(rows, path)
        self._columns = header[1:] or None
        self.step = step_of(table[-1][0], path) if table else -1
        if path.exists() and path.stat().st_size != len(rows):
            _write(path, rows)
        self._written, self._digest = 0, hashlib.sha256()
        self._count(rows)

    # ---- checkpoints ----

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Save the state after `step` as checkpoint.pt, keeping the one before it.

        state: tensors, numbers, strings, and dicts, lists and tuples of them.
        """
        if self._metrics is not None:
            with disk_errors(f"can't write {self.path('checkpoint.pt')}"):
                os.fsync(self._metrics.fileno())
        checkpoint = Checkpoint(
            step,
            state,
            self.step,
            configuration_digest(self.config),
            (self._written, self._digest.hexdigest()),
        )
        checkpoints.save_checkpoint(self.directory, checkpoint)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The step and state saved last, or None; also cuts metrics.csv back to that step.

        A checkpoint that is damaged or belongs to another run is set aside, and the one before it
        is used. Raises RunLogError if neither can be used, or if earlier rows have changed.
        """
        digest = configuration_digest(self.config)
        checkpoint = checkpoints.load_checkpoint(self.directory, digest, self.warn)
        self._keep_rows(self._rows_until(checkpoint))
        if checkpoint is None:
            self._first_step = 0
            return None
        self._first_step = checkpoint.step + 1
        self._warn_of_lost_rows(checkpoint.last_row)
        self.step = checkpoint.step
        return checkpoint.step, checkpoint.state

    def _warn_of_lost_rows(self, last_row: int) -> None:
        """Warn if metrics.csv ends before the last row that preceded the checkpoint."""
        if self.step < last_row:
            ending = f"ends at step {self.step}" if self.step >= 0 else "has no rows"
            self.warn(
                f"{self.path('metrics.csv')} {ending}, the checkpoint was saved after the row of "
                f"step {last_row}: the rows between are lost"
            )

    def history(self) -> dict[str, np.ndarray]:
        """The columns of metrics.csv so far, as returned by `read_metrics`."""
        return read_metrics(self.directory)

    # ---- output on the screen ----

    def say(self, text: str) -> None:
        """Print `text` on stdout, above a progress bar, unless quiet; append it to log.txt."""
        self._append_to_log(text)
        if not self.quiet:
            show_above_the_bar(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print `text` on stderr, also when quiet, and append it to log.txt."""
        self._append_to_log(text)
        show_above_the_bar(text, sys.stderr)

    def _append_to_log(self, text: str) -> None:
        path = self.path("log.txt")
        line = text.encode(errors="backslashreplace") + b"\n"
        with disk_errors(f"can't write {path}"), path.open("ab") as file:
            file.write(line)

    def plot(self, figures_of: Callable[[Path], object]) -> None:
        """Let `figures_of` draw the figures of the run in its directory, unless figures are off."""
        if self.figures:
            figures_of(self.directory)
            drawn = sorted((self.directory / "figures").glob("*.png"))
            self._show(lambda events: events.add_images(max(self.step, 0), drawn))

    @contextmanager
    def progress(self, total: int, initial: int = 0, description: str = "") -> Iterator[Progress]:
        """Progress from `initial` to `total` on stderr, unless quiet; see progress.py."""
        with shown_progress(total, initial, description, self.quiet) as progress:
            yield progress

    def _describe_environment(self) -> None:
        path = self.path("environment.json")
        entries = read_json(path) if path.exists() else []
        if not isinstance(entries, list):
            raise RunLogError(f"{path} is damaged: not a list of environments")
        _write(path, json_text([*entries, describe_environment()]))


class SilentLog:
    """Takes the place of RunLog in the processes of a team that write nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load_checkpoint(self) -> None:
        """Load nothing: `run_steps` passes on what the first process has loaded."""

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Do nothing."""

    def history(self) -> dict[str, np.ndarray]:
        """No columns."""
        return {}

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    @contextmanager
    def progress(self, total: int, initial: int = 0, description: str = "") -> Iterator[Progress]:
        """A Progress that shows nothing."""
        yield Progress(total, initial, description, quiet=True)


class MemoryLog(SilentLog):
    """Takes the place of RunLog in a run that keeps its rows in memory and writes no files."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row."""
        self._rows.append({"step": step, **row})

    def history(self) -> dict[str, np.ndarray]:
        """The rows so far, as one array [rows] per column."""
        names = self._rows[0] if self._rows else ()
        return {name: np.array([row[name] for row in self._rows]) for name in names}

    def say(self, text: str) -> None:
        """Print `text` on stdout, above a progress bar."""
        show_above_the_bar(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print `text` on stderr, above a progress bar."""
        show_above_the_bar(text, sys.stderr)

    @contextmanager
    def progress(self, total: int, initial: int = 0, description: str = "") -> Iterator[Progress]:
        """Progress from `initial` to `total` on stderr; see progress.py."""
        with shown_progress(total, initial, description) as progress:
            yield progress


def _other_columns(columns: list[str], expected: list[str]) -> str:
    new = [name for name in columns if name not in expected]
    missing = [name for name in expected if name not in columns]
    if not new and not missing:
        return "a row of metrics.csv must have its columns in the same order as the first row"
    return f"a row of metrics.csv must have the first row's columns: new {new}, missing {missing}"


# ---- writing ----


def _write(path: Path, content: bytes | str) -> None:
    with disk_errors(f"can't write {path}"):
        write_whole(path, content)


def _refuse_occupied(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunLogError(f"{directory} is a file, not a directory: choose another --out")
    refuse_links(directory)
    names = [entry.name for entry in directory.iterdir()]
    # a process killed before it had written config.json may have left these; they do no harm
    if any(name != "lock" and not name.startswith(NEW) for name in names):
        raise RunLogError(
            f"{directory} is not empty: choose another --out, or go on with --resume {directory}"
        )


def _remove_run(directory: Path) -> None:
    """Remove a run's files, but not the lock; raises RunLogError if anything else is there."""
    refuse_links(directory)
    read_config(directory)
    entries = [path for path in directory.rglob("*") if path.name != "lock"]
    known = [path for path in entries if _is_of_a_run(path.relative_to(directory))]
    for path in entries:
        if path not in known or not (directory / "environment.json").exists():
            raise RunLogError(f"{path} is not of a run: move it, or choose another directory")
    with disk_errors(f"can't remove the run in {directory}"):
        for path in known:
            if path.is_file():
                path.unlink()
        shutil.rmtree(directory / "figures", ignore_errors=True)


def _is_of_a_run(path: Path) -> bool:
    """Whether a run writes a file of this name, relative to its directory."""
    if path.parts[0] == "figures":
        return len(path.parts) == 1 or path.suffix == ".png"
    return len(path.parts) == 1 and (path.name in OF_A_RUN or path.name.startswith("events.out."))


def _remove_leftovers(directory: Path) -> None:
    """Remove the temporary files that a killed process has left in a run's directory."""
    for folder in (directory, directory / "figures"):
        remove_leftovers(folder)
    (directory / checkpoints.NEW).unlink(missing_ok=True)


def _take_lock(directory: Path) -> BinaryIO:
    """Lock the directory until the returned file is closed or this process ends in any way.

    Raises RunLogError if another process holds the lock.
    """
    with disk_errors(f"can't write the run directory {directory}"):
        lock = open(directory / "lock", "a+b", opener=_open_no_link)  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "unknown"
            lock.close()
            raise RunLogError(
                f"{directory} is being written by process {holder}: wait for it, or stop it"
            ) from None
        except OSError:
            lock.close()
            raise
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
        lock.flush()
    return lock


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
