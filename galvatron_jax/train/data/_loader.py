"""The loader: batch ``k`` of a run, the rows that this process feeds, read ahead by grain.

Batch ``k`` holds the windows at positions ``k * global_batch ...`` of one endless shuffled order. A position never
depends on the number of processes, so a run goes on exactly under any plan or cluster, and its place is one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain as _grain
import jax
import numpy as np

from ...errors import DataError
from ._windows import Windows, is_tokens

Batch = Any
"""``inputs`` and ``targets``, ``(rows, seq)`` each, of tokens; of other samples their pytree, with rows in front."""

grain: Any = _grain  # its public names are not marked as such, which strict type checking wants

READ_THREADS = 4
READ_AHEAD = 4
"""Batches."""
NAMED_WINDOWS = 4
"""Of a batch, in messages."""


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """Batches by number."""

    windows: Windows
    order: Any
    """Index of the window at each position of training (``grain.MapDataset``)."""
    global_batch: int
    rows: tuple[int, ...]
    """Rows of the global batch that are read."""
    on_read: Callable[[int], None]
    """Called with the number of each batch before it is read (tests let it fail)."""

    def __len__(self) -> int:
        return len(self.order) // self.global_batch

    def __getitem__(self, number: int, /) -> Batch:
        self.on_read(number)
        start = number * self.global_batch
        return collate([self.windows[self.order[start + row]] for row in self.rows])


def collate(samples: Sequence[Any]) -> Batch:
    """Return samples as one batch: tokens as what is read and what is to be predicted, others leaf by leaf."""
    if all(is_tokens(sample) for sample in samples):
        tokens = np.stack(samples)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)


class Loader:
    """An iterator over batches that knows its place."""

    def __init__(
        self,
        windows: Windows,
        *,
        global_batch: int,
        rows: Sequence[int],
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Begin at batch 0.

        Args:
            windows: At least ``global_batch`` samples.
            global_batch: Samples per batch over all processes; the remainder of the last round is dropped.
            rows: Rows of the global batch that this process feeds.
            seed: Decides the order, another one each round.
            shuffle: Or the windows' own order.
            epochs: Rounds; None: endless.
            on_read: See ``BatchSource``.

        Raises:
            DataError: there are fewer windows than one batch.
        """
        if len(windows) < global_batch:
            raise DataError(
                f"got {len(windows)} windows",
                expected=f"at least one batch of {global_batch}",
                where="[data]",
                action="give more data, a smaller seq or a smaller global_batch",
            )
        order = grain.MapDataset.source(range(len(windows))).seed(seed)
        order = (order.shuffle() if shuffle else order).repeat(epochs)
        self._source = BatchSource(windows, order, global_batch, tuple(rows), on_read)
        reading = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        self._iterator = iter(grain.MapDataset.source(self._source).to_iter_dataset(reading))

    @property
    def position(self) -> int:
        """Number of the batch that comes next."""
        return int(self._iterator.get_state()["next_index"])

    def seek(self, position: object) -> None:
        """Go on with batch number ``position``.

        Raises:
            DataError: it is no such number.
        """
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= len(self._source):
            raise DataError(
                f"got position {position!r}",
                expected=f"a batch number, 0 to {len(self._source)}",
                where="state of the data in the checkpoint",
                action="the checkpoint is of other data, or damaged",
            )
        self._iterator.set_state({"next_index": position})

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def describe(self, number: int) -> str:
        """Say which windows batch ``number`` holds, for messages."""
        source, size = self._source, self._source.global_batch
        indices = [int(source.order[number * size + row]) for row in range(min(NAMED_WINDOWS, size))]
        more = f" and {size - NAMED_WINDOWS} more" if size > NAMED_WINDOWS else ""
        return f"batch {number}: {'; '.join(map(source.windows.name, indices))}{more}"
