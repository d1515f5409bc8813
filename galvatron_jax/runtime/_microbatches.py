"""The loop over the microbatches of a train step: one turn at a time.

XLA:GPU doubles the body of every loop whose number of turns it knows (``_options``). That pays for loops over layers;
of this loop it would make a body with two forward and two backward passes, and the second forward pass begins with
zeros for its stacks of residuals. These wait for nothing, so the scheduler may put them before the first backward pass:
two stacks of residuals at once, 6.84 GiB in place of 4.84 for a small Llama of 8 layers (docs/design/0076). So the
compiler is not told how many turns there are. Its name says it to who reads the program (``verify``).

Nor does XLA move collectives of such a loop into the turn before (docs/design/0079).

The price: the GPU asks the host after each microbatch whether another one follows, some tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def fold_microbatches(
    add: Callable[[Carry, Any, list[Any]], Carry], start: Carry, batch: Sequence[Any], microbatches: int
) -> Carry:
    """Return ``add(... add(start, 0, first) ..., n - 1, last)`` over the microbatches of ``batch``.

    Args:
        add: From the carried values, a microbatch's number and its leaves to the carried values.
        start: Carried into the first turn.
        batch: Leaves of all microbatches, along dimension 0.
        microbatches: How many there are.
    """

    def turn(number: Any, carry: Carry) -> Carry:
        return add(carry, number, [jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False) for leaf in batch])

    with jax.named_scope(f"microbatches_{microbatches}"):
        end: Carry = jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(microbatches)), turn, start)
    return end
