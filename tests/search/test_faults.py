"""Cases 8 and 9 of the fault list: a search that is stopped, and two searches for one file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from galvatron_jax._lock import only_writer
from galvatron_jax.errors import BusyError
from galvatron_jax.plan import load_plan
from galvatron_jax.search._cli import main

ROOT = Path(__file__).parents[2]
SEARCH = ["--mesh", "2x8", "--gpu", "h100", "--model", "llama2-7b", "--out", "plan.json"]

SIGNALLED = """
import os, sys
from galvatron_jax.search import _cli, _watch

looks, look = 0, _watch.Watch.look

def signalled(watch, best):
    global looks
    looks += 1
    if {when}:
        os.kill(os.getpid(), {number})  # its handler runs before the next line
    return look(watch, best)

_watch.Watch.look = signalled
sys.exit(_cli.main(sys.argv[1:]))
"""
"""The command in a process that sends itself a signal at a chosen moment of its search: no clock decides."""

WITH_A_PLAN, WITHOUT_A_PLAN = "best is not None and not watch.interrupted", "looks == 1"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_signalled(when: str, number: int, *words: str) -> subprocess.CompletedProcess[str]:
    code = SIGNALLED.format(when=when, number=number)
    return subprocess.run(
        [sys.executable, "-c", code, *SEARCH, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_search_writes_its_best_plan_with_the_proven_gap_and_ends_with_status_130(number: int) -> None:
    done = run_signalled(WITH_A_PLAN, number)
    assert (done.returncode, done.stderr) == (130, "")
    assert sorted(path.name for path in Path().iterdir()) == ["plan.json"]
    plan = load_plan("plan.json")
    assert plan.certificate is not None
    assert plan.predicted is not None
    assert not plan.certificate.optimal
    assert '"optimal": false' in Path("plan.json").read_text()
    assert 0 < plan.certificate.lower_bound_s < plan.predicted.step_time_s
    assert "stopped early" in done.stdout


def test_search_interrupted_before_it_has_a_plan_writes_nothing() -> None:
    done = run_signalled(WITHOUT_A_PLAN, signal.SIGINT)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "galvatron_jax.search: interrupted\n"
    assert list(Path().iterdir()) == []


def test_interrupted_search_keeps_the_plan_that_was_there_when_it_has_none() -> None:
    assert main([*SEARCH, "--quiet"]) == 0
    before = Path("plan.json").read_bytes()
    assert run_signalled(WITHOUT_A_PLAN, signal.SIGTERM).returncode == 130
    assert Path("plan.json").read_bytes() == before


def test_time_limit_ends_with_status_0_and_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SEARCH, "--time-limit", "0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    certificate = plan["certificate"]
    assert certificate["optimal"] or 0 < certificate["lower_bound_s"] < plan["predicted"]["step_time_s"]


def test_second_search_for_one_file_is_told_who_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with only_writer("plan.json"):
        assert main([*SEARCH, "--quiet"]) == 4
    message = capsys.readouterr().err
    assert f"another process is writing it: pid {os.getpid()}" in message
    assert "choose another --out" in message
    assert len(message.splitlines()) == 1
    assert list(Path().iterdir()) == []
    assert main([*SEARCH, "--quiet"]) == 0


def test_lock_of_a_killed_process_holds_nobody_up() -> None:
    code = "import os, signal; from galvatron_jax._lock import only_writer\n"
    code += "with only_writer('plan.json'): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert Path(".plan.json.lock").exists()  # what a killed process leaves behind
    with only_writer("plan.json"):
        pass
    assert list(Path().iterdir()) == []


def test_lock_admits_one_writer_at_a_time() -> None:
    """Many threads, each with its own open file as a process has: never two inside, and nobody waits for ever."""
    inside, most, refused = 0, 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(200):
            try:
                with only_writer("folder/plan.json"):
                    with counting:
                        inside += 1
                        most = max(most, inside)
                    with counting:
                        inside -= 1
            except BusyError:
                with counting:
                    refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not Path("folder/.plan.json.lock").exists()


def test_two_commands_for_one_file_leave_one_whole_plan() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "galvatron_jax.search", *SEARCH, "--quiet"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in both]
    assert {status for _, status in ends} <= {0, 4}
    assert 0 in {status for _, status in ends}
    assert all("another process is writing it" in err for err, status in ends if status == 4)
    assert load_plan("plan.json").certificate is not None
    assert [path.name for path in Path().iterdir()] == ["plan.json"]
