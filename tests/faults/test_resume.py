"""Cases 2, 3, 16, 17, 18: going on under another plan, and refusing what is another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from galvatron_jax._document import encode
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, load_plan, save_plan
from galvatron_jax.train import load_config
from galvatron_jax.train._trainer import AutoTrainer
from tests.faults.conftest import STEPS, Run, Runs

pytestmark = pytest.mark.multidevice

LOSS_RTOL = 2e-5
"""Float32 sums in another order, and what a dozen steps of Adam make of it."""


def copied(control: Run, run: Run, *, keep: int | None = None) -> Run:
    """Put the folder of ``control`` under ``run``, with checkpoints up to step ``keep`` only."""
    shutil.copytree(control.folder, run.folder)
    for path in (run.folder / "checkpoints").iterdir():
        if keep is not None and int(path.name.removeprefix("step_")) > keep:
            shutil.rmtree(path)
    return run


def other_plan(plan: Plan, *strategies: Strategy, microbatches: int = 1, stages: int = 1) -> Plan:
    """``plan`` with other strategies for embedding, layers (all alike) and head, in equal ``stages``."""
    by_kind = dict(zip(("embed", "layers.*", "head"), strategies, strict=True))
    kinds = [kind for kind, _ in plan.layers()]
    share = len(kinds) // stages
    parts = [kinds[i * share : (i + 1) * share if i < stages - 1 else None] for i in range(stages)]
    cut = tuple(
        Stage(
            devices=plan.cluster.devices // stages,
            runs=tuple(PlanRun(kind=kind, count=1, strategy=by_kind.get(kind, strategies[1])) for kind in part),
        )
        for part in parts
    )
    return msgspec.structs.replace(
        plan, stages=cut, microbatches=microbatches, schedule="1f1b", chunks=1, predicted=None, certificate=None
    )


def merged(runs: tuple[PlanRun, ...]) -> tuple[PlanRun, ...]:
    """Neighbouring runs of one kind as one."""
    result: list[PlanRun] = []
    for run in runs:
        if result and result[-1].kind == run.kind:
            result[-1] = msgspec.structs.replace(result[-1], count=result[-1].count + run.count)
        else:
            result.append(run)
    return tuple(result)


PLANS: dict[str, tuple[tuple[Strategy, ...], dict[str, int]]] = {
    "tp2 dp4": ((Strategy(tp=2, dp=4), Strategy(tp=2, sp=True, dp=4), Strategy(tp=2, dp=4)), {}),
    "zero 3, two microbatches": ((Strategy(dp=8, zero=3),) * 3, {"microbatches": 2}),
    "two stages": (
        (Strategy(dp=4), Strategy(tp=2, dp=2), Strategy(dp=4, zero=3)),
        {"stages": 2, "microbatches": 2},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_run_goes_on_under_another_plan(
    runs: Runs, control: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategies, shape = PLANS[name]
    plan = other_plan(load_plan(control.folder / "plan.json"), *strategies, **shape)
    run = copied(control, runs.new(run={"plan": str(save_plan(plan, tmp_path / "other.json"))}), keep=4)
    trainer = AutoTrainer.from_config(load_config(run.file))
    assert trainer.run().step == STEPS
    out = capsys.readouterr().out
    assert "resumed from step 4" in out
    assert "checkpoint made under 1x8 cpu, 1 stage" in out
    for step, (batch, loss, norm) in control.trace.items():
        assert run.trace[step][0] == batch
        np.testing.assert_allclose(run.trace[step][1:], (loss, norm), rtol=LOSS_RTOL * (1 if step > 5 else 10))


@pytest.mark.parametrize("name", ["tp2 dp4", "two stages"])
def test_state_under_another_plan_equals_the_saved_one_as_numpy(
    runs: Runs, control: Run, name: str, tmp_path: Path
) -> None:
    strategies, shape = PLANS[name]
    plan = other_plan(load_plan(control.folder / "plan.json"), *strategies, **shape)
    run = copied(control, runs.new(run={"plan": str(save_plan(plan, tmp_path / "other.json"))}))
    first, second = (AutoTrainer.from_config(load_config(r.file)) for r in (copied(control, runs.new("same")), run))
    for trainer in (first, second):
        trainer.run()  # restores the last step; there is nothing left to train
        assert trainer.sharded is not None
    states = [leaves(trainer.sharded.neutral_state()) for trainer in (first, second) if trainer.sharded]
    assert len(states[0]) > 20
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)


def leaves(state: Any) -> list[np.ndarray[Any, Any]]:
    keys = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, keys) else x) for x in jax.tree.leaves(state)
    ]


# ------------------------------------------------------------------------------------------------------ foreign plans
@pytest.mark.parametrize(
    ("mesh", "gpu", "expected"),
    [
        ("2x4", "cpu", "the plan is for 2x4 cpu (8 devices), the devices are 1x8 cpu (8 devices) (mesh 2x4, now 1x8)"),
        ("1x8", "h100", "GPU h100, now cpu"),
        ("2x8", "cpu", "the plan is for 2x8 cpu (16 devices), the devices are 1x8 cpu (8 devices)"),
    ],
)
def test_plan_for_other_devices_ends_with_4_before_anything_is_compiled(
    runs: Runs, control: Run, mesh: str, gpu: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = foreign(control, mesh, gpu)
    run = runs.new(run={"plan": str(save_plan(plan, tmp_path / "foreign.json"))})
    assert run.here() == 4
    message = capsys.readouterr().err
    assert expected in message
    assert "python -m galvatron_jax.search --mesh 1x8 --gpu cpu" in message
    assert ("--allow-mismatch" in message) == (plan.cluster.devices == 8)
    assert not run.folder.exists() or not list(run.folder.glob("checkpoints"))


def foreign(control: Run, mesh: str, gpu: str) -> Plan:
    plan = load_plan(control.folder / "plan.json")
    nodes, gpus = map(int, mesh.split("x"))
    cluster = msgspec.structs.replace(plan.cluster, nodes=nodes, gpus_per_node=gpus, gpu=gpu)
    strategy = Strategy(dp=nodes * gpus)
    stage = Stage(
        devices=nodes * gpus,
        runs=tuple(msgspec.structs.replace(run, strategy=strategy) for run in merged(plan.stages[0].runs)),
    )
    return msgspec.structs.replace(plan, cluster=cluster, stages=(stage,), predicted=None, certificate=None)


def test_mesh_given_at_resume_plans_again_and_says_what_changed(
    runs: Runs, control: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(control, runs.new(run={"plan": str(save_plan(foreign(control, "2x8", "cpu"), tmp_path / "p.json"))}))
    assert run.here("--mesh", "1x8") == 0
    assert "is for 2x8 cpu (16 devices), this is 1x8 cpu (8 devices): planning again" in capsys.readouterr().out
    run = copied(control, runs.new("other"), keep=4)
    assert run.here("--mesh", "2x4") == 0
    out = capsys.readouterr().out
    assert "the run's plan was for mesh 1x8, now 2x4: planning again" in out
    assert "resumed from step 4" in out
    assert load_plan(run.folder / "plan.json").cluster.mesh == "2x4"
    np.testing.assert_allclose(list(run.losses.values()), list(control.losses.values()), rtol=LOSS_RTOL)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_version": 99}', b"\x80\x04K\x05.", b"[" * 100_000])
def test_damaged_plan_ends_with_2(
    runs: Runs, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    run = runs.new(run={"plan": str(tmp_path / "plan.json")})
    assert run.here() == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "plan.json") in message
    assert "Traceback" not in message


def test_plan_that_contradicts_itself_ends_with_2_and_all_violations(
    runs: Runs, control: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = other_plan(load_plan(control.folder / "plan.json"), *[Strategy(tp=3, dp=2)] * 3)
    (tmp_path / "plan.json").write_text(encode(msgspec.structs.replace(plan, microbatches=5)))
    assert runs.new(run={"plan": str(tmp_path / "plan.json")}).here() == 2
    message = capsys.readouterr().err
    assert "microbatches=5 does not divide global_batch=16" in message
    assert message.count("tp=3 * dp=2 is not 8 devices") == 4  # of each run of layers
    assert "Traceback" not in message


# ------------------------------------------------------------------------------------------------------ another run
@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "seed", 7, "model.seed: 0 so far, 7 now"),
        ("model", "changes", {"layers": 3, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 2}, "model.changes: "),
        ("data", "seed", 1, "data.seed: 0 so far, 1 now"),
        ("data", "global_batch", 32, "data.global_batch: 16 so far, 32 now"),
        ("optimizer", "name", "sgd", "optimizer.name: 'adamw' so far, 'sgd' now"),
        ("optimizer", "learning_rate", 1e-3, "optimizer.learning_rate: 0.003 so far, 0.001 now"),
    ],
)
def test_resume_of_another_run_ends_with_2_and_names_the_field(
    runs: Runs, control: Run, section: str, key: str, value: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(control, runs.new("run", **{section: {key: value}}))
    assert run.here() == 2
    message = capsys.readouterr().err
    assert said in message
    assert ("--override-config" in message) == (key == "learning_rate")


def test_override_config_lets_a_run_go_on_longer(runs: Runs, control: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(control, runs.new(run={"steps": STEPS + 3}))
    assert run.here() == 2
    assert run.here("--override-config") == 0
    assert f"changed: run.steps: {STEPS} so far, {STEPS + 3} now" in capsys.readouterr().out
    assert len(run.losses) == STEPS + 3


def test_resume_with_other_data_ends_with_2(runs: Runs, control: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The same path, another content."""
    text = runs.root / "text.txt"
    text.write_text("first text, " * 2000)
    run = runs.new(data={"paths": [str(text)]}, run={"steps": 4})
    assert run.here() == 0
    text.write_text("other text, " * 2000)
    assert run.here() == 2
    assert "the data changed" in capsys.readouterr().err


def test_end_of_the_data_is_a_clean_stop_with_a_last_checkpoint(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.root / "text.txt").write_text("a short text " * 250)
    run = runs.new(data={"paths": [str(runs.root / "text.txt")], "epochs": 1, "held_out": 0.0}, run={"steps": 100})
    assert run.here() == 0
    batches = (250 * 13) // 32 // 16
    assert f"data ended: step {batches}" in capsys.readouterr().out
    assert run.checkpoints[-1] == f"step_{batches:08d}"


def test_token_outside_the_vocabulary_ends_with_2(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.random.default_rng(0).integers(0, 200, 20_000).astype("<u2")
    tokens[7000] = 256
    tokens.tofile(tmp_path / "tokens.bin")
    run = runs.new(data={"kind": "tokens", "paths": [str(tmp_path / "tokens.bin")]}, run={"steps": 60})
    assert run.here() == 2
    message = capsys.readouterr().err
    assert "got token id 256; expected 0 to 255" in message
    assert f"{tmp_path / 'tokens.bin'} tokens" in message
