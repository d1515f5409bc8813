"""Compilation, watched: how long it takes, and whether a step compiles again when it should not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileWatch:
    """Counts XLA compilations of this process."""

    def __init__(self) -> None:
        self.count = 0
        self.duration_s = 0.0
        self._settled: int | None = None

    def settle(self) -> None:
        """From here on every program should be known."""
        self._settled = self.count

    def check(self, step: int, shapes: str) -> None:
        """Warn when something was compiled since ``settle``.

        Args:
            step: The step.
            shapes: Of its batch, which is what usually changed.
        """
        if self._settled is not None and self.count > self._settled:
            _log.warning("step %d compiled %d programs again; batch %s", step, self.count - self._settled, shapes)
            self._settled = self.count

    def take(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Be a listener of ``jax.monitoring``."""
        if event == _EVENT:
            self.count += 1
            self.duration_s += duration_secs


@contextlib.contextmanager
def watch_compiles() -> Iterator[CompileWatch]:
    """Watch compilations while the block runs."""
    watch = CompileWatch()
    jax.monitoring.register_event_duration_secs_listener(watch.take)
    try:
        yield watch
    finally:
        jax.monitoring.unregister_event_duration_listener(watch.take)
