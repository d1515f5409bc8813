"""The store: saves in the background, restores the newest checkpoint that is whole, under any plan.

Orbax writes the arrays (every process its own shards) into a temporary folder; when all are on disk, rank 0 adds the
checksums of all files and what the run needs besides (``Checkpoint``), and renames the folder. So a checkpoint is whole
or it is not there, whatever is killed when. Processes share the folder (a common file system).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import msgspec
import orbax.checkpoint

from ... import __version__
from ..._document import load, save
from ...errors import CheckpointError, DocumentError, GalvatronError
from ...plan import Plan
from ...runtime import TrainState
from .._config import CheckpointConfig
from .._ranks import Ranks
from ._document import DOCUMENT_NAME, Checkpoint, Progress
from ._files import check_files, sum_files
from ._folder import (
    list_steps,
    remove_in_background,
    remove_leftovers,
    remove_unfinished,
    set_aside,
    step_folder,
    surplus,
)
from ._leaves import check_leaves, describe_leaves, name_leaves, rebuild, storable

_log = logging.getLogger(__name__)

ocp: Any = orbax.checkpoint  # its public names are not marked as such, which strict type checking wants

Hook = Callable[[str, int], None]
"""Called with the name of a point of the save and its step; tests let it fail there."""


@dataclasses.dataclass(frozen=True, slots=True)
class SaveEvent:
    """How a save ended."""

    step: int
    error: Exception | None
    """None: the checkpoint is whole."""
    duration_s: float
    """From the start of the save, most of it beside training."""


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint and the state in it."""

    checkpoint: Checkpoint
    state: TrainState


