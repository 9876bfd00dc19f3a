"""How far a run is, on the screen: a bar on a terminal, else ten lines."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from experiment.screen import mute_broken_streams, show


class Progress:
    """How far a loop is, with the numbers that matter; made by `RunLog.progress`."""

    def __init__(self, total: int, initial: int, description: str, quiet: bool) -> None:
        self.total, self.done, self.description = total, initial, description
        self._started, self._initial = time.monotonic(), initial
        on_terminal = sys.stderr.isatty()
        self._in_lines = not quiet and not on_terminal
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description or None,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=quiet or not on_terminal,
        )

    def advance(self, numbers: Mapping[str, float] | None = None) -> None:
        """One more step is done; `numbers` are shown beside it."""
        tenth = self.done * 10 // max(self.total, 1)
        self.done += 1
        text = ", ".join(f"{name} {value:.4g}" for name, value in (numbers or {}).items())
        try:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        except OSError:  # the terminal is gone
            mute_broken_streams()
        if self._in_lines and self.done * 10 // max(self.total, 1) > tenth:
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        rest = elapsed / (self.done - self._initial) * (self.total - self.done)
        times = f"{tqdm.format_interval(elapsed)} gone, {tqdm.format_interval(rest)} to go"
        parts = [f"{self.description} {self.done}/{self.total}".strip(), text, times]
        show("  ".join(part for part in parts if part), sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        try:
            self._bar.close()
        except OSError:
            mute_broken_streams()
