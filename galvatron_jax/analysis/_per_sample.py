"""Which parameters a layer reads alike for every sample.

The gradient of such a parameter is a sum of what each data-parallel rank can make from its own samples with its own
copy of the parameter, so ranks can add up gradients over microbatches, and groups of ranks (hsdp) over their members,
before they meet. A parameter that meets an operation which mixes samples, or whose batch is written into it (a
convolution, a broadcast to the batch), cannot: its gradient is summed over all ranks where it is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

from ._dimensions import Value
from ._flatten import Equation, Variable
from ._layer import Layer
from ._primitives import ELEMENTWISE

_PER_SAMPLE = ELEMENTWISE | {"dot_general", "gather"}
"""Primitives without a parameter that names the size of the batch: the same equation serves any number of samples."""


@dataclasses.dataclass(frozen=True)
class PerSample:
    """The samples in one layer's forward pass."""

    layer: Layer
    batch: int | None
    """The batch class; None in a layer without samples."""

    def parameters(self) -> frozenset[int]:
        """Return the parameters (by position) of which every use can run for a part of the samples."""
        positions = frozenset(range(len(self.layer.parameters)))
        while refused := refused_parameters(self.layer, positions, self._makes_batch, self._runs_apart):
            positions -= refused
        return positions

    def mixes(self, equation: Equation, apart: Sequence[bool]) -> bool:
        """Tell whether ``equation`` reads samples beside the operands that ``apart`` marks."""
        values = self.layer.forward_values
        return any(
            not one and not isinstance(v, Literal) and self.batch_dim(values[v]) is not None
            for v, one in zip(equation.inputs, apart, strict=True)
        )

    def batch_dim(self, value: Value) -> int | None:
        """Return the dimension that holds the batch alone or as its major factor; None when there is none such."""
        classes = self.layer.dimensions.classes(value)
        dims = [d for d, dim in enumerate(classes) if self.batch in dim]
        return dims[0] if len(dims) == 1 and classes[dims[0]][0] == self.batch else None

    def _makes_batch(self, equation: Equation) -> bool:
        layer = self.layer
        return any(self.batch in layer.dimensions.flat_classes(layer.forward_values[v]) for v in equation.outputs)

    def _runs_apart(
        self, equation: Equation, apart: Sequence[bool], others: Sequence[Variable], sampled: set[Variable]
    ) -> bool:
        return self.mixes(equation, apart) and self._is_per_sample(equation, others, sampled)

    def _is_per_sample(self, equation: Equation, others: Sequence[Any], sampled: set[Any]) -> bool:
        """Every result and every operand made of samples has the batch as the major factor of exactly one dimension."""
        values = self.layer.forward_values
        whole = [v for v in others if v in sampled]
        return equation.name in _PER_SAMPLE and all(
            self.batch_dim(values[v]) is not None for v in [*whole, *equation.outputs]
        )


def refused_parameters(
    layer: Layer,
    positions: frozenset[int],
    makes_samples: Callable[[Equation], bool],
    runs_apart: Callable[[Equation, Sequence[bool], Sequence[Variable], set[Variable]], bool],
) -> frozenset[int]:
    """Return the parameters among ``positions`` that meet in the first equation that cannot run per rank.

    Args:
        layer: The layer; its forward pass is walked.
        positions: Parameters that are asked for.
        makes_samples: Whether an equation writes samples into a value made of parameters alone.
        runs_apart: Whether an equation can, by which operands hang on the parameters, the other operands, and all
            values made of samples.
    """
    program = layer.forward
    origins: dict[Any, frozenset[int]] = {}
    sampled = {v for i, v in enumerate(program.inputs) if i not in layer.parameters}
    for position, index in enumerate(layer.parameters):
        if position in positions:
            origins[program.inputs[index]] = frozenset((position,))
    for equation in program.equations:
        read = [v for v in equation.inputs if not isinstance(v, Literal)]
        found = frozenset[int]().union(*(origins.get(v, frozenset()) for v in read))
        if found:
            apart = [not isinstance(v, Literal) and v in origins for v in equation.inputs]
            others = [v for v in read if v not in origins]
            if not any(v in sampled for v in others) and not makes_samples(equation):
                origins.update((v, found) for v in equation.outputs)
                continue
            if not runs_apart(equation, apart, others, sampled):
                return found
        if found or any(v in sampled for v in read):
            sampled.update(equation.outputs)
    kept = {v for v in program.outputs if not isinstance(v, Literal) and v in origins}
    return frozenset[int]().union(*(origins[v] for v in kept))
