"""Collectives of a compiled program, read from its HLO text.

One parser for what XLA:CPU and XLA:GPU print: plain instructions (``all-reduce``), asynchronous pairs
(``all-reduce-start`` and ``-done``, of which the start counts) and combined collectives (one instruction, many arrays).

Asynchronous collectives print their operands beside their results. The rule, from programs of jaxlib 0.10.2: the type
of ``all-reduce-start`` is that of the result; any other start has the type ``(operands, results, contexts...)``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..profile import CollectiveKind
from ._groups import Groups, device_groups
from ._program import Instruction, Program, array_types, parse_program, type_bytes

_KINDS: tuple[CollectiveKind, ...] = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class HloCollective(NamedTuple):
    """One collective instruction, as one device sees it."""

    kind: CollectiveKind
    bytes: int
    """Of its results: the sums of an all-reduce, the whole of an all-gather, the shards of a reduce-scatter."""
    dtypes: tuple[str, ...]
    """Of its results, in HLO's names (``"f32"``, ``"bf16"``)."""
    groups: Groups
    """Who communicates: (source, target) pairs for a permute; empty when all devices do."""
    in_loop: bool
    """It stands in the body of a loop: ``bytes`` move in every turn."""
    op_name: str
    """Where in the traced program it comes from; empty when the compiler made it up."""
    times: int = 1
    """How often one call of the program runs it: the trip counts of the loops around it."""

    @property
    def arrays(self) -> int:
        """Number of results: above one when the compiler combined collectives."""
        return len(self.dtypes)

    @property
    def group_size(self) -> int:
        """Devices in a group (2 for a permute); 0 when the instruction names no groups."""
        return len(self.groups[0]) if self.groups else 0


def collectives(hlo_text: str) -> list[HloCollective]:
    """Return the collectives of a compiled program, in the order of its text.

    Args:
        hlo_text: What ``jax.stages.Compiled.as_text()`` returns.
    """
    program = parse_program(hlo_text)
    return [
        read_collective(program, computation, instruction)
        for computation, instruction in program.instructions()
        if collective_kind(instruction) is not None
    ]


def collective_kind(instruction: Instruction) -> CollectiveKind | None:
    """Return which collective an instruction issues; None for any other (the end of an asynchronous one too)."""
    opcode = instruction.opcode.removeprefix("ragged-").removesuffix("-start")
    return next((kind for kind in _KINDS if kind == opcode), None)


def read_collective(program: Program, computation: str, instruction: Instruction) -> HloCollective:
    """Return what a collective instruction of ``computation`` says."""
    kind = collective_kind(instruction)
    assert kind is not None, "only collectives are read"
    result = _result_type(instruction.type, kind, is_start=instruction.opcode.endswith("-start"))
    name = _NAME.search(instruction.line)
    return HloCollective(
        kind=kind,
        bytes=type_bytes(result),
        dtypes=tuple(dtype for dtype, _ in array_types(result)),
        groups=device_groups(instruction.line),
        in_loop=computation in program.looped,
        op_name=name[1] if name else "",
        times=program.runs.get(computation, 1),
    )


def _result_type(text: str, kind: CollectiveKind, *, is_start: bool) -> str:
    """Return the part of an instruction's type that is its result."""
    parts = _top_level_parts(text)
    if not is_start or (kind == "all-reduce" and not parts[0].startswith("(")):
        return text
    return parts[1]


def _top_level_parts(text: str) -> list[str]:
    """Split the tuple type ``(a, (b, c), d)`` into ``a``, ``(b, c)`` and ``d``; an array type is its only part."""
    if not text.startswith("("):
        return [text]
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(text[:-1]):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 1:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:-1].strip()]
