"""Random small programs out of the primitives that have rules, as hypothesis draws them.

A program is a list of steps; each appends one value made from earlier ones. What the drawn numbers choose (operands,
axes, divisors) depends only on shapes, so a program means the same each time it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

SHAPES = ((4, 6, 8), (8, 6), (6, 4), (4, 6, 8), (8, 8))
"""Shapes of the inputs: many equal sizes, so that size alone says nothing."""

INDICES = (4, 6)
"""Shape of the last input: integers in [0, 4) for lookups."""

_MAX_ELEMENTS = 2**12

Step = tuple[str, int, int, int]
Operation = Callable[[list[jax.Array], jax.Array, jax.Array, int], jax.Array]
"""(all values so far, one of them, another one, a free number) to the new value."""


def _same_shape(values: list[jax.Array], x: jax.Array, number: int) -> jax.Array:
    partners = [v for v in values if v.shape == x.shape]
    return partners[number % len(partners)]


def _add(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return x + _same_shape(values, x, number)


def _contract(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    pairs = [(i, j) for i in range(x.ndim) for j in range(y.ndim) if x.shape[i] == y.shape[j]]
    return jnp.tensordot(x, y, axes=pairs[number % len(pairs)]) / 4 if pairs else x


def _batched(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.einsum("...ij,...kj->...ik", x, _same_shape(values, x, number)) / 4 if x.ndim > 2 else x


def _normalise(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=number % x.ndim, keepdims=True) + 1)


def _reduce(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    function = (jnp.sum, jnp.max)[number % 2]
    return function(x, axis=number % x.ndim) if x.ndim > 1 else x


def _transpose(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.swapaxes(x, number % x.ndim, (number + 1) % x.ndim)


def _merge(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % max(1, x.ndim - 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _divide(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis, parts = number % x.ndim, (2, 3, 4)[number % 3]
    if x.shape[axis] % parts:
        return x
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])


def _half(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % x.ndim
    return jnp.split(x, 2, axis=axis)[number % 2] if x.shape[axis] % 2 == 0 else x


def _join(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.concatenate([x, _same_shape(values, x, number)], axis=number % x.ndim)


def _accumulate(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.cumsum(x, axis=number % x.ndim)


def _recur(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry + row)
        return carry, carry * row

    return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


def _look_up(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % x.ndim
    return jnp.take(x, values[len(SHAPES)].astype(jnp.int32), axis=axis) if x.shape[axis] >= 4 else x


def _choose(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.where(x > 0, x, _same_shape(values, x, number))


def _first_index(values: list[jax.Array]) -> jax.Array:
    """A number in [0, 4) that only the run knows."""
    return values[len(SHAPES)].astype(jnp.int32)[0, 0]


def _convolve(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    if x.ndim != 3 or y.ndim != 2 or x.shape[2] != y.shape[0]:
        return x
    kernel = jnp.stack([y, -y, y]) / 4
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def _scatter(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    indices = values[len(SHAPES)].astype(jnp.int32)
    return x.at[indices].add(jnp.take(x, indices, axis=0)) if x.shape[0] >= 4 and x.size < 512 else x


def _sort(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return jnp.sort(x, axis=number % x.ndim)


def _greatest(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    return lax.top_k(x, 2)[0] if x.shape[-1] >= 2 else x


def _window(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % x.ndim
    return lax.dynamic_slice_in_dim(x, _first_index(values), max(1, x.shape[axis] // 2), axis)


def _replace(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % x.ndim
    part = lax.slice_in_dim(x, 0, max(1, x.shape[axis] // 2), axis=axis)
    return lax.dynamic_update_slice_in_dim(x, 2 * part, _first_index(values), axis)


def _pad(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    axis = number % x.ndim
    low, high = ((1, 1), (x.shape[axis], 0))[number % 2]
    return jnp.pad(x, [(low, high) if i == axis else (0, 0) for i in range(x.ndim)])


def _ragged(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    if x.ndim != 2 or y.ndim != 3 or x.shape[1] != y.shape[1] or x.shape[0] % y.shape[0]:
        return x
    return lax.ragged_dot(x, y, jnp.full(y.shape[0], x.shape[0] // y.shape[0], jnp.int32)) / 4


def _loop(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    made: jax.Array = lax.fori_loop(0, _first_index(values), lambda _, carry: jnp.tanh(carry + x), x)
    return made


def _branch(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    other = _same_shape(values, x, number)
    made: jax.Array = lax.cond(_first_index(values) > 1, lambda a, b: a * b, lambda a, b: jnp.tanh(a) - b, x, other)
    return made


def _prefix(values: list[jax.Array], x: jax.Array, y: jax.Array, number: int) -> jax.Array:
    made: jax.Array = lax.associative_scan(jnp.add, x, axis=number % x.ndim)
    return made


OPERATIONS: dict[str, Operation] = {
    function.__name__: function
    for function in (
        *(_add, _contract, _batched, _normalise, _reduce, _transpose, _merge, _divide, _half, _join),
        *(_accumulate, _recur, _look_up, _choose, _convolve, _scatter, _sort, _greatest, _window, _replace),
        *(_pad, _ragged, _loop, _branch, _prefix),
    )
}

UNPARTITIONED = frozenset(["_greatest", "_ragged"])
"""XLA:CPU makes single calls of these and gathers what they read; XLA:GPU does not (docs/collectives.md)."""

programs = st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), *[st.integers(0, 11)] * 3), min_size=1, max_size=8)


def run(program: Sequence[Step], inputs: Sequence[Any]) -> list[jax.Array]:
    """Run ``program``; return all values that its steps made."""
    values = list(inputs)
    for name, i, j, number in program:
        # The newest values first, so that programs grow deep.
        x, y = values[-1 - i % len(values)], values[-1 - j % len(values)]
        if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating):
            new = OPERATIONS[name](values, x, y, number)
            values.append(new if new.size <= _MAX_ELEMENTS else x)
    return values[len(SHAPES) + 1 :]


@functools.cache
def example_inputs() -> list[jax.Array]:
    """Return inputs of all programs: normal numbers, and indices."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES) + 1)
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, SHAPES, strict=False)]
    return [*inputs, jax.random.randint(keys[-1], INDICES, 0, 4)]
