"""Find a hardware profile by the name of a GPU, or read one from a file."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path

import msgspec

from .. import _document
from ..errors import DocumentNotFoundError
from ..profile import HardwareProfile

_ALIASES = {
    "a100": "a100-80g",
    "a100-sxm4-40gb": "a100-40g",
    "a100-sxm4-80gb": "a100-80g",
    "b200-180g": "b200",
    "b200-sxm": "b200",
    "h100-80g": "h100",
    "h100-80gb-hbm3": "h100",
    "h100-sxm": "h100",
    "h100-sxm5": "h100",
    "h200-141g": "h200",
    "h200-sxm": "h200",
}
"""Other names in use; among them those that ``nvidia-smi`` prints, in the spelling of ``_normalized``."""


def hardware_names() -> tuple[str, ...]:
    """Return the names of the bundled hardware profiles, sorted."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_hardware(name_or_path: str | Path) -> HardwareProfile:
    """Return a bundled profile by name, or the profile in a file.

    Args:
        name_or_path: ``"h100"``, ``"A100"``, a device name as ``nvidia-smi`` prints it (``"NVIDIA H100 80GB HBM3"``),
            or a path; a ``Path``, text with a path separator or ending in ``.json`` is a path.

    Raises:
        DocumentNotFoundError: no bundled profile has that name; the message lists them and the nearest.
        DocumentError: the file is not a valid hardware profile.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.lower().endswith(".json"):
        return _document.load(name_or_path, HardwareProfile)
    name = _normalized(text)
    name = _ALIASES.get(name, name)
    if name not in hardware_names():
        raise _unknown(text, name)
    file = resources.files(__package__) / f"{name}.json"
    return _document.decode(file.read_bytes(), HardwareProfile, where=f"bundled hardware {name}")


def as_priced(profile: HardwareProfile, fingerprint: str) -> HardwareProfile | None:
    """Return ``profile`` with the attention (``--attention``) that gives it ``fingerprint``; None if neither does."""
    for fused in (profile.fused_attention, not profile.fused_attention):
        priced = msgspec.structs.replace(profile, fused_attention=fused)
        if priced.fingerprint == fingerprint:
            return priced
    return None


def _normalized(text: str) -> str:
    """``"NVIDIA A100-SXM4-80GB"`` as ``"a100-sxm4-80gb"``, ``"a100_80gb"`` as ``"a100-80g"``."""
    name = re.sub(r"[\s_]+", "-", text.strip().lower()).removeprefix("nvidia-")
    return re.sub(r"^([a-z]+[0-9]+)-([0-9]+)gb?$", r"\1-\2g", name)


def _unknown(text: str, name: str) -> DocumentNotFoundError:
    known = hardware_names()
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return DocumentNotFoundError(
        f"got {text!r}, which is no bundled hardware",
        expected="one of " + ", ".join(known),
        where="--gpu",
        action=f"did you mean {nearest}? give a profile of other hardware by its path",
    )
