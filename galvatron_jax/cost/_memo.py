"""Memory of what was derived from a document, found by the document's identity.

Documents hold dictionaries, so they have no hash, and hashing a layer kind would cost more than pricing it. Each entry
keeps its document alive, so an identity is never reused for another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

R = TypeVar("R")

LIMIT = 4096
"""Entries per function; beyond it the oldest goes (a search over one model needs some hundred)."""


def remembered(function: Callable[..., R]) -> Callable[..., R]:
    """Remember the results of the pure ``function(document, *keys)`` by identity of the document and value of the keys."""
    held: dict[tuple[Hashable, ...], tuple[object, R]] = {}

    @functools.wraps(function)
    def lookup(document: object, *keys: Hashable) -> R:
        key = (id(document), *keys)
        entry = held.get(key)
        if entry is None:
            entry = held[key] = (document, function(document, *keys))
            if len(held) > LIMIT:
                del held[next(iter(held))]
        return entry[1]

    return lookup
