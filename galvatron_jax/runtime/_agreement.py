"""All processes must run one plan: a difference shows as a hang or as wrong numbers, so it is refused at the door."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import PlanError


def agree(name: str, text: str, *, action: str) -> None:
    """Check that all processes have the same ``text``; all of them call it.

    Args:
        name: What the text is.
        text: Anything; its hash is compared.
        action: What to do about a difference.

    Raises:
        PlanError: naming the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(jax.process_count(), -1)
    different = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if different:
        raise PlanError(
            f"the {name} of process {', '.join(map(str, different))} differs from that of process 0",
            expected="one for all processes",
            where=name,
            action=action,
        )
