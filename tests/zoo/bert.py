# mypy: disable-error-code=no-any-return
"""BERT: attention masks from the batch, three embeddings, post-norm, a masked-token loss through a tied decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from ._case import SEQ, VOCAB, Case, tokens


def batch() -> dict[str, np.ndarray]:
    """Sentences of different lengths, some tokens masked."""
    ids = tokens()
    lengths = np.random.default_rng(1).integers(SEQ // 2, SEQ + 1, len(ids))
    attended = np.arange(SEQ) < lengths[:, None]
    chosen = (np.random.default_rng(2).random(ids.shape) < 0.3) & attended
    return {
        "input_ids": np.where(chosen, 0, ids).astype(np.int32),
        "token_type_ids": (np.arange(SEQ) >= SEQ // 2).astype(np.int32) * np.ones_like(ids),
        "attention_mask": attended,
        "labels": ids,
        "weights": chosen.astype(np.float32),
    }


def masked_token_loss(model: Any, batch: Any) -> jax.Array:
    """Mean over samples of the mean over the masked tokens, so that parts of a batch average to the whole."""
    logits = model(batch["input_ids"], batch["token_type_ids"], attention_mask=batch["attention_mask"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    weights = batch["weights"]
    return jnp.mean(jnp.sum(losses * weights, axis=1) / (jnp.sum(weights, axis=1) + 1e-3))


# ----------------------------------------------------------------------------------------------------------------- NNX
class BertLayer(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(heads, width, dropout_rate=0.1, decode=False, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.intermediate = nnx.Linear(width, 4 * width, rngs=rngs)
        self.output = nnx.Linear(4 * width, width, rngs=rngs)
        self.output_norm = nnx.LayerNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask, deterministic=False)))
        return self.output_norm(x + self.dropout(self.output(nnx.gelu(self.intermediate(x)))))


class BertEncoder(nnx.Module):
    def __init__(self, layers: int, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List([BertLayer(width, heads, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nnx.Module):
    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, *, rngs: nnx.Rngs) -> None:
        self.word_embeddings = nnx.Embed(VOCAB, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(SEQ, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(2, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.encoder = BertEncoder(layers, width, heads, rngs=rngs)
        self.transform = nnx.Linear(width, width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(VOCAB))

    def __call__(self, ids: jax.Array, types: jax.Array, *, attention_mask: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[1])[None]
        x = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings(types)
        x = self.encoder(self.norm(x), nnx.make_attention_mask(attention_mask, attention_mask, dtype=bool))
        return self.word_embeddings.attend(nnx.gelu(self.transform(x))) + self.bias[None, None]


# --------------------------------------------------------------------------------------------------------------- Linen
class LinenBertLayer(nn.Module):
    width: int
    heads: int

    def setup(self) -> None:
        self.attention = nn.MultiHeadDotProductAttention(self.heads, dropout_rate=0.1, deterministic=False)
        self.norms = (nn.LayerNorm(), nn.LayerNorm())
        self.mlp = nn.Sequential([nn.Dense(4 * self.width), nn.gelu, nn.Dense(self.width)])
        self.dropout = nn.Dropout(0.1, deterministic=False)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.norms[0](x + self.dropout(self.attention(x, mask=mask)))
        return self.norms[1](x + self.dropout(self.mlp(x)))


class LinenBert(nn.Module):
    layers: int = 2
    width: int = 32
    heads: int = 4

    def setup(self) -> None:
        self.words = nn.Embed(VOCAB, self.width)
        self.positions = nn.Embed(SEQ, self.width)
        self.types = nn.Embed(2, self.width)
        self.blocks = [LinenBertLayer(self.width, self.heads) for _ in range(self.layers)]
        self.bias = self.param("bias", nn.initializers.zeros, (VOCAB,))

    def __call__(self, ids: jax.Array, types: jax.Array, *, attention_mask: jax.Array) -> jax.Array:
        x = self.words(ids) + self.positions(jnp.arange(ids.shape[1])[None]) + self.types(types)
        mask = nn.make_attention_mask(attention_mask, attention_mask, dtype=bool)
        for block in self.blocks:
            x = block(x, mask)
        return self.words.attend(x) + self.bias


CASES = {
    "bert": lambda: Case(
        lambda: Bert(rngs=nnx.Rngs(0, dropout=1)),
        masked_token_loss,
        batch(),
        (("embed", 1), ("encoder.layer.*", 2), ("head", 1)),
        dropout=True,
    ),
    "bert linen": lambda: Case(
        LinenBert, masked_token_loss, batch(), (("embed", 1), ("blocks_*", 2), ("head", 1)), dropout=True
    ),
}
