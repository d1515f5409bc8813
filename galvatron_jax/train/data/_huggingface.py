"""Hugging Face datasets as one stream of tokens (extra ``[hf]``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from .._config import DataConfig
from ._records import SkippedRecords
from ._text import open_tokenizer


def read_dataset_stream(config: DataConfig) -> tuple[NDArray[np.int32], SkippedRecords]:
    """Return the ``text`` column of a dataset as one stream, read up to ``max_bytes``, and what was skipped.

    Raises:
        DataError: the library is missing, or the dataset cannot be loaded or has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            "the library `datasets` is not installed", where="[data] kind", action="pip install 'galvatron-jax[hf]'"
        ) from None
    if len(config.paths) != 1:
        raise DataError(f"got {len(config.paths)} paths", expected="the name of one dataset", where="[data] paths")
    try:
        rows = datasets.load_dataset(config.paths[0], split=config.split, streaming=True)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"cannot be loaded: {error}", where=f"[data] paths {config.paths[0]}") from None
    tokenize, parts, left = open_tokenizer(config.tokenizer), [np.zeros(0, np.int32)], config.max_bytes
    skipped = SkippedRecords(total=0, max_share=config.max_skipped_share)
    for number, row in enumerate(rows):
        text = row.get("text")
        skipped.total = number + 1
        if not isinstance(text, str) or not text.strip():
            skipped.add(f"{config.paths[0]} row {number}", "an empty document")
            continue
        parts.append(tokenize(text))
        left -= len(text.encode())
        if left <= 0:
            break
    return np.concatenate(parts), skipped
