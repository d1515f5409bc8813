"""Run one segment of the user's program under a layout: constrain, gather, rematerialise.

The segment's own equations are run again, with sharding constraints on the results of kernels (matrix products and
lookups) and, under sequence parallelism, on the sums and products of the stream: XLA's propagation fills in the rest.
Parameters are cast to their compute dtype, then gathered, *inside* the rematerialised function and under a name that no
policy keeps, so neither casts nor gathered weights live from the forward to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from ..analysis import Value, is_batched, is_kept, is_kernel_name, run_equation
from ..strategy import Remat
from ._copies import PerRank, with_copies
from ._layout import LayerLayout

WEIGHTS = "galvatron_weights"
"""Name of parameters as a layer uses them: cast and gathered."""

EXCHANGED = "galvatron_exchanged"
"""Name of values that crossed the border of attention; remat ``none`` keeps them, so that nothing crosses twice."""

_STREAM_PRIMITIVES = frozenset(("add", "mul"))
"""Under sequence parallelism residual adds and norm products are constrained too."""

SegmentFunction = Callable[[Sequence[Any]], list[Any]]
"""From the segment's inputs to its outputs."""


def build_segment(
    layout: LayerLayout, *, in_loop: bool = False, copied: frozenset[int] = frozenset()
) -> SegmentFunction:
    """Return the segment of ``layout.kind`` as a function under the layout's strategy.

    It takes its inputs where they are: the caller puts all but the parameters into the layer's layout.

    Args:
        layout: The segment's kind and strategy.
        in_loop: It is the body of a loop, so forward and backward pass are loops of their own, and nothing needs to
            keep the compiler from merging what is computed in both.
        copied: Parameters (by position) that come as one copy per data-parallel rank (see ``_copies``).
    """

    def run(inputs: Sequence[Any]) -> list[Any]:
        return _run_equations(layout, _place_weights(layout, inputs, copied), copied)

    return jax.checkpoint(run, policy=_policy(layout.strategy.remat), prevent_cse=not in_loop)


def _policy(remat: Remat) -> Callable[..., bool]:
    """What ``jax.checkpoint`` keeps: the estimate's own rule (``analysis.is_kept``)."""

    def keep(primitive: Any, *_: Any, **params: Any) -> bool:
        name = str(primitive.name)
        if name == "name" and params["name"] == EXCHANGED:
            return remat == "none"
        return is_kept(name, remat, batched=is_batched(name, params))

    return keep


def _place_weights(layout: LayerLayout, inputs: Sequence[Any], copied: frozenset[int]) -> list[Any]:
    layer, placed = layout.kind.layer, list(inputs)
    for position, index in enumerate(layer.parameters):
        weight, dtype = placed[index], layout.kind.profile.parameters[position].compute_dtype
        stored, used = layout.stored(position, "parameter"), layout.value(layer.inputs[index])
        if position in copied:
            stored, used = with_copies(layout, stored), with_copies(layout, used)
        if str(weight.dtype) != dtype:
            # The cast stays where the parameter is stored: else XLA gathers first and casts then, twice the bytes.
            weight = jax.lax.with_sharding_constraint(weight.astype(dtype), stored)
        weight = jax.lax.with_sharding_constraint(weight, used)
        placed[index] = checkpoint_name(weight, WEIGHTS)
    return placed


def _run_equations(layout: LayerLayout, inputs: Sequence[Any], copied: frozenset[int]) -> list[Any]:
    layer = layout.kind.layer
    program, values = layer.forward, layer.forward_values
    border, per_rank = _Border(layout), PerRank(layout)
    copies = {program.inputs[layer.parameters[position]] for position in copied}
    environment: dict[Any, Any] = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}

    def read(atom: Any, inside: bool = False) -> Any:
        return atom.val if isinstance(atom, Literal) else border.cross(environment[atom], values[atom], inside=inside)

    for position, equation in enumerate(program.equations):
        inside = border.is_inside(position)
        arguments = [read(v, inside) for v in equation.inputs]
        are_copies = [not isinstance(v, Literal) and v in copies for v in equation.inputs]
        if any(are_copies):
            results = per_rank.run(equation, arguments, are_copies)
            if not per_rank.mixes(equation, are_copies):
                environment.update(zip(equation.outputs, results, strict=True))
                copies.update(equation.outputs)
                continue
        else:
            results = run_equation(equation.eqn, arguments)
        for variable, result in zip(equation.outputs, results, strict=True):
            environment[variable] = _constrain(layout, equation.name, result, values[variable], inside=inside)
    return [read(v) for v in program.outputs]


class _Border:
    """The border of attention under Ulysses: values that cross it change from sequence to heads or back, once."""

    def __init__(self, layout: LayerLayout) -> None:
        """Without Ulysses there is no border."""
        self._layout = layout
        self._attention = layout.kind.attention if layout.strategy.ulysses > 1 else None
        self._crossed: dict[int, Any] = {}

    def is_inside(self, position: int) -> bool:
        """Tell whether the equation at ``position`` runs inside."""
        return self._attention is not None and position in self._attention.inside

    def cross(self, array: Any, value: Value, *, inside: bool) -> Any:
        """Return ``array`` as a reader inside or outside wants it."""
        attention = self._attention
        if attention is None or id(value) not in (attention.entering if inside else attention.leaving):
            return array
        if id(value) not in self._crossed:
            # Both sides are pinned, for the cotangent too: else the exchange drifts into the operations around it.
            left = jax.lax.with_sharding_constraint(array, self._layout.value(value, inside=not inside))
            arrived = jax.lax.with_sharding_constraint(left, self._layout.value(value, inside=inside))
            self._crossed[id(value)] = checkpoint_name(arrived, EXCHANGED)
        return self._crossed[id(value)]


def _constrain(layout: LayerLayout, primitive: str, result: Any, value: Value, *, inside: bool) -> Any:
    stream = layout.strategy.sp and layout.is_stream(value)
    if not result.ndim or not (is_kernel_name(primitive) or (stream and primitive in _STREAM_PRIMITIVES)):
        return result
    if stream and primitive == "gather":
        # Summed over the vocabulary first, sharded along the sequence after: else XLA shards the indices along it.
        result = jax.lax.with_sharding_constraint(result, layout.value(value, sequence=False))
    return jax.lax.with_sharding_constraint(result, layout.value(value, inside=inside))


def is_array(value: Any) -> bool:
    """Tell whether ``value`` has dimensions to shard: neither a scalar nor a random key."""
    return value.ndim > 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
