"""Does a command's memory grow while it runs? Its resident size, watched from outside.

    python benchmarks/memory_slope.py                    # four commands, under two minutes
    python benchmarks/memory_slope.py --seconds 600      # what is left of a slope after longer

Each command runs on small settings, so that it makes as many steps as one on real ones in a long
time, and is ended after so many seconds. The first third, in which allocator and caches fill, is
left out; the slope is a least-squares line through the rest.

    steps      rows recorded in that time
    MB         resident size, mean
    kB / step  the slope, with its standard error (samples taken for independent)
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_EVERY = 0.1  # seconds
ENDLESS = 10**6
COMMANDS = {
    "main.py": "8 --dataset mnist5k --initial_inner_steps 5 --max_inner_steps 5 --batch_size 64 "
    f"--outer_images 256 --probe_images 1000 --metasteps {ENDLESS}",
    "learn_to_optimize.py": "quadratic --dataset mnist5k --inner_steps 20 --runs_per_epoch 2 "
    f"--validation_runs 1 --epochs {ENDLESS}",
    "train_krotov_hopfield.py": "--dataset mnist5k --depth 1 --units 16 --round_batches 5 "
    f"--patience 0 --epochs {ENDLESS}",
    "baseline_vicreg.py": f"8 --dataset mnist5k --epochs {ENDLESS}",
}


def watch(script: str, flags: str, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows recorded and resident bytes, at many moments of a run."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        command = [sys.executable, script, *flags.split(), "--threads", "1", "--quiet",
                   "--out", str(out)]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        samples, metrics = [], out / "metrics.csv"
        while not metrics.exists() and process.poll() is None:
            time.sleep(SAMPLE_EVERY)
        begin = time.monotonic()
        while time.monotonic() < begin + seconds and process.poll() is None:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            samples.append((metrics.read_bytes().count(b"\n"), resident))
            time.sleep(SAMPLE_EVERY)
        if process.poll() is not None:
            raise SystemExit(f"{script} ended by itself")
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows, pages = np.array(samples, dtype=float).T
    return rows, pages * os.sysconf("SC_PAGESIZE")


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the least-squares line, and its standard error."""
    x = x - x.mean()
    found = (x @ y) / (x @ x)
    rest = y - y.mean() - found * x
    return found, math.sqrt(rest @ rest / (len(x) - 2) / (x @ x))


def main() -> None:
    """Prints a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each command")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    print(f"{'command':>25} {'steps':>7} {'MB':>8} {'kB / step':>20}")
    for script in arguments.commands:
        rows, resident = watch(script, COMMANDS[script], arguments.seconds)
        late = slice(len(rows) // 3, None)
        found, error = slope(rows[late], resident[late])
        print(f"{script:>25} {int(rows[-1] - rows[0]):7} {resident[late].mean() / 1e6:8.1f} "
              f"{found / 1e3:11.3f} +- {error / 1e3:5.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
