"""What layers must hold: every legal strategy of every layer kind as bytes, without any times.

A layer's memory depends on the devices of its stage, the samples of a microbatch, whether gradients accumulate and
whether the stage is one of several, but not on the cluster around it: one table serves clusters of every size. A
strategy that another one beats or equals in state, residuals and live bytes can never be missed, so it is dropped.

A stage that holds ``n[k]`` layers of kind ``k`` and the residuals of ``f`` microbatches needs at least

    min over t of  sum_k n[k] min over strategies of k with at most t live bytes of (state + f residual)  +  t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..cost import (
    MOST_STRAIGHT_LAYERS,
    LayerBytes,
    Setting,
    Straight,
    depends_on_samples,
    layer_bytes,
    message_bytes,
    side_values,
)
from ..plan import Strategy
from ..profile import BATCH, ModelProfile
from ._dominance import undominated
from ._knapsack import Floats, Ints
from ._pricing import Problem
from ._relaxation import weighted_sum
from ._space import Limits, legal, stage_strategies


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """The least bytes of a layer by kind (K) and by how many bytes may be live (T)."""

    thresholds_T: Floats
    smallest_KT: Floats
    """States and residuals; 0 where there is no option."""
    absent_KT: Floats
    """1 where there is no option."""

    def peaks(self, counts_SK: Floats) -> Floats:
        """Return the least bytes of stages by what they hold: the more layers, the more bytes."""
        bytes_ST = weighted_sum(counts_SK, self.smallest_KT) + self.thresholds_T
        bytes_ST[weighted_sum(counts_SK, self.absent_KT) > 0] = np.inf
        return np.asarray(bytes_ST.min(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """What the layers of one model can hold on one device, for one stage size and microbatch."""

    kinds_V: tuple[tuple[Floats, ...], ...]
    """By kind: one row (state, residual, live) for each strategy that may be the smallest, by rising live bytes. The
    first for stages with loops, the others for those without one (``Prices.straight``)."""
    repeated_K: Ints
    """1 for kinds whose layers stand in a row."""
    ahead_LK: Ints
    """Layers of each kind before layer ``n``, at index ``n``."""
    message_bytes_J: Floats
    """See ``Prices.message_bytes_J``."""
    _menus: dict[tuple[int, int], Menu] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.ahead_LK) - 1

    def peaks(self, in_flight: int, counts_SK: Floats) -> Floats:
        """Return the least bytes of stages by what they hold: the more layers, the more bytes."""
        repeated, peaks = counts_SK @ self.repeated_K, np.empty(len(counts_SK))
        straight = np.where(repeated < len(self.kinds_V), np.maximum(repeated, 1), 0) * (len(self.kinds_V) > 1)
        for sort in np.unique(straight).astype(np.int64).tolist():
            peaks[straight == sort] = self._menu(in_flight, sort).peaks(counts_SK[straight == sort])
        return peaks

    def least_menu(self) -> Menu:
        """Return bytes that no stage is below, with the residuals of one microbatch."""
        return self._menu(1, min(len(self.kinds_V) - 1, 1))

    def _menu(self, in_flight: int, sort: int) -> Menu:
        """Return the least bytes with the residuals of so many microbatches, on one sort of stages."""
        if (in_flight, sort) not in self._menus:
            kinds = self.kinds_V[sort]
            thresholds = np.unique(np.concatenate([rows[:, 2] for rows in kinds]))
            self._menus[in_flight, sort] = _menu(kinds, thresholds, in_flight)
        return self._menus[in_flight, sort]


@dataclass(slots=True)
class Footprints:
    """Footprints of one model within one set of limits, made on demand and kept; for clusters of any size."""

    model: ModelProfile
    limits: Limits
    poll: Callable[[], None]
    """Called often; may raise to end the work."""
    _used: tuple[int, ...] = field(init=False)
    """The kinds that the model has layers of."""
    _ahead_LK: Ints = field(init=False)
    _strategies: dict[tuple[object, ...], tuple[Strategy, ...]] = field(default_factory=dict)
    _bytes: dict[tuple[object, ...], LayerBytes] = field(default_factory=dict)
    """Bytes of a layer by all that decides them (``_distinct``)."""
    _held: dict[tuple[object, ...], Footprint | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count the layers of each kind."""
        names = [kind.name for kind in self.model.kinds]
        order = np.array([names.index(run.kind) for run in self.model.layers for _ in range(run.count)])
        self._used = tuple(sorted(set(order.tolist())))
        self._ahead_LK = np.zeros((len(order) + 1, len(names)), np.int64)
        self._ahead_LK[1:] = np.cumsum(order[:, None] == np.arange(len(names)), axis=0)

    def at(self, problem: Problem, slices: int, microbatch: int, microbatches: int) -> Footprint | None:
        """Return the footprint on a slice of the problem's cluster; None when some layer has no legal strategy."""
        devices = problem.cluster.devices // slices
        degrees = problem.cluster.tensor_degrees(devices)
        key = (degrees, devices, microbatch, microbatches > 1, slices > 1)
        if key not in self._held:
            setting = Setting(
                hardware=problem.hardware,
                cluster=problem.cluster,
                stage_devices=devices,
                microbatch=microbatch,
                microbatches=microbatches,
                training=problem.training,
                causal_attention=self.model.causal_attention,
                slices=slices,
            )
            self._held[key] = self._made(setting, degrees)
        return self._held[key]

    def _made(self, setting: Setting, degrees: tuple[int, ...]) -> Footprint | None:
        sorts = range(MOST_STRAIGHT_LAYERS + 1) if setting.slices > 1 else range(1)
        kinds_V = [[np.zeros((0, 3))] * len(self.model.kinds) for _ in sorts]
        for k in self._used:
            self.poll()
            strategies = self._allowed(k, setting, degrees)
            if not strategies:
                return None
            held = self._layer_bytes(k, strategies, setting)
            for sort in sorts:
                rows = np.array(held.on_stage(sort)).T
                rows = rows[undominated(rows)]
                kinds_V[sort][k] = rows[np.argsort(rows[:, 2], kind="stable")]
        repeated = np.array([kind.repeated for kind in self.model.kinds], np.int64)
        return Footprint(tuple(map(tuple, kinds_V)), repeated, self._ahead_LK, self._messages(setting))

    def _layer_bytes(self, k: int, strategies: list[Strategy], setting: Setting) -> LayerBytes:
        """Bytes under every strategy that holds something else."""
        kind, rows = self.model.kinds[k], list[LayerBytes]()
        batch = 0 if depends_on_samples(kind, setting.hardware) else setting.microbatch
        where = (k, setting.microbatches > 1, setting.slices > 1, batch)
        for shares, strategy in _distinct(strategies, setting.microbatch).items():
            key = (*where, *shares)
            if key not in self._bytes:
                self._bytes[key] = layer_bytes(kind, strategy, setting)
            rows.append(self._bytes[key])
        state, residual, live = np.array([row[:3] for row in rows]).T
        return LayerBytes(state, residual, live, Straight(*np.array([row.straight for row in rows]).T))

    def _allowed(self, k: int, setting: Setting, degrees: tuple[int, ...]) -> list[Strategy]:
        """Legal strategies of kind ``k``: judged once for a stage size, with a microbatch that every rank divides."""
        kind, devices = self.model.kinds[k], setting.stage_devices
        key = (k, devices, degrees)
        if key not in self._strategies:
            every = stage_strategies(setting.cluster, devices, self.limits)
            found = legal(kind, every, devices)
            self._strategies[key] = tuple(s for s in found if self.limits.allows(kind.name, s))
        divides = BATCH in kind.classes
        return [s for s in self._strategies[key] if not (divides and setting.microbatch % s.dp)]

    def _messages(self, setting: Setting) -> Floats:
        """Bytes of a message by the first layer behind the boundary."""
        sides, order = side_values(self.model), np.diff(self._ahead_LK, axis=0).argmax(axis=1).tolist()
        held: dict[tuple[int, tuple[bool, ...]], float] = {}
        found = [0.0]
        for j in range(1, len(order)):
            key = (order[j], tuple(side.first < j <= side.last for side in sides))
            if key not in held:
                held[key] = message_bytes(self.model.kinds[order[j]], j, sides, setting)
            found.append(held[key])
        return np.array([*found, 0.0])


def _distinct(strategies: list[Strategy], microbatch: int) -> dict[tuple[object, ...], Strategy]:
    """One strategy of all that hold the same: they differ in how many ranks repeat what others do."""
    return {(s.tp, s.sp, s.ulysses, s.remat, s.zero, s.zero_ranks, microbatch / s.dp): s for s in strategies}


def _menu(kinds: tuple[Floats, ...], thresholds: Floats, in_flight: int) -> Menu:
    smallest = np.full((len(kinds), len(thresholds)), np.inf)
    for k, rows in enumerate(kinds):
        if len(rows):  # by rising live bytes
            least = np.minimum.accumulate(rows[:, 0] + in_flight * rows[:, 1])
            at = np.searchsorted(rows[:, 2], thresholds, side="right")
            smallest[k] = np.append(np.inf, least)[at]
    new = np.append(True, (smallest[:, 1:] < smallest[:, :-1]).any(axis=0))  # more live bytes that help no kind
    smallest = smallest[:, new]
    absent = np.isinf(smallest)
    return Menu(thresholds[new], np.where(absent, 0.0, smallest), absent.astype(np.float64))
