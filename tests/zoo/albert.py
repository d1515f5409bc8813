# mypy: disable-error-code=no-any-return
"""ALBERT: one block, called several times; from the second call on its weights are tied, which is a kind of its own."""

from __future__ import annotations

import jax
from flax import linen as nn
from flax import nnx

from ._case import VOCAB, Case, language_model, tokens


# ----------------------------------------------------------------------------------------------------------------- NNX
class Block(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Albert(nnx.Module):
    def __init__(self, times: int = 3, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.times = times
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.widen = nnx.Linear(16, width, rngs=rngs)
        self.block = Block(width, 4, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.widen(self.embed(ids))
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x)


# --------------------------------------------------------------------------------------------------------------- Linen
class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))))


class LinenAlbert(nn.Module):
    times: int = 3
    width: int = 32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Dense(self.width)(nn.Embed(VOCAB, 16)(ids))
        block = LinenBlock(name="shared")
        for _ in range(self.times):
            x = block(x)
        return nn.Dense(VOCAB)(x)


CASES = {
    "albert": lambda: Case(
        lambda: Albert(rngs=nnx.Rngs(0)),
        language_model,
        tokens(),
        (("embed", 1), ("block", 1), ("block#2", 2), ("head", 1)),
    ),
    "albert linen": lambda: Case(
        LinenAlbert, language_model, tokens(), (("embed", 1), ("shared", 1), ("shared#2", 2), ("head", 1))
    ),
}
