"""What a model of the zoo is: a model, its loss, a batch, and what the analysis should find in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

SAMPLES, SEQ, VOCAB = 8, 16, 64
"""Batch, sequence length and vocabulary of the zoo; eight samples, so that eight devices can share them."""

Layers = tuple[tuple[str, int], ...]
"""Runs of layers: (kind, count)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model as its author trains it."""

    build: Callable[[], Any]
    """Returns what a user passes to ``auto_shard``: an NNX module, a Linen module, or a tree of parameters."""
    loss: Callable[[Any, Any], Any]
    """``loss(model, batch)``; a Linen module arrives bound to its variables."""
    batch: Any
    """Concrete arrays."""
    layers: Layers
    """The layers that should be found, in order."""
    dropout: bool = False
    """The loss draws random numbers."""
    state: bool = False
    """A step changes more than parameters and random keys (BatchNorm statistics)."""
    tolerance: float = 1e-5
    """Largest error of loss and gradients against the original, absolute and relative: the same float32 operations,
    which XLA may fuse in another way; all values are of order 1 or less."""

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the batch."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), self.batch)


def tokens(samples: int = SAMPLES, seq: int = SEQ, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    """Return random token ids, int32 (samples, seq)."""
    return np.random.default_rng(seed).integers(1, vocab, (samples, seq), dtype=np.int32)


def images(samples: int = SAMPLES, size: int = 16, channels: int = 3) -> np.ndarray:
    """Return random images, float32 (samples, size, size, channels)."""
    return np.random.default_rng(0).normal(size=(samples, size, size, channels)).astype(np.float32)


def labelled_images(classes: int = 10) -> dict[str, np.ndarray]:
    """Return images with labels."""
    labels = np.random.default_rng(1).integers(0, classes, SAMPLES, dtype=np.int32)
    return {"image": images(), "label": labels}


def next_token(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of predicting each next token."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]))


def classify(model: Any, batch: Any) -> jax.Array:
    """Return the mean cross-entropy of a classifier of images."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"]))


def language_model(model: Any, batch: Any) -> jax.Array:
    """Return the next-token loss of a model of token ids."""
    return next_token(model(batch), batch)
