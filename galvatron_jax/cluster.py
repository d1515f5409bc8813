"""Cluster: how many nodes, how many GPUs in each, of which kind; and the mesh axes that strategies are made of.

Devices are node-major: device ``i`` is GPU ``i % gpus_per_node`` of node ``i // gpus_per_node``. The mesh axes are the
prime factors of the number of nodes (``n0``, ``n1``, ...) and then of the GPUs per node (``g0``, ``g1``, ...), largest
stride first, so any divisor that splits the device list evenly is a set of adjacent axes. For 2x8: n0=2, g0=g1=g2=2.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, NamedTuple

import msgspec

from ._document import Value
from .errors import ClusterError

MAX_DEVICES = 1_000_000
"""Above this a mesh is a slip of the keyboard, not a cluster."""

PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=MAX_DEVICES)]


class MeshAxis(NamedTuple):
    """One prime factor of the device grid."""

    name: str
    size: int


class Cluster(Value, frozen=True, kw_only=True):
    """A homogeneous cluster: ``nodes`` machines with ``gpus_per_node`` devices of kind ``gpu`` each."""

    nodes: PositiveInt
    gpus_per_node: PositiveInt
    gpu: str = "h100"

    @property
    def devices(self) -> int:
        """Number of devices in all."""
        return self.nodes * self.gpus_per_node

    @property
    def mesh(self) -> str:
        """The cluster as the user types it, for example ``"2x8"``."""
        return f"{self.nodes}x{self.gpus_per_node}"

    @property
    def axes(self) -> tuple[MeshAxis, ...]:
        """Mesh axes, slowest-varying first (nodes, then GPUs inside a node)."""
        return self.stage_axes(self.devices)

    def stage_axes(self, devices: int) -> tuple[MeshAxis, ...]:
        """Mesh axes of one pipeline stage: a contiguous slice of ``devices`` devices.

        Args:
            devices: Number of devices of the stage; divides the cluster's.

        Raises:
            ClusterError: the slice would cut nodes unevenly.
        """
        nodes, gpus = self.slice_shape(devices)
        return tuple(
            [MeshAxis(f"n{i}", p) for i, p in enumerate(prime_factors(nodes))]
            + [MeshAxis(f"g{i}", p) for i, p in enumerate(prime_factors(gpus))]
        )

    def tensor_degrees(self, devices: int) -> tuple[int, ...]:
        """Return the tensor-parallel degrees of a stage of ``devices`` devices, ascending: products of trailing axes.

        Data parallelism takes the leading axes and tensor parallelism the trailing ones, so a degree that is no such
        product (3 on six devices, whose axes are 3 and 2) has no set of axes.

        Raises:
            ClusterError: see ``slice_shape``.
        """
        degrees = [1]
        for axis in reversed(self.stage_axes(devices)):
            degrees.append(degrees[-1] * axis.size)
        return tuple(degrees)

    def slice_shape(self, devices: int) -> tuple[int, int]:
        """Return (nodes, GPUs per node) of a contiguous slice of ``devices`` devices.

        Raises:
            ClusterError: the slice holds a part of a node that does not divide it, or does not divide the cluster.
        """
        if devices >= 1 and self.devices % devices == 0:
            if devices % self.gpus_per_node == 0:
                return devices // self.gpus_per_node, self.gpus_per_node
            if self.gpus_per_node % devices == 0:
                return 1, devices
        raise ClusterError(
            f"got a stage of {devices} devices on a {self.mesh} cluster",
            expected="whole nodes, or an even part of one node",
            action="choose another number of stages",
        )


def parse_cluster(text: str, *, gpu: str = "h100", where: str = "--mesh") -> Cluster:
    """Return the cluster that ``text`` names, in the grammar ``NODESxGPUS``, for example ``"2x8"`` or ``"2X8"``.

    Raises:
        ClusterError: ``text`` does not follow the grammar, or names more than ``MAX_DEVICES`` devices.
    """
    match = re.fullmatch(r"([0-9]{1,7})[xX]([0-9]{1,7})", text.strip(), flags=re.ASCII)
    if match:
        nodes, gpus = int(match[1]), int(match[2])
        if nodes >= 1 and gpus >= 1 and nodes * gpus <= MAX_DEVICES:
            return Cluster(nodes=nodes, gpus_per_node=gpus, gpu=gpu)
    raise ClusterError(
        f"got {text!r}",
        expected=f"NODESxGPUS with positive numbers, at most {MAX_DEVICES} devices",
        where=where,
        action="for example 2x8: two nodes with eight GPUs each",
    )


def prime_factors(number: int) -> tuple[int, ...]:
    """Return the prime factors of ``number`` in descending order; ``()`` for 1."""
    factors, divisor = [], 2
    while divisor <= math.isqrt(number):
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(sorted(factors + [number] * (number > 1), reverse=True))


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors of ``number`` in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted(set(small) | {number // d for d in small}))
