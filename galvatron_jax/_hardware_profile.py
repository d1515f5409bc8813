"""The hardware profile: one kind of GPU and the links between them; import it from ``profile``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from ._document import Bytes, Count, Document, Fraction, NonNegative, Positive, Value
from .measured import Provenance, check_rising

Phase = Literal["forward", "backward"]
CollectiveKind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


class Link(Value, frozen=True, kw_only=True):
    """A path between devices, per GPU and direction."""

    bandwidth_bytes_per_s: Positive
    """Bus bandwidth that large collectives reach (not the line rate)."""
    latency_s: NonNegative
    """Time of one ring step with an empty message."""


class CurvePoint(Value, frozen=True, kw_only=True):
    """Share of the matmul peak reached by a product of ``flops`` FLOP on one device."""

    flops: Positive
    efficiency: Fraction


class CollectiveTable(Value, frozen=True, kw_only=True):
    """Measured time of one collective over one kind of device group, at rising sizes."""

    kind: CollectiveKind
    group: Count
    """Devices in the group."""
    inside_node: bool
    per_node: Count | None = None
    """Members of a group on each node that it touches; None: not told."""
    sizes_bytes: tuple[Positive, ...]
    """Bytes of the whole array of the group (see ``Collective.array``)."""
    times_s: tuple[Positive, ...]

    def __post_init__(self) -> None:
        """Refuse tables that cannot be interpolated."""
        check_rising("sizes_bytes", self.sizes_bytes, self.times_s)
        if len(self.sizes_bytes) < 2:
            raise ValueError("sizes_bytes and times_s need at least 2 entries")


class HardwareProfile(Document, frozen=True, kw_only=True):
    """One kind of GPU and the links between them."""

    DOCUMENT: ClassVar[str] = "hardware profile"

    name: str
    description: str
    measured: bool
    """True when the profilers wrote it, False for bundled data."""
    memory_bytes: Count
    reserved_bytes: Bytes
    """Memory that no array can use: CUDA context, NCCL buffers, allocator slack."""
    memory_bandwidth_bytes_per_s: Positive
    """What a large copy reaches (reads plus writes)."""
    matmul_flops_per_s: dict[str, Positive]
    """Dense peak by operand dtype."""
    matmul_efficiency: tuple[CurvePoint, ...]
    """Share of the peak by size of the product; log-interpolated, flat outside."""
    attention_efficiency: dict[Phase, Fraction]
    """Share of the peak that a fused attention kernel reaches."""
    fused_attention: bool
    """A fused kernel exists (16-bit dtypes): attention scores never reach memory."""
    kernel_launch_s: NonNegative
    overlap_slowdown: Annotated[float, msgspec.Meta(ge=1, le=1000)]
    """Factor by which compute is slower while a collective runs beside it; 1000: compute stands still meanwhile."""
    intra_node: Link
    inter_node: Link
    """Per GPU; all GPUs of a node share the node's network cards evenly."""
    eager_bytes: NonNegative = 0.0
    """Of a message between nodes, what its sender need not wait for: buffers take it. 0: it waits till all is there."""
    program_s: NonNegative = 0.0
    """Of the host, for each program of a pipeline. 0: devices queue programs ahead (GPUs)."""
    sums_before_reducing: bool
    """The compiler merges all-reduces whose results are only added up (XLA:GPU)."""
    combines_gathers: bool = True
    """All weights of a layer are gathered, and their gradients reduced, in one message (XLA:GPU); else one for each."""
    collectives: tuple[CollectiveTable, ...] = ()
    sources: dict[str, str] = {}
    """Where each number comes from, by field name."""
    provenance: Provenance | None = None
    """Of what was measured; None for bundled data."""

    @property
    def device(self) -> str:
        """Name of the kind of device: what was measured there counts here."""
        return self.provenance.device if self.provenance else self.name

    def __post_init__(self) -> None:
        """Refuse an efficiency curve that cannot be interpolated."""
        sizes = [point.flops for point in self.matmul_efficiency]
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError("matmul_efficiency needs at least one point, with rising flops")
        if not self.matmul_flops_per_s:
            raise ValueError("matmul_flops_per_s names no dtype")
