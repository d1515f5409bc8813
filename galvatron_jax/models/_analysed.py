"""Analyse a preset: how the stored profiles are made (needs jax and flax, no devices and no parameter memory)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ..analysis import analyse_model
from ..profile import ModelProfile
from ._llama import Llama
from ._loss import next_token_loss
from ._presets import llama_config

TRACED_BATCH = 4
"""Samples in the trace. Profiles are monomials in the batch; only the choice of the worst moment of the backward pass
looks at sizes, and four samples stand for the usual few per device."""


def analyse_preset(name: str) -> ModelProfile:
    """Return the profile that the analysis derives for the preset ``name`` at its own sequence length.

    Raises:
        DocumentNotFoundError: there is no such preset.
    """
    config = llama_config(name)
    tokens = jax.ShapeDtypeStruct((TRACED_BATCH, config.seq), jnp.int32)
    analysis = analyse_model(
        lambda: Llama(config, rngs=nnx.Rngs(0)),
        next_token_loss,
        {"inputs": tokens, "targets": tokens},
        name=name,
        source=f"galvatron_jax.analysis of preset {name}",
    )
    return analysis.profile
