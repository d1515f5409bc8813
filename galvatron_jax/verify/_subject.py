"""What a plan is verified on: the model, its loss, its batch and an optimizer of the planned size."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..analysis import Loss
from ..errors import ModelError, UnsupportedError
from ..models import Llama, llama_config, next_token_loss
from ..plan import Plan


class Subject(NamedTuple):
    """A model in the shape that the analysis takes."""

    model: nnx.Module | Callable[[], nnx.Module]
    loss: Loss
    batch: Any
    """Abstract batch of one microbatch."""


def load_subject(plan: Plan, model: str) -> Subject:
    """Return the model of ``plan``, abstract: nothing is built.

    Args:
        plan: The plan; names a preset when ``model`` is empty.
        model: ``MODULE:FUNCTION``; the function returns (model or builder, loss, batch), where the batch is a pytree of
            arrays or ``jax.ShapeDtypeStruct`` whose dimension 0 is the batch, of any size.

    Raises:
        DocumentNotFoundError: there is no such preset.
        ModelError: the function cannot be imported, or returns something else.
    """
    return _resized(_call(model) if model else _preset(plan), plan.microbatch_size)


def stand_in_optimizer(plan: Plan) -> optax.GradientTransformation:
    """Return an optimizer that keeps as many bytes per parameter as the plan says: memory is all that matters here.

    Raises:
        UnsupportedError: there is none.
    """
    size = plan.training.state_bytes_per_parameter
    optimizers = {8: optax.adamw(1e-3), 4: optax.sgd(1e-3, momentum=0.9), 0: optax.sgd(1e-3)}
    if size not in optimizers:
        raise UnsupportedError(
            f"got an optimizer with {size} bytes of state per parameter",
            expected="8 (two float32 moments), 4 (one) or 0",
            where="training.state_bytes_per_parameter of the plan",
            action="verify with the nearest of these",
        )
    return optimizers[size]


def _preset(plan: Plan) -> Subject:
    config = dataclasses.replace(
        llama_config(plan.model.name),
        seq=plan.model.seq,
        dtype=plan.model.dtype,  # type: ignore[arg-type]  # LlamaConfig checks it
    )
    tokens = jax.ShapeDtypeStruct((1, config.seq), jnp.int32)
    return Subject(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens, "targets": tokens})


def _call(text: str) -> Subject:
    module, _, function = text.partition(":")
    try:
        subject = getattr(importlib.import_module(module), function)()
        model, loss, batch = subject
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"got {text!r}: {error}",
            expected="MODULE:FUNCTION, a function without arguments that returns (model or builder, loss, batch)",
            where="--model",
            action="for example --model my_project.model:for_verify, run from the folder that holds my_project",
        ) from error
    return Subject(model, loss, batch)


def _resized(subject: Subject, samples: int) -> Subject:
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((samples, *leaf.shape[1:]), leaf.dtype), subject.batch)
    return subject._replace(batch=batch)
