"""Cases 14 and 15: damaged checkpoints, full disks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from galvatron_jax.train._trackers import read_metrics
from tests.faults.conftest import STEPS, Run, Runs

pytestmark = pytest.mark.multidevice


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    runs: Runs, control: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.new()
    shutil.copytree(control.folder, run.folder)
    newest = run.folder / "checkpoints" / f"step_{STEPS:08d}"
    flip_bit(newest)
    assert run.here() == 0
    assert "resumed from step 8" in capsys.readouterr().out
    assert "is damaged" in caplog.text
    assert run.trace == control.trace
    assert newest.with_name(f"{newest.name}.corrupt").is_dir()


def test_run_refuses_to_begin_again_when_all_checkpoints_are_damaged(
    runs: Runs, control: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.new()
    shutil.copytree(control.folder, run.folder)
    for path in (run.folder / "checkpoints").iterdir():
        flip_bit(path)
    assert run.here() == 4
    assert "all 3 checkpoints are damaged" in capsys.readouterr().err


def flip_bit(folder: Path) -> None:
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_full_disk_is_waited_out_while_training_goes_on(
    runs: Runs, control: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.new(checkpoint={"every": 3, "max_failures": 3})
    assert run.here(faults=[{"kind": "disk_full", "point": "mid_save", "step": 3}]) == 0
    assert "checkpoint of step 3 failed: OSError" in caplog.text
    assert run.trace == control.trace
    assert run.checkpoints[-1] == f"step_{STEPS:08d}"
    assert "step_00000003" not in run.checkpoints
    assert [r["checkpoint_failed"] for r in read_metrics(run.folder) if "checkpoint_failed" in r][0] == 1


def test_disk_that_stays_full_ends_the_run_with_4_and_costs_no_checkpoint(
    runs: Runs, control: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.new(run={"steps": STEPS}, checkpoint={"max_failures": 1, "keep": 1})
    shutil.copytree(control.folder, run.folder)
    shutil.rmtree(run.folder / "checkpoints" / f"step_{STEPS:08d}")
    before = run.checkpoints
    assert run.here(faults=[{"kind": "disk_full", "point": "mid_save"}]) == 4
    assert "2 saves in a row failed" in capsys.readouterr().err
    assert run.checkpoints == before


def test_folder_of_checkpoints_removed_while_running_is_made_again(runs: Runs, control: Run) -> None:
    run = runs.new()
    hook = run.folder / "checkpoints"
    process = run.started(faults=[{"kind": "stall", "step": 6, "seconds": 3}])
    deadline_s = time.monotonic() + 240
    while not (hook / "step_00000004").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    shutil.rmtree(hook)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert run.checkpoints[-1] == f"step_{STEPS:08d}"
