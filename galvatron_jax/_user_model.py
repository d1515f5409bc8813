"""The model that a command is about: a preset by name, or the user's own by ``MODULE:FUNCTION``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .analysis import Loss, abstract_batch
from .errors import ModelError
from .models import Llama, llama_config, next_token_loss


class UserModel(NamedTuple):
    """A model in the shape that the analysis takes."""

    model: nnx.Module | Callable[[], nnx.Module]
    loss: Loss
    batch: Any
    """Abstract; dimension 0 of each leaf is the batch."""

    def resized(self, samples: int) -> UserModel:
        """Return the same with a batch of ``samples``."""
        return self._replace(batch=abstract_batch(self.batch, samples))


def own_model(text: str, *, where: str = "--model") -> UserModel:
    """Return what the function ``MODULE:FUNCTION`` gives.

    Args:
        text: The function returns (model or builder, loss, batch), where the batch is a pytree of arrays or
            ``jax.ShapeDtypeStruct`` whose dimension 0 is the batch, of any size.
        where: Named in the error.

    Raises:
        ModelError: the function cannot be imported, or returns something else.
    """
    module, _, function = text.partition(":")
    try:
        model, loss, batch = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"got {text!r}: {error}",
            expected="MODULE:FUNCTION, a function without arguments that returns (model or builder, loss, batch)",
            where=where,
            action=f"for example {where} my_project.model:for_verify, run from the folder that holds my_project",
        ) from error
    return UserModel(model, loss, batch)


def preset_model(
    name: str, *, seq: int | None = None, dtype: str | None = None, fused_attention: bool = False
) -> UserModel:
    """Return the preset ``name`` at a sequence length and compute dtype, its own by default; nothing is built.

    Args:
        name: Of the preset.
        seq: Sequence length.
        dtype: Compute dtype.
        fused_attention: Whether it asks for cuDNN's kernel, which computes in 16 bits: otherwise this is not heeded.

    Raises:
        DocumentNotFoundError: there is no such preset.
    """
    config = llama_config(name)
    config = dataclasses.replace(
        config,
        seq=seq or config.seq,
        dtype=dtype or config.dtype,  # type: ignore[arg-type]  # LlamaConfig checks it
    )
    if fused_attention and config.dtype != "float32":
        config = dataclasses.replace(config, attention="cudnn")
    tokens = jax.ShapeDtypeStruct((1, config.seq), jnp.int32)
    return UserModel(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens, "targets": tokens})


def named_model(
    text: str, *, seq: int | None = None, dtype: str | None = None, fused_attention: bool = False
) -> UserModel:
    """Return the user's own model for ``MODULE:FUNCTION``, which knows its sizes, else the preset of that name.

    Raises:
        DocumentNotFoundError: there is no such preset.
        ModelError: as ``own_model``.
    """
    if ":" in text:
        return own_model(text)
    return preset_model(text.strip().lower(), seq=seq, dtype=dtype, fused_attention=fused_attention)
