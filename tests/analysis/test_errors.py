"""What an author reads who gives a model that cannot be trained: the module's path and the primitive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from galvatron_jax.analysis import analyse_model
from galvatron_jax.errors import AnalysisError

WIDTH = 8
BATCH = {"x": jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)}
Operation = Callable[[jax.Array], jax.Array]


def grow(x: jax.Array) -> jax.Array:
    """A loop whose length is not known: no reverse-mode derivative."""
    grown: jax.Array = jax.lax.while_loop(lambda y: y.sum() < 3.0, lambda y: y * 1.1, x)
    return grown


def on_host(x: jax.Array) -> jax.Array:
    doubled: jax.Array = jax.pure_callback(lambda a: np.asarray(a) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return doubled


def in_a_loop(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda y, _: (jax.jit(grow)(y), None), x, None, length=2)[0]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, then: Operation) -> None:
        self.dense, self.then = nnx.Linear(WIDTH, WIDTH, rngs=rngs), then

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.then(self.dense(x))


class Blocks(nnx.Module):
    """Only the second block has an operation of its own."""

    def __init__(self, then: Operation) -> None:
        self.blocks = nnx.List([Block(nnx.Rngs(0), then if i == 1 else lambda x: x) for i in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class LinenBlock(nn.Module):
    then: Operation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.then(nn.Dense(WIDTH)(x))


class LinenBlocks(nn.Module):
    then: Operation

    def setup(self) -> None:
        self.inner = LinenBlock(self.then)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)


def loss(model: Any, batch: Any) -> jax.Array:
    return jnp.mean(model(batch["x"]) ** 2)


@pytest.mark.parametrize(
    ("then", "primitive"),
    [(grow, "'while'"), (on_host, "'pure_callback'"), (in_a_loop, "'while'"), (lambda x: x[:, :5], "add")],
    ids=["loop", "callback", "inside a loop", "shapes"],
)
@pytest.mark.parametrize(("model", "module"), [(Blocks, "blocks.1"), (LinenBlocks, "inner")], ids=["nnx", "linen"])
def test_error_names_module_and_primitive(model: Any, module: str, then: Operation, primitive: str) -> None:
    with pytest.raises(AnalysisError) as caught:
        analyse_model(lambda: model(then), loss, BATCH)
    assert f"in module {module}: " in str(caught.value)
    assert primitive in str(caught.value)


def test_what_the_gradient_does_not_pass_is_not_blamed() -> None:
    analysis = analyse_model(lambda: Blocks(lambda x: x + grow(jax.lax.stop_gradient(x))), loss, BATCH)
    assert "blocks.*" in analysis.kinds


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": BATCH["x"], "name": "a sentence"}, r"batch\['name'\]: got a str"),
        ({"x": BATCH["x"], "pair": (1.0, object())}, r"batch\['pair'\]\[1\]: got a object"),
        ({"y": BATCH["x"]}, "KeyError: 'x'"),
    ],
)
def test_error_names_the_leaf_of_a_batch(batch: Any, expected: str) -> None:
    with pytest.raises(AnalysisError, match=expected):
        analyse_model(lambda: Blocks(jnp.tanh), loss, batch)


def test_loss_without_a_gradient_is_refused() -> None:
    with pytest.raises(AnalysisError, match="the loss returns int32"):
        analyse_model(lambda: Blocks(jnp.tanh), lambda model, batch: model(batch["x"]).argmax(), BATCH)


class Doubles(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * 2


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(AnalysisError, match="has no parameters"):
        analyse_model(Doubles(), lambda model, batch: model(batch["x"]).mean(), BATCH)
