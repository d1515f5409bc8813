"""Stored model profiles: what the analysis found in each preset, so that a search needs neither jax nor a trace."""

from __future__ import annotations

from pathlib import Path

from .._document import load
from ..profile import ModelProfile
from ._presets import unknown_name

_FOLDER = Path(__file__).parent / "profiles"


def model_profile_names() -> tuple[str, ...]:
    """Return the names of the presets whose profile is stored in the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_model_profile(name_or_path: str | Path) -> ModelProfile:
    """Return the profile of a preset, or the one in a file.

    Args:
        name_or_path: A preset such as ``"llama2-7b"`` (case does not matter), or a path; a ``Path``, text with a path
            separator or ending in ``.json`` is a path.

    Raises:
        DocumentNotFoundError: there is no such preset or file.
        DocumentError: the file is not a valid model profile.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.lower().endswith(".json"):
        return load(name_or_path, ModelProfile)
    name = text.strip().lower()
    if name not in model_profile_names():
        raise unknown_name("stored profile of model", text, model_profile_names())
    return load(_FOLDER / f"{name}.json", ModelProfile)
