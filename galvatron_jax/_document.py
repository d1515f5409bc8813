"""Documents: frozen, versioned, strictly validated JSON values, written atomically.

A document comes from a stranger as often as from ourselves, so it is read with a size cap, a schema that forbids
unknown fields, NaN and wrong types, and a check for duplicate keys; nothing in it is ever executed or opened as a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from .errors import DocumentError, DocumentNotFoundError

MAX_DOCUMENT_BYTES = 8 * 2**20
"""Larger files are refused before parsing: a plan of 10 000 layers is far below 1 MB."""


Positive = Annotated[float, msgspec.Meta(gt=0, le=1e24)]
NonNegative = Annotated[float, msgspec.Meta(ge=0, le=1e24)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""Exact as floats; JSON has integers without end, and a hostile one must not reach arithmetic."""


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen part of a document."""


class Document(Value, frozen=True, kw_only=True):
    """A frozen JSON file with a schema version; subclasses name themselves in ``DOCUMENT``."""

    DOCUMENT: ClassVar[str] = "document"
    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: equal documents, equal fingerprint."""
        # as a file would give it back: a whole number in a field of floats is 1 in memory and 1.0 once it was read
        read = msgspec.json.decode(msgspec.json.encode(self), type=type(self))
        return hashlib.sha256(msgspec.json.encode(read, order="deterministic")).hexdigest()[:16]


D = TypeVar("D", bound=Document)


def encode(document: Document) -> str:
    """Return ``document`` as stable, readable JSON text with a final newline; default fields are written too."""
    plain = msgspec.to_builtins(document)
    return _Layout().encode(plain) + "\n"


def decode(text: str | bytes, kind: type[D], *, where: str) -> D:
    """Return the document of class ``kind`` in ``text``.

    Args:
        text: JSON, at most ``MAX_DOCUMENT_BYTES`` long.
        kind: The expected document class.
        where: Named in errors, usually the file.

    Raises:
        DocumentError: not JSON, another schema version, an unknown or duplicate key, or a value out of range; the
            message holds the JSON path.
    """
    data = text.encode() if isinstance(text, str) else text
    action = f"write the file again or fix it by hand; it must be a {kind.DOCUMENT} as galvatron_jax writes it"
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentError(
            f"got {len(data)} bytes", expected=f"at most {MAX_DOCUMENT_BYTES} bytes", where=where, action=action
        )
    try:
        _check_version(data, kind, where)
        document = msgspec.json.decode(data, type=kind)
        json.loads(data, object_pairs_hook=_refuse_duplicates)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DocumentError(reason, expected=f"a valid {kind.DOCUMENT}", where=where, action=action) from None
    return document


def load(path: str | Path, kind: type[D]) -> D:
    """Read and validate a document.

    Raises:
        DocumentNotFoundError: there is no such file.
        DocumentError: see ``decode``.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise DocumentError(
                f"got {path.stat().st_size} bytes",
                expected=f"at most {MAX_DOCUMENT_BYTES} bytes",
                where=str(path),
                action=f"is this the right file? a {kind.DOCUMENT} is small",
            )
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)  # bounded: a device or pipe reports size 0
    except OSError as error:
        raise DocumentNotFoundError(
            f"cannot read the {kind.DOCUMENT}: {error.strerror or error}", where=str(path), action="check the path"
        ) from None
    return decode(data, kind, where=str(path))


def save(document: Document, path: str | Path) -> Path:
    """Write ``document`` to ``path`` atomically; errors as ``write_text``."""
    return write_text(encode(document), path, document.DOCUMENT)


def write_text(text: str, path: str | Path, name: str) -> Path:
    """Write ``text`` to ``path`` atomically: a reader sees the old file or the new one, never half of it.

    Args:
        text: The content.
        path: The file; its folder is made.
        name: What the file is, for messages.

    Raises:
        DocumentError: the folder cannot be written, or ``path`` is a symbolic link.
    """
    path = Path(path)
    if path.is_symlink():
        raise DocumentError("is a symbolic link", expected="a plain file", where=str(path), action="name the target")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DocumentError(
            f"cannot write the {name}: {error.strerror or error}",
            where=str(path),
            action="choose another path",
        ) from None
    return path


def _check_version(data: bytes, kind: type[Document], where: str) -> None:
    """Raise before the full decode when the file is of a newer schema: its fields may be unknown to us."""

    class Head(msgspec.Struct):
        schema_version: int

    version = msgspec.json.decode(data, type=Head).schema_version
    if version > kind.SCHEMA_VERSION or version < 1:
        raise DocumentError(
            f"got schema_version {version}",
            expected=f"1 to {kind.SCHEMA_VERSION}",
            where=where,
            action="update galvatron_jax" if version > kind.SCHEMA_VERSION else "write the file again",
        )


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen[key] = value
    return seen


class _Layout(json.JSONEncoder):
    """Indented JSON in which a value that fits on one line stays on one line."""

    width = 116

    def encode(self, o: Any, indent: int = 0) -> str:
        line = json.dumps(o, ensure_ascii=False, allow_nan=False)
        fits = indent > 0 and indent + len(line) <= self.width
        if fits or not o or not isinstance(o, (dict, list, tuple)):
            return line
        pad = " " * (indent + 2)
        if isinstance(o, dict):
            rows = [self._row(k, v, indent + 2) for k, v in o.items()]
            opening, closing = "{}"
        else:
            rows = [self.encode(v, indent + 2) for v in o]
            opening, closing = "[]"
        return opening + "\n" + ",\n".join(pad + row for row in rows) + "\n" + " " * indent + closing

    def _row(self, key: str, value: Any, indent: int) -> str:
        head = json.dumps(str(key)) + ": "
        line = head + json.dumps(value, ensure_ascii=False, allow_nan=False)
        return line if indent + len(line) <= self.width else head + self.encode(value, indent)
