"""Presets: published Llama sizes by name, and two small ones of our own.

Sources of the sizes:
    Llama 2: Touvron et al. 2023, arXiv:2307.09288, section 2.2 and table 1 (context 4096); the mlp widths and rope
        base are those of the released ``config.json`` (huggingface.co/meta-llama/Llama-2-7b-hf and siblings).
    Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, table 3; context 8192, vocabulary 128256 and rope base 500000
        as in huggingface.co/meta-llama/Meta-Llama-3-8B and -70B, ``config.json``.
    ``llama-100m`` and ``llama-tiny`` are ours: bytes as tokens, sizes that powers of two divide. ``llama-tiny`` is
        made for CPUs and therefore computes in float32: few of them have fast 16-bit products.
"""

from __future__ import annotations

import difflib

from ..errors import DocumentNotFoundError
from ._config import LlamaConfig

_PRESETS = {
    "llama2-7b": LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=32, heads=32, kv_heads=32, seq=4096),
    "llama2-13b": LlamaConfig(vocab=32_000, embed=5120, mlp=13_824, layers=40, heads=40, kv_heads=40, seq=4096),
    "llama2-70b": LlamaConfig(vocab=32_000, embed=8192, mlp=28_672, layers=80, heads=64, kv_heads=8, seq=4096),
    "llama3-8b": LlamaConfig(
        vocab=128_256, embed=4096, mlp=14_336, layers=32, heads=32, kv_heads=8, seq=8192, rope_theta=500_000.0
    ),
    "llama3-70b": LlamaConfig(
        vocab=128_256, embed=8192, mlp=28_672, layers=80, heads=64, kv_heads=8, seq=8192, rope_theta=500_000.0
    ),
    "llama-100m": LlamaConfig(vocab=256, embed=1024, mlp=3072, layers=8, heads=16, kv_heads=8, seq=1024),
    "llama-tiny": LlamaConfig(vocab=256, embed=128, mlp=384, layers=4, heads=8, kv_heads=4, seq=128, dtype="float32"),
}


def model_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(_PRESETS)


def llama_config(name: str) -> LlamaConfig:
    """Return the configuration of preset ``name``, for example ``"llama2-7b"`` (case does not matter).

    Raises:
        DocumentNotFoundError: there is no such preset; the message lists them and names the nearest.
    """
    try:
        return _PRESETS[name.strip().lower()]
    except KeyError:
        raise unknown_name("model preset", name, model_names()) from None


def unknown_name(what: str, name: str, names: tuple[str, ...]) -> DocumentNotFoundError:
    """Return the error for a ``name`` that is not among ``names``, with the nearest match if there is one."""
    near = difflib.get_close_matches(name.strip().lower(), names, n=1, cutoff=0.5)
    return DocumentNotFoundError(
        f"there is no {what} {name!r}",
        expected=f"one of {', '.join(names) or '(none stored)'}",
        action=f"did you mean {near[0]!r}?" if near else "choose one of these",
    )
