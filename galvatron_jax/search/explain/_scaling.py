"""What to rent: the best plan on each of several clusters, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...cluster import Cluster
from ...errors import InfeasibleError
from ...plan import Plan
from .._find import SearchResult
from ._summary import plan_summary

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The best plan on one cluster."""

    mesh: str
    devices: int
    plan: Plan | None
    """None when nothing fits."""
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_currency_unit: float | None
    """Tokens for one unit of the currency in which the price was given."""
    summary: str


def compare_clusters(
    clusters: Sequence[Cluster], find: Callable[[Cluster], SearchResult], price_per_hour: float | None
) -> tuple[Scale, ...]:
    """Return the best plan on each cluster.

    Args:
        clusters: The clusters.
        find: The search on one of them.
        price_per_hour: Price of one GPU hour in any currency.

    Raises:
        InfeasibleError: nothing fits on any of them.
    """
    rows, failures = [], []
    for cluster in clusters:
        try:
            rows.append(_row(cluster, find(cluster).plan, price_per_hour))
        except InfeasibleError as error:
            failures.append(error)
            reason = error.problem.partition(": ")[2] or error.problem
            rows.append(_nothing(cluster, reason.partition(" (")[0]))
    if len(failures) == len(rows):
        raise failures[-1]
    return tuple(rows)


def _row(cluster: Cluster, plan: Plan, price_per_hour: float | None) -> Scale:
    assert plan.predicted is not None
    per_gpu = plan.predicted.tokens_per_s / cluster.devices
    return Scale(
        mesh=cluster.mesh,
        devices=cluster.devices,
        plan=plan,
        tokens_per_s=plan.predicted.tokens_per_s,
        tokens_per_s_per_gpu=per_gpu,
        tokens_per_currency_unit=None if price_per_hour is None else per_gpu * SECONDS_PER_HOUR / price_per_hour,
        summary=plan_summary(plan),
    )


def _nothing(cluster: Cluster, reason: str) -> Scale:
    return Scale(
        mesh=cluster.mesh,
        devices=cluster.devices,
        plan=None,
        tokens_per_s=0.0,
        tokens_per_s_per_gpu=0.0,
        tokens_per_currency_unit=None,
        summary=reason,
    )
