"""The search: the fastest plan of the stated space, and the proof that it is. numpy only, never jax.

The parts load when they are first used, so that ``python -m galvatron_jax.search --help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import InfeasibleError as InfeasibleError

if TYPE_CHECKING:
    from ._baselines import Baseline as Baseline
    from ._find import SearchResult as SearchResult
    from ._find import find_plan as find_plan
    from ._report import describe_plan as describe_plan
    from ._rules import Rule as Rule
    from ._rules import forbid as forbid
    from ._rules import pin as pin
    from ._space import default_batches as default_batches

_LAZY = {
    "Baseline": "._baselines",
    "Rule": "._rules",
    "SearchResult": "._find",
    "default_batches": "._space",
    "describe_plan": "._report",
    "find_plan": "._find",
    "forbid": "._rules",
    "pin": "._rules",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")} | set(_LAZY))
