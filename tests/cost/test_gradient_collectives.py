"""Over which ranks, how often and how large the gradients of parameters are reduced."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax.cost._gradient_collectives import gradient_reductions
from galvatron_jax.profile import Array, Collective, LayerKind, Lookup, Parameter
from galvatron_jax.strategy import Strategy
from tests.cost.settings import MODEL

KERNEL = Parameter(path="kernel", dtype="float32", compute_dtype="bfloat16", dims=(("embed",), ("mlp",)))
BIAS = Parameter(path="bias", dtype="float32", compute_dtype="bfloat16", dims=((5,),))
"""No number of ranks divides it."""
FILTER = Parameter(path="filter", dtype="float32", compute_dtype="float32", dims=((16,),), per_sample=False)
POSITIONS = Parameter(path="positions", dtype="float32", compute_dtype="float32", dims=((16,),), sums=0)
SUM = Collective(
    phase="backward",
    kind="all-reduce",
    array=Array(dtype="float32", factor=16),
    merged_count=1,
    over=("batch",),
    gradient=True,
)
"""Over the batch, before the table of positions."""

PLAIN, SCATTERED, HSDP = Strategy(dp=8), Strategy(dp=8, zero=2), Strategy(dp=8, zero=3, replicas=2)
HSDP_TP = Strategy(tp=2, dp=4, zero=3, replicas=2)

Found = set[tuple[str, int, float, bool]]


def found(parameter: Parameter, strategy: Strategy, *, microbatches: int = 1) -> Found:
    """(kind, group, bytes, once) of the reductions of one parameter's gradient."""
    sums = (SUM,) if parameter is POSITIONS else ()
    kind: LayerKind = msgspec.structs.replace(
        MODEL.kinds[1], parameters=(parameter,), classes={"embed": 4, "mlp": 8}, candidates=(), data=sums
    )
    reductions = gradient_reductions(kind, strategy, 8, accumulates=microbatches > 1, merged=False)
    return {(r.kind, r.group, r.bytes, r.once) for r in reductions}


@pytest.mark.parametrize(
    ("parameter", "strategy", "expected"),
    [
        (KERNEL, PLAIN, {("all-reduce", 8, 64, False)}),
        (KERNEL, SCATTERED, {("reduce-scatter", 8, 64, False)}),
        (KERNEL, HSDP, {("reduce-scatter", 4, 64, False), ("all-reduce", 2, 16, False)}),
        (BIAS, SCATTERED, {("all-reduce", 8, 10, False)}),
        (BIAS, HSDP, {("all-reduce", 4, 10, False), ("all-reduce", 2, 10, False)}),
        (FILTER, SCATTERED, {("reduce-scatter", 8, 64, False)}),
        (FILTER, HSDP, {("all-reduce", 8, 64, False)}),
        (POSITIONS, SCATTERED, set()),
        (POSITIONS, HSDP, {("all-reduce", 2, 16, False)}),
    ],
)
def test_one_microbatch(parameter: Parameter, strategy: Strategy, expected: Found) -> None:
    assert found(parameter, strategy) == expected


@pytest.mark.parametrize(
    ("parameter", "strategy", "expected"),
    [
        (KERNEL, PLAIN, {("all-reduce", 8, 128, True)}),  # the accumulated sum, in float32
        (KERNEL, SCATTERED, {("reduce-scatter", 8, 64, False)}),
        (KERNEL, HSDP, {("reduce-scatter", 4, 64, False), ("all-reduce", 2, 32, True)}),
        (FILTER, PLAIN, {("all-reduce", 8, 64, False)}),
        (FILTER, HSDP, {("all-reduce", 8, 64, False)}),
        (POSITIONS, PLAIN, {("all-reduce", 8, 64, True)}),
        (POSITIONS, SCATTERED, set()),
        (POSITIONS, HSDP, {("all-reduce", 2, 16, True)}),
    ],
)
def test_several_microbatches(parameter: Parameter, strategy: Strategy, expected: Found) -> None:
    assert found(parameter, strategy, microbatches=2) == expected


def test_partial_results_are_reduced_each_and_meet_across_replicas_once() -> None:
    tied = msgspec.structs.replace(KERNEL, sums=3)
    assert found(tied, HSDP) == {("reduce-scatter", 4, 3 * 64, False), ("all-reduce", 2, 16, False)}


@pytest.mark.parametrize(
    ("vocab", "embed", "expected"),
    [
        (64, 8, {("reduce-scatter", 4, 64 * 8 * 4, False)}),  # as large as the rows
        (72, 8, {("all-gather", 4, 4 * 16 * (8 * 4 + 4), False)}),
        (8, 64, {("reduce-scatter", 4, 8 * 64 * 4, False)}),
        (25, 64, {("all-to-all", 4, 16 * 64 * 4, False), ("all-gather", 4, 4 * 16 * 4, False)}),
    ],
)
def test_replicas_move_the_rows_of_a_lookup_where_they_are_less_than_the_table(
    vocab: int, embed: int, expected: Found
) -> None:
    """Of four samples in a group, 16 tokens each."""
    rows = Array(dtype="float32", classes=("batch", "embed", "seq"))
    lookup = Lookup(rows=rows, indices=Array(dtype="int32", classes=("batch", "seq")))
    table = Parameter(
        path="table", dtype="float32", compute_dtype="float32", dims=(("vocab",), ("embed",)), lookups=(lookup,)
    )
    sizes = {"vocab": vocab, "embed": embed, "seq": 16}
    kind = msgspec.structs.replace(MODEL.kinds[0], parameters=(table,), classes=sizes, candidates=(), data=())
    reductions = gradient_reductions(kind, HSDP, 8, accumulates=False, merged=False)
    across = ("all-reduce", 2, vocab * embed, False)
    assert {(r.kind, r.group, r.bytes, r.once) for r in reductions} == expected | {across}
    beside_tensor_ranks = gradient_reductions(kind, HSDP_TP, 8, accumulates=False, merged=False)
    assert {(r.kind, r.group) for r in beside_tensor_ranks} == {("reduce-scatter", 2), ("all-reduce", 2)}
