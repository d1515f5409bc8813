"""The search as one function: from profiles and a cluster to a plan with its proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from ..cluster import Cluster
from ..cost import memory_budget
from ..errors import GalvatronError
from ..plan import Plan, ScheduleName, Training
from ..profile import HardwareProfile, ModelProfile
from ._baselines import Baseline, price_baselines
from ._engine import LAST_EFFORT_S, Engine, Outcome, Stop
from ._infeasible import explain_infeasible
from ._plan_building import certified, outcome_plan, peak_bytes
from ._pricing import PriceList, Problem
from ._rules import Rule
from ._space import Limits, default_batches
from ._split import Split, split_layers

MAX_GLOBAL_BATCH = 1_000_000
MAX_BATCHES = 64
"""Beyond these a batch list is a slip of the keyboard."""

FIRST_PLAN_S = 5.0
"""How much longer than its time limit a search may go on that has no plan yet."""

ROUNDED_CATEGORIES = 6
"""Memory categories of a stage (``cost.stage_memory``), each rounded up to whole bytes."""

Watch = Callable[[float | None], bool]
"""Called often with the best seconds per sample so far (None: no plan yet); returns True to stop the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A plan and what stands beside it."""

    plan: Plan
    baselines: tuple[Baseline, ...]
    """Priced without the rules, so that they show what these cost."""
    global_batches: tuple[int, ...]
    candidates: int
    """(global batch, microbatches, stages, schedule) in the space."""
    solved: int
    """Of these, solved exactly; bounds excluded the others."""
    stopped: bool
    """The search ended before the proof was complete; the plan's certificate holds the gap."""
    search_s: float
    """Wall-clock seconds of the search, baselines included."""
    split: Split
    """The problem that was solved."""


def find_plan(
    model: ModelProfile,
    cluster: Cluster,
    hardware: HardwareProfile,
    *,
    global_batches: Sequence[int] | None = None,
    training: Training | None = None,
    memory_bytes: int | None = None,
    max_stages: int | None = None,
    max_tp: int | None = None,
    microbatches: Sequence[int] | None = None,
    schedules: Sequence[ScheduleName] | None = None,
    rules: Sequence[Rule] = (),
    time_limit_s: float | None = None,
    watch: Watch | None = None,
) -> SearchResult:
    """Return the plan with the most samples per second in the stated space (``_space``), proven.

    Deterministic: the same arguments give the same plan, unless a time limit or ``watch`` ended the search.

    Args:
        model: The model's profile, at the sequence length and dtype to train with.
        cluster: The devices.
        hardware: What one device and the links can do.
        global_batches: Samples per optimizer step to choose from; None: ``default_batches``.
        training: What the optimizer keeps; None: AdamW with two float32 moments.
        memory_bytes: Budget of one device; None: its capacity less the reserve (``cost.memory_budget``).
        max_stages: Most pipeline stages; 1 for no pipeline.
        max_tp: Largest tensor-parallel degree.
        microbatches: Allowed microbatch counts; None: all divisors of the batch.
        schedules: Allowed schedules; None: all.
        rules: What layers may use, made by ``pin`` and ``forbid``, for example ``[pin("layers 0-3: tp=8")]``.
        time_limit_s: End the search after so many seconds; ``FIRST_PLAN_S`` later where it has no plan yet.
        watch: Called often; may end the search.

    Raises:
        GalvatronError: an argument is out of range; ``watch`` ended the search before it had a plan; or the time limit
            did, and no baseline fits (or there are rules, which baselines do not keep).
        InfeasibleError: nothing in the space fits the memory budget.
        DocumentError: the hardware profile lacks the rate of a dtype that the model computes in.
    """
    start = time.monotonic()
    batches = _checked_batches(global_batches or default_batches(cluster, model))
    limits = Limits(
        max_stages=max_stages,
        max_tp=max_tp,
        microbatches=None if microbatches is None else tuple(microbatches),
        schedules=None if schedules is None else tuple(schedules),
        rules=tuple(rules),
    )
    problem = Problem(
        model=model,
        cluster=cluster,
        hardware=hardware,
        training=training or Training(),
        budget_bytes=memory_budget(hardware) if memory_bytes is None else memory_bytes,
        limits=limits,
    )
    return _solve(split_layers(problem), batches, start, time_limit_s, watch)


