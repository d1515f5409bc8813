"""Train: AutoTrainer, and everything around the step: data, checkpoints, metrics, and what to do when something fails.

The parts load when they are first used, so that ``python -m galvatron_jax.train --help`` answers at once and the
environment can be prepared before JAX is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._config import CheckpointConfig as CheckpointConfig
from ._config import DataConfig as DataConfig
from ._config import LogConfig as LogConfig
from ._config import ModelConfig as ModelConfig
from ._config import OptimizerConfig as OptimizerConfig
from ._config import PolicyConfig as PolicyConfig
from ._config import RunConfig as RunConfig
from ._config import RunSettings as RunSettings
from ._config import load_config as load_config

if TYPE_CHECKING:
    from ._loop import Outcome as Outcome
    from ._trainer import AutoTrainer as AutoTrainer

_LAZY = {"AutoTrainer": "._trainer", "Outcome": "._loop"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")} | set(_LAZY))
