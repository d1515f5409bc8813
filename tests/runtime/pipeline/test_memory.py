"""What a pipeline keeps and runs again: nothing but what the plan says, for as many microbatches as its schedule says.

The measure is the analysis of the layers (counted for the search, and held against compiled programs elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from galvatron_jax.analysis._flops import program_flops
from galvatron_jax.analysis._jaxpr import scan_operands
from galvatron_jax.runtime._executor import Flight
from galvatron_jax.runtime._passes import StagePasses
from galvatron_jax.runtime._pipeline_stage import PipelineStage
from galvatron_jax.schedule import ScheduleName, in_flight_units
from tests.runtime.pipeline.planned import Case, batches, model_of, programs_of

pytestmark = pytest.mark.multidevice

WIDTH_BYTES = 4 * 16 * 32 * 4
"""The stream of a microbatch of four: float32 [4, 16, 32]."""


@pytest.mark.parametrize(
    ("stages", "recomputes"),
    [("d d d | d d d", False), ("dr dr dr | dr dr dr", True), ("d.3 d.3 d.3 d.3 d.3 | t2", False)],
    ids=["remat none", "remat full", "loop"],
)
def test_backward_runs_no_product_again_and_keeps_what_the_analysis_counts(stages: str, recomputes: bool) -> None:
    programs = programs_of(Case(stages))
    profile, kept_bytes, counted_bytes = programs.analysis.profile, 0, 0.0
    for stage in programs.stages:
        kinds = [profile.kind(segment.kind) for segment in stage.model.share.segments]
        flops = {
            phase: sum(d.count * d.flops(k.classes, {}) for k in kinds for d in k.dots if d.phase == phase)
            for phase in ("forward", "backward")
        }
        forward, backward, kept = traced(stage.passes)
        assert program_flops(forward) == flops["forward"]
        again = sum(d.count * d.flops(k.classes, {}) for k in kinds for d in k.dots if is_run_again(d))
        assert program_flops(backward) - flops["backward"] == (again if recomputes else 0)
        counted_bytes += 0 if recomputes else sum(a.local_bytes(k.classes, {}) for k in kinds for a in k.residuals)
        kept_bytes += array_bytes(jax.tree.leaves(kept))
    # Beside its residuals each layer keeps the stream that it takes; the embedding takes tokens, which stay anyway.
    assert kept_bytes == counted_bytes + 5 * WIDTH_BYTES


@pytest.mark.parametrize("zero", [0, 1])
def test_backward_adds_gradients_of_a_loop_to_the_sums_and_makes_no_stack_of_them(zero: int) -> None:
    programs = programs_of(Case(f"d d.{zero} d.{zero} d.{zero} | t2 d", microbatches=4))
    stage = programs.stages[0]
    _, backward, _ = traced(stage.passes)
    made = {v.aval.shape for eqn in scans(backward.jaxpr) for v in eqn.outvars[scan_operands(eqn.params)[1] :]}
    sums = zip(stage.passes.sums, stage.model.slots, strict=True)
    stacks = {array.shape for array, slot in sums if slot.is_stacked}
    assert stacks
    assert not made & stacks


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_of_a_loop_are_reduced_layer_by_layer(zero: int) -> None:
    """All stacks but the one that is made are arguments; what is reduced is a row."""
    programs = programs_of(Case(f"d d.{zero} d.{zero} d.{zero} | t2 d", microbatches=4))
    stage = programs.stages[0]
    jaxpr = jax.make_jaxpr(stage.passes.reduce)(list(stage.passes.sums)).jaxpr
    stacks = [array for array, slot in zip(stage.passes.sums, stage.model.slots, strict=True) if slot.is_stacked]
    reduced = [eqn.invars[0].aval.shape for eqn in equations(jaxpr) if eqn.primitive.name == "reduce_sum"]
    assert stacks
    assert not {array.shape for array in stacks} & set(reduced)
    assert {array.shape[1:] for array in stacks} <= set(reduced)


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "chunks"),
    [
        ("gpipe", "d d d | d d d", 4, 1),
        ("1f1b", "d | d d | d d | d", 8, 1),
        ("interleaved-1f1b", "d | d d | d d | d", 4, 2),
    ],
)
def test_microbatches_in_flight_are_those_that_the_schedule_promises(
    name: ScheduleName, stages: str, microbatches: int, chunks: int
) -> None:
    programs = programs_of(Case(stages, microbatches, name, chunks))
    model, slices = model_of("llama"), len(programs.stages) // chunks
    states = programs.adopt(*programs.analysis.trace.model.build())
    batch = programs.place_batch(jax.tree.leaves(batches(model)[0]))
    others = live_ids()
    flight = Flight(programs.executor, states, batch)
    fullest: list[set[tuple[int, ...]]] = [set() for _ in range(slices)]
    for _ in flight.run(programs.executor.training):
        for s in range(slices):
            held = tuple(sum(stage == c * slices + s for stage, _ in flight.kept) for c in range(chunks))
            fullest[s].add(held)
        # Nothing is alive but the sums, what is in flight and what is on its way.
        known = [flight.kept, flight.sums, flight.losses, flight.model_states, flight._made, flight._arrived]
        assert live_ids() - others <= {id(leaf) for leaf in jax.tree.leaves(known)}
    for s in range(slices):
        promised = in_flight_units(name, s, slices, microbatches, chunks)
        assert promised <= fullest[s]
        assert all(any(all(a <= b for a, b in zip(m, p, strict=True)) for p in promised) for m in fullest[s])
    assert not flight.kept


def traced(passes: StagePasses) -> tuple[Any, Any, Any]:
    """Return the jaxprs of both passes, and what goes from one to the other."""
    share = passes.model.share
    arriving = [jax.ShapeDtypeStruct(c.variable.aval.shape, c.variable.aval.dtype) for c in share.arriving]
    number, total = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    inputs = (passes._parameters, passes._batch, number)
    forward = jax.make_jaxpr(passes._forward)(*inputs, passes._state, arriving, total)
    leaving, _, residuals, _ = jax.eval_shape(passes._forward, *inputs, passes._state, arriving, total)
    kept = passes.kept(residuals, passes._state, arriving)
    cotangents = [value for value, crossing in zip(leaving, share.leaving, strict=True) if crossing.gradient]
    return forward, jax.make_jaxpr(passes._backward)(*inputs, kept, cotangents, passes.sums), kept


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every equation, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def scans(jaxpr: Any) -> Iterator[Any]:
    return (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan")


def is_run_again(dot: Any) -> bool:
    return bool(dot.phase == "forward" and dot.recomputed)


def array_bytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def live_ids() -> set[int]:
    return {id(array) for array in jax.live_arrays()}


def test_stage_holds_no_more_than_its_own_parameters() -> None:
    programs = programs_of(Case("d d d | d d d"))
    first, last = programs.stages
    assert parameter_bytes(first) + parameter_bytes(last) == parameter_bytes_of_model(programs)


def parameter_bytes(stage: PipelineStage) -> int:
    return array_bytes(stage.passes._parameters)


def parameter_bytes_of_model(programs: Any) -> int:
    return array_bytes(jax.tree.leaves(programs.analysis.trace.parameters))
