from __future__ import annotations

import math
from types import ModuleType

import pytest

from galvatron_jax import _document
from galvatron_jax.cluster import parse_cluster
from galvatron_jax.errors import GalvatronError, InfeasibleError
from galvatron_jax.plan import Plan, check_plan
from galvatron_jax.search import SearchResult, _find, _knapsack, _partition, _pipeline, find_plan
from galvatron_jax.search._baselines import price_baselines
from galvatron_jax.search._engine import Engine
from galvatron_jax.search._find import MAX_GLOBAL_BATCH
from tests.search.brute_force import every_plan
from tests.search.problems import quantile, small_problem
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL = llama_like_profile(layers=7, embed=512, heads=8, head_dim=64, mlp=1536, vocab=5001, seq=512)
HARDWARE = toy_hardware()


def search(**changes: object) -> SearchResult:
    return find_plan(MODEL, parse_cluster("2x2"), HARDWARE, **{"global_batches": (16, 24), **changes})  # type: ignore[arg-type]


def predicted_s(plan: Plan) -> float:
    assert plan.predicted is not None
    return plan.predicted.step_time_s


def test_find_plan_returns_a_valid_plan_with_a_certificate() -> None:
    result = search()
    check_plan(result.plan, MODEL)
    assert result.plan.certificate is not None
    assert result.plan.certificate.optimal
    assert result.plan.certificate.lower_bound_s == predicted_s(result.plan)
    assert result.plan.certificate.gap == 0
    assert result.solved <= result.candidates


def test_find_plan_twice_writes_the_same_bytes() -> None:
    assert _document.encode(search().plan) == _document.encode(search().plan)


def test_stopped_search_keeps_the_first_plan_and_a_true_bound() -> None:
    best = search().plan
    stopped = search(time_limit_s=0.0)
    certificate = stopped.plan.certificate
    assert stopped.stopped
    assert certificate is not None
    assert certificate.lower_bound_s / stopped.plan.global_batch <= predicted_s(best) / best.global_batch
    assert predicted_s(stopped.plan) / stopped.plan.global_batch >= predicted_s(best) / best.global_batch
    assert certificate.gap == pytest.approx(1 - certificate.lower_bound_s / predicted_s(stopped.plan))
    assert certificate.optimal == (certificate.gap == 0)


@pytest.mark.parametrize("microbatches", [None, (1,)])
def test_time_limit_ends_a_search_that_has_no_plan_too(
    microbatches: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_find, "FIRST_PLAN_S", -1.0)
    with pytest.raises(GalvatronError, match="stopped before it had a plan"):
        search(time_limit_s=0.0, memory_bytes=1, microbatches=microbatches)


def test_search_stopped_without_a_plan_of_its_own_gives_the_best_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    best = search().plan
    monkeypatch.setattr(_find, "FIRST_PLAN_S", -1.0)
    stopped = search(time_limit_s=0.0)
    assert stopped.stopped
    assert stopped.plan.certificate is not None
    usual = [b.seconds_per_sample for b in stopped.baselines if b.seconds_per_sample is not None]
    assert predicted_s(stopped.plan) / stopped.plan.global_batch == min(usual)
    assert stopped.plan.certificate.lower_bound_s / stopped.plan.global_batch <= predicted_s(best) / best.global_batch


