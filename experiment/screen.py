"""What a person sees: text on stdout and stderr, which may be closed, full, or lack letters.

    repair_streams()            # first of all: there is somewhere to write, and it takes any letter
    show("90 % ± 1", sys.stdout)

What is shown is in files too: whatever becomes of these streams, a run goes on.
"""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def repair_streams() -> None:
    """Opens those that were closed on nothing, and has the others write \\xb1 for what they lack.

    A file that is opened later would otherwise take the place of the closed stream, and be written
    into by all that writes there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(text: str, stream: TextIO) -> None:
    """Prints a line, where that is possible."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # the latter of a stream that was closed
        mute_broken_streams()


def mute_broken_streams() -> None:
    """Has what can't be written on stdout or stderr, now and later, go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
