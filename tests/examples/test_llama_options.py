"""The command line of the Llama example, and what it prints about a plan."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.llama.options import PATIENCE, device_environment, parse_options
from examples.llama.report import StepLog, describe_plan
from examples.llama.train import main
from galvatron_jax._document import save
from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import DocumentNotFoundError, PlanError
from galvatron_jax.models import llama_config, model_names
from galvatron_jax.plan import (
    ModelReference,
    Plan,
    PlanRun,
    Prediction,
    Stage,
    StagePrediction,
    Strategy,
)

COUNT = "--xla_force_host_platform_device_count"


def two_stage_plan() -> Plan:
    model = ModelReference(
        name="llama-tiny", structure="0", dtype="float32", seq=64, layer_count=6, parameter_count=853_120
    )
    first = (
        PlanRun(kind="embed", count=1, strategy=Strategy(dp=2, zero=3)),
        PlanRun(kind="layers.*", count=2, strategy=Strategy(tp=2, sp=True)),
    )
    second = (
        PlanRun(kind="layers.*", count=2, strategy=Strategy(dp=2, remat="full")),
        PlanRun(kind="head", count=1, strategy=Strategy(tp=2)),
    )
    stage = StagePrediction(forward_s=0.1, backward_s=0.2, step_end_s=0.0, peak_bytes=3 * 2**29, memory={})
    predicted = Prediction(step_time_s=1.5, tokens_per_s=1.0, mfu=0.1, times={}, stages=(stage, stage))
    return Plan(
        model=model,
        cluster=Cluster(nodes=1, gpus_per_node=4, gpu="cpu"),
        global_batch=16,
        microbatches=2,
        stages=(Stage(devices=2, runs=first), Stage(devices=2, runs=second)),
        predicted=predicted,
    )


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    return save(two_stage_plan(), tmp_path / "plan.json")


def test_options_default_to_the_tiny_model() -> None:
    options = parse_options([])
    assert (options.model, options.config) == ("llama-tiny", llama_config("llama-tiny"))
    assert (options.steps, options.global_batch, options.seq, options.seed) == (60, 32, 128, 0)
    assert (options.plan, options.text, options.devices) == (None, None, None)


def test_options_of_a_plan_are_what_it_was_made_for(plan_path: Path) -> None:
    options = parse_options(["--plan", str(plan_path)])
    assert options.plan == two_stage_plan()
    assert (options.model, options.global_batch, options.seq) == ("llama-tiny", 16, 64)


@pytest.mark.parametrize(("flag", "number"), [("--global-batch", 32), ("--seq", 128)])
def test_options_against_the_plan_are_refused(plan_path: Path, flag: str, number: int) -> None:
    with pytest.raises(PlanError, match=f"{flag}: got {number}, the plan is for"):
        parse_options(["--plan", str(plan_path), flag, str(number)])


def test_options_learning_rate_depends_on_model_size() -> None:
    small, large = (parse_options(["--model", name]).learning_rate for name in ("llama-tiny", "llama-100m"))
    assert small > large
    assert parse_options(["--lr", "0.5"]).learning_rate == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "1.5"],
        ["--seed", "-1"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--devices", "x"],
        ["--no"],
    ],
)
def test_options_out_of_range_end_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", model_names())
def test_options_know_every_preset(name: str) -> None:
    assert parse_options(["--model", name]).config == llama_config(name)


def test_options_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentNotFoundError, match="nothing.json"):
        parse_options(["--plan", str(tmp_path / "nothing.json")])


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, {"XLA_FLAGS": f"{COUNT}=8 {PATIENCE}"}),
        ([], {"XLA_FLAGS": f"--xla_dump_to=d {COUNT}=2"}, {}),
        (["--devices", "4"], {}, {"XLA_FLAGS": f"{COUNT}=4 {PATIENCE}", "JAX_PLATFORMS": "cpu"}),
        (
            ["--devices", "4"],
            {"XLA_FLAGS": f"--xla_dump_to=d {COUNT}=2"},
            {"XLA_FLAGS": f"--xla_dump_to=d {COUNT}=4 {PATIENCE}", "JAX_PLATFORMS": "cpu"},
        ),
    ],
)
def test_device_environment_keeps_other_flags(
    arguments: list[str], environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert device_environment(parse_options(arguments), environment) == expected


def test_device_environment_without_a_number_takes_the_plans(plan_path: Path) -> None:
    assert device_environment(parse_options(["--plan", str(plan_path)]), {}) == {"XLA_FLAGS": f"{COUNT}=4 {PATIENCE}"}


def test_options_are_read_without_importing_jax() -> None:
    code = (
        "import sys, examples.llama.train as t; from examples.llama.options import parse_options; parse_options([]);"
        "print('jax' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "False"


def test_main_bad_input_prints_one_line_and_returns_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "llama-tiney"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: .*'llama-tiney'.*did you mean 'llama-tiny'\?\n", output.err)


def test_describe_plan_shows_runs_of_layers_and_prediction() -> None:
    assert describe_plan(two_stage_plan()).splitlines() == [
        "plan       4 devices (1x4), 2 stages, batch 16 in 2 microbatches",
        "  stage 0, 2 devices",
        "    1 x embed        dp2 zero3",
        "    2 x layers.*     tp2+sp",
        "  stage 1, 2 devices",
        "    2 x layers.*     dp2 remat",
        "    1 x head         tp2",
        "predicted  1.50 s per step, peak 1.5 GiB per device",
    ]


def test_step_log_without_a_second_step_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog(two_stage_plan(), tokens_per_step=100)
    log.record(1, 5.5)
    assert math.isnan(log.median_step_time_s)
    assert "not measured" in log.summary()
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "5.5000", "-", "-", "1.50", "s"]


def test_step_log_speed_is_the_mean_since_the_last_line() -> None:
    ticks = iter([0.0, 10.0, 10.0, 14.0, 14.0])
    log = StepLog(two_stage_plan(), tokens_per_step=100, clock=lambda: next(ticks))
    log.record(1, 5.5)
    log.record(9, 5.0)
    assert log.median_step_time_s == 0.5
    assert log.summary() == "speed      500.0 ms per step measured, 1.50 s predicted; 200 tokens/s"
