"""Views: a parameter in the shape in which it is stored, and in the shape that the user gave it.

The analysis may ask for a fused projection ``[embed, 3 * heads * head_dim]`` to be stored as ``[embed, 3, heads *
head_dim]`` (``analysis._factored``): row-major the same array, but its heads can be sharded. Everything that a user
sees has the user's shape. There a dimension is sharded by its leading part only, so axes of a later part are *lost*;
they go to a dimension that is not split and that they divide, and no device holds more than it did. One exchange of the
array takes it there, outside of every step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from jax.sharding import PartitionSpec

from ._mesh import Axes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """Two shapes of one array; each dimension of the user's is one or more of the stored ones, row-major."""

    user: Shape
    stored: Shape

    @property
    def parts(self) -> list[list[int]]:
        """The stored dimensions that each dimension of the user's is made of, major to minor."""
        found: list[list[int]] = []
        position = 0
        for size in self.user:
            part = [position]
            while math.prod(self.stored[axis] for axis in part) < size:
                part.append(part[-1] + 1)
            found.append(part)
            position = part[-1] + 1
        return found

    def moved(self, spec: PartitionSpec, size: Callable[[Axes], int]) -> PartitionSpec:
        """Return a spec of the stored shape, near ``spec``, that the user's shape can have too.

        Args:
            spec: Of the stored shape.
            size: Number of devices along mesh axes.
        """
        axes = [*map(_axes, spec), *[()] * (len(self.stored) - len(spec))]
        lost: Axes = ()
        for part in self.parts:
            for before, axis in zip(part, part[1:], strict=False):
                if size(axes[before]) < self.stored[before]:
                    lost, axes[axis] = (*lost, *axes[axis]), ()
        whole = [part[0] for part in self.parts if len(part) == 1]
        for axis in sorted(whole, key=lambda axis: -self.stored[axis]):
            if self.stored[axis] % size((*axes[axis], *lost)) == 0:
                axes[axis] = (*axes[axis], *lost)
                break
        return PartitionSpec(*[entry or None for entry in axes])

    def of_user(self, moved: PartitionSpec) -> PartitionSpec:
        """Return the spec of the user's shape that is ``moved``, a result of the method of that name."""
        return PartitionSpec(
            *[tuple(name for axis in part for name in _axes(moved[axis])) or None for part in self.parts]
        )


def _axes(entry: str | Sequence[str] | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
