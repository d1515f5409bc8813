"""One slice of devices that holds several stages (the chunks of an interleaved schedule), exactly.

    minimise    sum over stages c of a_c * forward_c + b_c * backward_c + e_c * step_end_c
    subject to  sum of states + sum over c of h_c * residuals_c + largest live layer + buffers <= capacity
                for every fullest moment h of the schedule (microbatches in flight by stage)

over one strategy for each layer *kind* of the slice (``_space``: its layers of a kind agree, in whichever chunk they
are). A slice holds few kinds, so a choice is a row of a small table: the options of the first kind, combined with those
of the second, and so on. With ``n[c, k]`` layers of kind k in stage c, an option of kind k adds ``n[c, k]`` times its
times to stage c, its bytes to every moment, and the changes between the wire and its layout where a stage begins or
ends with the kind; a pair of kinds that follow each other in a stage adds the change between their layouts.

**Pruning**, which never loses a best choice: what cannot fit even with the smallest options of the kinds to come; what
costs more than the limit even with their cheapest; and, when one best choice is enough, among options of one kind and
layout those that another one beats or equals in cost, states, residuals and live bytes.

Complexity: the product of the kinds' options that survive, usually some thousand rows, in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._dominance import undominated
from ._knapsack import MOST_ROWS, Floats, Ints, TooHard
from ._pricing import Prices
from ._stage import ROUNDING, SliceChoice, SliceWeights, Span, StageChoice

FEW_ROWS = 4096
"""Tables that grow beyond it are thinned before the next kind comes."""
SHARED_ROWS = 20 * MOST_ROWS
"""Largest table; a row takes some dozen bytes."""


class _Options(NamedTuple):
    """What one kind can do, by row of ``KindPrices``."""

    kind: int
    rows: Ints
    layout: Ints
    times: Floats
    """(option, stage, forward or backward or step end), wires included."""
    bytes: Floats
    """(option, moment)."""
    live: Floats


class _Table(NamedTuple):
    """Choices for the kinds so far, one per row."""

    picked: Ints
    """Option of each kind so far, (choice, kind)."""
    cost: Floats
    bytes: Floats
    """(choice, moment)."""
    live: Floats

    def at(self, keep: Ints) -> _Table:
        """Some of the rows."""
        return _Table(self.picked[keep], self.cost[keep], self.bytes[keep], self.live[keep])


@dataclass(frozen=True, eq=False)
class SharedSlice:
    """A slice and its capacity; solves it for any weights."""

    prices: Prices
    span: Span
    capacity_bytes: float
    poll: Callable[[], None]

    def cheapest(self, weights: SliceWeights) -> SliceChoice | None:
        """Return the best choice; None when nothing fits. Of equals, the first in the order of strategies."""
        table = self._combine(weights, np.inf, thin=True)
        if not len(table.live):
            return None
        best = table.picked[int(table.cost.argmin())][None, :]
        return self._choice(best[0], self._times(best)[0])

    def within(self, weights: SliceWeights, limit: float) -> list[SliceChoice]:
        """Return all choices that cost at most ``limit`` and that no other one beats or equals in all times."""
        picked = self._combine(weights, limit * (1 + ROUNDING), thin=False).picked
        times = self._times(picked)
        kept = np.flatnonzero(undominated(times.reshape(len(picked), -1)))
        return [self._choice(picked[i], times[i]) for i in kept.tolist()]

    @functools.cached_property
    def _options(self) -> tuple[_Options, ...]:
        kinds = dict.fromkeys(kind for section in self.span.sections for kind, _ in section.runs)
        return tuple(self._of_kind(kind) for kind in kinds)

    def _of_kind(self, kind: int) -> _Options:
        prices, sections = self.prices.kinds[kind], self.span.sections
        layers = np.array([sum(n for k, n in section.runs if k == kind) for section in sections], np.float64)
        each = np.stack([prices.forward_s, prices.backward_s, prices.step_end_s], axis=1)
        times = each[:, None, :] * layers[None, :, None]
        for c, section in enumerate(sections):
            if section.enters and section.runs[0][0] == kind:
                times[:, c, :2] += np.stack(self.prices.relayouts[kind].from_wire_s, axis=1)[prices.layout]
            if section.leaves_to >= 0 and section.runs[-1][0] == kind:
                times[:, c, :2] += np.stack(self.prices.relayouts[section.leaves_to].to_wire_s, axis=1)[prices.layout]
        state, bytes_ = prices.state_bytes * sum(layers.tolist()), []
        for moment in self.span.moments:
            held = sum(h * n for h, n in zip(moment, layers.tolist(), strict=True))
            bytes_.append(state + held * prices.residual_bytes)
        rows = np.arange(len(state))
        return _Options(kind, rows, prices.layout, times, np.stack(bytes_, axis=1), prices.live_bytes)

    def _unbeaten(self, options: _Options, weights: SliceWeights) -> Ints:
        """Options that may be part of the best choice."""
        prices = self.prices.kinds[options.kind]
        cost = _cost(options.times, weights)
        columns = np.column_stack([cost, prices.state_bytes, prices.residual_bytes, prices.live_bytes])
        return np.flatnonzero(undominated(columns, prices.layout))

    def _combine(self, weights: SliceWeights, limit: float, *, thin: bool) -> _Table:
        options, moments = self._options, len(self.span.moments)
        costs = [_cost(option.times, weights) for option in options]
        every = [self._unbeaten(some, weights) if thin else some.rows for some in options]
        table = _Table(np.zeros((1, 0), np.int64), np.zeros(1), np.zeros((1, moments)), np.zeros(1))
        for at in range(len(options)):
            self.poll()
            table = self._joined(table, every[at], costs[at], weights, at)
            least = sum(float(cost.min()) for cost in costs[at + 1 :])
            table = table.at(np.flatnonzero(self._fits(table, options[at + 1 :]) & (table.cost + least <= limit)))
            if thin and len(table.live) > FEW_ROWS and at + 1 < len(options):
                columns = np.column_stack([table.cost, table.bytes, table.live])
                table = table.at(np.flatnonzero(undominated(columns, self._labels(table))))
        return table

    def _joined(self, table: _Table, rows: Ints, cost: Floats, weights: SliceWeights, at: int) -> _Table:
        """All choices of the table with some options of one more kind."""
        more = self._options[at]
        if len(table.live) * len(rows) > SHARED_ROWS:
            raise TooHard
        old, new = np.repeat(np.arange(len(table.live)), len(rows)), np.tile(rows, len(table.live))
        picked = np.column_stack([table.picked[old], new])
        total = table.cost[old] + cost[new]
        for c, forward_s, backward_s in self._changes(picked, at):
            total += weights[c].forward * forward_s + weights[c].backward * backward_s
        return _Table(picked, total, table.bytes[old] + more.bytes[new], np.maximum(table.live[old], more.live[new]))

    def _times(self, picked: Ints) -> Floats:
        """Times of complete choices: (choice, stage, forward or backward or step end)."""
        times = np.zeros((len(picked), len(self.span.sections), 3))
        for at, options in enumerate(self._options):
            times += options.times[picked[:, at]]
            for c, forward_s, backward_s in self._changes(picked[:, : at + 1], at):
                times[:, c, 0] += forward_s
                times[:, c, 1] += backward_s
        return times

    def _changes(self, picked: Ints, at: int) -> Iterator[tuple[int, Floats, Floats]]:
        """Yield (stage, forward seconds, backward seconds) of layout changes that the choice of kind ``at`` decides."""
        for c, (first, second) in self._neighbours(at):
            relayouts = self.prices.relayouts[self._options[second].kind]
            before, after = (self._options[place].layout[picked[:, place]] for place in (first, second))
            yield c, relayouts.forward_s[before, after], relayouts.backward_s[before, after]

    def _neighbours(self, at: int) -> list[tuple[int, tuple[int, int]]]:
        """(stage, positions of two kinds that follow each other there), where the later known of them is ``at``."""
        place = {options.kind: i for i, options in enumerate(self._options)}
        return [
            (c, pair)
            for c, section in enumerate(self.span.sections)
            for (a, _), (b, _) in zip(section.runs, section.runs[1:], strict=False)
            for pair in [(place[a], place[b])]
            if max(pair) == at
        ]

    def _fits(self, table: _Table, rest: tuple[_Options, ...]) -> np.typing.NDArray[np.bool_]:
        """Mark what may still fit."""
        least = sum((options.bytes.min(axis=0) for options in rest), np.zeros(table.bytes.shape[1]))
        live = functools.reduce(np.maximum, (options.live.min() for options in rest), table.live)
        room = self.capacity_bytes - self.span.buffer_bytes - live
        return np.asarray((table.bytes + least <= room[:, None]).all(axis=1))

    def _labels(self, table: _Table) -> Ints:
        """Equal where all kinds so far have equal layouts."""
        labels = np.zeros(len(table.live), np.int64)
        for options, picked in zip(self._options, table.picked.T, strict=False):
            labels = labels * len(self.prices.layouts) + options.layout[picked]
        return labels

    def _choice(self, picked: Ints, times: Floats) -> SliceChoice:
        rows = {options.kind: row for options, row in zip(self._options, picked.tolist(), strict=True)}
        stages = []
        for (forward, backward, step_end), section in zip(times.tolist(), self.span.sections, strict=True):
            runs = tuple((kind, rows[kind], layers) for kind, layers in section.runs)
            stages.append(StageChoice(forward, backward, step_end, runs))
        return SliceChoice(tuple(stages))


def _cost(times: Floats, weights: SliceWeights) -> Floats:
    """Weigh the times of each stage, in a fixed order."""
    total = np.zeros(len(times))
    for c, weight in enumerate(weights):
        for i in range(3):
            total += weight[i] * times[:, c, i]
    return total
