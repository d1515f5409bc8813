"""``python -m galvatron_jax.cost PLAN``: see ``galvatron_jax.check``.

The room of estimates never imports JAX, and measuring a plan does: the command itself lives above, found by its name.
"""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("galvatron_jax.check._cli").main())
