"""The price of a whole plan: layers, re-layouts, schedule.

    stage forward / backward = sum over its layers + changes of layout between neighbours
                               + changes between the wire and its first (forward) and last (backward) layer
    step time                = ``simulate`` of the plan's schedule on the stages' times
    slice peak               = sum of states + largest sum over its stages of (microbatches in flight * residuals)
                               + largest live layer + messages
    messages                 = those that a stage holds at its fullest (``boundary_bytes``), of the size on the wire
    MFU                      = model FLOPs / (step time * devices * peak of the compute dtype)

A slice of devices holds one stage, or several under an interleaved schedule; the largest sum is then taken over the
fullest moments of the schedule (``schedule.in_flight_units``). A message is the stream and the side values that cross
the boundary (``_side_values``).

Model FLOPs are all forward and backward matrix products of the profile, no recomputation, with causal attention counted
half (so, for a Llama, 6 per parameter and token plus half of the attention products).

Not priced: data loading, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..plan import Plan, Prediction, ScheduleName, Stage, StagePrediction, Strategy, check_plan
from ..profile import HardwareProfile, ModelProfile
from ..schedule import build_schedule, in_flight_microbatches, in_flight_units
from ._compute import CAUSAL_SHARE, matmul_peak
from ._kind import summarise
from ._layer import estimate_layer
from ._memory import slice_memory
from ._pipeline import Crossing, StageTime, simulate
from ._side_values import side_values
from ._straight import straight_layers
from ._stream import (
    estimate_relayout,
    estimate_transfer,
    leaves_node,
    message_bytes,
    sender_seconds,
    stream_arrays,
    stream_sizes,
    wire_strategy,
)
from ._values import LayerCost, Setting


def estimate_plan(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> Prediction:
    """Return the estimated step time, throughput and memory of ``plan``.

    The one objective of the search: whatever it reports for a plan is this.

    Args:
        plan: A plan for ``model``.
        model: The model's profile at the plan's sequence length and dtype.
        hardware: The devices.

    Raises:
        PlanError: the plan contradicts itself or the model.
    """
    check_plan(plan, model)
    wires = _wires(plan, model, hardware)
    stages = [_price_stage(plan, s, model, hardware) for s in range(len(plan.stages))]
    schedule = build_schedule(plan.schedule, plan.slices, plan.microbatches, plan.chunks)
    timeline = simulate(schedule, [stage.time for stage in stages], [wire.crossing for wire in wires])
    slowest = stages[timeline.slowest_slice :: plan.slices]
    times = {name: sum(stage.times[name] for stage in slowest) for name in slowest[0].times}
    times["bubble"] = max(0.0, timeline.step_time_s - sum(times.values())) if len(stages) > 1 else 0.0
    peak_flops_per_s = plan.cluster.devices * matmul_peak(hardware, model.dtype)
    memory = [_slice_memory(plan, stages, s, wires) for s in range(plan.slices)]
    return Prediction(
        step_time_s=timeline.step_time_s,
        tokens_per_s=plan.global_batch * model.seq / timeline.step_time_s,
        mfu=plan.global_batch * sample_flops(model) / (timeline.step_time_s * peak_flops_per_s),
        times=times,
        stages=tuple(_prediction(stage.time, memory[k % plan.slices]) for k, stage in enumerate(stages)),
    )


def stage_times(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> tuple[list[StageTime], list[Crossing]]:
    """Return the times of every stage, and a message over every boundary."""
    stages = [_price_stage(plan, s, model, hardware).time for s in range(len(plan.stages))]
    return stages, [wire.crossing for wire in _wires(plan, model, hardware)]


def sample_flops(model: ModelProfile) -> float:
    """Return the model FLOPs of one sample: forward and backward products, causal attention counted half."""
    skipped = 1 - CAUSAL_SHARE if model.causal_attention else 0.0
    total = 0.0
    for run in model.layers:
        sums = summarise(model.kind(run.kind), False)
        total += run.count * (sums.flops - skipped * sums.attention_flops)
    return total


def boundary_bytes(plan_stages: int, stage: int, wire_bytes: float, *, goes_on: bool) -> float:
    """Return the bytes of the messages that a stage holds when it is fullest, at its first backward pass.

    The cotangent of what it sent, and what arrived for the next forward pass, if there is one. (A test compares with
    the step played event by event, as ``verify`` does.)

    Args:
        plan_stages: Number of stages.
        stage: Which of them.
        wire_bytes: One message on one device.
        goes_on: Forward passes are left when it is fullest.
    """
    return ((stage < plan_stages - 1) + (stage > 0 and goes_on)) * wire_bytes


def goes_on(schedule: ScheduleName, slice_: int, slices: int, microbatches: int, chunks: int) -> bool:
    """Return whether a slice has forward passes left when it is fullest."""
    return chunks > 1 or in_flight_microbatches(schedule, slice_, slices, microbatches) < microbatches


class _PricedStage(NamedTuple):
    time: StageTime
    times: dict[str, float]
    """Seconds of the whole step by category, without the bubble."""
    layers: list[tuple[LayerCost, int]]


class _Wire(NamedTuple):
    """A message over one stage boundary."""

    crossing: Crossing
    bytes: float
    """On one device."""


def stage_setting(plan: Plan, stage: Stage, model: ModelProfile, hardware: HardwareProfile) -> Setting:
    """Return the setting in which the layers of ``stage`` are priced."""
    repeated = sum(run.count for run in stage.runs if model.kind(run.kind).repeated)
    return Setting(
        hardware=hardware,
        cluster=plan.cluster,
        stage_devices=stage.devices,
        microbatch=plan.microbatch_size,
        microbatches=plan.microbatches,
        training=plan.training,
        causal_attention=model.causal_attention,
        slices=plan.slices,
        straight=straight_layers(repeated, plan.slices, plan.chunks),
    )


def _price_stage(plan: Plan, s: int, model: ModelProfile, hardware: HardwareProfile) -> _PricedStage:
    stage = plan.stages[s]
    setting = stage_setting(plan, stage, model, hardware)
    layers = [(estimate_layer(model.kind(run.kind), run.strategy, setting), run.count) for run in stage.runs]
    relayout_f, relayout_b = _relayouts(plan, s, model, setting)
    time = StageTime(
        forward_s=sum(count * cost.forward_s for cost, count in layers) + relayout_f,
        backward_s=sum(count * cost.backward_s for cost, count in layers) + relayout_b,
        step_end_s=sum(count * (cost.sync_s + cost.update_s) for cost, count in layers),
    )
    return _PricedStage(time, _step_times(layers, plan.microbatches, relayout_f + relayout_b), layers)


def _slice_memory(plan: Plan, stages: Sequence[_PricedStage], s: int, wires: Sequence[_Wire]) -> dict[str, int]:
    """Bytes by category of slice ``s``, all its stages together."""
    held = range(s, len(stages), plan.slices)
    moments = in_flight_units(plan.schedule, s, plan.slices, plan.microbatches, plan.chunks)
    more = goes_on(plan.schedule, s, plan.slices, plan.microbatches, plan.chunks)
    sizes = [wires[max(k, 1) - 1].bytes for k in held] if wires else []
    messages = sum(boundary_bytes(len(stages), k, size, goes_on=more) for k, size in zip(held, sizes, strict=False))
    return slice_memory([stages[k].layers for k in held], moments, messages)


def _prediction(time: StageTime, memory: dict[str, int]) -> StagePrediction:
    return StagePrediction(
        forward_s=time.forward_s,
        backward_s=time.backward_s,
        step_end_s=time.step_end_s,
        peak_bytes=sum(memory.values()),
        memory=memory,
    )


def _step_times(layers: Sequence[tuple[LayerCost, int]], microbatches: int, relayout_s: float) -> dict[str, float]:
    names = ("compute", "recompute", "tensor_communication", "data_communication")
    times = {name: microbatches * sum(count * cost.times[name] for cost, count in layers) for name in names}
    times["data_communication"] += sum(count * cost.sync_s for cost, count in layers)
    times["relayout"] = microbatches * relayout_s
    times["optimizer"] = sum(count * cost.update_s for cost, count in layers)
    return times


def _relayouts(plan: Plan, s: int, model: ModelProfile, setting: Setting) -> tuple[float, float]:
    """Seconds, forward and backward, of all changes of the stream's layout in stage ``s``."""
    forward = backward = 0.0
    for kind_name, before, after in _changes(plan, s, model, setting):
        kind = model.kind(kind_name)
        for stream in stream_arrays(kind):
            there, back = estimate_relayout(stream, stream_sizes(kind, setting), before, after, setting)
            forward, backward = forward + there, backward + back
    return forward, backward


