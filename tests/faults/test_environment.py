"""Cases 10, 22, 24, 25: out of memory, standing still, processes that do not agree, compilation that surprises."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import pytest

from galvatron_jax import auto_shard
from galvatron_jax.errors import PreflightError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.plan import Strategy, load_plan, save_plan
from galvatron_jax.train import load_config
from galvatron_jax.train._build import build_subject
from galvatron_jax.train._compiles import watch_compiles
from galvatron_jax.train._next_plan import Limits, offer_plan, simpler_than
from galvatron_jax.train._preflight import check_preflight, gather_facts
from galvatron_jax.train._ranks import OneRank
from galvatron_jax.train._stragglers import WINDOWS, RankStatistics, StragglerWatch, gpu_condition, slowest_gpu
from galvatron_jax.train._watchdog import Watchdog
from tests.faults.conftest import Run, Runs
from tests.faults.test_resume import PLANS, other_plan

pytestmark = pytest.mark.multidevice


# ------------------------------------------------------------------------------------------------------- out of memory
def test_out_of_memory_ends_with_4_predicted_beside_actual_and_offers_the_next_plan(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.new()
    assert run.here(faults=[{"kind": "out_of_memory", "point": "before_step", "step": 1}]) == 4
    message = capsys.readouterr().err
    assert "a device ran out of memory in step 1: Out of memory while trying to allocate 17179869184 bytes." in message
    assert re.search(r"predicted \S+ [KMG]iB \(.*parameters", message)
    assert f"the next plan is in {run.folder / 'next-plan.json'} (predicted" in message
    assert "--retry-oom" in message
    learnt, offered = load_hardware(run.folder / "hardware.json"), load_plan(run.folder / "next-plan.json")
    assert offered.memory_budget_bytes == learnt.memory_bytes - learnt.reserved_bytes


def test_retry_after_out_of_memory_plans_again_with_more_memory_held_back(
    runs: Runs, control: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.new()
    # The fault comes at step 9 of the second plan too.
    assert run.here("--retry-oom", "1", faults=[{"kind": "out_of_memory", "step": 9}]) == 4
    assert "going on under another plan" in caplog.text
    usual, learnt = load_hardware("cpu"), load_hardware(run.folder / "hardware.json")
    assert learnt.reserved_bytes - usual.reserved_bytes == 2 * round(0.08 * usual.memory_bytes)
    assert run.here() == 0  # goes on from the last checkpoint, under what was learnt
    assert load_plan(run.folder / "plan.json").memory_budget_bytes == learnt.memory_bytes - learnt.reserved_bytes
    assert run.losses.keys() == control.losses.keys()


def test_nothing_is_offered_when_nothing_else_fits(runs: Runs, control: Run) -> None:
    config = load_config(control.file)
    subject, tokens = build_subject(config.model), jnp.zeros((config.data.global_batch, config.data.seq), jnp.int32)
    sharded = auto_shard(subject.build, loss=subject.loss, plan=load_plan(control.folder / "plan.json"))
    sharded.prepare({"inputs": tokens, "targets": tokens})
    small = msgspec.structs.replace(load_hardware("cpu"), memory_bytes=2**10, reserved_bytes=0)
    plan, told = offer_plan(sharded, small, Limits(), runs.root)
    assert plan is None
    assert told.startswith("no other plan can be offered: ")
    assert not (runs.root / "next-plan.json").exists()


@pytest.mark.parametrize(("tp", "stages", "limits"), [(1, 1, None), (4, 1, Limits(1, 2)), (4, 2, Limits(1, None))])
def test_simpler_plan_is_one_without_pipeline_or_with_less_tensor_parallelism(
    control: Run, tp: int, stages: int, limits: Limits | None
) -> None:
    strategy = Strategy(tp=tp, dp=8 // tp // stages)
    plan = other_plan(load_plan(control.folder / "plan.json"), strategy, strategy, strategy, stages=stages)
    assert simpler_than(plan) == limits


# ---------------------------------------------------------------------------------------------------------- stall
def test_process_that_stands_still_tells_where_and_ends_with_4(runs: Runs) -> None:
    run = runs.new(policy={"stall_s": 2.0})
    ended = run.apart(faults=[{"kind": "stall", "step": 9, "seconds": 600}])
    assert ended.returncode == 4, ended.stderr
    assert "in step 9 (rank 0); last reports: rank 0: step 9" in ended.stderr
    assert "_faults.py" in ended.stderr  # the frame that sleeps
    assert "stacks of all threads" in (run.folder / "stacks-rank0.txt").read_text()


def test_watchdog_dumps_at_the_limit_and_ends_at_twice_the_limit(tmp_path: Path) -> None:
    ended: list[tuple[int, float]] = []
    start = time.monotonic()
    dog = Watchdog(OneRank(), dump=tmp_path / "d" / "stacks.txt", end=lambda c: ended.append((c, time.monotonic())))
    dog.beat("compile", 60.0)
    dog.beat("step 1", 0.3)
    while not ended:
        assert time.monotonic() - start < 30
        time.sleep(0.05)
    assert ended[0][0] == 4
    assert ended[0][1] - start > 0.6
    assert "no progress" in (tmp_path / "d" / "stacks.txt").read_text()
    dog.close()


def test_watchdog_is_quiet_while_there_is_progress(tmp_path: Path) -> None:
    ended: list[int] = []
    dog = Watchdog(OneRank(), dump=tmp_path / "stacks.txt", end=ended.append)
    for step in range(10):
        dog.beat(f"step {step}", 1.0)
        time.sleep(0.02)
    dog.close()
    assert not ended
    assert not (tmp_path / "stacks.txt").exists()


# ----------------------------------------------------------------------------------------------------------- preflight
class TalkingRanks(OneRank):
    """Rank 0 among others whose words are known."""

    def __init__(self, *others: str | None) -> None:
        self.count = 1 + len(others)
        self._others = others

    def exchange(self, topic: str, text: str = "", *, timeout_s: float = 0.0) -> tuple[str | None, ...]:
        return (text, *self._others)


def test_preflight_lets_equal_processes_pass() -> None:
    facts = gather_facts(config="c", plan="p")
    other = {**facts, "host": "elsewhere", "process": "1"}
    check_preflight(TalkingRanks(msgspec.json.encode(other).decode()), facts)


@pytest.mark.parametrize("name", ["plan", "settings", "jax", "device kind", "galvatron_jax", "local devices"])
def test_preflight_names_the_first_difference_of_a_rank(name: str) -> None:
    facts = gather_facts(config="c", plan="p")
    other = {**facts, "host": "node7", name: "other"}
    with pytest.raises(PreflightError) as error:
        check_preflight(TalkingRanks(msgspec.json.encode(facts).decode(), msgspec.json.encode(other).decode()), facts)
    assert error.value.exit_code == 4
    assert f"rank 2 on node7: {name} is other, on rank 0 {facts[name]}" in error.value.message


def test_preflight_warns_of_clocks_that_are_apart(caplog: pytest.LogCaptureFixture) -> None:
    facts = gather_facts(config="c", plan="p")
    other = {**facts, "host": "node3", "time": str(float(facts["time"]) - 3600)}
    check_preflight(TalkingRanks(msgspec.json.encode(other).decode()), facts)
    assert "clocks are 3600 s apart; node3 is furthest behind" in caplog.text


def test_preflight_names_absent_ranks() -> None:
    with pytest.raises(PreflightError, match="ranks 1, 3 of 4 did not report within 60 s"):
        check_preflight(TalkingRanks(None, "{}", None), {"jax": "1"})


# ---------------------------------------------------------------------------------------------------------- stragglers
def statistics_of(own_s: float, clock: int = 0) -> RankStatistics:
    return RankStatistics(host="h", own_s=own_s, step_s=0.1, clock_mhz=clock, condition="")


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([statistics_of(0.01), statistics_of(0.01), statistics_of(0.04)], [2]),
        ([statistics_of(0.01), statistics_of(0.02), statistics_of(0.01)], []),  # 10 % of a step
        ([statistics_of(0.01, 1900), statistics_of(0.01, 1900), statistics_of(0.01, 1200)], [2]),
        ([statistics_of(0.01, 1900), statistics_of(0.01, 0), statistics_of(0.01, 1850)], []),
    ],
)
def test_rank_that_is_slow_again_and_again_is_named(
    ranks: list[RankStatistics], named: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    watch = StragglerWatch(OneRank(), "h", 0.2)
    with caplog.at_level(logging.WARNING):
        for _ in range(WINDOWS - 1):
            assert watch.compare(ranks) == []
        assert watch.compare(ranks) == named
    assert ("rank 2 on h is slow" in caplog.text) == bool(named)


class Nvml:
    """What NVML says on a machine of two GPUs, the second one hot; ECC is not counted there."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetClockInfo = staticmethod(lambda handle, _: (1980, 1200)[handle])
    nvmlDeviceGetTemperature = staticmethod(lambda handle, _: (60, 91)[handle])
    nvmlDeviceGetCurrentClocksThrottleReasons = staticmethod(lambda handle: (0x1, 0x44)[handle])


