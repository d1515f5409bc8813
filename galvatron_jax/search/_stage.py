"""One stage: what it holds, the strategies chosen for it, and the choices under one threshold of live bytes.

A slice of devices holds one stage, or several *sections* (the chunks of an interleaved schedule), each with its own
weights in the objective: ``_shared``. This file is about slices with one.

``Case`` is the stage with the largest live layer fixed to at most ``threshold`` bytes: options that need more are
left out, ``threshold`` is taken off the capacity, and what remains are patterns of layouts (``_patterns``) with one
knapsack each (``_knapsack``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from ._dominance import undominated
from ._knapsack import Assignments, Dual, Floats, Group, Ints, Menu, assignments_within, best_dual, cheapest, rounded
from ._patterns import Pattern, Step, patterns
from ._pricing import Prices
from ._relaxation import Relaxation

ROUNDING = 1e-12
"""Relative slack when a bound is compared with a value that was summed in another order."""


GOOD_PATTERNS = 8
"""Patterns that are tried where a good choice is enough."""


class Weights(NamedTuple):
    """How often a stage's times count in the objective."""

    forward: float
    backward: float
    step_end: float


SliceWeights: TypeAlias = tuple[Weights, ...]
"""Of each section of a slice."""


def normalised(weights: SliceWeights) -> tuple[SliceWeights, float]:
    """Return weights whose largest is 1, and the factor taken out; equal objectives share their work.

    An objective that counts nothing gets factor 0 and the weights of one microbatch.
    """
    scale = max(max(w) for w in weights)
    if not scale:
        return (Weights(1.0, 1.0, 0.0),) * len(weights), 0.0
    return tuple(Weights(*(w / scale for w in section)) for section in weights), scale


class Section(NamedTuple):
    """What a slice holds of one stage, and how it hangs together with its neighbours."""

    runs: tuple[tuple[int, int], ...]
    """(kind, layers) in order."""
    enters: bool
    """The stream arrives over the wire."""
    leaves_to: int
    """Kind that takes the stream over the wire afterwards; -1 on the last stage."""


