"""Find repeated layers where no module says what a layer is: tandem repeats in the list of equations.

A run of equations repeats with period p while equation i and equation i + p have one fingerprint. A run of length L
holds L // p + 1 layers; where they begin is free within L % p positions, and the place where the least crosses is taken
(the residual stream alone, not the stream and a branch). The repeat that covers most matmul FLOPs wins, then the
shorter period; the search goes on in what is left before and after it, which finds an encoder beside a decoder.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ._flow import Flow

_MIN_SHARE = 0.1
"""A repeat with less than this share of the matmul FLOPs of the program is no group of layers."""

_PERIODS = 3000
"""Longest layer that is searched for, in equations; each period costs one comparison of the whole program."""


@dataclasses.dataclass(frozen=True, slots=True)
class Repeat:
    """``count`` layers of ``period`` equations each, from position ``first``."""

    first: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """Position after the last layer."""
        return self.first + self.period * self.count


def find_repeats(flow: Flow) -> list[Repeat]:
    """Return the repeats of a flat program, in order; they are disjoint."""
    return _search(flow, np.asarray(flow.keys, dtype=np.int64), 0, len(flow.keys))


def _search(flow: Flow, keys: np.ndarray, first: int, stop: int) -> list[Repeat]:
    if flow.flops(first, stop) <= _MIN_SHARE * flow.total_flops or not flow.total_flops:
        return []
    best = max(_repeats(flow, keys, first, stop), key=lambda r: _merit(flow, r), default=None)
    if best is None or flow.flops(best.first, best.stop) < _MIN_SHARE * flow.total_flops:
        return []
    return [*_search(flow, keys, first, best.first), best, *_search(flow, keys, best.stop, stop)]


def _merit(flow: Flow, repeat: Repeat) -> tuple[float, int]:
    # Longer periods hold the same work in fewer, larger layers (or a little more of it, by a longer rest).
    work = flow.flops(repeat.first, repeat.stop)
    return work * (1 - 0.02 * np.log2(repeat.period)), -repeat.period


def _repeats(flow: Flow, keys: np.ndarray, first: int, stop: int) -> list[Repeat]:
    """The longest run of every period, in the best of its phases."""
    window = keys[first:stop]
    found = []
    for period in range(1, min(len(window) // 2, _PERIODS) + 1):
        start, length = _longest_run(window[:-period] == window[period:])
        if length >= period:
            phases = range(first + start, first + start + length % period + 1)
            begin = min(phases, key=flow.crossing)
            repeat = Repeat(begin, period, length // period + 1)
            if flow.flops(begin, begin + period) and _is_chain(flow, repeat):
                found.append(repeat)
    return found


def _is_chain(flow: Flow, repeat: Repeat) -> bool:
    second = repeat.first + repeat.period
    return flow.follows(repeat.first, second, second, second + repeat.period)


def _longest_run(equal: np.ndarray) -> tuple[int, int]:
    """Return (start, length) of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]])))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(np.argmax(lengths))
    return int(starts[longest]), int(lengths[longest])
