"""Every change of layout between two layers: the collectives that the price list names, and no others.

Also the guard that XLA is never left to gather a whole array to reshard it ("involuntary full rematerialization"), in
programs small enough to try all 42 pairs of layouts, in both directions; whole models are watched in
``test_equivalence``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from galvatron_jax.analysis import AnalysedKind, analyse_model
from galvatron_jax.cost import relayout_steps
from galvatron_jax.plan import Strategy
from galvatron_jax.runtime import LayerLayout, StageMesh, stage_mesh
from galvatron_jax.runtime._relayout import arrive
from galvatron_jax.verify import collectives
from tests.runtime.planned import BATCH, CLUSTER, DEVICES, INVOLUNTARY, dp, llama, tp

pytestmark = pytest.mark.multidevice

LAYOUTS = [dp(), Strategy(ulysses=4, dp=2), tp(2), tp(2, sp=True), tp(4), tp(4, sp=True), tp(8), tp(8, sp=True)]
PAIRS = [
    pytest.param(before, after, id=f"{before}-{after}") for before in LAYOUTS for after in LAYOUTS if before != after
]
SHAPE = (BATCH, 32, 64)
WHOLE_BYTES = 4 * BATCH * 32 * 64


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_relayout_takes_the_collectives_of_the_price_list(
    before: Strategy, after: Strategy, capfd: pytest.CaptureFixture[str]
) -> None:
    start, end = layout(before), layout(after)

    def forward(stream: jax.Array) -> Any:
        return arrive(stream, start, end, stream_index())

    def backward(stream: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(forward, stream)[1](cotangent)[0]

    here, there = place(start), place(end)
    assert compiled(forward, (here,), there) == planned_steps(before, after)
    assert compiled(backward, (here, there), here) == planned_steps(after, before)
    assert INVOLUNTARY not in capfd.readouterr().err


def test_one_step_in_place_of_two_would_be_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    start, end = layout(tp(8, sp=True)), layout(tp(2))
    compiled(lambda stream: jax.lax.with_sharding_constraint(stream, place(end)), (place(start),), place(end))
    assert INVOLUNTARY in capfd.readouterr().err


def test_arrive_leaves_parameters_where_they_are_stored() -> None:
    layer = block().layer
    weight = jnp.zeros(layer.inputs[layer.parameters[0]].shape)
    assert arrive(weight, layout(tp(8, sp=True)), layout(tp(2)), layer.parameters[0]) is weight


# ------------------------------------------------------------------------------------------------------------- pieces
@functools.cache
def block() -> AnalysedKind:
    model = llama()
    return analyse_model(model.build, model.loss, model.abstract_batch).kinds["layers.*"]


@functools.cache
def mesh() -> StageMesh:
    return stage_mesh(CLUSTER, jax.devices()[:DEVICES])


def layout(strategy: Strategy) -> LayerLayout:
    return LayerLayout(block(), strategy, mesh())


def stream_index() -> int:
    """The only input of a block that is no parameter."""
    (index,) = set(range(len(block().layer.inputs))) - set(block().layer.parameters)
    return index


def place(layer: LayerLayout) -> NamedSharding:
    """Where the stream stands in a layer, worked out from the definition of a layout."""
    along = layer.strategy.sp or layer.strategy.ulysses > 1
    trailing = mesh().tensor_axes(layer.strategy) if along else ()
    return mesh().sharding(PartitionSpec(mesh().data_axes(layer.strategy) or None, trailing or None))


def compiled(
    function: Callable[..., Any], inputs: tuple[NamedSharding, ...], output: NamedSharding
) -> list[tuple[str, int, float]]:
    """Kind, ranks and bytes of each collective of the compiled program; of a permute the ranks are not told."""
    stream = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    program = jax.jit(function, in_shardings=inputs, out_shardings=output).lower(*[stream] * len(inputs)).compile()
    text = program.as_text()
    assert text is not None
    found = collectives(text)
    return sorted((c.kind, 0 if c.kind == "collective-permute" else c.group_size, c.bytes) for c in found)


def planned_steps(before: Strategy, after: Strategy) -> list[tuple[str, int, float]]:
    steps = relayout_steps(before, after)
    return sorted((s.kind, 0 if s.kind == "collective-permute" else s.ranks, WHOLE_BYTES / s.parts) for s in steps)
