"""Prices: every legal strategy of every layer kind as rows of numbers, made once per stage size and microbatch.

A layer's cost depends on the devices of its stage, the samples of a microbatch and whether gradients accumulate, but
not on where in the pipeline the stage stands; so one table serves all stages, stage counts and microbatch counts that
agree in these. A strategy that another one of the same layout beats or equals in every number can never be missed, so
it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..cluster import Cluster
from ..cost import (
    Setting,
    boundary_bytes,
    estimate_layer,
    estimate_relayout,
    estimate_transfer,
    stream_arrays,
    stream_sizes,
    wire_strategy,
)
from ..plan import Strategy, Training
from ..profile import HardwareProfile, LayerKind, ModelProfile
from ._knapsack import Floats, Ints
from ._space import Layout, Limits, layout_of, legal, stage_strategies

MANY_ROWS = 256
"""Above this, all pairs at once cost more than one row after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is given: everything that no choice of the search changes."""

    model: ModelProfile
    cluster: Cluster
    hardware: HardwareProfile
    training: Training
    budget_bytes: float
    limits: Limits


@dataclass(frozen=True, slots=True, eq=False)
class KindPrices:
    """One row per undominated strategy of a layer kind; seconds and bytes of one layer on one device."""

    name: str
    strategies: tuple[Strategy, ...]
    layout: Ints
    """Index into ``Prices.layouts``."""
    forward_s: Floats
    backward_s: Floats
    step_end_s: Floats
    state_bytes: Floats
    residual_bytes: Floats
    live_bytes: Floats
    every: dict[Strategy, Floats]
    """The six numbers above of all legal strategies, beaten ones included: baselines are not chosen to be good."""


@dataclass(frozen=True, slots=True, eq=False)
class Relayouts:
    """Seconds to change the layout of the stream that a layer kind takes, by (layout before, layout after)."""

    forward_s: Floats
    backward_s: Floats
    from_wire_s: tuple[Floats, Floats]
    """(forward, backward) by the layout of a stage's first layer."""
    to_wire_s: tuple[Floats, Floats]
    """(forward, backward) by the layout of the last layer of the stage before."""
    transfer_s: Floats
    """Seconds of a message by stage boundary."""
    message_bytes: float
    """Size of one message on one device."""


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a stage can hold: all distinct layer counts by kind."""

    counts_SK: Floats
    of_interval: Ints
    """Row of ``counts_SK`` by (first layer, end); -1 where the interval is empty."""

    @classmethod
    def of(cls, order: Ints, kinds: int) -> Contents:
        """Count the layers of every interval of the model."""
        ahead = np.zeros((len(order) + 1, kinds), np.int64)
        ahead[1:] = np.cumsum(order[:, None] == np.arange(kinds), axis=0)
        between = (ahead[None, :] - ahead[:, None]).tolist()
        known: dict[tuple[int, ...], int] = {}
        of_interval = np.full((len(order) + 1, len(order) + 1), -1)
        for start, row in enumerate(between):
            for stop in range(start + 1, len(order) + 1):
                of_interval[start, stop] = known.setdefault(tuple(row[stop]), len(known))
        return cls(np.array(list(known), np.float64), of_interval)


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """All that the assignment of strategies needs, for one stage size and microbatch."""

    layouts: tuple[Layout, ...]
    kinds: tuple[KindPrices, ...]
    """In the order of ``ModelProfile.kinds``; a kind without any legal strategy has no rows."""
    relayouts: tuple[Relayouts, ...]
    """By kind that takes the stream."""
    order: Ints
    """Kind of every layer of the model."""
    contents: Contents


@dataclass(slots=True)
class PriceList:
    """Prices made on demand and kept."""

    problem: Problem
    order: Ints = field(init=False)
    contents: Contents = field(init=False)
    _held: dict[tuple[int, int, bool], Prices | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Write the model's layers down as kind numbers."""
        names = [kind.name for kind in self.problem.model.kinds]
        self.order = np.array([names.index(run.kind) for run in self.problem.model.layers for _ in range(run.count)])
        self.contents = Contents.of(self.order, len(names))

    def at(self, stages: int, microbatch: int, microbatches: int) -> Prices | None:
        """Return the prices in a pipeline of ``stages`` stages; None when some layer has no legal strategy."""
        key = (stages, microbatch, microbatches > 1)  # a test proves that nothing else of ``microbatches`` matters
        if key not in self._held:
            setting = Setting(
                hardware=self.problem.hardware,
                cluster=self.problem.cluster,
                stage_devices=self.problem.cluster.devices // stages,
                microbatch=microbatch,
                microbatches=microbatches,
                training=self.problem.training,
                causal_attention=self.problem.model.causal_attention,
            )
            self._held[key] = _price(self, setting, stages)
        return self._held[key]


