"""Text files as one stream of tokens, and the tokenizers that make it.

A document is a file; in a ``.jsonl`` file it is the ``text`` of a line. Documents that are empty, hold a zero byte or
are not UTF-8 are skipped and counted.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ._records import SkippedRecords

TEXT_SUFFIXES = frozenset(".txt .md .rst .py .jsonl .html .csv .tex".split())
"""What a folder is searched for; a file that is named itself may end in anything."""

BYTE_VOCAB = 256
BYTE_SEPARATOR = 0
"""No text that is read holds a zero byte, so it can stand for the end of a document."""

Tokenize = Callable[[str], NDArray[np.int32]]
"""From a document to its tokens, the separator included."""


def open_tokenizer(name: str) -> Tokenize:
    """Return the tokenizer called ``name``.

    Args:
        name: ``"bytes"``: UTF-8 bytes, vocabulary 256, documents end in 0; else a ``tokenizer.json`` file, or the name
            of one on the Hugging Face hub (both need the extra ``[hf]``).

    Raises:
        DataError: it is not installed, cannot be read, or names no token that ends a document.
    """
    if name == "bytes":
        return lambda text: np.frombuffer(text.encode() + bytes([BYTE_SEPARATOR]), np.uint8).astype(np.int32)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            f"got {name!r}",
            expected='"bytes" (other tokenizers need a library that is not installed)',
            where="[data] tokenizer",
            action="pip install 'galvatron-jax[hf]'",
        ) from None
    try:
        tokenizer = Tokenizer.from_file(name) if Path(name).is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises plain exceptions
        raise DataError(
            f"cannot load tokenizer {name!r}: {error}", where="[data] tokenizer", action="check the name or the file"
        ) from None
    endings = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
    separator = next((i for i in map(tokenizer.token_to_id, endings) if i is not None), None)
    if separator is None:
        raise DataError(
            f"tokenizer {name!r} has none of the tokens {', '.join(endings)}",
            expected="a token that ends a document",
            where="[data] tokenizer",
            action="write the tokens yourself and use kind = 'tokens'",
        )
    return lambda text: np.asarray([*tokenizer.encode(text, add_special_tokens=False).ids, separator], dtype=np.int32)


def default_text_folders() -> list[Path]:
    """Return folders with text on any machine: Python's standard library, and Debian's licences where they are."""
    folders = [Path("/usr/share/common-licenses"), Path(sysconfig.get_path("stdlib"))]
    return [folder for folder in folders if folder.is_dir()]


def read_text_stream(
    paths: Iterable[Path], tokenize: Tokenize, *, max_bytes: int, max_skipped_share: float
) -> tuple[NDArray[np.int32], SkippedRecords]:
    """Return all documents in ``paths`` as one stream, and what was skipped.

    Args:
        paths: Files, or folders that are read with their sub-folders, in a fixed order.
        tokenize: The tokenizer.
        max_bytes: Read at most this much text; the stream is held in memory.
        max_skipped_share: Of the documents.

    Raises:
        DataError: a path does not exist, or too many documents are damaged.
    """
    files = list(_text_files(paths))
    skipped = SkippedRecords(total=len(files), max_share=max_skipped_share)
    parts: list[NDArray[np.int32]] = []
    left = max_bytes
    for name, content in _documents(files):
        problem = _problem(content)
        if problem:
            skipped.add(name, problem)
            continue
        text = content[:left].decode(errors="ignore")  # a cut may fall inside a character
        parts.append(tokenize(text))
        left -= len(content)
        if left <= 0:
            break
    return np.concatenate([np.zeros(0, np.int32), *parts]), skipped


def _problem(content: bytes) -> str:
    if not content.strip():
        return "an empty document"
    if b"\x00" in content:
        return "holds a zero byte"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    return ""


def _text_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise DataError("does not exist", expected="a text file or a folder", where=str(path), action="see [data]")
        if path.is_file():
            yield path
            continue
        for file in sorted(path.rglob("*")):
            # Links would give the same text twice; of Python's library, packages installed into it are no part.
            known = file.suffix in TEXT_SUFFIXES or path.name == "common-licenses"
            if known and "site-packages" not in file.parts and file.is_file() and not file.is_symlink():
                yield file


def _documents(files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content); what cannot be read is an empty document."""
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:
            yield str(file), b""
            continue
        if file.suffix != ".jsonl":
            if content or file.suffix != ".py":  # empty ``__init__.py`` files are no damage
                yield str(file), content
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            yield f"{file}:{number}", _json_text(line)


def _json_text(line: bytes) -> bytes:
    class Record(msgspec.Struct):
        text: str

    try:
        return msgspec.json.decode(line, type=Record).text.encode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return b""
