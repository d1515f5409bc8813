"""Read compiled programs: is what we want to time really in the loop?"""

from __future__ import annotations

import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|called_computations|branch_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)"
)
_OPCODE = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_KERNELS = {"call", "custom-call", "dot", "fusion"}


def count_in_loop(text: str, opcode: str) -> int:
    """Return how often ``opcode`` (alone or as the start of an asynchronous pair) stands in the body of a while loop.

    Args:
        text: A compiled module, as ``compiled.as_text()`` gives it.
        opcode: For example ``"all-reduce"``.
    """
    computations = _computations(text)
    names = {opcode, f"{opcode}-start"}
    return sum(found in names for body in _loop_bodies(computations) for found in _opcodes(computations, body))


def kernels_in_loop(text: str) -> int:
    """Return how many kernels the bodies of while loops launch themselves: fusions, products, calls."""
    computations = _computations(text)
    lines = [line for body in _loop_bodies(computations) for line in computations[body]]
    opcodes = [match[1] for line in lines if (match := _OPCODE.match(line))]
    return sum(opcode in _KERNELS for opcode in opcodes)


def _computations(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def _loop_bodies(computations: dict[str, list[str]]) -> list[str]:
    bodies = [
        match[1]
        for lines in computations.values()
        for line in lines
        if " while(" in line
        for match in re.finditer(r"body=%?([\w.\-]+)", line)
    ]
    return list(dict.fromkeys(bodies))


def _opcodes(computations: dict[str, list[str]], name: str) -> Iterator[str]:
    """Yield the opcodes in a computation and in those it calls."""
    for line in computations.get(name, ()):
        match = _OPCODE.match(line)
        if match:
            yield match[1]
            for called in _CALLED.finditer(line):
                for callee in called[1].split(","):
                    yield from _opcodes(computations, callee.strip().lstrip("%"))
