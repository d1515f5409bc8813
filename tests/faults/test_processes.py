"""Cases 11, 12, 15, 16, 20, 24 over several processes: what happens to one happens to all, and all come back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from flax import nnx

from galvatron_jax.models.huggingface import write_llama
from galvatron_jax.plan import Strategy, load_plan, save_plan
from galvatron_jax.train import load_config
from galvatron_jax.train._build import build_subject, llama_of
from galvatron_jax.train.launch import Supervisor
from tests.faults.conftest import REPOSITORY, STEPS, Run, Runs
from tests.faults.test_numerics import BAD_BATCH, poisoned_run
from tests.faults.test_resume import other_plan

pytestmark = [pytest.mark.multidevice, pytest.mark.multiprocess, pytest.mark.timeout(1600)]

LOSS_RTOL = 2e-5
"""Float32 sums in another order: gloo between processes, threads inside one."""


@pytest.mark.slow
def test_pipeline_over_processes_survives_a_kill_and_a_sigterm_and_goes_on_under_one_stage(
    runs: Runs, control: Run, tmp_path: Path
) -> None:
    """A stage in each of two processes: killed at step 9, asked to stop there; then one process with one stage.

    The save of step 8 waited for that of step 4, so that at step 9 there is something to go on from on any machine.
    The first weights come from safetensors (each process reads its own) and are those that the control run begins with.
    """
    alone = load_plan(control.folder / "plan.json")
    cluster = msgspec.structs.replace(alone.cluster, nodes=2, gpus_per_node=2)
    strategies = (Strategy(dp=2), Strategy(tp=2), Strategy(dp=2, zero=3))
    pipeline = other_plan(msgspec.structs.replace(alone, cluster=cluster), *strategies, stages=2, microbatches=2)
    weights = str(first_weights(control, tmp_path / "weights"))
    run = runs.new(model={"huggingface": weights, "changes": {}}, checkpoint={"timeout_s": 60.0})
    faults = [
        {"kind": "kill", "step": 9, "rank": 1, "attempt": 1},
        {"kind": "terminate", "step": 9, "rank": 1, "attempt": 2},
    ]
    ended = run.apart(
        *("--plan", str(save_plan(pipeline, tmp_path / "pipeline.json")), "--devices", "2"),
        faults=faults,
        launch=("--restarts", "1", "--processes", "2", "--grace", "5"),
    )
    assert ended.returncode == 75, ended.stderr
    assert "the run ended with 137; 1 restarts left" in ended.stderr
    assert re.search("resumed from step [48]\n", ended.stdout)
    saved = int(run.checkpoints[-1].removeprefix("step_"))
    assert 9 <= saved < STEPS
    ended = run.apart("--plan", str(control.folder / "plan.json"))
    assert ended.returncode == 0, ended.stderr
    assert f"resumed from step {saved}" in ended.stdout
    assert "checkpoint made under 2x2 cpu, 2 stages" in ended.stdout
    assert_same_run(run, control)


@pytest.mark.slow
def test_full_disk_and_rollback_are_agreed_upon_by_all_processes(runs: Runs, tmp_path: Path) -> None:
    """Two processes; one finds the disk full, before and in a save; a batch is not finite: both act alike."""
    run = poisoned_run(runs, tmp_path, "rollback", checkpoint={"timeout_s": 20.0, "every": 3})
    faults = [
        {"kind": "disk_full", "point": "before_save", "step": 3, "rank": 1},
        {"kind": "disk_full", "point": "mid_save", "step": 9, "rank": 0},
    ]
    ended = run.apart("--devices", "2", faults=faults, launch=("--processes", "2"))
    assert ended.returncode == 0, ended.stderr
    for step in (3, 9):
        assert ended.stderr.count(f"checkpoint of step {step} failed") == 2  # both tell it
    assert f"batch {BAD_BATCH} is left out" in ended.stdout
    assert all(np.isfinite(loss) for loss in run.losses.values())
    assert [batch for batch, *_ in run.trace.values()][-1] == STEPS - 1 + (BAD_BATCH + 1 - rolled_back_to(ended.stdout))
    assert run.checkpoints[-1] == f"step_{STEPS:08d}"


def rolled_back_to(out: str) -> int:
    found = re.search(r"rolled back to step (\d+)", out)
    assert found, out
    return int(found[1])


def first_weights(control: Run, folder: Path) -> Path:
    """Write what the control run began with as safetensors."""
    config = load_config(control.file).model
    state = nnx.to_pure_dict(nnx.state(build_subject(config).build(), nnx.Param))
    weights = {".".join(map(str, path)): value for path, value in nnx.traversals.flatten_mapping(state).items()}
    write_llama(folder, llama_of(config), weights)
    return folder


def assert_same_run(run: Run, control: Run) -> None:
    """The batches are those of the control run, and so are the losses but for the order of sums."""
    assert run.trace.keys() == control.trace.keys()
    for step, (batch, *numbers) in control.trace.items():
        assert run.trace[step][0] == batch
        np.testing.assert_allclose(run.trace[step][1:], numbers, rtol=LOSS_RTOL * 10)
    assert run.checkpoints[-1] == f"step_{STEPS:08d}"


EXCHANGE = """
import json, sys
from galvatron_jax.distributed import initialize
place = initialize()
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
