"""Who communicates with whom: the device groups of a collective, in the three spellings of HLO text.

* a list: ``{{0,1},{2,3}}`` (also the pairs of a permute);
* an iota: ``[2,4]<=[2,2,2]T(0,2,1)``, two groups of four: devices 0-7 as a 2x2x2 grid, transposed, in rows;
* mesh axes: ``mesh['a'=2,'b'=4] {'b'}``, one group for each place on the other axes. The mesh may number its devices
  otherwise (``device_ids=([4,2]T(1,0))``), and an axis may be used in part: ``'b':(2)2`` is the factor 2 of ``b`` that
  stands after a factor 2.

Source: XLA, ``hlo/ir/replica_group.h``, ``hlo/ir/mesh_and_axis.h``; programs of jaxlib 0.10.2 use all three.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import numpy.typing as npt

Groups = tuple[tuple[int, ...], ...]
"""Devices, by position in the program's device assignment, that communicate with each other."""

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}")
_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def device_groups(instruction: str) -> Groups:
    """Return the device groups that an instruction names; empty when it names none (all devices together)."""
    if match := _MESH.search(instruction):
        sizes = {name: int(size) for name, size in _SIZE.findall(match[1])}
        ids = _iota(match[2] or str(math.prod(sizes.values())), match[3])
        return _mesh_groups(sizes, _AXIS.findall(match[4]), ids)
    if match := _IOTA.search(instruction):
        return _rows(_iota(match[3], match[4]).reshape(int(match[1]), int(match[2])))
    if match := _LISTED.search(instruction):
        return tuple(tuple(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", match[1]))
    return ()


def _mesh_groups(sizes: dict[str, int], chosen: list[tuple[str, str, str]], ids: npt.NDArray[np.int64]) -> Groups:
    """Split every axis where a chosen part begins or ends; the chosen factors span a group."""
    spans = [(name, int(before or 1), int(before or 1) * int(part or sizes[name])) for name, before, part in chosen]
    factors: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        ends = {end for axis, *span in spans if axis == name for end in span}
        for start, stop in itertools.pairwise(sorted({1, size} | ends)):
            factors[name, start] = stop // start
    places = list(factors)
    inside = [
        place
        for axis, start, stop in spans
        for place, (name, begin) in enumerate(places)
        if name == axis and start <= begin < stop
    ]
    outside = [place for place in range(len(places)) if place not in inside]
    grid = ids.reshape(list(factors.values())).transpose(outside + inside)
    return _rows(grid.reshape(-1, math.prod(factors[places[place]] for place in inside)))


def _iota(shape: str, transposed: str | None) -> npt.NDArray[np.int64]:
    """Device ids 0, 1, ... in ``shape``, with its dimensions permuted."""
    sizes = [int(size) for size in shape.split(",")]
    ids = np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes)
    return ids.transpose([int(dim) for dim in transposed.split(",")]) if transposed else ids


def _rows(table: npt.NDArray[np.int64]) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in table)
