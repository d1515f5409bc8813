"""The emulated nodes: they reach each other at the rate that was asked for, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.emulated_cluster.network import EmulatedCluster, bytes_per_s, clean_stale, why_unavailable

ROOT = Path(__file__).parents[2]
UNAVAILABLE = why_unavailable()
needs_nodes = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"emulated nodes: {UNAVAILABLE}")
pytestmark = pytest.mark.multiprocess

SENDER = """
import os, socket, time
address, size = "10.231.7.1", {size}
if os.environ["GALVATRON_PROCESS"] == "0":
    with socket.create_server((address, 7000)) as server:
        with server.accept()[0] as link:
            link.recv(1)
            start, left = time.perf_counter(), size
            while left:
                left -= len(link.recv(1 << 16))
            print("seconds", time.perf_counter() - start)
else:
    for _ in range(50):
        try:
            link = socket.create_connection((address, 7000), timeout=20)
            break
        except OSError:
            time.sleep(0.1)
    with link:
        link.sendall(b"x" + bytes(size))
        link.shutdown(socket.SHUT_WR)
        link.recv(1)
"""


def ours() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"emu{os.getpid()}-")]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[EmulatedCluster]:
    with EmulatedCluster(2, "8mbit", logs=tmp_path) as found:
        yield found
    assert ours() == []
    assert not list(Path("/etc/netns").glob(f"emu{os.getpid()}-*"))


@pytest.mark.parametrize(("rate", "expected"), [("8mbit", 1e6), ("1.5gbit", 187.5e6), ("800kbit", 1e5), ("8bit", 1.0)])
def test_rate_is_read_in_bytes(rate: str, expected: float) -> None:
    assert bytes_per_s(rate) == expected


@pytest.mark.parametrize("rate", ["", "fast", "8", "8mb", "-8mbit"])
def test_rate_that_is_none_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="200mbit"):
        bytes_per_s(rate)


@needs_nodes
@pytest.mark.parametrize("factor", [1, 4])
def test_bytes_cross_at_the_rate_of_the_link(nodes: EmulatedCluster, factor: int) -> None:
    nodes.set_rate(f"{8 * factor}mbit")
    size = 1_500_000 * factor
    result = nodes.run([sys.executable, "-c", SENDER.format(size=size)], limit_s=40)
    assert not result.failed, result
    seconds = float(result.nodes[0].log.split()[-1])
    assert seconds == pytest.approx(1.5, rel=0.15)  # headers take 3 to 6 %


@needs_nodes
def test_message_that_follows_a_pause_is_not_free(nodes: EmulatedCluster) -> None:
    result = nodes.run([sys.executable, "-c", SENDER.format(size=50_000)], limit_s=40)
    assert not result.failed, result
    # its first 5 kB are; and beside other work the receiver's clock starts up to a tick (4 ms) late
    assert float(result.nodes[0].log.split()[-1]) > 0.8 * 0.05


@needs_nodes
def test_threads_of_a_node_do_not_displace_each_other(nodes: EmulatedCluster) -> None:
    """Else gloo's thread spins on a lock whose holder it has put off the core, and collectives take ticks."""
    code = (
        "import os, threading; f = lambda: print(os.sched_getscheduler(0)); t = threading.Thread(target=f); t.start()"
    )
    result = nodes.run([sys.executable, "-c", code], limit_s=20)
    assert [node.log.split() for node in result.nodes] == [[str(os.SCHED_BATCH)]] * 2


@needs_nodes
def test_failing_node_ends_the_others_soon(nodes: EmulatedCluster) -> None:
    code = "import os, time; os.environ['GALVATRON_PROCESS'] == '0' and exit(3); time.sleep(100)"
    start_s = time.monotonic()
    result = nodes.run([sys.executable, "-c", code], limit_s=60, grace_s=0.5)
    assert time.monotonic() - start_s < 20
    assert [node.returncode for node in result.nodes] == [3, -15]
    assert [node.timed_out for node in result.nodes] == [False, True]


@needs_nodes
def test_process_that_ignores_sigterm_is_killed_at_the_time_limit(nodes: EmulatedCluster) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    result = nodes.run([sys.executable, "-c", code], limit_s=2)
    assert {node.returncode for node in result.nodes} == {-9}
    assert all(node.timed_out for node in result.nodes)


@needs_nodes
def test_what_a_killed_owner_left_is_cleaned(tmp_path: Path) -> None:
    code = (
        "import os, signal; from benchmarks.emulated_cluster.network import EmulatedCluster\n"
        "EmulatedCluster(1, '8mbit').__enter__(); print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    owner = killed.stdout.split()[0]
    assert sorted(name for name in clean_stale() if name.startswith(f"emu{owner}-")) == [
        f"emu{owner}-n0",
        f"emu{owner}-sw",
    ]


CALM = 0.5
"""Load average below which a clock says something: the nodes take both cores of a machine that has two."""


@needs_nodes
@pytest.mark.slow
def test_plans_far_apart_are_predicted_in_the_order_of_the_clock(tmp_path: Path) -> None:
    """Profile, predict, run, compare; errors are reported by the benchmark, only clear orders are asserted here."""
    if (load := os.getloadavg()[0]) > CALM:
        pytest.skip(f"step times need a calm machine: load average {load:.1f}, at most {CALM} wanted")
    command = [sys.executable, "-m", "benchmarks.emulated_cluster", "--rate", "20mbit", "--rounds", "2"]
    command += ["--plans", "dp4,tp4,pp2 dp2 in 2", "--profile-s", "100", "--limit-s", "400"]
    command += ["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    if "not measured within" in done.stderr:
        pytest.skip(f"the machine was too busy for the profilers: {done.stderr[-500:]}")
    shown = [line.split("  ")[0].strip() or line.split()[0] for line in done.stdout.splitlines()[1:4]]
    assert shown[0].startswith("pp2"), done.stdout
    assert "regret of the pick 0.0%" in done.stdout, done.stdout
