"""Meta-steps by several processes: efficiency here, and what a meta-step would cost on many.

    python benchmarks/processes.py                       # under two minutes, nothing else running
    python benchmarks/processes.py --processes 1 2 4 --tasks 4 --metasteps 20

measured   `torchrun --nproc_per_node P main.py 32 --tasks T`, one thread each: median seconds of a
           meta-step (of learn_to_optimize.py: of a run of T trainings); efficiency: those of one
           process, divided by P times those of P
gather     all hypergradients and numbers to all processes of this machine, without the rest;
           bytes: that a process receives in a meta-step
modelled   R ranks with a task each: seconds of a task, plus a gather of two rounds (sizes, then
           contents) in a ring, 2 (R - 1) latencies and R messages over the bandwidth; latency and
           bandwidth of the network are assumptions, set by flags
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import distributed, multiprocessing

from experiment.processes import Team
from experiment.run_reader import read_metrics
from hypgraddesc import TaskOutcome
from learning_rules import PerLayerRule, PolynomialRule

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
GATHERS = 200


def outcome(layers: int) -> TaskOutcome:
    """What a process tells the others of one task of main.py."""
    rule = PerLayerRule([PolynomialRule.of_degree(3) for _ in range(layers)])
    gradient = [torch.zeros_like(p) for p in rule.parameters()] + [torch.zeros(())] * 3 * layers
    return TaskOutcome(0, gradient, {"meta_loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.5})


def commands(arguments) -> dict[str, list]:
    """The meta-learning commands, with so many steps (or runs) of a second or so."""
    return {
        "main.py": [
            "main.py", *arguments.layers, "--metasteps", arguments.metasteps,
            "--initial_inner_steps", arguments.steps, "--max_inner_steps", arguments.steps,
            "--batch_size", 256, "--evaluations", 1,
        ],
        "learn_to_optimize.py": [
            "learn_to_optimize.py", "relu20", "--network", "mlp", "--compare", "--epochs", 1,
            "--runs_per_epoch", arguments.metasteps, "--inner_steps", 2 * arguments.steps,
            "--unroll", arguments.steps, "--coordinates", 2000, "--validation_runs", 1,
        ],
    }  # fmt: skip


def seconds_of_a_step(command: list, arguments, processes: int) -> float:
    """Median over the rows of a run, without its first."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        start = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", processes, *command, "--tasks", arguments.tasks, "--threads", 1,
            "--quiet", "--out", out, "--data-dir", Path(arguments.data_dir).resolve(),
        ]  # fmt: skip
        subprocess.run([*map(str, start)], cwd=ROOT, env=ENVIRONMENT, check=True)
        return statistics.median(read_metrics(out)["seconds"][1:].tolist())


def gather(rank: int, count: int, port: int, layers: int, answer) -> None:
    """One of `count` processes: gathers again and again; the first says how long one takes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count
    )
    team, own = Team(rank, count), [outcome(layers)]
    times = []
    for _ in range(GATHERS):
        begin = time.perf_counter()
        team.gathered(own)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        answer.put(statistics.median(times))
    distributed.destroy_process_group()


def seconds_of_a_gather(count: int, layers: int) -> float:
    """Among `count` processes of this machine."""
    context = multiprocessing.get_context("spawn")
    answer, port = context.Queue(), 29600 + count
    team = [
        context.Process(target=gather, args=(rank, count, port, layers, answer))
        for rank in range(count)
    ]
    for process in team:
        process.start()
    seconds = answer.get()
    for process in team:
        process.join()
    return seconds


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[32])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--metasteps", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50, help="inner steps")
    parser.add_argument("--latency", type=float, default=50.0, help="of the network, microseconds")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="of the network, GB/s")
    parser.add_argument("--data-dir", default="./data")
    arguments = parser.parse_args()
    layers = len(arguments.layers)
    size = len(pickle.dumps([outcome(layers)]))
    print(f"units {arguments.layers}, {arguments.steps} steps of 256 images, {arguments.tasks} "
          f"tasks, {os.cpu_count()} cores, torch {torch.__version__}")  # fmt: skip
    print(f"{'command':>22} {'processes':>10} {'s / step':>9} {'efficiency':>11}")
    work = {}  # seconds times processes, of a step by the smallest team
    for name, command in commands(arguments).items():
        for count in arguments.processes:
            seconds = seconds_of_a_step(command, arguments, count)
            work.setdefault(name, count * seconds)
            efficiency = work[name] / (count * seconds)
            print(f"{name:>22} {count:10} {seconds:9.3f} {efficiency:11.1%}", flush=True)
    print(f"\n{'gather':>10} {'ms':>14} {'bytes':>11}")
    for count in (2, 4, 8):
        seconds = seconds_of_a_gather(count, layers)
        print(f"{count:10} {1e3 * seconds:14.2f} {count * size:11}", flush=True)
    task = work["main.py"] / arguments.tasks
    print(f"\nmodelled: a task {task:.2f} s, latency {arguments.latency:g} us, "
          f"{arguments.bandwidth:g} GB/s")  # fmt: skip
    print(f"{'ranks':>10} {'bytes':>14} {'gather ms':>11} {'efficiency':>11}")
    for ranks in (8, 32, 128, 512):
        latency = 2 * (ranks - 1) * arguments.latency * 1e-6
        seconds = latency + ranks * size / (arguments.bandwidth * 1e9)
        print(f"{ranks:10} {ranks * size:14} {1e3 * seconds:11.2f} {task / (task + seconds):11.1%}")


if __name__ == "__main__":
    main()
