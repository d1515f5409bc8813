"""Space: every choice that the search may make, and nothing else.

A plan of version 1 is chosen from

* a global batch of the list that the user gave, and a microbatch count ``m`` that divides it;
* a number of pipeline stages ``P`` that divides the device list into whole nodes or even parts of a node, with any
  boundaries between layers (1F1B schedule; every stage holds at least one layer);
* for each layer a strategy: ``tp * dp`` is the number of devices of the stage, with or without ``sp``, ZeRO 0-3, with
  or without full remat; ``plan.strategy_violations`` decides which are legal.

Embedding and head are layers like the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..cluster import Cluster, divisors
from ..errors import ClusterError
from ..plan import Remat, ScheduleName, Strategy, strategy_violations
from ..profile import LayerKind, ModelProfile
from ._rules import Rule

ZERO_LEVELS = (0, 1, 2, 3)
REMATS: tuple[Remat, ...] = ("none", "full")

DEFAULT_SAMPLES_PER_DEVICE = (1, 2, 4, 8, 16, 32)
DEFAULT_MAX_TOKENS = 16 * 2**20
"""Largest batch in common use: Llama 3 405B ends with 16 M tokens per step (Grattafiori et al. 2024, section 3.4.1)."""
DEFAULT_BATCHES = 3


class Layout(NamedTuple):
    """Where the stream lies between two layers: neighbours that agree exchange nothing."""

    tp: int
    sp: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user took out of the space."""

    max_stages: int | None = None
    max_tp: int | None = None
    microbatches: tuple[int, ...] | None = None
    """Allowed microbatch counts; None allows all divisors of the global batch."""
    stages: tuple[int, ...] | None = None
    """Allowed numbers of stages; None allows all."""
    schedules: tuple[ScheduleName, ...] | None = None
    """Allowed schedules; None allows all that the search knows."""
    rules: tuple[Rule, ...] = ()
    """Which strategies the layers of a kind may use."""

    def allows(self, kind: str, strategy: Strategy) -> bool:
        """Return whether no rule keeps a layer of ``kind`` from ``strategy``."""
        return all(rule.allows(kind, strategy) for rule in self.rules)


def default_batches(cluster: Cluster, model: ModelProfile) -> tuple[int, ...]:
    """Return the global batches to try when the user names none.

    They are 1, 2, 4, ... 32 samples per device, of which the largest three within ``DEFAULT_MAX_TOKENS`` tokens: larger
    batches are always faster per sample, so a list without an upper end would have no answer.
    """
    batches = [cluster.devices * samples for samples in DEFAULT_SAMPLES_PER_DEVICE]
    within = [batch for batch in batches if batch * model.seq <= DEFAULT_MAX_TOKENS]
    return tuple(within[-DEFAULT_BATCHES:] or batches[:1])


def stage_counts(cluster: Cluster, model: ModelProfile, limits: Limits) -> tuple[int, ...]:
    """Return the numbers of pipeline stages in the space, ascending."""
    most = min(model.layer_count, limits.max_stages or model.layer_count)
    allowed = divisors(cluster.devices) if limits.stages is None else limits.stages
    return tuple(
        count for count in divisors(cluster.devices) if count <= most and count in allowed and _splits(cluster, count)
    )


def microbatch_counts(global_batch: int, limits: Limits) -> tuple[int, ...]:
    """Return the microbatch counts in the space, ascending."""
    counts = divisors(global_batch)
    return counts if limits.microbatches is None else tuple(m for m in counts if m in limits.microbatches)


def stage_strategies(cluster: Cluster, devices: int, limits: Limits) -> tuple[Strategy, ...]:
    """Return all strategies of a stage of ``devices`` devices, legal for a layer or not, the simplest first."""
    found = []
    for tp in cluster.tensor_degrees(devices):
        if limits.max_tp is None or tp <= limits.max_tp:
            dp = devices // tp
            found += [
                Strategy(tp=tp, sp=sp, dp=dp, zero=zero, remat=remat)
                for sp in ((False, True) if tp > 1 else (False,))
                for remat in REMATS
                for zero in (ZERO_LEVELS if dp > 1 else (0,))
            ]
    return tuple(found)


def legal(kind: LayerKind, choices: Iterable[Strategy], microbatch: int) -> tuple[Strategy, ...]:
    """Return those of ``choices`` that a layer of ``kind`` allows with microbatches of ``microbatch`` samples."""
    return tuple(strategy for strategy in choices if not strategy_violations(kind, strategy, microbatch))


def layout_of(strategy: Strategy) -> Layout:
    """Return the layout of the stream that ``strategy`` reads and leaves."""
    return Layout(strategy.tp, strategy.sp)


def _splits(cluster: Cluster, stages: int) -> bool:
    try:
        cluster.slice_shape(cluster.devices // stages)
    except ClusterError:
        return False
    return True
