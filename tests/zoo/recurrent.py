# mypy: disable-error-code=no-any-return
"""Layers that scan over time: a GRU, and a state-space layer by an associative scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ._case import VOCAB, Case, language_model, tokens


class GruLayer(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(width, width, rngs=rngs), rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.rnn(self.norm(x))


class StateSpaceLayer(nnx.Module):
    """A diagonal linear recurrence with gates (S5, Mamba): h_t = a_t h_(t-1) + b_t."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.into = nnx.Linear(width, 4 * width, rngs=rngs)
        self.decay = nnx.Linear(width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, width, rngs=rngs)
        self.skip = nnx.Param(jnp.ones(2 * width))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        u, gate = jnp.split(self.into(y), 2, axis=-1)
        a = jax.nn.sigmoid(self.decay(y))

        def combine(
            left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(combine, (a, (1 - a) * u), axis=1)
        return x + self.out((h + self.skip[None, None] * u) * nnx.silu(gate))


class SequenceModel(nnx.Module):
    def __init__(self, layer: Callable[..., nnx.Module], width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.layers = nnx.List([layer(width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class LinenLstm(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, self.width)(ids)
        for i in range(2):
            y: Any = nn.RNN(nn.OptimizedLSTMCell(self.width), name=f"lstm_{i}")(x)
            x = x + y
        return nn.Dense(VOCAB)(x)


LAYERS = (("embed", 1), ("layers.*", 2), ("head", 1))
CASES = {
    "gru": lambda: Case(lambda: SequenceModel(GruLayer, rngs=nnx.Rngs(0)), language_model, tokens(), LAYERS),
    "state space": lambda: Case(
        lambda: SequenceModel(StateSpaceLayer, rngs=nnx.Rngs(0)), language_model, tokens(), LAYERS
    ),
    "lstm linen": lambda: Case(LinenLstm, language_model, tokens(), (("embed", 1), ("lstm_*", 2), ("head", 1))),
}
