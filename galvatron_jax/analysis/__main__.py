"""``python -m galvatron_jax.analysis``: see ``_cli``."""

import sys

from .._user_model import own_model, preset_model
from ._cli import main

if __name__ == "__main__":
    sys.path.insert(0, "")  # the user's project, as for `python my_script.py`
    sys.exit(main(sys.argv[1:], lambda text: own_model(text, where="MODEL") if ":" in text else preset_model(text)))
