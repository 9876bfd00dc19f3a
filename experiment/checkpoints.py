"""The checkpoints of a run: the last one and the one before it, each with its checksum.

A checkpoint file is the output of torch.save followed by its SHA-256 digest of 32 bytes, which
torch.load ignores: torch.load(path, weights_only=True) opens it. Once the first checkpoint has been
saved, a good one is on disk at whatever moment the process is killed. Each checkpoint holds the
digests of config.json and of the rows of metrics.csv that it continues, so that files of different
runs cannot be mixed.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.errors import RunLogError, disk_errors
from experiment.files import sync, write_durably
from experiment.run_reader import read_config

FORMAT = 1
LAST, PREVIOUS, NEW = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.pt.new"
DIGEST_BYTES = hashlib.sha256().digest_size
MAY_DIFFER = ("data_dir", "save_state", "to_zoo")  # flags without effect on a run's numbers


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step`, and digests of the files that it belongs to.

    last_row: the step of the last row of metrics.csv at that moment; -1 if it had no rows, or if
        the file was saved before this field existed.
    configuration: the digest of config.json; None in files saved before this field existed.
    metrics: the size of metrics.csv in bytes, and the digest of those bytes; None likewise.
    """

    step: int
    state: dict[str, Any]
    last_row: int = -1
    configuration: str | None = None
    metrics: tuple[int, str] | None = None


class _UnusableError(Exception):
    """A checkpoint file that is damaged or belongs to another run."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint as checkpoint.pt and keep the one before it as checkpoint.previous.pt.

    Raises TypeError if the state holds anything but tensors, numbers, strings, and dicts, lists
    and tuples of them, and RunLogError if it can't be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **vars(checkpoint)}, buffer)
    payload = buffer.getvalue()
    try:
        _load(payload)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise TypeError(f"a checkpoint holds tensors and plain values only: {reason}") from error
    current, new = directory / LAST, directory / NEW
    with disk_errors(f"can't write {current}"):
        write_durably(new, payload + hashlib.sha256(payload).digest())
        if current.exists():
            os.replace(current, directory / PREVIOUS)
        os.replace(new, current)
        sync(directory)


def load_checkpoint(
    directory: Path, configuration: str, warn: Callable[[str], None]
) -> Checkpoint | None:
    """The last checkpoint in the directory, or None if there is none.

    A checkpoint that is damaged, or was saved under another configuration, is set aside with a
    warning, and the one before it is used. Raises RunLogError if neither can be used.

    configuration: the digest of the run's configuration.
    """
    problems = []
    for name in _present(directory):
        try:
            checkpoint = _read(directory / name, configuration)
        except _UnusableError as error:
            problems.append(f"{name} {error}")
            continue
        if problems:
            warn(
                f"{directory}/{problems[0]}: resuming from the previous checkpoint, {name}, of "
                f"step {checkpoint.step}"
            )
        if name != LAST:
            _set_aside_damaged(directory)
        return checkpoint
    if problems:
        raise RunLogError(
            f"no good checkpoint in {directory}: {'; '.join(problems)}; put the run's own files "
            "back, or start anew with another --out"
        )
    return None


def refuse_changed_files(directory: str | Path) -> None:
    """Raise RunLogError if config.json or metrics.csv is not the one the checkpoint belongs to.

    A run without a good checkpoint passes, and so does one whose checkpoint holds no digests.
    """
    directory, saved = Path(directory), []
    for name in _present(directory):
        with suppress(_UnusableError):
            saved.append((name, _read(directory / name)))
    for name, checkpoint in saved[:1]:
        digest = configuration_digest(read_config(directory))
        if checkpoint.configuration not in (None, digest):
            raise RunLogError(f"{directory}/config.json is not the one that {name} was saved "
                              "under: put the run's own files back")  # fmt: skip
        if checkpoint.metrics is not None:
            _refuse_changed_metrics(directory / "metrics.csv", name, *checkpoint.metrics)


def _refuse_changed_metrics(path: Path, checkpoint: str, length: int, digest: str) -> None:
    content = b""
    if path.exists():
        with disk_errors(f"can't read {path}"):
            content = path.read_bytes()
    if content and hashlib.sha256(content[:length]).hexdigest() != digest:
        raise RunLogError(f"{path} is damaged: its rows are not those that {checkpoint} was saved "
                          "after: put the run's own files back")  # fmt: skip


def configuration_digest(config: Mapping[str, Any]) -> str:
    """The SHA-256 of everything in a configuration (as in config.json) that may change a number."""
    relevant = {name: value for name, value in config.items() if name not in MAY_DIFFER}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


@contextmanager
def taking_up_state() -> Iterator[None]:
    """Turn errors of `load_state_dict`, given a state it doesn't understand, into RunLogError."""
    try:
        yield
    except RunLogError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        raise RunLogError(
            "the checkpoint is one of another command, or of another version of this one "
            f"({reason}): start anew with another --out"
        ) from problem


def has_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` holds a checkpoint file, good or damaged."""
    return bool(_present(Path(directory)))


def _present(directory: Path) -> list[str]:
    return [name for name in (LAST, PREVIOUS) if (directory / name).exists()]


def _set_aside_damaged(directory: Path) -> None:
    """Rename a damaged checkpoint.pt, so that the next save doesn't replace the good one by it."""
    with disk_errors(f"can't write to {directory}"), suppress(FileNotFoundError):
        os.replace(directory / LAST, directory / "checkpoint.damaged.pt")


def _read(path: Path, configuration: str | None = None) -> Checkpoint:
    """The checkpoint in a file; _UnusableError if it is damaged or of another configuration."""
    with disk_errors(f"can't read {path}"):
        content = path.read_bytes()
    payload = _checked(content)
    try:
        saved = _load(payload)
        form, step, state = saved["format"], saved.get("step"), saved.get("state")
    except Exception as error:  # from torch, pickle or zipfile, or because it isn't a dict
        raise _UnusableError(f"is no checkpoint of a run ({type(error).__name__})") from error
    if form != FORMAT:
        raise RunLogError(f"{path} is of format {form}, this program reads format {FORMAT}")
    if not isinstance(step, int) or not isinstance(state, dict):
        raise _UnusableError("is damaged (without a step and a state)")
    of_configuration, metrics = saved.get("configuration"), saved.get("metrics")
    if metrics is not None and [*map(type, metrics)] != [int, str]:
        raise _UnusableError("is damaged (without a length and a digest of metrics.csv)")
    if configuration is not None and of_configuration not in (None, configuration):
        raise _UnusableError("is of another run than config.json, or that was changed")
    return Checkpoint(step, state, saved.get("last_row", -1), of_configuration, metrics)


def _checked(content: bytes) -> bytes:
    """The content of a file without its digest; raises _UnusableError if the digest is wrong."""
    behind = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    before = content[DIGEST_BYTES:], content[:DIGEST_BYTES]  # the order in older versions
    for payload, digest in (behind, before):
        if hashlib.sha256(payload).digest() == digest:
            return payload
    raise _UnusableError(f"is damaged ({len(content)} bytes, checksum wrong)")


def _load(payload: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
