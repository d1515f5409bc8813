"""What was measured: subjects, readings, and the file that keeps them until the profile is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from .._document import Document, Value
from ..profile import Bytes, Count, NonNegative, Positive
from ..units import KIB
from ._text import format_si

LOOP, LAUNCH, COPY, MATMUL, OVERLAP, MESSAGE = "loop", "launch", "copy", "matmul", "overlap", "message"
SENDER, PROGRAM = "message before products of its sender", "program"
"""Subjects that are no collective: a trip with one tiny kernel; a trip with many of them; x + 1 over a large array; a
product of two square matrices; an all-reduce beside products that do not need it; a message from each device of a node
to its partner on the next one; such a message, products of its sender after it, and an answer; a program that is waited
for."""

ANSWER_BYTES = KIB
"""Size of the smallest message that is measured, and of the answer."""


Series = tuple[str, str, str, int, int]


class Subject(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One thing to measure."""

    what: str
    """A ``CollectiveKind`` or one of the names above."""
    size: Bytes = 0
    """Bytes: of the whole array of the group (all-to-all, permute, message, copy: the local one); FLOP for products."""
    dtype: str = ""
    """Operands of a product."""
    layer: str = ""
    """Layer kind, of a pass of a layer (``what``: a ``PassName``; ``size``: samples; ``group``: tp, on one device)."""
    group: Count = 1
    """Devices in a group; all groups of the mesh work at the same time, as they do in training."""
    stride: Count = 1
    """Distance of neighbours in a group, in the node-major device list."""

    @property
    def series(self) -> Series:
        """What subjects that differ only in size have in common."""
        return self.what, self.dtype, self.layer, self.group, self.stride

    @property
    def has_partners(self) -> bool:
        """Devices wait for each other in it, so that it takes now less, now more."""
        return self.group > 1 and not self.layer

    @property
    def text(self) -> str:
        """In words, for example ``"all-reduce over 4 devices, stride 2, 65.5 kB"``."""
        if self.layer:
            return f"{self.layer} {self.what}, tp {self.group}, {self.size} sample{'s' * (self.size > 1)}"
        text = " ".join(part for part in (self.dtype, self.what) if part)
        if self.group > 1:
            text += f" over {self.group} devices, stride {self.stride}"
        if self.size:
            text += ", " + format_si(self.size, "FLOP" if self.what == MATMUL else "B")
        return text


class Reading(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What the clock said about one subject."""

    subject: Subject
    seconds: Positive
    """Of one operation, its share of the loop and its glue still in it."""
    spread: NonNegative
    """See ``Slope.spread``."""
    operations: Count = 1
    """Operations in one trip of the loop."""
    glue: Bytes = 0
    """Kernels with next to nothing to do that each operation brings along."""
    products: Bytes = 0
    """Products beside one all-reduce, or after one message."""
    flops: NonNegative = 0.0
    """Of one operation, as the compiler counts them; 0 where it does not tell."""


def overlap_parts(subject: Subject, side: int, readings: Mapping[Subject, Reading]) -> tuple[Reading, Reading] | None:
    """Return the readings of the all-reduce and of one product that ``subject`` puts beside each other, if known."""
    alone = readings.get(msgspec.structs.replace(subject, what="all-reduce", dtype=""))
    product = readings.get(Subject(what=MATMUL, size=product_flops(side), dtype=subject.dtype))
    return (alone, product) if alone and product else None


def sender_parts(
    subject: Subject, side: int, readings: Mapping[Subject, Reading]
) -> tuple[Reading, Reading, Reading] | None:
    """Return the readings of the message, its answer and one product of ``subject``, if known."""
    alone = msgspec.structs.replace(subject, what=MESSAGE, dtype="")
    message, answer = readings.get(alone), readings.get(msgspec.structs.replace(alone, size=ANSWER_BYTES))
    product = readings.get(Subject(what=MATMUL, size=product_flops(side), dtype=subject.dtype))
    return (message, answer, product) if message and answer and product else None


def product_flops(side: int) -> int:
    """Return the FLOP of a product of two square matrices."""
    return 2 * side * side * side


def product_side(flops: int) -> int:
    """Return the side of the square matrices whose product takes ``flops`` FLOP."""
    return round(math.cbrt(flops / 2))


class Machine(Value, frozen=True, kw_only=True):
    """What the readings belong to: readings of another machine must not be mixed in."""

    platform: str
    """``"gpu"`` or ``"cpu"``."""
    device_kind: str
    devices: Count
    processes: Count
    mesh: str
    jax_version: str
    driver: str
    """``""`` when there is none."""


class ReadingLog(Document, frozen=True, kw_only=True):
    """The partial file: everything measured so far."""

    DOCUMENT: ClassVar[str] = "file of partial hardware readings"

    machine: Machine
    quick: bool
    model: str = ""
    """Of layers: name, structure, sequence length and dtype."""
    readings: tuple[Reading, ...]
