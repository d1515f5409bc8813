"""``python -m benchmarks.emulated_cluster --rate 20mbit,40mbit``: profile, predict, run and compare, on emulated nodes.

Runs unattended and ends within ``--limit-s`` (20 minutes), cleans up, and prints what it could not do.

For each rate: our own hardware profiler measures the nodes' collectives (several processes, gloo), the computation
profiler measures the model's layers once; every plan is predicted from these two profiles *before* it runs; then all
run in turn through ``auto_shard``. Records go to ``--out``, one for each rate and plan, with the machine's other load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import msgspec

from galvatron_jax._document import load, save
from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.plan import load_plan, save_plan
from galvatron_jax.profile import HardwareProfile, ModelProfile
from galvatron_jax.record import RunRecord

from .model import NAME
from .network import EmulatedCluster, RunResult, clean_stale, why_unavailable
from .plans import HELD_OUT, SPREADS, build_plan

DEVICES_PER_NODE = 2
FAILED = 4
UNAVAILABLE = 77
"""Exit status where nodes cannot be made, as automake's tests use it."""
STARTING_S = 100.0
"""What a profiler may take beyond its budget: two processes that import jax and find each other, the last reading."""
LATER_SHARE = 0.4
"""Of the time left, for each later rate: it finds the layers measured and the programs compiled."""
LEAST_BYTES = 2**20
"""Collectives must be measured at least up to this size: the plans move messages of up to 4 MiB."""
ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> int:
    """Run the benchmark; return 0, 4 when a node failed, or 77 when nodes cannot be made here."""
    options = _parser().parse_args(arguments)
    if options.clean_stale:
        print("\n".join(clean_stale()))
        return 0
    if why := why_unavailable():
        print(f"skipped: {why}", file=sys.stderr)
        return UNAVAILABLE
    clean_stale()
    end_s, rates, done = time.monotonic() + options.limit_s, options.rate.split(","), True
    for position, rate in enumerate(rates):
        folder = options.out / f"{options.nodes}x{DEVICES_PER_NODE}-{rate}"
        folder.mkdir(parents=True, exist_ok=True)
        left_s = end_s - time.monotonic()
        until_s = end_s - (len(rates) - 1 - position) * LATER_SHARE * left_s
        with EmulatedCluster(options.nodes, rate, logs=options.logs) as nodes:
            done = _measure(nodes, options, folder, until_s) and done
    return 0 if done else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.emulated_cluster")
    add = parser.add_argument
    add("--nodes", type=int, default=2)
    add("--rate", default="20mbit,40mbit", help="rates of the links, one run each (%(default)s)")
    add("--batch", type=int, default=8, help="samples of one step (%(default)s)")
    add("--plans", help="names of plans, separated by commas (all)")
    add("--rounds", type=int, default=4, help="steps of each plan (%(default)s)")
    add("--profile-s", type=float, default=240.0, help="budget of the hardware profiler; of the model's, half of it")
    add("--limit-s", type=float, default=1200.0, help="for everything (%(default)s)")
    add("--out", type=Path, default=Path("benchmarks/records/emulated"))
    add("--logs", type=Path, default=Path("/tmp/emulated-logs"))
    add(
        "--cache", type=Path, default=Path("/tmp/emulated-cache"), help="compiled programs: a second rate compiles none"
    )
    add("--keep-profiles", action="store_true", help="use the profiles that are in --out")
    add("--clean-stale", action="store_true", help="only remove what a killed run left behind")
    parser.set_defaults(measured=set())  # profiles of this very run
    return parser


def _measure(nodes: EmulatedCluster, options: argparse.Namespace, folder: Path, until_s: float) -> bool:
    """Profile, predict, run, compare at one rate, until a monotonic time; False when a node failed."""
    hardware_file, model_file = folder / "hardware.json", options.out / "model.json"
    mesh, rate = f"{options.nodes}x{DEVICES_PER_NODE}", nodes.rate
    profiler = [sys.executable, "-m", "galvatron_jax.profilers"]
    if not _is_fresh(model_file, options):
        budget_s = options.profile_s / 2
        layers = ["--model", NAME, "--samples", "1,4,8", "--tp", "1,2,4", "--out", str(model_file)]
        command = [*profiler, "model", "--mesh", mesh, "--budget-s", str(budget_s), *layers]
        if not _run(nodes, options, command, budget_s + STARTING_S):
            return False
        options.measured.add(model_file)
    if not _is_fresh(hardware_file, options):
        command = [*profiler, "hardware", "--mesh", mesh, "--budget-s", str(options.profile_s)]
        if not _run(nodes, options, [*command, "--out", str(hardware_file)], options.profile_s + STARTING_S):
            return False
    model, hardware = load(model_file, ModelProfile), load(hardware_file, HardwareProfile)
    if missing := _not_measured(hardware):
        print(f"{rate}: not measured within --profile-s: {', '.join(missing)}; predictions lack it", file=sys.stderr)
    plans = _write_plans(options, folder, model, hardware)
    steps_file = folder / "steps.json"
    worker = [sys.executable, "-m", "benchmarks.emulated_cluster.worker", str(plans), str(options.rounds)]
    left_s = until_s - time.monotonic()
    result = _run(nodes, options, [*worker, str(left_s - STARTING_S / 2), str(steps_file)], left_s)
    if result is None:
        return False
    records = _records(plans, json.loads(steps_file.read_text()), hardware, result.foreign_load, rate, options.nodes)
    for name, record in records.items():
        save(record, folder / f"{name.replace(' ', '-')}.json")
    if left := sorted({path.stem for path in plans.glob("*.json")} - set(records)):
        print(f"{rate}: no time left for {', '.join(left)}", file=sys.stderr)
    shutil.rmtree(plans)
    steps_file.unlink()
    print(_table(records, rate), flush=True)
    return True


