"""From the [model] and [optimizer] sections to the model, its loss and the optimizer."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from flax import nnx

from .._weights import Weights
from ..analysis import Loss
from ..errors import ConfigError
from ..models import Llama, LlamaConfig, llama_config, next_token_loss
from ..models.huggingface import read_llama, read_llama_config
from ._config import ModelConfig, OptimizerConfig

DEFAULT_PRESET = "llama-tiny"


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What is trained."""

    build: Callable[[], nnx.Module]
    loss: Loss
    vocab: int | None
    seq: int | None
    """Longest sequence that it is meant for."""
    name: str
    weights: Weights | None = None
    """What to begin with, when the model does not say it itself."""


def build_subject(config: ModelConfig) -> Subject:
    """Return the model of a run.

    Raises:
        ConfigError: a function that it names does not exist, or a preset has no such field.
        DocumentNotFoundError: there is no such preset, or no weights.
        DocumentError: the weights are damaged, or may not be opened.
        ModelError: the changed sizes contradict each other.
    """
    loss = _imported(config.loss, "loss") if config.loss else next_token_loss
    if config.function:
        return Subject(_imported(config.function, "function"), loss, config.vocab, None, config.function)
    preset = llama_of(config)
    name = Path(config.huggingface).name if config.huggingface else config.preset or DEFAULT_PRESET
    weights = read_llama(config.huggingface)[1] if config.huggingface else None
    return Subject(lambda: Llama(preset, rngs=nnx.Rngs(config.seed)), loss, preset.vocab, preset.seq, name, weights)


def llama_of(config: ModelConfig) -> LlamaConfig:
    """Return the configuration of the Llama that a run trains.

    Raises:
        ConfigError: it trains a function's model, or a preset has no such field.
        DocumentNotFoundError: there is no such preset, or no ``config.json``.
    """
    if config.function:
        raise ConfigError(f"got {config.function!r}", expected="a preset or huggingface", where="[model] function")
    if config.huggingface:
        return _changed(read_llama_config(config.huggingface), config)
    return _changed(llama_config(config.preset or DEFAULT_PRESET), config)


def build_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer and its learning rate by step."""
    schedule = _schedule(config, steps)
    if config.name == "adamw":
        rule = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    elif config.name == "adam":
        rule = optax.adam(schedule, b1=config.b1, b2=config.b2)
    elif config.name == "adafactor":
        rule = optax.adafactor(schedule)
    else:
        rule = optax.sgd(schedule, momentum=config.b1 or None)
    return (optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule), schedule


def _schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = min(steps // 10 if config.warmup_steps is None else config.warmup_steps, steps)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_share)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_share, rest)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    # From one share of the peak, not from zero: the first step is to move something.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    joined: optax.Schedule = optax.join_schedules([rise, decay], [warmup])
    return joined


def _changed(preset: LlamaConfig, config: ModelConfig) -> LlamaConfig:
    known = {field.name for field in dataclasses.fields(preset)}
    unknown = sorted(set(config.changes) - known)
    if unknown:
        raise ConfigError(
            f"got {', '.join(unknown)}", expected=f"some of {', '.join(sorted(known))}", where="[model] changes"
        )
    changed: LlamaConfig = dataclasses.replace(preset, **config.changes)  # type: ignore[arg-type]  # checked there
    return changed


def _imported(text: str, key: str) -> Any:
    """Return the user's own function; the one place where a run file names code."""
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {text!r}: {error}",
            expected="module:function",
            where=f"[model] {key}",
            action="start the run where Python finds the module",
        ) from None