@pytest.mark.parametrize(
    ("module", "names"),
    [(_partition, ["MOST_BRANCHES"]), (_pipeline, ["MOST_BOUNDARIES"]), (_knapsack, ["MOST_ROWS", "LONG_ROWS"])],
)
@pytest.mark.parametrize("seed", [0, 2, 9, 16, 18, 12])
def test_candidate_too_hard_to_solve_leaves_a_true_bound(
    seed: int, module: ModuleType, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_problem(seed)
    problem = small.problem(quantile([tried.peak_bytes for tried in every_plan(*small)], 0.3))
    best = Engine(problem, small.batches).run()
    for name in names:
        monkeypatch.setattr(module, name, 1)
    found = Engine(problem, small.batches).run()
    assert best.solution is not None
    assert not best.stopped
    assert found.bound_s_per_sample <= best.bound_s_per_sample * (1 + 1e-12)
    assert found.stopped or found.bound_s_per_sample == pytest.approx(best.bound_s_per_sample, rel=1e-12)
    if found.solution is not None and found.candidate is not None:
        assert found.bound_s_per_sample <= found.solution.step_time_s / found.candidate.global_batch


@pytest.mark.parametrize("looks", [0, 3, 10, 30])
def test_watch_ends_the_search_with_what_it_has(looks: int) -> None:
    seen: list[float | None] = []

    def watch(best: float | None) -> bool:
        seen.append(best)
        return len(seen) > looks

    try:
        result = search(watch=watch)
    except GalvatronError as error:
        assert "stopped" in error.message  # noqa: PT017  (either way of ending is right, at different times)
        assert seen[-1] is None
    else:
        assert len(seen) == looks + 1 or not result.stopped
    known = [value for value in seen if value is not None]
    assert known == sorted(known, reverse=True)


def test_limits_leave_parts_of_the_space_out() -> None:
    result = search(max_stages=1, max_tp=1, microbatches=(2, 3))
    assert len(result.plan.stages) == 1
    assert result.plan.microbatches in (2, 3)
    assert all(strategy.tp == 1 for _, strategy in result.plan.layers())


@pytest.mark.parametrize(
    ("mesh", "layers", "seq", "batch"),
    [("1x1", 1, 1, 1), ("1x3", 1, 8, 3), ("1x3", 7, 8, 7), ("4x1", 7, 8, 4), ("1x3", 1, 1, 1), ("2x2", 2, 1, 1)],
)
def test_degenerate_problems_have_a_valid_plan(mesh: str, layers: int, seq: int, batch: int) -> None:
    model = llama_like_profile(layers=layers, embed=64, heads=6, head_dim=16, mlp=96, vocab=101, seq=seq)
    result = find_plan(model, parse_cluster(mesh), HARDWARE, global_batches=(batch,))
    check_plan(result.plan, model)
    assert math.isfinite(predicted_s(result.plan))


@pytest.mark.parametrize(("mesh", "batch"), [("7x1", 5), ("2x2", 1)])
def test_problem_without_any_legal_strategy_is_infeasible(mesh: str, batch: int) -> None:
    """Fewer layers than stages that one sample per device would need, and a vocabulary that no degree divides."""
    model = llama_like_profile(layers=1, embed=64, heads=6, head_dim=16, mlp=96, vocab=101, seq=8)
    with pytest.raises(InfeasibleError, match="no strategy is legal"):
        find_plan(model, parse_cluster(mesh), HARDWARE, global_batches=(batch,))


@pytest.mark.parametrize("batches", [(0,), (-4,), (MAX_GLOBAL_BATCH + 1,), tuple(range(1, 100))])
def test_unreasonable_batches_are_refused(batches: tuple[int, ...]) -> None:
    with pytest.raises(GalvatronError, match="global batches"):
        search(global_batches=batches)


@pytest.mark.parametrize("seed", [2, 3, 9, 16])
def test_best_uniform_baseline_is_the_best_uniform_plan(seed: int) -> None:
    small = small_problem(seed)
    uniform = [
        tried.seconds_per_sample
        for tried in every_plan(*small)
        if len(tried.plan.stages) == 1 and len({strategy for _, strategy in tried.plan.layers()}) == 1
    ]
    baselines = {b.name: b for b in price_baselines(Engine(small.problem(2**40), small.batches))}
    assert baselines["best uniform"].seconds_per_sample == pytest.approx(min(uniform), rel=1e-12)


def test_baselines_are_what_their_names_say() -> None:
    by_name = {baseline.name: baseline for baseline in search().baselines}
    fsdp = by_name["fsdp"].plan
    assert fsdp is not None
    assert {(s.tp, s.zero, s.remat) for _, s in fsdp.layers()} == {(1, 3, "none")}
    megatron = by_name["megatron 3d"].plan
    assert megatron is not None
    assert len({strategy for _, strategy in megatron.layers()}) == 1
    tensor = by_name["tp x dp"]
    assert tensor.plan is None  # a vocabulary of 5001 does not divide by two
    assert not tensor.fits


def test_baseline_that_does_not_fit_says_how_much_it_needs() -> None:
    fitting = {b.name: b for b in search().baselines}
    dp = fitting["dp"].peak_bytes
    assert dp is not None
    tight = {b.name: b for b in search(memory_bytes=dp // 2).baselines}
    assert not tight["dp"].fits
    assert tight["dp"].seconds_per_sample is None
    assert (tight["dp"].peak_bytes or 0) > dp // 2