def _is_fresh(file: Path, options: argparse.Namespace) -> bool:
    """Tell whether a profile need not be measured: made in this run, or kept from an earlier one."""
    return file.exists() and (options.keep_profiles or file in options.measured)


def _not_measured(hardware: HardwareProfile) -> list[str]:
    """Return what the plans need of the hardware and the profiler had no time for."""
    names = ("overlap_slowdown", "intra_node", "inter_node", "collectives")
    missing = [name for name in names if not hardware.sources.get(name, "").startswith("measured")]
    tables: dict[tuple[str, int, bool], float] = {
        (t.kind, t.group, t.inside_node): t.sizes_bytes[-1] for t in hardware.collectives
    }
    wanted = itertools.product(("all-reduce", "all-gather", "reduce-scatter"), ((2, True), (2, False), (4, False)))
    missing += [
        f"{kind} of {group} {'inside' if inside else 'across'} up to {LEAST_BYTES / 2**20:g} MiB"
        for kind, (group, inside) in wanted
        if tables.get((kind, group, inside), 0.0) < LEAST_BYTES
    ]
    return missing


def _write_plans(options: argparse.Namespace, folder: Path, model: ModelProfile, hardware: HardwareProfile) -> Path:
    """Write every plan with its prediction, before anything runs; return their folder."""
    cluster = Cluster(nodes=options.nodes, gpus_per_node=DEVICES_PER_NODE, gpu="cpu")
    plans = folder / "plans"
    shutil.rmtree(plans, ignore_errors=True)
    for name in options.plans.split(",") if options.plans else SPREADS:
        plan = build_plan(name, model, cluster, options.batch)
        save_plan(msgspec.structs.replace(plan, predicted=estimate_plan(plan, model, hardware)), plans / f"{name}.json")
    return plans


def _run(nodes: EmulatedCluster, options: argparse.Namespace, command: list[str], limit_s: float) -> RunResult | None:
    flags = f"--xla_force_host_platform_device_count={DEVICES_PER_NODE} "
    flags += "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
    environ = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environ |= {"JAX_COMPILATION_CACHE_DIR": str(options.cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    result = nodes.run(command, limit_s=limit_s, environ={**os.environ, **environ})
    print(f"{' '.join(command[1:5])} ...: foreign load {result.foreign_load:.0%}", file=sys.stderr)
    for node in result.nodes:
        if node.returncode:
            end = "ran out of time" if node.timed_out else f"ended with {node.returncode}"
            print(f"node {node.node} {end}:\n{node.log[-3000:]}", file=sys.stderr)
    return None if result.failed else result


def _records(
    plans: Path, steps: dict[str, list[float]], hardware: HardwareProfile, load_share: float, rate: str, nodes: int
) -> dict[str, RunRecord]:
    assert hardware.provenance is not None
    return {
        name: RunRecord(
            plan=load_plan(plans / f"{name}.json"),
            provenance=hardware.provenance,
            processes=nodes,
            step_times_s=tuple(times),
            mfu=0.0,
            machine_load=min(1.0, load_share),
            note=f"emulated nodes, {rate}, {'held out' if name in HELD_OUT else 'open'}",
        )
        for name, times in steps.items()
        if times
    }


def _table(records: dict[str, RunRecord], rate: str) -> str:
    """Predicted beside measured, fastest first, and what matters: errors, and the regret of picking by prediction."""
    rows = [f"{rate:>18}  measured  fastest  predicted   error"]
    ordered = sorted(records.items(), key=lambda item: item[1].step_time_s)
    for name, record in ordered:
        predicted = record.plan.predicted
        assert predicted is not None
        low, error = min(record.step_times_s), record.time_error or 0.0
        rows.append(f"{name:>18}  {record.step_time_s:8.3f}  {low:7.3f}  {predicted.step_time_s:9.3f}  {error:+7.1%}")
    errors = [abs(record.time_error or 0.0) for record in records.values()]
    picked = min(records.values(), key=lambda r: r.plan.predicted.step_time_s if r.plan.predicted else 0.0)
    regret = picked.step_time_s / ordered[0][1].step_time_s - 1
    rows.append(
        f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}, regret of the pick {regret:.1%}"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
