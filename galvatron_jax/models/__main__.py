"""``python -m galvatron_jax.models``: analyse all presets again and store their profiles in the package."""

from __future__ import annotations

from pathlib import Path

from .._document import save
from ._analysed import analyse_preset
from ._presets import model_names

if __name__ == "__main__":
    for name in model_names():
        path = save(analyse_preset(name), Path(__file__).parent / "profiles" / f"{name}.json")
        print(f"wrote {path}")
