"""The watchdog: a process that makes no progress says where it stands, then ends, so that the launcher can restart all.

Heartbeats between processes do not see a process that is alive and stands still (a file system, a deadlock, a
collective that one rank never reaches): the others wait for it without limit. Every process watches itself: after
``limit`` seconds without ``beat`` it writes the stacks of all its threads and what every rank last reported; after
twice the limit it ends with ``os._exit(4)``, since a thread inside a collective cannot be interrupted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ._ranks import Ranks

STALLED = 4
"""Exit code."""
POLLS_PER_LIMIT = 10
LONGEST_POLL_S = 0.5


class Watchdog:
    """Watches the main thread from another one."""

    def __init__(self, ranks: Ranks, *, dump: Path, end: Callable[[int], object] = os._exit) -> None:
        """Begin to watch at the first ``beat``.

        Args:
            ranks: To report to, and to read the others' reports from.
            dump: File that the stacks are written to, beside stderr.
            end: Ends the process.
        """
        self._ranks, self._dump, self._end = ranks, dump, end
        self._what, self._limit_s, self._since_s = "start", float("inf"), time.monotonic()
        self._dumped = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, what: str, limit_s: float) -> None:
        """Say what begins now, and how long it may take before it counts as standing still."""
        self._what, self._limit_s, self._since_s = what, limit_s, time.monotonic()
        self._dumped = False

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        reported = ""
        while not self._closed.wait(min(LONGEST_POLL_S, self._limit_s / POLLS_PER_LIMIT)):
            waited_s = time.monotonic() - self._since_s
            if self._what != reported:
                reported = self._what
                self._ranks.report(reported)
            if waited_s > self._limit_s and not self._dumped:
                self._dumped = True
                self._tell(waited_s)
            if waited_s > 2 * self._limit_s:
                self._end(STALLED)
                return

    def _tell(self, waited_s: float) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            self._dump.parent.mkdir(parents=True, exist_ok=True)
            with self._dump.open("a") as file:
                self._write(file, waited_s)
        self._write(sys.stderr, waited_s)

    def _write(self, file: TextIO, waited_s: float) -> None:
        reports = ", ".join(f"rank {rank}: {text}" for rank, text in sorted(self._ranks.reports().items()))
        print(
            f"no progress for {waited_s:.0f} s in {self._what} (rank {self._ranks.index}); last reports: {reports};"
            f" ends after {2 * self._limit_s:.0f} s; stacks of all threads:",
            file=file,
            flush=True,
        )
        with contextlib.suppress(OSError, AttributeError, ValueError):  # stderr may be no real file
            faulthandler.dump_traceback(file, all_threads=True)
