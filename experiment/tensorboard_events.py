"""Writes the numbers of a run for TensorBoard, immediately and in the calling thread.

    events = EventFile(directory, first_step=0)
    events.add(0, {"meta_loss": 0.7})

torch's SummaryWriter writes in a thread of its own, where a full disk raises an error that nobody
can catch; here the caller gets the OSError.
"""

import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

NAME = "events.out.tfevents."


class EventFile:
    """A new event file in a directory, which TensorBoard reads after the existing ones.

    Raises OSError if it can't be written.

    first_step: TensorBoard discards the rows of this and later steps in earlier files; None: it
        keeps all.
    """

    def __init__(self, directory: Path, first_step: int | None) -> None:
        path = directory / f"{NAME}{_next_number(directory):010d}.{socket.gethostname()}"
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if first_step is not None:
            again = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step, session_log=again))

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row of numbers."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file; nothing may be added afterwards."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def _next_number(directory: Path) -> int:
    """The time in seconds, or one more than the last number if that is larger.

    TensorBoard reads the files in the order of these numbers.
    """
    matches = (re.match(r"\d+", path.name[len(NAME) :]) for path in directory.glob(f"{NAME}*"))
    return max([int(time.time()), *(int(match.group()) + 1 for match in matches if match)])
