"""The least seconds of all layers together, with the memory of every slice: a bound that knows no boundaries.

A slice ``s`` has room for ``R`` bytes; a layer that it holds in a stage with ``h`` microbatches in flight takes ``state
+ h * residual`` of them. For any byte prices ``p[s] >= 0`` (Lagrangian duality), wherever the layers are,

    seconds of all layers >= sum over layers of  min over stages k that may hold it of  A(p[k % S], h[k])  -  R sum p[s]
    A(p, h) = min over the layer's options of  seconds + p * (state + h * residual)

Which stages may hold a layer: with one stage on each slice any of them, interleaved those whose even cuts
(``_space.even_cuts``) reach it. One price for all slices would count every layer at the stage with the fewest
microbatches in flight; so a dearer slice gets a lower price, such that all layers together are worth the same on every
slice. A few such worths are tried; each gives a valid bound.

Complexity: O(worths * (stages * options + layers)), whatever the boundaries.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ..schedule import in_flight_microbatches
from ._assignment import Assigner
from ._knapsack import Floats, Ints, Menu
from ._pricing import Prices
from ._space import Shape
from ._stage import Board, Weights

RUNGS, GROUPS = 24, 12
"""Byte prices that are tried, and groups of slices that share one."""
STEEPER, STEEPER_STEPS = 1.5, 4


def whole_seconds(
    prices: Prices, assigner: Assigner, shape: Shape, microbatches: int, cuts_NK: Ints | None = None
) -> list[float]:
    """Return the least seconds of one microbatch's passes through the first ``n`` layers, at index ``n``.

    The last one with the memory of every slice, for layers in fractions and layouts for free; the others without limit.

    Args:
        prices: The options.
        assigner: Knows the memory of a slice.
        shape: How the pipeline runs.
        microbatches: Per step.
        cuts_NK: All boundaries of interleaved stages, one a row, from 0 to the number of layers.
    """
    found = fastest_seconds(prices)
    whole = _Whole(
        Layers.of(prices, assigner, least=shape.chunks == 1),
        held_in_flight(shape, microbatches),
        _reach(prices.order, shape, cuts_NK),
    )
    found[-1] = max(found[-1], whole.bound_s())
    return found


def fastest_seconds(prices: Prices) -> list[float]:
    """Return the least seconds of one microbatch through the first ``n`` layers, at index ``n``."""
    kinds = [float((kind.forward_s + kind.backward_s).min()) if len(kind.layout) else 0.0 for kind in prices.kinds]
    return list(itertools.accumulate((kinds[kind] for kind in prices.order.tolist()), initial=0.0))


def held_in_flight(shape: Shape, microbatches: int) -> Floats:
    """Return the microbatches in flight by (slice, chunk) before the first backward: one of the fullest moments."""
    return np.array([_held(shape, microbatches, s) for s in range(shape.slices)], np.float64)


def _held(shape: Shape, microbatches: int, s: int) -> list[int]:
    """Microbatches in flight by chunk on slice ``s`` before its first backward: one of its fullest moments."""
    slices, schedule, chunks = shape
    if chunks == 1:
        return [in_flight_microbatches(schedule, s, slices, microbatches)]
    units = min(2 * (slices - 1 - s) + (chunks - 1) * slices + 1, microbatches * chunks)
    groups, rest = divmod(units, slices * chunks)
    return [groups * slices + min(max(rest - c * slices, 0), slices) for c in range(chunks)]


def _reach(order: Ints, shape: Shape, cuts_NK: Ints | None) -> tuple[Ints, Ints]:
    """First and last stage that may hold each layer."""
    layers, stages = np.arange(len(order)), shape.stages
    if cuts_NK is None:
        return np.maximum(0, layers - len(order) + stages), np.minimum(stages - 1, layers)
    begin, end = cuts_NK[:, :-1].min(axis=0), cuts_NK[:, 1:].max(axis=0)
    return np.searchsorted(end, layers, side="right"), np.searchsorted(begin, layers, side="right") - 1


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """What layers of each kind cost at least, when bytes have a price."""

    prices: Prices
    board: Board
    room: float
    """Bytes of a slice for states and residuals, at most."""

    @classmethod
    def of(cls, prices: Prices, assigner: Assigner, *, least: bool = False) -> Layers:
        """Weigh the options of one microbatch's passes, at the prices of loops or at those that none is below."""
        straight = int(least and bool(prices.straight))
        prices, board = prices.holding(straight), assigner.board(Weights(1.0, 1.0, 0.0), 1, straight, keeps="coupled")
        smallest = min(float(live.min()) for live in board.live if len(live))
        return cls(prices, board, assigner.capacity_bytes - smallest)

    def least(self, kind: int, price: Floats, held: Floats) -> Floats:
        """Return ``A`` of a kind, by pairs of byte price and microbatches in flight."""
        pairs, which = np.unique(np.stack([price, held], axis=1), axis=0, return_inverse=True)
        priced = self.board.cost[kind] + pairs[:, :1] * self._size(kind, pairs[:, 1])
        return np.asarray(priced.min(axis=1)[which.reshape(-1)])

    def ladder(self, held: float) -> Floats:
        """Return byte prices: none, those at which options of a kind tie, and steeper ones."""
        sizes = [self._size(kind, np.array([held]))[0] for kind in range(len(self.board.rows))]
        slopes = [Menu(c, s, np.arange(len(c))).slopes for c, s in zip(self.board.cost, sizes, strict=True)]
        ties = np.unique(np.concatenate(slopes))
        ties = ties[np.unique(np.linspace(0, len(ties) - 1, min(len(ties), RUNGS)).round().astype(np.int64))]
        steeper = [ties[-1] * STEEPER**step for step in range(1, STEEPER_STEPS + 1)] if len(ties) else []
        return np.array([0.0, *ties, *steeper])

    def _size(self, kind: int, held: Floats) -> Floats:
        """Bytes of each option by microbatches in flight."""
        table, rows = self.prices.kinds[kind], self.board.rows[kind]
        return np.asarray(table.state_bytes[rows] + held[:, None] * table.residual_bytes[rows])


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """All layers of a model on all slices."""

    layers: Layers
    held_SC: Floats
    """Microbatches in flight by slice and chunk."""
    reach: tuple[Ints, Ints]
    """First and last stage that may hold each layer."""

    def bound_s(self) -> float:
        """Return the best bound of the worths tried."""
        mean = self.held_SC.mean(axis=1)
        held = np.unique(np.linspace(mean.min(), mean.max(), GROUPS))
        ladder = self.layers.ladder(float(held[len(held) // 2]))
        worth = self._worth(held, ladder)
        group, best = np.searchsorted(held, mean, side="right") - 1, 0.0
        for value in worth[len(held) // 2].tolist():
            price = np.array([np.interp(value, row, ladder) for row in worth])
            best = max(best, self._at(price[group]))
        return best

    def _worth(self, held: Floats, ladder: Floats) -> Floats:
        """Least that all layers together cost, by microbatches in flight and byte price."""
        each, worth = np.repeat(held, len(ladder)), np.zeros(len(held) * len(ladder))
        for kind, count in enumerate(np.bincount(self.layers.prices.order).tolist()):
            worth += count * self.layers.least(kind, np.tile(ladder, len(held)), each) if count else 0.0
        return worth.reshape(len(held), len(ladder))

    def _at(self, price_S: Floats) -> float:
        """Bound by the byte price of each slice."""
        price_K, held_K = np.tile(price_S, self.held_SC.shape[1]), self.held_SC.T.reshape(-1)
        first, last = self.reach
        least = 0.0
        for kind in np.unique(self.layers.prices.order).tolist():
            mine = self.layers.prices.order == kind
            by_stage = np.append(self.layers.least(kind, price_K, held_K), np.inf)
            ends = np.stack([first[mine], last[mine] + 1], axis=1).reshape(-1)
            least += float(np.cumsum(np.minimum.reduceat(by_stage, ends)[::2])[-1])
        return least - self.layers.room * float(np.cumsum(price_S)[-1])
