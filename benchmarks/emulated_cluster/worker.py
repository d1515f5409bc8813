"""One node of the benchmark: run plans in turn, round after round, through ``auto_shard``, and note every step.

The order of the plans turns from round to round, so that a slow spell of the machine does not fall on one of them; a
barrier before each step makes the nodes start together, and the first round (compilation) does not count.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from galvatron_jax import distributed

PLANS, ROUNDS, STEPS, OUT = sys.argv[1:5]


def main() -> None:
    """Run the plans in the folder ``PLANS`` and write the seconds of their steps to ``OUT``."""
    distributed.initialize()
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    steps: dict[str, Callable[[], None]] = {}
    for path in sorted(Path(PLANS).glob("*.json")):
        steps[path.stem] = _prepare(path)
        if jax.process_index() == 0:
            print("compiled", path.stem, flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(int(ROUNDS)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            steps[name]()
            for _ in range(int(STEPS)):
                multihost_utils.sync_global_devices(name)
                start_s = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start_s)
    # the slowest node's clock is the step's
    slowest = {
        name: np.max(multihost_utils.process_allgather(np.array(t)), axis=0).tolist() for name, t in times.items()
    }
    if jax.process_index() == 0:
        Path(OUT).write_text(json.dumps(slowest))


def _prepare(path: Path) -> Callable[[], None]:
    """Return a step of the plan, compiled."""
    import jax
    import numpy as np

    from galvatron_jax import auto_shard, load_plan

    from .model import CONFIG, small_llama

    build, loss, _ = small_llama()
    plan = load_plan(path)
    trainer = auto_shard(build, loss=loss, plan=plan)  # type: ignore[arg-type]
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (plan.global_batch, CONFIG.seq), dtype=np.int32)
    batch = {"inputs": tokens, "targets": tokens}

    def step() -> None:
        jax.block_until_ready(trainer.step(batch).loss)

    step()
    return step


main()
