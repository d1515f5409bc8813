"""Which run is this? What a resumed run must share with the one before, what may differ, and the file that says so."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from .._document import write_text
from ..errors import ConfigError
from ._config import RunConfig, load_config

CONFIG_NAME = "config.toml"

_SECRET = re.compile(r"(^|_)(tokens?|keys?|secrets?|passwords?)($|_)", re.IGNORECASE)
REDACTED = "(redacted)"

FREE = frozenset(
    "run.folder run.plan run.mesh run.gpu run.devices run.eval_every run.eval_batches run.compile_cache run.profile"
    " data.max_skipped_share".split()
)
"""Settings that a resumed run may change without a word; the sections ``checkpoint``, ``log`` and ``policy`` too."""

OVERRIDABLE = frozenset(
    "run.steps optimizer.learning_rate optimizer.schedule optimizer.warmup_steps optimizer.final_share".split()
)
"""Settings that ``--override-config`` lets a resumed run change: the result changes, but not what the state means."""


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the result, by ``section.key``."""
    table = msgspec.to_builtins(config)
    return {
        f"{section}.{key}": value
        for section in ("model", "data", "optimizer", "run")
        for key, value in table[section].items()
        if f"{section}.{key}" not in FREE
    }


def fingerprint(config: RunConfig) -> str:
    """Return 16 hex digits that stand for ``identity``."""
    text = msgspec.json.encode(identity(config), order="deterministic")
    return hashlib.sha256(text).hexdigest()[:16]


def check_same_run(before: RunConfig, now: RunConfig, *, override: bool, where: str) -> list[str]:
    """Check that ``now`` may go on where ``before`` stopped; return the differences that were let through.

    Args:
        before: The configuration of the run so far.
        now: The present one.
        override: Let ``OVERRIDABLE`` settings differ.
        where: Named in the error.

    Raises:
        ConfigError: they differ in more than may differ; the message lists every difference.
    """
    old, new = identity(before), identity(now)
    changed = {key: f"{key}: {old[key]!r} so far, {new[key]!r} now" for key in new if old[key] != new[key]}
    refused = {key: text for key, text in changed.items() if not (override and key in OVERRIDABLE)}
    if not refused:
        return list(changed.values())
    hint = " (or add --override-config)" if set(refused) <= OVERRIDABLE else ""
    raise ConfigError(
        "the run was started with other settings:\n  - " + "\n  - ".join(refused.values()),
        where=where,
        action=f"use the old ones{hint}, or another [run] folder",
    )


def read_config(folder: Path) -> RunConfig | None:
    """Return the configuration saved with a run, None when there is none yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / CONFIG_NAME
    return load_config(path) if path.exists() else None


def write_config(config: RunConfig, folder: Path) -> Path:
    """Save the resolved configuration, secrets redacted; return its path."""
    import tomli_w

    table = _redacted(_without_none(msgspec.to_builtins(config)))
    return write_text(tomli_w.dumps(table), folder / CONFIG_NAME, "configuration of the run")


def _redacted(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _redacted(value) if isinstance(value, Mapping) else REDACTED if _SECRET.search(key) else value
        for key, value in table.items()
    }


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is None is left out, and is the default again when read."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }
