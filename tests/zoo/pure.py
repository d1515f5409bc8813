# mypy: disable-error-code=no-any-return
"""Functions of a tree of parameters, without any module: a loop over a list, and ``lax.scan`` over a stack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._case import VOCAB, Case, next_token, tokens

WIDTH, HEADS, LAYERS = 32, 4, 3

Parameters = dict[str, Any]


def init_layer(key: jax.Array) -> Parameters:
    keys = jax.random.split(key, 4)
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    weights = {name: 0.2 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {**weights, "scale": jnp.ones((2, WIDTH))}


def init() -> Parameters:
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    table = 0.2 * jax.random.normal(keys[0], (VOCAB, WIDTH))
    return {"table": table, "layers": [init_layer(k) for k in keys[1:]], "norm": jnp.ones(WIDTH)}


def init_stacked() -> Parameters:
    parameters = init()
    return {**parameters, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *parameters["layers"])}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None, None]


def layer(w: Parameters, x: jax.Array) -> jax.Array:
    batch, seq, _ = x.shape
    q, k, v = jnp.moveaxis((norm(x, w["scale"][0]) @ w["qkv"]).reshape(batch, seq, 3, HEADS, -1), 2, 0)
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ w["out"]
    return x + jax.nn.gelu(norm(x, w["scale"][1]) @ w["up"]) @ w["down"]


def looped_loss(w: Parameters, ids: jax.Array) -> jax.Array:
    x = w["table"][ids]
    for weights in w["layers"]:
        x = layer(weights, x)
    return next_token(norm(x, w["norm"]) @ w["table"].T, ids)


def scanned_loss(w: Parameters, ids: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, weights: (layer(weights, x), None), w["table"][ids], w["layers"])
    return next_token(norm(x, w["norm"]) @ w["table"].T, ids)


FOUND = (("embed", 1), ("layer", LAYERS), ("head", 1))
CASES = {
    "pure": lambda: Case(init, looped_loss, tokens(), FOUND),
    "pure scanned": lambda: Case(init_stacked, scanned_loss, tokens(), FOUND),
}
