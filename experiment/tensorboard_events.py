"""Writes what TensorBoard shows of a run, immediately and in the calling thread.

    events = EventFile(directory, first_step=0)
    events.add(0, {"meta_loss": 0.7})

torch's SummaryWriter writes in a thread of its own, where a full disk raises an error that nobody
can catch; here the caller gets the OSError.
"""

import re
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
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
        self._add(step, [Summary.Value(tag=name, simple_value=v) for name, v in row.items()])

    def add_images(self, step: int, paths: Iterable[Path]) -> None:
        """Write PNG files, each under its name without the suffix."""
        self._add(step, [
            Summary.Value(tag=f"figures/{path.stem}", image=_image(path)) for path in paths
        ])  # fmt: skip

    def add_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the distribution of each array's numbers, of those that are finite."""
        finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
        self._add(step, [
            Summary.Value(tag=name, histo=_histogram(values))
            for name, values in finite.items() if values.size
        ])  # fmt: skip

    def add_results(
        self, step: int, settings: Mapping[str, Any], results: Mapping[str, float]
    ) -> None:
        """Write what the run has come to, for TensorBoard's table of hyperparameters (hparams)."""
        named = {f"results/{name}": value for name, value in results.items()}
        self.add(step, named)
        self._add(step, _hparams(settings, named))

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file; nothing may be added afterwards."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def _image(path: Path) -> Summary.Image:
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # behind the signature of a PNG file
    return Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content)


def _histogram(values: np.ndarray) -> HistogramProto:
    counts, edges = np.histogram(values.astype(np.float64), bins=30)
    return HistogramProto(
        min=float(values.min()),
        max=float(values.max()),
        num=values.size,
        sum=float(values.sum(dtype=np.float64)),
        sum_squares=float(np.square(values, dtype=np.float64).sum()),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _hparams(settings: Mapping[str, Any], metrics: Iterable[str]) -> list[Summary.Value]:
    """What the hparams plugin reads: names of the results, the settings, and that the run ended."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2  # for the end of a run alone

    infos = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in metrics]
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = str(value)
    parts = {
        "experiment": api_pb2.Experiment(metric_infos=infos),
        "session_start_info": start,
        "session_end_info": plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS),
    }
    values = []
    for name, part in parts.items():
        content = plugin_data_pb2.HParamsPluginData(version=0, **{name: part})
        plugin = SummaryMetadata.PluginData(
            plugin_name="hparams", content=content.SerializeToString()
        )
        metadata = SummaryMetadata(plugin_data=plugin)
        values.append(Summary.Value(tag=f"_hparams_/{name}", metadata=metadata, tensor=_NOTHING))
    return values


_NOTHING = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto())


def _next_number(directory: Path) -> int:
    """The time in seconds, or one more than the last number if that is larger.

    TensorBoard reads the files in the order of these numbers.
    """
    matches = (re.match(r"\d+", path.name[len(NAME) :]) for path in directory.glob(f"{NAME}*"))
    return max([int(time.time()), *(int(match.group()) + 1 for match in matches if match)])
