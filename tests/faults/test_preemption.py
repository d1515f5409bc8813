"""Case 11: SIGTERM means save and stop with 75; a second one means now."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.faults.conftest import STEPS, Run, Runs

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize(
    ("point", "step"), [("before_step", 6), ("compile", 1), ("mid_save", 4), ("after_step", STEPS - 4)]
)
def test_sigterm_saves_and_ends_with_75_and_the_next_start_goes_on_exactly(
    runs: Runs, control: Run, point: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.new()
    assert run.here(faults=[{"kind": "terminate", "point": point, "step": step}]) == 75
    saved = int(run.checkpoints[-1].removeprefix("step_"))
    assert step <= saved < STEPS  # the signal comes asynchronously in the middle of a save
    assert point == "mid_save" or saved <= step + 2  # the step in flight, and the one in which all agree
    assert f"preempted: step {saved}" in capsys.readouterr().out
    assert run.here() == 0
    assert f"resumed from step {saved}" in capsys.readouterr().out
    assert run.trace == control.trace


def test_sigint_saves_and_ends_with_130(runs: Runs) -> None:
    run = runs.new()
    assert run.here(faults=[{"kind": "interrupt", "step": 6}]) == 130
    assert run.checkpoints[-1] in ("step_00000006", "step_00000007", "step_00000008")


def test_second_sigterm_ends_the_process_at_once_even_while_it_saves(runs: Runs) -> None:
    run = runs.new()
    faults: list[dict[str, Any]] = [
        {"kind": "terminate", "step": 2},
        {"kind": "terminate", "point": "mid_save"},
        {"kind": "stall", "point": "mid_save", "seconds": 600},
    ]
    ended = run.apart(faults=faults)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
