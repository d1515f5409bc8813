"""Starts a worker module in several processes, with a hard time limit.

SIGKILL to the whole group: ``jax.distributed`` catches SIGTERM. Logs are unbuffered files, so that they are there after
an abort.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from galvatron_jax.distributed import COORDINATOR, PROCESS, PROCESSES, free_port

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3
"""A free port may be taken before it is used."""

POLL_S = 0.2


class ProcessesFailed(AssertionError):
    """A process ended with an error, or the time limit was reached."""


def run_processes(
    module: str, arguments: Sequence[str], *, processes: int, devices: int, folder: Path, limit_s: float
) -> None:
    """Run ``python -m module arguments`` in ``processes`` processes of ``devices`` virtual devices each.

    Raises:
        ProcessesFailed: with the end of every log.
    """
    for attempt in range(ATTEMPTS):
        logs = [folder / f"process{index}.{attempt}.log" for index in range(processes)]
        started = _start(module, arguments, devices, logs)
        try:
            codes = _wait(started, limit_s)
        finally:
            for process in started:
                _kill(process)
        if all(code == 0 for code in codes):
            return
        texts = [log.read_text(errors="replace") for log in logs]
        if attempt + 1 == ATTEMPTS or not any("is busy" in text or "already in use" in text for text in texts):
            parts = [
                f"--- process {k}: {code}\n{text[-4000:]}"
                for k, (code, text) in enumerate(zip(codes, texts, strict=True))
            ]
            raise ProcessesFailed("\n".join(parts))


def _start(module: str, arguments: Sequence[str], devices: int, logs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    )
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        COORDINATOR: f"127.0.0.1:{free_port()}",
        PROCESSES: str(len(logs)),
    }
    started = []
    for index, log in enumerate(logs):
        with log.open("wb") as out:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=ROOT,
                    env={**common, PROCESS: str(index)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return started


def _wait(started: Sequence[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """Wait until all have ended, one has failed, or the time is over; return exit codes (None: still running)."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        codes = [process.poll() for process in started]
        if all(code is not None for code in codes) or any(codes):
            break
        time.sleep(POLL_S)
    return [process.poll() for process in started]


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
