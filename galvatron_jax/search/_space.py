"""Space: every choice that the search may make, and nothing else.

A plan is chosen from

* a global batch of the list that the user gave, and a microbatch count ``m`` that divides it;
* a number ``S`` of device slices that divides the device list into whole nodes or even parts of a node;
* a schedule: 1f1b; gpipe with S > 1 and m > 1 (else the same as 1f1b); interleaved-1f1b with S > 1, ``m`` a multiple of
  S and 2 to ``MAX_CHUNKS`` chunks on each slice;
* boundaries between the stages. 1f1b and gpipe: any, S stages with at least one layer each. Interleaved: S * chunks
  stages, stage k on slice k % S, cut evenly by number of layers or by work, at any phase (``even_cuts``). Chunks exist
  to make equal small pieces, so plans with unequal ones are left out: there are too many to prove anything about them;
* for each layer a strategy. The trailing mesh axes (any product of the last prime factors, ``Cluster.tensor_degrees``)
  carry tensor parallelism, with or without ``sp``, or Ulysses; the leading ones data parallelism, with ZeRO 0-3 over
  all ranks or (hsdp) over the inner ones, any product of leading axes being the replicas; remat none, dots or full.
  ``plan.strategy_violations`` decides which of these are legal for a layer. Interleaved: the layers of one kind on one
  slice share a strategy, in whichever chunk they are.

Embedding and head are layers like the others. Not in the space: a degree that is no product of trailing axes (tp 3 on
six devices of one node, whose axes are 3 and 2), context and expert parallelism, offload, and stages of different
device counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ..cluster import Cluster, divisors
from ..errors import ClusterError
from ..plan import Remat, ScheduleName, Strategy, strategy_violations
from ..profile import LayerKind, ModelProfile
from ._rules import Rule

ZERO_LEVELS = (0, 1, 2, 3)
REMATS: tuple[Remat, ...] = ("none", "dots", "full")
MAX_CHUNKS = 8
"""Stages on one slice: the bubble is 1 / chunks of what it is without, the messages are that many times more."""

DEFAULT_SAMPLES_PER_DEVICE = (1, 2, 4, 8, 16, 32)
DEFAULT_MAX_TOKENS = 16 * 2**20
"""Largest batch in common use: Llama 3 405B ends with 16 M tokens per step (Grattafiori et al. 2024, section 3.4.1)."""
DEFAULT_BATCHES = 3


class Layout(NamedTuple):
    """Where the stream lies between two layers: neighbours that agree exchange nothing (``cost.StreamLayout``)."""

    inner: int
    """Trailing ranks that share one sample: tp or ulysses."""
    sequence: bool
    """They hold parts of the sequence; otherwise copies."""


class Shape(NamedTuple):
    """How a pipeline runs, whatever its stages hold."""

    slices: int
    schedule: ScheduleName
    chunks: int

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.slices * self.chunks


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
    """Return the numbers of device slices in the space, ascending."""
    most = min(model.layer_count, limits.max_stages or model.layer_count)
    allowed = divisors(cluster.devices) if limits.stages is None else limits.stages
    return tuple(
        count for count in divisors(cluster.devices) if count <= most and count in allowed and _splits(cluster, count)
    )


def shapes(slices: int, microbatches: int, layers: int, limits: Limits) -> tuple[Shape, ...]:
    """Return the schedules in the space, the simplest first."""
    found = [Shape(slices, "1f1b", 1)]
    if slices > 1 and microbatches > 1:
        found.append(Shape(slices, "gpipe", 1))
    if slices > 1 and microbatches % slices == 0:
        most = min(MAX_CHUNKS, layers // slices)
        found += [Shape(slices, "interleaved-1f1b", chunks) for chunks in range(2, most + 1)]
    # with one slice every schedule runs the same actions
    return tuple(s for s in found if slices == 1 or limits.schedules is None or s.schedule in limits.schedules)


def even_cuts(stages: int, work: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the boundaries of interleaved stages in the space: rows ``(0, ..., layers)`` in lexical order.

    With K stages, L layers and any phase ``o < K``: stage k begins at layer ``floor((k L + o) / K)``, or at the layer
    nearest to the share ``(k - o / K) / K`` of the work.

    Args:
        stages: How many.
        work: Seconds of the first ``n`` layers, at index ``n``.
    """
    layers, rising = len(work) - 1, np.array(work)
    stage, phase = np.arange(1, stages), np.arange(stages)[:, None]
    by_number = (stage * layers + phase) // stages
    by_work = _nearest(rising, (stage - phase / stages) / stages * rising[-1])
    inner = np.concatenate([by_number, by_work])
    ends = np.zeros((len(inner), 1), np.int64), np.full((len(inner), 1), layers)
    cuts = np.concatenate([ends[0], inner, ends[1]], axis=1)
    return np.unique(cuts[(np.diff(cuts, axis=1) > 0).all(axis=1)], axis=0)


def _nearest(rising: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Index of the entry nearest to each value; the first of equally near ones."""
    at = np.searchsorted(rising, values)
    below = rising[np.maximum(at - 1, 0)]
    return np.where((at == 0) | (rising[at] - values < values - below), at, at - 1)


def microbatch_counts(global_batch: int, limits: Limits) -> tuple[int, ...]:
    """Return the microbatch counts in the space, ascending."""
    counts = divisors(global_batch)
    return counts if limits.microbatches is None else tuple(m for m in counts if m in limits.microbatches)


def stage_strategies(cluster: Cluster, devices: int, limits: Limits) -> tuple[Strategy, ...]:
    """Return all strategies of a stage of ``devices`` devices, legal for a layer or not, the simplest first."""
    degrees = cluster.tensor_degrees(devices)
    found = []
    for degree in degrees:
        spreads = [Strategy(tp=degree)] if limits.max_tp is None or degree <= limits.max_tp else []
        if degree > 1:
            spreads += [replace(spread, sp=True) for spread in spreads] + [Strategy(ulysses=degree)]
        found += [
            replace(spread, dp=devices // degree, remat=remat, zero=zero, replicas=replicas)
            for spread in spreads
            for remat in REMATS
            for zero, replicas in _zero_choices(devices // degree, spread.ulysses, devices, degrees)
        ]
    return tuple(found)


def _zero_choices(dp: int, ulysses: int, devices: int, degrees: tuple[int, ...]) -> list[tuple[int, int]]:
    """(zero, replicas) of ``dp * ulysses`` ranks with the same weights."""
    if dp * ulysses == 1:
        return [(0, 1)]
    leading = [devices // degree for degree in reversed(degrees)]
    replicas = [r for r in leading if dp % r == 0 and dp * ulysses > r]
    return [(0, 1)] + [(zero, r) for zero in ZERO_LEVELS[1:] for r in replicas]


def legal(kind: LayerKind, choices: Iterable[Strategy], microbatch: int) -> tuple[Strategy, ...]:
    """Return those of ``choices`` that a layer of ``kind`` allows with microbatches of ``microbatch`` samples."""
    return tuple(strategy for strategy in choices if not strategy_violations(kind, strategy, microbatch))


def layout_of(strategy: Strategy) -> Layout:
    """Return the layout of the stream that ``strategy`` reads and leaves."""
    return Layout(strategy.inner, strategy.sp or strategy.ulysses > 1)


def _splits(cluster: Cluster, stages: int) -> bool:
    try:
        cluster.slice_shape(cluster.devices // stages)
    except ClusterError:
        return False
    return True
