"""Says when loops are being compiled, which happens once on a machine and looks like a standstill.

    with compilation_told(print):
        ...

numba compiles a function at its first call and keeps it in a cache on disk.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numba.core import event

SILENT = 2.0  # seconds of compilation, in sum, of which nothing is said
MESSAGE = "compiling loops for this machine, ten seconds or more; later runs find them in a cache"


@contextmanager
def compilation_told(tell: Callable[[str], None]) -> Iterator[None]:
    """A context in which `tell` is called with MESSAGE, once, if compilations take long."""
    told = CompilationTold(tell)
    event.register("numba:compile", told)
    try:
        yield
    finally:
        event.unregister("numba:compile", told)
        told.wait_no_longer()


class CompilationTold(event.Listener):
    """Tells MESSAGE, once, as soon as compilations have taken SILENT seconds in sum.

    tell: called with it, in a thread of its own, because the compiler holds the others up.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._left, self._depth = tell, SILENT, 0
        self._timer: threading.Timer | None = None

    def on_start(self, event: event.Event) -> None:
        """A compilation begins, perhaps within another."""
        self._depth += 1
        if self._depth == 1 and self._left > 0:
            self._began = time.monotonic()
            self._timer = threading.Timer(self._left, self._say)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: event.Event) -> None:
        """A compilation has ended."""
        self._depth -= 1
        if self._depth == 0 and self._timer is not None:
            self.wait_no_longer()
            self._left -= time.monotonic() - self._began

    def wait_no_longer(self) -> None:
        """Say nothing of the current compilation any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self) -> None:
        self._left = 0.0
        self._tell(MESSAGE)
