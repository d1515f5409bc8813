"""One node of the benchmark: run plans in turn, round after round, through ``auto_shard``, and note every step.

The order of the plans turns from round to round, so that a slow spell of the machine does not fall on one of them; a
barrier before each step makes the nodes start together. A plan's first steps (compilation) do not count.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.emulated_cluster.model import CONFIG, build
from galvatron_jax import auto_shard, distributed, load_plan
from galvatron_jax.models import next_token_loss

PREPARING = 0.6
"""Share of the time in which plans may be compiled: those that are left then are not run."""


def main(plans: Path, rounds: int, seconds: float, out: Path) -> None:
    """Run the plans in the folder ``plans`` for at most about ``seconds``; write the seconds of their steps to ``out``.

    All processes do the same: what the clock decides, the slowest one's decides for all.
    """
    start_s = time.perf_counter()
    distributed.initialize()
    from jax.experimental import multihost_utils  # after the processes have joined

    def is_before(share: float) -> bool:
        spent_s = multihost_utils.process_allgather(np.array(time.perf_counter() - start_s))
        return float(np.max(spent_s)) < share * seconds

    steps = {path.stem: _prepare(path) for path in sorted(plans.glob("*.json")) if is_before(PREPARING)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for order in _turns(list(steps), rounds):
        for name in order if is_before(1.0) else ():
            multihost_utils.sync_global_devices(name)
            step_s = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - step_s)
    gathered = {name: multihost_utils.process_allgather(np.array(taken)) for name, taken in times.items()}
    if jax.process_index() == 0:  # the slowest node's clock is the step's
        out.write_text(json.dumps({name: np.max(taken, axis=0).tolist() for name, taken in gathered.items()}))


def _turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    for turn in range(rounds):
        first = turn % len(names)
        yield names[first:] + names[:first]


def _prepare(path: Path) -> Callable[[], None]:
    """Return a step of the plan, compiled and run twice."""
    start_s = time.perf_counter()
    plan = load_plan(path)
    trainer = auto_shard(build, loss=next_token_loss, plan=plan)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (plan.global_batch, CONFIG.seq), dtype=np.int32)
    batch = {"inputs": tokens, "targets": tokens}

    def step() -> None:
        result = trainer.step(batch)
        arrays = [x for x in jax.tree.leaves((result, trainer.state)) if isinstance(x, jax.Array)]
        jax.block_until_ready([x for x in arrays if x.addressable_shards])  # of the stages that live on this node

    step()
    step()
    print(f"{path.stem}: ready after {time.perf_counter() - start_s:.1f} s", flush=True)
    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
