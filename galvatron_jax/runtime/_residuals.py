"""What a forward program must hand to its backward program, read off the traced forward pass.

``jax.vjp`` keeps the arguments of every layer and what the layer's remat policy names. Across two compiled programs
that would copy parameters once for every microbatch in flight. So each residual is sorted into one of

* *given*: an argument of the forward program. *Lasting* arguments (parameters, batch) are given to the backward program
  again; *passing* ones (states, values from the stage before) are held by reference. No copy is made;
* *made again*: made of lasting arguments by cheap operations alone (casts, masks, rotary tables: nothing that
  ``analysis.is_kept`` names), so the backward program makes it too;
* *kept*: everything else, one set per microbatch in flight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

from ..analysis import Equation, Program, Variable, abstract, flatten, is_call, is_kept, run_equation


@dataclasses.dataclass(frozen=True)
class Residuals:
    """Residuals of a forward pass, sorted."""

    program: Program
    """The forward pass, flat."""
    leaves: tuple[Any, ...]
    """All residuals in the order of the pullback's leaves: variables or literals of ``program``."""
    lasting: int
    """How many of the program's inputs the backward program is given again."""
    held: tuple[int, ...]
    """Passing inputs that are residuals, counted from the first passing one."""
    kept: tuple[int, ...]
    """Positions in ``leaves`` of the residuals that the forward program must return."""

    def restore(self, lasting: Sequence[Any], held: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        """Return the value of every residual, inside the backward program.

        Args:
            lasting: The lasting inputs.
            held: Values of the passing inputs ``held``.
            kept: Values of the residuals ``kept``.
        """
        inputs = self.program.inputs
        values: dict[Variable, Any] = dict(self.program.constants)
        values.update(zip(inputs[: self.lasting], lasting, strict=True))
        values.update(zip([inputs[self.lasting + i] for i in self.held], held, strict=True))
        values.update(zip([self.leaves[i] for i in self.kept], kept, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in self._made_again(set(values)):
            results = run_equation(equation.eqn, [read(v) for v in equation.inputs])
            values.update(zip(equation.outputs, results, strict=True))
        return [read(leaf) for leaf in self.leaves]

    def _made_again(self, known: set[Variable]) -> list[Equation]:
        """Equations that lead from known values to the residuals."""
        wanted = {leaf for leaf in self.leaves if isinstance(leaf, Variable)} - known
        chosen = []
        for equation in reversed(self.program.equations):
            if wanted.intersection(equation.outputs):
                chosen.append(equation)
                wanted.difference_update(equation.outputs)
                wanted.update(v for v in equation.inputs if isinstance(v, Variable) and v not in known)
        return chosen[::-1]


def sort_residuals(forward: ClosedJaxpr, results: int, lasting: int) -> Residuals:
    """Sort the residuals of a traced forward pass.

    Args:
        forward: The pass; its outputs are ``results`` results and then the leaves of the pullback.
        results: Number of results.
        lasting: Number of leading inputs that the backward program is given again.
    """
    program = flatten(forward, is_call)
    leaves = tuple(program.outputs[results:])
    passing = {variable: i for i, variable in enumerate(program.inputs[lasting:])}
    cheap = _cheap_variables(program, lasting)
    kept: dict[Any, int] = {}
    held: dict[int, None] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Literal) or leaf in cheap:
            continue
        if leaf in passing:
            held.setdefault(passing[leaf])
        else:
            kept.setdefault(leaf, position)
    return Residuals(program, leaves, lasting, tuple(held), tuple(kept.values()))


def _cheap_variables(program: Program, lasting: int) -> set[Variable]:
    """Values made of lasting inputs and constants by operations that fused kernels take in."""
    cheap = set(program.inputs[:lasting]) | set(program.constants)
    for equation in program.equations:
        known = all(isinstance(v, Literal) or v in cheap for v in equation.inputs)
        if known and (not is_kept(equation.name, "none") or _is_small(equation)):
            cheap.update(equation.outputs)
    return cheap


def _is_small(equation: Equation) -> bool:
    """Scalars cost nothing, whatever makes them."""
    return all(math.prod(abstract(v.aval).shape) <= 1 for v in [*equation.inputs, *equation.outputs])
