"""Our search against Hetu-Galvatron's, on its own profile files and at its settings.

    python -m benchmarks.galvatron_search > benchmarks/galvatron_search_DATE.md

For every setting of the peer's reference list: its plan is priced by our cost model on its tables; then our search runs
in about its space (``tests.search.peer.like_for_like``) with as much memory as its search may use, or as its plan needs
by our count where that is more. CPU seconds are of the search in one process with warm imports, the better of two.
"""

from __future__ import annotations

import time

from galvatron_jax.plan import Plan, Training
from galvatron_jax.search._engine import Engine, Stop
from galvatron_jax.search._find import search
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._space import Limits
from galvatron_jax.search.explain import plan_summary
from tests.search.peer import Reference, like_for_like, peer_plan, peer_problem, references

REPEATS = 2
FASTER = 100
"""A search is stopped after the peer's CPU time over this, with the gap that it has proven."""

COLUMNS = (
    "setting", "peer CPU s", "ours CPU s", "times less", "peer's plan, samples/s", "ours, samples/s", "better by",
    "proven gap", "peer's own figure", "our plan",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in references():
        print(_row(row), flush=True)


def _row(row: Reference) -> str:
    model, hardware = peer_problem(row)
    reference = peer_plan(row, model, hardware).predicted
    assert reference is not None
    budget = max(row.usable_bytes, *(stage.peak_bytes for stage in reference.stages))
    tries = [_search(row, budget) for _ in range(REPEATS)]
    seconds, plan = min(tries, key=lambda tried: tried[0])
    certificate = plan.certificate
    assert plan.predicted is not None
    assert certificate is not None
    theirs, ours = row.global_batch / reference.step_time_s, row.global_batch / plan.predicted.step_time_s
    cells = [
        row.setting, f"{row.search_cpu_s:.1f}", f"{seconds:.2f}", f"{row.search_cpu_s / seconds:.0f}",
        f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs - 1:.1%}", f"{certificate.gap:.1%}",
        f"{row.samples_per_s:.2f}", plan_summary(plan),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _search(row: Reference, budget: int) -> tuple[float, Plan]:
    model, hardware = peer_problem(row)
    limits = Limits(
        max_stages=8 if row.pipeline else 1,
        microbatches=None if row.microbatches is None else (row.microbatches,),
        schedules=("1f1b",),
        rules=tuple(like_for_like()),
    )
    problem = Problem(
        model=model,
        cluster=row.cluster,
        hardware=hardware,
        training=Training(),
        budget_bytes=budget,
        limits=limits,
    )
    start = time.process_time()

    def poll(best: float | None) -> None:
        if best is not None and time.process_time() - start > row.search_cpu_s / FASTER:
            raise Stop

    _, plan = search(Engine(problem, (row.global_batch,), poll))
    assert plan is not None
    return time.process_time() - start, plan


if __name__ == "__main__":
    main()
