"""Collectives of a compiled program, read from its HLO text.

One parser for what XLA:CPU and XLA:GPU print: plain instructions (``all-reduce``), asynchronous pairs
(``all-reduce-start`` and ``-done``, of which the start counts) and combined collectives (one instruction, many arrays).

Asynchronous collectives print their operands beside their results. The rule, from programs of jaxlib 0.10.2: the type
of ``all-reduce-start`` is that of the result; any other start has the type ``(operands, results, contexts...)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..profile import CollectiveKind
from ._groups import Groups, device_groups

_KINDS: tuple[CollectiveKind, ...] = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# The type holds neither a name nor a quotation, so no operand or metadata is taken for the operation.
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = ([^%\"]*?) (?:ragged-)?({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition|branch_computations|called_computations)=(\{.*?\}|[%\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\]")
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
    looped = _looped_computations(hlo_text)
    return [
        _collective(match, line, computation in looped)
        for computation, line in _instructions(hlo_text)
        if (match := _INSTRUCTION.match(line))
    ]


def _collective(match: re.Match[str], line: str, in_loop: bool) -> HloCollective:
    kind = next(kind for kind in _KINDS if kind == match[2])
    arrays = _ARRAY.findall(_result_type(match[1], kind, is_start=match[3] is not None))
    name = _NAME.search(line)
    return HloCollective(
        kind=kind,
        bytes=sum(_array_bytes(dtype, dims) for dtype, dims in arrays),
        dtypes=tuple(dtype for dtype, _ in arrays),
        groups=device_groups(line),
        in_loop=in_loop,
        op_name=name[1] if name else "",
    )


# -------------------------------------------------------------------------------------------------------- structure
def _instructions(hlo_text: str) -> Iterator[tuple[str, str]]:
    """Yield (computation, line) of every instruction, without comments."""
    computation = ""
    for line in hlo_text.splitlines():
        if line.startswith(" "):
            yield computation, _COMMENT.sub("", line)
        elif head := _COMPUTATION.match(line):
            computation = head[1]


def _looped_computations(hlo_text: str) -> set[str]:
    """Return the names of the computations that run inside a loop: bodies, and all that they call."""
    called: dict[str, set[str]] = {}
    queue: list[str] = []
    for computation, line in _instructions(hlo_text):
        for target in _CALLED.findall(line):
            called.setdefault(computation, set()).update(re.findall(r"[\w.\-]+", target))
        queue += _BODY.findall(line)
    looped: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in looped:
            looped.add(name)
            queue += called.get(name, ())
    return looped


# ------------------------------------------------------------------------------------------------------------- types
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


def _array_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array of type ``dtype[dims]``; types narrower than a byte are packed."""
    elements = math.prod(int(size.strip("<=")) for size in dims.split(",") if size)
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.ceil(elements * bits / 8)