class CheckpointStore:
    """The checkpoints of a run; every process has one and calls the same methods in the same order."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks, *, hook: Hook = lambda *_: None) -> None:
        """Open the folder; leftovers of killed saves go after all processes have opened it.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        self.folder, self._config, self._ranks, self._hook = folder.absolute(), config, ranks, hook
        self._pending: Checkpoint | None = None
        self._started_s = 0.0
        # Named processes meet in the key-value store, with a time limit. By default Orbax lets all devices meet without
        # one: when a process fails in a save the others' next step and that meeting wait for each other for ever.
        meeting = ocp.options.MultiprocessingOptions(active_processes=set(range(ranks.count)))
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=meeting),
            multiprocessing_options=meeting,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=int(config.timeout_s), post_finalization_callback=self._finalize
            ),
        )
        with self._naming_folder():
            self.folder.mkdir(parents=True, exist_ok=True)
        ranks.exchange("checkpoints opened")
        if ranks.index == 0:
            with self._naming_folder():
                remove_leftovers(self.folder)
        ranks.exchange("checkpoints cleaned")

    @property
    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, ascending."""
        return list_steps(self.folder)

    # ---------------------------------------------------------------------------------------------------------- saving
    def save(self, state: TrainState, progress: Progress, plan: Plan) -> SaveEvent | None:
        """Begin to save; arrays are copied to the host before this returns, so the state may then be donated.

        A failure never raises: it is returned here when the save cannot even begin, else by ``poll``.
        """
        event = self.finish()
        leaves = storable(name_leaves(state))
        self._started_s = time.monotonic()
        self._pending = Checkpoint(
            progress=progress,
            plan=plan,
            versions={"galvatron_jax": __version__, "jax": jax.__version__, "orbax": ocp.__version__},
            leaves=describe_leaves(leaves),
            files={},
        )
        path = step_folder(self.folder, progress.step)
        if (path / DOCUMENT_NAME).exists():  # whole, though another process failed after it was
            return self._ended(None)
        if (problem := self._problem_of_any(progress.step)) is not None:
            return self._ended(problem)
        try:
            self._orbax.save(path, args=ocp.args.StandardSave(leaves))
        except Exception as error:
            return self._ended(error)
        return event

    def _problem_of_any(self, step: int) -> Exception | None:
        """Return what keeps this process, or another one, from beginning to save: all begin, or none."""
        own: Exception | None = None
        try:
            self._hook("before_save", step)
            self.folder.mkdir(parents=True, exist_ok=True)
        except Exception as error:
            own = error
        said = self._ranks.exchange("save", "" if own is None else f"{type(own).__name__}: {own}")
        others = [f"rank {rank}: {text or 'no answer'}" for rank, text in enumerate(said) if text != ""]
        return own or (CheckpointError("; ".join(others), where=str(self.folder)) if others else None)

    def poll(self) -> SaveEvent | None:
        """Return how the last save ended, once, or None while it is under way."""
        if self._pending is None:
            return None
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            return self._ended(error)
        done = (step_folder(self.folder, self._pending.step) / DOCUMENT_NAME).exists()
        return self._ended(None) if done else None

    def finish(self) -> SaveEvent | None:
        """Wait for the save under way, and return how it ended."""
        if self._pending is None:
            return None
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            return self._ended(error)
        return self._ended(None)

    def close(self) -> None:
        """Wait for the save under way and end the threads."""
        self.finish()
        self._orbax.close()

    def _ended(self, error: Exception | None) -> SaveEvent:
        pending, self._pending = self._pending, None
        assert pending is not None, "called for a pending save"
        if self._ranks.index == 0:
            if error is None:
                old = surplus(self.steps, keep=self._config.keep, keep_every=self._config.keep_every)
                remove_in_background(self.folder, old)
            else:
                remove_unfinished(self.folder, pending.step)
        return SaveEvent(pending.step, error, time.monotonic() - self._started_s)

    def _finalize(self) -> None:
        """Add our document; Orbax calls this on rank 0, in its own thread, when all arrays are on disk."""
        pending = self._pending
        assert pending is not None, "a save under way is pending"
        self._hook("mid_save", pending.step)
        name = step_folder(self.folder, pending.step).name
        (temporary,) = self.folder.glob(f"{name}.orbax-checkpoint-tmp*")
        document = msgspec.structs.replace(pending, files=sum_files(temporary))
        save(document.sealed(), temporary / DOCUMENT_NAME)
        self._hook("before_commit", pending.step)

    # ------------------------------------------------------------------------------------------------------- restoring
    def restore(self, abstract: TrainState) -> Restored | None:
        """Return the newest checkpoint that is whole, its state placed as ``abstract`` says; None when there is none.

        Damaged ones are renamed ``.corrupt`` with a warning.

        Args:
            abstract: Shape, dtype and sharding of each leaf, under the present plan.

        Raises:
            ConfigError: it holds another model or optimizer.
            CheckpointError: there are checkpoints, and all are damaged.
        """
        wanted = storable(name_leaves(abstract))
        steps = [int(step) for step in (self._ranks.exchange("steps", self._steps_text())[0] or "").split()]
        for step in reversed(steps):
            checkpoint = self._checked(step)
            if checkpoint is None:
                continue
            check_leaves(checkpoint, describe_leaves(wanted), where=str(step_folder(self.folder, step)))
            stored = self._read(step, wanted)
            if stored is not None:
                return Restored(checkpoint, rebuild(stored, abstract))
        if steps:
            raise CheckpointError(
                f"all {len(steps)} checkpoints are damaged (renamed .corrupt)",
                expected="one that is whole",
                where=str(self.folder),
                action="bring one back from a backup, or start in another folder",
            )
        return None

    def _steps_text(self) -> str:
        return " ".join(map(str, self.steps))

    def _checked(self, step: int) -> Checkpoint | None:
        """Return the document of a checkpoint when all ranks find their share of its files whole, else set it aside."""
        checkpoint, problem = self._inspect(step_folder(self.folder, step))
        return checkpoint if self._all_well(step, problem) else None

    def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arrays, or None and set the checkpoint aside when a rank cannot read its own."""
        stored: dict[str, Any] = {}
        try:
            stored = self._orbax.restore(step_folder(self.folder, step), args=ocp.args.StandardRestore(wanted))
            problem = ""
        except Exception as error:  # Orbax raises plain exceptions with the whole specification of the array
            problem = f"cannot be read: {type(error).__name__}: {str(error)[:200]}"
            if self._config.verify:  # its files are whole, so this is no damage: nothing is set aside
                raise CheckpointError(
                    problem,
                    expected="files that have been verified to be readable",
                    where=str(step_folder(self.folder, step)),
                    action="this is a fault of galvatron_jax or Orbax: please report it",
                ) from error
        return stored if self._all_well(step, problem) else None

    def _all_well(self, step: int, problem: str) -> bool:
        """Tell whether no rank has a ``problem`` with a checkpoint; else set it aside."""
        found = self._ranks.exchange("checkpoint", problem)
        problems = [text if text is not None else "a rank did not answer" for text in found if text != ""]
        if problems and self._ranks.index == 0:
            path = step_folder(self.folder, step)
            aside = set_aside(path)
            _log.warning("checkpoint %s is damaged (%s); renamed to %s", path, problems[0], aside.name)
        self._ranks.exchange("checkpoint looked at")
        return not problems

    def _inspect(self, path: Path) -> tuple[Checkpoint | None, str]:
        try:
            checkpoint = load(path / DOCUMENT_NAME, Checkpoint)
        except GalvatronError as error:
            if isinstance(error, DocumentError) and "schema_version" in error.problem:
                raise  # of a newer version of ours: nothing is wrong with it
            return None, error.message
        if not checkpoint.is_intact:
            return None, f"{DOCUMENT_NAME}: has another checksum"
        if not self._config.verify:
            return checkpoint, ""
        share = sorted(checkpoint.files)[self._ranks.index :: self._ranks.count]
        return checkpoint, "; ".join(check_files(path, checkpoint.files, share)[:3])

    @contextlib.contextmanager
    def _naming_folder(self) -> Any:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot be used: {error.strerror or error}",
                expected="a folder that can be written",
                where=str(self.folder),
                action="choose another [run] folder",
            ) from None
