"""The model zoo: models as their authors write them, one file a family, that analysis and runtime must handle.

    case = ZOO["bert"]()
    analysis = analyse_model(case.build, case.loss, case.spec)

Nothing here knows of ``galvatron_jax`` (but for its own Llama preset). Every call builds a fresh ``Case``.
"""

from __future__ import annotations

from collections.abc import Callable

from . import (
    albert,
    bert,
    diffusion,
    gpt2,
    hybrid,
    latents,
    llama,
    local_global,
    moe,
    pure,
    recurrent,
    swin,
    t5,
    transformed,
    vit,
)
from ._case import SAMPLES as SAMPLES
from ._case import Case as Case

_FAMILIES = (
    *(llama, gpt2, bert, vit, t5, moe, albert, swin, hybrid, recurrent, local_global, transformed, pure),
    *(latents, diffusion),
)

ZOO: dict[str, Callable[[], Case]] = {name: case for family in _FAMILIES for name, case in family.CASES.items()}
"""Cases by name."""
