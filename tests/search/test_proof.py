"""``--verify``: the chain of plans, with compilers that say what the test wants, and once with the real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.models import load_model_profile
from galvatron_jax.plan import Plan, load_plan
from galvatron_jax.search._cli import main
from galvatron_jax.search._find import SearchResult, find_plan
from galvatron_jax.search._proof import MOST_PLANS, Verdict, _rejection, prove, rejection_lines

BUDGET = 2**33


def search(memory_bytes: int) -> SearchResult:
    return find_plan(
        load_model_profile("llama-tiny"),
        parse_cluster("1x2"),
        load_hardware("h100"),
        global_batches=(8,),
        memory_bytes=memory_bytes,
        max_stages=1,
    )


@pytest.fixture(scope="module")
def first() -> SearchResult:
    return search(BUDGET)


def verdict(plan: Plan, missing_bytes: int) -> Verdict:
    budget = plan.memory_budget_bytes
    assert budget is not None
    problems = [f"{missing_bytes} bytes more than the budget"] if missing_bytes else []
    stage = {"stage": 0, "problems": problems, "compiled_allocated_bytes": budget + missing_bytes}
    return {"fits": not missing_bytes, "stages": [{**stage, "budget_bytes": budget}]}


def estimate(result: SearchResult) -> int:
    assert result.plan.predicted is not None
    return max(stage.peak_bytes for stage in result.plan.predicted.stages)


def test_plan_that_fits_is_the_plan_of_the_search(first: SearchResult) -> None:
    proved = prove(first, load_hardware("h100"), search, lambda plan: verdict(plan, 0))
    assert proved.result is first
    assert proved.rejected == ()


def test_next_plan_is_estimated_lower_by_what_was_missing_and_judged_by_the_users_budget(first: SearchResult) -> None:
    missing, seen = estimate(first) // 20, list[Plan]()

    def verify(plan: Plan) -> Verdict:
        seen.append(plan)
        return verdict(plan, missing if len(seen) == 1 else 0)

    proved = prove(first, load_hardware("h100"), search, verify)
    assert estimate(proved.result) <= estimate(first) - missing
    assert [plan.memory_budget_bytes for plan in seen] == [BUDGET, BUDGET]
    assert proved.result.plan.certificate is None
    (line,) = rejection_lines(proved.rejected)
    assert f"stage 0: {missing} bytes more than the budget" in line


def test_chain_ends_and_says_what_each_plan_lacked(first: SearchResult) -> None:
    with pytest.raises(InfeasibleError, match="plan 1: stage 0: 1 bytes more") as caught:
        prove(first, load_hardware("h100"), search, lambda plan: verdict(plan, 1))
    assert f"plan {MOST_PLANS}:" in caught.value.message


def test_nothing_within_the_smaller_budget_ends_the_chain(first: SearchResult) -> None:
    with pytest.raises(InfeasibleError, match="no other plan has a smaller estimate"):
        prove(first, load_hardware("h100"), search, lambda plan: verdict(plan, BUDGET))


@pytest.mark.parametrize("words", [["--profile", "p.json"], ["--mesh", "1x2,1x4"]])
def test_what_cannot_be_compiled_is_refused_before_the_search(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--mesh", "1x2", *words, "--verify"]) == 2
    assert "--verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--verify", "--profile", "p.json"], "expected --verify-model MODULE:FUNCTION"),
        (["--verify-model", "mine:llama"], "expected --verify beside it"),
        (["--verify", "--verify-model", "mine:llama"], "expected --verify and --profile FILE beside it"),
    ],
)
def test_model_to_compile_belongs_to_a_profile(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--mesh", "1x2", *words]) == 2
    assert problem in capsys.readouterr().err


def test_stage_of_a_pipeline_that_lacks_most_decides_the_next_budget(first: SearchResult) -> None:
    """Two stages fail: the next search has room for the worse one, and both are named."""
    plan = first.plan
    assert plan.predicted is not None
    stages = plan.predicted.stages * 2
    piped = msgspec.structs.replace(plan, predicted=msgspec.structs.replace(plan.predicted, stages=stages))
    failed = [
        {
            "stage": k,
            "problems": [f"{missing} bytes"],
            "compiled_allocated_bytes": BUDGET + missing,
            "budget_bytes": BUDGET,
        }
        for k, missing in enumerate((10, 30))
    ]
    rejection = _rejection(piped, {"fits": False, "stages": failed})
    assert rejection.next_budget_bytes == stages[0].peak_bytes - 30
    assert rejection.problems == ("stage 0: 10 bytes", "stage 1: 30 bytes")


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="XLA's GPU compiler is not installed")
def test_verified_plan_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command; scores of attention are priced as they are compiled."""
    out = tmp_path / "plan.json"
    words = ["--mesh", "1x2", "--gpu", "h100", "--model", "llama-tiny", "--global-batch", "8", "--no-pp"]
    assert main([*words, "--attention", "xla", "--verify", "--out", str(out)]) == 0
    assert load_plan(out).certificate is not None
    assert "compiling for 1x2 h100" in capsys.readouterr().err
