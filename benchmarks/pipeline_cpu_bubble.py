"""The bubble of each schedule, every stage a process on a core of its own.

Within one process a stage that runs alone takes all cores, so nothing is idle while its neighbour waits. Here each
device slice is a process that may use one core only and has one CPU device; values go over gloo.

A step's passes (without what comes once: zeros before, exchange and update after) take T(m) for m microbatches of fixed
size. With slots of one forward and one backward pass of a slice, T(m) = slot (m + bubble), so a line through T over m
has slope ``slot`` and intercept ``slot * bubble``. Independently: a process waits for every program
(``runtime._turns``), so the time outside its own passes is known too,

    waiting(m) = bubble * slot + m * exchange

by process, ``exchange`` being what a microbatch's transfers cost and what their rendezvous add. Third, the passes of
each stage and the shortest transfer, as measured, are played by ``cost.simulate``: what the estimate says of this step.
All counts of microbatches are taken in turn, so that load from elsewhere hits all alike; medians over the repetitions
of the slower process.
"""

from __future__ import annotations

import json
import os
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
from galvatron_jax.cost import Crossing, StageTime, simulate
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.runtime import PipelinePrograms
from galvatron_jax.runtime._events import Compute
from galvatron_jax.runtime._executor import Flight
from galvatron_jax.schedule import build_schedule

SLICES, PHASES = 2, ("forward", "backward")
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
        seconds: dict[int, Any] = {m: [] for m in COUNTS}
        for _ in range(REPETITIONS):
            for m, run in runs.items():
                run[2], took = timed_step(*run)
                seconds[m].append(multihost_utils.process_allgather(np.array(took)))
        found = summary(name, chunks, {m: np.array(each) for m, each in seconds.items()})
        rows.append({"schedule": name, "ideal_slots": ideal, **found})
    return rows


def timed_step(programs: Any, batch: Any, states: Any) -> tuple[Any, list[float]]:
    """Take a step; return the new states, and seconds in this process.

    Of all passes, of what comes once, of the shortest transfer; then of the forward and the backward pass of each
    stage, all microbatches together (0 for stages of others).
    """
    executor = programs.executor
    flight = Flight(executor, states, batch)
    passes, transfers = {(k, phase): 0.0 for k in range(len(programs.stages)) for phase in PHASES}, [float("inf")]
    multihost_utils.sync_global_devices("step")
    start = last = time.perf_counter()
    for event in flight.run(executor.training):  # each is waited for
        last, took = time.perf_counter(), time.perf_counter() - last
        if isinstance(event, Compute):
            passes[event.stage, event.phase] += took
        else:
            transfers.append(took)
    states, metrics = executor._finish(states, flight)
    jax.block_until_ready((states, metrics))
    return states, [last - start, time.perf_counter() - last, min(transfers), *passes.values()]


def summary(name: Any, chunks: int, seconds: dict[int, Any]) -> dict[str, Any]:
    """Return slot and bubble by all readings; ``seconds`` are arrays [repetition, process, number] by m."""
    middle = {m: np.median(found, axis=0) for m, found in seconds.items()}
    steps = {m: float(np.median(found[:, :, 0].max(axis=1))) for m, found in seconds.items()}
    played = {m: _played(name, chunks, m, found) for m, found in middle.items()}
    waiting = [steps[m] - float(found[:, 3:].sum(axis=1).mean()) for m, found in middle.items()]
    (slot, rest), (exchange, idle) = np.polyfit(COUNTS, list(steps.values()), 1), np.polyfit(COUNTS, waiting, 1)
    slot_played, rest_played = np.polyfit(COUNTS, list(played.values()), 1)
    return {
        "passes_s": steps,
        "played_s": played,
        "stages_s": {m: (found[:, 3:].sum(axis=0) / m).tolist() for m, found in middle.items()},
        "transfer_s": {m: float(found[:, 2].min()) for m, found in middle.items()},
        "once_s": {m: float(found[:, 1].max()) for m, found in middle.items()},
        "slot_s": float(slot),
        "bubble_slots": float(rest / slot),
        "idle_slots": float(idle / slot),
        "played_slots": float(rest_played / slot_played),
        "exchange_share": float(exchange / slot),
    }


def _played(name: Any, chunks: int, m: int, found: Any) -> float:
    """Return the seconds of all passes as the estimate plays them, from the passes measured (see ``timed_step``)."""
    each = (found[:, 3:].sum(axis=0) / m).reshape(-1, len(PHASES))
    stages = [StageTime(forward_s=float(f), backward_s=float(b), step_end_s=0.0) for f, b in each]
    crossings = [Crossing(float(found[:, 2].min()))] * (len(stages) - 1)
    return simulate(build_schedule(name, SLICES, m, chunks), stages, crossings).step_time_s


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
