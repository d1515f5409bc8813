"""Compile the plans of the ledger for 16 H100, without a GPU, and write one raw record each.

    python -m benchmarks.accuracy.compile [NAME ...]      # default: those without a record; needs the extra [verify]

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

from galvatron_jax.errors import GalvatronError
from galvatron_jax.verify import StageCheck, verify_plan
from galvatron_jax.verify._report import as_data

from .plans import CASES, Case, plan_of, random_cases

RECORDS = Path(__file__).parents[1] / "records" / "memory"


def record_path(name: str) -> Path:
    """Return the file of a plan's record."""
    return RECORDS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def compile_case(name: str, case: Case) -> dict[str, Any]:
    """Return the record of one plan."""
    plan = plan_of(case)
    found = verify_plan(plan, model=f"benchmarks.accuracy.models:{case.model}")
    (stage,) = as_data(found)["stages"]
    (check,) = found.stages
    return {
        "name": name,
        "model": case.model,
        "plan": msgspec.to_builtins(plan),
        "compiled": _compiled(check),
        "alive_at_peak": stage["categories"]["alive_at_peak"],
        "collectives": [_row(row) for row in stage["collectives"] if row["compiled_count"]],
        "rematerialised_by_xla": stage["rematerialised_by_xla"],
        "warnings": stage["warnings"],
        "compile_s": stage["compile_s"],
        "versions": stage["versions"],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _compiled(check: StageCheck) -> dict[str, int]:
    memory = check.compiled.memory
    return {**msgspec.to_builtins(memory), "allocated": memory.allocated}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    names = ("kind", "group_size", "compiled_count", "compiled_bytes", "estimated_s", "exposed_s")
    return {name: row[name] for name in names}


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(names: list[str]) -> None:
    """Compile the named plans, or all that have no record yet."""
    cases = {**CASES, **random_cases()}
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in cases if not record_path(name).exists()]:
        try:
            record = compile_case(name, cases[name])
        except GalvatronError as error:
            print(f"{name}: {error.message}", file=sys.stderr, flush=True)
            continue
        record_path(name).write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: peak {record['compiled']['peak'] / 2**30:.2f} GiB, {record['compile_s']:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
