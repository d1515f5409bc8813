"""Find the repeated layers among the marked module calls of a flat program.

A group is a set of calls of sibling modules (the same path but for numbers: ``layers.0``, ``layers.1``) or of one
module called several times (ALBERT). It is a group of *layers* when

    its calls do real work      more than ``_MIN_SHARE`` of the matmul FLOPs
    they run one after another  most read what the one before made (the experts of a layer do not)
    no group encloses it        outermost first: a block, not its two perceptrons

except that an enclosing group steps back (a list of stages, each a list of blocks) when the inner calls do nearly all
of its work, no more values cross between them than between the outer calls, and the outer ones are unlike each other or
hold alike inner ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import AnalysisError
from ._flow import Flow
from ._marks import MARK

_MIN_SHARE = 0.02
"""A group with less than this share of the matmul FLOPs is not a layer group (a pair of norms, say)."""

_INNER_SHARE = 0.8
"""An outer group steps back for an inner one that keeps this share of its work."""


@dataclasses.dataclass(slots=True)
class Call:
    """One module call: a contiguous range of equations."""

    path: str
    first: int
    stop: int
    outer: tuple[str, ...]
    """Patterns of the calls around it."""

    @property
    def module(self) -> str:
        """Path of the module, without the method."""
        return self.path.partition(":")[0]


Groups = dict[str, list[Call]]
"""Calls by pattern, in order."""


def pattern_of(path: str) -> str:
    """Return ``path`` with every number as ``*``."""
    return re.sub(r"\d+", "*", path)


def find_layer_calls(flow: Flow) -> list[Call]:
    """Return the calls that are layers, in order; they are disjoint."""
    groups = {pattern: calls for pattern, calls in _sibling_groups(flow).items() if _is_chain(flow, calls)}
    chosen: list[str] = []
    for pattern in sorted(groups, key=lambda p: len(_enclosing(groups[p]))):
        if _enclosing(groups[pattern]).isdisjoint(chosen) and not _steps_back(flow, pattern, groups):
            chosen.append(pattern)
    chosen = [pattern for pattern in chosen if not _surrounds(flow, groups[pattern], [groups[p] for p in chosen])]
    return _disjoint([call for pattern in chosen for call in groups[pattern]])


def find_named_calls(flow: Flow, glob: str) -> list[Call]:
    """Return the calls of the modules that ``glob`` names (``*`` stands for anything between two dots).

    Raises:
        AnalysisError: it names none.
    """
    calls = _all_calls(flow)
    depth = glob.count(".")
    named = [c for c in calls if c.module.count(".") == depth and fnmatchcase(c.module, glob)]
    if not named:
        known = ", ".join(sorted({pattern_of(c.module) for c in calls}))
        raise AnalysisError(
            f"layers={glob!r} names no module that is called",
            expected=f"one of {known}" if known else "a model with modules",
            where="layers",
            action="name the repeated blocks, for example layers='model.layers.*', or leave it out",
        )
    return _disjoint(named)


def called_modules(flow: Flow) -> list[str]:
    """Return the path patterns of all modules that are called and are not inside another one, in order."""
    return list(dict.fromkeys(pattern_of(call.module) for call in _all_calls(flow) if not call.outer))


def _all_calls(flow: Flow) -> list[Call]:
    """Return every marked call; equations of a pullback inside the loss belong to none."""
    calls: dict[tuple[str, str], Call] = {}
    marks: dict[str, list[tuple[str, str]]] = {}
    for position, equation in enumerate(flow.equations):
        scope = equation.scope
        if scope not in marks:
            forward = scope.partition("transpose(")[0]
            marks[scope] = [(mark[1], mark[2]) for mark in MARK.finditer(forward)]
        outer: tuple[str, ...] = ()
        module = ""
        for path, number in marks[scope]:
            if path.partition(":")[0] == module:
                continue  # the same module again: super().__call__, or a method of its own
            module = path.partition(":")[0]
            call = calls.setdefault((path, number), Call(path, position, position, outer))
            call.stop = position + 1
            outer = (*outer, pattern_of(path))
    return sorted(calls.values(), key=lambda call: (call.first, -call.stop))


def _sibling_groups(flow: Flow) -> Groups:
    """Group calls by pattern; keep groups of two or more that do real work."""
    groups: Groups = {}
    for call in _all_calls(flow):
        groups.setdefault(pattern_of(call.path), []).append(call)
    least = _MIN_SHARE * flow.total_flops
    return {p: calls for p, calls in groups.items() if len(calls) > 1 and _work(flow, calls) > least}


def _is_chain(flow: Flow, calls: Sequence[Call]) -> bool:
    """Tell whether most calls read, directly or not, what the call before made."""
    pairs = list(zip(calls, calls[1:], strict=False))
    following = sum(flow.follows(a.first, a.stop, b.first, b.stop) for a, b in pairs)
    return 2 * following >= len(pairs)


def _steps_back(flow: Flow, pattern: str, groups: Groups) -> bool:
    outer = groups[pattern]
    inner_groups = [inner for inner in groups.values() if pattern in _enclosing(inner) and len(inner) > len(outer)]
    unlike = len({_kind(flow, call) for call in outer}) == len(outer)
    return any(
        _work(flow, inner) > _INNER_SHARE * _work(flow, outer)
        and _most_crossing(flow, inner) <= _most_crossing(flow, outer)
        and (unlike or _holds_alike(flow, outer, inner))
        for inner in inner_groups
    )


def _surrounds(flow: Flow, calls: Sequence[Call], others: Sequence[Sequence[Call]]) -> bool:
    """Tell whether unlike calls stand around a whole other group: they only share a name (Linen's ``Dense_0``...)."""
    if len({_kind(flow, call) for call in calls}) < len(calls):
        return False
    gaps = [(a.stop, b.first) for a, b in zip(calls, calls[1:], strict=False)]
    return any(start <= other[0].first and other[-1].stop <= end for start, end in gaps for other in others)


def _holds_alike(flow: Flow, outer: Sequence[Call], inner: Sequence[Call]) -> bool:
    """Tell whether every outer call holds two or more inner ones of one kind."""
    for call in outer:
        kinds = [_kind(flow, c) for c in inner if call.first <= c.first and c.stop <= call.stop]
        if len(kinds) == len(set(kinds)):
            return False
    return True


def _most_crossing(flow: Flow, calls: Sequence[Call]) -> int:
    """The most values that cross between two of ``calls``."""
    return max(flow.crossing_values(call.first) for call in calls[1:])


def _kind(flow: Flow, call: Call) -> tuple[int, ...]:
    return tuple(flow.keys[call.first : call.stop])


def _work(flow: Flow, calls: Sequence[Call]) -> int:
    return sum(flow.flops(call.first, call.stop) for call in calls)


def _enclosing(calls: Sequence[Call]) -> set[str]:
    return {pattern for call in calls for pattern in call.outer}


def _disjoint(calls: Sequence[Call]) -> list[Call]:
    """Return calls in order, without those that overlap one before."""
    kept: list[Call] = []
    for call in sorted(calls, key=lambda c: (c.first, -c.stop)):
        if not kept or call.first >= kept[-1].stop:
            kept.append(call)
    return kept
