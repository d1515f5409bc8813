"""The programs of a plan: the train step of one stage, or those of each stage of a pipeline."""

from __future__ import annotations

from typing import Any

import jax

from ..analysis import Analysis
from ..plan import Plan
from ..runtime import PlannedPipeline, StageCalls, StagePrograms, local_bytes, plan_model, plan_pipeline, stage_mesh
from ._compiler import Compiler
from ._exchange import CallAnswer, StageAnswer, StageMemory
from ._pipeline_memory import StageBytes, pipeline_memory
from ._subject import stand_in_optimizer


def compile_stages(compiler: Compiler, analysis: Analysis, plan: Plan, devices: list[Any]) -> list[StageAnswer]:
    """Compile all programs that a step of ``plan`` runs; equal ones once.

    Args:
        compiler: What compiles them.
        analysis: The model, analysed at the shape of one microbatch.
        plan: Checked against the analysis.
        devices: Of one stage.
    """
    return (_pipeline if len(plan.stages) > 1 else _one_stage)(compiler, analysis, plan, devices)


def _one_stage(compiler: Compiler, analysis: Analysis, plan: Plan, devices: list[Any]) -> list[StageAnswer]:
    """Compile the train step of a plan of one stage."""
    planned = plan_model(analysis, plan, stage_mesh(plan.cluster, devices))
    programs = StagePrograms(planned, stand_in_optimizer(plan), plan.microbatches)
    train: Any = programs.train  # a jitted function: ``Callable`` hides ``lower``
    number = compiler.add(train.lower(programs.abstract_state, _batch(analysis, plan)))
    memory = compiler.memory(number)
    found = StageMemory(
        peak=memory.peak,
        allocated=memory.allocated,
        categories={"arguments": memory.arguments, "temporaries": memory.temporaries},
    )
    return [StageAnswer(calls=(CallAnswer(name="train", program=number),), memory=found)]


def _batch(analysis: Analysis, plan: Plan) -> list[jax.ShapeDtypeStruct]:
    leading = (plan.microbatches,) if plan.microbatches > 1 else ()
    leaves = jax.tree.leaves(analysis.trace.batch)
    return [jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype) for leaf in leaves]


def _pipeline(compiler: Compiler, analysis: Analysis, plan: Plan, devices: list[Any]) -> list[StageAnswer]:
    """Compile every program of every stage."""
    pipeline = plan_pipeline(analysis, plan, stand_in_optimizer(plan), devices * plan.slices)
    stages = [StageCalls(pipeline, k) for k in range(len(plan.stages))]
    compiled = [_stage(compiler, stage, plan.microbatches) for stage in stages]
    slices = pipeline_memory(
        pipeline.training,
        [sizes for _, sizes in compiled],
        [{call.name: compiler.memory(call.program) for call in calls} for calls, _ in compiled],
        [batch_bytes(pipeline, s) for s in range(plan.slices)],
    )
    return [StageAnswer(calls=calls, memory=slices[k % plan.slices]) for k, (calls, _) in enumerate(compiled)]


def _stage(compiler: Compiler, stage: StageCalls, microbatches: int) -> tuple[tuple[CallAnswer, ...], StageBytes]:
    forward = compiler.add(stage.forward().lower())
    residuals = stage.residuals(compiler.compiled(forward))
    backward = compiler.add(stage.backward(residuals).lower())
    once = [("gradients", stage.gradients()), *((f"exports {n}", c) for n, c in enumerate(stage.exports()))]
    calls = (
        CallAnswer(name="forward", program=forward, times=microbatches),
        CallAnswer(name="backward", program=backward, times=microbatches),
        *[CallAnswer(name=name, program=compiler.add(c.lower())) for name, c in [*once, ("update", stage.update())]],
    )
    return calls, stage_bytes(stage, residuals)


def stage_bytes(stage: StageCalls, residuals: list[jax.ShapeDtypeStruct]) -> StageBytes:
    flows = [
        [array for array, crossing in zip(arrays, crossings, strict=True) if crossing.gradient]
        for arrays, crossings in ((stage.arriving, stage.share.arriving), (stage.leaving, stage.share.leaving))
    ]
    return StageBytes(
        parameters=local_bytes(stage.state.parameters),
        optimizer=local_bytes(stage.state.optimizer),
        model_state=local_bytes(stage.state.model_state),
        sums=local_bytes(stage.stage.passes.sums),
        means=local_bytes(stage.found),
        residuals=local_bytes(stage.kept(residuals)),
        arriving=local_bytes(stage.arriving),
        leaving=local_bytes(stage.leaving),
        cotangents=local_bytes(flows[1]),
        returned=local_bytes(flows[0]),
    )


def batch_bytes(pipeline: PlannedPipeline, slice_: int) -> int:
    """Bytes on one device of the batch leaves of a slice."""
    leaves, count = jax.tree.leaves(pipeline.analysis.trace.batch), pipeline.plan.microbatches
    return local_bytes(
        [
            jax.ShapeDtypeStruct((count, *leaves[i].shape), leaves[i].dtype, sharding=place)
            for i, place in pipeline.batch_places[slice_].items()
        ]
    )
