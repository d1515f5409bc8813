"""Train a Llama on real text, spread over all devices by a plan.

    python examples/llama/train.py
    python examples/llama/train.py --plan configs/llama_tiny.json --steps 100

This file only reads the command line and prepares the environment; ``training.py`` is the example.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started by its path: Python then knows this folder, but not the repository, where the imports begin.
    sys.path[0] = str(Path(__file__).parents[2])

from examples.llama.options import device_environment, parse_options  # noqa: E402
from galvatron_jax.errors import GalvatronError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 2 bad input, 3 infeasible, 4 environment, 130 interrupted."""
    try:
        options = parse_options(arguments)
        os.environ.update(device_environment(options, os.environ))
        # Not at the top: JAX reads its environment when it is imported.
        from examples.llama.training import train

        train(options)
    except GalvatronError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
