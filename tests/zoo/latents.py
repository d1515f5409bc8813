# mypy: disable-error-code=no-any-return
"""Perceiver: learned latents, the same for every sample, read the whole input in every block; Linen with setup."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from ._case import SAMPLES, Case

LATENTS, WIDTH, HEADS, POSITIONS = 6, 32, 4, 24


class Block(nn.Module):
    def setup(self) -> None:
        self.read = nn.MultiHeadDotProductAttention(HEADS)
        self.mix = nn.MultiHeadDotProductAttention(HEADS)
        self.norms = [nn.LayerNorm() for _ in range(4)]
        self.up = nn.Dense(2 * WIDTH)
        self.down = nn.Dense(WIDTH)

    def __call__(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        latents = latents + self.read(self.norms[0](latents), self.norms[1](x))
        latents = latents + self.mix(self.norms[2](latents))
        return latents + self.down(nn.gelu(self.up(self.norms[3](latents))))


class Perceiver(nn.Module):
    layers: int = 2

    def setup(self) -> None:
        self.latents = self.param("latents", nn.initializers.normal(0.02), (LATENTS, WIDTH))
        self.stem = nn.Dense(WIDTH)
        self.blocks = [Block() for _ in range(self.layers)]
        self.head = nn.Dense(10)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        latents = jnp.broadcast_to(self.latents, (x.shape[0], *self.latents.shape))
        for block in self.blocks:
            latents = block(latents, x)
        return self.head(latents.mean(axis=1))


def signal() -> dict[str, np.ndarray]:
    """Return random signals with labels."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, POSITIONS, 12)).astype(np.float32)
    return {"x": x, "label": random.integers(0, 10, SAMPLES, dtype=np.int32)}


def loss(model: Any, batch: Any) -> jax.Array:
    """Return the mean cross-entropy of a classifier of signals."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"]))


CASES = {"perceiver": lambda: Case(Perceiver, loss, signal(), (("embed", 1), ("blocks_*", 2), ("head", 1)))}
