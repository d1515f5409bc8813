# mypy: disable-error-code=no-any-return
"""Convolutions with BatchNorm, then a Transformer on what they found: two layer groups, and statistics as state."""

from __future__ import annotations

import jax
from flax import linen as nn
from flax import nnx

from ._case import Case, classify, labelled_images


# ----------------------------------------------------------------------------------------------------------------- NNX
class ConvBlock(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(x + self.bn2(self.conv2(h)))


class AttentionBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Hybrid(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 16, (4, 4), strides=(4, 4), rngs=rngs)
        self.stem_norm = nnx.BatchNorm(16, rngs=rngs)
        self.convs = nnx.List([ConvBlock(16, rngs=rngs) for _ in range(2)])
        self.blocks = nnx.List([AttentionBlock(16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for conv in self.convs:
            x = conv(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


# --------------------------------------------------------------------------------------------------------------- Linen
class LinenConvBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
        return x + nn.Conv(x.shape[-1], (3, 3))(y)


class LinenConvNet(nn.Module):
    """ResNet-like, with ``batch_stats``."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(16, (4, 4), strides=(4, 4))(images)
        for _ in range(3):
            x = LinenConvBlock()(x, train)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


CASES = {
    "hybrid": lambda: Case(
        lambda: Hybrid(rngs=nnx.Rngs(0)),
        classify,
        labelled_images(),
        (("embed", 1), ("convs.*", 2), ("bridge", 1), ("blocks.*", 2), ("head", 1)),
        state=True,
        tolerance=1e-4,  # dividing by the deviation of few values multiplies rounding
    ),
    "convnet linen": lambda: Case(
        LinenConvNet,
        classify,
        labelled_images(),
        (("embed", 1), ("LinenConvBlock_*", 3), ("head", 1)),
        state=True,
        tolerance=1e-4,
    ),
}
