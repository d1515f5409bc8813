# mypy: disable-error-code=no-any-return
"""GPT-2: queries, keys and values from one product, learned positions, dropout, a tied head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ._case import SEQ, VOCAB, Case, language_model, tokens


def split_heads(qkv: jax.Array, heads: int) -> list[jax.Array]:
    batch, seq, width = qkv.shape
    return [x.reshape(batch, seq, heads, width // 3 // heads) for x in jnp.split(qkv, 3, axis=-1)]


# ----------------------------------------------------------------------------------------------------------------- NNX
class Attention(nnx.Module):
    def __init__(self, embed: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.c_attn = nnx.Linear(embed, 3 * embed, rngs=rngs)
        self.c_proj = nnx.Linear(embed, embed, rngs=rngs)
        self.attn_dropout = nnx.Dropout(dropout, rngs=rngs)
        self.resid_dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = split_heads(self.c_attn(x), self.heads)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), dtype=bool))
        weights = self.attn_dropout(jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return self.resid_dropout(self.c_proj(y))


class Block(nnx.Module):
    def __init__(self, embed: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(embed, rngs=rngs)
        self.attn = Attention(embed, heads, dropout, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(embed, rngs=rngs)
        self.c_fc = nnx.Linear(embed, 4 * embed, rngs=rngs)
        self.c_proj = nnx.Linear(4 * embed, embed, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.dropout(self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x)))))


class GPT2(nnx.Module):
    def __init__(
        self, layers: int = 2, embed: int = 32, heads: int = 4, dropout: float = 0.1, *, rngs: nnx.Rngs
    ) -> None:
        self.wte = nnx.Embed(VOCAB, embed, rngs=rngs)
        self.wpe = nnx.Embed(SEQ, embed, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.h = nnx.List([Block(embed, heads, dropout, rngs=rngs) for _ in range(layers)])
        self.ln_f = nnx.LayerNorm(embed, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.drop(self.wte(ids) + self.wpe(jnp.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


class ScannedGPT2(nnx.Module):
    """All blocks in one stack of parameters, run by ``nnx.scan``; an untied head."""

    def __init__(
        self, layers: int = 3, embed: int = 32, heads: int = 4, dropout: float = 0.1, *, rngs: nnx.Rngs
    ) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(embed, heads, dropout, rngs=rngs)

        self.wte = nnx.Embed(VOCAB, embed, rngs=rngs)
        self.blocks = blocks(rngs)
        self.ln_f = nnx.LayerNorm(embed, rngs=rngs)
        self.lm_head = nnx.Linear(embed, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        return self.lm_head(self.ln_f(forward(self.blocks, self.wte(ids))))


# --------------------------------------------------------------------------------------------------------------- Linen
class LinenBlock(nn.Module):
    heads: int = 4
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        embed = x.shape[-1]
        q, k, v = split_heads(nn.Dense(3 * embed, name="c_attn")(nn.LayerNorm(name="ln_1")(x)), self.heads)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dropout(self.dropout)(nn.Dense(embed, name="c_proj")(y), deterministic=not train)
        h = nn.gelu(nn.Dense(4 * embed, name="mlp_fc")(nn.LayerNorm(name="ln_2")(x)))
        return x + nn.Dropout(self.dropout)(nn.Dense(embed, name="mlp_proj")(h), deterministic=not train)


class LinenGPT2(nn.Module):
    layers: int = 2
    embed: int = 32
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, train: bool = True) -> jax.Array:
        wte = nn.Embed(VOCAB, self.embed, name="wte")
        x = wte(ids) + self.param("wpe", nn.initializers.normal(0.02), (SEQ, self.embed))
        x = nn.Dropout(0.1)(x, deterministic=not train)
        block: Any = nn.remat(LinenBlock, static_argnums=(2,)) if self.remat else LinenBlock
        if self.scan:
            scan: Any = nn.scan(
                lambda module, x, _: (module(x, train), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.layers,
            )
            x, _ = scan(block(name="h"), x, None)
        else:
            for i in range(self.layers):
                x = block(name=f"h_{i}")(x, train)
        return wte.attend(nn.LayerNorm(name="ln_f")(x))


LOOPED = (("embed", 1), ("h.*", 2), ("head", 1))
CASES = {
    "gpt2": lambda: Case(lambda: GPT2(rngs=nnx.Rngs(0)), language_model, tokens(), LOOPED, dropout=True),
    "gpt2 scanned": lambda: Case(
        lambda: ScannedGPT2(rngs=nnx.Rngs(0)),
        language_model,
        tokens(),
        (("embed", 1), ("blocks[*]", 3), ("head", 1)),
        dropout=True,
    ),
    "gpt2 linen": lambda: Case(
        LinenGPT2, language_model, tokens(), (("embed", 1), ("h_*", 2), ("head", 1)), dropout=True
    ),
    "gpt2 linen scanned": lambda: Case(
        lambda: LinenGPT2(layers=3, scan=True),
        language_model,
        tokens(),
        (("embed", 1), ("h[*]", 3), ("head", 1)),
        dropout=True,
    ),
    "gpt2 linen remat": lambda: Case(
        lambda: LinenGPT2(remat=True), language_model, tokens(), (("embed", 1), ("h_*", 2), ("head", 1)), dropout=True
    ),
}
