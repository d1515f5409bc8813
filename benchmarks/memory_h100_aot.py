"""Estimated against compiled peak memory, for 2x8 H100 and no GPU: writes one Markdown table and the raw numbers.

    python -m benchmarks.memory_h100_aot OUT.md OUT.json [NAME ...]

Needs the extra ``[verify]``; 20 to 40 s per plan on two idle cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: structure hashes come from the analysis, on no device

from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.units import GIB
from galvatron_jax.verify import Verification, verify_plan
from galvatron_jax.verify._report import as_data

from . import aot_models

CLUSTER = Cluster(nodes=2, gpus_per_node=8, gpu="h100")
LAYERS = {"llama_7b_four_layers": 4, "llama_100m": 8}


class Case(NamedTuple):
    """One plan: blocks under ``strategy``, embedding and head likewise but without rematerialisation."""

    model: str
    global_batch: int
    microbatches: int
    strategy: Strategy


def wide(global_batch: int, microbatches: int, **strategy: Any) -> Case:
    """A case of the four-layer model of 7B width."""
    return Case("llama_7b_four_layers", global_batch, microbatches, Strategy(**strategy))


def small(global_batch: int, microbatches: int, **strategy: Any) -> Case:
    """A case of the whole 100M model."""
    return Case("llama_100m", global_batch, microbatches, Strategy(**strategy))


CASES = {
    "dp, remat": wide(32, 1, dp=16, remat="full"),
    "zero 1": wide(32, 1, dp=16, zero=1),
    "zero 2": wide(32, 1, dp=16, zero=2),
    "zero 2, remat, 4 microbatches": wide(64, 4, dp=16, zero=2, remat="full"),
    "fsdp": wide(32, 1, dp=16, zero=3),
    "fsdp, remat": wide(32, 1, dp=16, zero=3, remat="full"),
    "fsdp, remat, 2 microbatches": wide(64, 2, dp=16, zero=3, remat="full"),
    "tp 8, sp, zero 1": wide(8, 1, dp=2, tp=8, sp=True, zero=1),
    "tp 8, sp, zero 1, remat": wide(32, 1, dp=2, tp=8, sp=True, zero=1, remat="full"),
    "tp 8, zero 1, remat": wide(8, 1, dp=2, tp=8, zero=1, remat="full"),
    "tp 4, sp, zero 3": wide(16, 1, dp=4, tp=4, sp=True, zero=3),
    "tp 4, zero 2, 2 microbatches": wide(16, 2, dp=4, tp=4, zero=2),
    "tp 2, zero 3, remat": wide(32, 1, dp=8, tp=2, zero=3, remat="full"),
    "100M, zero 1": small(128, 1, dp=16, zero=1),
    "100M, fsdp, remat": small(256, 1, dp=16, zero=3, remat="full"),
    "100M, tp 2, sp, zero 1": small(128, 1, dp=8, tp=2, sp=True, zero=1),
}


def plan_for(case: Case) -> Plan:
    """Return the plan of a case."""
    model, loss, batch = getattr(aot_models, case.model)()
    profile = analyse_model(model, loss, batch, name=case.model).profile
    s = case.strategy
    edge = Strategy(tp=s.tp, sp=s.sp, dp=s.dp, zero=s.zero)
    runs = [PlanRun(kind=r.kind, count=r.count, strategy=s if "*" in r.kind else edge) for r in profile.layers]
    return Plan(
        model=model_reference(profile),
        cluster=CLUSTER,
        global_batch=case.global_batch,
        microbatches=case.microbatches,
        stages=(Stage(devices=CLUSTER.devices, runs=tuple(runs)),),
    )


def row(name: str, found: Verification) -> str:
    """One line of the table."""
    (check,) = found.stages
    memory = check.compiled.memory
    sizes = (check.estimate.peak_bytes, memory.peak, memory.allocated)
    return (
        f"| {name} | "
        + " | ".join(f"{size / GIB:.3f}" for size in sizes)
        + f" | {100 * check.error:+.1f} % | {check.compiled.compile_s:.0f} |"
    )


def main(table_file: str, raw_file: str, *names: str) -> None:
    """Compile all cases (or those named) and write both files after each."""
    raw: dict[str, Any] = {}
    lines = [
        "| plan | estimated peak, GiB | compiled peak | allocated | error | compile, s |",
        "|---|---|---|---|---|---|",
    ]
    errors = []
    for name in names or CASES:
        case = CASES[name]
        found = verify_plan(plan_for(case), model=f"benchmarks.aot_models:{case.model}")
        lines.append(row(name, found))
        errors.append(abs(found.stages[0].error))
        print(lines[-1], flush=True)
        raw[name] = {"case": {**case._asdict(), "strategy": str(case.strategy)}, **as_data(found)}
        Path(raw_file).write_text(json.dumps(raw, indent=1) + "\n")
        summary = f"median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %"
        Path(table_file).write_text("\n".join([*lines, "", summary]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
