"""Text as bytes: a vocabulary of 256, no tokenizer to download, and text that any machine has.

Files are joined and cut into windows of ``seq + 1`` bytes that do not overlap; a fixed share of the windows, chosen at
random from a seed, is held out. Everything is deterministic: same files, same seed, same batches.

Shape suffixes: N windows, B batch, T = seq + 1 bytes.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galvatron_jax.errors import GalvatronError

MAX_TEXT_BYTES = 8 * 2**20
"""What is read at most: some minutes of training, and no surprise when ``--text`` names a huge folder."""

HELD_OUT_SHARE = 0.05

Batch = dict[str, NDArray[np.int32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Windows to train on and windows to judge by."""

    train_NT: NDArray[np.uint8]
    held_out_NT: NDArray[np.uint8]
    files: int
    """Number of files that the text comes from."""


def load_corpus(path: Path | None, *, seq: int, batch: int, seed: int) -> Corpus:
    """Read text and cut it into windows.

    Args:
        path: A file, or a folder that is read with its sub-folders; None reads ``default_folders()``.
        seq: Inputs per window.
        batch: Windows per batch; both parts hold at least one batch.
        seed: Chooses which windows are held out.

    Raises:
        GalvatronError: there is no such path, or too little text for two batches.
    """
    files = list(text_files([path] if path else default_folders()))
    text, used = read_text(files)
    windows_NT = text[: text.size // (seq + 1) * (seq + 1)].reshape(-1, seq + 1)
    if len(windows_NT) < 2 * batch:
        raise GalvatronError(
            f"got {text.size} bytes of text in {used} files",
            expected=f"at least {2 * batch * (seq + 1)} (two batches of {batch} windows of {seq + 1} bytes)",
            where=f"--text {path}" if path else "text of this machine",
            action="give more text, a smaller --global-batch or a smaller --seq",
        )
    order_N = np.random.default_rng(seed).permutation(len(windows_NT))
    held_out = max(batch, round(HELD_OUT_SHARE * len(windows_NT)))
    return Corpus(train_NT=windows_NT[order_N[held_out:]], held_out_NT=windows_NT[order_N[:held_out]], files=used)


def default_folders() -> list[Path]:
    """Return folders with text on any machine: Python's standard library, and Debian's licences where they are."""
    folders = [Path("/usr/share/common-licenses"), Path(sysconfig.get_path("stdlib"))]
    return [folder for folder in folders if folder.is_dir()]


def text_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files in ``paths`` in a fixed order; of Python's library the sources without installed packages.

    Raises:
        GalvatronError: a path does not exist.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in paths:
        if not path.exists():
            raise GalvatronError("does not exist", expected="a text file or a folder", where=f"--text {path}")
        if path.is_file():
            yield path
            continue
        for file in sorted(path.rglob("*.py" if path == library else "*")):
            # Links would give the same text twice.
            if file.is_file() and not file.is_symlink() and "site-packages" not in file.relative_to(path).parts:
                yield file


def read_text(files: Iterable[Path]) -> tuple[NDArray[np.uint8], int]:
    """Return the bytes of ``files`` one after the other, at most ``MAX_TEXT_BYTES``, and the number of files used.

    Files that cannot be read or hold a zero byte (they are no text) are left out.
    """
    parts: list[bytes] = []
    left = MAX_TEXT_BYTES
    for file in files:
        if left == 0:
            break
        try:
            with file.open("rb") as handle:
                content = handle.read(left)
        except OSError:
            continue
        if content and 0 not in content:
            parts.append(content)
            left -= len(content)
    return np.frombuffer(b"".join(parts), dtype=np.uint8), len(parts)


def training_batches(windows_NT: NDArray[np.uint8], *, batch: int, seed: int) -> Iterator[Batch]:
    """Yield batches for ever, in a new order each time all windows have been seen.

    Args:
        windows_NT: At least ``batch`` windows; those left over at the end of a round wait for the next.
        batch: Windows per batch.
        seed: Decides the orders.
    """
    for epoch in itertools.count():
        order_N = np.random.default_rng((seed, epoch)).permutation(len(windows_NT))
        for start in range(0, len(order_N) - batch + 1, batch):
            yield to_batch(windows_NT[order_N[start : start + batch]])


def held_out_batches(windows_NT: NDArray[np.uint8], *, batch: int, most: int) -> Iterator[Batch]:
    """Yield up to ``most`` whole batches in order."""
    for start in range(0, min(most, len(windows_NT) // batch) * batch, batch):
        yield to_batch(windows_NT[start : start + batch])


def to_batch(windows_BT: NDArray[np.uint8]) -> Batch:
    """Return the batch of ``next_token_loss``: each byte is to be predicted from those before it."""
    tokens_BT = windows_BT.astype(np.int32)
    return {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
