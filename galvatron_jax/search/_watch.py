"""While a search runs: progress on a terminal, and signals that end it with the best plan so far."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PROGRESS_AFTER_S = 1.0
PROGRESS_EVERY_S = 0.1


class Watch:
    """Looks at the search while it runs: shows progress, and ends it when a signal came."""

    def __init__(self, quiet: bool) -> None:
        self.interrupted = False
        self._shows = not quiet and sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + PROGRESS_AFTER_S
        self._shown = False

    def look(self, best: float | None) -> bool:
        """Take note of the best seconds per sample so far; return whether to stop."""
        now = time.monotonic()
        if self._shows and now >= self._next:
            found = "no plan yet" if best is None else f"best so far {1 / best:.4g} samples/s"
            sys.stderr.write(f"\r\033[Ksearching, {now - self._start:.0f} s · {found} · Ctrl-C keeps the best")
            sys.stderr.flush()
            self._next, self._shown = now + PROGRESS_EVERY_S, True
        return self.interrupted

    def end(self) -> None:
        """Take the progress line away."""
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Stop the search at the next look; a second signal ends the process as usual."""
        self.interrupted = True
        signal.signal(number, signal.default_int_handler)


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watch]:
    """Catch SIGINT and SIGTERM while the block runs."""
    watch = Watch(quiet)
    before: dict[signal.Signals, object] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before[number] = signal.signal(number, watch.on_signal)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        yield watch
    finally:
        watch.end()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned, it takes back
