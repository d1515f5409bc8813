"""Windows: samples of ``seq + 1`` tokens by index, and the split into training and held-out ones.

Packing: documents are joined into one stream with a separator token after each, and the stream is cut every ``seq``
tokens; neighbouring windows share one token, so that every token is predicted exactly once. Attention crosses document
boundaries inside a window.

Shape suffixes: T = seq + 1 tokens, N tokens of a stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from ...errors import DataError

Tokens = NDArray[np.int32]

PROBES = 16
"""Places of a stream whose tokens go into its fingerprint: enough to tell other data, cheap on terabytes."""


class CorruptRecordError(Exception):
    """A record that cannot be used; the message says why. Skipped and counted (``SkippedRecords``)."""


class Windows(Protocol):
    """Samples by index: windows of tokens, or anything else (``SampleWindows``)."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the samples or their order change."""

    def __len__(self) -> int:
        """Number of windows."""

    def __getitem__(self, index: int, /) -> Any:
        """Tokens of window ``index``, ``(T,)``; or a pytree of arrays.

        Raises:
            CorruptRecordError: it cannot be read.
        """

    def name(self, index: int) -> str:
        """Where window ``index`` comes from, for messages."""


@dataclasses.dataclass(frozen=True)
class StreamWindows:
    """Windows of one stream of tokens."""

    tokens_N: NDArray[Any]
    """Integers of any width; may be mapped from a file."""
    seq: int
    source: str

    def __len__(self) -> int:
        return max(0, (len(self.tokens_N) - 1) // self.seq)

    def __getitem__(self, index: int, /) -> Tokens:
        start = index * self.seq
        return np.asarray(self.tokens_N[start : start + self.seq + 1], dtype=np.int32)

    def name(self, index: int) -> str:
        return f"{self.source} tokens {index * self.seq}-{index * self.seq + self.seq}"

    @property
    def fingerprint(self) -> str:
        picks = np.linspace(0, max(0, len(self.tokens_N) - 1), PROBES, dtype=np.int64)
        probed = np.asarray(self.tokens_N[picks], dtype=np.int64) if len(self.tokens_N) else picks[:0]
        return digest([str(len(self.tokens_N)), str(self.seq), probed.tobytes().hex()])


@dataclasses.dataclass(frozen=True)
class JoinedWindows:
    """Windows of several shards, one shard after the other."""

    shards: tuple[Windows, ...]
    ends: tuple[int, ...]
    """Number of windows up to the end of each shard."""

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int, /) -> Any:
        shard, local = self._locate(index)
        return self.shards[shard][local]

    def name(self, index: int) -> str:
        shard, local = self._locate(index)
        return self.shards[shard].name(local)

    @property
    def fingerprint(self) -> str:
        return digest([shard.fingerprint for shard in self.shards])

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (self.ends[shard - 1] if shard else 0)


@dataclasses.dataclass(frozen=True)
class SyntheticWindows:
    """Uniformly random tokens: window ``i`` of seed ``s`` is always the same."""

    count: int
    seq: int
    vocab: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Tokens:
        return np.random.default_rng((self.seed, index)).integers(0, self.vocab, self.seq + 1, dtype=np.int32)

    def name(self, index: int) -> str:
        return f"synthetic window {index}"

    @property
    def fingerprint(self) -> str:
        return digest(["synthetic", str(self.count), str(self.seq), str(self.vocab), str(self.seed)])


@dataclasses.dataclass(frozen=True)
class SampleWindows:
    """Samples of any kind, from a sequence in Python: pytrees of arrays, all of one shape."""

    samples: Sequence[Any]
    """Held in memory, or read by index; equal on every process."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Any:
        return self.samples[index]

    def name(self, index: int) -> str:
        return f"sample {index}"

    @property
    def fingerprint(self) -> str:
        picks = np.linspace(0, len(self) - 1, min(PROBES, len(self)), dtype=np.int64)
        leaves = [np.asarray(leaf) for pick in picks for leaf in jax.tree.leaves(self.samples[int(pick)])]
        return digest([str(len(self)), *(f"{leaf.dtype}{leaf.shape}{leaf.tobytes().hex()}" for leaf in leaves)])


@dataclasses.dataclass(frozen=True)
class StridedWindows:
    """Every ``stride``-th window of another source, or all but those: held out, or trained on."""

    source: Windows
    stride: int
    held_out: bool

    def __len__(self) -> int:
        picked = -(-len(self.source) // self.stride)
        return picked if self.held_out else len(self.source) - picked

    def __getitem__(self, index: int, /) -> Any:
        return self.source[self._source_index(index)]

    def name(self, index: int) -> str:
        return self.source.name(self._source_index(index))

    @property
    def fingerprint(self) -> str:
        return digest([self.source.fingerprint, str(self.stride), str(self.held_out)])

    def _source_index(self, index: int) -> int:
        if self.held_out:
            return index * self.stride
        return index + index // (self.stride - 1) + 1  # one in each group of ``stride``, its first, is left out


def join_windows(shards: Iterable[Windows], *, where: str) -> Windows:
    """Return the windows of all ``shards`` in order.

    Raises:
        DataError: there is not a single window.
    """
    kept = tuple(shard for shard in shards if len(shard))
    if not kept:
        raise DataError(
            "holds no window", expected="more than seq tokens", where=where, action="give more data or a smaller seq"
        )
    return kept[0] if len(kept) == 1 else JoinedWindows(kept, tuple(np.cumsum([len(s) for s in kept]).tolist()))


def split_windows(windows: Windows, held_out: float) -> tuple[Windows, Windows | None]:
    """Return the windows to train on and those to judge by (None when ``held_out`` is 0).

    Args:
        windows: All windows.
        held_out: Share to hold out, below one half; one window in ``round(1 / held_out)`` is.
    """
    if held_out == 0:
        return windows, None
    stride = round(1 / held_out)
    return StridedWindows(windows, stride, held_out=False), StridedWindows(windows, stride, held_out=True)


def is_tokens(sample: Any) -> bool:
    """Tell whether a sample is a window of tokens: whole numbers in one dimension."""
    return isinstance(sample, np.ndarray) and sample.ndim == 1 and sample.dtype.kind in "iu"


def digest(parts: Iterable[str]) -> str:
    """Return 16 hex digits that stand for ``parts``."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]
