"""Write a Llama so that ``transformers`` loads it: shard by shard, never more than one of them in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..._document import write_text
from ...errors import DocumentError, ModelError, ToolchainError
from .._config import LlamaConfig
from ._config_json import CONFIG_NAME, config_text
from ._folder import INDEX_NAME, SINGLE_NAME, SUFFIX
from ._names import Place, places

StoredDtype = Literal["float32", "bfloat16", "float16"]

SHARD_BYTES = 4 * 2**30
"""Of a file: what ``transformers`` and the hub are used to, and what the host holds at a time."""


def write_llama(
    folder: str | Path,
    config: LlamaConfig,
    weights: Mapping[str, Any],
    *,
    dtype: StoredDtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> list[Path]:
    """Write ``config.json`` and the weights as safetensors; return the files.

    Args:
        folder: Made when it is not there.
        config: Sizes of the model.
        weights: Parameters by dotted path: host or device arrays, or anything that gives its values for ``[slice,
            ...]``. Each is fetched only when its shard is written.
        dtype: Of the stored values.
        shard_bytes: Most bytes in one file; more files need an index, which is written too.
        force: Replace the files of an earlier export.

    Raises:
        ModelError: the weights are not those of a model of this configuration.
        DocumentError: the folder has weights already, or cannot be written.
        ToolchainError: the package safetensors is not installed.
    """
    folder, wanted = Path(folder), places(config)
    _check_weights(wanted, weights)
    shards = _shards(list(wanted), wanted, _dtype(dtype).itemsize, shard_bytes)
    names = [_name(number, len(shards)) for number in range(len(shards))]
    _check_folder(folder, force=force)
    for name, paths in zip(names, shards, strict=True):
        _save({wanted[p].tensor: _fetch(weights[p], wanted[p], dtype) for p in paths}, folder / name)
    written = [folder / name for name in names]
    if len(shards) > 1:
        written.append(write_text(_index(shards, names, wanted, dtype), folder / INDEX_NAME, "index"))
    return [*written, write_text(config_text(config, dtype=dtype), folder / CONFIG_NAME, "configuration")]


def _check_weights(wanted: Mapping[str, Place], weights: Mapping[str, Any]) -> None:
    problems = [f"{path} is missing" for path in wanted if path not in weights]
    problems += [f"{path} is no parameter of it" for path in weights if path not in wanted]
    problems += [
        f"{path} has shape {tuple(weights[path].shape)}, not {place.shape}"
        for path, place in wanted.items()
        if path in weights and tuple(weights[path].shape) != place.shape
    ]
    if problems:
        raise ModelError("; ".join(problems[:8]), expected="the parameters of a Llama of this configuration")


def _shards(paths: Sequence[str], wanted: Mapping[str, Place], itemsize: int, most_bytes: int) -> list[list[str]]:
    """Fill file after file in the model's order."""
    shards: list[list[str]] = [[]]
    used = 0
    for path in paths:
        size = int(np.prod(wanted[path].shape)) * itemsize
        if shards[-1] and used + size > most_bytes:
            shards.append([])
            used = 0
        shards[-1].append(path)
        used += size
    return shards


def _name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}{SUFFIX}"


def _check_folder(folder: Path, *, force: bool) -> None:
    """Make the folder; old weights beside new ones would be loaded in their place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [p for p in folder.iterdir() if p.name in (CONFIG_NAME, INDEX_NAME) or p.suffix == SUFFIX]
        if old and not force:
            raise DocumentError(f"holds {old[0].name}", expected="an empty folder", where=str(folder), action="--force")
        for path in old:
            path.unlink()
    except OSError as error:
        raise DocumentError(
            f"cannot be written: {error.strerror or error}", where=str(folder), action="choose another folder"
        ) from None


def _fetch(value: Any, place: Place, dtype: StoredDtype) -> np.ndarray[Any, Any]:
    whole = np.asarray(value[tuple(slice(None) for _ in place.shape)]).astype(_dtype(dtype))
    return np.ascontiguousarray(whole.T if place.is_transposed else whole)


def _save(tensors: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ToolchainError("safetensors is not installed", action="pip install safetensors") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})  # transformers insists on the word
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise DocumentError(f"cannot be written: {error}", where=str(path), action="make room") from None
    finally:
        temporary.unlink(missing_ok=True)


def _index(shards: Sequence[list[str]], names: Sequence[str], wanted: Mapping[str, Place], dtype: StoredDtype) -> str:
    homes = {wanted[path].tensor: name for name, paths in zip(names, shards, strict=True) for path in paths}
    total = sum(int(np.prod(place.shape)) for place in wanted.values()) * _dtype(dtype).itemsize
    return json.dumps({"metadata": {"total_size": total}, "weight_map": homes}, indent=2, sort_keys=True) + "\n"


def _dtype(name: StoredDtype) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
