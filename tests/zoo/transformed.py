# mypy: disable-error-code=no-any-return
"""Blocks under transformations, in other containers, called in other ways than ``block(x)``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._case import SAMPLES, VOCAB, Case, Layers, language_model, next_token, tokens


class Mlp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(3 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class JittedMlp(Mlp):
    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)


class StepMlp(Mlp):
    """Called through a method of another name, by keyword."""

    def step(self, *, hidden: jax.Array, scale: float = 1.0) -> dict[str, jax.Array]:
        return {"hidden": hidden + scale * self.down(nnx.gelu(self.up(self.norm(hidden))))}


class Model(nnx.Module):
    def __init__(self, block: type[Mlp] = Mlp, layers: int = 3, width: int = 16, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.blocks: Any = nnx.List([block(width, rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.head(self.body(self.embed(ids)))

    def body(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Rematerialised(Model):
    def body(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Checkpointed(Model):
    """``jax.checkpoint`` around the pure form of each block."""

    def body(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            graph, state = nnx.split(block)
            x = jax.checkpoint(lambda state, x, graph=graph: nnx.merge(graph, state)(x))(state, x)
        return x


class Stepped(Model):
    def body(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block.step(hidden=x, scale=0.5)["hidden"]
        return x


class PerSample(Model):
    """Written for one sample, mapped over the batch."""

    def body(self, x: jax.Array) -> jax.Array:
        return jax.vmap(super().body)(x)


class InDict(nnx.Module):
    """Blocks in a dictionary and, inside each, in a tuple."""

    def __init__(self, width: int = 16, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.layers = nnx.Dict({f"layer_{i}": nnx.List([Mlp(width, rngs=rngs)]) for i in range(3)})
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for i in range(3):
            (block,) = self.layers[f"layer_{i}"]
            x = block(x)
        return self.head(x)


class Adapted(Mlp):
    """LoRA beside one product, weight normalisation around the other."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.LoRALinear(width, 3 * width, lora_rank=2, rngs=rngs)
        self.normed = nnx.WeightNorm(nnx.Linear(3 * width, width, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.normed(nnx.gelu(self.up(self.norm(x))))


def loss_with_metrics(model: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss and auxiliary results; weights per sample, a flag, and class weights that all samples share."""
    logits = model(batch["ids"]) + batch["prior"]
    weights = jnp.where(batch["keep"], 1.0, 0.5)
    one = jax.vmap(lambda logits, ids: next_token(logits[None], ids[None]))(logits, batch["ids"])
    value = jnp.mean(one * weights)
    return value, {"perplexity": jnp.exp(value)}


def mixed_batch() -> dict[str, Any]:
    prior = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    return {"ids": tokens(), "keep": np.arange(SAMPLES) % 2 == 0, "prior": prior, "temperature": np.float32(0.5)}


THREE: Layers = (("embed", 1), ("blocks.*", 3), ("head", 1))


def _case(model: type[Model], block: type[Mlp] = Mlp, layers: Layers = THREE) -> Case:
    return Case(lambda: model(block, rngs=nnx.Rngs(0)), language_model, tokens(), layers)


CASES = {
    "nnx.jit": lambda: _case(Model, JittedMlp),
    "nnx.remat": lambda: _case(Rematerialised),
    "jax.checkpoint": lambda: _case(Checkpointed),
    "other method": lambda: _case(Stepped, StepMlp),
    "vmap": lambda: _case(PerSample),
    "in a dictionary": lambda: Case(
        lambda: InDict(rngs=nnx.Rngs(0)), language_model, tokens(), (("embed", 1), ("layers.layer_*.*", 3), ("head", 1))
    ),
    "lora": lambda: _case(Model, Adapted),
    "auxiliary results": lambda: Case(lambda: Model(rngs=nnx.Rngs(0)), loss_with_metrics, mixed_batch(), THREE),
}
