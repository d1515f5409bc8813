"""Lanes: a program over many alike arrays becomes the same program over stacks of them.

An optimizer is traced on the user's own tree, so it sees the paths and shapes it always sees: masks by path, norms per
tensor, factored moments, labels of ``multi_transform``. Then its equations are merged. A *pack* is a list of variables
that stand for the rows of one stacked array. Going through the equations in order,

    one whose operands are row r of packs (and values shared by all rows) becomes lane r of one equation over the packs;
    if every row has such a lane, the equation runs once, under ``jax.vmap``, and its results are packs again;
    equations that repeat one with the same operands are dropped;
    a chain of scalar sums (or maxima, ...) over the rows of a pack becomes one reduction (a global norm);

whatever is left reads single rows. Equations that treat some layers otherwise (a mask by layer number) are left, so the
result is exact for any transformation; how much is merged decides only how long the compiled program is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ..analysis import Equation, Program, Variable, run_equation

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "add": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "and": jnp.all,
    "or": jnp.any,
}
"""Associative primitives, and what they do to all rows of a pack."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Flat inputs or results of a program that are stored as one array."""

    positions: tuple[int, ...]
    """Row by row; exactly one when the array is not a stack."""
    is_stacked: bool


class Place(NamedTuple):
    """Where a variable's value is: a register, or one row of it."""

    register: int
    row: int | None = None


class _Call(NamedTuple):
    equation: Equation
    operands: tuple[Place | Literal, ...]
    """A packed call reads whole registers; those in ``mapped`` row by row."""
    mapped: tuple[bool, ...]
    outputs: tuple[int, ...]


class _Reduction(NamedTuple):
    primitive: str
    whole: tuple[int, ...]
    """Packs of which every row takes part."""
    single: tuple[Place | Literal, ...]
    output: int
    equation: Equation
    """One of the chain, to combine what is left."""


