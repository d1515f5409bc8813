"""What the compiled schedule hides: which work stands between the start and the end of each collective.

A scheduled program issues its instructions in the order of its text. A synchronous collective (``all-reduce``) hides
nothing; an asynchronous one (``all-gather-start`` ... ``all-gather-done``) runs beside what is issued in between. With
g the seconds of the collective (``cost.collective_seconds``, over the nodes that its groups touch) and c the seconds of
the work in between,

    exposed = max(0, g - c)          work that stands inside several collectives hides the first of them first:
                                     one communication stream, so c is used up

    c = sum of max(F / (peak * efficiency(F)), bytes / memory bandwidth) over kernels

with F the FLOP of a kernel's matrix products and bytes those of its operands and results. These seconds are the cost
model's, not a clock's; *which* kernels stand in between is the compiler's own decision, read here and not assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..cost import Group, collective_seconds, product_seconds, traffic_seconds
from ..profile import HardwareProfile
from ._hlo import HloCollective, collective_kind, read_collective
from ._program import Instruction, Program, array_types, parse_program, type_bytes

_DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_CONTRACTED = re.compile(r"lhs_contracting_dim(?:s|ensions)\"?[=:][\[{]([\d,\"]*)[\]}]")
_FREE = frozenset("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota".split())
"""Instructions that issue no kernel."""


class ScheduledCollective(NamedTuple):
    """A collective at its place in the schedule."""

    collective: HloCollective
    asynchronous: bool
    products_beside: int
    """Kernels with matrix products issued between its start and its end."""
    seconds: float
    """Of one run, by the cost model."""
    exposed_s: float
    """Of one run, not hidden behind the work issued in between."""


def scheduled_collectives(
    hlo_text: str, hardware: HardwareProfile, *, devices: int, gpus_per_node: int
) -> list[ScheduledCollective]:
    """Return every collective of a scheduled program with what is issued beside it.

    Args:
        hlo_text: A compiled program (``is_scheduled=true``).
        hardware: What kernels and collectives are priced with.
        devices: Devices of the program: the group of an instruction that names none.
        gpus_per_node: Devices of a node, in the order of the program's device assignment.
    """
    program = parse_program(hlo_text)
    kernels, links = _Kernels(program, hardware), _Links(hardware, devices, gpus_per_node)
    wrapped = {
        name
        for _, instruction in program.instructions()
        if instruction.opcode == "async-start"
        for name in instruction.called().get("calls", ())
    }
    return [
        found for name in program.computations if name not in wrapped for found in _walk(program, name, kernels, links)
    ]


@dataclass(slots=True)
class _UnderWay:
    """A collective between its start and its end."""

    collective: HloCollective
    seconds: float
    left_s: float
    products: int = 0


@dataclass(frozen=True, slots=True)
class _Links:
    """Seconds of collectives, by the cost model."""

    hardware: HardwareProfile
    devices: int
    gpus_per_node: int

    def seconds(self, collective: HloCollective) -> float:
        """Return the seconds of one run."""
        members = collective.groups[0] if collective.groups else range(self.devices)
        nodes = len({device // self.gpus_per_node for device in members})
        group = Group(len(members), nodes, math.ceil(len(members) / nodes))
        whole = len(members) if collective.kind == "reduce-scatter" else 1
        return collective_seconds(collective.kind, whole * collective.bytes, group, self.hardware)


@dataclass(slots=True)
class _Kernels:
    """Seconds of kernels, by the cost model."""

    program: Program
    hardware: HardwareProfile
    _products_of: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    def seconds(self, instruction: Instruction, types: Mapping[str, str]) -> tuple[float, bool]:
        """Return the seconds of one kernel, and whether it computes a matrix product."""
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-start")):
            return 0.0, False
        products = self._products(instruction, types)
        size_bytes = type_bytes(instruction.type) + sum(
            type_bytes(types.get(name, "")) for name in instruction.operands
        )
        moving_s = traffic_seconds(size_bytes, 1, self.hardware)
        computing_s = sum(product_seconds(flops, dtype, self.hardware) for flops, dtype in products)
        return max(moving_s, computing_s), bool(products)

    def _products(self, instruction: Instruction, types: Mapping[str, str]) -> list[tuple[float, str]]:
        """(FLOP, dtype) of the products of an instruction, or of the fusion that it calls."""
        if instruction.opcode == "dot" or (instruction.opcode == "custom-call" and "matmul" in instruction.line):
            return [_product(instruction, types)]
        return [found for name in instruction.called().get("calls", ()) for found in self._inside(name)]

    def _inside(self, computation: str) -> list[tuple[float, str]]:
        if computation not in self._products_of:
            body = self.program.computations.get(computation, ())
            types = {i.name: i.type for i in body}
            self._products_of[computation] = [found for i in body for found in self._products(i, types)]
        return self._products_of[computation]


def _walk(program: Program, computation: str, kernels: _Kernels, links: _Links) -> Iterator[ScheduledCollective]:
    body = program.computations[computation]
    types = {instruction.name: instruction.type for instruction in body}
    under_way: dict[str, _UnderWay] = {}
    for instruction in body:
        collective = _issued(program, computation, instruction)
        if collective is not None:
            seconds = links.seconds(collective)
            if instruction.opcode.endswith("-start"):
                under_way[instruction.name] = _UnderWay(collective, seconds, seconds)
            else:
                yield ScheduledCollective(collective, False, 0, seconds, seconds)
        elif instruction.opcode.endswith("-done") and instruction.operands[:1] and instruction.operands[0] in under_way:
            done = under_way.pop(instruction.operands[0])
            yield ScheduledCollective(done.collective, True, done.products, done.seconds, done.left_s)
        elif under_way:
            _run_beside(under_way.values(), *kernels.seconds(instruction, types))


def _run_beside(under_way: Iterable[_UnderWay], seconds: float, is_product: bool) -> None:
    """Let the oldest collective run beside a kernel of ``seconds``, and the next one beside what is left of it."""
    for collective in under_way:
        collective.products += is_product
        hidden_s = min(seconds, collective.left_s)
        collective.left_s -= hidden_s
        seconds -= hidden_s


def _issued(program: Program, computation: str, instruction: Instruction) -> HloCollective | None:
    """The collective that an instruction issues, itself or in the computation that it wraps (newer JAX)."""
    if collective_kind(instruction) is not None:
        return read_collective(program, computation, instruction)
    if instruction.opcode == "async-start":
        for name in instruction.called().get("calls", ()):
            for inner in program.computations.get(name, ()):
                if collective_kind(inner) is not None:
                    return read_collective(program, name, inner)
    return None


def _product(instruction: Instruction, types: Mapping[str, str]) -> tuple[float, str]:
    """(FLOP, dtype) of one matrix product: 2 * elements of the result * size of the contracted dimensions."""
    left = array_types(types.get(instruction.operands[0], "")) if instruction.operands else []
    result = array_types(instruction.type)
    match = _CONTRACTED.search(instruction.line)
    if not left or not result or not match:
        return 0.0, "float32"
    dtype, dims = left[0]
    contracted = [int(i) for i in re.findall(r"\d+", match[1])]
    return 2.0 * math.prod(result[0][1]) * math.prod(dims[i] for i in contracted), _DTYPES.get(dtype, "float32")
