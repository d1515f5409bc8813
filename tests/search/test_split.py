"""Pins and prohibitions: exact within what they leave, and visible in the plan in the model's own kinds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from galvatron_jax.cost import estimate_plan
from galvatron_jax.errors import GalvatronError
from galvatron_jax.plan import Plan, ScheduleName, check_plan
from galvatron_jax.search import find_plan
from galvatron_jax.search._rules import Rule, forbid, pin
from galvatron_jax.search._spaces import named_space
from tests.search.brute_force import every_plan
from tests.search.problems import SHAPES, quantile, small_problem

SAME = 1e-11
RULES = {
    "one layer": [pin("layer 1: zero=0")],
    "two ranges": [pin("layers 0-1: remat=full"), forbid("layer 1: tp>1")],
    "prohibition": [forbid("remat=full"), forbid("zero=1|2")],
    "kind and number": [pin("layers.*: zero<=1"), forbid("layer 2: remat")],
}
SEEDS = [
    seed for seed in range(3 * len(SHAPES)) if SHAPES[seed % len(SHAPES)][1] in ("l3", "e1 l2", "e1 l1 h1", "l2 h1")
]


def obeys(plan: Plan, rules: Sequence[Rule]) -> bool:
    """Whether every layer of a plan keeps every rule, judged by layer number."""
    return all(
        all(condition.holds(strategy) for condition in rule.conditions) != rule.forbids
        for rule in rules
        for layer, (kind, strategy) in enumerate(plan.layers())
        if (rule.layers is None or layer in rule.layers) and rule.kind in (None, kind)
    )


@pytest.mark.parametrize(("seed", "name"), list(zip(SEEDS, itertools.cycle(RULES), strict=False)))
def test_search_under_rules_equals_brute_force_under_rules(seed: int, name: str) -> None:
    small, rules = small_problem(seed), [r for r in RULES[name] if r.layers != (2,)]
    if not any(run.kind == "layers.*" for run in small.model.layers):
        rules = [rule for rule in rules if rule.kind is None]
    rules += small.limits.rules
    schedules: tuple[ScheduleName, ...] = ("1f1b", "gpipe")  # interleaved, a rule by number would split a kind in two
    tried = [plan for plan in every_plan(*small) if obeys(plan.plan, rules) and plan.plan.schedule in schedules]
    arguments = small.model, small.cluster, small.hardware
    if not tried:
        with pytest.raises(GalvatronError):
            find_plan(*arguments, global_batches=small.batches, rules=rules, schedules=schedules)
        return
    budget = quantile([plan.peak_bytes for plan in tried], 0.3)
    best = min(plan.seconds_per_sample for plan in tried if plan.peak_bytes <= budget)
    found = find_plan(*arguments, global_batches=small.batches, rules=rules, schedules=schedules, memory_bytes=budget)
    plan = found.plan
    assert plan.predicted is not None
    assert plan.certificate is not None
    assert obeys(plan, rules)
    assert plan.predicted.step_time_s / plan.global_batch == pytest.approx(best, rel=SAME)
    check_plan(plan, small.model)  # in the model's own kinds
    assert plan.predicted == estimate_plan(plan, small.model, small.hardware)
    assert plan.certificate.optimal
    assert plan.certificate.lower_bound_s == plan.predicted.step_time_s


@pytest.mark.parametrize("name", ["dp", "fsdp", "megatron", "3d"])
def test_named_space_holds_what_its_name_says(name: str) -> None:
    small = small_problem(12)  # 2x2, two layers
    space = named_space(name, small.cluster)
    found = find_plan(
        small.model, small.cluster, small.hardware, global_batches=(8,), rules=space.rules, max_stages=space.max_stages,
        memory_bytes=10**15,
    )  # fmt: skip
    strategies = [strategy for _, strategy in found.plan.layers()]
    assert (len(found.plan.stages) == 1) or name == "3d"
    if name in ("dp", "fsdp"):
        assert all(s.tp == s.ulysses == 1 for s in strategies)
    if name == "dp":
        assert all(s.zero == 0 for s in strategies)
    if name in ("megatron", "3d"):
        assert all(s.sp == (s.tp > 1) and s.zero <= 1 and s.tp <= 2 for s in strategies)


def test_baselines_show_what_the_rules_cost() -> None:
    small = small_problem(12)
    arguments = (small.model, small.cluster, small.hardware)
    free = find_plan(*arguments, global_batches=(8,), memory_bytes=10**15)
    held = find_plan(*arguments, global_batches=(8,), memory_bytes=10**15, rules=[pin("tp=1")])
    assert held.baselines == free.baselines


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (pin("layers 0-9: tp=1"), "layer numbers from 0 to 1"),
        (pin("hed: tp=1"), "one of layers.*"),
        (forbid("layer 5: tp=1"), "layer numbers from 0 to 1"),
    ],
)
def test_rule_about_what_the_model_does_not_have_is_refused(rule: Rule, expected: str) -> None:
    small = small_problem(12)
    with pytest.raises(GalvatronError) as caught:
        find_plan(small.model, small.cluster, small.hardware, global_batches=(8,), rules=[rule])
    assert expected in caught.value.message
