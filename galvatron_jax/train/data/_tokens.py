"""Files of tokens: ``.bin`` (raw little-endian integers), ``.npy`` (one dimension), ``.arrayrecord`` (a window each).

The first two are mapped, not read: a window is read when it is needed, however large the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ._windows import CorruptRecordError, StreamWindows, Tokens, Windows, digest, join_windows

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
SUFFIXES = (".bin", ".npy", ".arrayrecord")


def open_token_files(paths: Sequence[Path], *, seq: int, dtype: str) -> Windows:
    """Return the windows of all token files; windows never cross from one file into the next.

    Args:
        paths: Files, or folders whose token files are taken in the order of their names.
        seq: Inputs per window.
        dtype: Integers of ``.bin`` and ``.arrayrecord`` files, one of ``TOKEN_DTYPES``.

    Raises:
        DataError: a file is missing, of another kind, or no window is found.
    """
    if dtype not in TOKEN_DTYPES:
        raise DataError(f"got {dtype!r}", expected=f"one of {', '.join(TOKEN_DTYPES)}", where="[data] dtype")
    files = [file for path in paths for file in _token_files(path)]
    _check_complete(files)
    where = ", ".join(str(path) for path in paths)
    return join_windows((_open(file, seq, np.dtype(dtype).newbyteorder("<")) for file in files), where=where)


@dataclasses.dataclass(frozen=True)
class RecordWindows:
    """Windows in an ArrayRecord file, one record each."""

    reader: Any
    path: Path
    seq: int
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return int(self.reader.num_records())

    def __getitem__(self, index: int, /) -> Tokens:
        try:
            (record,) = self.reader.read([index])
        except Exception as error:  # the reader raises what its C++ side names
            raise CorruptRecordError(f"unreadable: {str(error).splitlines()[0][:120]}") from None
        expected = (self.seq + 1) * self.dtype.itemsize
        if len(record) != expected:
            raise CorruptRecordError(f"{len(record)} bytes, expected {expected} ({self.seq + 1} tokens)")
        return np.frombuffer(record, self.dtype).astype(np.int32)

    def name(self, index: int) -> str:
        return f"{self.path} record {index}"

    @property
    def fingerprint(self) -> str:
        return digest([self.path.name, str(self.path.stat().st_size), str(len(self)), str(self.seq)])


def _open(file: Path, seq: int, dtype: np.dtype[Any]) -> Windows:
    if file.suffix == ".bin":
        if file.stat().st_size % dtype.itemsize:
            raise DataError(
                f"got {file.stat().st_size} bytes",
                expected=f"whole tokens of {dtype.itemsize} bytes ({dtype.name})",
                where=str(file),
                action="was it truncated? or set [data] dtype",
            )
        mapped: Any = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
        return StreamWindows(mapped, seq, str(file))
    if file.suffix == ".npy":
        return StreamWindows(_map_npy(file), seq, str(file))
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(file), options="readahead_buffer_size:0")
    except Exception as error:  # as above
        raise DataError(f"cannot be opened: {error}", expected="an ArrayRecord file", where=str(file)) from None
    return RecordWindows(reader, file, seq, dtype)


def _map_npy(file: Path) -> Any:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot be read: {error}", expected="an array of integers", where=str(file)) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"holds {array.dtype} of shape {array.shape}", expected="integers in one dimension", where=str(file)
        )
    return array


def _token_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError("does not exist", expected=f"a {', '.join(SUFFIXES)} file or a folder", where=str(path))
    found = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    wrong = [f for f in found if f.suffix not in SUFFIXES]
    if wrong or not found:
        problem = f"{wrong[0].name} is no token file" if wrong else "holds no token file"
        raise DataError(problem, expected=", ".join(SUFFIXES), where=str(path))
    return found


def _check_complete(files: Sequence[Path]) -> None:
    """Refuse a set of ``name-00003-of-00008`` files of which some are missing: the data would be other data."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.+)-([0-9]{1,6})-of-([0-9]{1,6})", file.stem, flags=re.ASCII):
            sets.setdefault((str(file.parent / match[1]), int(match[3])), set()).add(int(match[2]))
    for (name, count), present in sets.items():
        missing = sorted(set(range(count)) - present)
        if missing and sorted(set(range(1, count + 1)) - present):
            raise DataError(
                f"{len(missing)} of {count} shards are missing, the first is number {missing[0]}",
                expected=f"all {count}",
                where=name,
                action="bring the missing files back",
            )
