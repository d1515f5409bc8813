"""Faults on purpose: which rank fails at which step, and how. For tests and drills; off unless the environment says so.

    GALVATRON_FAULTS='[{"kind": "kill", "point": "before_step", "step": 3, "rank": 1}]'

The trainer calls the plan at named points: ``before_step``, ``after_step``, ``in_loader``, ``before_save``,
``mid_save`` (arrays on disk, checksums not), ``before_commit`` (all on disk, not yet renamed), ``compile``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import jax
import msgspec

from .._document import NonNegative, Value
from ..errors import ConfigError
from ._attempt import ATTEMPT_VARIABLE

VARIABLE = "GALVATRON_FAULTS"

Point = Literal["compile", "before_step", "after_step", "in_loader", "before_save", "mid_save", "before_commit"]
Kind = Literal["kill", "terminate", "exit", "stall", "slow", "out_of_memory", "xla_failure", "disk_full", "interrupt"]


class Fault(Value, frozen=True, kw_only=True):
    """One fault."""

    kind: Kind
    point: Point = "before_step"
    step: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Number of the step (or batch); None: every one."""
    rank: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Process; None: every one."""
    attempt: Annotated[int, msgspec.Meta(ge=1)] | None = 1
    """Start of the process; None: every one."""
    seconds: NonNegative = 3600.0
    """Of ``stall`` and ``slow``."""


class FaultPlan:
    """The faults of one process."""

    def __init__(self, faults: tuple[Fault, ...] = (), *, rank: int = 0, attempt: int = 1) -> None:
        """Keep those that are for this rank and attempt."""
        self._faults = [f for f in faults if f.rank in (None, rank) and f.attempt in (None, attempt)]

    def at(self, point: str, step: int) -> None:
        """Let the faults happen that are planned for this point and step (or batch), if any."""
        for fault in self._faults:
            if fault.point == point and fault.step in (None, step):
                _KINDS[fault.kind](fault)


def planned_faults(environment: Mapping[str, str], *, rank: int) -> FaultPlan:
    """Return the faults that the environment plans; none in any run that is not a test.

    Raises:
        ConfigError: the variable holds no such list.
    """
    text = environment.get(VARIABLE)
    if not text:
        return FaultPlan()
    try:
        faults = msgspec.json.decode(text, type=tuple[Fault, ...])
    except msgspec.DecodeError as error:
        raise ConfigError(str(error), where=VARIABLE, action="unset it") from None
    print(f"{VARIABLE} is set: this process may fail on purpose", file=sys.stderr)
    return FaultPlan(faults, rank=rank, attempt=int(environment.get(ATTEMPT_VARIABLE, "1")))


def _kill(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _exit(_: Fault) -> None:
    os._exit(1)


def _sleep(fault: Fault) -> None:
    time.sleep(fault.seconds)


def _out_of_memory(_: Fault) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")


def _xla_failure(_: Fault) -> None:
    raise jax.errors.JaxRuntimeError("INTERNAL: the compiler failed")


def _disk_full(_: Fault) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_KINDS: dict[Kind, Callable[[Fault], None]] = {
    "kill": _kill,
    "terminate": _terminate,
    "interrupt": _interrupt,
    "exit": _exit,
    "stall": _sleep,
    "slow": _sleep,
    "out_of_memory": _out_of_memory,
    "xla_failure": _xla_failure,
    "disk_full": _disk_full,
}
