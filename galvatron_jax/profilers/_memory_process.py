"""The compiling process as the memory profiler sees it: started, asked, ended.

Bounded: an answer that does not come within the time limit ends the process; the next probe starts a new one.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from types import TracebackType

import msgspec

from ..errors import ToolchainError
from ._memory_probe import WORKER, MemoryProbe, MemoryReading, ProbeSession

_PACKAGE = __package__.partition(".")[0]


class ProbeProcess:
    """Asks one compiling process after the other, each started when it is needed."""

    def __init__(self, session: ProbeSession, *, time_limit_s: float) -> None:
        """Nothing is started yet.

        Args:
            session: What all probes have in common.
            time_limit_s: For one answer.
        """
        self._session, self._limit_s = session, time_limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ProbeProcess:
        """Nothing to do."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""
        self.close()

    def ask(self, probe: MemoryProbe) -> MemoryReading:
        """Return what the compiler says of ``probe``; a process that dies or takes too long is an answer too.

        Raises:
            ToolchainError: no probe can be compiled: no compiler, no such target, no such model.
        """
        if self._process is None:
            self._start()
        line = self._exchange(probe)
        if line is not None:
            return msgspec.json.decode(line, type=MemoryReading)
        self.close()
        return MemoryReading(probe=probe, problem=f"no answer within {self._limit_s:g} s, or the process ended")

    def close(self) -> None:
        """End the process, if one runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-m", f"{_PACKAGE}.{WORKER}"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        line = self._exchange(self._session)
        if line is None:
            self.close()
            raise ToolchainError("the compiling process ended before it answered", action="verify a plan to see why")
        first = msgspec.json.decode(line, type=MemoryReading)
        if first.problem:
            self.close()
            raise ToolchainError(f"no program can be compiled: {first.problem}", action="see above")

    def _exchange(self, message: msgspec.Struct) -> bytes | None:
        """Send a line and return the line that comes back, None if none does."""
        assert self._process is not None, "started"
        assert self._process.stdin is not None, "piped"
        assert self._process.stdout is not None, "piped"
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            if not waiting.select(self._limit_s):
                return None
        return self._process.stdout.readline() or None
