"""Optuna's journal of a study, with a checksum on every line.

    storage = JournalStorage(Journal(directory / "study.journal"))

A line is a JSON record, a tab, and 16 digits of the SHA-256 of the line's offset in the file and
the record, so that lines that were changed, removed or moved are noticed. Lines without a checksum,
from older versions, are accepted only before the first line that has one.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

from experiment.errors import RunLogError, disk_errors
from experiment.run_reader import complete_lines

DIGITS = 16


class Journal(BaseJournalBackend):
    """The records in a file, created if it doesn't exist; raises RunLogError if it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, JournalFileOpenLock(str(path))
        self._places = [0]  # byte offsets of the records read so far, and the end of the last one
        self._checked = False  # whether a line with a checksum has been read
        with self._writing():
            _end_last_line(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from number `log_number_from` on."""
        place = self._places[log_number_from]
        with disk_errors(f"can't read {self._path}"), self._path.open("rb") as file:
            file.seek(place)
            content = file.read()
        for number, line in enumerate(complete_lines(content), log_number_from):
            record = self._record(number, place, line[:-1])
            place += len(line)
            if number + 1 == len(self._places):
                self._places.append(place)
            yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records and wait until they are on disk."""
        with self._writing():
            _end_last_line(self._path)  # another process may have been killed while writing
            with self._path.open("ab") as file:
                place, lines = file.tell(), b""
                for log in logs:
                    text = json.dumps(log, separators=(",", ":")).encode()
                    lines += text + b"\t" + _checksum(place + len(lines), text) + b"\n"
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock for writing. A lock left by a killed process expires after 30 s."""
        with disk_errors(f"can't write {self._path}"):
            self._lock.acquire()
            try:
                yield
            finally:
                self._lock.release()

    def _record(self, number: int, place: int, line: bytes) -> dict[str, Any]:
        text, tab, checksum = line.partition(b"\t")
        self._checked |= bool(tab)
        try:
            record = json.loads(text)
            whole = isinstance(record["op_code"], int) and isinstance(record["worker_id"], str)
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if not whole or (self._checked and checksum != _checksum(place, text)):
            raise RunLogError(
                f"{self._path} is damaged in line {number + 1}: put the study's own file back, or "
                "start anew with another --out"
            )
        return record


def _checksum(place: int, text: bytes) -> bytes:
    return hashlib.sha256(b"%d:" % place + text).hexdigest()[:DIGITS].encode()


def _end_last_line(path: Path) -> None:
    """Complete the last line if only its newline is missing, otherwise remove the fragment."""
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        place = content.rfind(b"\n") + 1
        text, tab, checksum = content[place:].partition(b"\t")
        if not text:
            return
        whole = checksum == _checksum(place, text) if tab else _is_json(text)
        if whole:
            file.write(b"\n")
        else:
            file.truncate(place)


def _is_json(text: bytes) -> bool:
    """Whether a line without a checksum is complete: a truncated JSON table is not valid JSON."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
