"""Prices: every legal strategy of every layer kind as rows of numbers, made once per stage size and microbatch.

A layer's cost depends on the devices of its stage, the samples of a microbatch and whether gradients accumulate, but
not on where in the pipeline the stage stands; so one table serves all stages, stage counts and microbatch counts that
agree in these. A strategy that another one of the same layout beats or equals in every number can never be missed, so
it is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ..cluster import Cluster
from ..cost import (
    MOST_STRAIGHT_LAYERS,
    Crossing,
    LayerBytes,
    Setting,
    SideValue,
    Straight,
    boundary_bytes,
    estimate_layer,
    estimate_relayout,
    estimate_transfer,
    least_seconds,
    leaves_node,
    message_bytes,
    sender_seconds,
    side_values,
    stream_arrays,
    stream_sizes,
    wire_strategy,
)
from ..plan import Strategy, Training
from ..profile import HardwareProfile, LayerKind, ModelProfile
from ._dominance import undominated
from ._knapsack import Floats, Ints
from ._space import Layout, Limits, layout_of, legal, stage_strategies


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
    straight: tuple[KindPrices, ...] = ()
    """The same rows on a stage without a loop that holds one, two ... repeated layers; empty where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Relayouts:
    """Seconds to change the layout of the stream that a layer kind takes, by (layout before, layout after)."""

    forward_s: Floats
    backward_s: Floats
    from_wire_s: tuple[Floats, Floats]
    """(forward, backward) by the layout of a stage's first layer."""
    to_wire_s: tuple[Floats, Floats]
    """(forward, backward) by the layout of the last layer of the stage before."""


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
        start, stop = np.triu_indices(len(order) + 1, 1)
        counts, held = np.unique(ahead[stop] - ahead[start], axis=0, return_inverse=True)
        of_interval = np.full((len(order) + 1, len(order) + 1), -1)
        of_interval[start, stop] = held.reshape(-1)
        return cls(counts.astype(np.float64), of_interval)


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
    message_bytes_J: Floats
    """Size on one device of a message to a stage that begins with layer ``j`` (0 at both ends of the model)."""
    transfer_BJ: Floats
    """Seconds of that message, by the slice ``b`` before the boundary."""
    sender_BJ: Floats
    """Seconds of it that the sender is held."""
    meets_B: tuple[bool, ...]
    """Whether it holds both slices (``cost.Crossing``)."""
    work: tuple[float, ...]
    """Least seconds of the first ``n`` layers, at index ``n`` (``PriceList.work``)."""
    repeated_K: Floats
    """1 for kinds whose layers stand in a row."""
    straight: tuple[Prices, ...] = ()
    """By repeated layers (1, 2), those of stages without a loop: bytes of the same options, none more than here.

    The first of them is below all others."""

    def counts(self, runs: Iterable[tuple[int, int]]) -> Floats:
        """Return the number of layers of each kind in runs of (kind, layers)."""
        counts = np.zeros(len(self.kinds))
        for kind, layers in runs:
            counts[kind] += layers
        return counts

    def straight_layers(self, counts_SK: Floats | Ints) -> Ints:
        """Return the place in ``holding`` of stages, by their layers of each kind."""
        repeated = (counts_SK * self.repeated_K).sum(axis=-1).astype(np.int64)
        return np.where(repeated <= len(self.straight), np.maximum(repeated, 1), 0) * bool(self.straight)

    def holding(self, straight: int) -> Prices:
        """Return the prices on stages with so many repeated layers and no loop; 0: on any other stage."""
        return self.straight[straight - 1] if straight else self

    @property
    def least(self) -> Prices:
        """Prices that none is below, whatever a stage holds."""
        return self.holding(min(len(self.straight), 1))

    def crossing(self, before: int, j: int) -> Crossing:
        """Return the message from slice ``before`` to a stage that begins with layer ``j``."""
        return Crossing(float(self.transfer_BJ[before, j]), self.meets_B[before], float(self.sender_BJ[before, j]))


