"""The data of a run: what is trained on, what is held out, and the loaders of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from .._sharded_model import ShardedModel
from ._config import RunConfig
from ._faults import FaultPlan
from .data import Loader, SkippedRecords, Windows, open_windows, split_windows
from .data._loader import Batch, collate
from .data._records import CheckedWindows


@dataclasses.dataclass(frozen=True, slots=True)
class DataSet:
    """The data of a run."""

    train: Windows
    held_out: Windows | None

    def abstract_batch(self, global_batch: int) -> Any:
        """Return shapes and dtypes of a global batch."""
        one = collate([self.train[0]])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((global_batch, *x.shape[1:]), x.dtype), one)

    def loader(self, config: RunConfig, sharded: ShardedModel, faults: FaultPlan) -> Loader:
        """Return the batches to train on, the rows that this process feeds."""
        return Loader(
            self.train,
            global_batch=sharded.plan.global_batch,
            rows=sharded.process_rows,
            seed=config.data.seed,
            epochs=config.data.epochs,
            on_read=lambda number: faults.at("in_loader", number),
        )

    def held_out_batches(self, most: int, sharded: ShardedModel) -> Sequence[Batch]:
        """Return the first batches that are never trained on; none when there are too few windows for one."""
        size = sharded.plan.global_batch
        if self.held_out is None or len(self.held_out) < size:
            return ()
        loader = Loader(self.held_out, global_batch=size, rows=sharded.process_rows, shuffle=False, epochs=1)
        batches = [next(loader) for _ in range(min(most, len(self.held_out) // size))]
        loader.close()
        return batches


def open_dataset(config: RunConfig, data: Windows | None, vocab: int | None) -> DataSet:
    """Return the data that ``config`` names, or ``data``, checked and split.

    Args:
        config: Its [data] section, with ``seq`` filled in.
        data: Given in Python.
        vocab: Token ids at or above it are refused.

    Raises:
        DataError: it does not exist, holds too little, or too many records are damaged.
    """
    if data is not None:
        windows, skipped = data, SkippedRecords(len(data), config.data.max_skipped_share)
    else:
        assert config.data.seq is not None, "filled in before"
        windows, skipped = open_windows(config.data, seq=config.data.seq, vocab=vocab)
    train, held_out = split_windows(windows, config.data.held_out)
    return DataSet(
        CheckedWindows(train, vocab, skipped),
        CheckedWindows(held_out, vocab, skipped) if held_out is not None else None,
    )
