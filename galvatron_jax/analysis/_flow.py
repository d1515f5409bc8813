"""How values flow through a flat program: what depends on what, and how much crosses each position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from ._fingerprint import Fingerprints
from ._flatten import Equation, Program, Variable
from ._flops import equation_flops
from ._jaxpr import is_differentiable


class Flow:
    """A flat program seen by position: sums of work, and of what crosses."""

    def __init__(self, program: Program) -> None:
        """Read ``program``."""
        self.equations: Sequence[Equation] = program.equations
        flops = [equation_flops(equation.eqn) for equation in program.equations]
        self._flops = [0, *accumulate(flops)]
        self._crossing = _crossing(program, lambda v: int(v.aval.size))
        self._values = _crossing(program, lambda _: 1)

    @functools.cached_property
    def keys(self) -> list[int]:
        """Fingerprint of each equation."""
        fingerprints = Fingerprints()
        return [fingerprints.of(equation) for equation in self.equations]

    def flops(self, first: int, stop: int) -> int:
        """FLOP of the equations from ``first`` to before ``stop``."""
        return self._flops[stop] - self._flops[first]

    @property
    def total_flops(self) -> int:
        """FLOP of the program."""
        return self._flops[-1]

    def crossing(self, position: int) -> int:
        """Elements of activations that are made before ``position`` and read at or after it."""
        return self._crossing[position]

    def crossing_values(self, position: int) -> int:
        """How many activations these are."""
        return self._values[position]

    def follows(self, first: int, stop: int, later: int, end: int) -> bool:
        """Tell whether the equations from ``later`` to before ``end`` depend on those of ``first`` to ``stop``."""
        reached = {v for equation in self.equations[first:stop] for v in equation.outputs}
        for position in range(stop, end):
            equation = self.equations[position]
            if not reached.isdisjoint(v for v in equation.inputs if isinstance(v, Variable)):
                if position >= later:
                    return True
                reached.update(equation.outputs)
        return False


def dependents(equations: Iterable[Equation], sources: Iterable[Variable]) -> set[Variable]:
    """Return all values that depend on any of ``sources``, these included."""
    found = set(sources)
    for equation in equations:
        if any(isinstance(v, Variable) and v in found for v in equation.inputs):
            found.update(equation.outputs)
    return found


def trained_values(program: Program, parameters: Iterable[Variable]) -> set[Variable]:
    """Return all differentiable values that depend on a parameter, parameters included."""
    found = set(parameters)
    for equation in program.equations:
        if equation.name != "stop_gradient" and any(isinstance(v, Variable) and v in found for v in equation.inputs):
            found.update(v for v in equation.outputs if is_differentiable(v.aval.dtype))
    return found


def remade_values(program: Program, batch: Iterable[Variable], state: Iterable[Variable]) -> set[Variable]:
    """Return all values that depend on the batch, constants, counters and random keys alone: on nothing that trains.

    Every pipeline stage can make these itself (masks, positions, rotary tables), so they never cross.
    """
    found = {*batch, *program.constants, *(v for v in state if not is_differentiable(v.aval.dtype))}
    for equation in program.equations:
        if all(v in found for v in equation.inputs if isinstance(v, Variable)):
            found.update(equation.outputs)
    return found


def _crossing(program: Program, measure: Callable[[Variable], int]) -> list[int]:
    """Sum of ``measure`` over what crosses each position; values made from weights or from nothing are left out."""
    activations = dependents(program.equations, program.inputs[program.weights :])
    made: dict[Variable, int] = {}
    last: dict[Variable, int] = {}
    for position, equation in enumerate(program.equations):
        for v in equation.inputs:
            if isinstance(v, Variable):
                last[v] = position
        made.update((v, position) for v in equation.outputs)
    change = [0] * (len(program.equations) + 2)
    for variable, position in made.items():
        if variable in last and variable in activations and is_differentiable(variable.aval.dtype):
            size = measure(variable)
            change[position + 1] += size
            change[last[variable] + 1] -= size
    return list(accumulate(change))
