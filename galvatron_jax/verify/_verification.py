"""Hold a compiled plan against its estimate: does it fit, and does it do what was predicted?

A stage fits when the memory that its program allocates is within the budget and XLA did not rematerialise on its own
(then it is not the plan that was asked for, and slower). Allocated are arguments and the block of temporaries with its
gaps, a little more than the most bytes in use at one instant, which is what the estimate estimates.

A stage of a pipeline has several programs, and its devices hold more than any of them sees: ``_pipeline_memory``
adds it up. Its collectives are those of each program as often as a step runs it; messages between stages are none.

Limits of this version:

* attention by cuDNN's kernel is compiled where the wheel of cuDNN is installed and the model asks for it (a preset does
  when the plan counts on it). Unless the program holds a cuDNN call, the estimate is made again for attention without
  a fused kernel, so that like is compared with like. The verdict is that of the program as it was compiled: a plan that
  counts on fused attention (``planned_peak_bytes`` below ``estimate.peak_bytes``) may not fit without it;
* what no array sees (CUDA context, NCCL buffers) is the reserve of the hardware profile, not compiled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import msgspec

from ..cost import PlannedCollective, estimate_plan, memory_budget, step_collectives
from ..hardware import as_priced, load_hardware
from ..plan import Plan, StagePrediction, check_plan
from ..profile import HardwareProfile, ModelProfile
from ._compare import CollectiveRow, compare_collectives
from ._compile import TIME_LIMIT_S, CompiledPlan, CompiledStage, compile_plan
from ._schedule import ScheduledCollective, scheduled_collectives

_FUSED_ATTENTION = "__cudnn$fmha"
"""Prefix of cuDNN's custom calls for attention (with masks, biases, dropout; backward). Convolutions have others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """One stage: what was estimated, what was compiled."""

    stage: int
    estimate: StagePrediction
    attention_is_fused: bool
    """The program holds a fused attention kernel, and the estimate assumes one."""
    planned_peak_bytes: int
    """The estimate as the search makes it: with fused attention wherever the hardware has it."""
    compiled: CompiledStage
    collectives: tuple[CollectiveRow, ...]
    budget_bytes: int

    @property
    def error(self) -> float:
        """Relative error of the estimated peak; negative: too low, the dangerous side."""
        return self.estimate.peak_bytes / self.compiled.memory.peak - 1

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the stage does not fit; empty when it does."""
        found = []
        over = self.compiled.memory.allocated - self.budget_bytes
        if over > 0:
            found.append(f"it allocates {over / 2**30:.2f} GiB more than the budget")
        if self.compiled.rematerialised:
            found.append(f"XLA runs {self.compiled.rematerialised} operations twice, unasked, to save memory")
        found += [warning for warning in self.compiled.warnings if "Can't reduce memory" in warning]
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All stages of a plan."""

    plan: Plan
    hardware: HardwareProfile
    compiled: CompiledPlan
    stages: tuple[StageCheck, ...]

    @property
    def fits(self) -> bool:
        """Every stage does."""
        return not any(stage.problems for stage in self.stages)


def verify_plan(
    plan: Plan, *, model: str = "", hardware: HardwareProfile | None = None, time_limit_s: float = TIME_LIMIT_S
) -> Verification:
    """Compile a plan for its cluster, without any GPU, and compare.

    Args:
        plan: The plan.
        model: ``MODULE:FUNCTION`` of a model of your own (see ``_subject.load_subject``); empty: the plan's preset.
        hardware: What the estimate is made with; by default the bundled profile of the plan's GPU, with attention
            run as the plan was priced.
        time_limit_s: For the compilation.

    Raises:
        UnsupportedError: the plan's GPU is no compiler target, or its model cannot be cut into these stages.
        ToolchainError: the compiler is missing, failed or took too long.
        GalvatronError: the plan or the model is wrong.
    """
    check_plan(plan)
    bundled = load_hardware(plan.cluster.gpu)
    plan = msgspec.structs.replace(plan, cluster=msgspec.structs.replace(plan.cluster, gpu=bundled.name))
    priced = as_priced(bundled, plan.hardware.fingerprint) if plan.hardware else None
    hardware = hardware or priced or bundled
    compiled = compile_plan(plan, model=model, fused_attention=hardware.fused_attention, time_limit_s=time_limit_s)
    devices = plan.stages[0].devices
    read = functools.cache(  # equal stages share their programs
        functools.partial(
            scheduled_collectives,
            hardware=hardware,
            devices=devices,
            gpus_per_node=min(plan.cluster.gpus_per_node, devices),
        )
    )
    checks = []
    for number, stage in enumerate(compiled.stages):
        found = [_times(collective, c.times) for c in stage.calls for collective in read(c.program.hlo_text)]
        checks.append(_check_stage(plan, compiled, hardware, number, found))
    return Verification(plan=plan, hardware=hardware, compiled=compiled, stages=tuple(checks))


def attention_is_fused(hlo_text: str) -> bool:
    """Tell whether a compiled program holds cuDNN's attention."""
    return _FUSED_ATTENTION in hlo_text


def _check_stage(
    plan: Plan, compiled: CompiledPlan, hardware: HardwareProfile, number: int, found: list[ScheduledCollective]
) -> StageCheck:
    stage = compiled.stages[number]
    fused = hardware.fused_attention and any(attention_is_fused(call.program.hlo_text) for call in stage.calls)
    assumed = msgspec.structs.replace(hardware, fused_attention=fused)
    predicted = _predicted(plan, compiled.profile, hardware, number)
    return StageCheck(
        stage=number,
        estimate=estimate_plan(plan, compiled.profile, assumed).stages[number],
        attention_is_fused=fused,
        planned_peak_bytes=estimate_plan(plan, compiled.profile, hardware).stages[number].peak_bytes,
        compiled=stage,
        collectives=compare_collectives(
            found, predicted, devices=plan.stages[number].devices, segments=compiled.segments
        ),
        budget_bytes=plan.memory_budget_bytes or memory_budget(hardware),
    )


def _times(scheduled: ScheduledCollective, times: int) -> ScheduledCollective:
    collective = scheduled.collective
    return scheduled._replace(collective=collective._replace(times=times * collective.times))


def _predicted(plan: Plan, profile: ModelProfile, hardware: HardwareProfile, stage: int) -> list[PlannedCollective]:
    """Return the collectives of one stage."""
    first = sum(s.layer_count for s in plan.stages[:stage])
    layers = range(first, first + plan.stages[stage].layer_count)
    planned = step_collectives(plan, profile, sums_before_reducing=hardware.sums_before_reducing)
    return [collective for collective in planned if collective.layer in layers]
