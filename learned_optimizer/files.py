"""Files that are complete at every moment: either the old or the new one, even after a crash."""

import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Replace the file at `path` by this text in UTF-8, once all of it is on disk.

    Several processes may write the same file at the same moment; one of their versions remains.
    Raises OSError if the file can't be written.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        new = Path(folder) / path.name
        new.write_text(text, encoding="utf-8", newline="")
        _sync(new)
        os.replace(new, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
