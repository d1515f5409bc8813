"""The six scripts of the example, in order, as a new user runs them; two virtual devices, little time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_jax.distributed import free_port
from galvatron_jax.plan import load_plan

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "llama" / "scripts"
TIME_LIMIT_S = 240


def start(script: str, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "DEVICES": "2",
        "GLOBAL_BATCH": "8",
        "CONFIGS": str(folder / "configs"),
        **variables,
    }
    environment.pop("XLA_FLAGS", None)  # the number of virtual devices is the script's to choose
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(started: subprocess.Popen[str]) -> str:
    """Wait for a script; return what it said."""
    with started:
        try:
            out, _ = started.communicate(timeout=TIME_LIMIT_S)
        except BaseException:
            end(started)
            raise
    assert started.returncode == 0, f"{started.args!r}\n{out[-4000:]}"
    return out


def end(started: subprocess.Popen[str]) -> None:
    """Stop a script and all that it runs: a supervisor among them ends its own processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGTERM)


def run(script: str, folder: Path, *arguments: str) -> str:
    return finish(start(script, folder, *arguments))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1600)
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
    setting = ("--set", f'run.folder="{folder}"')
    run("train_dist.sh", tmp_path, *setting, "--steps", "3")
    assert (folder / "metrics.jsonl").read_text().count("\n") >= 3
    # By ssh to two machines (here: twice this one), as the README says; the run goes on, planned again for them.
    where = {"GALVATRON_COORDINATOR": f"127.0.0.1:{free_port()}", "GALVATRON_PROCESSES": "2", "DEVICES": "1"}
    more = (*setting, "--mesh", "2x1", "--steps", "5", "--override-config")
    machines = [start("train_dist.sh", tmp_path, *more, **where, GALVATRON_PROCESS=str(number)) for number in range(2)]
    try:
        said = [finish(machine) for machine in machines]
    finally:
        for machine in machines:
            end(machine)
    assert "resumed from step 3" in said[0]
    assert "now 2x1" in said[0] or "this is 2x1" in said[0]
    assert "done: step 5" in said[0]


def test_every_script_is_shell_that_parses() -> None:
    for script in sorted(SCRIPTS.iterdir()):
        subprocess.run(["bash", "-n", str(script)], check=True)
