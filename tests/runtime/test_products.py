"""Products in the order of their readers: the same values, and no transposition of the larger array."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.analysis import Program, flatten, is_call, run_equation
from galvatron_jax.runtime._products import product_orders, run_product


def grouped_scores(q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Scores of ``jax.nn.dot_product_attention`` under grouped queries, as softmax reads them."""
    scores_BKTGS = jax.lax.dot_general(q_BTKGH, k_BSKH, (((4,), (3,)), ((0, 2), (0, 2))))
    return jnp.exp(jnp.transpose(0.5 * scores_BKTGS, (3, 0, 1, 2, 4)))


def both_sides_free(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.transpose(jax.lax.dot_general(x, y, (((2,), (0,)), ((), ()))), (3, 1, 2, 0))


def plain(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, y, (((2,), (0,)), ((), ())))


def used_twice(x: jax.Array, y: jax.Array) -> jax.Array:
    z = jax.lax.dot_general(x, y, (((2,), (0,)), ((), ())))
    return jnp.transpose(z, (1, 0, 2, 3)) + jnp.sum(z)


CASES = {
    grouped_scores: (((2, 3, 2, 4, 5), (2, 6, 2, 5)), [(0, 1, 3, 2, 4)]),
    both_sides_free: (((2, 3, 4), (4, 5, 6)), [(1, 0, 3, 2)]),
    plain: (((2, 3, 4), (4, 5, 6)), []),
    used_twice: (((2, 3, 4), (4, 5, 6)), []),
}


def run(program: Program, arguments: list[Any], orders: dict[Any, tuple[int, ...]]) -> Any:
    values: dict[Any, Any] = {**program.constants, **dict(zip(program.inputs, arguments, strict=True))}
    for equation in program.equations:
        read = [getattr(v, "val", None) if hasattr(v, "val") else values[v] for v in equation.inputs]
        order = orders.get(equation.outputs[0])
        results = run_product(equation, read, order) if order else run_equation(equation.eqn, read)
        values.update(zip(equation.outputs, results, strict=True))
    return values[program.outputs[0]]


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_free_dimensions_take_the_order_of_the_reader_and_values_stay(function: Any) -> None:
    shapes, expected = CASES[function]
    arguments = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    program = flatten(jax.make_jaxpr(function)(*arguments), is_call)
    orders = product_orders(program)
    assert list(orders.values()) == expected
    np.testing.assert_array_equal(run(program, arguments, orders), function(*arguments))
