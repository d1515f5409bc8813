"""How the search grows: over layers, devices, memory budget and kinds of layers.

    python benchmarks/search_growth.py [--limit SECONDS] [--sweep NAME] [--out FOLDER]

Every problem runs in a fresh process, cold, and reports processor seconds (of that process alone, so that other work on
the machine counts little), wall seconds and peak memory. Writes ``search_growth_<date>.md`` and ``.json`` beside this
file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import memory_budget
from galvatron_jax.hardware import load_hardware
from galvatron_jax.models import load_model_profile
from galvatron_jax.profile import LayerRun, ModelProfile
from galvatron_jax.search import find_plan


class Case(NamedTuple):
    """One problem."""

    sweep: str
    model: str
    layers: int
    kinds: int
    """Kinds of repeated layers, in equal runs one after the other."""
    mesh: str
    memory: float
    """Share of the GPU's default budget."""
    repeats: int = 1
    """How often the runs of all kinds follow each other."""


CASES = (
    *(Case("layers", "llama3-8b", n, 1, "4x8", 1.0) for n in (16, 32, 64, 128, 256, 512)),
    *(Case("devices", "llama2-7b", 32, 1, mesh, 1.0) for mesh in ("1x2", "1x4", "2x8", "8x8", "32x8", "128x8")),
    *(Case("memory", "llama3-8b", 32, 1, "2x8", share) for share in (0.3, 0.45, 0.6, 0.8, 1.0)),
    *(Case("kinds", "llama3-8b", 32, n, "4x8", 1.0) for n in (1, 2, 4, 8)),
    Case("mixed", "llama3-8b", 1000, 2, "128x8", 1.0, 4),
    Case("mixed", "llama3-8b", 1000, 2, "128x8", 1.0, 500),
    Case("mixed", "llama3-8b", 1000, 5, "128x8", 1.0, 5),
    *(Case("named", model, 0, 1, mesh, 1.0) for model, mesh in (("llama2-7b", "2x8"), ("llama3-70b", "64x8"))),
)


def model_of(case: Case) -> ModelProfile:
    """Return the preset with the case's layers (0: its own); kinds differ in the width of their MLP."""
    model = load_model_profile(case.model)
    if not case.layers:
        return model
    embed, block, head = model.kinds
    blocks = [
        msgspec.structs.replace(
            block, name=f"{block.name}{i or ''}", classes={**block.classes, "mlp": block.classes["mlp"] + 1024 * i}
        )
        for i in range(case.kinds)
    ]
    count = case.layers // case.kinds // case.repeats
    runs = [LayerRun(kind=kind.name, count=count) for kind in blocks * case.repeats]
    ends = LayerRun(kind=embed.name, count=1), LayerRun(kind=head.name, count=1)
    return msgspec.structs.replace(model, layers=(ends[0], *runs, ends[1]), kinds=(embed, *blocks, head))


def measure(case: Case, limit_s: float) -> dict[str, object]:
    """Search once, here and now."""
    hardware, started = load_hardware("h100"), time.monotonic()
    found = find_plan(
        model_of(case),
        parse_cluster(case.mesh),
        hardware,
        memory_bytes=int(case.memory * memory_budget(hardware)),
        time_limit_s=limit_s,
    )
    assert found.plan.certificate is not None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **case._asdict(),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.monotonic() - started, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "candidates": found.candidates,
        "solved": found.solved,
        "optimal": found.plan.certificate.optimal,
        "gap": found.plan.certificate.gap,
        "schedule": found.plan.schedule if len(found.plan.stages) > 1 else "one stage",
    }


def in_fresh_process(case: Case, limit_s: float) -> dict[str, object]:
    """Run one case in a process of its own; a case that fails says why."""
    command = [sys.executable, __file__, "--limit", str(limit_s), "--one", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10 * limit_s + 60)
    if done.returncode:
        return {**case._asdict(), "failed": done.stderr.strip().splitlines()[-1][:160]}
    row: dict[str, object] = json.loads(done.stdout)
    return row


def as_markdown(rows: list[dict[str, object]], date: str) -> str:
    """Return the result file."""
    columns = ["sweep", "model", "layers", "kinds", "repeats", "mesh", "memory", "processor_s", "wall_s", "peak_mib"]
    columns += ["candidates", "solved", "optimal", "gap", "schedule"]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"# Growth of the search, {date}",
        "",
        f"`python benchmarks/search_growth.py` on {platform.processor() or platform.machine()}, {os.cpu_count()} cores,"
        f" Python {platform.python_version()}; load average at the end {load}: under load wall seconds say little, and"
        " processor seconds rise too. layers 0: the preset's own. `gap` is what a time limit left unproven.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [str(row.get(column, "-")) for column in columns]
        lines.append("| " + " | ".join(cells) + " |" + (f" failed: {row['failed']}" if "failed" in row else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="time limit of one search")
    parser.add_argument("--sweep", help="only this one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(Case(*json.loads(options.one)), options.limit)))
        return
    rows = [in_fresh_process(case, options.limit) for case in CASES if options.sweep in (None, case.sweep)]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    (options.out / f"search_growth_{date}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / f"search_growth_{date}.md").write_text(as_markdown(rows, date))


if __name__ == "__main__":
    main()
