"""Models of the compile-only benchmarks, for ``--model benchmarks.aot_models:FUNCTION``; nothing is ever built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from galvatron_jax.models import Llama, LlamaConfig, next_token_loss

Subject = tuple[Callable[[], nnx.Module], Callable[[Any, Any], jax.Array], dict[str, jax.ShapeDtypeStruct]]


def llama_7b_four_layers() -> Subject:
    """Four blocks of Llama-2-7B with its embedding and head, 2048 positions."""
    return _llama(LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=4, heads=32, kv_heads=32, seq=2048))


def llama_7b_two_layers() -> Subject:
    """Two blocks of Llama-2-7B with its embedding and head, 2048 positions."""
    return _llama(LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=2, heads=32, kv_heads=32, seq=2048))


def llama_100m() -> Subject:
    """The preset ``llama-100m``."""
    return _llama(LlamaConfig(vocab=256, embed=1024, mlp=3072, layers=8, heads=16, kv_heads=8, seq=1024))


def _llama(config: LlamaConfig) -> Subject:
    tokens = jax.ShapeDtypeStruct((1, config.seq), jnp.int32)
    return (lambda: Llama(config, rngs=nnx.Rngs(0))), next_token_loss, {"inputs": tokens, "targets": tokens}