def _changes(plan: Plan, s: int, model: ModelProfile, setting: Setting) -> Iterator[tuple[str, Strategy, Strategy]]:
    """Yield (kind that takes the stream, strategy before, strategy after) where the strategy may change."""
    runs, wire = plan.stages[s].runs, wire_strategy(setting)
    if s > 0:
        yield runs[0].kind, wire, runs[0].strategy
    for left, right in zip(runs, runs[1:], strict=False):
        yield right.kind, left.strategy, right.strategy
    if s < len(plan.stages) - 1:
        yield plan.stages[s + 1].runs[0].kind, runs[-1].strategy, wire


def _wires(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> list[_Wire]:
    """The messages between stages ``k`` and ``k + 1``."""
    sides, position, found = side_values(model), 0, []
    for k, stage in enumerate(plan.stages[:-1]):
        position += stage.layer_count
        setting = stage_setting(plan, stage, model, hardware)
        kind = model.kind(plan.stages[k + 1].runs[0].kind)
        size_bytes = message_bytes(kind, position, sides, setting)
        crossing = Crossing(
            estimate_transfer(size_bytes, setting, boundary=k),
            leaves_node(setting, k),
            sender_seconds(size_bytes, setting, boundary=k),
        )
        found.append(_Wire(crossing, size_bytes))
    return found
