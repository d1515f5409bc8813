"""Which rows of a table can be missed: those that another row of their group beats or equals in every column."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MANY_ROWS = 256
"""Above this, all pairs at once cost more than one row after the other."""

SIEVE = 12
"""Rows that are tried on all others before the exact comparison."""


def undominated(rows: npt.NDArray[np.float64], group: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.bool_]:
    """Mark the rows that no other row of the same group beats or equals in every column (first of equal rows: kept)."""
    group = np.zeros(len(rows), np.int64) if group is None else group
    if len(rows) > MANY_ROWS:
        return _swept(rows, group)
    below = (rows[:, None, :] <= rows[None, :, :]).all(axis=2) & (group[:, None] == group[None, :])
    equal = below & below.T
    first = np.triu(np.ones_like(below), 1)
    return np.asarray(~((below & ~equal) | (equal & first)).any(axis=0))


def _swept(rows: npt.NDArray[np.float64], group: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """``undominated`` for many rows: in lexical order only a row before can beat one, so look at those kept."""
    keep = np.zeros(len(rows), bool)
    for label in sorted(set(group.tolist())):
        members = np.flatnonzero(group == label)
        members = members[_not_plainly_beaten(rows[members])]
        ordered = members[np.lexsort(rows[members].T[::-1])]
        front = np.empty_like(rows[members])
        kept: list[int] = []
        for row in ordered.tolist():
            if not (front[: len(kept)] <= rows[row]).all(axis=1).any():
                front[len(kept)] = rows[row]
                kept.append(row)
        keep[kept] = True
    return keep


def _not_plainly_beaten(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rows that none of a few good ones beats strictly in every column that differs: a cheap sieve."""
    scale = np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    best = np.argsort((rows / scale).sum(axis=1), kind="stable")[:SIEVE]
    left = np.arange(len(rows))
    for pivot in rows[best]:
        beaten = (pivot <= rows[left]).all(axis=1) & (pivot < rows[left]).any(axis=1)
        left = left[~beaten]
    return left