class Span(NamedTuple):
    """What a slice holds."""

    sections: tuple[Section, ...]
    moments: tuple[tuple[int, ...], ...]
    """Microbatches in flight by section, at each of the fullest moments."""
    buffer_bytes: float


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Strategies for one stage, and its times."""

    forward_s: float
    backward_s: float
    step_end_s: float
    runs: tuple[tuple[int, int, int], ...]
    """(kind, row of ``KindPrices``, layers) in order."""

    def cost(self, weights: Weights) -> float:
        """Return the value of a linear objective."""
        forward, backward, step_end = weights
        return forward * self.forward_s + backward * self.backward_s + step_end * self.step_end_s


class SliceChoice(NamedTuple):
    """Strategies for the stages of one slice."""

    stages: tuple[StageChoice, ...]

    def cost(self, weights: SliceWeights) -> float:
        """Return the value of a linear objective."""
        return sum(stage.cost(w) for stage, w in zip(self.stages, weights, strict=True))

    def times(self) -> list[float]:
        """Return the three times of each stage."""
        return [t for stage in self.stages for t in (stage.forward_s, stage.backward_s, stage.step_end_s)]


@dataclass(frozen=True, eq=False)
class Board:
    """The options of every kind under one objective and number of in-flight microbatches."""

    prices: Prices
    weights: Weights
    rows: tuple[Ints, ...]
    """Rows of ``KindPrices`` that are options."""
    cost: tuple[Floats, ...]
    size: tuple[Floats, ...]
    live: tuple[Floats, ...]
    layout: tuple[Ints, ...]
    inside: tuple[Floats, ...]
    """Relayout cost by kind that takes the stream."""
    poll: Callable[[], None]
    """Called before every knapsack; may raise to stop the search."""
    exact: bool = True
    """Whether the best choice is wanted, or a good one at once."""
    _menus: dict[tuple[int, tuple[int, ...] | None, float], Menu] = field(default_factory=dict)

    @classmethod
    def make(
        cls, prices: Prices, weights: Weights, in_flight: int, *, keeps: str, poll: Callable[[], None], exact: bool
    ) -> Board:
        """Weigh all options.

        Args:
            prices: The options.
            weights: The objective.
            in_flight: Microbatches whose residuals are held.
            keeps: ``"best"`` drops options that are beaten in (cost, bytes, live bytes), ``"coupled"`` those beaten at
                any number of microbatches in flight, ``"all"`` none.
            poll: Called before every knapsack; may raise to stop the search.
            exact: Whether the best choice is wanted, or a good one at once.
        """
        columns: list[tuple[Ints, Floats, Floats, Floats, Ints]] = []
        for kind in prices.kinds:
            cost = (
                weights.forward * kind.forward_s
                + weights.backward * kind.backward_s
                + weights.step_end * kind.step_end_s
            )
            size = kind.state_bytes + in_flight * kind.residual_bytes
            sizes = [size] if keeps == "best" else [kind.state_bytes, kind.residual_bytes]
            table = np.stack([cost, *sizes, kind.live_bytes], axis=1)
            keep = np.arange(len(cost)) if keeps == "all" else np.flatnonzero(undominated(table, kind.layout))
            columns.append((keep, cost[keep], size[keep], kind.live_bytes[keep], kind.layout[keep]))
        rows, costs, sizes_, lives, layouts = (tuple(column) for column in zip(*columns, strict=True))
        inside = tuple(weights.forward * r.forward_s + weights.backward * r.backward_s for r in prices.relayouts)
        return cls(prices, weights, rows, costs, sizes_, lives, layouts, inside, poll, exact)

    @functools.cached_property
    def relaxation(self) -> Relaxation:
        """Bounds with layouts for free and fractions of layers."""
        return Relaxation.make(self.cost, self.size, self.live)

    def menu(self, kind: int, layouts: tuple[int, ...] | None, threshold: float) -> Menu:
        """Options of ``kind`` in ``layouts`` (None: all) that need at most ``threshold`` live bytes."""
        key = (kind, layouts, threshold)
        if key not in self._menus:
            keep = self.live[kind] <= threshold
            if layouts is not None:
                keep &= (self.layout[kind][:, None] == np.array(layouts)).any(axis=1)
            self._menus[key] = Menu(self.cost[kind][keep], self.size[kind][keep], np.flatnonzero(keep))
        return self._menus[key]

    def wire(self, seconds: tuple[Floats, Floats]) -> Floats:
        """Weigh (forward, backward) seconds."""
        return self.weights.forward * seconds[0] + self.weights.backward * seconds[1]


class _Pool(NamedTuple):
    """Layers that choose from one menu, wherever they stand: one group of the knapsack."""

    kind: int
    menu: Menu
    takers: list[tuple[int, int]]
    """(run of the stage, number of its layers) in order."""

    @property
    def group(self) -> Group:
        """All layers of the pool."""
        return Group(sum(layers for _, layers in self.takers), self.menu)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A stage whose largest live layer needs at most ``threshold`` bytes."""

    board: Board
    section: Section
    threshold: float
    room: float
    dual: Dual
    """Bound of the whole case, relayouts free."""

    @classmethod
    def make(cls, board: Board, section: Section, threshold: float, room: float) -> Case | None:
        """Return the case with ``room`` bytes for states and residuals; None when nothing fits."""
        dual = best_dual([Group(n, board.menu(kind, None, threshold)) for kind, n in section.runs], room)
        return None if dual is None else cls(board, section, threshold, room, dual)

    def patterns(self, *, every: bool) -> Iterator[Pattern]:
        """Yield the stage's patterns, the lowest bound first; ``every``: those that cannot be best too."""
        rent = self.dual.price * self.room
        steps = [self._step(run) for run in range(len(self.section.runs))]
        for pattern in patterns(steps, self._leaving(), self.room, every=every):
            yield pattern._replace(bound=pattern.bound - rent)

    def best(self, limit: float) -> StageChoice | None:
        """Return the best choice if it costs at most ``limit``; a good one if the board is not exact."""
        best = None
        for pattern in itertools.islice(self.patterns(every=False), None if self.board.exact else GOOD_PATTERNS):
            self.board.poll()
            if pattern.bound > limit + self._slack(limit):
                break
            pools, moves = self._pools(pattern), self._moves(pattern)
            found = self._assigned([pool.group for pool in pools], limit - self._weigh(moves))
            if found is not None and (best is None or float(found.cost[0]) + self._weigh(moves) < limit):
                best = self._choices(pattern, pools, moves, found)[0]
                limit = best.cost(self.board.weights)
        return best

    def _assigned(self, groups: list[Group], limit: float) -> Assignments | None:
        if self.board.exact:
            return cheapest(groups, self.room, limit, self.board.poll)
        return rounded(groups, self.room, limit)

    def all(self, limit: float) -> list[StageChoice]:
        """Return the choices that cost at most ``limit``, without those that others of the same pattern beat."""
        near = itertools.takewhile(
            lambda pattern: pattern.bound <= limit + self._slack(limit), self.patterns(every=True)
        )
        return [choice for pattern in near for choice in self._all(pattern, limit)]

    def _slack(self, limit: float) -> float:
        """What rounding errors in a bound can amount to."""
        return ROUNDING * (abs(limit) + self.dual.price * self.room) if np.isfinite(limit) else 0.0

    def _all(self, pattern: Pattern, limit: float) -> list[StageChoice]:
        self.board.poll()
        pools, moves = self._pools(pattern), self._moves(pattern)
        groups = [pool.group for pool in pools]
        dual = best_dual(groups, self.room)
        if dual is None:
            return []
        within = limit - self._weigh(moves) + ROUNDING * abs(limit)
        found = assignments_within(groups, self.room, within, dual, poll=self.board.poll)
        return self._choices(pattern, pools, moves, found)

    def _step(self, run: int) -> Step:
        (kind, layers), board = self.section.runs[run], self.board
        menu = board.menu(kind, None, self.threshold)
        priced, smallest = np.full((2, len(board.prices.layouts)), np.inf)
        np.minimum.at(priced, board.layout[kind][menu.ids], menu.cost + self.dual.price * menu.size)
        np.minimum.at(smallest, board.layout[kind][menu.ids], menu.size)
        first = board.wire(board.prices.relayouts[kind].from_wire_s) * self.section.enters
        return Step(layers, priced, smallest, board.inside[kind] if run else first[None, :], board.inside[kind])

    def _leaving(self) -> Floats:
        if self.section.leaves_to < 0:
            return np.zeros(len(self.board.prices.layouts))
        return self.board.wire(self.board.prices.relayouts[self.section.leaves_to].to_wire_s)

    def _pools(self, pattern: Pattern) -> list[_Pool]:
        """One layer in each of several stops, and the other layers of the run wherever they like."""
        pools: dict[tuple[int, tuple[int, ...]], _Pool] = {}
        for run, ((kind, layers), stops) in enumerate(zip(self.section.runs, pattern.stops, strict=True)):
            single = stops if len(stops) > 1 else ()
            rest = layers - len(single)
            for layouts, count in [*(((stop,), 1) for stop in single), (tuple(sorted(set(stops))), rest)]:
                if count:
                    menu = self.board.menu(kind, layouts, self.threshold)
                    pools.setdefault((kind, layouts), _Pool(kind, menu, [])).takers.append((run, count))
        return list(pools.values())

    def _moves(self, pattern: Pattern) -> Floats:
        """Seconds of all relayouts of a pattern: (forward, backward)."""
        relayouts, total = self.board.prices.relayouts, np.zeros(2)
        walk = [
            (kind, stop) for (kind, _), stops in zip(self.section.runs, pattern.stops, strict=True) for stop in stops
        ]
        for (_, before), (kind, after) in zip(walk, walk[1:], strict=False):
            total += relayouts[kind].forward_s[before, after], relayouts[kind].backward_s[before, after]
        if self.section.enters:
            total += [seconds[walk[0][1]] for seconds in relayouts[walk[0][0]].from_wire_s]
        if self.section.leaves_to >= 0:
            total += [seconds[walk[-1][1]] for seconds in relayouts[self.section.leaves_to].to_wire_s]
        return total

    def _weigh(self, moves: Floats) -> float:
        return float(self.board.weights.forward * moves[0] + self.board.weights.backward * moves[1])

    def _choices(self, pattern: Pattern, pools: list[_Pool], moves: Floats, found: Assignments) -> list[StageChoice]:
        times, column = np.tile(np.append(moves, 0.0), (len(found.cost), 1)), 0
        for pool in pools:
            prices = self.board.prices.kinds[pool.kind]
            for row in self.board.rows[pool.kind][pool.menu.ids].tolist():
                # option by option: in a matrix product the order of summation would depend on the machine
                each = prices.forward_s[row], prices.backward_s[row], prices.step_end_s[row]
                times += found.counts[:, column, None] * np.array(each)
                column += 1
        kept = range(1) if len(times) == 1 else np.flatnonzero(undominated(times))
        return [
            StageChoice(float(times[i, 0]), float(times[i, 1]), float(times[i, 2]), runs)
            for i in kept
            for runs in [self._runs(pattern, pools, found.counts[i].tolist())]
        ]

    def _runs(self, pattern: Pattern, pools: list[_Pool], counts: list[int]) -> tuple[tuple[int, int, int], ...]:
        """Put the layers of one assignment in order: run by run, stop by stop."""
        taken = self._handed_out(pools, counts)
        ordered: list[tuple[int, int, int]] = []
        for run, ((kind, _), stops) in enumerate(zip(self.section.runs, pattern.stops, strict=True)):
            layers: dict[int, list[int]] = {stop: [] for stop in stops}
            for row in sorted(taken[run]):
                layers[int(self.board.prices.kinds[kind].layout[row])].append(row)
            for position, stop in enumerate(stops):
                here = layers[stop][:1] if stop in stops[position + 1 :] else layers[stop]
                layers[stop] = layers[stop][len(here) :]
                ordered += [(kind, row, here.count(row)) for row in dict.fromkeys(here)]
        return tuple(ordered)

    def _handed_out(self, pools: list[_Pool], counts: list[int]) -> list[list[int]]:
        """The option of every layer, by run: of one pool, the first runs take the first options."""
        taken: list[list[int]] = [[] for _ in self.section.runs]
        column = iter(counts)
        for pool in pools:
            rows = self.board.rows[pool.kind][pool.menu.ids].tolist()
            every = iter([row for row in rows for _ in range(next(column))])
            for run, layers in pool.takers:
                taken[run] += itertools.islice(every, layers)
        return taken
