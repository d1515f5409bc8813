"""The loss of a language model, written so that the vocabulary may stay sharded and logits stay 16 bits wide.

Per position, with logits z and target t:

    loss = log(sum_v exp(z_v)) - z_t            d loss / d z_v = exp(z_v - logsumexp(z)) - [v = t]

z_t is a masked sum over the vocabulary, not a lookup: devices that hold a part of the vocabulary each sum their own
part, where a lookup would have to gather the logits. Left to itself, ``jax.vjp`` (0.10.2) keeps float32 arrays and the
mask for the backward pass, 9 bytes per logit; the rule below keeps the logits as they are (2 bytes each in bfloat16)
and one float32 per position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ..errors import AnalysisError

# Shape suffixes: B batch, S sequence, V vocab.
Batch = Mapping[str, jax.Array] | jax.Array


def next_token_loss(model: Callable[[jax.Array], jax.Array], batch: Batch) -> jax.Array:
    """Return the mean cross-entropy of the next token, in nats: a float32 scalar.

    Args:
        model: Maps tokens ``(B, S)`` to logits ``(B, S, V)``.
        batch: ``{"inputs": (B, S), "targets": (B, S)}``, or tokens ``(B, S + 1)`` of which all but the last are inputs
            and all but the first are targets; integers in ``[0, V)``.

    Raises:
        AnalysisError: ``batch`` is neither.
    """
    inputs_BS, targets_BS = _inputs_and_targets(batch)
    return jnp.mean(cross_entropy(model(inputs_BS), targets_BS))


def _inputs_and_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    if isinstance(batch, Mapping):
        if {"inputs", "targets"} <= set(batch):
            return batch["inputs"], batch["targets"]
        got = f"got a batch with the keys {sorted(batch)}"
    else:
        if batch.ndim == 2 and batch.shape[1] > 1:
            return batch[:, :-1], batch[:, 1:]
        got = f"got a batch of shape {batch.shape}"
    raise AnalysisError(
        got,
        expected='{"inputs": (B, S), "targets": (B, S)} or an integer array (B, S + 1)',
        where="next_token_loss",
        action="change the batch, or give a loss of your own",
    )


@jax.custom_vjp
def cross_entropy(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    """Return the cross-entropy of each position, ``(B, S)`` in float32.

    Args:
        logits_BSV: Floating point of any width; all sums are in float32.
        targets_BS: Integers in ``[0, V)``.
    """
    return _forward(logits_BSV, targets_BS)[0]


def _forward(logits_BSV: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    logits32_BSV = logits_BSV.astype(jnp.float32)
    normalizer_BS = jax.nn.logsumexp(logits32_BSV, axis=-1)
    target_logit_BS = jnp.sum(jnp.where(_is_target(logits_BSV, targets_BS), logits32_BSV, 0.0), axis=-1)
    return normalizer_BS - target_logit_BS, (logits_BSV, targets_BS, normalizer_BS)


def _backward(residuals: tuple[jax.Array, jax.Array, jax.Array], gradient_BS: jax.Array) -> tuple[jax.Array, None]:
    logits_BSV, targets_BS, normalizer_BS = residuals
    probability_BSV = jnp.exp(logits_BSV.astype(jnp.float32) - normalizer_BS[..., None])
    slope_BSV = probability_BSV - _is_target(logits_BSV, targets_BS).astype(jnp.float32)
    return (gradient_BS[..., None] * slope_BSV).astype(logits_BSV.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _is_target(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    """One-hot of the targets as booleans ``(B, S, V)``."""
    vocabulary_11V = jnp.arange(logits_BSV.shape[-1], dtype=targets_BS.dtype)[None, None, :]
    return targets_BS[..., None] == vocabulary_11V
