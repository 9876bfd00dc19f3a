"""Scripts in processes of their own, without the seconds that their large libraries take to load.

Nothing of this project is imported here: the processes begin as empty of it as `python script`
(but for the run log, in one that is to kill itself).
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGE_LIBRARIES = [  # none of this project's modules: some note which process they are in
    "matplotlib.figure", "numba", "optuna", "sklearn.linear_model", "tensorboard.summary",
    "torch.distributed", "torch.func", "torch.utils.checkpoint",
]  # fmt: skip


class Command:
    """A script in a process of its own, as `python script flags` would run it, but silent.

    The process is forked from a server that has imported the large libraries once. environment:
    variables beside those that were there when the server began; stderr: a file; killed_at_row: how
    many rows of metrics.csv there are when it kills itself.
    """

    def __init__(
        self,
        script: str | Path,
        *flags,
        environment: dict[str, str] | None = None,
        stderr: str | Path = os.devnull,
        killed_at_row: int | None = None,
    ) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(LARGE_LIBRARIES)
        arguments = [str(script), *map(str, flags)], environment or {}, str(stderr), killed_at_row
        self._process = server.Process(target=_run_script, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status once it has ended, at most after so many seconds."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} seconds"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends this signal to the process."""
        os.kill(self._process.pid, number)


def record_and_signal(number: int, count: int) -> Callable:
    """RunLog.record that sends the process a signal when metrics.csv has so many rows.

    No other process has to watch the file, and to be in time.
    """
    from experiment.run_log import RunLog

    record = RunLog.record

    def record_with_signal(log, step, row) -> None:
        record(log, step, row)
        if log.path("metrics.csv").read_text().count("\n") == count + 1:
            os.kill(os.getpid(), number)

    return record_with_signal


def _run_script(
    arguments: list[str], environment: dict[str, str], stderr: str, killed_at_row: int | None
) -> None:
    atexit._clear()  # what the server registered is the server's
    os.chdir(ROOT)
    os.environ.update(environment)
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = arguments
    if killed_at_row is not None:
        from experiment.run_log import RunLog

        RunLog.record = record_and_signal(signal.SIGKILL, killed_at_row)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def start_team(
    processes: int,
    script: str | Path,
    *flags,
    folder: Path,
    environment: dict[str, str] | None = None,
) -> list[Command]:
    """A script in so many processes, as torchrun starts them; stderr of each: folder/<rank>.txt."""
    return [
        Command(
            script, *flags, environment=place | (environment or {}), stderr=folder / f"{rank}.txt"
        )
        for rank, place in enumerate(places_in_team(processes))
    ]


def places_in_team(processes: int) -> list[dict[str, str]]:
    """The variables by which torchrun tells each of so many processes its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return [shared | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
