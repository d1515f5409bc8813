"""Every model of the zoo under several plans on eight devices: the numbers of one device, the collectives predicted.

Each plan is compiled once and answers both questions. The largest error is the case's own tolerance, absolute and
relative: the same float32 sums in another order. Collectives agree to the last byte, after what XLA:CPU does by rules
of its own (``compiled_totals``, ``predicted_totals``; docs/collectives.md states them). ``EXCUSED`` lists every pair of
model and plan that still differs, with its difference.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.plan import Strategy
from galvatron_jax.runtime._slots import to_user
from tests.runtime.zoo_plans import (
    FAMILIES,
    Choose,
    Totals,
    analysed,
    case,
    compiled_gradients,
    compiled_totals,
    difference,
    first_legal,
    plan_for,
    predicted_totals,
    programs_for,
)
from tests.zoo import ZOO

pytestmark = pytest.mark.multidevice

ROOT = Path(__file__).parents[2]

PLANS: dict[str, Choose] = {
    "zero 3, dots": first_legal(Strategy(dp=8, zero=3, remat="dots")),
    "sp or tp, remat": first_legal(Strategy(tp=2, dp=4, sp=True, remat="full"), Strategy(tp=2, dp=4, remat="full")),
    "ulysses": first_legal(Strategy(ulysses=2, dp=4)),
}

EXCUSED: dict[tuple[str, str], Totals] = {
    ("moe ragged", "zero 3, dots"): {("all-gather", 8): 204_800, ("all-reduce", 8): 151_552},
    ("moe ragged", "sp or tp, remat"): {
        ("all-gather", 2): 67_584,
        ("all-gather", 4): 8_192,
        ("all-reduce", 2): 49_152,
        ("all-reduce", 4): 90_112,
        ("collective-permute", 0): 74_752,
    },
    ("moe ragged", "ulysses"): {("all-gather", 8): 102_400, ("all-reduce", 8): 167_936},
}
"""Bytes by kind and group that are compiled beyond those predicted. A pair that is not here agrees; the table "Excused"
of docs/collectives.md is this one, with reasons."""

CASES = [pytest.param(name, plan, id=f"{name}-{plan}") for name in ZOO for plan in PLANS]

OTHERS = [
    ("bert", "hsdp"),  # positions: the sum over the batch comes before the table
    ("vit", "hsdp"),  # a convolution and a broadcast mix samples
    ("t5", "hsdp"),  # a lookup whose rows are less than its table
    ("swin", "hsdp"),
    ("bert", "hsdp, tp"),  # weights that tensor ranks do not divide
    ("gpt2", "hsdp, sp"),  # norms that read copies of their scales, positions beside a sharded table
    ("bert", "mixed"),  # a mask, read by layers of other layouts
    ("t5", "mixed"),  # an encoder's output, relative biases
    ("hybrid", "mixed"),  # two groups of layers, statistics
    ("gru", "zero 3"),  # a loop in time runs its elementwise operations again
    ("gpt2", "ulysses, zero 3"),  # biases of what is exchanged and kept
    ("t5", "sp, zero 1"),  # a tied table under two tensor degrees
    ("albert", "mixed"),  # a shared block under three strategies
]
"""Models under other families of plans, each for what it has; benchmarks/zoo_collectives.py compares all."""


@functools.cache
def fresh(name: str) -> tuple[Any, Any]:
    """Parameters and state of the user's model."""
    built: tuple[Any, Any] = jax.jit(analysed(name).trace.model.build)()
    return built


@functools.cache
def on_one_device(name: str) -> Any:
    """Loss and gradients of the user's own function."""

    def loss(parameters: Any, state: Any) -> jax.Array:
        value = analysed(name).trace.model.run(parameters, state, case(name).batch)[0]
        return jnp.asarray(value[0] if isinstance(value, tuple) else value)

    return jax.jit(jax.value_and_grad(loss))(*fresh(name))


@pytest.mark.parametrize(("name", "plan_name"), CASES)
def test_model_on_eight_devices_computes_the_same_with_the_predicted_collectives(name: str, plan_name: str) -> None:
    assert equal_and_beyond(name, PLANS[plan_name]) == EXCUSED.get((name, plan_name), {})


@pytest.mark.parametrize(
    ("keeper", "reader"),
    [
        (Strategy(dp=8, zero=3), Strategy(tp=2, dp=4, zero=1)),  # gathered for both, sliced for the reader
        (Strategy(tp=4, dp=2, zero=3, remat="full"), Strategy(tp=2, dp=4, sp=True)),  # whole on the way
        (Strategy(dp=8, zero=3), Strategy(tp=8, dp=1)),  # used as it is stored
        (Strategy(dp=8, zero=1), Strategy(dp=8, zero=3, replicas=2)),  # reduced whole, not in a group
    ],
)
def test_tied_table_under_two_strategies_moves_as_predicted(keeper: Strategy, reader: Strategy) -> None:
    last = len(analysed("pure").cut.segments) - 1
    choose = {0: keeper, last: reader}
    assert equal_and_beyond("pure", lambda position, _: choose.get(position, Strategy(dp=8))) == {}


def equal_and_beyond(name: str, choose: Choose) -> Totals:
    """Hold a model under a plan against one device; return what is compiled beyond the prediction."""
    analysis, batch = analysed(name), jax.tree.leaves(case(name).batch)
    plan = plan_for(analysis, choose)
    programs = programs_for(analysis, plan)
    rows = analysis.trace.rows
    state, placed = programs.adopt(*rows.apart(*fresh(name))), programs.place_batch(batch)
    gradients: Any = programs.gradients
    compiled = gradients.lower(state, placed).compile()
    loss, stored = compiled(state, placed)[:2]
    leaves = to_user(programs.model.slots, stored)
    apart = jax.tree.unflatten(jax.tree.structure(rows.parameters), [leaves[i] for i in range(len(leaves))])
    got = (loss, rows.together(apart, rows.apart(*fresh(name))[1])[0])
    for a, b in zip(jax.tree.leaves(on_one_device(name)), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=case(name).tolerance, atol=case(name).tolerance)
    return difference(compiled_totals(compiled.as_text()), predicted_totals(plan, analysis))


@pytest.mark.parametrize(("name", "family"), OTHERS)
def test_other_families_compile_to_the_predicted_collectives(name: str, family: str) -> None:
    """Nothing runs: equal numbers are the business of the tests above and of ``test_equivalence``."""
    plan = plan_for(analysed(name), FAMILIES[family])
    assert difference(compiled_totals(compiled_gradients(name, plan)), predicted_totals(plan, analysed(name))) == {}


def test_documentation_lists_the_excused_pairs() -> None:
    text = (ROOT / "docs" / "collectives.md").read_text()
    table = text.split("## Excused")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (f"`{name}`", plan, ", ".join(f"{kind} over {group}: {size:+,.0f}" for (kind, group), size in sizes.items()))
        for (name, plan), sizes in EXCUSED.items()
    ]
    assert all(row[3] for row in rows)