@dataclass(slots=True)
class PriceList:
    """Prices made on demand and kept."""

    problem: Problem
    order: Ints = field(init=False)
    contents: Contents = field(init=False)
    sides: tuple[SideValue, ...] = field(init=False)
    _least: dict[float, tuple[float, ...]] = field(default_factory=dict)
    _held: dict[tuple[int, int, bool], Prices | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Write the model's layers down as kind numbers."""
        names = [kind.name for kind in self.problem.model.kinds]
        self.order = np.array([names.index(run.kind) for run in self.problem.model.layers for _ in range(run.count)])
        self.contents = Contents.of(self.order, len(names))
        self.sides = side_values(self.problem.model)

    def at(self, slices: int, microbatch: int, microbatches: int) -> Prices | None:
        """Return the prices in a pipeline of ``slices`` device slices; None when some layer has no legal strategy."""
        key = (slices, microbatch, microbatches > 1)  # a test proves that nothing else of ``microbatches`` matters
        if key not in self._held:
            setting = Setting(
                hardware=self.problem.hardware,
                cluster=self.problem.cluster,
                stage_devices=self.problem.cluster.devices // slices,
                microbatch=microbatch,
                microbatches=microbatches,
                training=self.problem.training,
                causal_attention=self.problem.model.causal_attention,
                slices=slices,
            )
            self._held[key] = _price(self, setting)
        return self._held[key]

    def least_seconds(self, samples: float) -> tuple[float, ...]:
        """Least seconds of ``samples`` for each device through the first ``n`` layers, at index ``n``."""
        if samples not in self._least:
            problem = self.problem
            causal = problem.model.causal_attention
            kinds = [least_seconds(kind, problem.hardware, causal, samples) for kind in problem.model.kinds]
            self._least[samples] = tuple(
                itertools.accumulate((kinds[kind] for kind in self.order.tolist()), initial=0.0)
            )
        return self._least[samples]

    @property
    def work(self) -> tuple[float, ...]:
        """Work of the first ``n`` layers, at index ``n``: what ``_space.even_cuts`` cuts evenly."""
        return self.least_seconds(1.0)


def message_buffers(prices: Prices, stages: int, stage: int, cuts: tuple[int, int], *, goes_on: bool) -> float:
    """Return the bytes of message buffers of a stage that holds the layers from ``cuts[0]`` up to ``cuts[1]``.

    ``goes_on``: see ``cost.goes_on``.
    """
    if stages == 1:
        return 0.0
    message = float(prices.message_bytes_J[cuts[0] if stage else cuts[1]])
    return boundary_bytes(stages, stage, message, goes_on=goes_on)


def least_bytes(prices: Prices) -> float:
    """Return a lower bound on the bytes of all slices together, one device each, under any schedule.

    Every layer keeps its state, and at the fullest moment of its slice the residuals of at least one microbatch.
    """
    kinds = [prices.least.kinds[k] for k in prices.order.tolist()]
    least = {kind.name: float((kind.state_bytes + kind.residual_bytes).min()) for kind in kinds}
    return sum(least[kind.name] for kind in kinds)


def _price(price_list: PriceList, setting: Setting) -> Prices | None:
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
    relayouts = tuple(_relayouts(kind, layouts, setting) for kind in problem.model.kinds)
    messages = _messages(price_list, setting)
    boundaries = setting.slices if setting.slices > 1 else 0
    transfers, held = (
        _by_boundary(price, messages, setting, boundaries) for price in (estimate_transfer, sender_seconds)
    )
    meets = tuple(leaves_node(setting, b) for b in range(boundaries)) or (False,)
    repeated = np.array([kind.repeated for kind in problem.model.kinds], np.float64)
    looped = Prices(
        layouts=layouts,
        kinds=kinds,
        relayouts=relayouts,
        order=order,
        contents=price_list.contents,
        message_bytes_J=messages,
        transfer_BJ=transfers,
        sender_BJ=held,
        meets_B=meets,
        work=price_list.work,
        repeated_K=repeated,
    )
    variants = zip(*(kind.straight for kind in kinds), strict=True)
    return replace(looped, straight=tuple(replace(looped, kinds=variant) for variant in variants))


def _kind_prices(
    kind: LayerKind, choices: tuple[Strategy, ...], layouts: tuple[Layout, ...], setting: Setting
) -> KindPrices:
    costs = [estimate_layer(kind, strategy, setting) for strategy in choices]
    layout = np.array([layouts.index(layout_of(strategy)) for strategy in choices], np.int64)
    times = np.array([(c.forward_s, c.backward_s, c.sync_s + c.update_s) for c in costs]).reshape(-1, 3)
    held = np.array([(c.state_bytes, c.residual_bytes, c.live_bytes) for c in costs]).reshape(-1, 3)
    apart = Straight(*np.array([c.straight for c in costs]).reshape(-1, len(Straight._fields)).T)
    sorts = range(MOST_STRAIGHT_LAYERS + 1) if setting.slices > 1 else range(1)
    state, residual, live = held.T
    bytes_ = [np.array(LayerBytes(state, residual, live, apart).on_stage(sort)).T for sort in sorts]
    keep = np.flatnonzero(undominated(np.concatenate([times, *bytes_], axis=1), layout))
    looped, *straight = (_kept(kind.name, choices, keep, layout, np.concatenate([times, b], axis=1)) for b in bytes_)
    return replace(looped, straight=tuple(straight))


def _kept(name: str, choices: tuple[Strategy, ...], keep: Ints, layout: Ints, table: Floats) -> KindPrices:
    forward, backward, step_end, state, residual, live = table[keep].T.copy()
    every = dict(zip(choices, table, strict=True))
    kept = tuple(choices[i] for i in keep)
    return KindPrices(name, kept, layout[keep], forward, backward, step_end, state, residual, live, every)


def _relayouts(kind: LayerKind, layouts: tuple[Layout, ...], setting: Setting) -> Relayouts:
    """Price every change of layout once; strategies that stand for the layouts change nothing else."""
    devices = setting.stage_devices
    standing = [Strategy(tp=inner, sp=sequence, dp=devices // inner) for inner, sequence in layouts]
    wire = wire_strategy(setting)
    between = _changes(kind, list(_pairs(standing)), setting).reshape(len(layouts), len(layouts), 2)
    arriving = _changes(kind, [(wire, strategy) for strategy in standing], setting)
    leaving = _changes(kind, [(strategy, wire) for strategy in standing], setting)
    return Relayouts(
        forward_s=between[..., 0].copy(),
        backward_s=between[..., 1].copy(),
        from_wire_s=(arriving[:, 0], arriving[:, 1]),
        to_wire_s=(leaving[:, 0], leaving[:, 1]),
    )


def _messages(price_list: PriceList, setting: Setting) -> Floats:
    """Bytes of a message by the first layer behind the boundary."""
    kinds, order = price_list.problem.model.kinds, price_list.order.tolist()
    held: dict[tuple[int, tuple[bool, ...]], float] = {}
    found = [0.0]
    for j in range(1, len(order)):
        key = (order[j], tuple(side.first < j <= side.last for side in price_list.sides))
        if key not in held:
            held[key] = message_bytes(kinds[order[j]], j, price_list.sides, setting)
        found.append(held[key])
    return np.array([*found, 0.0])


def _by_boundary(price: Callable[..., float], message_bytes_J: Floats, setting: Setting, boundaries: int) -> Floats:
    """Price each message over each boundary; a boundary is inside a node or between nodes, nothing else."""
    sizes, where = np.unique(message_bytes_J, return_inverse=True)
    rows = [[price(float(size), setting, boundary=b) for size in sizes] for b in range(boundaries)]
    return np.array(rows).reshape(boundaries, len(sizes))[:, where]


def _pairs(standing: list[Strategy]) -> Iterator[tuple[Strategy, Strategy]]:
    for before in standing:
        for after in standing:
            yield before, after


def _changes(kind: LayerKind, pairs: list[tuple[Strategy, Strategy]], setting: Setting) -> Floats:
    """(forward, backward) seconds of each pair, all streams of ``kind`` together."""
    sizes, streams = stream_sizes(kind, setting), stream_arrays(kind)
    rows = [[estimate_relayout(stream, sizes, before, after, setting) for stream in streams] for before, after in pairs]
    return np.array([np.sum(row, axis=0) if row else (0.0, 0.0) for row in rows], np.float64)
