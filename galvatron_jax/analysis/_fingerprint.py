"""Fingerprints: equal numbers for equations that do the same to values of the same shapes.

The fingerprint of an equation covers its primitive, its parameters (inner programs by their structure) and the shapes
and dtypes of what it reads and makes; *not* which values it reads, and not the value of a scalar literal. The skeleton
of a range of equations adds the wiring. Layers with equal skeletons are one kind; scalar literals in which they differ
(the path that Linen folds into a dropout key, a rate that rises with depth) become inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._flatten import Atom, Equation, Variable
from ._jaxpr import open_program

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

Skeleton = tuple[int, ...]


class Fingerprints:
    """Fingerprints of equations; inner programs, which equal layers share, are read once."""

    def __init__(self) -> None:
        self._programs: dict[int, tuple[Any, int]] = {}
        """By id, with the program itself, so that no id is used again."""

    def of(self, equation: Equation) -> int:
        """Return the fingerprint of one equation of a flat program."""
        avals = [_described(v) for v in equation.inputs], [_described(v) for v in equation.outputs]
        return hash((equation.name, self._params(equation.eqn.params), *map(tuple, avals)))

    def _params(self, params: dict[str, Any]) -> int:
        return hash(tuple((name, self._value(value)) for name, value in params.items()))

    def _value(self, value: Any) -> Any:
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            return self._program(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if isinstance(value, (str, int, float, bool, type(None), np.dtype)):
            return value
        if callable(value) and not isinstance(value, type):
            return str(getattr(value, "__qualname__", type(value).__name__))
        return _ADDRESS.sub("", repr(value))

    def _program(self, program: ClosedJaxpr | Jaxpr) -> int:
        known = self._programs.get(id(program))
        if known is None:
            known = self._programs[id(program)] = program, self._read_program(program)
        return known[1]

    def _read_program(self, program: ClosedJaxpr | Jaxpr) -> int:
        jaxpr, constants = open_program(program)
        numbers: dict[Any, int] = {}

        def label(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return str(atom.val), atom.aval.str_short()
            return numbers.setdefault(atom, len(numbers)), atom.aval.str_short()

        parts: list[Any] = [tuple(map(label, [*jaxpr.invars, *jaxpr.constvars])), *map(_constant, constants)]
        for eqn in jaxpr.eqns:
            atoms = tuple(map(label, [*eqn.invars, *eqn.outvars]))
            parts.append((eqn.primitive.name, self._params(eqn.params), atoms))
        return hash((*parts, tuple(map(label, jaxpr.outvars))))


def skeleton(keys: Iterable[int], equations: Sequence[Equation]) -> Skeleton:
    """Return fingerprints and wiring of a range of equations; values from outside are numbered as they appear."""
    numbers: dict[Variable, int] = {}
    parts: list[int] = []
    for key, equation in zip(keys, equations, strict=True):
        parts.append(key)
        for v in (*equation.inputs, *equation.outputs):
            parts.append(-1 if isinstance(v, Literal) else numbers.setdefault(v, len(numbers)))
    return tuple(parts)


def _described(atom: Atom) -> Any:
    """Shape and dtype; the value of a literal that is no scalar too."""
    value = _constant(atom.val) if isinstance(atom, Literal) and np.ndim(atom.val) else None
    return atom.aval.str_short(), value


def _constant(value: Any) -> Any:
    """A constant inside a program, by its value where it is small and by identity where it is not."""
    is_key = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    if is_key or np.size(value) > 1 << 16:
        return id(value)
    array = np.asarray(value)
    return array.shape, str(array.dtype), array.tobytes()
