"""Meta-steps by several processes: efficiency on this machine, and a model of many machines.

    python benchmarks/processes.py                       # about a minute, nothing else running
    python benchmarks/processes.py --processes 1 2 4 --tasks 4 --repeat 20

commands   `torchrun --nproc_per_node P main.py 32 --tasks T`, one thread each: a meta-step (for
           learn_to_optimize.py a run of T trainings); obvious: one process; limit: its time,
           divided by P. --repeat is the number of meta-steps that are counted
gather     all hypergradients and numbers to all processes of this machine, and nothing else;
           bytes: received by a process in a meta-step
modelled   R ranks with a task each: a task, plus a gather of two rounds (sizes, then contents) in a
           ring, 2 (R - 1) latencies and R messages over the bandwidth; latency and bandwidth of the
           network are assumptions, set by flags; limit: the task

    efficiency   limit/ours
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import distributed, multiprocessing

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_float, positive_int, run_command
from experiment.processes import Team
from experiment.run_reader import read_metrics
from hypgraddesc import TaskOutcome
from learning_rules import PerLayerRule, PolynomialRule

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
GATHERS = 200


def outcome(layers: int) -> TaskOutcome:
    """What a process sends to the others for one task of main.py."""
    rule = PerLayerRule([PolynomialRule.of_degree(3) for _ in range(layers)])
    gradient = [torch.zeros_like(p) for p in rule.parameters()] + [torch.zeros(())] * 3 * layers
    return TaskOutcome(0, gradient, {"meta_loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.5})


def commands(arguments) -> dict[str, list]:
    """The meta-learning commands, whose steps (or runs) take about a second."""
    return {
        "main.py": [
            "main.py", *arguments.layers, "--metasteps", arguments.repeat + 1,
            "--initial_inner_steps", arguments.steps, "--max_inner_steps", arguments.steps,
            "--batch_size", 256, "--evaluations", 1, "--beside",
        ],
        "learn_to_optimize.py": [
            "learn_to_optimize.py", "relu20", "--network", "mlp", "--compare", "--epochs", 1,
            "--runs_per_epoch", arguments.repeat + 1, "--inner_steps", 2 * arguments.steps,
            "--unroll", arguments.steps, "--coordinates", 2000, "--validation_runs", 1,
        ],
    }  # fmt: skip


def times_of_a_step(command: list, arguments, processes: int) -> list[float]:
    """Milliseconds of each row of a run, except the first."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        start = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", processes, *command, "--tasks", arguments.tasks,
            "--threads", arguments.threads, "--device", "cpu", "--quiet", "--out", out,
            "--data-dir", Path(arguments.data_dir).resolve(),
        ]  # fmt: skip
        subprocess.run([*map(str, start)], cwd=ROOT, env=ENVIRONMENT, check=True)
        return [1e3 * seconds for seconds in read_metrics(out)["seconds"][1:].tolist()]


def gather(rank: int, count: int, port: int, layers: int, answer) -> None:
    """One of `count` processes, which gathers repeatedly; the first one reports the times."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count
    )
    team, share = Team(rank, count), [outcome(layers)]
    clock = Clock(torch.device("cpu"), wall=True)
    times = [clock.milliseconds(lambda: team.gathered(share)) for _ in range(GATHERS)]
    if rank == 0:
        answer.put(times)
    distributed.destroy_process_group()


def times_of_a_gather(count: int, layers: int) -> list[float]:
    """Milliseconds of each gather among `count` processes of this machine."""
    context = multiprocessing.get_context("spawn")
    answer, port = context.Queue(), 29600 + count
    team = [
        context.Process(target=gather, args=(rank, count, port, layers, answer))
        for rank in range(count)
    ]
    for process in team:
        process.start()
    times = answer.get()
    for process in team:
        process.join()
    return times


def measured(name: str, command: list, arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of a command's meta-step, for each number of processes."""
    times = {count: times_of_a_step(command, arguments, count) for count in arguments.processes}
    first = arguments.processes[0]
    for count, each in times.items():
        limit = [first * t / count for t in times[first]]
        yield row(name, f"{count} processes", each, times[first], limit)


def gathered(layers: int, size: int) -> Iterator[Row]:
    """The rows of a gather on this machine."""
    for count in (2, 4, 8):
        times = times_of_a_gather(count, layers)
        yield row("gather", f"{count} processes", times, bytes_received=count * size)


def modelled(task: float, size: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of a meta-step on many machines, by the model; `task`: milliseconds of a task."""
    for ranks in (8, 32, 128, 512):
        latency = 2 * (ranks - 1) * arguments.latency * 1e-3
        milliseconds = latency + ranks * size / (arguments.bandwidth * 1e6)
        sizes = f"{ranks} ranks"
        yield row("modelled", sizes, [task + milliseconds], None, [task], ranks * size)


def row(what, sizes, ours, obvious=None, limit=None, bytes_received: int | None = None) -> Row:
    """A row with this benchmark's own columns."""
    efficiency = "-"
    if limit is not None:
        efficiency = f"{statistics.median(limit) / statistics.median(ours):.1%}"
    received = "-" if bytes_received is None else str(bytes_received)
    return Row(what, sizes, ours, obvious, limit, {"efficiency": efficiency, "bytes": received})


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measured, gathered and modelled rows."""
    layers = len(arguments.layers)
    size = len(pickle.dumps([outcome(layers)]))
    tasks = []
    for name, command in commands(arguments).items():
        alone, *others = measured(name, command, arguments)
        yield from (alone, *others)
        tasks.append(arguments.processes[0] * statistics.median(alone.ours) / arguments.tasks)
    yield from gathered(layers, size)
    yield from modelled(tasks[0], size, arguments)


def main(argv: list[str] | None = None) -> None:
    """Print a row for each command and team, each gather, and each modelled team."""
    parser = benchmark_parser(__doc__, repeat=6)
    add = parser.add_argument
    add("--layers", type=positive_int, nargs="+", default=[32])
    add("--processes", type=positive_int, nargs="+", default=[1, 2])
    add("--tasks", type=positive_int, default=2)
    add("--steps", type=positive_int, default=50, help="updates of a training")
    add("--latency", type=positive_float, default=50.0, help="network latency in microseconds")
    add("--bandwidth", type=positive_float, default=1.0, help="network bandwidth in GB/s")
    add("--data-dir", default="./data")
    arguments = parser.parse_args(argv)
    clock = set_up(
        arguments, wall=True, only_on_cpu="the teams share the cores of a CPU and talk over gloo"
    )
    common = (f"units {arguments.layers}, {arguments.steps} steps of 256 images, "
              f"{arguments.tasks} tasks, {os.cpu_count()} cores")  # fmt: skip
    print_table(rows(arguments), clock, common)


if __name__ == "__main__":
    run_command(main)
