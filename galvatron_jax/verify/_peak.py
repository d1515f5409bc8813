"""What is alive at a compiled program's memory peak: by role and by layer, read from XLA's own reports.

XLA writes, when asked (``xla_dump_to``), the buffers alive at the peak of its schedule (``*live-range.txt``) and the
scheduled program (``*gpu_after_optimizations.txt``), whose instructions carry JAX's ``op_name``. That name tells the
role of a buffer, because JAX writes the transformations around the scope of the layer:

    state.parameters[...]                            parameters     an argument of the step
    state.optimizer[...]                             optimizer      likewise
    jit(_train)/jvp(layers.3)/...                    forward        kept for the backward pass
    jit(_train)/transpose(jvp(layers.3))/.../
        rematted_computation/...                     recomputed     by full rematerialisation
    jit(_train)/transpose(jvp(layers.3))/...         backward       cotangents and gradients
    jit(_train)/...                                  update         the optimizer's own

Programs of a pipeline stage have arguments ``parameters``, ``kept`` (from the forward pass), ``sums`` and so on.

The reports are made for people and may change: what cannot be read gives an empty answer, never a wrong one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Role = Literal[
    "parameters", "optimizer", "batch", "boundary", "gradients", "forward", "recomputed", "backward", "update", "other"
]

_ALIVE = re.compile(r"^\s+([\w.\-]+)\{[\d,]*\}: (\d+) bytes")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARGUMENTS: dict[str, Role] = {
    "state.parameters": "parameters",
    "state.optimizer": "optimizer",
    "batch": "batch",
    "parameters": "parameters",
    "kept": "forward",
    "sums": "gradients",
    "gradients": "gradients",
    "arriving": "boundary",
    "cotangents": "boundary",
}
"""By the name of the argument, of a train step and of the programs of a pipeline stage."""


class PeakUse(NamedTuple):
    """Buffers of one role and layer that are alive at the peak."""

    role: Role
    layer: str
    """Name of the layer; empty for arguments and the optimizer."""
    bytes: int
    buffers: int


def read_peak(folder: Path, layers: Iterable[str]) -> tuple[PeakUse, ...]:
    """Return what is alive at the peak, largest first.

    Args:
        folder: XLA's dump folder.
        layers: Names of the layers, as scopes in ``op_name``.

    Returns:
        Empty when there are no reports or they cannot be read.
    """
    reports, programs = (sorted(folder.glob(f"*{end}")) for end in ("live-range.txt", "gpu_after_optimizations.txt"))
    if not reports or not programs:
        return ()
    names = dict(_op_names(programs[-1].read_text()))
    known = set(layers)
    size: Counter[tuple[Role, str]] = Counter()
    count: Counter[tuple[Role, str]] = Counter()
    for buffer, size_bytes in _alive_at_peak(reports[-1].read_text()):
        key = _role_and_layer(names.get(buffer, ""), known)
        size[key] += size_bytes
        count[key] += 1
    return tuple(PeakUse(*key, size_bytes, count[key]) for key, size_bytes in size.most_common())


def role_of(op_name: str) -> Role:
    """Return what ``op_name`` says about a buffer; see the module docstring."""
    for prefix, role in _ARGUMENTS.items():
        if op_name.startswith(prefix):
            return role
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "update" if op_name.startswith("jit(") else "other"


def layer_of(op_name: str, layers: set[str]) -> str:
    """Return the layer whose scope ``op_name`` is in; empty for none."""
    return next((part for part in re.split(r"[/()]", op_name) if part in layers), "")


def _role_and_layer(op_name: str, layers: set[str]) -> tuple[Role, str]:
    return role_of(op_name), layer_of(op_name, layers)


def _alive_at_peak(report: str) -> Iterator[tuple[str, int]]:
    """Yield (instruction, bytes) of the buffers alive at the peak."""
    _, found, rest = report.partition("(peak):\n")
    for line in rest.splitlines() if found else ():
        match = _ALIVE.match(line)
        if match is None:
            return
        yield match[1], int(match[2])


def _op_names(program: str) -> Iterator[tuple[str, str]]:
    """Yield (instruction, op_name) of a program."""
    for line in program.splitlines():
        instruction, name = _INSTRUCTION.match(line), _NAME.search(line)
        if instruction and name:
            yield instruction[1], name[1].replace("\\'", "'")
