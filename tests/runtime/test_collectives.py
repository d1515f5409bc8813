"""The collectives that a plan is priced with are those of the compiled program: bytes to the last one.

XLA:CPU spells a reduce-scatter as an all-reduce of the same bytes and a slice, so those two are taken together; and it
reduces over batch and sequence one after the other, all bytes each time, where XLA:GPU reduces once over both
(``on_cpu``). Zero 3 gathers no lookup's table and no bias again for the backward pass. All is float32: XLA:CPU widens
narrower products, and with them their sums.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from galvatron_jax.cost import PlannedCollective, plan_collectives
from galvatron_jax.plan import Plan
from galvatron_jax.runtime._scatter import SCOPE
from galvatron_jax.verify import HloCollective, collectives
from tests.runtime.planned import Strategies, dp, hsdp, llama, planned, tp, tp_hsdp, ulysses

pytestmark = pytest.mark.multidevice

Totals = dict[tuple[str, int], float]
"""Bytes by kind and group size (0 for a permute, which does not tell its group)."""


class Case(NamedTuple):
    strategies: Strategies
    kv_heads: int = 8


EVERY_PLAN = {
    "dp8": Case((dp(),) * 6),
    "tp8": Case((tp(8),) * 6),
    "tp4 dp2": Case((tp(4),) * 6),
    "tp2 dp4": Case((tp(2),) * 6),
    "tp8 remat": Case((tp(8, remat="full"),) * 6),
    "degrees change": Case((tp(8), tp(2), dp(), tp(8, remat="full"), tp(4), tp(2))),
    "degrees change, remat": Case((dp(), tp(4, remat="full"), tp(8), dp(remat="full"), tp(2), tp(8, remat="full"))),
    "grouped queries": Case((tp(8), tp(4, remat="full"), dp(), tp(2), tp(4), dp()), kv_heads=4),
    "a loop among others": Case((dp(), tp(2), tp(2), tp(2), dp(), tp(4))),
    "sp comes and goes": Case((tp(8, sp=True), tp(8, sp=True), tp(2), tp(8, sp=True), tp(4, sp=True), tp(8, sp=True))),
}
SLOW_PLANS = {
    "tp2 dp4 remat": Case((tp(2, remat="full"),) * 6),
    "tp4 dp2 remat": Case((tp(4, remat="full"),) * 6),
    "zero 1 and 2": Case((dp(1), tp(2, zero=1), tp(4, zero=2), dp(2, "full"), tp(2, zero=2), dp(1))),
    "sp": Case((tp(4, sp=True),) * 6),
    "sp remat": Case((tp(8, sp=True, remat="full"),) * 6),
    "sp and zero": Case((tp(2, sp=True, zero=1), tp(4, sp=True, zero=2), dp(2), tp(8, sp=True), tp(2), tp(4, sp=True))),
    "zero 3": Case((dp(3),) * 6),
    "ulysses": Case((dp(), ulysses(2), ulysses(8, remat="full"), ulysses(4), tp(2), ulysses(4))),
    "ulysses and zero": Case(
        (ulysses(2, zero=1), ulysses(4, zero=2), ulysses(8, zero=3), ulysses(2, zero=3), dp(3), ulysses(2))
    ),
    "replicas": Case((hsdp(1, 2), hsdp(2, 4), hsdp(3, 2), hsdp(3, 2, "full"), tp_hsdp(2, 3, 2), hsdp(3, 4))),
    "zero 3 and tp": Case((dp(3), tp(2, zero=3), tp(4, sp=True, zero=3, remat="full"), dp(3, "full"), dp(3), tp(4))),
}
CASES = [pytest.param(case, id=name) for name, case in EVERY_PLAN.items()] + [
    pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_PLANS.items()
]


@pytest.mark.parametrize("case", CASES)
def test_predicted_collectives_equal_the_compiled_ones(case: Case) -> None:
    sharded = planned(case.strategies, model=llama(case.kv_heads))
    predicted = on_cpu(sharded.plan, plan_collectives(sharded.plan, sharded.analysis.profile))
    assert compiled_totals(collectives(sharded.compiled_gradients())) == predicted_totals(predicted)


@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param((dp(), tp(2), tp(4), dp(), tp(2, remat="full"), tp(8)), id="zero 0"),
        pytest.param((dp(1), tp(2, zero=1), tp(4, zero=1), dp(2), tp(2, zero=2), tp(8)), id="zero levels"),
        pytest.param((tp(4, sp=True, zero=1), *[tp(4, sp=True, remat="full")] * 4, tp(4, sp=True)), id="sp"),
        pytest.param((tp(4, sp=True, zero=1), *[tp(4, sp=True, remat="dots")] * 4, tp(4, sp=True)), id="sp, dots"),
        pytest.param(
            (dp(3), tp(2, zero=3), tp(4, sp=True, zero=3, remat="full"), dp(3, "full"), hsdp(3, 2), hsdp(1, 2)),
            id="zero 3 and replicas",
        ),
        pytest.param(
            (ulysses(2, zero=1), ulysses(4), ulysses(8, zero=1, remat="full"), ulysses(2), ulysses(4), ulysses(2)),
            id="ulysses",
        ),
        pytest.param(
            (dp(), ulysses(2, zero=2), ulysses(4, zero=3), ulysses(2, zero=3, replicas=2), ulysses(4, zero=1), dp()),
            id="ulysses and zero levels",
        ),
    ],
)
def test_sums_of_microbatches_are_reduced_once_a_step_and_the_rest_runs_in_every_microbatch(
    strategies: Strategies,
) -> None:
    sharded = planned(strategies, microbatches=2)
    predicted = on_cpu(sharded.plan, plan_collectives(sharded.plan, sharded.analysis.profile))
    once = [c for c in predicted if c.once]
    compiled = collectives(sharded.compiled_gradients())
    in_step = {key: 2 * size for key, size in predicted_totals(c for c in predicted if c not in once).items()}
    repeated = [c for c in compiled if c.in_loop and SCOPE not in c.op_name]  # that one is a loop over layers
    assert compiled_totals(repeated) == in_step
    assert compiled_totals(c for c in compiled if c not in repeated) == predicted_totals(once)


def on_cpu(plan: Plan, planned: Iterable[PlannedCollective]) -> list[PlannedCollective]:
    """Take sums over batch and sequence apart as XLA:CPU does; those of copies run over one dimension already."""
    strategies, found = [strategy for _, strategy in plan.layers()], []
    for c in planned:
        inner = strategies[c.layer].ulysses
        both = c.group in (strategies[c.layer].dp * inner, strategies[c.layer].zero_ranks) and c.group > inner > 1
        apart = both and _sum_kind(c.kind) == "all-reduce" and not c.once
        groups = (c.group // inner, inner) if apart else (c.group,)
        found += [dataclasses.replace(c, group=group) for group in groups]
    return found


def predicted_totals(planned: Iterable[PlannedCollective]) -> Totals:
    totals: Totals = defaultdict(float)
    for c in planned:
        totals[_sum_kind(c.kind), 0 if c.kind == "collective-permute" else c.group] += c.bytes
    return dict(totals)


def compiled_totals(compiled: Iterable[HloCollective]) -> Totals:
    totals: Totals = defaultdict(float)
    for c in compiled:
        size = c.times * (c.bytes * c.group_size if c.kind == "reduce-scatter" else c.bytes)
        totals[_sum_kind(c.kind), 0 if c.kind == "collective-permute" else c.group_size] += size
    return dict(totals)


def _sum_kind(kind: str) -> str:
    return "all-reduce" if kind == "reduce-scatter" else kind
