"""Gradients finished layer by layer: the same numbers, in another order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.runtime._order import after_gradients, has_gradient

pytestmark = pytest.mark.multidevice


def places(count: int) -> list[NamedSharding]:
    mesh = Mesh(np.array(jax.devices()[:2]), ("g0",))
    return [NamedSharding(mesh, PartitionSpec("g0"))] * count


def loss(x: jax.Array, w: jax.Array, *, ordered: bool) -> jax.Array:
    if ordered:
        (x,), (w,) = after_gradients([x], [w], places(1))
    return jnp.sum(jnp.square(x @ w))


def test_values_and_gradients_are_unchanged() -> None:
    x, w = jnp.arange(8.0).reshape(2, 4), jnp.arange(16.0).reshape(4, 4)
    plain = jax.jit(jax.value_and_grad(lambda *a: loss(*a, ordered=False), (0, 1)))(x, w)
    ordered = jax.jit(jax.value_and_grad(lambda *a: loss(*a, ordered=True), (0, 1)))(x, w)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ordered), strict=True):
        np.testing.assert_array_equal(a, b)


def test_cotangent_waits_for_the_gradient_in_its_place() -> None:
    x, w = jnp.ones((2, 4)), jnp.ones((4, 4))
    text = jax.jit(jax.grad(lambda *a: loss(*a, ordered=True), (0, 1))).lower(x, w).as_text()
    (barrier,) = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert "tensor<2x4xf32>, tensor<4x4xf32>" in barrier
    assert "sharding_constraint" in text or "@Sharding" in text


def test_forward_pass_alone_has_no_barrier() -> None:
    text = jax.jit(lambda *a: loss(*a, ordered=True)).lower(jnp.ones((2, 4)), jnp.ones((4, 4))).as_text()
    assert "optimization_barrier" not in text


@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", True), ("int32", False)])
def test_only_inexact_values_have_gradients(dtype: str, expected: bool) -> None:
    assert has_gradient(jax.ShapeDtypeStruct((2,), dtype)) is expected
