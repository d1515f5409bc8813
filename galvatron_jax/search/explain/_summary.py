"""A plan in a few words, for tables that hold many."""

from __future__ import annotations

from collections import Counter

from ...plan import Plan, Strategy


def main_strategies(plan: Plan) -> list[tuple[Strategy, int]]:
    """Return the strategies of the most frequent layer kind with their layer counts, the most frequent first."""
    kinds = Counter(kind for kind, _ in plan.layers())
    main = kinds.most_common(1)[0][0]
    return Counter(strategy for kind, strategy in plan.layers() if kind == main).most_common()


def plan_summary(plan: Plan, *, stages: bool = True) -> str:
    """Return the plan in a few words, for example ``"2 stages 1f1b · 8 x 32 · zero3 dp8 (+1)"``.

    Stages and schedule (unless ``stages`` is false), microbatches and their samples, the most frequent strategy of the
    repeated layers, and how many further ones these use.
    """
    words = []
    if stages and len(plan.stages) > 1:
        chunks = f" x {plan.chunks} chunks" if plan.chunks > 1 else ""
        words.append(f"{plan.slices} stages {plan.schedule}{chunks}")
    words.append(f"{plan.microbatches} x {plan.microbatch_size} samples")
    strategies = main_strategies(plan)
    more = f" (+{len(strategies) - 1})" if len(strategies) > 1 else ""
    words.append(f"{strategies[0][0]}{more}")
    return " · ".join(words)


def peak_of(plan: Plan) -> int:
    """Return the predicted peak of the fullest stage in bytes."""
    assert plan.predicted is not None
    return max(stage.peak_bytes for stage in plan.predicted.stages)


def seconds_per_sample(plan: Plan) -> float:
    """Return the predicted step time over the global batch."""
    assert plan.predicted is not None
    return plan.predicted.step_time_s / plan.global_batch
