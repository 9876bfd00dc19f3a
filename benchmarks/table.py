"""Shared parts of the benchmarks: three flags, timing in turns, peak memory, table, report.

    parser = benchmark_parser(__doc__, repeat=9)
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    times = clock.in_turns({"obvious": obvious, "ours": ours, "limit": limit}, arguments.repeat)
    print_table([Row("what", "its sizes", **times)], clock, "what all rows have in common")

    obvious ms     the formulation that anyone would write first; "-" if there is none
    limit ms       what no formulation can do without; "-" if none is known
    obvious/ours   how much faster ours is, as the median of the ratios within a turn
    ours/limit     how far ours is from the limit, likewise
    median of      the number of turns

Those for a GPU write checks against the CPU and all rows to a file, anew after each row:

    report = Report(clock, differences, arguments.json)
    print_table(report.until(end, rows), clock, "what all rows have in common")
    report.end_unless(lambda check, difference: difference < 1e-10)

Further columns belong to single benchmarks. In one thread of a CPU, times are processor times,
which other processes disturb less than the wall clock; otherwise they are the wall clock's.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch.profiler import ProfilerActivity, profile

from experiment.command_line import OneLineParser, UserError, device_name, positive_int
from experiment.devices import find_device, keep_freed_memory

HEADINGS = (
    "what", "sizes", "obvious ms", "ours ms", "limit ms", "obvious/ours", "ours/limit", "median of",
)  # fmt: skip
WIDTHS = 26, 24  # of the first two columns; the others are as wide as their headings


@dataclass(frozen=True)
class Clock:
    """Reads the time after a device has finished its work.

    Attributes:
        device: the device to wait for.
        threads: the number of torch's threads.
        wall: always read the wall clock, for example because other processes do the work.
    """

    device: torch.device
    threads: int = 1
    wall: bool = False

    @property
    def reads_processor(self) -> bool:
        """Whether times are processor times."""
        return self.device.type == "cpu" and self.threads == 1 and not self.wall

    def now(self) -> float:
        """Milliseconds since some fixed moment."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return 1e3 * (time.process_time() if self.reads_processor else time.perf_counter())

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The time of one call."""
        begin = self.now()
        run()
        return self.now() - begin

    def in_turns(
        self, ways: Mapping[str, Callable[[], object]], repeat: int
    ) -> dict[str, list[float]]:
        """Milliseconds of each way in each turn, after one call of each that is not counted."""
        for run in ways.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name, run in ways.items():
                times[name].append(self.milliseconds(run))
        return times


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        ours, obvious, limit: milliseconds for each turn, in the same order, or None.
        more: the texts of the benchmark's own columns, by heading.
    """

    what: str
    sizes: str
    ours: Sequence[float] | None
    obvious: Sequence[float] | None = None
    limit: Sequence[float] | None = None
    more: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The texts of all columns."""
        return [
            self.what,
            self.sizes,
            *(median_text(times) for times in (self.obvious, self.ours, self.limit)),
            ratio_text(self.obvious, self.ours),
            ratio_text(self.ours, self.limit),
            "-" if self.ours is None else str(len(self.ours)),
            *self.more.values(),
        ]


def median_text(times: Sequence[float] | None) -> str:
    """The median with at least three digits; "-" without times."""
    if times is None:
        return "-"
    median = statistics.median(times)
    digits = 2 - math.floor(math.log10(median)) if median > 0 else 0
    return f"{median:.{max(0, digits)}f}"


def ratio_text(above: Sequence[float] | None, below: Sequence[float] | None) -> str:
    """The median of the ratios of times of the same turn; "-" if either is missing."""
    if above is None or below is None:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(above, below, strict=True)):.2f}"


def benchmark_parser(description: str, repeat: int) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark.

    description: the benchmark's docstring, whose first line is shown.
    repeat: the default number of turns.
    """
    parser = OneLineParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    device = "device to compute on: auto, cpu, cuda, cuda:N or mps"
    add("--device", type=device_name, default="auto", metavar="NAME", help=device)
    add("--repeat", type=positive_int, default=repeat, metavar="N", help="number of turns")
    add("--threads", type=positive_int, default=1, metavar="N", help="number of CPU threads")
    return parser


