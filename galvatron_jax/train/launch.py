"""A small supervisor: starts the processes of a run on this machine, and all of them again when one fails.

    python -m galvatron_jax.train.launch --restarts 10 run.toml
    python -m galvatron_jax.train.launch --restarts 10 --processes 4 run.toml --devices 2

A failed process takes the others with it (JAX aborts them, or they wait in a collective for ever), so nothing less than
starting all again helps. They go on from the last checkpoint. What cannot become better by itself is not tried again:
bad input (2), nothing fits (3), a numerical stop (5). On several machines start one supervisor on each, under the
cluster's own launcher and without ``--processes``: when one process dies the others end too, and all come back.

SIGTERM and SIGINT are passed on; a process that has not ended ``--grace`` seconds later is killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from ..distributed import COORDINATOR, PROCESS, PROCESSES, free_port
from ._attempt import ATTEMPT_VARIABLE

FINAL = frozenset((0, 2, 3, 5, 130))
"""Exit codes after which nothing is started again."""
PREEMPTED = 75
POLL_S = 0.1
PEERS_S = 15.0
"""After the first failure the other processes may end by themselves (and say why) for so long."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code of the run."""
    given = _parser().parse_args(argv)
    command = [sys.executable, "-u", "-m", "galvatron_jax.train", *given.arguments]
    return Supervisor(command, processes=given.processes, restarts=given.restarts, grace_s=given.grace).run()


class Supervisor:
    """Runs one command in one or several processes until it ends for good."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int = 1,
        restarts: int = 0,
        grace_s: float = 60.0,
        peers_s: float = PEERS_S,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Hold the parts.

        Args:
            command: What each process runs.
            processes: On this machine; more than one are told of each other.
            restarts: How often all are started again.
            grace_s: From SIGTERM to SIGKILL.
            peers_s: From the first failure to SIGTERM for the others.
            say: Takes messages; stderr by default.
        """
        self._command, self._processes, self._restarts = list(command), processes, restarts
        self._grace_s, self._peers_s = grace_s, peers_s
        self._say = say or (lambda text: print(f"launch: {text}", file=sys.stderr, flush=True))
        self._running: list[subprocess.Popen[bytes]] = []
        self._asked: signal.Signals | None = None
        self._asked_at_s = 0.0

    def run(self) -> int:
        """Start, watch, start again; return the exit code of the last attempt."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(1, self._restarts + 2):
                code = self._attempt(attempt)
                if code in FINAL or self._asked is not None:
                    return code
                left = self._restarts + 1 - attempt
                self._say(f"the run ended with {code}; {left} restarts left" + ", starting again" * (left > 0))
            return code
        finally:
            self._end_all(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempt(self, attempt: int) -> int:
        environments = process_environments(os.environ, self._processes, attempt)
        self._running = [
            subprocess.Popen(self._command, env=environment, start_new_session=True) for environment in environments
        ]
        codes = self._wait()
        return worst(codes)

    def _wait(self) -> list[int]:
        """Return the exit codes in the order in which the processes ended."""
        codes: list[int] = []
        failed_at_s: float | None = None
        waiting = list(self._running)
        while waiting:
            for process in [p for p in waiting if p.poll() is not None]:
                waiting.remove(process)
                codes.append(exit_code(process.returncode))
                if process.returncode and failed_at_s is None:
                    failed_at_s = time.monotonic()
            now = time.monotonic()
            if failed_at_s is not None and now - failed_at_s > self._peers_s:
                self._end_all(signal.SIGKILL if now - failed_at_s > self._peers_s + self._grace_s else signal.SIGTERM)
            if self._asked is not None and now - self._asked_at_s > self._grace_s:
                self._end_all(signal.SIGKILL)
            time.sleep(POLL_S)
        return codes

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._asked_at_s = signal.Signals(number), time.monotonic()
        self._end_all(signal.Signals(number))

    def _end_all(self, number: signal.Signals) -> None:
        """Signal every process that still runs, with all that it started."""
        for process in self._running:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue


def process_environments(environment: Mapping[str, str], processes: int, attempt: int) -> list[dict[str, str]]:
    """Return the environment of each process: which one it is, and how often it was started."""
    base = {**environment, ATTEMPT_VARIABLE: str(attempt)}
    if processes == 1:
        return [base]
    joined = {**base, COORDINATOR: f"127.0.0.1:{free_port()}", PROCESSES: str(processes)}
    return [{**joined, PROCESS: str(index)} for index in range(processes)]


def exit_code(returned: int) -> int:
    """Return what a shell would call it: 128 + the signal that ended the process."""
    return 128 - returned if returned < 0 else returned


def worst(codes: Sequence[int]) -> int:
    """Return the code that decides: the first failure that says why; aborted peers (134, 137, 143) only if alone.

    Args:
        codes: In the order in which the processes ended.
    """
    failures = [code for code in codes if code]
    telling = [code for code in failures if code < 128]
    return (telling or failures or [0])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m galvatron_jax.train.launch",
        description="Start the processes of a run, and all of them again when one fails.",
    )
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="how often (default: 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="on this machine (default: 1)")
    parser.add_argument("--grace", type=float, default=60.0, metavar="S", help="from SIGTERM to SIGKILL (default: 60)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of python -m galvatron_jax.train")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
