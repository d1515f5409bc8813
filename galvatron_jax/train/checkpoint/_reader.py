"""Read parameters of a finished checkpoint one by one, without a model, an optimizer or a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint

from ..._document import load
from ...errors import CheckpointError
from ._document import DOCUMENT_NAME, Checkpoint
from ._files import check_files
from ._folder import list_steps, step_folder

ocp: Any = orbax.checkpoint  # its public names are not marked as such, which strict type checking wants

PREFIX, SUFFIX = "parameters/", "/value"
"""Around the path of an NNX parameter in the table of a checkpoint."""


@dataclasses.dataclass(frozen=True, slots=True)
class SavedParameter:
    """A parameter in a checkpoint: read when a part of it is asked for."""

    reader: CheckpointReader
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        """Return a part; the whole parameter is read."""
        part: np.ndarray[Any, Any] = self.reader.read(self.name)[index]
        return part


class CheckpointReader:
    """A finished checkpoint of a run, whose files are whole; nothing in its folder is changed."""

    def __init__(self, folder: Path, step: int | None = None) -> None:
        """Find a checkpoint and compare its checksums.

        Args:
            folder: The checkpoints of a run.
            step: Which; the newest by default.

        Raises:
            CheckpointError: there is none, or it is damaged.
            DocumentError: its document cannot be read.
        """
        steps = list_steps(folder)
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(
                f"there is no checkpoint{f' of step {step}' if step is not None else ''}",
                expected=f"one of the steps {', '.join(map(str, steps))}" if steps else "a folder of checkpoints",
                where=str(folder),
                action="name the folder of a run that has saved",
            )
        self.step = steps[-1] if step is None else step
        self._folder = step_folder(folder.absolute(), self.step)
        self.checkpoint = load(self._folder / DOCUMENT_NAME, Checkpoint)
        problems = [] if self.checkpoint.is_intact else [f"{DOCUMENT_NAME}: has another checksum"]
        problems += check_files(self._folder, self.checkpoint.files, sorted(self.checkpoint.files))
        if problems:
            raise CheckpointError(
                f"is damaged: {'; '.join(problems[:3])}", where=str(self._folder), action="name another step"
            )

    @property
    def parameters(self) -> dict[str, SavedParameter]:
        """All parameters by dotted path, none of them read."""
        return {
            name.removeprefix(PREFIX).removesuffix(SUFFIX).replace("/", "."): SavedParameter(self, name, leaf.shape)
            for name, leaf in self.checkpoint.leaves.items()
            if name.startswith(PREFIX)
        }

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return one array of the checkpoint by its name there."""
        arguments = ocp.args.PyTreeRestore(
            item={name: 0}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax_reader:
            found = orbax_reader.restore(self._folder, args=arguments)
        return np.asarray(found[name])
