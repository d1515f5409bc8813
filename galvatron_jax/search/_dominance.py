"""Which rows of a table can be missed: those that another row of their group beats or equals in every column."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MANY_ROWS = 256
"""Above this, all pairs at once cost more than one row after the other."""


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
        ordered = members[np.lexsort(rows[members].T[::-1])]
        front = np.empty_like(rows[members])
        kept: list[int] = []
        for row in ordered.tolist():
            if not (front[: len(kept)] <= rows[row]).all(axis=1).any():
                front[len(kept)] = rows[row]
                kept.append(row)
        keep[kept] = True
    return keep
