"""Atomic writing of files: a reader finds the old or the new content, also after a crash.

    write_whole(directory / "results.json", json_text(results))
    with in_place(directory / "table.csv") as path:      # for functions that write to a path
        np.savetxt(path, rows)

If several processes write the same file at the same time, the content of one of them remains.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NEW = ".new-"  # prefix of the temporary folders that files are written in before they are renamed


@contextmanager
def in_place(path: str | Path) -> Iterator[Path]:
    """A temporary path; the file written there replaces `path` at the end. Raises OSError."""
    path = Path(path)
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=NEW)
    except OSError as error:
        error.filename = str(path)  # the caller's path, not that of the temporary folder
        raise
    with folder as aside:
        new = Path(aside) / path.name
        yield new
        sync(new)
        os.replace(new, path)
    sync(path.parent)


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Replace the file `path` by this content atomically; text is written as UTF-8. Raises OSError.

    Bytes in the names of files that are not UTF-8 are written as escapes (see `displayable`).
    """
    with in_place(path) as new:
        new.write_bytes(displayable(content).encode() if isinstance(content, str) else content)


def displayable(text: str) -> str:
    """`text` with an escape, such as \\udcff, for each byte of a file's name that isn't UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Remove temporary folders left by killed writers, if unchanged for so many seconds.

    With seconds = 0 no other process may be writing in this folder.
    """
    for path in folder.glob(f"{NEW}*"):
        with suppress(OSError):  # another process may have removed it just now
            if time.time() - path.stat().st_mtime >= seconds:
                shutil.rmtree(path)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: bytes) -> str:
    """The short digest by which a configuration identifies a file's content."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def json_text(value: Any) -> str:
    """`value` as the text of a JSON file; objects that JSON doesn't know are written as `str`."""
    return json.dumps(value, indent=2, default=str) + "\n"


def finite_or_null(value: Any) -> Any:
    """`value` with None in place of each float that is not finite, which JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_null(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return value


def plain(value: Any) -> Any:
    """`value` as JSON would return it: tuples as lists, objects that JSON doesn't know as `str`."""
    return json.loads(json.dumps(value, default=str))
