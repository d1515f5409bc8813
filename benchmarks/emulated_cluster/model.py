"""The model that the benchmark trains: a small Llama whose gradients take a slow link about as long as its products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from galvatron_jax.models import Llama, LlamaConfig, next_token_loss

CONFIG = LlamaConfig(vocab=1024, embed=256, mlp=1024, layers=4, heads=8, kv_heads=8, seq=128, dtype="float32")


def small_llama() -> tuple[object, object, object]:
    """Return (builder, loss, batch) as ``--model`` takes them."""
    tokens = jax.ShapeDtypeStruct((1, CONFIG.seq), jnp.int32)
    return lambda: Llama(CONFIG, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens, "targets": tokens}
