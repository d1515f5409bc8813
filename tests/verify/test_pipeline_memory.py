"""The walk through a pipelined step: against what really lives on the devices, and against what it adds up."""

from __future__ import annotations

import jax
import pytest

from galvatron_jax.cost import boundary_bytes, goes_on
from galvatron_jax.events import global_order
from galvatron_jax.runtime import Compute, StageCalls, Transfer
from galvatron_jax.runtime._executor import Flight
from galvatron_jax.schedule import ScheduleName, build_schedule
from galvatron_jax.verify._exchange import CompiledMemory
from galvatron_jax.verify._pipeline_memory import StageBytes, begin_step, go_on, pipeline_memory
from galvatron_jax.verify._plan_programs import batch_bytes, stage_bytes
from tests.runtime.pipeline.planned import Case, batches, model_of, programs_of

COUNTERS = 512
"""Bytes of losses, microbatch numbers, step and optimizer counts on one device: what the walk leaves out."""


@pytest.mark.multidevice
def test_walk_holds_what_lives_on_the_devices_of_a_real_step() -> None:
    """Interleaved, every stage with strategies of its own: byte by byte, after every event."""
    case = Case("d.3 t2 | d.1r | s4 t2 | d.2", 4, "interleaved-1f1b", 2)
    programs = programs_of(case)
    pipeline, slices = programs.planned, len(programs.planned.slices)
    sizes = []
    for k in range(len(pipeline.stages)):
        calls = StageCalls(pipeline, k)
        residuals = calls.residuals(calls.forward().lower().compile())
        sizes.append(stage_bytes(calls, residuals))
    before = {id(array) for array in jax.live_arrays()}
    states = programs.adopt(*programs.analysis.trace.model.build())
    batch = programs.place_batch(jax.tree.leaves(batches(model_of(case.model))[0]))
    flight = Flight(programs.executor, states, batch)
    walked = begin_step(sizes, [batch_bytes(pipeline, s) for s in range(slices)])
    for event in flight.run(programs.executor.training):
        go_on(walked, sizes, event)
        if isinstance(event, Transfer):  # what was sent is gone when the link is through
            jax.block_until_ready(flight._arrived)
        for s, here in enumerate(walked):
            found = living_bytes(pipeline.slices[s].mesh.devices.flat[0], before)
            assert 0 <= found - here.held.total() < COUNTERS, (str(event), s, dict(here.held))


def living_bytes(device: jax.Device, others: set[int]) -> int:
    """Bytes on one device; views of one buffer count once."""
    arrays = [array for array in jax.live_arrays() if id(array) not in others]
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in arrays
        for shard in array.addressable_shards
        if shard.device == device and not array.is_deleted()
    }
    return sum(buffers.values())


def program(arguments: int, peak: int, allocated: int = 0) -> CompiledMemory:
    return CompiledMemory(
        arguments=arguments, outputs=0, aliased=0, temporaries=max(0, allocated - arguments), peak=peak
    )


def test_peak_is_the_fullest_moment_of_a_program_beside_what_others_left() -> None:
    """One slice, one stage, by hand: 100 held, two microbatches in flight of 30 each, a backward that adds 50."""
    pipeline = programs_of(Case("d d d | d d d", 2, "gpipe")).planned
    stage = StageBytes(40, 40, 0, 20, 20, 30, 0, 0, 0, 0)
    passes = {"forward": program(60, 75), "backward": program(90, 140, 150), "gradients": program(20, 20)}
    calls = {**passes, "exports 0": program(20, 21), "update": program(100, 110)}
    first, last = pipeline_memory(pipeline.training, [stage, stage], [calls, calls], [5, 7])
    assert (first.peak, last.peak) == (105 + 60 + 50, 107 + 60 + 50)
    assert first.allocated == 105 + 60 + 60
    assert (first.call, first.microbatch) == ("backward", 0)
    assert first.categories == {
        "batch": 5,
        "parameters": 40,
        "optimizer": 40,
        "gradients": 20,
        "residuals": 60,
        "live": 50,
    }


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved-1f1b"])
@pytest.mark.parametrize(("slices", "microbatches"), [(2, 1), (2, 2), (2, 6), (3, 3), (4, 2), (4, 8), (5, 15)])
def test_estimated_messages_are_those_of_the_fullest_moment(
    schedule: ScheduleName, slices: int, microbatches: int
) -> None:
    """One byte each, beside residuals that decide the moment; of several stages on a slice never fewer than walked."""
    chunks = 2 if schedule == "interleaved-1f1b" else 1
    if chunks > 1 and microbatches % slices:
        pytest.skip("interleaved schedules take whole groups of microbatches")
    stages = slices * chunks
    sizes = [message_sizes(k, stages) for k in range(stages)]
    walked, fullest = begin_step(sizes, [0] * slices), [(0, 0)] * slices
    for event in global_order(build_schedule(schedule, slices, microbatches, chunks), stages):
        if isinstance(event, Compute) and event.phase == "backward":
            s, held = event.stage % slices, walked[event.stage % slices].held
            fullest[s] = max(fullest[s], (held["residuals"], held["boundary"]))
        go_on(walked, sizes, event)
    for s in range(slices):
        more = goes_on(schedule, s, slices, microbatches, chunks)
        estimated = sum(boundary_bytes(stages, k, 1.0, goes_on=more) for k in range(s, stages, slices))
        assert estimated == fullest[s][1] if chunks == 1 else estimated >= fullest[s][1]


def message_sizes(stage: int, stages: int) -> StageBytes:
    """Messages of one byte; residuals of a thousand."""
    before, behind = int(stage > 0), int(stage < stages - 1)
    return StageBytes(
        parameters=0,
        optimizer=0,
        model_state=0,
        sums=0,
        means=0,
        residuals=1000,
        arriving=before,
        leaving=behind,
        cotangents=behind,
        returned=before,
    )
