"""The six scripts of the example, in order, as a new user runs them; two virtual devices, little time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_jax.plan import load_plan

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "llama" / "scripts"
TIME_LIMIT_S = 240


def run(script: str, folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "DEVICES": "2",
        "GLOBAL_BATCH": "8",
        "CONFIGS": str(folder / "configs"),
    }
    environment.pop("XLA_FLAGS", None)  # the number of virtual devices is the script's to choose
    command = ["bash", str(SCRIPTS / script), *arguments]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_scripts_run_in_order_and_hand_their_files_on(tmp_path: Path) -> None:
    run("profile_hardware.sh", tmp_path, "--quick", "--budget-s", "8")
    run("profile_computation.sh", tmp_path, "--budget-s", "15", "--samples", "1,2", "--tp", "1")
    compiles = importlib.util.find_spec("jax_plugins") is not None
    if compiles:  # the extra [verify]
        assert "workspace" in run("profile_memory.sh", tmp_path, "--budget-s", "15")
    found = run("search_dist.sh", tmp_path)
    assert "compute measured" in found
    assert ("memory compiled for h100 does not count here" in found) == compiles
    plan = load_plan(tmp_path / "configs" / "optimal_solution.json")
    assert (plan.cluster.mesh, plan.cluster.gpu, plan.global_batch) == ("1x2", "cpu", 8)
    assert plan.hardware is not None
    assert plan.hardware.measured
    assert "measured" in run("check_cost_model.sh", tmp_path, "--measure", "--steps", "2")
    folder = tmp_path / "run"
    run("train_dist.sh", tmp_path, "--set", f'run.folder="{folder}"', "--steps", "3")
    assert (folder / "metrics.jsonl").read_text().count("\n") >= 3


def test_every_script_is_shell_that_parses() -> None:
    for script in sorted(SCRIPTS.iterdir()):
        subprocess.run(["bash", "-n", str(script)], check=True)
