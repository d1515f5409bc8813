"""The partial file beside the output: readings survive an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._document import load, save
from ..errors import DocumentError, DocumentNotFoundError
from ._readings import Machine, Reading, ReadingLog


def partial_path(out: Path) -> Path:
    """Return where the readings for profile ``out`` are kept: ``hardware.json`` -> ``hardware.partial.json``."""
    return out.with_name(f"{out.stem}.partial.json")


def save_readings(path: Path, machine: Machine, readings: Sequence[Reading], *, quick: bool, model: str = "") -> None:
    """Write the partial file, atomically.

    Raises:
        DocumentError: the folder cannot be written.
    """
    save(ReadingLog(machine=machine, quick=quick, model=model, readings=tuple(readings)), path)


def resume_readings(path: Path, machine: Machine, *, quick: bool, model: str = "") -> tuple[Reading, ...]:
    """Return the readings of an interrupted run, none when there was none.

    Raises:
        DocumentError: the file cannot be read, or belongs to another machine, mesh, version, mode or model.
    """
    try:
        log = load(path, ReadingLog)
    except DocumentNotFoundError:
        return ()
    except DocumentError as error:
        raise DocumentError(
            error.problem, expected=error.expected, where=error.where, action="run again without --resume to start over"
        ) from None
    found, wanted = _identity(log.machine, log.quick, log.model), _identity(machine, quick, model)
    if found != wanted:
        different = ", ".join(f"{key} {found[key]!r}" for key in found if found[key] != wanted[key])
        raise DocumentError(
            f"was measured elsewhere: {different}",
            expected=", ".join(f"{key} {wanted[key]!r}" for key in found if found[key] != wanted[key]),
            where=str(path),
            action="run again without --resume to start over",
        )
    return log.readings


def _identity(machine: Machine, quick: bool, model: str) -> dict[str, object]:
    return {**{field: getattr(machine, field) for field in machine.__struct_fields__}, "quick": quick, "model": model}
