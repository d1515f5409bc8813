"""Nodes without machines: network namespaces joined by a bridge, each with one rate-limited interface and one core.

Bytes really cross a link of a known rate, so what a cost model says of shared and crossed links can be held against a
clock without a cluster. The bridge lives in a namespace of its own: the machine's interfaces are never touched.

Facts that decide whether it works (measured in prototypes/emulated_cluster):

* gloo binds to what the host name resolves to: each node has its own /etc/hosts (``ip netns exec`` binds it);
* the token bucket's burst is credit: a message that fits into it after a pause looks free (64 KiB at 20 Mbit/s take
  0.3 ms with a burst of 68 kB, 26 ms with 5 kB), so it is 1 ms of the rate, and offloaded segments are cut to fit in;
* congestion control reno: the local queue is the only clock (bbr would pace on estimates of its own);
* two devices' threads on one core hand over once in a scheduler slice: 100 us slices, not 4 ms (Linux 6.12 and later);
* gloo's own thread wakes with each message, and takes the core from the thread that sends: which holds the lock that it
  then tries again and again, until the next tick (4 ms). A thread of SCHED_BATCH waits until the other one rests: an
  all-reduce inside a node takes 0.4 ms, not 4 to 8 (docs/design/0092);
* ``jax.distributed`` survives SIGTERM, so children are killed, in their own process groups, when the owner ends.

Needs root, iproute2 and the kernel's bridge, veth and tbf; ``why_unavailable`` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

PREFIX, DEVICE, PORT = "emu", "net0", 9911
SLICE_US = 100
_LEAST_BURST_BYTES = 5_000
"""Three packets."""
_LARGEST_SEGMENT_BYTES = 65_536
_PATIENCE_S = 20
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit")


class NodeResult(NamedTuple):
    """How the process of one node ended."""

    node: int
    returncode: int
    log: str
    timed_out: bool


class RunResult(NamedTuple):
    """How all ended, and what else the machine did meanwhile."""

    nodes: tuple[NodeResult, ...]
    foreign_load: float
    """Share of the machine's cores that processes other than ours took."""

    @property
    def failed(self) -> bool:
        """Some process failed or ran out of time."""
        return any(node.returncode for node in self.nodes)


def bytes_per_s(rate: str) -> float:
    """Return the bytes/s of a rate such as ``"200mbit"``."""
    match = _RATE.fullmatch(rate)
    if not match:
        raise ValueError(f"got rate {rate!r}, expected for example 200mbit")
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] / 8


