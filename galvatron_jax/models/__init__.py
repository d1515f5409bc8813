"""Flax NNX models with presets and their stored profiles; importing this imports neither jax nor flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._config import LlamaConfig as LlamaConfig
from ._presets import llama_config as llama_config
from ._presets import model_names as model_names
from ._profiles import load_model_profile as load_model_profile
from ._profiles import model_profile_names as model_profile_names

if TYPE_CHECKING:
    from ._llama import Llama as Llama
    from ._loss import next_token_loss as next_token_loss

_LAZY = {"Llama": "._llama", "next_token_loss": "._loss"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")} | set(_LAZY))