def message_buffers(prices: Prices, stages: int, stage: int, cuts: tuple[int, int]) -> float:
    """Return the bytes of message buffers of a stage that holds the layers from ``cuts[0]`` up to ``cuts[1]``."""
    if stages == 1:
        return 0.0
    taking = prices.order[cuts[0] if stage else cuts[1]]
    return boundary_bytes(stages, stage, prices.relayouts[taking].message_bytes)


def _price(price_list: PriceList, setting: Setting, stages: int) -> Prices | None:
    problem, order = price_list.problem, price_list.order
    every = stage_strategies(problem.cluster, setting.stage_devices, problem.limits)
    choices = [
        tuple(s for s in legal(kind, every, setting.microbatch) if problem.limits.allows(kind.name, s))
        for kind in problem.model.kinds
    ]
    if not all(choices[kind] for kind in set(order.tolist())):
        return None
    layouts = tuple(sorted({layout_of(strategy) for some in choices for strategy in some}))
    kinds = tuple(
        _kind_prices(kind, some, layouts, setting) for kind, some in zip(problem.model.kinds, choices, strict=True)
    )
    relayouts = tuple(_relayouts(kind, layouts, setting, stages) for kind in problem.model.kinds)
    return Prices(layouts, kinds, relayouts, order, price_list.contents)


def _kind_prices(
    kind: LayerKind, choices: tuple[Strategy, ...], layouts: tuple[Layout, ...], setting: Setting
) -> KindPrices:
    costs = [estimate_layer(kind, strategy, setting) for strategy in choices]
    layout = np.array([layouts.index(layout_of(strategy)) for strategy in choices], np.int64)
    rows = np.array(
        [
            (c.forward_s, c.backward_s, c.sync_s + c.update_s, c.state_bytes, c.residual_bytes, c.live_bytes)
            for c in costs
        ]
    ).reshape(-1, 6)
    keep = np.flatnonzero(undominated(rows, layout))
    every = dict(zip(choices, rows, strict=True))
    forward, backward, step_end, state, residual, live = rows[keep].T.copy()
    kept = tuple(choices[i] for i in keep)
    return KindPrices(kind.name, kept, layout[keep], forward, backward, step_end, state, residual, live, every)


def undominated(rows: Floats, group: Ints) -> npt.NDArray[np.bool_]:
    """Mark the rows that no other row of the same group beats or equals in every column (first of equal rows: kept)."""
    if len(rows) > MANY_ROWS:
        return _swept(rows, group)
    below = (rows[:, None, :] <= rows[None, :, :]).all(axis=2) & (group[:, None] == group[None, :])
    equal = below & below.T
    first = np.triu(np.ones_like(below), 1)
    return np.asarray(~((below & ~equal) | (equal & first)).any(axis=0))


def _swept(rows: Floats, group: Ints) -> npt.NDArray[np.bool_]:
    """``undominated`` for many rows: in lexical order only a row before can beat one, so look at those kept."""
    keep = np.zeros(len(rows), bool)
    for label in set(group.tolist()):
        members = np.flatnonzero(group == label)
        front: list[int] = []
        for row in members[np.lexsort(rows[members].T[::-1])].tolist():
            if not (rows[front] <= rows[row]).all(axis=1).any():
                front.append(row)
        keep[front] = True
    return keep


def _relayouts(kind: LayerKind, layouts: tuple[Layout, ...], setting: Setting, stages: int) -> Relayouts:
    devices, sizes, streams = setting.stage_devices, stream_sizes(kind, setting), stream_arrays(kind)
    standing = [Strategy(tp=layout.tp, sp=layout.sp, dp=devices // layout.tp) for layout in layouts]
    wire = wire_strategy(setting)
    between = _changes(kind, list(_pairs(standing)), setting).reshape(len(layouts), len(layouts), 2)
    arriving = _changes(kind, [(wire, strategy) for strategy in standing], setting)
    leaving = _changes(kind, [(strategy, wire) for strategy in standing], setting)
    transfers = [
        sum(estimate_transfer(stream, sizes, setting, boundary=s) for stream in streams) for s in range(stages - 1)
    ]
    return Relayouts(
        forward_s=between[..., 0].copy(),
        backward_s=between[..., 1].copy(),
        from_wire_s=(arriving[:, 0], arriving[:, 1]),
        to_wire_s=(leaving[:, 0], leaving[:, 1]),
        transfer_s=np.array(transfers, np.float64),
        message_bytes=sum(stream.local_bytes(sizes, {}) for stream in streams) / devices,
    )


def _pairs(standing: list[Strategy]) -> Iterator[tuple[Strategy, Strategy]]:
    for before in standing:
        for after in standing:
            yield before, after


def _changes(kind: LayerKind, pairs: list[tuple[Strategy, Strategy]], setting: Setting) -> Floats:
    """(forward, backward) seconds of each pair, all streams of ``kind`` together."""
    sizes, streams = stream_sizes(kind, setting), stream_arrays(kind)
    rows = [[estimate_relayout(stream, sizes, before, after, setting) for stream in streams] for before, after in pairs]
    return np.array([np.sum(row, axis=0) if row else (0.0, 0.0) for row in rows], np.float64)