def why_unavailable() -> str | None:
    """Return why nodes cannot be made here; None when they can."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"needs {tool} (package iproute2)"
    probe = f"{PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", probe, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1")
        _run("ip", "netns", "exec", probe, *_shape("1gbit", "v0"))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"needs bridge, veth and tbf: {error}"
    finally:
        _run("ip", "netns", "del", probe, check=False)
    return None


def clean_stale() -> list[str]:
    """Delete what an owner that was killed left behind; return the names."""
    names = {line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()}
    with contextlib.suppress(FileNotFoundError):
        names |= set(os.listdir("/etc/netns"))
    gone = []
    for name in sorted(names):
        match = re.fullmatch(PREFIX + r"(\d+)-(?:n\d+|sw|probe)", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _delete(name)
            gone.append(name)
    return gone


class EmulatedCluster:
    """``with EmulatedCluster(2, "400mbit") as nodes: nodes.run([sys.executable, "worker.py"], limit_s=120)``."""

    def __init__(self, nodes: int, rate: str, *, logs: Path | None = None) -> None:
        """Describe the nodes; they exist inside the ``with`` block.

        Args:
            nodes: How many, at most 199.
            rate: Of each node's link, for example ``"200mbit"``; what a node sends is limited.
            logs: Folder for what each node's process prints.
        """
        assert 1 <= nodes < 200, nodes
        bytes_per_s(rate)
        self.rate, self.size = rate, nodes
        tag = f"{PREFIX}{os.getpid()}"
        self._switch, self._names = f"{tag}-sw", [f"{tag}-n{i}" for i in range(nodes)]
        self._addresses = [f"10.231.7.{i + 1}" for i in range(nodes)]
        self._logs = logs or Path(tempfile.mkdtemp(prefix="emulated-"))
        self._children: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Make the nodes."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, _leave)
        try:
            self._create()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes and remove the nodes."""
        self.close()

    def close(self) -> None:
        """End the processes and remove the nodes; can be called again."""
        self._kill()
        for name in [*self._names, self._switch]:
            _delete(name)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._handlers = {}

    def set_rate(self, rate: str) -> None:
        """Change the rate of every node's link."""
        segment = min(_LARGEST_SEGMENT_BYTES, _burst_bytes(rate) // 2)
        for name in self._names:
            _run("ip", "-n", name, "link", "set", DEVICE, "gso_max_size", str(segment))
            _run("ip", "netns", "exec", name, *_shape(rate, DEVICE))
        self.rate = rate

    def run(
        self, command: Sequence[str], *, limit_s: float, environ: Mapping[str, str] | None = None, grace_s: float = 10.0
    ) -> RunResult:
        """Run ``command`` once on each node, each on a core of its own as far as there are cores.

        The environment says who each is (``GALVATRON_COORDINATOR`` and so on, see ``galvatron_jax.distributed``).

        Args:
            command: Program and arguments.
            limit_s: After so long all are killed.
            environ: More environment variables.
            grace_s: What the others get when one fails.
        """
        cores = sorted(os.sched_getaffinity(0))
        busy_s, own_s, began_s = _machine_seconds(), sum(os.times()[:4]), time.time()
        for node, name in enumerate(self._names):
            self._children.append(self._start(node, name, command, environ or {}, cores[node % len(cores)]))
        children, late = list(self._children), self._wait(began_s + limit_s, grace_s)
        self._kill()
        foreign_s = (_machine_seconds() - busy_s) - (sum(os.times()[:4]) - own_s)
        results = [
            NodeResult(i, child.returncode, self._log(i).read_text(errors="replace"), child.pid in late)
            for i, child in enumerate(children)
        ]
        return RunResult(tuple(results), max(0.0, foreign_s / (time.time() - began_s) / len(cores)))

    def _create(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for i, (name, address) in enumerate(zip(self._names, self._addresses, strict=True)):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            pair = ("type", "veth", "peer", "name", f"p{i}", "netns", self._switch)
            _run("ip", "-n", name, "link", "add", DEVICE, *pair)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            _run("ip", "-n", self._switch, "link", "set", f"p{i}", "master", "br0", "up")
            control = "net.ipv4.tcp_congestion_control=reno"
            _run("ip", "netns", "exec", name, "sysctl", "-qw", control, check=False)
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        self.set_rate(self.rate)

    def _start(
        self, node: int, name: str, command: Sequence[str], environ: Mapping[str, str], core: int
    ) -> subprocess.Popen[bytes]:
        place = {
            "GALVATRON_COORDINATOR": f"{self._addresses[0]}:{PORT}",
            "GALVATRON_PROCESSES": str(self.size),
            "GALVATRON_PROCESS": str(node),
        }
        libc = ctypes.CDLL(None, use_errno=True)

        def prepare() -> None:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the owner
            _share_core(libc)
            os.sched_setaffinity(0, {core})

        with self._log(node).open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env={**os.environ, **environ, **place},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=prepare,
            )

    def _wait(self, end_s: float, grace_s: float) -> set[int]:
        """Wait for all, return those that were late."""
        while None in [child.poll() for child in self._children]:
            if any(child.returncode for child in self._children):
                end_s = min(end_s, time.time() + grace_s)
            if time.time() > end_s:
                return {child.pid for child in self._children if child.poll() is None}
            time.sleep(0.1)
        return set()

    def _kill(self) -> None:
        """SIGTERM, then SIGKILL, to the groups that our own children lead."""
        for number, patience_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            end_s = time.time() + patience_s
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, end_s - time.time()))
        self._children = []

    def _log(self, node: int) -> Path:
        return self._logs / f"node{node}.log"


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # unwinds through __exit__


def _shape(rate: str, device: str) -> list[str]:
    return f"tc qdisc replace dev {device} root tbf rate {rate} burst {_burst_bytes(rate)} latency 50ms".split()


def _burst_bytes(rate: str) -> int:
    return max(_LEAST_BURST_BYTES, int(bytes_per_s(rate) * 1e-3))


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _delete(name: str) -> None:
    _run("ip", "netns", "del", name, check=False)
    folder = Path("/etc/netns") / name
    (folder / "hosts").unlink(missing_ok=True)
    for path in (folder, folder.parent):
        with contextlib.suppress(OSError):  # not there, or not ours alone
            path.rmdir()


def _machine_seconds() -> float:
    """CPU time that the whole machine has spent, and what a hypervisor took from it."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / float(os.sysconf("SC_CLK_TCK"))


def _share_core(libc: ctypes.CDLL) -> None:
    """Ask for short slices, and that no thread displaces another when it wakes, for this process and what it starts.

    Kernels that do not know it refuse, and the threads share their core as ever.
    """
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())  # sched_setattr
    if number is not None:
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_BATCH, 0, 0, 0, SLICE_US * 1000, 0, 0)
        libc.syscall(number, 0, attributes, 0)
