"""Signals: the first one asks to save and stop, the second one stops at once.

Python runs a signal's handler only between two byte codes of the main thread, which may stand in a compilation for
minutes. So the signals are read from a pipe (``signal.set_wakeup_fd``) by a thread of our own, which sees each of them
at once, during compilation and during a save too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

_log = logging.getLogger(__name__)

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this process to stop, and how."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first one that came."""

    def take(self, number: int) -> None:
        """Note a signal; the second one ends the process as the signal alone would."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        _log.warning("%s: a checkpoint is written, then this run stops; once more stops it at once", self.signal.name)


@contextlib.contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT while the block runs.

    Enter it after ``jax.distributed`` was set up, whose own SIGTERM handler would otherwise take the signal. Outside
    the main thread nothing is caught: there signals are somebody else's.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _ignore) for number in WATCHED}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_read, args=(reader, request), name="signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def _ignore(_: int, __: FrameType | None) -> None:
    """Be a handler, so that Python's own writes the signal's number to the pipe."""


def _read(reader: socket.socket, request: StopRequest) -> None:
    while numbers := reader.recv(16):
        for number in numbers:
            if number in WATCHED:
                request.take(number)
