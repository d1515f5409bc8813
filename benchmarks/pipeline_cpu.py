"""What a pipelined step costs beside its programs: dispatch per action, transfers, and the bubble of each schedule.

    python -m benchmarks.pipeline_cpu [--out FOLDER] [--dispatch-only]

* Dispatch: host time of one program call of a tiny model whose devices are idle, so that nothing is waited for; the
  median over all actions of some steps. Transfers between stages (``jax.device_put``) are counted apart.
* Bubble: every stage a process on a core of its own (``pipeline_cpu_bubble``). Needs as many idle cores as stages.

Writes ``pipeline_cpu_<date>.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
)

import jax  # noqa: E402  # after the flags

from benchmarks.pipeline_cpu_bubble import COUNTS, REPETITIONS, SLICES, bubbles, programs_of  # noqa: E402
from galvatron_jax.models import LlamaConfig  # noqa: E402
from galvatron_jax.runtime._events import Compute  # noqa: E402
from galvatron_jax.runtime._executor import Flight  # noqa: E402


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


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Cost of pipelined steps on CPU devices.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for the result (default: here)")
    parser.add_argument("--dispatch-only", action="store_true", help="leave out bubbles, which need an idle machine")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit: the stages' processes are ended too
    folder = options.out
    load = os.getloadavg()[0]
    result = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load_before": load,
        "dispatch_ms": dispatch_ms(),
        "schedules": [],
    }
    if not options.dispatch_only:
        with tempfile.TemporaryDirectory() as logs:
            result["schedules"] = bubbles(Path(logs))
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
        f"Bubbles, {SLICES} slices, each a process on a core of its own with one CPU device; in slots of one forward"
        f" and one backward pass of a slice; medians of {REPETITIONS}.",
        "",
        "| schedule | bubble of the schedule | measured: intercept of T(m) | waiting | estimate | slot ms | exchange"
        " | " + " | ".join(f"T({m})" for m in COUNTS) + " | once |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(COUNTS),
    ]
    for row in result["schedules"]:
        found = [f"{row['ideal_slots']:.1f}", f"{row['bubble_slots']:.2f}", f"{row['idle_slots']:.2f}"]
        found += [f"{row['played_slots']:.2f}"]
        found += [f"{1e3 * row['slot_s']:.1f}", f"{100 * row['exchange_share']:.1f} %"]
        steps = [f"{1e3 * row['passes_s'][str(m)]:.0f} ({1e3 * row['played_s'][str(m)]:.0f}) ms" for m in COUNTS]
        once = statistics.median(row["once_s"].values())
        lines.append(f"| {' | '.join([row['schedule'], *found, *steps, f'{1e3 * once:.0f} ms'])} |")
    return "\n".join(
        [
            *lines,
            "",
            "T(m): all passes of a step of m microbatches, and in brackets what `cost.simulate` makes of the passes and"
            " the shortest transfer as measured (its bubble: estimate). Waiting: the time outside a process's own"
            " passes, its part that does not grow with m; exchange: the part that does. Once: exchange and update"
            " after all passes.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