def test_condition_of_the_slowest_gpu_is_told_in_words() -> None:
    assert slowest_gpu(Nvml) == (1200, "1: 1200 MHz, 91 °C, slowed by power cap, heat (hardware)")
    counting = type("Counting", (Nvml,), {"NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1, "NVML_VOLATILE_ECC": 0})
    counting.nvmlDeviceGetTotalEccErrors = staticmethod(lambda *_: 3)  # type: ignore[attr-defined]
    assert slowest_gpu(counting)[1].endswith("heat (hardware), 3 memory errors (ECC)")


def test_machine_without_nvml_has_no_condition() -> None:
    assert gpu_condition() == (0, "")


# ------------------------------------------------------------------------------------------------------- compilation
def test_program_compiled_again_in_a_step_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3)).block_until_ready()
    with watch_compiles() as watch:
        watch.settle()
        double(jnp.ones(3)).block_until_ready()
        watch.check(7, "(3,)")
        assert not caplog.text
        double(jnp.ones(4)).block_until_ready()
        watch.check(8, "(4,)")
    assert "step 8 compiled" in caplog.text
    assert "batch (4,)" in caplog.text


def test_plan_that_xla_cannot_run_ends_with_4_and_a_simpler_one_is_taken_on_request(
    runs: Runs, control: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, (strategies, shape) = runs.new(), PLANS["two stages"]
    plan = save_plan(other_plan(load_plan(control.folder / "plan.json"), *strategies, **shape), runs.root / "plan.json")
    # The fault comes at step 7 of the second plan too, when the loss of step 5 has been read.
    assert run.here("--plan", str(plan), "--retry-failed", "1", faults=[{"kind": "xla_failure", "step": 7}]) == 4
    assert "XLA failed: INTERNAL" in caplog.text
    assert f"the next plan is in {run.folder / 'next-plan.json'}" in caplog.text
    assert "going on under another plan" in caplog.text
    assert "XLA failed: INTERNAL" in capsys.readouterr().err
    assert len(load_plan(run.folder / "plan.json").stages) == 1
    assert list(run.losses) == [1, 2, 3, 4, 5]  # the last one under the simpler plan


@pytest.mark.slow
def test_damaged_compile_cache_costs_time_only(runs: Runs, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = runs.new("first", run={"compile_cache": str(cache), "steps": 2})
    ended = first.apart()
    assert ended.returncode == 0, ended.stderr
    entries = [path for path in cache.rglob("*") if path.is_file() and path.name.endswith("-cache")]
    assert entries
    for path in entries:
        path.write_bytes(b"damaged")
    second = runs.new("second", run={"compile_cache": str(cache), "steps": 2})
    ended = second.apart()
    assert ended.returncode == 0, ended.stderr
    assert second.trace == first.trace
