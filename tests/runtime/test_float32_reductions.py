"""Gradients are reduced over data-parallel ranks in float32 where that is asked for, in the compute dtype where not.

Read in the programs of a bfloat16 Llama as the partitioner leaves them: later XLA:CPU widens what is narrower. All
plans are data-parallel, so every sum of more than a scalar is one of gradients; those of the norms' scales and of the
embedding are float32 in any case.
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from galvatron_jax.runtime import StageCalls, StagePrograms, plan_model, stage_mesh
from galvatron_jax.runtime._planned_pipeline import plan_pipeline
from tests.runtime.pipeline.planned import BATCH, DEVICES, Case, analysis_of, optimizer_of, plan_of
from tests.support.partitioned import partitioned_collectives

pytestmark = pytest.mark.multidevice

ONE_STAGE = "d d.1 d.2/2 d.3/2 d.3 d.2"
PIPELINE = "d d.1/2 d.2/2 | d.3/2 d.3 u2.2"
SUMS = ("all-reduce", "reduce-scatter")


@pytest.mark.parametrize(
    ("stages", "microbatches", "in_float32"),
    [(ONE_STAGE, 2, True), (PIPELINE, 2, True), (PIPELINE, 1, True), (PIPELINE, 2, False)],
)
def test_gradients_are_reduced_in_the_wanted_dtype(
    stages: str, microbatches: int, in_float32: bool, tmp_path: Path
) -> None:
    case = Case(stages, microbatches, model="llama, bf16")
    programs = pipelined(case, in_float32) if "|" in stages else one_stage(case, in_float32)
    dtypes = set()
    for number, lowered in enumerate(programs):
        dtypes |= summed(lowered, tmp_path / str(number))
    assert dtypes == ({"f32"} if in_float32 else {"f32", "bf16"})


def one_stage(case: Case, in_float32: bool) -> list[jax.stages.Lowered]:
    analysis, plan = analysis_of(case.model, BATCH // case.microbatches), plan_of(case)
    mesh = stage_mesh(plan.cluster, jax.devices()[:DEVICES])
    programs = StagePrograms(
        plan_model(analysis, plan, mesh, reduces_in_float32=in_float32), optimizer_of("sgd"), case.microbatches
    )
    batch = [
        jax.ShapeDtypeStruct((case.microbatches, *x.shape) if case.microbatches > 1 else x.shape, x.dtype)
        for x in jax.tree.leaves(analysis.trace.batch)
    ]
    return [programs.gradients.lower(programs.abstract_state, batch)]  # type: ignore[attr-defined]


def pipelined(case: Case, in_float32: bool) -> list[jax.stages.Lowered]:
    """The backward pass of each stage, which every microbatch runs, and the end of the passes."""
    analysis, plan = analysis_of(case.model, BATCH // case.microbatches), plan_of(case)
    pipeline = plan_pipeline(
        analysis, plan, optimizer_of("sgd"), jax.devices()[:DEVICES], reduces_in_float32=in_float32
    )
    found = []
    for number in range(len(plan.stages)):
        calls = StageCalls(pipeline, number)
        forward = calls.forward().lower().compile()
        found += [calls.backward(calls.residuals(forward)).lower(), calls.gradients().lower()]
    return found


def summed(lowered: jax.stages.Lowered, folder: Path) -> set[str]:
    """Dtypes of the sums over devices of more than scalars."""
    found = [c for c in partitioned_collectives(lowered, folder) if c.kind in SUMS]
    return {dtype for c in found if c.bytes > 4 * c.arrays for dtype in c.dtypes}
