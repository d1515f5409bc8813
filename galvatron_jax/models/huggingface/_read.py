"""Read a Llama: headers are compared with the model first, then each device's part of a tensor is read on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DocumentError, ToolchainError
from .._config import LlamaConfig
from ._config_json import read_llama_config
from ._folder import SINGLE_NAME, resolve, weight_files
from ._names import Place, is_redundant, places

DTYPES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element of what we read."""
HEADER_BYTES = 2**27
"""Room for the header of a file: safetensors itself refuses those above 100 MB."""
MOST_SHOWN = 8

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter that is still on disk: like an array, but only what is asked for is read."""

    file: Path
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """As our model holds it."""
        return self.place.shape

    def __getitem__(self, index: Index) -> np.ndarray[Any, Any]:
        """Return a part (a slice for each dimension, step 1) in the stored dtype."""
        with open_safetensors(self.file) as file:
            tensor = file.get_slice(self.place.tensor)
            part: np.ndarray[Any, Any] = tensor[tuple(index)[::-1] if self.place.is_transposed else tuple(index)]
        return part.T if self.place.is_transposed else part


def read_llama(folder: str | Path) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Return the configuration of the Llama in a folder, and its parameters by dotted path, still on disk.

    The second is what ``auto_shard(..., weights=...)`` takes: each device then reads its own part.

    Raises:
        DocumentNotFoundError: ``config.json`` or weights are missing.
        DocumentError: a file is damaged, does not fit ``config.json``, or may not be opened.
        UnsupportedError: the weights are pickled, or the model is not one that we compute.
        ToolchainError: the package safetensors is not installed.
    """
    folder = Path(folder)
    config, index = read_llama_config(folder), weight_files(folder)
    names = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
    files = {name: resolve(folder, name) for name in names}
    _check_sizes(config, files.values(), folder)
    home = {tensor: (name, spec) for name, path in files.items() for tensor, spec in _headers(path)}
    wanted = places(config)
    _check(wanted, home, config, index, folder)
    return config, {path: StoredTensor(files[home[place.tensor][0]], place) for path, place in wanted.items()}


def open_safetensors(path: Path) -> Any:
    """Open a file for reading by parts.

    Raises:
        DocumentError: it is no safetensors file, or cut short.
        ToolchainError: the package safetensors is not installed.
    """
    # Here, not at the top: planning needs neither. ml_dtypes teaches numpy bfloat16.
    try:
        import ml_dtypes  # noqa: F401
        import safetensors
    except ImportError:
        raise ToolchainError(
            "safetensors is not installed", where="weights", action="pip install safetensors ml_dtypes"
        ) from None
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise DocumentError(
            f"cannot be read: {error}", expected="a whole safetensors file", where=str(path), action="download it again"
        ) from None


def _headers(path: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    with open_safetensors(path) as file:
        for tensor in file.keys():  # noqa: SIM118  # no mapping
            header = file.get_slice(tensor)
            yield tensor, (header.get_dtype(), tuple(header.get_shape()))


def _check_sizes(config: LlamaConfig, files: Any, folder: Path) -> None:
    """Refuse files that hold more than the model could need, before they are opened."""
    sizes = [path.stat().st_size for path in files]
    most = 4 * (config.parameter_count + config.vocab * config.embed) + HEADER_BYTES * len(sizes)
    if sum(sizes) > most:
        raise DocumentError(
            f"the weights have {sum(sizes)} bytes", expected=f"at most {most} for this config.json", where=str(folder)
        )


def _check(
    wanted: Mapping[str, Place],
    home: Mapping[str, tuple[str, tuple[str, tuple[int, ...]]]],
    config: LlamaConfig,
    index: Mapping[str, str] | None,
    folder: Path,
) -> None:
    """Compare every header with the model, and with the index; all differences at once."""
    shapes = {place.tensor: place.stored_shape for place in wanted.values()}
    problems = [f"{tensor} is missing" for tensor in shapes if tensor not in home]
    for tensor, (name, (dtype, shape)) in home.items():
        if tensor not in shapes:
            problems += [] if is_redundant(tensor, config) else [f"{tensor} is no parameter of this Llama"]
        elif shape != shapes[tensor]:
            problems.append(f"{tensor} has shape {list(shape)}, config.json says {list(shapes[tensor])}")
        elif dtype not in DTYPES:
            problems.append(f"{tensor} has dtype {dtype}, none of {', '.join(DTYPES)}")
        elif index is not None and index.get(tensor) != name:
            problems.append(f"{tensor} is in {name}, not where the index says")
    if problems:
        more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        raise DocumentError(
            "\n  - ".join(["the weights are not those of config.json:", *problems[:MOST_SHOWN], *more]),
            where=str(folder),
            action="download it again, whole",
        )
