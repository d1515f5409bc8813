"""Every model of the zoo under several plans on eight devices: the numbers of one device, the collectives predicted.

Each plan is compiled once and answers both questions. The largest error is the case's own tolerance, absolute and
relative: the same float32 sums in another order. Collectives agree to the last byte, after what XLA:CPU does by rules
of its own (``compiled_totals``, ``predicted_totals``; docs/collectives.md states them). ``EXCUSED`` lists every pair of
model and plan that still differs, with its difference.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cost import plan_collectives
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, check_plan, model_reference, strategy_violations
from galvatron_jax.profile import LayerKind
from galvatron_jax.runtime import StagePrograms, plan_model, stage_mesh
from galvatron_jax.runtime._slots import to_user
from galvatron_jax.verify import collectives
from tests.runtime.planned import CLUSTER, DEVICES
from tests.zoo import SAMPLES, ZOO, Case

pytestmark = pytest.mark.multidevice

ROOT = Path(__file__).parents[2]
Totals = dict[tuple[str, int], float]
Choose = Callable[[LayerKind], Strategy]

DATA = Strategy(dp=DEVICES)


def first_legal(*wanted: Strategy) -> Choose:
    """Return the function that picks the first legal one of ``wanted`` for a layer kind, else data parallelism."""

    def choose(kind: LayerKind) -> Strategy:
        return next((s for s in wanted if not strategy_violations(kind, s, SAMPLES)), DATA)

    return choose


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


@functools.cache
def case(name: str) -> Case:
    return ZOO[name]()


@functools.cache
def analysed(name: str) -> Analysis:
    return analyse_model(case(name).build, case(name).loss, case(name).spec)


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


def plan_for(analysis: Analysis, choose: Choose) -> Plan:
    kinds = [segment.kind for segment in analysis.cut.segments]
    runs = tuple(PlanRun(kind=k, count=1, strategy=choose(analysis.kinds[k].profile)) for k in kinds)
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=CLUSTER,
        global_batch=SAMPLES,
        microbatches=1,
        stages=(Stage(devices=DEVICES, runs=runs),),
    )
    check_plan(plan, analysis.profile)
    return plan


@pytest.mark.parametrize(("name", "plan_name"), CASES)
def test_model_on_eight_devices_computes_the_same_with_the_predicted_collectives(name: str, plan_name: str) -> None:
    analysis, batch = analysed(name), jax.tree.leaves(case(name).batch)
    plan = plan_for(analysis, PLANS[plan_name])
    programs = StagePrograms(
        plan_model(analysis, plan, stage_mesh(CLUSTER, jax.devices()[:DEVICES])), optax.sgd(0.1), 1
    )
    rows = analysis.trace.rows
    state, placed = programs.adopt(*rows.apart(*fresh(name))), programs.place_batch(batch)
    gradients: Any = programs.gradients
    compiled = gradients.lower(state, placed).compile()
    beyond = difference(compiled_totals(compiled.as_text()), predicted_totals(plan, analysis))
    assert beyond == EXCUSED.get((name, plan_name), {})
    loss, stored = compiled(state, placed)[:2]
    leaves = to_user(programs.model.slots, stored)
    apart = jax.tree.unflatten(jax.tree.structure(rows.parameters), [leaves[i] for i in range(len(leaves))])
    got = (loss, rows.together(apart, rows.apart(*fresh(name))[1])[0])
    for a, b in zip(jax.tree.leaves(on_one_device(name)), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=case(name).tolerance, atol=case(name).tolerance)


def test_documentation_lists_the_excused_pairs() -> None:
    text = (ROOT / "docs" / "collectives.md").read_text()
    table = text.split("## Excused")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (f"`{name}`", plan, ", ".join(f"{kind} over {group}: {size:+,.0f}" for (kind, group), size in sizes.items()))
        for (name, plan), sizes in EXCUSED.items()
    ]
    assert all(row[3] for row in rows)


def difference(compiled: Totals, predicted: Totals) -> Totals:
    """Return what is compiled beyond the prediction, where there is a difference."""
    keys = sorted(compiled.keys() | predicted.keys())
    return {key: d for key in keys if (d := compiled.get(key, 0.0) - predicted.get(key, 0.0))}


def compiled_totals(text: str) -> Totals:
    """Bytes by kind and group size; a reduce-scatter counts as the all-reduce that XLA:CPU makes of it."""
    totals: Totals = defaultdict(float)
    for c in collectives(text):
        totals[_sum_kind(c.kind), 0 if c.kind == "collective-permute" else c.group_size] += c.times * c.bytes
    return dict(totals)


def predicted_totals(plan: Plan, analysis: Analysis) -> Totals:
    """The same of the prediction, with two habits of XLA:CPU.

    It reduces over batch and sequence one after the other, not at once; and it gathers what ``top_k`` reads.
    """
    totals: Totals = defaultdict(float)
    strategies = [strategy for _, strategy in plan.layers()]
    for c in plan_collectives(plan, analysis.profile):
        s = strategies[c.layer]
        at_once = s.ulysses > 1 and c.group == s.dp * s.ulysses and _sum_kind(c.kind) == "all-reduce"
        for group in (s.dp, s.ulysses) if at_once else (c.group,):
            totals[_sum_kind(c.kind), 0 if c.kind == "collective-permute" else group] += c.bytes
    for kind, s in plan.layers():
        layer = analysis.kinds[kind].layer
        for op in layer.ops:
            if op.name == "top_k":
                totals["all-gather", s.dp] += op.inputs[0].bytes * (1 + (s.remat in layer.recomputed_by(op)))
    return dict(totals)


def _sum_kind(kind: str) -> str:
    return "all-reduce" if kind == "reduce-scatter" else kind
