"""Rankings: ``top_k`` of each rank's samples where they are. What a router chooses for a token concerns no other rank.

The partitioner does not divide ``top_k``: XLA:CPU gathers its operand over the ranks of the batch, XLA:GPU wherever
tensor ranks hold copies of it, and every rank then ranks all samples. So it runs rank by rank (``jax.shard_map``), the
same function, unless the ranked dimension itself is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from ..analysis import Equation, run_equation
from ._layout import LayerLayout


def ranked_place(layout: LayerLayout, equation: Equation) -> PartitionSpec | None:
    """Return how the operand of a ranking is divided; None for other equations, and where ranks must not rank alone."""
    operand = equation.inputs[0] if equation.name == "top_k" else None
    if operand is None or isinstance(operand, Literal):
        return None
    spec = layout.value(layout.kind.layer.forward_values[operand]).spec
    axis = equation.eqn.params["axis"]
    divided = [d for d, entry in enumerate(spec) if entry]
    return spec if divided and axis not in divided else None


def run_ranking(layout: LayerLayout, place: PartitionSpec, equation: Equation, operand: Any) -> list[Any]:
    """Return values and indices, divided as the operand is.

    Only the indices are made rank by rank, outside of the gradient: what is copied over tensor ranks would be summed
    over them on its way back through a ``shard_map``.
    """
    run: Callable[..., Any] = jax.shard_map(
        lambda array: run_equation(equation.eqn, [array])[1],
        mesh=layout.stage.mesh,
        in_specs=(place,),
        out_specs=place,
        check_vma=False,
    )
    indices = run(jax.lax.stop_gradient(operand))
    return [jnp.take_along_axis(operand, indices, axis=equation.eqn.params["axis"]), indices]
