# mypy: disable-error-code=no-any-return
"""DiT: a diffusion Transformer; the noise level modulates every block (adaLN): a value beside the stream."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._case import SAMPLES, Case

WIDTH, HEADS, POSITIONS, CHANNELS, FREQUENCIES = 32, 4, 16, 12, 8


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, use_scale=False, use_bias=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, use_scale=False, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.modulation = nnx.Linear(WIDTH, 6 * WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nnx.silu(noise))[:, None], 6, axis=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.down(nnx.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2)))


class DiT(nnx.Module):
    def __init__(self, layers: int = 2, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.noise1 = nnx.Linear(2 * FREQUENCIES, WIDTH, rngs=rngs)
        self.noise2 = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, POSITIONS, WIDTH)))
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, CHANNELS, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        angles = time[:, None] * jnp.exp(-jnp.arange(FREQUENCIES) / FREQUENCIES)
        noise = self.noise2(nnx.silu(self.noise1(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))))
        x = self.stem(x) + self.positions[...]
        for block in self.blocks:
            x = block(x, noise)
        return self.head(x)


def noised() -> dict[str, np.ndarray]:
    """Return random patches, what was added to them, and how much."""
    random = np.random.default_rng(0)
    x, noise = random.normal(size=(2, SAMPLES, POSITIONS, CHANNELS)).astype(np.float32)
    return {"x": x, "noise": noise, "time": random.uniform(0, 1, SAMPLES).astype(np.float32)}


def loss(model: Any, batch: Any) -> jax.Array:
    """Return the mean squared error of the predicted noise."""
    return jnp.mean((model(batch["x"], batch["time"]) - batch["noise"]) ** 2)


CASES = {
    "dit": lambda: Case(lambda: DiT(rngs=nnx.Rngs(0)), loss, noised(), (("embed", 1), ("blocks.*", 2), ("head", 1)))
}
