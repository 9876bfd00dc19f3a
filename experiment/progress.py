"""The progress of a run: a bar on a terminal or in a notebook, otherwise lines on stderr.

There is a line after each tenth of the steps, and at least one every SECONDS, if steps permit.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TextIO

from tqdm import tqdm

from experiment.compilation import compilation_told
from experiment.screen import mute_broken_streams, show

SECONDS = 60.0  # the longest time between lines, unless a step takes longer


@contextmanager
def shown_progress(
    total: int, initial: int = 0, description: str = "", quiet: bool = False
) -> Iterator["Progress"]:
    """A context with a Progress from `initial` to `total`, which stays on the screen afterwards.

    Unless quiet, it also tells on stderr when loops are compiled for long.
    """
    progress = Progress(total, initial, description, quiet)
    try:
        if quiet:
            yield progress
        else:
            with compilation_told(lambda text: show_above_the_bar(text, sys.stderr)):
                yield progress
    finally:
        progress.close()


class Progress:
    """The progress of a loop, with its current numbers; made by `shown_progress`."""

    def __init__(self, total: int, initial: int, description: str, quiet: bool) -> None:
        self.total, self.done, self.description = total, initial, description
        self._started, self._initial = time.monotonic(), initial
        self._told = self._started
        in_notebook = "ipykernel" in sys.modules
        has_bar = sys.stderr.isatty() or in_notebook
        self._in_lines = not quiet and not has_bar
        self._bar = _bar_class(in_notebook)(
            total=total,
            initial=initial,
            desc=description or None,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=quiet or not has_bar,
        )

    def advance(self, numbers: Mapping[str, float] | None = None) -> None:
        """Count one more step and show `numbers` beside it."""
        tenth = self.done * 10 // max(self.total, 1)
        self.done += 1
        text = ", ".join(f"{name} {value:.4g}" for name, value in (numbers or {}).items())
        try:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        except OSError:  # the terminal is gone
            mute_broken_streams()
        now = time.monotonic()
        is_due = self.done * 10 // max(self.total, 1) > tenth or now - self._told >= SECONDS
        if self._in_lines and is_due:
            self._told = now
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        rest = elapsed / (self.done - self._initial) * (self.total - self.done)
        times = f"{tqdm.format_interval(elapsed)} gone, {tqdm.format_interval(rest)} to go"
        parts = [f"{self.description} {self.done}/{self.total}".strip(), text, times]
        show("  ".join(part for part in parts if part), sys.stderr)

    def close(self) -> None:
        """Stop updating the bar and leave it on the screen."""
        try:
            self._bar.close()
        except OSError:
            mute_broken_streams()


def show_above_the_bar(text: str, stream: TextIO) -> None:
    """Print a line on stdout or stderr, above a progress bar if there is one."""
    try:
        with tqdm.external_write_mode(file=stream):
            show(text, stream)
    except OSError:  # raised by the bar if its terminal is gone
        mute_broken_streams()


def _bar_class(in_notebook: bool) -> type[tqdm]:
    """The class of a notebook's bar if ipywidgets is installed, else that of a terminal's bar."""
    if in_notebook and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as widget

        return widget
    return tqdm
