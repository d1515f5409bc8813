"""The [data] section of a run, and the windows that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..._document import Value
from ...errors import DataError
from ._records import MAX_SKIPPED_SHARE, SkippedRecords
from ._text import default_text_folders, open_tokenizer, read_text_stream
from ._tokens import open_token_files
from ._windows import StreamWindows, SyntheticWindows, Windows, join_windows

DataKind = Literal["text", "tokens", "synthetic", "huggingface"]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=0.5)]


class DataConfig(Value, frozen=True, kw_only=True):
    """What to train on."""

    kind: DataKind = "text"
    paths: tuple[str, ...] = ()
    """Files or folders; for ``huggingface`` the dataset's name. Text without a path is what any machine has: Python's
    standard library."""
    seq: Size | None = None
    """Tokens per sample; the model's by default."""
    global_batch: Size | None = None
    """Samples per step, over all devices; the plan's by default, or 32."""
    tokenizer: str = "bytes"
    """Of text and Hugging Face data: ``bytes``, a ``tokenizer.json``, or a name on the hub."""
    dtype: str = "uint16"
    """Integers in ``.bin`` and ``.arrayrecord`` files."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    max_bytes: Size = 8 * 2**20
    """Text is read up to here; it is held in memory as tokens."""
    windows: Size = 2**20
    """Number of synthetic windows."""
    held_out: Share = 0.05
    """Share of the windows to judge by, never trained on."""
    epochs: Size | None = None
    """Rounds through the data; endless by default."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    """Decides the order, a new one each round."""
    max_skipped_share: Share = MAX_SKIPPED_SHARE
    """Damaged records above this stop the run."""


def open_windows(config: DataConfig, *, seq: int, vocab: int | None) -> tuple[Windows, SkippedRecords]:
    """Return the windows that ``config`` names, and the documents already skipped.

    Args:
        config: The section.
        seq: Inputs per window.
        vocab: Size of the model's vocabulary, when known.

    Raises:
        DataError: they do not exist, hold too little, or too many records are damaged.
    """
    paths = [Path(path) for path in config.paths]
    where = ", ".join(config.paths) or "text of this machine"
    if config.kind == "synthetic":
        windows: Windows = SyntheticWindows(config.windows, seq, vocab or 256, config.seed)
        return windows, SkippedRecords(len(windows))
    if config.kind == "tokens":
        if not paths:
            raise DataError("names no file", expected="paths = [...]", where="[data]")
        windows = open_token_files(paths, seq=seq, dtype=config.dtype)
        return windows, SkippedRecords(len(windows), config.max_skipped_share)
    if config.kind == "huggingface":
        from ._huggingface import read_dataset_stream

        stream, skipped = read_dataset_stream(config)
    else:
        folders = paths or default_text_folders()
        stream, skipped = read_text_stream(
            folders,
            open_tokenizer(config.tokenizer),
            max_bytes=config.max_bytes,
            max_skipped_share=config.max_skipped_share,
        )
    return join_windows([StreamWindows(stream, seq, where)], where=where), skipped
