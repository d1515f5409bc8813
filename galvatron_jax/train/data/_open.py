"""The windows that the [data] section of a run names."""

from __future__ import annotations

from pathlib import Path

from ...errors import DataError
from .._config import DataConfig
from ._records import SkippedRecords
from ._text import default_text_folders, open_tokenizer, read_text_stream
from ._tokens import open_token_files
from ._windows import StreamWindows, SyntheticWindows, Windows, join_windows


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
