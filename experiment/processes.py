"""Several processes, on one machine or many, that share the tasks of each meta-step.

    torchrun --nproc_per_node 2 main.py 32 --tasks 4
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST \\
        main.py 32 --tasks 64 --out DIR

Every process holds the same rule and the same optimiser and unrolls its share of the tasks. The
hypergradients of all tasks, a few hundred numbers each, are then exchanged, and every process makes
the same meta-step from them, adding in the order of the tasks: the results are the same to the last
bit for any number of processes if tasks are computed one by one, and up to rounding if those of a
process are computed together (--together). Only the first process writes.
"""

import atexit
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import distributed

from experiment.command_line import place_in_team

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes of a run, from the view of one of them: its rank, from 0, among `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, tasks: int) -> range:
        """The tasks, out of 0..tasks-1, of this process."""
        return range(self.rank, tasks, self.count)

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in order of rank; every process must make this call.

        Values must be picklable, and tensors in them should be on the CPU.
        """
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def first_then_others(self, function: Callable[[], Value]) -> Value:
        """`function()`, called by the first process and, once that has returned, by the others."""
        if not self.first:
            self.gathered(None)
        value = function()
        if self.first:
            self.gathered(None)
        return value


ALONE = Team()


def join_team() -> Team:
    """Join the team of processes started by torchrun; without torchrun, a team of one.

    The backend is gloo, also on machines with GPUs: so few numbers are exchanged that the way over
    the CPU costs no noticeable time.

    Raises UserError if the environment variables are not as torchrun sets them.
    """
    rank, count = place_in_team()
    if count == 1:
        return ALONE
    if not distributed.is_initialized():
        _meet(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return Team(rank, count)


def _meet(attempt: int) -> None:
    """Wait for all processes of this attempt; attempts are counted from 0, one for each restart.

    torchrun's store survives a restart and still holds the addresses of the processes that have
    ended. Each attempt has a prefix of its own, so that it doesn't try to reach them.
    """
    store, rank, count = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    # The functions of torch.distributed.nn.functional bind the current process group as a default
    # argument. If torch._dynamo imported that module only at an optimiser's first step, they would
    # bind our group, which then would never be destroyed.
    importlib.import_module("torch.distributed.nn.functional")
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    # gloo's threads may still hold tensors created by Python. They must release them and be joined
    # before the interpreter shuts down, or the process aborts.
    atexit.register(distributed.destroy_process_group)
