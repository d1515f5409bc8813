"""The price of a whole plan: layers, re-layouts, schedule.

    stage forward / backward = sum over its layers + changes of layout between neighbours
                               + changes between the wire and its first (forward) and last (backward) layer
    step time                = ``simulate`` of the plan's schedule on the stages' times
    stage peak               = sum of states + in-flight microbatches * sum of residuals + largest live layer + boundary
    boundary                 = two messages (one arriving, one leaving) per neighbour, of the size on the wire
    MFU                      = model FLOPs / (step time * devices * peak of the compute dtype)

Model FLOPs are all forward and backward matrix products of the profile, no recomputation, with causal attention counted
half (so, for a Llama, 6 per parameter and token plus half of the attention products).

Not priced: side values other than the stream that cross stages (masks, encoder outputs), data loading, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..plan import Plan, Prediction, Stage, StagePrediction, Strategy, check_plan
from ..profile import HardwareProfile, ModelProfile
from ..schedule import build_schedule, in_flight_microbatches
from ._compute import CAUSAL_SHARE, matmul_peak
from ._kind import summarise
from ._layer import estimate_layer
from ._memory import stage_memory
from ._pipeline import StageTime, simulate
from ._stream import estimate_relayout, estimate_transfer, stream_arrays, stream_sizes, wire_strategy
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
    stages = [_price_stage(plan, s, model, hardware) for s in range(len(plan.stages))]
    transfers = [_transfer_seconds(plan, s, model, hardware) for s in range(len(plan.stages) - 1)]
    schedule = build_schedule(plan.schedule, len(plan.stages), plan.microbatches)
    timeline = simulate(schedule, [stage.time for stage in stages], transfers)
    slowest = timeline.slowest_stage
    times = dict(stages[slowest].times)
    times["bubble"] = max(0.0, timeline.step_time_s - sum(times.values())) if len(stages) > 1 else 0.0
    peak_flops_per_s = plan.cluster.devices * matmul_peak(hardware, model.dtype)
    return Prediction(
        step_time_s=timeline.step_time_s,
        tokens_per_s=plan.global_batch * model.seq / timeline.step_time_s,
        mfu=plan.global_batch * sample_flops(model) / (timeline.step_time_s * peak_flops_per_s),
        times=times,
        stages=tuple(stage.prediction for stage in stages),
    )


def stage_times(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> tuple[list[StageTime], list[float]]:
    """Return the times of every stage, and the seconds of a message over every boundary."""
    stages = [_price_stage(plan, s, model, hardware).time for s in range(len(plan.stages))]
    return stages, [_transfer_seconds(plan, s, model, hardware) for s in range(len(plan.stages) - 1)]


def sample_flops(model: ModelProfile) -> float:
    """Return the model FLOPs of one sample: forward and backward products, causal attention counted half."""
    skipped = 1 - CAUSAL_SHARE if model.causal_attention else 0.0
    total = 0.0
    for run in model.layers:
        sums = summarise(model.kind(run.kind), False)
        total += run.count * (sums.flops - skipped * sums.attention_flops)
    return total


def boundary_bytes(plan_stages: int, stage: int, wire_bytes: float) -> float:
    """Return the bytes of message buffers of one stage.

    Args:
        plan_stages: Number of stages.
        stage: Which of them.
        wire_bytes: One message on one device.
    """
    neighbours = (stage > 0) + (stage < plan_stages - 1)
    return 2 * neighbours * wire_bytes


class _PricedStage(NamedTuple):
    time: StageTime
    times: dict[str, float]
    """Seconds of the whole step by category, without the bubble."""
    prediction: StagePrediction


def stage_setting(plan: Plan, stage: Stage, model: ModelProfile, hardware: HardwareProfile) -> Setting:
    """Return the setting in which the layers of ``stage`` are priced."""
    return Setting(
        hardware=hardware,
        cluster=plan.cluster,
        stage_devices=stage.devices,
        microbatch=plan.microbatch_size,
        microbatches=plan.microbatches,
        training=plan.training,
        causal_attention=model.causal_attention,
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
    in_flight = in_flight_microbatches(plan.schedule, s, len(plan.stages), plan.microbatches)
    memory = stage_memory(layers, in_flight, _boundary(plan, s, model, setting))
    prediction = StagePrediction(
        forward_s=time.forward_s,
        backward_s=time.backward_s,
        step_end_s=time.step_end_s,
        peak_bytes=sum(memory.values()),
        memory=memory,
    )
    return _PricedStage(time, _step_times(layers, plan.microbatches, relayout_f + relayout_b), prediction)


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


def _transfer_seconds(plan: Plan, s: int, model: ModelProfile, hardware: HardwareProfile) -> float:
    """Seconds of one microbatch's message between stages ``s`` and ``s + 1``."""
    setting = stage_setting(plan, plan.stages[s], model, hardware)
    kind = model.kind(plan.stages[s + 1].runs[0].kind)
    sizes = stream_sizes(kind, setting)
    return sum(estimate_transfer(stream, sizes, setting, boundary=s) for stream in stream_arrays(kind))


def _boundary(plan: Plan, s: int, model: ModelProfile, setting: Setting) -> float:
    if len(plan.stages) == 1:
        return 0.0
    kind = model.kind(plan.stages[max(s, 1)].runs[0].kind)
    whole = sum(stream.local_bytes(stream_sizes(kind, setting), {}) for stream in stream_arrays(kind))
    return boundary_bytes(len(plan.stages), s, whole / setting.stage_devices)
