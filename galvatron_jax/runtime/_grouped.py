"""Grouped convolutions (depthwise ones) run rank by rank.

The gradient of such a kernel is a convolution with ``batch_group_count``. XLA's partitioner computes it *wrongly* where
the batch is sharded over some mesh axes and copied over others, as in any plan with tensor parallelism (jax 0.10.2;
docs/design/0099), and gathers samples for others. So every rank convolves its own samples and makes their part of the
gradient, and the parts are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from ..analysis import Equation, run_equation
from ._layout import LayerLayout
from ._mesh import Axes


def is_grouped(layout: LayerLayout, equation: Equation) -> bool:
    """Tell whether ``equation`` is a grouped convolution of samples that are shared out."""
    if equation.name != "conv_general_dilated" or equation.eqn.params["feature_group_count"] == 1:
        return False
    return not any(isinstance(v, Literal) for v in equation.inputs) and bool(_batch_axes(layout, equation.inputs[0]))


def copies_grouped_samples(layout: LayerLayout) -> bool:
    """Tell whether XLA's partitioner would make wrong gradients of a layer that is not run by ``run_grouped``."""
    return layout.strategy.tp > 1 and any(is_grouped(layout, e) for e in layout.kind.layer.forward.equations)


def run_grouped(layout: LayerLayout, equation: Equation, arguments: Sequence[Any]) -> list[Any]:
    """Return the results of a grouped convolution, run rank by rank."""
    numbers = equation.eqn.params["dimension_numbers"]
    axes, whole = _batch_axes(layout, equation.inputs[0]), PartitionSpec()
    samples, results = (_along(spec[0], axes) for spec in (numbers.lhs_spec, numbers.out_spec))

    def convolve(samples: Any, kernel: Any) -> Any:
        return run_equation(equation.eqn, [samples, kernel])[0]

    def transposed(samples: Any, kernel: Any, cotangent: Any) -> tuple[Any, Any]:
        of_samples, of_kernel = jax.vjp(convolve, samples, kernel)[1](cotangent)
        return of_samples, of_kernel[None]

    def on_each_rank(function: Callable[..., Any], read: Sequence[Any], made: Any) -> Callable[..., Any]:
        mesh = layout.stage.mesh
        run: Callable[..., Any] = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(read), out_specs=made, check_vma=False
        )
        return run

    forward = on_each_rank(convolve, [samples, whole], results)
    backward = on_each_rank(transposed, [samples, whole, results], (samples, PartitionSpec(axes)))

    def gradients(read: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
        of_samples, parts = backward(*read, cotangent)
        return of_samples, jax.lax.reduce_sum(parts, (0,))

    use = jax.custom_vjp(forward)
    use.defvjp(lambda *read: (forward(*read), read), gradients)
    return [use(*arguments)]


def _batch_axes(layout: LayerLayout, variable: Any) -> Axes:
    value = layout.kind.layer.forward_values[variable]
    batch = layout.stage.data_axes(layout.strategy)
    found = [entry for entry in layout.value(value).spec if entry is not None]
    return batch if batch and found in ([batch], [batch[0]]) else ()


def _along(dimension: int, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*[None] * dimension, axes)
