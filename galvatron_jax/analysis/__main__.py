"""``python -m galvatron_jax.analysis``: see ``_cli``."""

import sys

import jax

from .._user_model import own_model, preset_model
from ._cli import main

if __name__ == "__main__":
    # The model is only traced: a GPU's plugin need not be asked, nor complain where there is no driver.
    jax.config.update("jax_platforms", "cpu")
    sys.path.insert(0, "")  # the user's project, as for `python my_script.py`
    sys.exit(main(sys.argv[1:], lambda text: own_model(text, where="MODEL") if ":" in text else preset_model(text)))
