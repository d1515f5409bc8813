"""What may be opened in a folder from a stranger: plain safetensors files that lie in it, nothing else.

Pickled weights (``.bin .pt .ckpt .pkl``) run code when they are loaded, so they are refused. An index names files: such
a name must be plain. Links are followed only inside the folder, or into the ``blobs`` of the Hugging Face cache that
the folder is a snapshot of (``models--NAME/snapshots/REVISION``).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..._document import MAX_DOCUMENT_BYTES
from ...errors import DocumentError, DocumentNotFoundError, UnsupportedError

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_FILES = 10_000


class Index(msgspec.Struct, frozen=True):
    """``model.safetensors.index.json``; its ``metadata`` is not needed."""

    weight_map: dict[str, str]


def read_small(folder: Path, name: str, most_bytes: int) -> bytes:
    """Return the content of a small file of the folder.

    Raises:
        DocumentNotFoundError: there is no such file.
        DocumentError: it is too large, or leads out of the folder.
    """
    path = resolve(folder, name)
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise DocumentError("is too large", expected=f"at most {most_bytes} bytes", where=str(folder / name))
    return content


def resolve(folder: Path, name: str) -> Path:
    """Return the real path of a file of the folder.

    Raises:
        DocumentError: the name is not plain, or a link leads out of the folder.
        DocumentNotFoundError: there is no such file.
    """
    where = str(folder)
    if not name.isprintable() or name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
        raise DocumentError(f"names the file {name!r}", expected="a plain file name inside the folder", where=where)
    try:
        path = (folder / name).resolve(strict=True)
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError):
        raise DocumentNotFoundError(f"there is no {name}", where=where, action="is the download complete?") from None
    if not any(path.is_relative_to(allowed) for allowed in (root, *_blobs(root))) or not path.is_file():
        raise DocumentError(
            f"{name} leads to {path}", expected="a file inside the folder (or the blobs of its cache)", where=where
        )
    return path


def weight_files(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor as the index says; None: all are in ``model.safetensors``.

    Raises:
        UnsupportedError: there are only pickled weights.
        DocumentNotFoundError: there are no weights.
        DocumentError: the index is damaged, or names something that may not be opened.
    """
    if not (folder / INDEX_NAME).exists():
        if not (folder / SINGLE_NAME).exists():
            raise _no_weights(folder)
        return None
    where = str(folder / INDEX_NAME)
    try:
        found = msgspec.json.decode(read_small(folder, INDEX_NAME, MAX_DOCUMENT_BYTES), type=Index).weight_map
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(str(error), expected="an index of safetensors files", where=where) from None
    names = set(found.values())
    if len(names) > MAX_FILES:
        raise DocumentError(f"names {len(names)} files", expected=f"at most {MAX_FILES}", where=where)
    for name in sorted(names):
        if not name.endswith(SUFFIX):
            raise _pickled(name, where)
        resolve(folder, name)
    return found


def _blobs(root: Path) -> list[Path]:
    is_snapshot = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    return [root.parent.parent / "blobs"] if is_snapshot else []


def _no_weights(folder: Path) -> Exception:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickled:
        return _pickled(pickled[0], str(folder))
    return DocumentNotFoundError(
        "holds no weights", expected=f"{SINGLE_NAME} or {INDEX_NAME}", where=str(folder), action="check the path"
    )


def _pickled(name: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"got {name}",
        expected=f"only *{SUFFIX}: pickled weights run whatever code is in them when they are loaded",
        where=where,
        action="take the safetensors files of this model, or convert it where you trust it (save_pretrained)",
    )
