"""Preflight: before the first program, every process says what it is about to run, and all must say the same."""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections.abc import Mapping

import jax
import jaxlib.version
import msgspec

from .. import __version__
from ..errors import PreflightError
from ._ranks import Ranks

_log = logging.getLogger(__name__)

PREFLIGHT_TIMEOUT_S = 60.0
CLOCKS_APART_S = 60.0
"""Clocks further apart make logs and file times useless; training does not read them."""
FREE = frozenset(("host", "process", "time"))
"""Facts that may differ."""


def gather_facts(*, config: str, plan: str) -> dict[str, str]:
    """Return what must agree, and where this process runs.

    Args:
        config: Fingerprint of the run's settings.
        plan: Fingerprint of the plan; empty when it is still to be searched.
    """
    devices = jax.local_devices()
    return {
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "time": f"{time.time():.0f}",
        "processes": str(jax.process_count()),
        "devices": str(jax.device_count()),
        "local devices": str(len(devices)),
        "device kind": devices[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "galvatron_jax": __version__,
        "settings": config,
        "plan": plan or "searched",
    }


def check_preflight(ranks: Ranks, facts: Mapping[str, str], *, timeout_s: float = PREFLIGHT_TIMEOUT_S) -> None:
    """Exchange ``facts`` with all processes and compare.

    Raises:
        PreflightError: processes are missing (named), or say something else (the first difference of each is named).
    """
    said = ranks.exchange("preflight", msgspec.json.encode(facts).decode(), timeout_s=timeout_s)
    missing = [rank for rank, text in enumerate(said) if text is None]
    if missing:
        raise PreflightError(
            f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {ranks.count} did not report within"
            f" {timeout_s:.0f} s",
            expected=f"{ranks.count} processes",
            where="preflight",
            action="look at their logs; did they start, and do they reach the coordinator?",
        )
    everyone = [msgspec.json.decode(text, type=dict[str, str]) for text in said if text is not None]
    times = [float(facts.get("time", "0")) for facts in everyone]
    if max(times) - min(times) > CLOCKS_APART_S:
        late = everyone[times.index(min(times))].get("host")
        _log.warning("clocks are %.0f s apart; %s is furthest behind", max(times) - min(times), late)
    differences = [_first_difference(rank, everyone[0], other) for rank, other in enumerate(everyone)]
    if any(differences):
        raise PreflightError(
            "the processes do not agree:\n  - " + "\n  - ".join(filter(None, differences)),
            expected="what rank 0 says",
            where="preflight",
            action="start all processes with the same code, files and environment",
        )


def _first_difference(rank: int, first: Mapping[str, str], other: Mapping[str, str]) -> str:
    for name in sorted((first.keys() | other.keys()) - FREE):
        if first.get(name) != other.get(name):
            return f"rank {rank} on {other.get('host')}: {name} is {other.get(name)}, on rank 0 {first.get(name)}"
    return ""
