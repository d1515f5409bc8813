"""Compile the plans of the ledger for 16 H100, without a GPU, and write one raw record each.

    python -m benchmarks.accuracy.compile [NAME ...]      # default: those without a record; needs the extra [verify]
                                                          # "fused": also pip install --no-deps nvidia-cudnn-cu12

A record holds what the compiler said and the plan it said it of; no estimate, so that a better formula is judged by the
same records (``benchmarks.accuracy.ledger``). 10 to 40 s per plan on two idle cores.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: here it only traces

import msgspec

from galvatron_jax.analysis import has_cudnn
from galvatron_jax.errors import GalvatronError, ToolchainError
from galvatron_jax.verify import StageCheck, Verification, verify_plan
from galvatron_jax.verify._report import as_data

from .plans import Case, all_cases, asks_for_kernels, plan_of

RECORDS = Path(__file__).parents[1] / "records" / "memory"


def record_path(name: str) -> Path:
    """Return the file of a plan's record."""
    return RECORDS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def compile_case(name: str, case: Case) -> dict[str, Any]:
    """Return the record of one plan; of a pipeline, ``stages`` has one entry for each device slice."""
    plan = plan_of(case)
    if asks_for_kernels(case.model) and not has_cudnn():
        raise ToolchainError("cuDNN is not installed", action="pip install --no-deps nvidia-cudnn-cu12")
    found = verify_plan(plan, model=f"benchmarks.accuracy.models:{case.model}")
    stages = as_data(found)["stages"]
    parts = [_slice(found, stages, s) for s in range(plan.slices)]
    return {
        "name": name,
        "model": case.model,
        "plan": msgspec.to_builtins(plan),
        "fused_attention": any(check.attention_is_fused for check in found.stages),
        **(parts[0] if len(parts) == 1 else {"stages": parts}),
        "compile_s": round(found.compiled.compile_s, 3),
        "versions": found.compiled.versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _slice(found: Verification, stages: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return what the stages on one slice of devices were compiled to; they share its memory."""
    mine, check = stages[number :: found.plan.slices], found.stages[number]
    return {
        "compiled": _compiled(check),
        "categories": check.compiled.memory.categories,
        "fullest": mine[0]["fullest"],
        "alive_at_peak": mine[0]["categories"]["alive_at_peak"],
        "collectives": [_row(row) for stage in mine for row in stage["collectives"] if row["compiled_count"]],
        "rematerialised_by_xla": sum(stage["rematerialised_by_xla"] for stage in mine),
        "warnings": [warning for stage in mine for warning in stage["warnings"]],
    }


def _compiled(check: StageCheck) -> dict[str, int]:
    """Return the bytes of the train step, or of a slice's devices over a step of its programs."""
    memory, calls = check.compiled.memory, check.compiled.calls
    step = msgspec.to_builtins(calls[0].program.memory) if len(calls) == 1 else {}
    return {**step, "peak": memory.peak, "allocated": memory.allocated}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    names = ("kind", "group_size", "compiled_count", "compiled_bytes", "estimated_s", "exposed_s")
    return {name: row[name] for name in names}


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(names: list[str]) -> None:
    """Compile the named plans, or all that have no record yet."""
    cases = all_cases()
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in cases if not record_path(name).exists()]:
        try:
            record = compile_case(name, cases[name])
        except GalvatronError as error:
            print(f"{name}: {error.message}", file=sys.stderr, flush=True)
            continue
        record_path(name).write_text(json.dumps(record, indent=1) + "\n")
        peak = max(part["compiled"]["peak"] for part in record.get("stages", [record]))
        print(f"{name}: peak {peak / 2**30:.2f} GiB, {record['compile_s']:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
