# mypy: disable-error-code=no-any-return
"""ViT: a convolution makes patches, a class token joins them; NNX in ``nnx.Sequential``, Linen compact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ._case import Case, classify, labelled_images

PATCHES = 16


# ----------------------------------------------------------------------------------------------------------------- NNX
class EncoderBlock(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 4 * width, rngs=rngs), nnx.gelu, nnx.Linear(4 * width, width, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, width, (4, 4), strides=(4, 4), rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, PATCHES + 1, width)))
        self.encoder = nnx.Sequential(*[EncoderBlock(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[-1]))
        x = self.encoder(jnp.concatenate([cls, x], axis=1) + self.positions[...])
        return self.head(self.norm(x[:, 0]))


# --------------------------------------------------------------------------------------------------------------- Linen
class LinenEncoderBlock(nn.Module):
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class LinenViT(nn.Module):
    layers: int = 2
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (4, 4), strides=(4, 4))(images)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, PATCHES, self.width))
        for _ in range(self.layers):
            x = LinenEncoderBlock()(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


CASES = {
    "vit": lambda: Case(
        lambda: ViT(rngs=nnx.Rngs(0)),
        classify,
        labelled_images(),
        (("embed", 1), ("encoder.layers.*", 2), ("head", 1)),
    ),
    "vit linen": lambda: Case(
        LinenViT, classify, labelled_images(), (("embed", 1), ("LinenEncoderBlock_*", 2), ("head", 1))
    ),
}
