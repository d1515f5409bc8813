"""Layers as loops: what they keep, how long their programs are, and which layers may share one."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import pytest

from galvatron_jax.analysis._jaxpr import scan_operands
from galvatron_jax.plan import Remat, Strategy
from galvatron_jax.profile import Array
from galvatron_jax.runtime._runs import Run
from tests.runtime.planned import BATCH, Planned, dp, hsdp, llama, planned, tp
from tests.support.small_models import small_llama

pytestmark = pytest.mark.multidevice

LAYERS = 4


@functools.cache
def looped(remat: Remat, zero: int = 3) -> Planned:
    return planned((dp(zero), *[dp(zero, remat)] * LAYERS, dp(zero)))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_loop_keeps_what_the_analysis_counts_and_neither_casts_nor_gathered_weights(remat: Remat) -> None:
    sharded = looped(remat)
    kind = sharded.analysis.kinds["layers.*"].profile
    arrays: dict[str, tuple[Array, ...]] = {
        "none": kind.residuals,
        "dots": kind.residuals_dots or (),
        "full": (),
    }
    stream = [boundary.array for boundary in kind.inputs if boundary.stream]
    counted = sum(array.local_bytes(kind.classes, {}) for array in (*arrays[remat], *stream))
    assert kept_bytes(sharded) == counted


@pytest.mark.parametrize(("remat", "waits"), [("none", False), ("dots", True), ("full", True)])
def test_what_a_loop_computes_again_waits_for_the_cotangent_but_gathers_do_not(remat: Remat, waits: bool) -> None:
    sharded = looped(remat)
    state, batch = sharded.programs.abstract_state, sharded.abstract_batch()
    jaxpr = jax.make_jaxpr(lambda *arguments: sharded.programs.gradients(*arguments))(state, batch).jaxpr
    backward = [eqn for eqn in scans(jaxpr) if eqn.params["length"] == LAYERS][-1]
    (again,) = [eqn for eqn in backward.params["jaxpr"].jaxpr.eqns if "prevent_cse" in eqn.params]
    barred = again.params["prevent_cse"] or [False] * len(again.invars)
    waiting = [v.aval.ndim for v, one in zip(again.invars, barred, strict=True) if one]
    assert max(waiting, default=0) == (3 if waits else 0)  # the stream, not stacked weights
    assert len(waiting) < len(again.invars)


def test_a_loop_gathers_the_rows_of_a_stack_as_they_are_used_not_as_they_are_stored() -> None:
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", looped("full").compiled_gradients())
    matrices = [shape for shape in gathered if "," in shape]
    assert matrices
    assert not [shape for shape in matrices if shape.startswith("1,")]  # else stacks and rows are copied for it


@pytest.mark.parametrize("zero", [1, 2])
def test_updated_weights_are_gathered_row_by_row_in_the_order_in_which_they_are_stored(zero: int) -> None:
    sharded = looped("none", zero)
    state, batch = sharded.programs.abstract_state, sharded.abstract_batch()
    jaxpr = jax.make_jaxpr(lambda *arguments: sharded.programs.train(*arguments))(state, batch).jaxpr
    bodies = [eqn.params["jaxpr"].jaxpr for eqn in scans(jaxpr) if eqn.params["length"] == LAYERS]
    # Inside shard_map: the partitioner takes what it cannot look into whole, over tensor ranks too.
    alone = [[e.params["jaxpr"] for e in body.eqns if e.primitive.name == "shard_map"] for body in bodies]
    (gathered,) = [[j.eqns[0].params["layout"] for j in jaxprs] for jaxprs in alone if jaxprs]
    stacked = [slot for slot in sharded.programs.model.slots if slot.is_stacked]
    moved = [slot for slot in stacked if slot.sharding("parameter") != slot.sharding("optimizer")]
    assert len(gathered) == len(moved)
    assert all(layout.major_to_minor == tuple(range(len(layout.major_to_minor))) for layout in gathered)


def kept_bytes(sharded: Planned) -> float:
    """Bytes that one turn of the forward loop hands to the backward loop."""
    programs = sharded.programs
    state, batch = programs.abstract_state, sharded.abstract_batch()
    jaxpr = jax.make_jaxpr(lambda *arguments: programs.gradients(*arguments))(state, batch).jaxpr
    forward = next(eqn for eqn in scans(jaxpr) if eqn.params["length"] == LAYERS)
    rows = forward.outvars[scan_operands(forward.params)[1] :]
    return float(sum(row.aval.size * row.aval.dtype.itemsize for row in rows)) / LAYERS


def scans(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == "scan" else []
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                found += scans(getattr(inner, "jaxpr", inner))
    return found


def lowered_length(strategies: tuple[Strategy, ...]) -> int:
    """Characters of the lowered train step."""
    model = small_llama(batch=BATCH, layers=len(strategies) - 2, kv_heads=4)
    sharded = planned(strategies, model=model)
    program: Any = sharded.programs.train
    return len(program.lower(sharded.programs.abstract_state, sharded.abstract_batch()).as_text())


def test_a_program_is_as_long_for_sixteen_layers_as_for_four() -> None:
    short, long = (lowered_length((dp(), *[dp(3, "full")] * n, dp())) for n in (4, 16))
    assert long < 1.1 * short


def test_two_strategies_make_two_loops() -> None:
    one = lowered_length((dp(), *[dp(3)] * 12, dp()))
    two = lowered_length((dp(), *[dp(3)] * 7, *[tp(2, zero=3)] * 5, dp()))
    assert two < 2 * one


@pytest.mark.parametrize("length", [1, 3])
def test_strategies_in_turn_make_a_program_as_long_as_each_of_them_once(length: int) -> None:
    a, b = dp(3, "full"), tp(2, zero=3, remat="full")
    once = lowered_length((dp(), *[a] * length, *[b] * length, dp()))
    often = lowered_length((dp(), *([a] * length + [b] * length) * 4, dp()))
    assert often < 1.2 * once


@pytest.mark.parametrize(
    ("strategies", "runs"),
    [
        ((dp(), *[dp(3)] * 4, dp()), [1, 4, 1]),
        ((dp(), dp(), *[dp(3)] * 3, dp()), [1, 1, 3, 1]),
        ((dp(), *[dp(3)] * 2, *[tp(2)] * 2, dp()), [1, 1, 1, 1, 1, 1]),
        ((dp(), *[dp(3)] * 3, hsdp(3, 2), dp()), [1, 3, 1, 1]),
    ],
)
def test_three_or_more_layers_of_one_strategy_share_a_loop(strategies: tuple[Strategy, ...], runs: list[int]) -> None:
    model = planned(strategies, model=llama()).programs.model
    assert [len(run.segments) for run in model.pieces if isinstance(run, Run)] == runs
    stacked = [len(slot.leaves) for slot in model.slots if slot.is_stacked]
    assert stacked == [n for n in runs if n > 1 for _ in range(9)]
