"""The device mesh of a stage, and which of its axes a degree of parallelism takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..cluster import Cluster
from ..plan import Strategy

Axes = tuple[str, ...]
"""Names of mesh axes."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageMesh:
    """The mesh of one pipeline stage: axes of prime size, slowest-varying first."""

    mesh: Mesh

    def data_axes(self, strategy: Strategy) -> Axes:
        """Return the leading axes, which carry the batch."""
        return self.first_axes(tuple(self.mesh.axis_names), strategy.dp)

    def tensor_axes(self, strategy: Strategy) -> Axes:
        """Return the trailing axes, which carry the tensor classes."""
        return tuple(self.mesh.axis_names[len(self.data_axes(strategy)) :])

    def size(self, axes: Axes) -> int:
        """Return the number of devices along ``axes`` together."""
        return math.prod(self.mesh.shape[name] for name in axes)

    def first_axes(self, axes: Axes, count: int) -> Axes:
        """Return the leading ones of ``axes`` whose sizes multiply to ``count``."""
        taken = 0
        while self.size(axes[:taken]) < count:
            taken += 1
        assert self.size(axes[:taken]) == count, "check_plan lets only axis products through"
        return axes[:taken]

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Return ``spec`` on this mesh."""
        return NamedSharding(self.mesh, spec)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that puts a whole copy on every device."""
        return self.sharding(PartitionSpec())


def stage_mesh(cluster: Cluster, devices: Sequence[jax.Device]) -> StageMesh:
    """Return the mesh of a stage on ``devices``, a contiguous slice of the node-major device list."""
    axes = cluster.stage_axes(len(devices))
    names, sizes = [axis.name for axis in axes], [axis.size for axis in axes]
    grid = np.array(devices, dtype=object).reshape(sizes)
    return StageMesh(Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names)))
