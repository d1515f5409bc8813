"""The bubble of each schedule, every stage a process on a core of its own.

Within one process a stage that runs alone takes all cores, so nothing is idle while its neighbour waits. Here each
device slice is a process that may use one core only and has one CPU device; values go over gloo.

A step's passes (without what comes once: zeros before, exchange and update after) take T(m) for m microbatches of fixed
size. With slots of one forward and one backward pass of a slice, T(m) = slot (m + bubble), so a line through T over m
has slope ``slot`` and intercept ``slot * bubble``. Independently: a process waits for every program
(``runtime._turns``), so the time outside its own passes is known too,

    waiting(m) = bubble * slot + m * exchange

by process, ``exchange`` being what a microbatch's transfers cost. All counts of microbatches are taken in turn, so that
load from elsewhere hits all alike; medians over the repetitions of the slower process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from galvatron_jax import distributed
from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.runtime import PipelinePrograms
from galvatron_jax.runtime._events import Compute
from galvatron_jax.runtime._executor import Flight

SLICES = 2
SCHEDULES = {("gpipe", 1): SLICES - 1, ("1f1b", 1): SLICES - 1, ("interleaved-1f1b", 2): (SLICES - 1) / 2}
"""(name, chunks) and its bubble in slots (Narayanan et al. 2021)."""
COUNTS, SAMPLES, REPETITIONS = (2, 4, 8, 16), 4, 7
MODEL = LlamaConfig(vocab=64, embed=256, mlp=768, layers=8, heads=4, kv_heads=4, seq=128, dtype="float32")
"""Eight layers: as many for each of two slices of one or two chunks; embedding and head are small."""
LIMIT_S = 540.0


def programs_of(config: LlamaConfig, samples: int, microbatches: int, schedule: Any, chunks: int) -> Any:
    """Return (programs, placed batch) of an even pipeline of 1-device stages."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (samples * microbatches, config.seq), dtype=np.int32)
    batch = {"inputs": tokens, "targets": tokens}
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype), batch)
    analysis = analyse_model(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, spec)
    first, *layers, last = (segment.kind for segment in analysis.cut.segments)
    each = len(layers) // (SLICES * chunks)
    parts = [layers[k * each : (k + 1) * each] for k in range(SLICES * chunks)]
    parts[0], parts[-1] = [first, *parts[0]], [*parts[-1], last]
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=1, gpus_per_node=SLICES, gpu="cpu"),
        global_batch=samples * microbatches,
        microbatches=microbatches,
        schedule=schedule,
        chunks=chunks,
        stages=tuple(
            Stage(devices=1, runs=tuple(PlanRun(kind=k, count=1, strategy=Strategy()) for k in part)) for part in parts
        ),
    )
    programs = PipelinePrograms(analysis, plan, optax.sgd(1e-3), jax.devices())
    return programs, programs.place_batch([x[list(programs.process_rows)] for x in jax.tree.leaves(batch)])


# ------------------------------------------------------------------------------------------------------ in each process
def measure() -> list[dict[str, Any]]:
    """Return what each schedule took, the same in all processes."""
    rows = []
    for (name, chunks), ideal in SCHEDULES.items():
        runs = {}
        for m in COUNTS:
            programs, batch = programs_of(MODEL, SAMPLES, m, name, chunks)
            states, _ = programs.train(programs.adopt(*programs.analysis.trace.model.build()), batch)
            runs[m] = [programs, batch, states]
        seconds: dict[int, list[Any]] = {m: [] for m in COUNTS}
        for _ in range(REPETITIONS):
            for m, run in runs.items():
                run[2], found = timed_step(*run)
                seconds[m].append(multihost_utils.process_allgather(np.array(found)))
        rows.append({"schedule": name, "ideal_slots": ideal, **summary(seconds)})
    return rows


def timed_step(programs: Any, batch: Any, states: Any) -> tuple[Any, list[float]]:
    """Take a step; return the new states and the seconds of (all passes, own passes alone, what comes once)."""
    executor, own = programs.executor, 0.0
    flight = Flight(executor, states, batch)
    multihost_utils.sync_global_devices("step")
    start = last = time.perf_counter()
    for event in flight.run(executor.training):  # each is waited for
        now = time.perf_counter()
        own += (now - last) * isinstance(event, Compute)
        last = now
    states, metrics = executor._finish(states, flight)
    jax.block_until_ready((states, metrics))
    return states, [last - start, own, time.perf_counter() - last]


def summary(seconds: dict[int, list[Any]]) -> dict[str, Any]:
    """Return slot, bubble by both readings, and medians; ``seconds`` are arrays [process, 3] by m and repetition."""
    steps = {m: statistics.median(float(s[:, 0].max()) for s in found) for m, found in seconds.items()}
    own = {m: [statistics.median(float(s[k, 1]) for s in found) for k in range(SLICES)] for m, found in seconds.items()}
    waiting = {m: steps[m] - statistics.mean(own[m]) for m in steps}
    slot, rest = np.polyfit(list(steps), list(steps.values()), 1)
    exchange, idle = np.polyfit(list(steps), list(waiting.values()), 1)
    last = max(COUNTS)
    return {
        "passes_s": steps,
        "own_passes_s": own,
        "once_s": {m: statistics.median(float(s[:, 2].max()) for s in found) for m, found in seconds.items()},
        "slot_s": float(slot),
        "bubble_slots": float(rest / slot),
        "idle_slots": float(idle / slot),
        "exchange_share": float(exchange / slot),
        "stage_slots": [o / last / float(slot) for o in own[last]],
    }


def main(path: Path) -> None:
    """Join the other process, measure, and write."""
    place = distributed.initialize()
    assert place is not None
    rows = measure()
    if place.process == 0:
        path.write_text(json.dumps(rows))


# ------------------------------------------------------------------------------------------------------- from outside
def bubbles(folder: Path) -> list[dict[str, Any]]:
    """Run the processes, a core for each, and return what they measured; logs and the result go to ``folder``."""
    cores, path = sorted(os.sched_getaffinity(0))[:SLICES], folder / "bubbles.json"
    if len(cores) < SLICES:
        raise SystemExit(f"{SLICES} cores are needed, one for each stage, and {len(cores)} may be used")
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        distributed.COORDINATOR: f"127.0.0.1:{distributed.free_port()}",
        distributed.PROCESSES: str(SLICES),
    }
    started = []
    for index, core in enumerate(cores):
        with (folder / f"process{index}.log").open("wb") as log:
            command = [sys.executable, "-m", __spec__.name, str(core), str(path)]
            environ = {**common, distributed.PROCESS: str(index)}
            started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + LIMIT_S
    try:
        codes = [process.wait(max(1.0, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        logs = [(folder / f"process{index}.log").read_text(errors="replace")[-2000:] for index in range(SLICES)]
        raise SystemExit("\n".join([f"the processes of the stages ended with {codes}", *logs]))
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})  # before the backend counts its threads
    main(Path(sys.argv[2]))
