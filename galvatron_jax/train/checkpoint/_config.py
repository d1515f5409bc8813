"""The [checkpoint] section of a run."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..._document import Count, Positive, Value


class CheckpointConfig(Value, frozen=True, kw_only=True):
    """When checkpoints are written, which are kept, and what happens when writing fails."""

    every: Count = 100
    """Steps between two; the last step always writes one."""
    keep: Count = 3
    """Newest ones that are kept; an older one goes only after a newer one is whole."""
    keep_every: Count | None = None
    """Steps that are multiples of this are kept for good."""
    verify: bool = True
    """Read all files of a checkpoint and compare their SHA-256 before restoring it."""
    max_failures: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    """Failed saves in a row after which the run ends; until then it goes on training and tries again."""
    timeout_s: Positive = 600.0
    """One save, over all processes."""
