"""Where a value enters tensor-parallel products: under a name of its own, so that their cotangents are summed first.

Queries, keys and values are products of one value with weights whose outputs are sharded, so the cotangent of the
value is a sum of partial sums, reduced over the tensor ranks; Megatron's ``f`` (Shoeybi et al. 2019, figure 3) reduces
that sum once. XLA:GPU reduces once what is added directly (AllReduceReassociate). Where somebody else reads the value
too (the residual connection of a block that normalises last), the backward pass begins its sum with that reader's
cotangent, which is whole, and would reduce each partial sum by itself: three reductions in place of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ..analysis import Equation, Variable
from ._layout import LayerLayout


class Entrances:
    """The values of one layer that tensor-parallel products read, and others too."""

    def __init__(self, layout: LayerLayout) -> None:
        """Find them; none without tensor parallelism."""
        self._layout, self._values = layout, layout.kind.layer.forward_values
        self._products = frozenset(self._find_products())
        self._shared = self._find_shared() if self._products else frozenset()
        self._entered: dict[Variable, Any] = {}

    def enter(self, equation: Equation, atom: Any, array: Any) -> Any:
        """Return ``array`` as ``equation`` reads it: products all under one new name."""
        if equation not in self._products or not isinstance(atom, Variable) or atom not in self._shared:
            return array
        if atom not in self._entered:
            place = self._layout.value(self._values[atom])
            self._entered[atom] = jax.lax.with_sharding_constraint(array, place)
        return self._entered[atom]

    def _find_products(self) -> Iterator[Equation]:
        if self._layout.strategy.tp == 1:
            return
        for equation in self._layout.kind.layer.forward.equations:
            if equation.name == "dot_general" and self._layout.is_tensor_sharded(self._values[equation.outputs[0]]):
                yield equation

    def _find_shared(self) -> frozenset[Variable]:
        program = self._layout.kind.layer.forward
        entering = Counter(v for equation in self._products for v in self._whole(equation))
        others = {v for e in program.equations if e not in self._products for v in _variables(e.inputs)}
        others.update(_variables(program.outputs))
        return frozenset(v for v, readers in entering.items() if readers > 1 and v in others)

    def _whole(self, equation: Equation) -> list[Variable]:
        """Operands that carry no tensor class: their cotangents are partial sums."""
        return [v for v in _variables(equation.inputs) if not self._layout.is_tensor_sharded(self._values[v])]


def _variables(atoms: Iterable[Any]) -> Iterator[Variable]:
    return (atom for atom in atoms if isinstance(atom, Variable))