def _solve(
    split: Split, batches: tuple[int, ...], start: float, time_limit_s: float | None, watch: Watch | None
) -> SearchResult:
    engine = Engine(split.problem, batches, _poll(start, time_limit_s, watch))
    outcome, plan = search(engine)
    if plan is None and not outcome.stopped:
        raise explain_infeasible(engine)
    ruled = bool(split.problem.limits.rules)
    unruled = Engine(split.given, batches) if ruled else engine
    baselines = price_baselines(unruled, LAST_EFFORT_S if outcome.stopped else inf)
    return SearchResult(
        plan=split.restore(plan or _usual_plan(() if ruled or (watch and watch(None)) else baselines, outcome)),
        baselines=baselines,
        global_batches=batches,
        candidates=outcome.candidates,
        solved=outcome.solved,
        stopped=outcome.stopped,
        search_s=time.monotonic() - start,
        split=split,
    )


def _usual_plan(baselines: Sequence[Baseline], outcome: Outcome) -> Plan:
    """Return the fastest baseline, with what a search that was stopped without a plan of its own has proven."""
    fitting = [(b.seconds_per_sample, b.plan) for b in baselines if b.plan and b.seconds_per_sample is not None]
    if not fitting:
        raise GalvatronError(
            "the search was stopped before it had a plan",
            action="give it more time, or less to search: --max-tp, --no-pp, --space, --pin",
        )
    return certified(min(fitting, key=lambda pair: pair[0])[1], outcome.bound_s_per_sample)


def best_plan(
    split: Split, batches: Sequence[int], *, prices: PriceList | None = None, below: float = inf
) -> Plan | None:
    """Return the fastest plan of ``split``, for the questions that ask for many plans; None when nothing fits.

    Args:
        split: The problem.
        batches: Global batches to choose from.
        prices: Of a problem that differs in its memory budget or batches only; None makes them.
        below: Only plans that take fewer seconds per sample count.
    """
    engine = Engine(split.problem, batches, below_s_per_sample=below)
    if prices is not None:
        engine.prices = prices
    _, plan = search(engine)
    return None if plan is None else split.restore(plan)


def search(engine: Engine) -> tuple[Outcome, Plan | None]:
    """Run the engine and write its plan down, which fits the budget to the last byte."""
    outcome = engine.run()
    plan = outcome_plan(engine.problem, outcome)
    if plan is not None and peak_bytes(plan) > engine.problem.budget_bytes:
        # Each category of a stage's memory is rounded up to whole bytes: a plan that fills the budget to the last byte
        # can exceed it by less than one byte for each.
        tighter = replace(engine.problem, budget_bytes=engine.problem.budget_bytes - ROUNDED_CATEGORIES)
        again = Engine(tighter, engine.global_batches, engine.poll, engine.below_s_per_sample)
        again.prices = engine.prices
        outcome = again.run()
        plan = outcome_plan(engine.problem, outcome)
    return outcome, plan


def _poll(start: float, time_limit_s: float | None, watch: Watch | None) -> Callable[[float | None], None]:
    def poll(best: float | None) -> None:
        patience_s = FIRST_PLAN_S if best is None else 0.0
        expired = time_limit_s is not None and time.monotonic() - start > time_limit_s + patience_s
        if expired or (watch is not None and watch(best)):
            raise Stop

    return poll


def _checked_batches(batches: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted(set(batches)))
    if not found or found[0] < 1 or found[-1] > MAX_GLOBAL_BATCH or len(found) > MAX_BATCHES:
        raise GalvatronError(
            f"got global batches {list(batches)[:8]}",
            expected=f"up to {MAX_BATCHES} whole numbers from 1 to {MAX_GLOBAL_BATCH}",
            where="--global-batch",
            action="for example --global-batch 64,128",
        )
    return found
