"""How the stream goes from the layout of one layer into that of the next.

It changes before rematerialisation begins: what a layer keeps of its input is in its own layout, and no layout changes
twice. Where an axis leaves the sequence for the batch (or the way back) while another one is dropped (or joins), an
intermediate layout stands between: one step would make XLA rematerialise the whole array ("involuntary full
rematerialization").
"""

from __future__ import annotations

from typing import Any

import jax
import msgspec

from ..plan import Strategy
from ._layout import LayerLayout
from ._segment import is_array


def arrive(value: Any, before: LayerLayout | None, layout: LayerLayout, index: int) -> Any:
    """Put input ``index`` of a layer into the layer's layout; parameters stay where they are stored.

    Args:
        value: The input.
        before: Layout of the layer that made it, None when it enters from outside.
        layout: Layout of the layer that takes it.
        index: Which of its inputs.
    """
    if index in layout.kind.layer.parameters or not is_array(value):
        return value
    described = layout.kind.layer.inputs[index]
    middle = strategy_between(before.strategy, layout.strategy) if before else None
    if middle is not None and layout.is_stream(described):
        step = LayerLayout(layout.kind, middle, layout.stage)
        value = jax.lax.with_sharding_constraint(value, step.value(described))
    return jax.lax.with_sharding_constraint(value, layout.value(described))


def strategy_between(before: Strategy, after: Strategy) -> Strategy | None:
    """Return the strategy in whose layout the stream stands between two others, None when one step is enough.

    Only a change between a layout with the sequence sharded (Megatron sp, Ulysses) and a smaller degree without needs
    two: an all-to-all between sequence and batch, and a gather (or, the way back, a slice) of the sequence.
    """
    narrow, wide = sorted((before, after), key=lambda strategy: strategy.inner)
    if _is_along_sequence(wide) and not _is_along_sequence(narrow) and 1 < narrow.inner < wide.inner:
        return msgspec.structs.replace(narrow, sp=True)
    return None


def _is_along_sequence(strategy: Strategy) -> bool:
    return strategy.sp or strategy.ulysses > 1
