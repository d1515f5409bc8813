"""Losses that are not finite, or far too high, where a batch holds a marked token; ``module:function`` of run files."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galvatron_jax.models import next_token_loss

MARK = 255
"""No byte of UTF-8 text."""


def poisoned_loss(model: Any, batch: Any) -> jax.Array:
    """NaN for a batch that holds ``MARK``, next-token cross-entropy for others."""
    loss = next_token_loss(model, batch)
    return loss * jnp.where(jnp.any(batch["inputs"] == MARK), jnp.nan, 1.0)


def spiking_loss(model: Any, batch: Any) -> jax.Array:
    """A hundred times the loss for a batch that holds ``MARK``."""
    loss = next_token_loss(model, batch)
    return loss * jnp.where(jnp.any(batch["inputs"] == MARK), 100.0, 1.0)
