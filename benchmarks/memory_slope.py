"""Does a command's memory grow while it runs? Its resident size, observed from outside.

    python benchmarks/memory_slope.py                    # four commands, about a minute
    python benchmarks/memory_slope.py --seconds 600      # shows smaller slopes

Each command runs with small settings, so that it makes as many steps as a real run does in a long
time, and is ended after --seconds. The first third, in which allocator and caches fill, is
discarded; the slope is that of a least-squares line through the rest. Times are means per step.

    steps      rows recorded in that time
    MB         mean resident size
    kB / step  the slope, with its standard error as if samples were independent
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.table import Row, benchmark_parser, print_table, set_up
from experiment.command_line import UserError, positive_float, run_command

SAMPLE_EVERY = 0.1  # seconds
ENDLESS = 10**6
COMMANDS = {
    "main.py": "8 --dataset mnist5k --initial_inner_steps 5 --max_inner_steps 5 --batch_size 64 "
    f"--outer_images 256 --probe_images 1000 --beside --metasteps {ENDLESS}",
    "learn_to_optimize.py": "quadratic --dataset mnist5k --inner_steps 20 --runs_per_epoch 2 "
    f"--validation_runs 1 --epochs {ENDLESS}",
    "train_krotov_hopfield.py": "--dataset mnist5k --depth 1 --units 16 --round_batches 5 "
    f"--patience_epochs 0 --threshold 0 --epochs {ENDLESS}",
    "baseline_vicreg.py": f"8 --dataset mnist5k --epochs {ENDLESS}",
}


def watch(script: str, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of recorded rows and resident bytes, at many moments of a run.

    Raises UserError if the command ends by itself.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [
            sys.executable, script, *COMMANDS[script].split(), "--device", arguments.device,
            "--threads", str(arguments.threads), "--quiet", "--out", str(out),
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT)
        samples, metrics = [], out / "metrics.csv"
        while not metrics.exists() and process.poll() is None:
            time.sleep(SAMPLE_EVERY)
        begin = time.monotonic()
        while time.monotonic() < begin + arguments.seconds and process.poll() is None:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            samples.append((metrics.read_bytes().count(b"\n"), resident))
            time.sleep(SAMPLE_EVERY)
        if process.poll() is not None:
            raise UserError(f"{script} ended by itself, exit status {process.returncode}")
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows, pages = np.array(samples, dtype=float).T
    return rows, pages * os.sysconf("SC_PAGESIZE")


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of the least-squares line, and its standard error."""
    x = x - x.mean()
    steepness = (x @ y) / (x @ x)
    rest = y - y.mean() - steepness * x
    return steepness, math.sqrt(rest @ rest / (len(x) - 2) / (x @ x))


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """One row for each command."""
    for script in arguments.commands:
        turns = []
        for _ in range(arguments.repeat):
            recorded, resident = watch(script, arguments)
            late = slice(len(recorded) // 3, None)
            steps = recorded[-1] - recorded[0]
            turns.append((steps, resident[late].mean(), *slope(recorded[late], resident[late])))
        steps, mean, steepness, error = map(statistics.median, zip(*turns, strict=True))
        more = {
            "steps": f"{steps:.0f}",
            "MB": f"{mean / 1e6:.1f}",
            "kB / step": f"{steepness / 1e3:.3f} +- {error / 1e3:.3f}",
        }
        yield Row(script, "small", [1e3 * arguments.seconds / turn[0] for turn in turns], more=more)


def main(argv: list[str] | None = None) -> None:
    """Print a row for each command."""
    parser = benchmark_parser(__doc__, repeat=1)
    parser.add_argument("--seconds", type=positive_float, default=8.0,
        help="seconds that each command runs")  # fmt: skip
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args(argv)
    clock = set_up(arguments, wall=True)
    print_table(rows(arguments), clock, f"{arguments.seconds:g} s each")


if __name__ == "__main__":
    run_command(main)
