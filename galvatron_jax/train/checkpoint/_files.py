"""Checksums of the files of a checkpoint, taken and compared in parallel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ._document import DOCUMENT_NAME, FileSum

READ_BYTES = 4 * 2**20
UNSUMMED = frozenset((DOCUMENT_NAME, "_CHECKPOINT_METADATA"))
"""Our own document, and the one file that Orbax writes again after we have looked (the time when it was done)."""

HASH_THREADS = 8
"""hashlib works outside the interpreter lock."""


def sum_files(folder: Path) -> dict[str, FileSum]:
    """Return size and SHA-256 of every file below ``folder``, by its path inside, but of those in ``UNSUMMED``."""
    names = sorted(
        str(PurePosixPath(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNSUMMED
    )
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def check_files(folder: Path, files: Mapping[str, FileSum], names: Sequence[str]) -> list[str]:
    """Return what is wrong with those ``files`` of the checkpoint that ``names`` lists; nothing when all are whole.

    A path that leaves the folder is never opened: the list comes from a file that a stranger may have written.
    """
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder, name, files[name]), names)
        return [f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem]


def _problem(folder: Path, name: str, expected: FileSum) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\x00" in name:
        return "leaves the folder of the checkpoint"
    file = folder / path
    if not file.is_file():
        return "is missing"
    if file.resolve() != folder.resolve() / path:
        return "is a link"
    try:
        if file.stat().st_size != expected.size:
            return f"has {file.stat().st_size} bytes, not {expected.size}"
        return "" if _sum(file).sha256 == expected.sha256 else "has another checksum"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _sum(file: Path) -> FileSum:
    total, size = hashlib.sha256(), 0
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := handle.read(READ_BYTES):
            total.update(block)
            size += len(block)
    return FileSum(size=size, sha256=total.hexdigest())
