"""Step times on the emulated cluster, predicted beside measured, for the ledger.

Records are those of ``python -m benchmarks.emulated_cluster``: each holds the plan with the prediction that was made
before it ran. One that was taken while other work had more than ``CALM`` of the machine is shown and proves nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from galvatron_jax.record import RunRecord
from galvatron_jax.units import format_seconds

from ..emulated_cluster.plans import HELD_OUT

RECORDS = Path(__file__).parents[1] / "records" / "emulated"
CALM = 0.05
"""Largest share of the machine that other work may have taken meanwhile."""
MEDIAN_GOAL, WORST_GOAL, REGRET_GOAL = 0.05, 0.10, 0.03
"""Of the step time (median, worst), and of picking the plan that is predicted to be the fastest."""


def read_runs(folder: Path = RECORDS) -> dict[str, dict[str, RunRecord]]:
    """Return the records by cluster and rate, then by plan; fastest first."""
    found = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = [file for file in sorted(place.glob("*.json")) if "hardware" not in file.name]
        runs = {file.stem: msgspec.json.decode(file.read_bytes(), type=RunRecord) for file in files}
        found[place.name] = dict(sorted(runs.items(), key=lambda item: item[1].step_time_s))
    return {name: runs for name, runs in found.items() if runs}


def emulated_lines(runs: dict[str, dict[str, RunRecord]]) -> Iterator[str]:
    """Yield the section of the page."""
    yield "## Step time on the emulated cluster"
    yield ""
    yield "Nodes are network namespaces of one machine, with a core, two CPU devices and a rate-limited link each"
    yield "(`python -m benchmarks.emulated_cluster`, docs/design/0043). Predicted before the plan ran, from profiles"
    yield "that our own profilers measured on the same nodes."
    yield ""
    yield f"Goal: median error at most {MEDIAN_GOAL:.0%}, worst {WORST_GOAL:.0%}; the plan predicted to be the fastest"
    yield f"is the fastest measured, or within {REGRET_GOAL:.0%} of it. Records taken beside other work (more than"
    yield f"{CALM:.0%} of the machine) are no proof."
    yield ""
    yield "| cluster, link | plans | median error | worst | regret of the pick | other load | reached |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_summary(name, list(found.values())) for name, found in runs.items())
    for name, found in runs.items():
        yield ""
        yield f"| {name}: plan | measured | spread | predicted | error |"
        yield "|---|---|---|---|---|"
        yield from (_row(plan, record) for plan, record in found.items())
    yield ""
    yield "Plans are in the order of the clock; spread: half the distance between the quartiles; * held out."


def _summary(name: str, records: Sequence[RunRecord]) -> str:
    errors = [abs(record.time_error or 0.0) for record in records]
    regret = min(records, key=_predicted_s).step_time_s / records[0].step_time_s - 1
    load = max(record.machine_load or 0.0 for record in records)
    good = statistics.median(errors) <= MEDIAN_GOAL and max(errors) <= WORST_GOAL and regret <= REGRET_GOAL
    reached = "no proof" if load > CALM else "yes" if good else "no"
    return (
        f"| {name} | {len(records)} | {statistics.median(errors):.1%} | {max(errors):.1%} | {regret:.1%} |"
        f" {load:.0%} | {reached} |"
    )


def _row(plan: str, record: RunRecord) -> str:
    held = " *" if plan in {name.replace(" ", "-") for name in HELD_OUT} else ""
    return (
        f"| {plan}{held} | {format_seconds(record.step_time_s)} | {record.spread:.1%} |"
        f" {format_seconds(_predicted_s(record))} | {record.time_error or 0.0:+.1%} |"
    )


def _predicted_s(record: RunRecord) -> float:
    assert record.plan.predicted is not None, "the benchmark predicts before it runs"
    return record.plan.predicted.step_time_s
