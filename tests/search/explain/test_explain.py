"""Explanations: every figure is what the cost model says of the plan that it stands for."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax._text import plain
from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.plan import Plan, Strategy
from galvatron_jax.search import SearchResult, find_plan
from galvatron_jax.search.explain import (
    Subject,
    best_families,
    compare_clusters,
    diff_lines,
    diff_plans,
    family_name,
    layer_alternatives,
    layer_lines,
    memory_frontier,
    plan_reasons,
    plan_summary,
    what_ifs,
    with_strategy,
)
from galvatron_jax.search.explain._scope import explored_schedules
from galvatron_jax.search.explain._summary import peak_of, seconds_per_sample
from galvatron_jax.units import GIB
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL = llama_like_profile(layers=6, embed=512, heads=8, head_dim=64, mlp=1536, vocab=5000, seq=512)
HARDWARE = toy_hardware()
CLUSTER = parse_cluster("2x2")


@pytest.fixture(scope="module", params=["roomy", "tight"])
def found(request: pytest.FixtureRequest) -> SearchResult:
    batches = (8, 16)
    roomy = find_plan(MODEL, CLUSTER, HARDWARE, global_batches=batches)
    if request.param == "roomy":
        return roomy
    frontier = memory_frontier(roomy.split, batches, roomy.plan)
    return find_plan(MODEL, CLUSTER, HARDWARE, global_batches=batches, memory_bytes=frontier[-3].peak_bytes)


@pytest.fixture(scope="module")
def subject(found: SearchResult) -> Subject:
    return Subject(found.plan, MODEL, HARDWARE)


def check_price(plan: Plan, step_time_s: float, peak_bytes: int) -> None:
    predicted = estimate_plan(plan, MODEL, HARDWARE)
    assert predicted.step_time_s == step_time_s
    assert max(stage.peak_bytes for stage in predicted.stages) == peak_bytes


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_alternatives_cost_what_the_cost_model_says_of_the_changed_plan(subject: Subject, layer: int) -> None:
    found = layer_alternatives(subject, layer)
    present = list(subject.plan.layers())
    assert len(found) > 10
    assert present[layer][1] not in [alternative.strategy for alternative in found]
    for alternative in found[::5]:
        changed = with_strategy(subject.plan, [layer], alternative.strategy)
        after = list(changed.layers())
        assert [i for i in range(len(present)) if after[i] != present[i]] == [layer]
        check_price(changed, alternative.layer.step_time_s, alternative.layer.peak_bytes)


def test_no_alternative_that_fits_is_faster_than_the_optimum(subject: Subject) -> None:
    step_time_s = subject.present.step_time_s
    for layer in range(MODEL.layer_count):
        for alternative in layer_alternatives(subject, layer):
            for price in (alternative.layer, alternative.run):
                assert not (price.fits and price.step_time_s < step_time_s * (1 - 1e-11))
    assert all(reason.verdict != "better exists" for reason in plan_reasons(subject))


def test_reasons_name_memory_where_it_decides() -> None:
    roomy = find_plan(MODEL, CLUSTER, HARDWARE, global_batches=(16,))
    needed = peak_of(roomy.plan)
    tight = find_plan(MODEL, CLUSTER, HARDWARE, global_batches=(16,), memory_bytes=int(0.8 * needed))
    reasons = plan_reasons(Subject(tight.plan, MODEL, HARDWARE))
    assert "memory" in {reason.verdict for reason in reasons}
    for reason in reasons:
        if reason.faster is not None:
            assert reason.faster[1].step_time_s < Subject(tight.plan, MODEL, HARDWARE).present.step_time_s
            assert reason.faster[1].peak_bytes > 0.8 * needed


def test_explanation_of_a_bad_plan_says_that_a_better_one_exists(found: SearchResult) -> None:
    if len(found.plan.stages) > 1:
        pytest.skip("the tight plan is a pipeline: the two strategies below are for all four devices")
    worst = max(
        (strategy for strategy in (Strategy(tp=4, dp=1), Strategy(dp=4, zero=3, remat="full"))),
        key=lambda s: Subject(found.plan, MODEL, HARDWARE).changed(range(1, 7), s).step_time_s,
    )
    bad = with_strategy(found.plan, range(1, 7), worst)
    bad = msgspec.structs.replace(bad, memory_budget_bytes=10**15)
    subject = Subject(bad, MODEL, HARDWARE)
    assert "better exists" in {reason.verdict for reason in plan_reasons(subject)}
    assert "not the optimum" in plain(layer_lines(subject, 3, layer_alternatives(subject, 3)))


def test_what_ifs_are_searches_of_the_changed_problem(found: SearchResult) -> None:
    answers = {w.change: w for w in what_ifs(found.split, found.global_batches, found.plan)}
    assert set(answers) == {
        f"{word} bandwidth {where}" for word in ("2 x", "half the") for where in ("between nodes", "inside a node")
    } | {"10% more memory", "10% less memory"}
    more = find_plan(
        MODEL, CLUSTER, HARDWARE, global_batches=found.global_batches,
        memory_bytes=int(1.1 * found.split.problem.budget_bytes),
        schedules=explored_schedules(found.split, found.plan),
    )  # fmt: skip
    gain = answers["10% more memory"].gain
    assert gain == pytest.approx(seconds_per_sample(found.plan) / seconds_per_sample(more.plan) - 1)
    assert gain is not None
    assert gain >= 0
    for change, sign in (("2 x bandwidth between nodes", 1), ("half the bandwidth inside a node", -1)):
        gain = answers[change].gain
        assert gain is not None
        assert gain * sign >= 0


def test_families_are_distinct_and_the_best_of_their_kind(found: SearchResult) -> None:
    families = best_families(found.split, found.global_batches, found.plan, 4)
    speeds = [seconds_per_sample(family.plan) for family in families]
    assert families[0].plan == found.plan
    assert speeds == sorted(speeds)
    assert len({family.name for family in families}) == len(families) == 4
    every = best_families(found.split, found.global_batches, found.plan, 100)
    assert [f.plan for f in every[:4]] == [f.plan for f in families]  # bounds left none out
    assert all(family_name(family.plan) == family.name for family in every)


def test_frontier_falls_and_every_point_is_the_optimum_of_its_own_memory(found: SearchResult) -> None:
    points = memory_frontier(found.split, found.global_batches, found.plan)
    peaks = [point.peak_bytes for point in points]
    assert peaks == sorted(peaks, reverse=True)
    assert len(points) >= 4
    assert [p.tokens_per_s for p in points] == sorted((p.tokens_per_s for p in points), reverse=True)
    for point in points[:: max(1, len(points) // 3)]:
        again = find_plan(
            MODEL,
            CLUSTER,
            HARDWARE,
            global_batches=found.global_batches,
            memory_bytes=point.peak_bytes,
            schedules=explored_schedules(found.split, found.plan),
        ).plan
        assert again.predicted is not None
        assert again.predicted.tokens_per_s == pytest.approx(point.tokens_per_s, rel=1e-12)


def test_clusters_are_compared_by_their_best_plans_and_price() -> None:
    meshes = [parse_cluster(mesh) for mesh in ("1x2", "2x2")]
    rows = compare_clusters(meshes, lambda c: find_plan(MODEL, c, HARDWARE, global_batches=(16,)), 2.0)
    assert [row.devices for row in rows] == [2, 4]
    for row in rows:
        assert row.tokens_per_currency_unit == pytest.approx(row.tokens_per_s / row.devices * 3600 / 2.0)


def test_diff_names_every_difference_and_its_cost(found: SearchResult) -> None:
    other = find_plan(MODEL, CLUSTER, HARDWARE, global_batches=(4,), memory_bytes=40 * GIB).plan
    diff = diff_plans(found.plan, other)
    text = plain(diff_lines(diff, "a.json", "b.json"))
    assert "global batch" in text
    assert "step time" in text
    assert diff.step_time_s == (found.plan.predicted.step_time_s, other.predicted.step_time_s)  # type: ignore[union-attr]
    same = diff_plans(found.plan, found.plan)
    assert same.differences == ()
    assert plain(diff_lines(same, "a", "a")) == "the plans are equal\n"


def test_summary_of_a_plan_is_one_line(found: SearchResult) -> None:
    assert "samples" in plan_summary(found.plan)
    assert "\n" not in plan_summary(found.plan)
