"""The folder of a run's checkpoints: which are there, which go, which are set aside.

step_00000100/                        a checkpoint, when it holds galvatron.json
step_00000200.orbax-checkpoint-tmp/   a save that is under way, or was killed
step_00000050.deleted/                on its way out
step_00000150.corrupt/                damaged; set aside, never deleted
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from ._document import DOCUMENT_NAME

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_([0-9]{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lives."""
    return folder / f"step_{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Return the steps of all finished checkpoints, ascending; damaged ones that nobody has looked at included."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(int(match[1]) for match, path in matches if match and (path / DOCUMENT_NAME).exists())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left: unfinished saves and half-deleted checkpoints."""
    for path in folder.iterdir():
        unfinished = _NAME.fullmatch(path.name) and not (path / DOCUMENT_NAME).exists()
        if unfinished or path.name.endswith(".deleted") or ".orbax-checkpoint-tmp" in path.name:
            _log.warning("removing %s, left by a killed process", path)
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path, step: int) -> None:
    """Delete what a failed save of ``step`` left, so that a full disk has room again."""
    for path in folder.glob(f"{step_folder(folder, step).name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nobody restores it; return its new path."""
    target, number = path.with_name(f"{path.name}.corrupt"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt.{number}")
    return path.rename(target)


def surplus(steps: Sequence[int], *, keep: int, keep_every: int | None) -> list[int]:
    """Return which of the ``steps`` are to go: all but the newest ``keep`` and the multiples of ``keep_every``."""
    old = sorted(steps)[:-keep]
    return [step for step in old if not keep_every or step % keep_every]


def remove_in_background(folder: Path, steps: Sequence[int]) -> None:
    """Delete the checkpoints of ``steps``; what fails is reported and left."""
    doomed = []
    for step in steps:
        path = step_folder(folder, step)
        try:
            doomed.append(path.rename(path.with_name(f"{path.name}.deleted")))
        except OSError as error:
            _log.warning("cannot delete the old checkpoint %s: %s", path, error)

    def remove() -> None:
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    if doomed:
        threading.Thread(target=remove, name="delete-checkpoints", daemon=True).start()
