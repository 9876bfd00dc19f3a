"""Files that are whole at every moment: the old one or the new one, also after a crash.

    write_whole(directory / "results.json", json_text(results))
    with in_place(directory / "table.csv") as path:      # for what writes files by itself
        np.savetxt(path, rows)

Several processes may write the same file at the same moment: one of theirs stays.
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

NEW = ".new-"  # how the folders begin that files are written in, before they take their place


@contextmanager
def in_place(path: str | Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once the disk has it. Raises OSError."""
    path = Path(path)
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=NEW)
    except OSError as error:
        error.filename = str(path)  # the name that was asked for, not that of the folder
        raise
    with folder as aside:
        new = Path(aside) / path.name
        yield new
        sync(new)
        os.replace(new, path)
    sync(path.parent)


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Replace the file `path`, of text in UTF-8. Raises OSError.

    In a text, bytes of a file's name that are not UTF-8 become \\udcff.
    """
    with in_place(path) as new:
        new.write_bytes(displayable(content).encode() if isinstance(content, str) else content)


def displayable(text: str) -> str:
    """The same, with \\udcff in the place of what is no letter: bytes of a file's name."""
    return text.encode(errors="backslashreplace").decode()


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Removes what writers that were killed have left, where nobody has touched it for so long.

    Without `seconds` nobody else may be writing in this folder.
    """
    for path in folder.glob(f"{NEW}*"):
        with suppress(OSError):  # another process may have removed it just now
            if time.time() - path.stat().st_mtime >= seconds:
                shutil.rmtree(path)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: bytes) -> str:
    """What a file's content is told by in a configuration."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def json_text(value: Any) -> str:
    """The text of a JSON file; what JSON doesn't know goes in as `str`."""
    return json.dumps(value, indent=2, default=str) + "\n"


def finite_or_null(value: Any) -> Any:
    """`value` with None for each number in it that is not finite, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_or_null(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return value


def plain(value: Any) -> Any:
    """`value` as it reads back from JSON: tuples as lists, what JSON doesn't know as strings."""
    return json.loads(json.dumps(value, default=str))
