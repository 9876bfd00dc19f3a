"""The checkpoints of a run: the last one, and the one before it, each with its checksum.

A file is a SHA-256 digest of 32 bytes, then what torch.save writes. Whenever the process is killed,
a good checkpoint is on disk once the first has been saved.
"""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.errors import RunLogError, disk_errors
from experiment.files import sync, write_durably

FORMAT = 1
LAST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `step`; last_row: the last row of metrics.csv then.

    last_row is -1 where there was none, or where an older file doesn't tell it.
    """

    step: int
    state: dict[str, Any]
    last_row: int = -1


class _DamagedError(Exception):
    """A checkpoint file that is not what was written."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Save as checkpoint.pt; the one before it stays, as checkpoint.previous.pt.

    The state: tensors, numbers, strings, and dicts, lists and tuples of them; TypeError for others.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **vars(checkpoint)}, buffer)
    payload = buffer.getvalue()
    try:
        _load(payload)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise TypeError(f"a checkpoint holds tensors and plain values only: {reason}") from error
    current, new = directory / LAST, directory / f"{LAST}.new"
    with disk_errors(f"can't write {current}"):
        write_durably(new, hashlib.sha256(payload).digest() + payload)
        if current.exists():
            os.replace(current, directory / PREVIOUS)
        os.replace(new, current)
        sync(directory)


def load_checkpoint(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint saved last, None where there is none.

    A damaged one is set aside, with a warning, and the one before it is used; RunLogError where
    that is damaged too.
    """
    names = [name for name in (LAST, PREVIOUS) if (directory / name).exists()]
    for name in names:
        try:
            checkpoint = _read(directory / name)
        except _DamagedError as error:
            warn(f"{directory / name} is damaged ({error})")
            continue
        if name != LAST:
            warn(
                f"resuming from the previous checkpoint, {directory / name}, of step "
                f"{checkpoint.step}"
            )
            _set_aside_damaged(directory)
        return checkpoint
    if names:
        raise RunLogError(
            f"no good checkpoint in {directory} ({' and '.join(names)} damaged): "
            "start anew with another --out"
        )
    return None


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a run in `directory` goes on from a checkpoint, or is refused for a damaged one."""
    return any((Path(directory) / name).exists() for name in (LAST, PREVIOUS))


def _set_aside_damaged(directory: Path) -> None:
    """Move a damaged checkpoint.pt away, lest the next save replace the good one by it."""
    with disk_errors(f"can't write to {directory}"), suppress(FileNotFoundError):
        os.replace(directory / LAST, directory / "checkpoint.damaged.pt")


def _read(path: Path) -> Checkpoint:
    with disk_errors(f"can't read {path}"):
        content = path.read_bytes()
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise _DamagedError(f"{len(content)} bytes, checksum wrong")
    try:
        saved = _load(payload)
        form, step, state = saved["format"], saved.get("step"), saved.get("state")
    except Exception as error:  # of torch, pickle or zipfile, or where it isn't a table
        raise _DamagedError(f"not a checkpoint of a run, {type(error).__name__}") from error
    if form != FORMAT:
        raise RunLogError(f"{path} is of format {form}, this program reads format {FORMAT}")
    if not isinstance(step, int) or not isinstance(state, dict):
        raise _DamagedError("without a step and a state")
    return Checkpoint(step, state, saved.get("last_row", -1))


def _load(payload: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
