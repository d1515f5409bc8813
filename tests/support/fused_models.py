"""Blocks whose projections are fused as people fuse them: queries, keys and values, or gate and up, in one product."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.support.small_models import SmallModel

HEADS, WIDTH, MLP, VOCAB = 8, 32, 48, 64

Cut = Callable[[jax.Array], list[jax.Array]]


def by_split(x: jax.Array, parts: int) -> list[jax.Array]:
    """GPT-2: one part after the other."""
    return jnp.split(x, parts, axis=-1)


def by_slice(x: jax.Array, parts: int) -> list[jax.Array]:
    """The same, with indices written out."""
    size = x.shape[-1] // parts
    return [x[..., k * size : (k + 1) * size] for k in range(parts)]


def by_reshape(x: jax.Array, parts: int) -> list[jax.Array]:
    """A dimension for the parts."""
    split = x.reshape(*x.shape[:-1], parts, -1)
    return [split[..., k, :] for k in range(parts)]


CUTS = {"split": by_split, "slice": by_slice, "reshape": by_reshape}


class FusedBlock(nnx.Module):
    """A transformer block with two fused projections."""

    def __init__(self, cut: str, *, rngs: nnx.Rngs) -> None:
        self.cut = cut
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.gate_up = nnx.Linear(WIDTH, 2 * MLP, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(MLP, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = CUTS[self.cut](self.qkv(x), 3)
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in parts)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape))
        gate, up = CUTS[self.cut](self.gate_up(self.norm(x)), 2)
        return x + self.down(nnx.silu(gate) * up)


class UnequalBlock(nnx.Module):
    """Queries, keys and values of grouped attention in one product: parts of different width."""

    def __init__(self, kv_heads: int, *, rngs: nnx.Rngs) -> None:
        self.kv_heads, self.head_dim = kv_heads, WIDTH // HEADS
        self.qkv = nnx.Linear(WIDTH, (HEADS + 2 * kv_heads) * self.head_dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, MLP, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(MLP, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        own = self.kv_heads * self.head_dim
        parts = jnp.split(self.qkv(x), [WIDTH, WIDTH + own], axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        q = q.reshape(*x.shape[:2], self.kv_heads, -1, self.head_dim)
        scores = jax.nn.softmax(jnp.einsum("bqhgd,bkhd->bhgqk", q, k))
        x = x + self.out(jnp.einsum("bhgqk,bkhd->bqhgd", scores, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(x)))


class FusedModel(nnx.Module):
    """A language model of fused blocks."""

    def __init__(self, block: Callable[[nnx.Rngs], nnx.Module], layers: int, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([block(rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fused(cut: str = "split", *, layers: int = 4, batch: int = 16) -> SmallModel:
    """Return a language model of fused blocks."""
    return _language_model(lambda rngs: FusedBlock(cut, rngs=rngs), layers, batch)


def shared(*, layers: int = 3, batch: int = 16) -> SmallModel:
    """Return a model that runs one fused block several times (ALBERT)."""

    class Shared(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=nnx.Rngs(0))
            self.block = FusedBlock("split", rngs=nnx.Rngs(1))
            self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=nnx.Rngs(2))

        def __call__(self, ids: jax.Array) -> jax.Array:
            x = self.embed(ids)
            for _ in range(layers):
                x = self.block(x)
            return self.head(x)

    return SmallModel(Shared, next_token, _ids(batch))


def unequal(kv_heads: int = 2, *, layers: int = 2, batch: int = 16) -> SmallModel:
    """Return a language model of blocks whose fused parts differ in width."""
    return _language_model(lambda rngs: UnequalBlock(kv_heads, rngs=rngs), layers, batch)


def _language_model(block: Callable[[nnx.Rngs], nnx.Module], layers: int, batch: int) -> SmallModel:
    return SmallModel(lambda: FusedModel(block, layers, rngs=nnx.Rngs(0)), next_token, _ids(batch))


def _ids(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, 16), dtype=np.int32)


def next_token(model: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of predicting each next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:])
    return jnp.mean(losses)
