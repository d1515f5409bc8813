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
costs more than the limit even with their cheapest; and among options of one kind and layout those that another one
beats or equals in every stage's times, bytes and live bytes (the objective's weights are not negative).

Complexity: the product of the kinds' options that survive, usually some thousand rows, in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._dominance import undominated
from ._knapsack import Floats, Ints
from ._pricing import Prices
from ._stage import ROUNDING, SliceChoice, SliceWeights, Span, StageChoice

FEW_ROWS = 4096
"""Tables that grow beyond it are thinned before the next kind comes."""


class _Options(NamedTuple):
    """What one kind can do: rows of ``KindPrices``."""

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
    times: Floats
    bytes: Floats
    live: Floats

    def at(self, keep: Ints) -> _Table:
        """Some of the rows."""
        return _Table(self.picked[keep], self.times[keep], self.bytes[keep], self.live[keep])


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
        return self._choice(table, int(self._cost(table.times, weights).argmin()))

    def within(self, weights: SliceWeights, limit: float) -> list[SliceChoice]:
        """Return all choices that cost at most ``limit`` and that no other one beats or equals in all times."""
        table = self._combine(weights, limit * (1 + ROUNDING), thin=False)
        kept = table.at(np.flatnonzero(undominated(table.times.reshape(len(table.live), -1))))
        return [self._choice(kept, i) for i in range(len(kept.live))]

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
        every, live = np.stack(bytes_, axis=1), prices.live_bytes
        columns = np.column_stack([times.reshape(len(state), -1), every, live])
        keep = np.flatnonzero(undominated(columns, prices.layout))
        return _Options(kind, keep, prices.layout[keep], times[keep], every[keep], live[keep])

    def _combine(self, weights: SliceWeights, limit: float, *, thin: bool) -> _Table:
        options, moments = self._options, len(self.span.moments)
        table = _Table(np.zeros((1, 0), np.int64), np.zeros((1, len(weights), 3)), np.zeros((1, moments)), np.zeros(1))
        for at, more in enumerate(options):
            self.poll()
            table = self._joined(table, more, at)
            table = table.at(np.flatnonzero(self._promising(table, options[at + 1 :], weights, limit)))
            if thin and len(table.live) > FEW_ROWS and at + 1 < len(options):
                columns = np.column_stack([self._cost(table.times, weights), table.bytes, table.live])
                table = table.at(np.flatnonzero(undominated(columns, self._labels(table))))
        return table

    def _joined(self, table: _Table, more: _Options, at: int) -> _Table:
        """All choices of the table with all options of one more kind."""
        old = np.repeat(np.arange(len(table.live)), len(more.live))
        new = np.tile(np.arange(len(more.live)), len(table.live))
        times = table.times[old] + more.times[new]
        for c, (first, second) in self._neighbours(at):
            kind, before, after = self._meeting(table.picked[old], new, first, second)
            relayouts = self.prices.relayouts[kind]
            times[:, c, 0] += relayouts.forward_s[before, after]
            times[:, c, 1] += relayouts.backward_s[before, after]
        picked = np.column_stack([table.picked[old], new])
        return _Table(picked, times, table.bytes[old] + more.bytes[new], np.maximum(table.live[old], more.live[new]))

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

    def _meeting(self, picked: Ints, new: Ints, first: int, second: int) -> tuple[int, Ints, Ints]:
        """(kind that takes the stream, layouts before, layouts after)."""
        at = picked.shape[1]
        before, after = (
            self._options[place].layout[new if place == at else picked[:, place]] for place in (first, second)
        )
        return self._options[second].kind, before, after

    def _promising(
        self, table: _Table, rest: tuple[_Options, ...], weights: SliceWeights, limit: float
    ) -> np.typing.NDArray[np.bool_]:
        """Mark what may still fit, at no more than ``limit``."""
        least_bytes = sum((options.bytes.min(axis=0) for options in rest), np.zeros(table.bytes.shape[1]))
        least_cost = sum(float(self._cost(options.times, weights).min()) for options in rest)
        live = functools.reduce(np.maximum, (options.live.min() for options in rest), table.live)
        room = self.capacity_bytes - self.span.buffer_bytes - live
        fits = (table.bytes + least_bytes <= room[:, None]).all(axis=1)
        return np.asarray(fits & (self._cost(table.times, weights) + least_cost <= limit))

    def _labels(self, table: _Table) -> Ints:
        """Equal where all kinds so far have equal layouts."""
        labels = np.zeros(len(table.live), np.int64)
        for options, picked in zip(self._options, table.picked.T, strict=False):
            labels = labels * len(self.prices.layouts) + options.layout[picked]
        return labels

    def _cost(self, times: Floats, weights: SliceWeights) -> Floats:
        total = np.zeros(len(times))
        for c, weight in enumerate(weights):
            for i in range(3):
                total += weight[i] * times[:, c, i]
        return total

    def _choice(self, table: _Table, at: int) -> SliceChoice:
        rows = {
            options.kind: int(options.rows[pick])
            for options, pick in zip(self._options, table.picked[at].tolist(), strict=True)
        }
        stages = []
        for times, section in zip(table.times[at].tolist(), self.span.sections, strict=True):
            forward, backward, step_end = times
            runs = tuple((kind, rows[kind], layers) for kind, layers in section.runs)
            stages.append(StageChoice(forward, backward, step_end, runs))
        return SliceChoice(tuple(stages))
