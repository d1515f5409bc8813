"""Memory of what was derived from documents, found by the documents' identity.

Profiles hold dictionaries, so they have no hash, and hashing a layer kind would cost more than pricing it. Each entry
keeps its documents alive, so an identity is never reused for another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

from ..profile import HardwareProfile, LayerKind

P = ParamSpec("P")
R = TypeVar("R")

LIMIT = 2**16
"""Entries per function; beyond it the oldest goes (a search over one model needs some thousand)."""


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Remember the results of a pure function: layer kinds and hardware by identity, other arguments by value.

    The function is called with positional arguments only.
    """
    held: dict[tuple[Hashable, ...], tuple[object, R]] = {}

    @functools.wraps(function)
    def lookup(*args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs, "keyword arguments are not part of the key"
        key = tuple([id(arg) if isinstance(arg, _DOCUMENTS) else arg for arg in args])
        entry = held.get(key)
        if entry is None:
            entry = held[key] = (args, function(*args, **kwargs))
            if len(held) > LIMIT:
                del held[next(iter(held))]
        return entry[1]

    return lookup


_DOCUMENTS = (LayerKind, HardwareProfile)
