"""Plans of several stages, compiled stage by stage for H100s that are not there."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax.verify import Verification, verify_plan
from galvatron_jax.verify._report import as_data, report_lines
from tests.runtime.pipeline.planned import Case, plan_of

STATE = ("parameters", "optimizer", "residuals")
"""Categories that are sums of whole arrays: between programs nothing is left to the compiler."""


def verified(case: Case, function: str) -> Verification:
    plan = plan_of(case)
    plan = msgspec.structs.replace(plan, cluster=msgspec.structs.replace(plan.cluster, gpu="h100"))
    return verify_plan(plan, model=f"tests.verify.user_model:{function}")


@pytest.fixture(scope="module")
def uneven(gpu_compiler: None) -> Verification:
    """Four layers and two, strategies of their own, four microbatches."""
    return verified(Case("d.3 d.3 d.3 d.3 | t2 t2.1"), "piped_llama")


def test_state_and_residuals_between_programs_are_those_of_the_estimate(uneven: Verification) -> None:
    for check in uneven.stages:
        held, estimate = check.compiled.memory.categories, check.estimate.memory
        for name in STATE:
            assert held[name] == pytest.approx(estimate[name], rel=0.02), name
    first, second = (check.compiled.memory.categories["gradients"] for check in uneven.stages)
    # Inside the backward programs: a stack beside the sums (the loop of zero 3), what layers leave to be added to them.
    assert first < uneven.stages[0].estimate.memory["gradients"] < 2 * first
    assert second < uneven.stages[1].estimate.memory["gradients"] < 1.5 * second


def test_every_stage_has_its_own_programs_as_often_as_a_step_runs_them(uneven: Verification) -> None:
    for check in uneven.stages:
        times = {call.name: call.times for call in check.compiled.calls}
        assert times == {"forward": 4, "backward": 4, "gradients": 1, "exports 0": 1, "update": 1}


def test_stage_moves_the_bytes_that_its_layers_were_predicted_to_move(uneven: Verification) -> None:
    """Zero 3 on the first stage: gathers; tensor parallelism on the second: reductions."""
    first, second = uneven.stages
    gathers = {(row.kind, row.group_size): row for row in first.collectives}["all-gather", 4]
    assert gathers.compiled_bytes == gathers.predicted_bytes > 0
    assert {share.layer_kind for share in gathers.shares} == {"embed", "layers.*"}
    sums = {(row.kind, row.group_size): row for row in second.collectives}["all-reduce", 2]
    assert sums.compiled_bytes == pytest.approx(sums.predicted_bytes, rel=0.01)


def test_json_and_report_have_every_stage(uneven: Verification) -> None:
    data = as_data(uneven)
    assert data["fits"] is True
    assert [stage["stage"] for stage in data["stages"]] == [0, 1]
    for stage in data["stages"]:
        assert sum(stage["categories"]["estimated"].values()) == stage["estimated_peak_bytes"]
        assert sum(stage["categories"]["compiled"].values()) == stage["compiled_peak_bytes"]
        assert stage["fullest"]["program"] in {program["name"] for program in stage["programs"]}
    report = "\n".join(report_lines(uneven, "plan.json"))
    assert "stage 1 · device slice 1" in report
    assert report.rstrip().endswith("verdict   fits")


@pytest.mark.slow
def test_equal_stages_are_compiled_once_and_tied_embeddings_meet(gpu_compiler: None) -> None:
    """Interleaved, four stages on two slices: the middle ones are equal, the last one mirrors the first one's table."""
    found = verified(Case("d.1 d.1 | d.1 | d.1 | d.1 d.1", 4, "interleaved-1f1b", 2, "llama, tied"), "tied_llama")
    assert len(found.stages) == 4
    assert found.compiled.programs < 20
    middle = [[call.program.hlo_text for call in stage.compiled.calls] for stage in found.stages[1:3]]
    assert middle[0][:2] == middle[1][:2]  # forward and backward
    shared = [check.compiled.memory for check in found.stages]
    assert (shared[0], shared[1]) == (shared[2], shared[3])  # one slice, one peak


@pytest.mark.slow
def test_encoder_and_decoder_on_different_stages(gpu_compiler: None) -> None:
    """The encoder's output crosses with the stream, and its cotangent comes back."""
    case = Case("d d d d | d d d", 2, "gpipe", 1, "t5")
    found = verified(case, "encoder_decoder")
    assert found.fits
    assert all(check.compiled.memory.peak > 0 for check in found.stages)
