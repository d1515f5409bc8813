"""How should this model be spread over these GPUs? The whole public API.

Every name loads on first use: ``import galvatron_jax`` imports neither jax nor numpy, and planning never imports jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors as errors
    from ._auto_shard import auto_shard as auto_shard
    from ._plan_shardings import plan_shardings as plan_shardings
    from .cluster import Cluster as Cluster
    from .plan import Plan as Plan
    from .plan import Stage as Stage
    from .plan import Strategy as Strategy
    from .plan import load_plan as load_plan
    from .profile import HardwareProfile as HardwareProfile
    from .profile import ModelProfile as ModelProfile
    from .search import find_plan as find_plan
    from .train import AutoTrainer as AutoTrainer

_HOMES = {
    "AutoTrainer": "train",
    "Cluster": "cluster",
    "HardwareProfile": "profile",
    "ModelProfile": "profile",
    "Plan": "plan",
    "Stage": "plan",
    "Strategy": "plan",
    "auto_shard": "_auto_shard",
    "find_plan": "search",
    "load_plan": "plan",
    "plan_shardings": "_plan_shardings",
}
"""Module of each public name; a test holds it equal to the imports above."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names."""
    return sorted([*_HOMES, "__version__", "errors"])
