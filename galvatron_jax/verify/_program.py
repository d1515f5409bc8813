"""A compiled program's text as computations of instructions, in schedule order, and how often each computation runs.

XLA prints callees before callers, one instruction per line; in a scheduled module the lines of a computation stand in
the order in which they are issued. A computation runs as often as its callers do, times the trip count of a loop whose
body it is (``known_trip_count``; the loop over microbatches says it in its name, ``runtime._microbatches``; any other
loop counts once, since nobody knows better).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(to_apply|calls|body|condition|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{.*?\}|[%\w.\-]+)"
)
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')
_MICROBATCHES = re.compile(r'op_name="(?:[^"]*/)?microbatches_(\d+)/while"')
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\]")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    """Type of the result, as printed."""
    operands: tuple[str, ...]
    """Names of the instructions that it reads."""
    line: str

    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations that it calls, by role (``body``, ``calls``, ...)."""
        return {role: tuple(re.findall(r"[\w.\-]+", names)) for role, names in _CALLED.findall(self.line)}

    @property
    def trips(self) -> int:
        """Turns of a loop; 1 where they are not known."""
        match = _TRIPS.search(self.line) or _MICROBATCHES.search(self.line)
        return int(match[1]) if match else 1


@dataclass(frozen=True, slots=True)
class Program:
    """A parsed module."""

    computations: dict[str, tuple[Instruction, ...]]
    """In the order of the text: callees first."""
    entry: str
    runs: Mapping[str, int] = field(init=False)
    """How often each computation runs in one call of the program."""
    looped: frozenset[str] = field(init=False)
    """Computations that run inside a loop."""

    def __post_init__(self) -> None:
        """Count runs from the entry down."""
        runs, looped = Counter({self.entry: 1}), set()
        for name in reversed(self.computations):
            for instruction in self.computations[name]:
                for role, callees in instruction.called().items():
                    times = instruction.trips if role == "body" else 1
                    for callee in callees:
                        runs[callee] += runs[name] * times
                        if role == "body" or name in looped:
                            looped.add(callee)
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "looped", frozenset(looped))

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) in the order of the text."""
        for name, body in self.computations.items():
            for instruction in body:
                yield name, instruction


def parse_program(hlo_text: str) -> Program:
    """Return the computations of what ``jax.stages.Compiled.as_text()`` prints."""
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in hlo_text.splitlines():
        if line.startswith(" "):
            if instruction := _instruction(_COMMENT.sub("", line)):
                computations.setdefault(name, []).append(instruction)
        elif head := _COMPUTATION.match(line):
            name = head[2]
            computations.setdefault(name, [])
            entry = name if head[1] else entry
    return Program({key: tuple(body) for key, body in computations.items()}, entry or name)


def array_types(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return (dtype, dimensions) of every array in a printed type."""
    return [
        (dtype, tuple(int(size.strip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(text)
    ]


def type_bytes(text: str) -> int:
    """Return the bytes of all arrays in a printed type; types narrower than a byte are packed."""
    return sum(math.ceil(math.prod(dims) * _bits(dtype) / 8) for dtype, dims in array_types(text))


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return None
    operands = _OPERANDS.findall(_balanced(rest, opcode.end() - 1))
    return Instruction(head[1], opcode[1], rest[: opcode.start()].strip(), tuple(operands), line)


def _balanced(text: str, start: int) -> str:
    """Return what stands between the bracket at ``start`` and the one that closes it."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if not depth:
            return text[start + 1 : position]
    return text[start + 1 :]