def set_up(
    arguments: argparse.Namespace, *, wall: bool = False, only_on_cpu: str | None = None
) -> Clock:
    """Set threads and allocator; returns the clock of the device that the flags name.

    only_on_cpu: why another device makes no sense; UserError is raised if one is named.
    """
    name = arguments.device
    if only_on_cpu is not None:
        if name not in ("auto", "cpu"):
            raise UserError(f"--device {name}: {only_on_cpu}; only --device cpu makes sense here")
        name = "cpu"
    device = find_device(name)
    torch.set_num_threads(arguments.threads)
    threadpool_limits(arguments.threads)  # those of numpy and scipy
    keep_freed_memory()
    return Clock(device, arguments.threads, wall)


def peak_gigabytes(device: torch.device) -> float:
    """The peak memory of this process so far, or of its tensors on a GPU, in units of 2^30 B."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def kernels_of(run: Callable[[], object], steps: int, device: torch.device) -> str:
    """The number of kernels for each of so many steps, which are run; "-" without a GPU."""
    if device.type != "cuda":
        run()
        return "-"
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA
    return f"{sum(e.device_type == cuda for e in profiled.events()) / steps:.0f}"


def numbers_of_process(script: str, flags: Sequence[str]) -> list[float]:
    """The numbers that a script prints when it runs in its own process.

    If that process fails, this one ends too, with the same exit status.
    """
    command = [sys.executable, script, *flags]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(process.returncode)
    return [float(word) for word in process.stdout.split()]


def print_table(rows: Iterable[Row], clock: Clock, common: str) -> None:
    """Print each row as soon as it is measured.

    common: a description that holds for all rows.
    """
    kind = "processor time" if clock.reads_processor else "wall clock"
    print(f"{common}; {described(clock.device)}, {clock.threads} thread(s), torch "
          f"{torch.__version__}, {kind}")  # fmt: skip
    headings: list[str] = []
    for row in rows:
        if not headings:
            headings = [*HEADINGS, *row.more]
            print(_line(headings, headings))
        print(_line(row.cells(), headings), flush=True)


def described(device: torch.device) -> str:
    """The name of a GPU, else the device's own."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def runs_on_gpu(arguments: argparse.Namespace, clock: Clock) -> bool:
    """Whether the benchmark runs on a GPU; if not, raises UserError unless a CPU was asked for."""
    if clock.device.type != "cuda" and arguments.device != "cpu":
        raise UserError("no CUDA device: --device cpu runs a small version of this benchmark")
    return clock.device.type == "cuda"


class Report:
    """The numbers of a benchmark, which are written to a file anew after each row.

    differences: what each check has found; may grow with the rows.
    path: the file; None: none.
    also: what else stands in the file.
    """

    def __init__(
        self, clock: Clock, differences: dict[str, float], path: Path | None, **also: Any
    ) -> None:
        self.differences, self.path = differences, path
        self.told = {"device": described(clock.device), "torch": torch.__version__, **also}
        self.told |= {"differences": differences, "rows": []}
        self._write()

    def until(self, end: float, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that begin before this moment of time.perf_counter, which are also kept."""
        while time.perf_counter() < end:
            row = next(rows, None)
            if row is None:
                return
            self.told["rows"].append(asdict(row))
            self._write()
            yield row
        print("the other rows are left out: no time is left")

    def end_unless(self, small: Callable[[str, float], bool]) -> None:
        """Exit with status 1 unless this says of each check's name and difference that it is."""
        if not all(small(*check) for check in self.differences.items()):
            sys.exit(1)

    def _write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.told, indent=1))


def _line(cells: Sequence[str], headings: Sequence[str]) -> str:
    first = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)]
    others = [c.rjust(max(8, len(h))) for c, h in zip(cells[2:], headings[2:], strict=True)]
    return "  ".join([*first, *others])
