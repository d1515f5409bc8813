# mypy: disable-error-code=no-any-return
"""Gemma-like: layers with a sliding window and layers that see everything, by turns; the logits are capped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ._case import VOCAB, Case, language_model, tokens


class Block(nnx.Module):
    def __init__(self, width: int, window: int | None, *, rngs: nnx.Rngs) -> None:
        self.window = window
        self.norm_1, self.norm_2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.q, self.o = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.kv = nnx.Einsum("bsd,cdhk->cbshk", (2, width, 2, width // 4), rngs=rngs)
        self.gate_up = nnx.Linear(width, 2 * 3 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(3 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm_1(x)
        q = self.q(h).reshape(*x.shape[:2], 4, -1)
        k, v = self.kv(h)
        seen = None if self.window is None else (self.window, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=seen)
        x = x + self.o(y.reshape(x.shape))
        gate, up = jnp.split(self.gate_up(self.norm_2(x)), 2, axis=-1)
        return x + self.down(nnx.gelu(gate) * up)


class Gemma(nnx.Module):
    def __init__(self, layers: int = 4, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.embedder = nnx.Embed(VOCAB, width, rngs=rngs)
        self.layers = nnx.List([Block(width, None if i % 2 else 4, rngs=rngs) for i in range(layers)])
        self.final_norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedder(ids) * jnp.sqrt(32.0)
        for layer in self.layers:
            x = layer(x)
        return 30.0 * jnp.tanh(self.embedder.attend(self.final_norm(x)) / 30.0)


ONE_LOCAL_ONE_GLOBAL = (("layers.*", 1), ("layers.*#2", 1))
CASES = {
    "local and global": lambda: Case(
        lambda: Gemma(rngs=nnx.Rngs(0)),
        language_model,
        tokens(),
        (("embed", 1), *ONE_LOCAL_ONE_GLOBAL, *ONE_LOCAL_ONE_GLOBAL, ("head", 1)),
    )
}
