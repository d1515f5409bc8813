"""What a pipelined step costs beside its programs: dispatch per action, transfers, and the bubble of each schedule.

    python -m benchmarks.pipeline_cpu [--out FOLDER] [--dispatch-only]

* Dispatch: host time of one program call of a tiny model whose devices are idle, so that nothing is waited for; the
  median over all actions of some steps. Transfers between stages (``jax.device_put``) are counted apart.
* Bubble: step times T(m) at a fixed microbatch size. A step of m microbatches takes m + bubble slots; the slope of T
  gives the slot, what is left is the bubble, beside the schedule's own number. Every repetition takes all m in turn, so
  that load from elsewhere hits all alike; medians are reported. Needs as many idle cores as stages.

Writes ``pipeline_cpu_<date>.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

STAGES, DEVICES = 2, 2
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    " --xla_cpu_multi_thread_eigen=false"
)

import jax  # noqa: E402  # after the flags
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from galvatron_jax.analysis import analyse_model  # noqa: E402
from galvatron_jax.cluster import Cluster  # noqa: E402
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss  # noqa: E402
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference  # noqa: E402
from galvatron_jax.runtime import PipelinePrograms  # noqa: E402
from galvatron_jax.runtime._events import Compute  # noqa: E402
from galvatron_jax.runtime._executor import Flight  # noqa: E402

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2))
COUNTS = (2, 4, 8)
REPETITIONS = 7
BUBBLES = {("gpipe", 1): STAGES - 1, ("1f1b", 1): STAGES - 1, ("interleaved-1f1b", 2): (STAGES - 1) / 2}
"""In slots of one forward and one backward pass of a slice (Narayanan et al. 2021)."""


def programs_of(config: LlamaConfig, samples: int, microbatches: int, schedule: Any, chunks: int) -> Any:
    """Return (programs, placed batch) of an even pipeline of 1-device stages."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (samples * microbatches, config.seq), dtype=np.int32)
    batch = {"inputs": tokens, "targets": tokens}
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype), batch)
    analysis = analyse_model(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, spec)
    kinds = [segment.kind for segment in analysis.cut.segments]
    cuts = [round(len(kinds) * k / (STAGES * chunks)) for k in range(STAGES * chunks + 1)]
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=1, gpus_per_node=DEVICES, gpu="cpu"),
        global_batch=samples * microbatches,
        microbatches=microbatches,
        schedule=schedule,
        chunks=chunks,
        stages=tuple(
            Stage(
                devices=DEVICES // STAGES, runs=tuple(PlanRun(kind=k, count=1, strategy=Strategy()) for k in kinds[a:b])
            )
            for a, b in zip(cuts, cuts[1:], strict=False)
        ),
    )
    programs = PipelinePrograms(analysis, plan, optax.sgd(1e-3), jax.devices())
    return programs, programs.place_batch(jax.tree.leaves(batch))


def dispatch_ms() -> dict[str, float]:
    """Return the median host milliseconds of an action, and of a transfer."""
    config = LlamaConfig(vocab=64, embed=16, mlp=32, layers=4, heads=2, kv_heads=2, seq=8, dtype="float32")
    programs, batch = programs_of(config, 2, 8, "1f1b", 1)
    states = programs.adopt(*programs.analysis.trace.model.build())
    times: dict[str, list[float]] = {"compute": [], "transfer": []}
    for repetition in range(6):
        flight = Flight(programs.executor, states, batch)
        jax.block_until_ready((flight.sums, flight.losses))
        events = flight.run(programs.executor.training)
        while True:
            start = time.perf_counter()
            event = next(events, None)
            end = time.perf_counter()
            if event is None:
                break
            if repetition:  # the first one compiles
                times["compute" if isinstance(event, Compute) else "transfer"].append(1e3 * (end - start))
            jax.block_until_ready((flight.sums, flight.losses, flight._made, flight._arrived))
    return {kind: statistics.median(found) for kind, found in times.items()}


def bubbles() -> list[dict[str, Any]]:
    """Return measured and ideal bubbles of every schedule."""
    config = LlamaConfig(vocab=64, embed=256, mlp=768, layers=6, heads=4, kv_heads=4, seq=128, dtype="float32")
    rows = []
    for name, chunks in SCHEDULES:
        runs = {}
        for m in COUNTS:
            programs, batch = programs_of(config, 4, m, name, chunks)
            states, _ = programs.train(programs.adopt(*programs.analysis.trace.model.build()), batch)
            runs[m] = [programs, batch, states]
        seconds: dict[int, list[float]] = {m: [] for m in COUNTS}
        for _ in range(REPETITIONS):
            for m, run in runs.items():
                jax.block_until_ready(run[2])
                start = time.perf_counter()
                run[2], metrics = run[0].train(run[2], run[1])
                jax.block_until_ready((run[2], metrics))
                seconds[m].append(time.perf_counter() - start)
        medians = {m: statistics.median(found) for m, found in seconds.items()}
        slot, rest = np.polyfit(list(medians), list(medians.values()), 1)
        rows.append(
            {
                "schedule": name,
                "step_s": medians,
                "slot_s": float(slot),
                "bubble_slots": float(rest / slot),
                "ideal_slots": BUBBLES[name, chunks],
            }
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Cost of pipelined steps on CPU devices.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for the result (default: here)")
    parser.add_argument("--dispatch-only", action="store_true", help="leave out bubbles, which need an idle machine")
    options = parser.parse_args()
    folder = options.out
    load = os.getloadavg()[0]
    result = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load_before": load,
        "dispatch_ms": dispatch_ms(),
        "schedules": [] if options.dispatch_only else bubbles(),
    }
    path = folder / f"pipeline_cpu_{result['date']}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(page(result))
    print(page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lines = [
        f"# Pipelined steps on CPU devices, {result['date']}",
        "",
        f"`python -m benchmarks.pipeline_cpu`, jax {result['jax']}, {result['cores']} cores,"
        f" load {result['load_before']:.1f} when it began"
        " (other load lengthens all times; bubbles need as many idle cores as stages).",
        "",
        f"Dispatch of an action: {result['dispatch_ms']['compute']:.2f} ms (goal 0.5 ms);"
        f" of a transfer: {result['dispatch_ms']['transfer']:.2f} ms.",
    ]
    if not result["schedules"]:
        return "\n".join([*lines, "", "Bubbles: not measured in this run (`--dispatch-only`).", ""])
    lines += [
        "",
        f"| schedule, {STAGES} slices | slot ms | bubble, slots | of the schedule | "
        + " | ".join(f"m = {m}" for m in COUNTS)
        + " |",
        "|---|---|---|---|" + "---|" * len(COUNTS),
    ]
    for row in result["schedules"]:
        found = [f"{1e3 * row['slot_s']:.1f}", f"{row['bubble_slots']:.2f}", f"{row['ideal_slots']:.1f}"]
        steps = [f"{1e3 * row['step_s'][m]:.0f} ms" for m in COUNTS]
        lines.append(f"| {' | '.join([row['schedule'], *found, *steps])} |")
    return "\n".join(lines) + "\n\nThe measured bubble holds what a step does once: zeros, exchange, update.\n"


if __name__ == "__main__":
    main()
