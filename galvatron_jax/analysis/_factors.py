"""Factors: the index spaces that dimensions are made of.

Every dimension of every value is a list of factors, major to minor. Factors live in a union-find: operations *unify*
factors that hold the same index space; reshape, slice and split *break* a factor in two; *blocked* factors must never
be sharded. Matching follows data flow, so equal sizes never confuse two index spaces.
"""

from __future__ import annotations

from collections.abc import Iterable

Dim = list[int]
"""Factors of one dimension, major to minor; ``[]`` for size 1."""


class Factors:
    """A union-find over factors, with splitting and blocking."""

    def __init__(self) -> None:
        """Start without factors."""
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._blocked: set[int] = set()

    def new(self, size: int, *, blocked: bool = False) -> Dim:
        """Return a dimension made of one new factor (none for size 1)."""
        return [] if size == 1 else [self._add(size, blocked)]

    def size(self, factor: int) -> int:
        """Return the number of indices of ``factor``."""
        return self._size[self._find(factor)]

    def is_blocked(self, factor: int) -> bool:
        """Tell whether ``factor`` must never be sharded."""
        return self._find(factor) in self._blocked

    def resolve(self, dim: Iterable[int]) -> Dim:
        """Return ``dim`` in its finest factors as known now."""
        finest: Dim = []
        for factor in dim:
            root = self._find(factor)
            if root in self._parts:
                finest += self.resolve(self._parts[root])
            elif self._size[root] != 1:
                finest.append(root)
        return finest

    def block(self, dim: Iterable[int]) -> None:
        """Forbid sharding of every factor in ``dim``."""
        self._blocked.update(self.resolve(dim))

    def split(self, factor: int, major: int) -> Dim:
        """Break ``factor`` into [major, size / major]; every holder of it sees the parts from now on."""
        root = self._find(factor)
        blocked = root in self._blocked
        self._parts[root] = (self._add(major, blocked), self._add(self._size[root] // major, blocked))
        return list(self._parts[root])

    def unify(self, left: Iterable[int], right: Iterable[int]) -> None:
        """Record that two dimensions of equal size hold the same index space.

        Where one side is coarser it is split; where the factorings do not nest (6x50 against 4x75) both are blocked.
        """
        while True:
            a, b = _without_common_head(self.resolve(left), self.resolve(right))
            if not a or not b:
                return
            size_a, size_b = self._size[a[0]], self._size[b[0]]
            if size_a == size_b:
                self._union(a[0], b[0])
            elif size_a % size_b == 0:
                self.split(a[0], size_b)
            elif size_b % size_a == 0:
                self.split(b[0], size_a)
            else:
                self.block(a + b)
                return
            left, right = a, b

    def _add(self, size: int, blocked: bool) -> int:
        self._parent.append(len(self._parent))
        self._size.append(int(size))
        if blocked:
            self._blocked.add(len(self._parent) - 1)
        return len(self._parent) - 1

    def _find(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def _union(self, a: int, b: int) -> None:
        self._parent[b] = a
        if b in self._blocked:
            self._blocked.add(a)


def _without_common_head(a: Dim, b: Dim) -> tuple[Dim, Dim]:
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    return a[common:], b[common:]
