"""The run meter with a clock that tests turn, and calibration against runs whose causes are known."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from galvatron_jax._document import decode, encode, load, save
from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.errors import DocumentError, GalvatronError
from galvatron_jax.measured import Provenance
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import HardwareProfile
from galvatron_jax.profilers._calibrate import calibrate, scale_profiles
from galvatron_jax.profilers._cli import main
from galvatron_jax.profilers._runtime import RunMeter
from galvatron_jax.record import DeviceMemory, RunRecord
from tests.support.toy_models import llama_like_profile, toy_hardware

from .fakes import FakeClock

MODEL = llama_like_profile(layers=4, embed=256, heads=8, head_dim=32, mlp=512, vocab=512, seq=128, dtype="float32")
HARDWARE = toy_hardware(fused_attention=False)
HERE = Provenance(device="toy", device_kind="Toy", jax_version="0.10.2", date="2026-11-24")
STRATEGIES = (
    Strategy(dp=4), Strategy(dp=4, zero=3), Strategy(tp=2, dp=2), Strategy(tp=4), Strategy(tp=2, dp=2, zero=2),
)  # fmt: skip


def plan_of(strategy: Strategy, batch: int = 8) -> Plan:
    runs = tuple(PlanRun(kind=run.kind, count=run.count, strategy=strategy) for run in MODEL.layers)
    plan = Plan(
        model=model_reference(MODEL),
        cluster=Cluster(nodes=2, gpus_per_node=2, gpu="toy"),
        global_batch=batch,
        stages=(Stage(devices=4, runs=runs),),
    )
    return msgspec.structs.replace(plan, predicted=estimate_plan(plan, MODEL, HARDWARE))


def run_of(plan: Plan, seconds: float, **fields: object) -> RunRecord:
    times = fields.pop("step_times_s", (seconds, seconds, seconds))
    return RunRecord(plan=plan, provenance=HERE, step_times_s=times, mfu=0.0, **fields)  # type: ignore[arg-type]


def runs_with(factors: tuple[float, float, float], noise: float = 0.0) -> list[RunRecord]:
    """Runs on hardware whose components are slower by ``factors`` than HARDWARE says."""
    model, truth = scale_profiles(MODEL, HARDWARE, factors)
    random = np.random.default_rng(0)
    plans = [plan_of(s, batch) for s, batch in itertools.product(STRATEGIES, (8, 16))]
    return [
        run_of(p, estimate_plan(p, model, truth).step_time_s * float(np.exp(noise * random.normal()))) for p in plans
    ]


# ------------------------------------------------------------------------------------------------------------- meter
def test_meter_waits_once_in_each_window_and_drops_the_warm_up() -> None:
    clock = FakeClock()
    meter = RunMeter(warm_up=2, window=3, clock=clock)
    for seconds in (60.0, 5.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 9.0):
        clock.time_s += seconds
        meter.step(jnp.zeros(()))
    assert meter.step_times_s == (1.0, 2.0)


def test_record_holds_prediction_beside_the_median() -> None:
    clock, plan = FakeClock(), plan_of(Strategy(dp=4))
    meter = RunMeter(clock=clock, warm_up=1)
    for seconds in (50.0, 2.0, 2.0, 30.0, 2.1, 1.9):
        clock.time_s += seconds
        meter.step(jnp.zeros(()))
    record = meter.record(plan, HERE, model=MODEL, hardware=HARDWARE)
    assert plan.predicted is not None
    assert record.step_time_s == pytest.approx(2.0)
    assert record.time_error == pytest.approx(plan.predicted.step_time_s / 2.0 - 1)
    assert record.tokens_per_s == pytest.approx(plan.global_batch * MODEL.seq / 2.0)
    assert record.mfu == pytest.approx(plan.predicted.mfu * plan.predicted.step_time_s / 2.0)
    assert decode(encode(record), RunRecord, where="test") == record


def test_meter_without_measured_steps_says_how_many_it_needs() -> None:
    meter = RunMeter(warm_up=2, window=5, clock=FakeClock())
    meter.step(jnp.zeros(()))
    with pytest.raises(GalvatronError, match="at least 7"):
        meter.record(plan_of(Strategy(dp=4)), HERE)


# ------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.3, 1.0, 1.0), (1.0, 1.0, 1.5), (0.9, 1.0, 1.3)])
def test_calibration_finds_the_component_that_is_off(factors: tuple[float, float, float]) -> None:
    result = calibrate(runs_with(factors), MODEL, HARDWARE)
    assert tuple(result.factors.values()) == pytest.approx(factors, rel=0.05)
    assert all(fit.after_s == pytest.approx(fit.measured_s, rel=0.02) for fit in result.records)


def test_one_wild_record_moves_the_fit_little_and_is_named() -> None:
    records = runs_with((1.0, 1.0, 1.3), noise=0.01)
    wild = msgspec.structs.replace(records[3], step_times_s=(5 * records[3].step_time_s,))
    result = calibrate([*records[:3], wild, *records[4:]], MODEL, HARDWARE)
    assert result.factors["between nodes"] == pytest.approx(1.3, rel=0.1)
    assert [note for note in result.notes if note.startswith("outlier")]


def test_one_record_of_one_device_cannot_tell_components_apart_and_leaves_links_alone() -> None:
    plan = msgspec.structs.replace(plan_of(Strategy(dp=4)), cluster=Cluster(nodes=1, gpus_per_node=1, gpu="toy"))
    runs = tuple(PlanRun(kind=run.kind, count=run.count, strategy=Strategy()) for run in MODEL.layers)
    plan = msgspec.structs.replace(plan, stages=(Stage(devices=1, runs=runs),))
    result = calibrate([run_of(plan, 1.2 * estimate_plan(plan, MODEL, HARDWARE).step_time_s)], MODEL, HARDWARE)
    assert result.factors["compute"] == pytest.approx(1.2, rel=0.03)
    assert result.factors["between nodes"] == result.factors["inside a node"] == 1.0


@pytest.mark.parametrize(
    ("change", "note"),
    [({"step_times_s": (1.0, 2.0, 4.0)}, "spread"), ({"machine_load": 0.5}, "took 50%")],
)
def test_unsteady_or_loaded_record_is_left_out_by_name(change: dict[str, object], note: str) -> None:
    records = runs_with((1.0, 1.0, 1.0))
    result = calibrate([*records, run_of(records[0].plan, 9.0, **change)], MODEL, HARDWARE)
    assert len(result.records) == len(records)
    assert any(note in text for text in result.notes)


def test_record_of_another_device_is_refused() -> None:
    foreign = msgspec.structs.replace(runs_with((1, 1, 1))[0], provenance=msgspec.structs.replace(HERE, device="h100"))
    with pytest.raises(DocumentError, match="h100"):
        calibrate([foreign], MODEL, HARDWARE)


def test_absurd_correction_is_refused() -> None:
    with pytest.raises(DocumentError, match="by more than"):
        calibrate(runs_with((50.0, 50.0, 50.0)), MODEL, HARDWARE)


def test_memory_above_the_prediction_is_kept_free_from_now_on() -> None:
    record = runs_with((1.0, 1.0, 1.0))[0]
    assert record.plan.predicted is not None
    peak = max(stage.peak_bytes for stage in record.plan.predicted.stages)
    full = msgspec.structs.replace(record, memory=(DeviceMemory(device=0, peak_bytes=peak + 1000),))
    assert calibrate([full], MODEL, HARDWARE).hardware.reserved_bytes == HARDWARE.reserved_bytes + 1000


def test_calibrate_command_writes_the_corrected_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, record in enumerate(runs_with((1.3, 1.0, 1.0))):
        save(record, tmp_path / f"{number}.json")
    save(MODEL, tmp_path / "model.json")
    save(HARDWARE, tmp_path / "hardware.json")
    records = [str(path) for path in sorted(tmp_path.glob("[0-9].json"))]
    flags = ["--hardware", str(tmp_path / "hardware.json"), "--profile", str(tmp_path / "model.json")]
    assert main(["calibrate", *records, *flags, "--out-hardware", str(tmp_path / "new.json")]) == 0
    assert re.search(r"seconds of compute: x 1\.(29|30)", capsys.readouterr().out)
    corrected = load(tmp_path / "new.json", HardwareProfile)
    rate = HARDWARE.matmul_flops_per_s["float32"] / 1.3
    assert corrected.matmul_flops_per_s["float32"] == pytest.approx(rate, rel=0.02)
    assert f"{len(records)} run records" in corrected.sources["calibration"]
