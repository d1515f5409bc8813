"""How long the analysis of an abstract 7B model takes, by depth, and how much memory.

Each depth runs in a process of its own (nothing is cached from the one before). Seconds are CPU seconds of the whole
analysis, imports left out, so that a busy machine does not change them much; the resident memory is the peak of the
process, imports included.

    python benchmarks/analysis_speed.py 8 16 32 64
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

DEPTHS = (8, 16, 32, 64)


def measure(layers: int) -> None:
    """Analyse Llama-2-7B with ``layers`` layers and print one row of the table."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from galvatron_jax.analysis import analyse_model
    from galvatron_jax.models import Llama, llama_config, next_token_loss

    config = dataclasses.replace(llama_config("llama2-7b"), layers=layers)
    tokens = jax.ShapeDtypeStruct((1, config.seq), jnp.int32)
    start, wall = time.process_time(), time.perf_counter()
    analysis = analyse_model(
        lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens, "targets": tokens}
    )
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    parameters = analysis.profile.parameter_count / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{layers:6d}  {parameters:12.2f} B  {seconds:8.2f}  {wall:8.2f}  {peak:8.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        print("layers    parameters     CPU s    wall s  peak GiB", flush=True)
        for depth in map(int, sys.argv[1:] or DEPTHS):
            subprocess.run([sys.executable, __file__, "--one", str(depth)], check=True)
