# mypy: disable-error-code=no-any-return
"""Swin: stages of rising width; attention in windows, shifted by a roll in every other block; patches merge between."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ._case import Case, classify, labelled_images

WINDOW = 2


def to_windows(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW * WINDOW, channels)


def from_windows(windows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, height, width, channels = shape
    x = windows.reshape(batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


class SwinBlock(nnx.Module):
    def __init__(self, width: int, heads: int, shift: int, *, rngs: nnx.Rngs) -> None:
        self.shift = shift
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shifted = jnp.roll(self.norm_1(x), (-self.shift, -self.shift), axis=(1, 2))
        y = from_windows(self.attention(to_windows(shifted)), x.shape)
        x = x + jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class PatchMerging(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4 * width, rngs=rngs)
        self.reduction = nnx.Linear(4 * width, 2 * width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(quarters, axis=-1)))


class Stage(nnx.Module):
    def __init__(self, width: int, heads: int, blocks: int, last: bool, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([SwinBlock(width, heads, shift=i % 2, rngs=rngs) for i in range(blocks)])
        self.downsample = None if last else PatchMerging(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nnx.Module):
    def __init__(self, width: int = 16, *, rngs: nnx.Rngs) -> None:
        self.patch_embed = nnx.Conv(3, width, (2, 2), strides=(2, 2), rngs=rngs)
        self.stages = nnx.List(
            [Stage(width, 2, 2, last=False, rngs=rngs), Stage(2 * width, 4, 2, last=True, rngs=rngs)]
        )
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patch_embed(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean(axis=(1, 2)))


BLOCK = "stages.*.blocks.*"
CASES = {
    "swin": lambda: Case(
        lambda: Swin(rngs=nnx.Rngs(0)),
        classify,
        labelled_images(),
        (
            ("embed", 1),
            (BLOCK, 1),
            (f"{BLOCK}#2", 1),  # shifted
            ("bridge", 1),  # patches merge
            (f"{BLOCK}#3", 1),
            (f"{BLOCK}#4", 1),
            ("head", 1),
        ),
    )
}