@dataclasses.dataclass(frozen=True)
class LaneProgram:
    """A merged program over stored arrays."""

    instructions: tuple[_Call | _Reduction, ...]
    constants: tuple[tuple[int, Any], ...]
    inputs: int
    results: tuple[tuple[Place | Literal, ...] | int, ...]
    """Of each output group: a register, or the places of its rows."""
    stacked: tuple[bool, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the results, one array per output group, from one array per input group."""
        values: dict[int, Any] = {**dict(enumerate(arrays)), **dict(self.constants)}
        rows: dict[Place, Any] = {}

        def read(place: Place | Literal) -> Any:
            if isinstance(place, Literal):
                return place.val
            if place.row is None:
                return values[place.register]
            if place not in rows:
                rows[place] = values[place.register][place.row]
            return rows[place]

        for instruction in self.instructions:
            if isinstance(instruction, _Reduction):
                values[instruction.output] = _reduce(instruction, values, read)
                continue
            results = _call(instruction, [read(operand) for operand in instruction.operands])
            values.update(zip(instruction.outputs, results, strict=True))
        return [
            self._result(found, stacked, values, read)
            for found, stacked in zip(self.results, self.stacked, strict=True)
        ]

    @staticmethod
    def _result(found: Any, stacked: bool, values: dict[int, Any], read: Callable[[Any], Any]) -> Any:
        if isinstance(found, int):
            return values[found]
        rows = [_array(place, read) for place in found]
        if not stacked:
            return rows[0]
        if len(set(map(_operand_key, found))) == 1:
            return jnp.broadcast_to(rows[0], (len(rows), *rows[0].shape))
        return jnp.stack(rows)


def _array(place: Place | Literal, read: Callable[[Any], Any]) -> Any:
    if isinstance(place, Literal):
        aval: Any = place.aval
        return jnp.asarray(place.val, aval.dtype)
    return read(place)


def _call(call: _Call, operands: Sequence[Any]) -> list[Any]:
    if not any(call.mapped):
        return run_equation(call.equation.eqn, operands)
    axes = tuple(0 if mapped else None for mapped in call.mapped)
    results: list[Any] = jax.vmap(lambda *each: run_equation(call.equation.eqn, each), in_axes=axes)(*operands)
    return results


def _reduce(reduction: _Reduction, values: dict[int, Any], read: Callable[[Any], Any]) -> Any:
    total = _REDUCTIONS[reduction.primitive]
    terms = [total(values[register], axis=0) for register in reduction.whole] + [read(p) for p in reduction.single]
    result = terms[0]
    for term in terms[1:]:
        (result,) = run_equation(reduction.equation.eqn, [result, term])
    return result


def merge_lanes(program: Program, inputs: Sequence[Group], outputs: Sequence[Group]) -> LaneProgram:
    """Merge the equations of ``program`` over the stacked arrays of ``inputs``.

    Args:
        program: A flat program.
        inputs: How its inputs are stored; together all of them, each once.
        outputs: How its results are to be stored.
    """
    apart: set[int] = set()
    while True:
        merger = _Merger(program, inputs, apart)
        if not (incomplete := merger.incomplete()):
            return merger.finish(outputs)
        apart |= incomplete


class _Merger:
    """One pass over the equations."""

    def __init__(self, program: Program, inputs: Sequence[Group], apart: set[int]) -> None:
        self.program, self.inputs, self.apart = program, inputs, apart
        self.instructions: list[_Call | _Reduction] = []
        self.places: dict[Variable, Place | Literal] = {}
        self.widths: dict[int, int] = {}
        """Rows of each register that is a pack."""
        self.registers = 0
        self.known: dict[Hashable, tuple[int, ...]] = {}
        self.lanes: dict[Hashable, tuple[int, set[int], list[int]]] = {}
        """Of each packed equation: its width, the rows seen, and the equations merged."""
        self.chains: dict[Variable, tuple[str, list[Place | Literal], Equation]] = {}
        """Sums still open: primitive, terms, last equation."""
        read = [v for e in program.equations for v in e.inputs if isinstance(v, Variable)]
        self.uses = Counter([*read, *(v for v in program.outputs if isinstance(v, Variable))])
        for group in inputs:
            register = self._register(len(group.positions) if group.is_stacked else 0)
            for row, position in enumerate(group.positions):
                self.places[program.inputs[position]] = Place(register, row if group.is_stacked else None)
        self.constants = [(self._register(), value) for value in program.constants.values()]
        self.places.update((v, Place(r)) for v, (r, _) in zip(program.constants, self.constants, strict=True))
        for equation in program.equations:
            if not self._extend_chain(equation):
                self._merge(equation)

    def incomplete(self) -> set[int]:
        """Return the equations (by id) of lanes that some row lacks: they must stay apart."""
        return {e for width, rows, merged in self.lanes.values() if len(rows) < width for e in merged}

    def finish(self, outputs: Sequence[Group]) -> LaneProgram:
        """Return the merged program."""
        results: list[tuple[Place | Literal, ...] | int] = []
        for group in outputs:
            atoms = [self.program.outputs[position] for position in group.positions]
            places = tuple(atom if isinstance(atom, Literal) else self._place(atom) for atom in atoms)
            results.append(self._whole(places) if group.is_stacked else places)
        stacked = tuple(group.is_stacked for group in outputs)
        return LaneProgram(tuple(self.instructions), tuple(self.constants), len(self.inputs), tuple(results), stacked)

    def _whole(self, places: tuple[Place | Literal, ...]) -> tuple[Place | Literal, ...] | int:
        """Return the register of which ``places`` are the rows in order, else ``places``."""
        first = places[0]
        if not isinstance(first, Place) or self.widths.get(first.register, 0) != len(places):
            return places
        return first.register if places == tuple(Place(first.register, row) for row in range(len(places))) else places

    # ------------------------------------------------------------------------------------------------- equations
    def _merge(self, equation: Equation) -> None:
        operands = [v if isinstance(v, Literal) else self._place(v) for v in equation.inputs]
        rows = {(p.row, self.widths[p.register]) for p in operands if isinstance(p, Place) and p.row is not None}
        if len(rows) == 1 and id(equation) not in self.apart:
            row, width = rows.pop()
            assert row is not None, "rows of packs only"
            self._add_lane(equation, operands, row, width)
            return
        key = (_signature(equation), tuple(map(_operand_key, operands)))
        if key not in self.known:
            self.known[key] = tuple(self._register() for _ in equation.outputs)
            self.instructions.append(_Call(equation, tuple(operands), (False,) * len(operands), self.known[key]))
        self.places.update((v, Place(r)) for v, r in zip(equation.outputs, self.known[key], strict=True))

    def _add_lane(self, equation: Equation, operands: list[Place | Literal], row: int, width: int) -> None:
        mapped = tuple(isinstance(p, Place) and p.row is not None for p in operands)
        whole = tuple(Place(p.register) if isinstance(p, Place) else p for p in operands)
        key = (_signature(equation), tuple(map(_operand_key, whole)), mapped)
        if key not in self.known:
            self.known[key] = tuple(self._register(width) for _ in equation.outputs)
            self.lanes[key] = (width, set(), [])
            self.instructions.append(_Call(equation, whole, mapped, self.known[key]))
        self.lanes[key][1].add(row)
        self.lanes[key][2].append(id(equation))
        self.places.update((v, Place(r, row)) for v, r in zip(equation.outputs, self.known[key], strict=True))

    # ---------------------------------------------------------------------------------------------------- chains
    def _extend_chain(self, equation: Equation) -> bool:
        """Take a scalar ``a + b`` across rows into a chain, which is computed when somebody reads its end."""
        if equation.name not in _REDUCTIONS or not _is_reducible(equation):
            return False
        chains = [v for v in equation.inputs if isinstance(v, Variable) and self._is_open(v, equation.name)]
        rest = [v if isinstance(v, Literal) else self._place(v) for v in equation.inputs if v not in chains]
        rows = {p.row for p in rest if isinstance(p, Place) and p.row is not None}
        if not chains and len(rows) < 2 and not (rows and id(equation) in self.apart):
            return False
        terms = self.chains[chains[0]][1] if chains else []  # taken over, not copied: nobody else reads it
        for other in chains[1:]:
            terms.extend(self.chains[other][1])
        terms.extend(rest)
        self.chains[equation.outputs[0]] = (equation.name, terms, equation)
        return True

    def _is_open(self, variable: Variable, primitive: str) -> bool:
        chain = self.chains.get(variable)
        return chain is not None and chain[0] == primitive and self.uses[variable] == 1

    def _place(self, variable: Variable) -> Place | Literal:
        if variable not in self.places:
            primitive, terms, equation = self.chains.pop(variable)
            whole, single = self._covered(terms)
            register = self._register()
            self.instructions.append(_Reduction(primitive, whole, single, register, equation))
            self.places[variable] = Place(register)
        return self.places[variable]

    def _covered(self, terms: list[Place | Literal]) -> tuple[tuple[int, ...], tuple[Place | Literal, ...]]:
        """Return the packs of which every row is among ``terms`` exactly once, and the other terms."""
        rows = Counter(p for p in terms if isinstance(p, Place) and p.row is not None)
        counts = Counter(p.register for p in rows)
        whole = [
            register
            for register, count in counts.items()
            if count == self.widths[register] and all(rows[Place(register, r)] == 1 for r in range(count))
        ]
        single = [p for p in terms if not (isinstance(p, Place) and p.row is not None and p.register in whole)]
        return tuple(whole), tuple(single)

    def _register(self, width: int = 0) -> int:
        self.registers += 1
        if width:
            self.widths[self.registers - 1] = width
        return self.registers - 1


def _signature(equation: Equation) -> Hashable:
    """What an equation does, whatever its operands."""
    params = tuple(sorted(equation.eqn.params.items()))
    try:
        hash(params)
    except TypeError:
        return equation.name, str(params)
    return equation.name, params


def _is_reducible(equation: Equation) -> bool:
    made = equation.outputs[0].aval
    return made.shape == () and (made.dtype == bool or equation.name not in ("and", "or"))


def _operand_key(operand: Place | Literal) -> Hashable:
    if isinstance(operand, Literal):
        return str(operand.val), operand.aval.str_short()
    return operand
