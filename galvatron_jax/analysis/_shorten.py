"""The same model with fewer layers: what a layer costs is the difference between two depths.

Of each run of consecutive layers of one kind the first ones stay; whoever read a result of a dropped layer reads that
of the last one that stays. With none left, the stream passes the run by: what the first layer would have read goes to
whoever reads the last one. Parameters of dropped layers are gone; the rest of the program is the user's own.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import msgspec

from ..errors import UnsupportedError
from ..profile import LayerRun
from ._cut import Segment
from ._flatten import Variable
from ._profile import Analysis

_Names = dict[Variable, Any]
"""What takes the place of a dropped layer's results."""


def shorten(analysis: Analysis, counts: Mapping[str, int]) -> Analysis:
    """Return the analysis of the same model with at most ``counts`` layers of each kind in every run of that kind.

    It can be planned and compiled; its parameters are a flat mapping, not the user's tree.

    Args:
        analysis: The whole model.
        counts: Layers to keep by kind, 0 or more; kinds that are not named stay as they are.

    Raises:
        UnsupportedError: layers can't all be left out, since others read more of them than the stream.
    """
    names: _Names = {}
    segments = [segment for run in _runs(analysis.cut.segments) for segment in _keep(run, counts, names)]
    source, trace = analysis.cut.source, analysis.trace
    read_before = {v for segment in analysis.cut.segments for v in segment.inputs}
    read_now = {v for segment in segments for v in segment.inputs}
    leaves = jax.tree.leaves(trace.parameters)
    held = [i for i, v in enumerate(source.inputs[: len(leaves)]) if v in read_now or v not in read_before]
    _check_made(analysis, segments, names)
    shorter = dataclasses.replace(
        source,
        inputs=[*(source.inputs[i] for i in held), *source.inputs[len(leaves) :]],
        outputs=[names.get(v, v) if isinstance(v, Variable) else v for v in source.outputs],
        weights=len(held),
    )
    rows = dataclasses.replace(
        trace.rows,
        parameters=collections.OrderedDict((trace.paths[i], leaves[i]) for i in held),
        paths=tuple(trace.paths[i] for i in held),
    )
    layers = tuple(LayerRun(kind=run[0].kind, count=len(run)) for run in _runs(segments))
    return dataclasses.replace(
        analysis,
        trace=dataclasses.replace(trace, rows=rows),
        cut=dataclasses.replace(analysis.cut, segments=segments, source=shorter),
        profile=msgspec.structs.replace(analysis.profile, layers=layers),
    )


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield consecutive segments of one kind."""
    for _, run in itertools.groupby(segments, key=lambda segment: segment.kind):
        yield list(run)


def _keep(run: Sequence[Segment], counts: Mapping[str, int], names: _Names) -> list[Segment]:
    """Return the first layers of a run as they read now; note in ``names`` what replaces the results of the others."""
    count = min(counts.get(run[0].kind, len(run)), len(run))
    kept = [dataclasses.replace(s, inputs=[names.get(v, v) for v in s.inputs]) for s in run[:count]]
    for segment in run[count:]:
        if kept:
            names.update(zip(segment.outputs, kept[-1].outputs, strict=True))
        else:
            first = run[0].inputs
            names.update((segment.outputs[o], names.get(first[i], first[i])) for o, i in _carried(run).items())
    return kept


def _carried(run: Sequence[Segment]) -> dict[int, int]:
    """Return which result of a layer is which input of the next one."""
    if len(run) == 1:
        return {}
    made = {v: o for o, v in enumerate(run[0].outputs)}
    return {made[v]: i for i, v in enumerate(run[1].inputs) if v in made}


def _check_made(analysis: Analysis, segments: Sequence[Segment], names: _Names) -> None:
    """Refuse a program that reads what nobody makes any more."""
    dropped = {v for segment in analysis.cut.segments for v in segment.outputs}
    dropped -= {v for segment in segments for v in segment.outputs}
    read = {v for segment in segments for v in segment.inputs}
    read |= {v for v in analysis.cut.source.outputs if isinstance(v, Variable) and v not in names}
    if missing := dropped & read:
        raise UnsupportedError(
            f"{len(missing)} results of the layers left out are read elsewhere",
            expected="a layer that hands on the stream only",
            where="the model's layers",
            action="keep at least one layer of each kind",
        )
