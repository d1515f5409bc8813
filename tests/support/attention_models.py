"""Transformers that call ``jax.nn.dot_product_attention``, by the kernel that they are told to ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support.small_models import SmallModel

HEADS, HEAD_DIM, WIDTH, SEQ, BATCH, LAYERS = 8, 4, 32, 16, 16, 2


Attention = Callable[..., jax.Array]


class AttentionBlock(nnx.Module):
    """Attention of several forms, then a perceptron."""

    def __init__(
        self, form: str, kv_heads: int, kernel: str | None, attention: Attention | None, *, rngs: nnx.Rngs
    ) -> None:
        self.form, self.kernel, self.attention = form, kernel, attention
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.query = nnx.Linear(WIDTH, HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(WIDTH, kv_heads * HEAD_DIM, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(WIDTH, kv_heads * HEAD_DIM, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(HEADS * HEAD_DIM, WIDTH, rngs=rngs)
        if form == "learned bias":
            self.bias = nnx.Param(jax.random.normal(rngs(), (1, HEADS, SEQ, SEQ)))
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        h = self.norm(x)
        q, k, v = (f(h).reshape(*x.shape[:2], -1, HEAD_DIM) for f in (self.query, self.key, self.value))
        attention: Callable[..., jax.Array] = self.attention or jax.nn.dot_product_attention
        y = attention(q, k, v, **self._asked(lengths), implementation=self.kernel)
        x = x + self.out(y.reshape(*x.shape[:2], -1))
        return x + self.down(nnx.gelu(self.up(x)))

    def _asked(self, lengths: jax.Array) -> dict[str, Any]:
        if self.form == "mask":
            return {"mask": (jnp.arange(SEQ)[None, :] < lengths[:, None])[:, None, None, :]}
        if self.form == "lengths":
            return {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "is_causal": True}
        if self.form == "window":
            return {"is_causal": True, "local_window_size": (4, 0), "scale": 0.3}
        if self.form == "learned bias":
            return {"bias": self.bias[...]}
        return {"is_causal": True}


class AttentionStack(nnx.Module):
    """The blocks between a table and a head."""

    def __init__(
        self,
        form: str,
        kv_heads: int,
        kernels: Sequence[str | None],
        attention: Attention | None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(64, WIDTH, rngs=rngs)
        self.layers = nnx.List([AttentionBlock(form, kv_heads, kernel, attention, rngs=rngs) for kernel in kernels])
        self.head = nnx.Linear(WIDTH, 64, rngs=rngs)

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x, lengths)
        return self.head(x)


def loss(model: Any, batch: Any) -> jax.Array:
    """The mean square of the logits."""
    return jnp.mean(jnp.square(model(batch["tokens"], batch["lengths"])))


def attention_model(
    form: str = "causal",
    *,
    kv_heads: int = HEADS,
    kernel: str | None = "cudnn",
    kernels: Sequence[str | None] | None = None,
    attention: Attention | None = None,
) -> SmallModel:
    """Return a model of two layers whose attention has ``form``.

    Args:
        form: What its calls ask for besides.
        kv_heads: Heads of keys and values.
        kernel: The implementation that they ask for.
        kernels: That of each layer, if they differ.
        attention: What they call, in place of ``jax.nn.dot_product_attention`` as it is when they run.
    """
    each = kernels or (kernel,) * LAYERS
    random = np.random.default_rng(0)
    batch = {
        "tokens": random.integers(0, 64, (BATCH, SEQ), dtype=np.int32),
        "lengths": random.integers(4, SEQ + 1, BATCH, dtype=np.int32),
    }
    return SmallModel(lambda: AttentionStack(form, kv_heads, each, attention, rngs=nnx.Rngs(0)), loss, batch)
