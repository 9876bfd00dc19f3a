"""Several processes, on one machine or many, that share the tasks of one meta-run.

    torchrun --nproc_per_node 2 main.py 32 --tasks 4
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST \\
        main.py 32 --tasks 64 --out DIR

Every process holds the same rule and the same optimiser. It unrolls the tasks of its share; then
all processes learn all tasks' hypergradients, a few hundred numbers each, and make the same
meta-step from them, in the same order as one process alone would: the numbers are the same to the
last bit, however many processes there are. Only the first one writes.
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
    """The processes of a run, as one of them sees them: its rank among `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, tasks: int) -> range:
        """Which of the tasks 0..tasks-1 this process has to do."""
        return range(self.rank, tasks, self.count)

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in order of their ranks; all must call it together.

        A value is what `pickle` takes; its tensors should be on the CPU.
        """
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def first_then_others(self, function: Callable[[], Value]) -> Value:
        """`function()`, called in the first process before the others call it."""
        if not self.first:
            self.gathered(None)
        value = function()
        if self.first:
            self.gathered(None)
        return value


ALONE = Team()


def join_team() -> Team:
    """The team that torchrun made this process a member of; without torchrun, a team of one.

    Raises UserError where the variables that say so are not as torchrun sets them.

    Gloo carries the numbers, on machines with GPUs too: they are so few that the way over the CPU
    is not noticed.
    """
    rank, count = place_in_team()
    if count == 1:
        return ALONE
    if not distributed.is_initialized():
        _meet(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return Team(rank, count)


def _meet(attempt: int) -> None:
    """Wait for all processes of this attempt, the first or one after a restart.

    torchrun keeps its store over a restart, with the addresses of the processes that are gone;
    without a prefix of its own, an attempt would call them.
    """
    store, rank, count = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    # torch._dynamo, which an optimiser's first step brings in, imports this module, whose
    # functions keep the group of that moment as a default: the group would never be destroyed
    importlib.import_module("torch.distributed.nn.functional")
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    # gloo's threads may still hold tensors that came from Python: they must let go of them, and
    # be joined, before the interpreter ends, or its end aborts the process
    atexit.register(distributed.destroy_process_group)
