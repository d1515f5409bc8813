"""The model that the benchmark trains: a Llama so small that slow links, not a laptop's two cores, are the bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from galvatron_jax.analysis import Loss
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss

CONFIG = LlamaConfig(vocab=512, embed=128, mlp=384, layers=4, heads=8, kv_heads=8, seq=64, dtype="float32")
NAME = "benchmarks.emulated_cluster.model:small_llama"


def build() -> Llama:
    """Build the model."""
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def small_llama() -> tuple[object, Loss, object]:
    """Return (builder, loss, batch) as ``--model`` takes them."""
    tokens = jax.ShapeDtypeStruct((1, CONFIG.seq), jnp.int32)
    return build, next_token_loss, {"inputs": tokens, "targets": tokens}
