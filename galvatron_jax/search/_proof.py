"""``--verify``: let XLA's GPU compiler prove that the plan fits; where it does not, search again with less memory.

The compiler runs in a process of its own (``python -m galvatron_jax.verify PLAN --json``), since the planner never
imports jax. Let a stage be estimated at e bytes and allocate a bytes as compiled, with a budget of b. If the estimate
of other plans is off by as much, they fit when their estimate is at most

    e - (a - b)        what was estimated, less what was missing

so that is the budget of the next search: below e, hence the plan that failed is never found again. Every plan is judged
by the budget that the user gave. The chain ends after ``MOST_PLANS`` plans, or when nothing fits the smaller budget.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .._document import encode
from ..cost import memory_budget
from ..errors import GalvatronError, InfeasibleError, ToolchainError
from ..plan import Plan, save_plan
from ..profile import HardwareProfile
from ..units import format_gib
from ._find import SearchResult

MOST_PLANS = 4
FITS, BAD_INPUT, DOES_NOT_FIT, INTERRUPTED = 0, 2, 3, 130
"""Exit statuses of the command."""

Verdict = dict[str, Any]
"""What ``python -m galvatron_jax.verify --json`` prints."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A plan that did not fit as compiled."""

    step_time_s: float
    problems: tuple[str, ...]
    next_budget_bytes: int


@dataclass(frozen=True, slots=True)
class Proved:
    """The first plan that fits as compiled."""

    result: SearchResult
    """Its plan has the budget of the user; no certificate unless it is the plan of the first search."""
    rejected: tuple[Rejection, ...]


def prove(
    first: SearchResult,
    hardware: HardwareProfile,
    search: Callable[[int], SearchResult],
    verify: Callable[[Plan], Verdict],
) -> Proved:
    """Return the first plan of the chain that the compiler says fits.

    Args:
        first: What was found with the user's budget.
        hardware: What it was found for.
        search: From a budget in bytes to the best plan within it.
        verify: From a plan to its verdict (``run_verify``).

    Raises:
        InfeasibleError: no plan of the chain fits; says what each one lacked.
    """
    budget = first.plan.memory_budget_bytes or memory_budget(hardware)
    result, rejected = first, list[Rejection]()
    while True:
        verdict = verify(result.plan)
        if verdict["fits"]:
            return Proved(result, tuple(rejected))
        rejected.append(_rejection(result.plan, verdict))
        if len(rejected) == MOST_PLANS:
            raise _nothing_fits(rejected, f"{MOST_PLANS} plans were compiled")
        try:
            found = search(rejected[-1].next_budget_bytes)
        except InfeasibleError:
            raise _nothing_fits(rejected, "no other plan has a smaller estimate") from None
        plan = msgspec.structs.replace(found.plan, memory_budget_bytes=budget, certificate=None)
        result = dataclasses.replace(found, plan=plan)


def run_verify(plan: Plan, hardware: HardwareProfile, model: str = "") -> Verdict:
    """Compile a plan in a process of its own; return the verdict.

    Args:
        plan: The plan.
        hardware: What it was priced with.
        model: ``MODULE:FUNCTION`` of its model; empty: the preset that the plan names.

    Raises:
        ToolchainError: the compiler is missing or failed.
        GalvatronError: this kind of plan cannot be verified.
        KeyboardInterrupt: the user ended it.
    """
    with tempfile.TemporaryDirectory(prefix="galvatron-search-") as name:
        plan_file = save_plan(plan, Path(name) / "plan.json")
        hardware_file = Path(name) / "hardware.json"
        hardware_file.write_text(encode(hardware))
        command = [sys.executable, "-m", "galvatron_jax.verify", str(plan_file), "--json", "--quiet"]
        command += ["--hardware", str(hardware_file), *(["--model", model] if model else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode in (FITS, DOES_NOT_FIT):
        verdict: Verdict = json.loads(done.stdout)
        return verdict
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    problem = done.stderr.strip().removeprefix("galvatron_jax.verify: error: ").replace(f"{plan_file}: ", "")
    kind = GalvatronError if done.returncode == BAD_INPUT else ToolchainError
    raise kind(f"the plan could not be verified: {problem}", where="--verify", action="no plan was written")


def _rejection(plan: Plan, verdict: Verdict) -> Rejection:
    assert plan.predicted is not None, "the search predicts"
    failed = [stage for stage in verdict["stages"] if stage["problems"]]
    limits = [
        plan.predicted.stages[stage["stage"]].peak_bytes
        - max(1, stage["compiled_allocated_bytes"] - stage["budget_bytes"])
        for stage in failed
    ]
    problems = tuple(f"stage {stage['stage']}: {problem}" for stage in failed for problem in stage["problems"])
    return Rejection(plan.predicted.step_time_s, problems, max(1, min(limits)))


def _nothing_fits(rejected: Sequence[Rejection], why: str) -> InfeasibleError:
    told = "; ".join(f"plan {n}: {', '.join(r.problems)}" for n, r in enumerate(rejected, 1))
    return InfeasibleError(
        f"no plan was proved to fit: {told}",
        where="--verify",
        action=f"{why}, and none was written; allow more stages or microbatches, or lower --global-batch",
    )


def rejection_lines(rejected: Sequence[Rejection]) -> list[str]:
    """Return what the user must know of plans that were faster on paper."""
    return [
        f"plan {number} ({r.step_time_s * 1e3:.1f} ms predicted) does not fit as compiled: {', '.join(r.problems)};"
        f" searched again within {format_gib(r.next_budget_bytes)}"
        for number, r in enumerate(rejected, 1)
    ]
