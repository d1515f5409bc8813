"""Models of the zoo under families of plans on eight devices, and the collectives of each: predicted and compiled.

Bytes are compared by kind and group size, after what XLA:CPU does by rules of its own (``compiled_totals``,
``predicted_totals``; docs/collectives.md states them).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import optax

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cost import plan_collectives
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, check_plan, model_reference, strategy_violations
from galvatron_jax.profile import LayerKind
from galvatron_jax.runtime import StagePrograms, plan_model, stage_mesh
from galvatron_jax.verify import collectives
from tests.runtime.planned import CLUSTER, DEVICES
from tests.zoo import SAMPLES, ZOO, Case

Totals = dict[tuple[str, int], float]
"""Bytes by kind and group size (0 for a permute, which does not tell its group)."""
Choose = Callable[[int, LayerKind], Strategy]
"""From a layer's position and kind to its strategy."""

DATA = Strategy(dp=DEVICES)


def first_legal(*wanted: Strategy) -> Choose:
    """Return the function that picks the first legal one of ``wanted`` for a layer kind, else data parallelism."""

    def choose(position: int, kind: LayerKind) -> Strategy:
        return next((s for s in wanted if not strategy_violations(kind, s, SAMPLES)), DATA)

    return choose


def by_turns(*choices: Choose) -> Choose:
    """Return the function that takes the choices one after the other along the depth."""
    return lambda position, kind: choices[position % len(choices)](position, kind)


FAMILIES: dict[str, Choose] = {
    "zero 0": first_legal(DATA),
    "zero 1": first_legal(Strategy(dp=8, zero=1)),
    "zero 2": first_legal(Strategy(dp=8, zero=2, remat="full")),
    "zero 3": first_legal(Strategy(dp=8, zero=3)),
    "tp": first_legal(Strategy(tp=4, dp=2), Strategy(tp=2, dp=4)),
    "sp, zero 1": first_legal(
        Strategy(tp=4, dp=2, sp=True, zero=1),
        Strategy(tp=2, dp=4, sp=True, zero=1),
        Strategy(tp=2, dp=4, zero=1),
        Strategy(dp=8, zero=1),
    ),
    "tp, zero 3": first_legal(Strategy(tp=2, dp=4, zero=3), Strategy(dp=8, zero=3)),
    "hsdp": first_legal(Strategy(dp=8, zero=3, replicas=2)),
    "hsdp, tp": first_legal(Strategy(tp=2, dp=4, zero=2, replicas=2, remat="full"), Strategy(dp=8, zero=1, replicas=4)),
    "hsdp, sp": first_legal(
        Strategy(tp=2, dp=4, sp=True, zero=3, replicas=2), Strategy(tp=2, dp=4, zero=3, replicas=2), DATA
    ),
    "hsdp, ulysses": first_legal(
        Strategy(ulysses=2, dp=4, zero=3, replicas=2), Strategy(dp=8, zero=3, replicas=2), DATA
    ),
    "ulysses, zero 3": first_legal(
        Strategy(ulysses=4, dp=2, zero=3), Strategy(ulysses=2, dp=4, zero=3), Strategy(dp=8, zero=3)
    ),
    "mixed": by_turns(
        first_legal(Strategy(dp=8, zero=3, remat="full")),
        first_legal(Strategy(tp=2, dp=4, zero=1)),
        first_legal(Strategy(tp=4, dp=2, sp=True), Strategy(tp=4, dp=2), Strategy(tp=2, dp=4)),
    ),
}
"""One plan of each family that the runtime can express, for any model."""


@functools.cache
def case(name: str) -> Case:
    """Return a model of the zoo by its name."""
    return ZOO[name]()


@functools.cache
def analysed(name: str) -> Analysis:
    """Return the analysis of a model of the zoo."""
    return analyse_model(case(name).build, case(name).loss, case(name).spec)


def plan_for(analysis: Analysis, choose: Choose) -> Plan:
    """Return the one-stage plan of which ``choose`` picks the strategies."""
    kinds = [segment.kind for segment in analysis.cut.segments]
    runs = tuple(
        PlanRun(kind=k, count=1, strategy=choose(position, analysis.kinds[k].profile))
        for position, k in enumerate(kinds)
    )
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=CLUSTER,
        global_batch=SAMPLES,
        microbatches=1,
        stages=(Stage(devices=DEVICES, runs=runs),),
    )
    check_plan(plan, analysis.profile)
    return plan


def programs_for(analysis: Analysis, plan: Plan) -> StagePrograms:
    """Return the programs of a plan under plain gradient descent."""
    stage = plan_model(analysis, plan, stage_mesh(CLUSTER, jax.devices()[:DEVICES]))
    return StagePrograms(stage, optax.sgd(0.1), 1)


def compiled_gradients(name: str, plan: Plan) -> str:
    """Return the HLO text of the gradient program of a model under a plan."""
    programs: Any = programs_for(analysed(name), plan)
    batch = jax.tree.leaves(case(name).spec)
    text: str = programs.gradients.lower(programs.abstract_state, batch).compile().as_text()
    return text


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
    """The same of the prediction, with a habit of XLA:CPU: it sums over batch and sequence one after the other."""
    totals: Totals = defaultdict(float)
    strategies = [strategy for _, strategy in plan.layers()]
    for c in plan_collectives(plan, analysis.profile):
        s = strategies[c.layer]
        both = s.dp * s.ulysses, s.zero_ranks if c.phase == "backward" else 0
        at_once = c.group in both and c.group > s.ulysses > 1 and _sum_kind(c.kind) == "all-reduce"
        for group in (c.group // s.ulysses, s.ulysses) if at_once else (c.group,):
            totals[_sum_kind(c.kind), 0 if c.kind == "collective-permute" else group] += c.bytes
    return dict(totals)


def _sum_kind(kind: str) -> str:
    return "all-reduce" if kind == "reduce-scatter" else kind
