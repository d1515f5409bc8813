"""A window of steps under ``jax.profiler``: what the devices really did, for Perfetto or xprof."""

from __future__ import annotations

from pathlib import Path

import jax


class ProfileWindow:
    """Traces steps ``first`` to ``last`` into a folder."""

    def __init__(self, window: str | None, folder: Path) -> None:
        """Read ``FIRST:LAST``; None traces nothing."""
        first, _, last = (window or "0:0").partition(":")
        self._first, self._last, self._folder = int(first), int(last), folder
        self._running = False

    def before(self, step: int) -> None:
        """Begin before the first step of the window is sent off."""
        if step == self._first and not self._running:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int) -> None:
        """End when the last step of the window is done."""
        if self._running and step >= self._last:
            self.close()

    def close(self) -> None:
        """End a window that is open."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
