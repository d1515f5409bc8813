"""Llama in Flax NNX, as a user would write it: no sharding annotation, no hook for the planner.

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288): pre-norm blocks with RMSNorm, rotary positions, grouped query
attention and SwiGLU. Rotary positions turn the two halves of a head (Hugging Face's convention, not Meta's adjacent
pairs), so that a Hugging Face weight is ours transposed.

Shape suffixes: B batch, S sequence, E embed, H query heads, K kv heads, D head dim, F mlp, V vocab;
N one of H and K, R = D / 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ._config import LlamaConfig

INITIALIZER_STD = 0.02
"""Standard deviation of fresh weights: ``initializer_range`` in the ``config.json`` of the released models."""


class Llama(nnx.Module):
    """A decoder-only language model: tokens in, logits of the next token out."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Create the model with fresh float32 parameters.

        Args:
            config: Sizes and compute dtype.
            rngs: Source of the initial weights, for example ``nnx.Rngs(0)``.
        """
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.embed, embedding_init=_initializer(), rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config)
        if not config.tied:
            self.head = _linear(config, config.embed, config.vocab, rngs)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Return ``logits_BSV`` in the compute dtype.

        Args:
            tokens_BS: Integers in ``[0, vocab)``.
        """
        # Looked up before the cast, so that gradients of frequent tokens add up in float32.
        x_BSE = self.embed(tokens_BS).astype(self.config.dtype)
        for block in self.layers:
            x_BSE = block(x_BSE)
        x_BSE = self.norm(x_BSE)
        if self.config.tied:
            return x_BSE @ self.embed.embedding[...].astype(x_BSE.dtype).T
        return self.head(x_BSE)


class Block(nnx.Module):
    """One layer: attention, then SwiGLU, each on the normalised stream and added back to it."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Create the layer."""
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Return the stream after this layer."""
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE))
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


class Attention(nnx.Module):
    """Causal grouped query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Create the four projections."""
        self.config = config
        self.query = _linear(config, config.embed, config.heads * config.head_dim, rngs)
        self.key = _linear(config, config.embed, config.kv_heads * config.head_dim, rngs)
        self.value = _linear(config, config.embed, config.kv_heads * config.head_dim, rngs)
        self.out = _linear(config, config.heads * config.head_dim, config.embed, rngs)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Return what each position gathers from itself and those before it."""
        q_BSHD = rotate(self._heads(self.query(x_BSE)), self.config.rope_theta)
        k_BSKD = rotate(self._heads(self.key(x_BSE)), self.config.rope_theta)
        v_BSKD = self._heads(self.value(x_BSE))
        y_BSHD = jax.nn.dot_product_attention(
            q_BSHD, k_BSKD, v_BSKD, is_causal=True, implementation=self.config.attention
        )
        return self.out(y_BSHD.reshape(x_BSE.shape))

    def _heads(self, x: jax.Array) -> jax.Array:
        """``(B, S, N * D)`` as ``(B, S, N, D)``."""
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Create the three projections."""
        self.gate = _linear(config, config.embed, config.mlp, rngs)
        self.up = _linear(config, config.embed, config.mlp, rngs)
        self.down = _linear(config, config.mlp, config.embed, rngs)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Return the layer's change to the stream."""
        h_BSF = nnx.silu(self.gate(x_BSE)) * self.up(x_BSE)
        return self.down(h_BSF)


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x²) + eps)`` (Zhang and Sennrich 2019, arXiv:1910.07467), statistics in float32."""

    def __init__(self, config: LlamaConfig) -> None:
        """Create the scale, all ones."""
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.embed, jnp.float32))

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Return the normalised stream, in its dtype."""
        x32_BSE = x_BSE.astype(jnp.float32)
        inverse_rms_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSE), axis=-1, keepdims=True) + self.eps)
        scale_11E = self.scale[...][None, None, :]
        return (scale_11E * (x32_BSE * inverse_rms_BS1)).astype(x_BSE.dtype)


def rotate(x_BSND: jax.Array, theta: float) -> jax.Array:
    """Turn each head by its position (RoPE, Su et al. 2021, arXiv:2104.09864, section 3.2.2).

    Component ``r`` of the first half and ``r`` of the second form a plane, turned at position ``s`` by the angle
    ``s * theta ** (-2 r / D)``: products of queries and keys then depend on the distance of their positions only.

    Args:
        x_BSND: Queries or keys; positions are 0 ... S - 1 and D is even.
        theta: Base of the wavelengths.
    """
    seq, head_dim = x_BSND.shape[1], x_BSND.shape[3]
    frequency_R = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_SR = jnp.outer(jnp.arange(seq, dtype=jnp.float32), frequency_R)
    cos_1S1R, sin_1S1R = jnp.cos(angle_SR)[None, :, None, :], jnp.sin(angle_SR)[None, :, None, :]
    # In float32: 16 bits cannot tell far positions apart.
    a_BSNR, b_BSNR = jnp.split(x_BSND.astype(jnp.float32), 2, axis=-1)
    turned = (a_BSNR * cos_1S1R - b_BSNR * sin_1S1R, b_BSNR * cos_1S1R + a_BSNR * sin_1S1R)
    return jnp.concatenate(turned, axis=-1).astype(x_BSND.dtype)


def _linear(config: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A product without bias: float32 kernel ``(inputs, outputs)``, computed in ``config.dtype``."""
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, kernel_init=_initializer(), rngs=rngs)


def _initializer() -> jax.nn.initializers.Initializer:
    return nnx.initializers.normal(INITIALIZER_STD)
