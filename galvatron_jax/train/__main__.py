"""``python -m galvatron_jax.train``: see ``_cli``."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
