"""Cases 11, 12, 24 over several processes: what happens to one happens to all, and all come back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from galvatron_jax.train.launch import Supervisor
from tests.faults.conftest import REPOSITORY, STEPS, Run, Runs

pytestmark = [pytest.mark.multidevice, pytest.mark.multiprocess]

LOSS_RTOL = 2e-5
"""Float32 sums in another order: gloo between processes, threads inside one."""


@pytest.mark.slow
def test_kill_and_sigterm_of_one_of_two_processes_cost_nothing(runs: Runs, control: Run) -> None:
    """Killed at step 6, asked to stop at step 9: the batches and losses are those of one process left alone."""
    run = runs.new(run={"devices": 4}, checkpoint={"timeout_s": 60.0})
    faults = [
        {"kind": "kill", "step": 6, "rank": 1, "attempt": 1},
        {"kind": "terminate", "step": 9, "rank": 1, "attempt": 2},
    ]
    ended = run.apart(faults=faults, launch=("--restarts", "2", "--processes", "2", "--grace", "5"), timeout_s=500)
    assert ended.returncode == 0, ended.stderr
    assert "the run ended with 137" in ended.stderr
    assert "the run ended with 75" in ended.stderr
    assert run.trace.keys() == control.trace.keys()
    for step, (batch, *numbers) in control.trace.items():
        assert run.trace[step][0] == batch
        np.testing.assert_allclose(run.trace[step][1:], numbers, rtol=LOSS_RTOL * 10)
    assert run.checkpoints[-1] == f"step_{STEPS:08d}"


EXCHANGE = """
import json, sys
from galvatron_jax.distributed import initialize
place = initialize(heartbeat_timeout_s=20)
from galvatron_jax.errors import PreflightError
from galvatron_jax.train._agreement import Agreement, Flag
from galvatron_jax.train._preflight import check_preflight, gather_facts
from galvatron_jax.train._ranks import current_ranks
ranks = current_ranks()
said = ranks.exchange("words", f"word {ranks.index}")
again = ranks.exchange("words", f"more {ranks.index}")
agreement = Agreement()
own = [frozenset({Flag.TERMINATED}) if ranks.index == 1 else frozenset(), frozenset()]
agreed = [sorted(flag.name for flag in agreement.read(f)) for f in map(agreement.propose, own)]
ranks.report(f"step {ranks.index}")
ranks.exchange("reported")
try:
    check_preflight(ranks, gather_facts(config="c", plan=f"plan {ranks.index}"))
    problem = ""
except PreflightError as error:
    problem = error.message
absent = ranks.exchange("late", timeout_s=1.0) if ranks.index == 0 else None
out = {"said": said, "again": again, "agreed": agreed, "reports": ranks.reports(), "problem": problem, "absent": absent}
open(sys.argv[1] + str(ranks.index), "w").write(json.dumps(out))
ranks.exchange("end")
"""


def test_processes_exchange_agree_and_name_who_differs_or_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    command = [sys.executable, "-c", EXCHANGE, str(tmp_path / "rank")]
    assert Supervisor(command, processes=2, peers_s=5.0, grace_s=1.0).run() == 0
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["said"] == ["word 0", "word 1"]
        assert found["again"] == ["more 0", "more 1"]
        assert found["agreed"] == [["TERMINATED"], []]
        assert found["reports"] == {"0": "step 0", "1": "step 1"}
        assert "plan is plan 1, on rank 0 plan 0" in found["problem"]
    assert first["absent"] == ["", None]
