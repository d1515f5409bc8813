"""``python -m benchmarks.emulated_cluster --rate 20mbit,40mbit``: profile, predict, run and compare, on emulated nodes.

For each rate: our own hardware profiler measures the nodes' collectives (several processes, gloo), the computation
profiler measures the model's layers once; every plan is predicted from these two profiles *before* it runs; then all
run in turn through ``auto_shard``. Records go to ``--out``, one for each rate and plan, with the machine's other load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
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
UNAVAILABLE = 77
"""Exit status where nodes cannot be made, as automake's tests use it."""
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
    for rate in options.rate.split(","):
        folder = options.out / f"{options.nodes}x{DEVICES_PER_NODE}-{rate}"
        folder.mkdir(parents=True, exist_ok=True)
        with EmulatedCluster(options.nodes, rate, logs=options.logs) as nodes:
            if not _measure(nodes, options, folder, rate):
                return 4
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.emulated_cluster")
    add = parser.add_argument
    add("--nodes", type=int, default=2)
    add("--rate", default="20mbit,40mbit", help="rates of the links, one run each (%(default)s)")
    add("--batch", type=int, default=8, help="samples of one step (%(default)s)")
    add("--plans", help="names of plans, separated by commas (all)")
    add("--rounds", type=int, default=4, help="steps of each plan (%(default)s)")
    add("--profile-s", type=float, default=240.0, help="budget of each profiler (%(default)s)")
    add("--limit-s", type=float, default=1500.0, help="for one run of all plans (%(default)s)")
    add("--out", type=Path, default=Path("benchmarks/records/emulated"))
    add("--logs", type=Path, default=Path("/tmp/emulated-logs"))
    add(
        "--cache", type=Path, default=Path("/tmp/emulated-cache"), help="compiled programs: a second rate compiles none"
    )
    add("--keep-profiles", action="store_true", help="use the profiles that are in --out")
    add("--clean-stale", action="store_true", help="only remove what a killed run left behind")
    return parser


def _measure(nodes: EmulatedCluster, options: argparse.Namespace, folder: Path, rate: str) -> bool:
    """Profile, predict, run, compare at one rate; False when a node failed."""
    hardware_file, model_file = folder / "hardware.json", options.out / "model.json"
    mesh = f"{options.nodes}x{DEVICES_PER_NODE}"
    profiler = [sys.executable, "-m", "galvatron_jax.profilers"]
    budget = ["--mesh", mesh, "--budget-s", str(options.profile_s)]
    if not (options.keep_profiles and model_file.exists()):
        layers = ["--model", NAME, "--samples", "1,4,8", "--tp", "1,2,4", "--out", str(model_file)]
        if not _run(nodes, options, [*profiler, "model", *budget, *layers], options.profile_s + 200):
            return False
    if not (options.keep_profiles and hardware_file.exists()):
        command = [*profiler, "hardware", *budget, "--out", str(hardware_file)]
        if not _run(nodes, options, command, options.profile_s + 200):
            return False
    model, hardware = load(model_file, ModelProfile), load(hardware_file, HardwareProfile)
    cluster = Cluster(nodes=options.nodes, gpus_per_node=DEVICES_PER_NODE, gpu="cpu")
    names = options.plans.split(",") if options.plans else list(SPREADS)
    plans = folder / "plans"
    shutil.rmtree(plans, ignore_errors=True)
    for name in names:
        plan = build_plan(name, model, cluster, options.batch)
        save_plan(msgspec.structs.replace(plan, predicted=estimate_plan(plan, model, hardware)), plans / f"{name}.json")
    steps_file = folder / "steps.json"
    worker = [sys.executable, "-m", "benchmarks.emulated_cluster.worker", str(plans), str(options.rounds)]
    result = _run(nodes, options, [*worker, str(steps_file)], options.limit_s)
    if result is None:
        return False
    records = _records(plans, json.loads(steps_file.read_text()), hardware, result.foreign_load, rate, options.nodes)
    for name, record in records.items():
        save(record, folder / f"{name.replace(' ', '-')}.json")
    shutil.rmtree(plans)
    steps_file.unlink()
    print(_table(records, rate))
    return True


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
