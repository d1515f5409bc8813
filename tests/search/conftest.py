"""What tests of the search share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def own_clock() -> Iterator[None]:
    """No garbage is collected meanwhile: after a thousand other tests one pass takes longer than a search.

    For the same reason such tests read ``time.thread_time``: threads that other tests left behind do not count.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
