"""The parts of a plan's price add up to the price, the trace plays the schedule, the command says both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from galvatron_jax._document import load
from galvatron_jax._text import plain
from galvatron_jax.check import stage_prices, trace_events
from galvatron_jax.check._cli import main
from galvatron_jax.check._report import breakdown_lines
from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.hardware import load_hardware
from galvatron_jax.measured import Provenance
from galvatron_jax.models import load_model_profile
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference, save_plan
from galvatron_jax.record import RunRecord

MODEL, HARDWARE = load_model_profile("llama-tiny"), load_hardware("cpu")
ROOT = Path(__file__).parents[2]


def plan_of(*strategies: Strategy, batch: int = 16, microbatches: int = 2, devices: int = 4) -> Plan:
    """One stage for each strategy, layers as even as they come."""
    order = [run.kind for run in MODEL.layers for _ in range(run.count)]
    each = len(order) // len(strategies)
    stages = []
    for s, strategy in enumerate(strategies):
        part = order[s * each : (s + 1) * each if s + 1 < len(strategies) else None]
        runs = [PlanRun(kind=kind, count=part.count(kind), strategy=strategy) for kind in dict.fromkeys(part)]
        stages.append(Stage(devices=devices // len(strategies), runs=tuple(runs)))
    return Plan(
        model=model_reference(MODEL),
        cluster=Cluster(nodes=1, gpus_per_node=devices, gpu="cpu"),
        global_batch=batch,
        microbatches=microbatches,
        stages=tuple(stages),
    )


ONE = plan_of(Strategy(dp=2, tp=2, zero=3, remat="full"))
TWO = plan_of(Strategy(dp=2), Strategy(tp=2), microbatches=4)


def test_runs_of_a_stage_add_up_to_the_step() -> None:
    prices = stage_prices(ONE, MODEL, HARDWARE)[0]
    total = estimate_plan(ONE, MODEL, HARDWARE)
    assert sum(price.step_s for price in prices) == pytest.approx(total.step_time_s)
    for price in prices:
        assert sum(price.causes_s.values()) == pytest.approx(price.step_s)
        assert not price.measured
    assert [(price.first, price.count) for price in prices] == [(0, 1), (1, 4), (5, 1)]


def test_trace_plays_every_action_once_and_ends_with_the_step() -> None:
    events = trace_events(TWO, MODEL, HARDWARE)["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    total_us = estimate_plan(TWO, MODEL, HARDWARE).step_time_s * 1e6
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(total_us)
    for s in range(2):
        own = sorted((span for span in spans if span["pid"] == s), key=lambda span: span["ts"])
        assert sorted(span["args"]["microbatch"] for span in own if span["cat"] == "forward") == [0, 1, 2, 3]
        assert sorted(span["args"]["microbatch"] for span in own if span["cat"] == "backward") == [0, 1, 2, 3]
        ends = [span["ts"] + span["dur"] for span in own]
        assert all(span["ts"] >= end - 1e-6 for span, end in zip(own[1:], ends, strict=False))
    assert {event["pid"] for event in events if event["ph"] == "C"} == {0, 1}


@pytest.mark.parametrize("plan", [ONE, TWO], ids=["one stage", "two stages"])
def test_report_names_every_run_and_where_its_figures_come_from(plan: Plan) -> None:
    total = estimate_plan(plan, MODEL, HARDWARE)
    text = plain(breakdown_lines(plan, MODEL, HARDWARE, stage_prices(plan, MODEL, HARDWARE), total))
    assert text.count("estimated") >= 3
    for stage in plan.stages:
        for run in stage.runs:
            assert run.kind in text
            assert str(run.strategy) in text


def test_report_says_that_its_figures_are_stale() -> None:
    old = Provenance(device="cpu", device_kind="cpu", jax_version="0.4.1", date="2024-01-01")
    stale = msgspec.structs.replace(HARDWARE, provenance=old, measured=True)
    total = estimate_plan(ONE, MODEL, stale)
    text = plain(breakdown_lines(ONE, MODEL, stale, stage_prices(ONE, MODEL, stale), total))
    assert "stale: measured 2024-01-01 with jax 0.4.1" in text


def test_command_prints_one_json_object_and_writes_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, trace = save_plan(TWO, tmp_path / "plan.json"), tmp_path / "trace.json"
    assert main([str(path), "--json", "--trace", str(trace)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["predicted"]["step_time_s"] == estimate_plan(TWO, MODEL, HARDWARE).step_time_s
    assert [run["stage"] for run in data["runs"]] == [0, 0, 1, 1]
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "missing.json"),
        (["PLAN", "--hardware", "h1000"], "with --hardware"),
        (["FOREIGN"], "with --profile or --model"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = msgspec.structs.replace(ONE, model=msgspec.structs.replace(ONE.model, name="my-own"))
    paths = {name: str(save_plan(p, tmp_path / f"{name}.json")) for name, p in (("PLAN", ONE), ("FOREIGN", foreign))}
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_plan_for_another_number_of_devices_ends_with_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_plan(ONE, tmp_path / "plan.json")
    assert main([str(path), "--measure", "--steps", "1"]) == 4
    assert "4 devices" in capsys.readouterr().err


@pytest.mark.multidevice
def test_measured_step_stands_beside_the_prediction_and_in_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(Strategy(dp=4, tp=2, zero=1), batch=4, microbatches=1, devices=8)
    path, record = save_plan(plan, tmp_path / "plan.json"), tmp_path / "record.json"
    assert main([str(path), "--measure", "--steps", "2", "--record", str(record)]) == 0
    shown = capsys.readouterr().out
    assert "predicted  measured" in shown
    kept = load(record, RunRecord)
    assert len(kept.step_times_s) == 2
    assert kept.plan.predicted is not None
    assert msgspec.structs.replace(kept.plan, predicted=None) == plan
    assert kept.provenance.device == "cpu"


def test_estimating_imports_no_jax(tmp_path: Path) -> None:
    path = save_plan(ONE, tmp_path / "plan.json")
    code = "import sys; from galvatron_jax.check._cli import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=60).returncode == 0


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "galvatron_jax.cost", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert shown.returncode == 0
    assert "--measure" in shown.stdout
