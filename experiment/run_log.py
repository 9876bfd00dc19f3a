"""One run's directory: configuration, versions, metrics, TensorBoard events, checkpoints, results.

    with RunLog.create("runs/first", {"seed": 0}) as log:
        last, state = log.load_checkpoint() or (0, None)    # not None after RunLog.reopen
        with log.progress(100, last, "epoch") as progress:
            finished = run_to_end(log, progress, range(last + 1, 101), train_epoch, state_dict)

A run may be killed at any moment. Whatever moment that is, a good checkpoint is on disk once the
first has been saved, and `load_checkpoint` cuts metrics.csv back to that checkpoint, so that a
resumed run leaves the same file as an uninterrupted one. What goes wrong between here and the disk
is a `RunLogError` of one line.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from tqdm import tqdm

from experiment.errors import WrongInputError
from experiment.files import json_text, sync, write_durably, write_whole
from experiment.processes import ALONE, Team
from experiment.tensorboard_events import EventFile

CHECKPOINT_FORMAT = 1
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # the last one, the one before it
DIGEST_BYTES = hashlib.sha256().digest_size


class RunLogError(WrongInputError):
    """A run directory that can't be written, read or resumed; the message is one line."""


class RunLog:
    """The directory of one run: made by `create` or `reopen`, released by `close` or by `with`.

    directory: where everything is written.
    config: the configuration as saved in config.json.
    quiet: no progress and nothing on stdout; log.txt is written all the same.
    figures: whether `draw` draws.
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
        self._last_step = -1
        self._first_step: int | None = None
        self._events: EventFile | None = None

    @classmethod
    def create(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        quiet: bool = False,
        figures: bool = True,
    ) -> Self:
        """Start a run in a new or empty directory."""
        directory = Path(directory)
        with _reported(f"can't write the run directory {directory}"):
            _refuse_occupied(directory)
            directory.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(directory)
        try:
            _refuse_occupied(directory)
            _write(directory / "config.json", json_text(dict(config)))
            log = cls(directory, read_json(directory / "config.json"), lock, quiet, figures)
            log._describe_environment()
        except BaseException:
            lock.close()
            raise
        return log

    @classmethod
    def reopen(cls, directory: str | Path, quiet: bool = False, figures: bool = True) -> Self:
        """Go on with the run in `directory`; call `load_checkpoint` before recording anything."""
        directory = Path(directory)
        config = read_config(directory)
        lock = _take_lock(directory)
        try:
            log = cls(directory, config, lock, quiet, figures)
            log._describe_environment()
            log._read_last_row()
        except BaseException:
            lock.close()
            raise
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close every file and release the directory; nothing may be written after it."""
        try:
            with _reported(f"can't write to {self.directory}"):
                if self._metrics is not None:
                    self._metrics.close()
                if self._events is not None:
                    self._events.close()
        finally:
            self._lock.close()

    def path(self, name: str) -> Path:
        """Where the file `name` of this run is."""
        return self.directory / name

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` to the file `name`, atomically; what JSON doesn't know goes in as `str`."""
        _write(self.path(name), json_text(value))

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the file `name`, atomically."""
        _write(self.path(name), text)

    def write_rule(self, rule, effects: Mapping[str, float] | None = None) -> None:
        """Write a learning rule as rule.json, rule.txt and rule.tex, each atomically.

        With the effects of its terms, as `term_effects` gives them, the latter are sorted by them.
        """
        self.write_json("rule.json", rule.to_dict())
        self.write_text("rule.txt", f"{rule.formula(effects)}\n")
        self.write_text("rule.tex", f"{rule.tex(effects)}\n")

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write `arrays` to the .npz file `name`, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        _write(self.path(name), buffer.getvalue())

    def write_parameters(
        self, params: Iterable[Mapping[str, torch.Tensor]], input_shape: Sequence[int]
    ) -> None:
        """Write parameters.npz: "1.w" is w of the first layer that has any; the inputs' shape."""
        arrays = {
            f"{number}.{name}": tensor.numpy(force=True)
            for number, layer in enumerate((layer for layer in params if layer), 1)
            for name, tensor in layer.items()
        }
        self.write_arrays("parameters.npz", arrays | {"input_shape": np.array(input_shape)})

    # ---- metrics ----

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row to metrics.csv and to the TensorBoard events.

        Steps must rise from row to row; the columns of the first row are those of all rows. Floats
        are written so that they read back exactly.
        """
        if step <= self._last_step:
            raise RunLogError(
                f"can't record step {step}: {self.path('metrics.csv')} already reaches step "
                f"{self._last_step}"
            )
        columns = list(row)
        lines = []
        if self._columns is None:
            lines.append(["step", *columns])
            self._columns = columns
        elif columns != self._columns:
            raise RunLogError(_other_columns(columns, self._columns))
        lines.append([str(int(step)), *(repr(float(value)) for value in row.values())])
        with _reported(f"can't write {self.path('metrics.csv')}"):
            self._append(lines)
            self._add_events(step, row)
        self._last_step = step

    def _append(self, lines: list[list[str]]) -> None:
        if self._metrics is None:
            self._metrics = self.path("metrics.csv").open("ab")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        self._metrics.write(text.getvalue().encode())
        self._metrics.flush()

    def _add_events(self, step: int, row: Mapping[str, float]) -> None:
        if self._events is None:
            self._events = EventFile(self.directory, self._first_step)
        self._events.add(step, row)

    def _read_last_row(self) -> None:
        header, rows = _metrics_rows(self.path("metrics.csv"))
        self._columns = header[1:] or None
        self._last_step = _step_of(rows[-1][0], self.path("metrics.csv")) if rows else -1

    def _cut_metrics(self, step: int) -> None:
        """Keep the whole rows up to `step`; the run will write the later ones again."""
        path = self.path("metrics.csv")
        self._first_step = step + 1
        if path.exists():
            with _reported(f"can't read {path}"):
                whole = path.read_bytes()
            lines = _complete_lines(whole)
            kept = [line for line in lines[1:] if _step_of(line.split(b",", 1)[0], path) <= step]
            text = b"".join([*lines[:1], *kept]) if kept else b""
            if text != whole:
                _write(path, text)
        self._read_last_row()

    # ---- checkpoints ----

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Save as checkpoint.pt what the run needs to go on after `step`.

        The checkpoint before it stays, as checkpoint.previous.pt.
        state: tensors, numbers, strings, and dicts, lists and tuples of them.
        """
        buffer, last_row = io.BytesIO(), self._last_step
        saved = {"format": CHECKPOINT_FORMAT, "step": step, "state": state, "last_row": last_row}
        torch.save(saved, buffer)
        payload = buffer.getvalue()
        try:
            _load(payload)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise TypeError(
                f"a checkpoint holds tensors and plain values only: {reason}"
            ) from error
        current, new = self.path("checkpoint.pt"), self.path("checkpoint.pt.new")
        with _reported(f"can't write {current}"):
            if self._metrics is not None:
                os.fsync(self._metrics.fileno())
            write_durably(new, hashlib.sha256(payload).digest() + payload)
            if current.exists():
                os.replace(current, self.path("checkpoint.previous.pt"))
            os.replace(new, current)
            sync(self.directory)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The step and state saved last, None where none were; cuts metrics.csv back to that step.

        A damaged checkpoint is set aside and the one before it is used; RunLogError where that is
        damaged too.
        """
        names = [name for name in CHECKPOINTS if self.path(name).exists()]
        for name in names:
            try:
                step, state, last_row = _read_checkpoint(self.path(name))
            except _DamagedError as error:
                self.warn(f"{self.path(name)} is damaged ({error})")
                continue
            if name != "checkpoint.pt":
                self.warn(
                    f"resuming from the previous checkpoint, {self.path(name)}, of step {step}"
                )
                self._set_aside_damaged()
            self._cut_metrics(step)
            self._warn_of_lost_rows(last_row)
            return step, state
        if names:
            raise RunLogError(
                f"no good checkpoint in {self.directory} ({' and '.join(names)} damaged): "
                "start anew with another --out"
            )
        self._cut_metrics(-1)
        return None

    def _warn_of_lost_rows(self, last_row: int) -> None:
        """Say so where the rows that were there at the checkpoint are not all there any more."""
        if self._last_step < last_row:
            there = f"ends at step {self._last_step}" if self._last_step >= 0 else "has no rows"
            self.warn(
                f"{self.path('metrics.csv')} {there}, the checkpoint was saved after the row of "
                f"step {last_row}: the rows between are lost"
            )

    def _set_aside_damaged(self) -> None:
        """Move a damaged checkpoint.pt away, lest the next save replace the good one by it."""
        with _reported(f"can't write to {self.directory}"), suppress(FileNotFoundError):
            os.replace(self.path("checkpoint.pt"), self.path("checkpoint.damaged.pt"))

    # ---- what the user sees ----

    def say(self, text: str) -> None:
        """Print `text` on stdout, above a progress bar, unless quiet; append it to log.txt."""
        self._append_to_log(text)
        if not self.quiet:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print `text` on stderr, also when quiet, and append it to log.txt."""
        self._append_to_log(text)
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)

    def _append_to_log(self, text: str) -> None:
        path = self.path("log.txt")
        with _reported(f"can't write {path}"), path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def draw(self, figures_of: Callable[[Path], object]) -> None:
        """Have `figures_of` draw the run in its directory, unless figures are left out."""
        if self.figures:
            figures_of(self.directory)

    @contextmanager
    def progress(self, total: int, initial: int = 0, description: str = "") -> Iterator["Progress"]:
        """Progress from `initial` to `total` on stderr: a bar on a terminal, else ten lines."""
        shown = Progress(total, initial, description, self.quiet)
        try:
            yield shown
        finally:
            shown.close()

    def _describe_environment(self) -> None:
        path = self.path("environment.json")
        entries = read_json(path) if path.exists() else []
        if not isinstance(entries, list):
            raise RunLogError(f"{path} is damaged: not a list of environments")
        _write(path, json_text([*entries, _environment()]))


class SilentLog:
    """Stands for the RunLog of a run in those of its processes that write nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load_checkpoint(self) -> None:
        """Nothing: the first process tells the others what it found."""

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Nothing."""

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, total: int, initial: int = 0, description: str = "") -> Iterator["Progress"]:
        """Progress that shows nothing."""
        yield Progress(total, initial, description, quiet=True)


class Progress:
    """How far a loop is, with the numbers that matter; made by `RunLog.progress`."""

    def __init__(self, total: int, initial: int, description: str, quiet: bool) -> None:
        self.total, self.done, self.description = total, initial, description
        self._started, self._initial = time.monotonic(), initial
        on_terminal = sys.stderr.isatty()
        self._in_lines = not quiet and not on_terminal
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description or None,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=quiet or not on_terminal,
        )

    def advance(self, numbers: Mapping[str, float] | None = None) -> None:
        """One more step is done; `numbers` are shown beside it."""
        tenth = self.done * 10 // max(self.total, 1)
        self.done += 1
        text = ", ".join(f"{name} {value:.4g}" for name, value in (numbers or {}).items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)
        if self._in_lines and self.done * 10 // max(self.total, 1) > tenth:
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        rest = elapsed / (self.done - self._initial) * (self.total - self.done)
        times = f"{tqdm.format_interval(elapsed)} gone, {tqdm.format_interval(rest)} to go"
        parts = [f"{self.description} {self.done}/{self.total}".strip(), text, times]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Interrupt:
    """Whether the user has asked the run to end: `requested`."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: note the first signal; at a second Ctrl-C stop at once."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            with suppress(OSError):  # os.write, because a handler may interrupt a print
                os.write(2, b"\nending after this step; Ctrl-C again stops at once\n")
        self.requested = True


@contextmanager
def finish_on_interrupt() -> Iterator[Interrupt]:
    """Let the first SIGINT or SIGTERM only set `.requested`, so that a loop ends after its step.

    A second SIGINT raises KeyboardInterrupt, and so should the command once its results are
    written: its exit status then tells that it was interrupted. Outside the main thread, where
    Python can't handle signals, nothing changes.
    """
    interrupt = Interrupt()
    before: dict[int, Callable | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt.handle)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_to_end(
    log: RunLog | SilentLog,
    progress: Progress,
    numbers: Iterable[int],
    step: Callable[[int], tuple[Mapping[str, float], Mapping[str, float]]],
    state_dict: Callable[[], dict[str, Any]],
    *,
    checkpoint_every: int = 1,
    team: Team = ALONE,
) -> bool:
    """Makes the steps of these numbers, a row of metrics for each; True once none is left.

    numbers: rising; the next is asked for after each step, which may have been the last.
    step(number) returns the row, and what is shown beside the progress.
    state_dict() is what a checkpoint holds. One is saved when so many steps are done since the
    start of the run, and after the last step.
    Ctrl-C ends it cleanly after the running step. Every process of the team calls this.
    """
    remaining = iter(numbers)
    following, stopped = next(remaining, None), False
    with finish_on_interrupt() as interrupt:
        while following is not None and not stopped:
            number = following
            row, shown = step(number)
            log.record(number, row)
            following = next(remaining, None)
            # A signal may reach the processes at different moments: they end together.
            stopped = any(team.gathered(interrupt.requested))
            due = (progress.done + 1) % checkpoint_every == 0
            if due or stopped or following is None:
                log.save_checkpoint(number, state_dict())
            progress.advance(shown)
    return following is None


# ---- reading a run ----


def read_metrics(directory: str | Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv as float64 arrays, "step" as int64; {} where it has none.

    Also of a run that is being written: a half-written last line is left out.
    """
    path = Path(directory) / "metrics.csv"
    header, rows = _metrics_rows(path)
    try:
        columns = {
            name: np.array([float(row[i]) for row in rows], dtype=np.float64)
            for i, name in enumerate(header)
        }
        if "step" in columns:
            steps = [int(row[header.index("step")]) for row in rows]
            columns["step"] = np.array(steps, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise RunLogError(f"{path} is damaged: {error}") from error
    return columns


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; RunLogError where it can't be read."""
    with _reported(f"can't read {path}"):
        text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunLogError(f"{path} is damaged: not JSON ({error})") from error


def read_results(directory: str | Path) -> dict[str, Any]:
    """The table in a run's results.json, {} where there is none; RunLogError where it is none."""
    path = Path(directory) / "results.json"
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise RunLogError(f"{path} is damaged: not a table of results")
    return results


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, {} where there is none; RunLogError where it is damaged."""
    path = Path(path)
    if not path.exists():
        return {}
    with _reported(f"can't read {path}"):
        content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of zipfile, zlib or numpy, whichever meets the damage first
        # not what numpy says, which advises to load what is no array
        reason = f"not a file of arrays of numbers ({type(error).__name__})"
        raise RunLogError(f"{path} is damaged: {reason}") from error


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a run in `directory` goes on from a checkpoint, or is refused for a damaged one."""
    return any((Path(directory) / name).exists() for name in CHECKPOINTS)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a run; RunLogError where `directory` isn't a run's directory."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise RunLogError(f"{directory} is not a run's directory: it holds no config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise RunLogError(f"{path} is damaged: not a table of flags")
    return config


def run_names(directories: Sequence[str | Path]) -> list[str]:
    """What runs are called beside each other: their last names, or paths where two names agree."""
    names = [Path(directory).resolve().name for directory in directories]
    return [
        name if names.count(name) == 1 else str(directory)
        for name, directory in zip(names, directories, strict=True)
    ]


def plain(value: Any) -> Any:
    """`value` as it reads back from JSON: tuples as lists, what JSON doesn't know as strings."""
    return json.loads(json.dumps(value, default=str))


def _metrics_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a metrics file; both empty where there is none."""
    if not path.exists():
        return [], []
    with _reported(f"can't read {path}"):
        lines = _complete_lines(path.read_bytes())
    try:
        table = list(csv.reader(line.decode() for line in lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunLogError(f"{path} is damaged: {error}") from error
    header, rows = (table[0], table[1:]) if table else ([], [])
    if any(len(row) != len(header) for row in rows) or (table and not header):
        raise RunLogError(f"{path} is damaged: its rows are not all as long as its header")
    return header, rows


def _step_of(cell: str | bytes, path: Path) -> int:
    """The step in the first cell of a row."""
    try:
        return int(cell)
    except ValueError as error:
        raise RunLogError(f"{path} is damaged: {error}") from error


def _complete_lines(text: bytes) -> list[bytes]:
    """The lines of `text`, each with its newline, without a last one that lacks it."""
    return [line + b"\n" for line in text.split(b"\n")[:-1]]


def _other_columns(columns: list[str], expected: list[str]) -> str:
    new = [name for name in columns if name not in expected]
    missing = [name for name in expected if name not in columns]
    if not new and not missing:
        return "a row of metrics.csv must have its columns in the same order as the first row"
    return f"a row of metrics.csv must have the first row's columns: new {new}, missing {missing}"


# ---- checkpoint files: a SHA-256 digest of 32 bytes, then what torch.save writes ----


class _DamagedError(Exception):
    """A checkpoint file that is not what was written."""


def _read_checkpoint(path: Path) -> tuple[int, dict[str, Any], int]:
    """Step and state, and the step of the last row then (-1: there was none, or it isn't told)."""
    with _reported(f"can't read {path}"):
        content = path.read_bytes()
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise _DamagedError(f"{len(content)} bytes, checksum wrong")
    try:
        saved = _load(payload)
        form, step, state = saved["format"], saved.get("step"), saved.get("state")
    except Exception as error:  # of torch, pickle or zipfile, or where it isn't a table
        raise _DamagedError(f"not a checkpoint of a run, {type(error).__name__}") from error
    if form != CHECKPOINT_FORMAT:
        raise RunLogError(
            f"{path} is of format {form}, this program reads format {CHECKPOINT_FORMAT}"
        )
    if not isinstance(step, int) or not isinstance(state, dict):
        raise _DamagedError("without a step and a state")
    return step, state, saved.get("last_row", -1)


def _load(payload: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


# ---- writing ----


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn an error of the operating system into a RunLogError: `what`, and why."""
    try:
        yield
    except OSError as error:
        raise RunLogError(f"{what}: {error.strerror or error}") from error


def _write(path: Path, content: bytes | str) -> None:
    with _reported(f"can't write {path}"):
        write_whole(path, content)


def _refuse_occupied(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunLogError(f"{directory} is a file, not a directory: choose another --out")
    if any(entry.name != "lock" for entry in directory.iterdir()):
        raise RunLogError(
            f"{directory} is not empty: choose another --out, or go on with --resume {directory}"
        )


def _take_lock(directory: Path) -> BinaryIO:
    """Hold the directory until the file returned is closed or this process ends in any way."""
    with _reported(f"can't write the run directory {directory}"):
        lock = (directory / "lock").open("a+b")
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


def _environment() -> dict[str, Any]:
    """What a number may depend on beyond the configuration."""
    here = Path(__file__).parent.parent
    commit = _git(here, "rev-parse", "HEAD")
    changes = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command_line": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """What git answers about the sources; None where there is no git or no repository."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        answer = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
