"""A plan compiled for 4 H100 without a GPU, against what was predicted for it."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from galvatron_jax.errors import PlanError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.plan import Plan
from galvatron_jax.verify import Verification, verify_plan
from galvatron_jax.verify._report import as_data, report_lines
from galvatron_jax.verify._verification import attention_is_fused

BATCH_AND_COUNTERS = 2 * 2 * 128 * 4 + 2 * 4 * 128 * 4 + 2 * 4
"""Arguments besides the state, bytes on one device: two microbatches of int32 inputs, 8 samples over the 4 data ranks
of the embedding; of targets, over the 2 of the head; the step counters of program and optimizer."""

LEAST_NAMED = 0.75
"""Of the peak: measured 0.80 for this program (loops over layers and microbatches, the runtime's XLA options), 0.94
before layers were a loop, 0.998 without any loop: XLA's list leaves out part of what is alive inside loops."""


def test_arguments_are_exactly_the_estimated_state_and_the_batch(tiny_verification: Verification) -> None:
    (check,) = tiny_verification.stages
    state = check.estimate.memory["parameters"] + check.estimate.memory["optimizer"]
    assert check.compiled.memory.categories["arguments"] == state + BATCH_AND_COUNTERS


def test_weights_are_gathered_as_predicted(tiny_verification: Verification) -> None:
    """Zero 3 over all four: embedding and layers, forward and backward, twice (two microbatches)."""
    (row,) = [r for r in tiny_verification.stages[0].collectives if (r.kind, r.group_size) == ("all-gather", 4)]
    assert row.compiled_bytes == row.predicted_bytes
    assert any(share.layer_kind == "layers.*" for share in row.shares)


def test_small_plan_fits_and_nothing_was_rematerialised(tiny_verification: Verification) -> None:
    (check,) = tiny_verification.stages
    assert tiny_verification.fits
    assert (check.compiled.rematerialised, check.compiled.warnings, check.problems) == (0, (), ())
    memory = check.compiled.memory
    assert memory.allocated >= memory.peak > memory.categories["arguments"]


def test_attention_without_cudnn_is_estimated_without_a_fused_kernel_and_said_so(
    tiny_verification: Verification,
) -> None:
    assert load_hardware("h100").fused_attention
    assert not tiny_verification.stages[0].attention_is_fused
    assert any("compiled without a fused kernel" in line for line in report_lines(tiny_verification, "plan.json"))


def test_program_is_compiled_with_the_options_of_the_runtime_and_they_are_named(
    tiny_verification: Verification,
) -> None:
    options = tiny_verification.compiled.options
    assert options["xla_gpu_enable_pipelined_all_gather"] is True
    assert as_data(tiny_verification)["stages"][0]["xla_options"] == options
    report = "\n".join(report_lines(tiny_verification, "plan.json"))
    assert all(name in report for name in options)


def test_most_of_the_peak_is_named(tiny_verification: Verification) -> None:
    (check,) = tiny_verification.stages
    alive = sum(use.bytes for use in check.compiled.peak)
    assert LEAST_NAMED * check.compiled.memory.peak < alive <= check.compiled.memory.peak
    assert any(use.role == "parameters" for use in check.compiled.peak)


def test_json_has_the_promised_fields(tiny_verification: Verification) -> None:
    data = as_data(tiny_verification)
    assert data["fits"] is True
    (stage,) = data["stages"]
    assert stage["stage"] == 0
    assert stage["compiled_allocated_bytes"] >= stage["compiled_peak_bytes"] > 0
    assert sum(stage["categories"]["estimated"].values()) == stage["estimated_peak_bytes"]
    assert {"kind", "group_size", "compiled_count", "compiled_bytes", "predicted_bytes"} <= {*stage["collectives"][0]}


def test_budget_below_the_program_does_not_fit(tiny_verification: Verification) -> None:
    (check,) = tiny_verification.stages
    small = msgspec.structs.replace(tiny_verification.plan, memory_budget_bytes=check.compiled.memory.allocated - 1)
    assert small.memory_budget_bytes is not None
    checked = dataclasses.replace(check, budget_bytes=small.memory_budget_bytes)
    assert "more than the budget" in checked.problems[0]
    assert not dataclasses.replace(tiny_verification, plan=small, stages=(checked,)).fits


def test_plan_that_contradicts_itself_is_refused_before_compiling(tiny_plan: Plan) -> None:
    with pytest.raises(PlanError, match="does not divide global_batch"):
        verify_plan(msgspec.structs.replace(tiny_plan, microbatches=3))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("__cudnn$fmhaScaleBiasSoftmax", True),  # names as in programs for H100, jax 0.10.2
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", True),
        ("__cudnn$convForward", False),
        ("__cublas$gemm", False),
    ],
)
def test_of_cudnns_calls_only_those_of_attention_are_fused_attention(target: str, expected: bool) -> None:
    assert attention_is_fused(f'%call = custom-call(%a), custom_call_target="{target}"') is expected
