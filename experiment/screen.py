"""Output on stdout and stderr, which may be closed, broken, or unable to encode some characters.

    repair_streams()            # first: afterwards both streams exist and accept any character
    show("90 % ± 1", sys.stdout)

Everything shown is also written to files, so that a run goes on whatever happens to the streams.
"""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def repair_streams() -> None:
    """Open closed standard streams on the null device; let the others write escapes like \\xb1.

    A file opened later would otherwise get the descriptor of the closed stream, and everything
    printed would be written into it. The escapes stand for characters that a stream can't encode.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(text: str, stream: TextIO) -> None:
    """Print a line; does nothing if the stream can't be written."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream was closed
        mute_broken_streams()


def mute_broken_streams() -> None:
    """Redirect stdout and stderr to the null device if they can't be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
