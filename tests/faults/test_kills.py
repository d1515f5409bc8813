"""Cases 12 and 13: processes killed between and in the middle of saves; the run goes on as if nothing had happened."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import orbax.checkpoint
import pytest

from galvatron_jax.train.launch import Supervisor, worst
from tests.faults.conftest import STEPS, Run, Runs

ocp: Any = orbax.checkpoint  # its public names are not marked as such

pytestmark = pytest.mark.multidevice


@pytest.mark.slow
def test_run_killed_three_times_equals_the_uninterrupted_one_bit_for_bit(runs: Runs) -> None:
    """Between checkpoints, in the middle of a save, and after all is on disk but before the rename."""
    alone = runs.new("alone")
    assert alone.apart().returncode == 0
    killed = runs.new("killed")
    faults = [
        {"kind": "kill", "point": "before_step", "step": 7, "attempt": 1},
        {"kind": "kill", "point": "mid_save", "step": 8, "attempt": 2},
        {"kind": "kill", "point": "before_commit", "step": STEPS, "attempt": 3},
    ]
    ended = killed.apart(faults=faults, launch=("--restarts", "3"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("the run ended with 137") == 3
    assert ended.stdout.count("resumed from step 4") in (1, 2)  # a kill may come before the save of step 4 is done
    assert "left by a killed process" in ended.stderr
    assert killed.trace == alone.trace
    assert killed.checkpoints == alone.checkpoints == ["step_00000004", "step_00000008", f"step_{STEPS:08d}"]
    assert arrays(killed) == arrays(alone)


def arrays(run: Run) -> dict[str, bytes]:
    """All arrays of the last checkpoint (parameters, optimizer, random state), byte by byte."""
    restored = ocp.StandardCheckpointer().restore(run.folder / "checkpoints" / run.checkpoints[-1])
    assert any(name.startswith("optimizer/") for name in restored)
    return {name: np.asarray(value).tobytes() for name, value in restored.items()}


@pytest.mark.parametrize("code", [2, 3, 5])
def test_supervisor_does_not_try_again_what_cannot_become_better(code: int) -> None:
    said: list[str] = []
    assert Supervisor([sys.executable, "-c", f"raise SystemExit({code})"], restarts=5, say=said.append).run() == code
    assert said == []


@pytest.mark.parametrize("code", [1, 4, 75])
def test_supervisor_tries_again_what_may_and_gives_up_in_the_end(code: int) -> None:
    said: list[str] = []
    assert Supervisor([sys.executable, "-c", f"raise SystemExit({code})"], restarts=2, say=said.append).run() == code
    assert [text.split(";")[1] for text in said] == [
        " 2 restarts left, starting again",
        " 1 restarts left, starting again",
        " 0 restarts left",
    ]


def test_supervisor_ends_the_others_when_one_fails_and_kills_those_that_swallow_sigterm() -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.exit(4) if os.environ['GALVATRON_PROCESS'] == '1' else time.sleep(600)\n"
    )
    supervisor = Supervisor([sys.executable, "-c", program], processes=3, peers_s=0.5, grace_s=0.5)
    assert supervisor.run() == 4


def test_first_telling_code_decides() -> None:
    assert worst([134, 2, 134]) == 2
    assert worst([0, 137, 134]) == 137
    assert worst([0, 0]) == 0
    assert worst([4, 2]) == 4
