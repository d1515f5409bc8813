"""The command ``python -m galvatron_jax.profilers memory``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from .._document import load
from .._user_model import named_model
from ..cluster import parse_cluster
from ..plan import Plan
from ..units import format_seconds
from ._layer_report import memory_rows
from ._memory import MemoryOrder, measure_memory
from ._memory_probe import ProbeSession
from ._report import plain_table


def run_memory(options: argparse.Namespace, progress_line: Callable[[str, int, int, float], None]) -> int:
    """Compile the probes, write the profile, say what came of it; return the exit code.

    Args:
        options: Of the command line.
        progress_line: Shows (text, done, total, seconds left).
    """
    own = ":" in options.model
    name = options.model.rpartition(":")[2] if own else options.model.strip().lower()
    preset = {"seq": options.seq, "dtype": options.dtype, "fused_attention": options.attention == "fused"}
    order = MemoryOrder(
        model=named_model(options.model, **preset),
        name=name,
        session=ProbeSession(
            model=options.model if own else name,
            **preset,
            cluster=parse_cluster(options.mesh, gpu=options.gpu),
            state_bytes_per_parameter=options.state_bytes,
        ),
        out=options.out,
        plans=tuple(load(path, Plan) for path in options.plan),
        budget_s=options.budget_s,
        resume=options.resume,
    )
    start_s = time.monotonic()
    result = measure_memory(order, show=lambda p: progress_line(p.probe.text, p.done, p.total, p.left_s))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(plain_table(memory_rows(result.profile), headings=("", "kept by a layer", "workspace")))
    print(f"wrote {options.out} in {format_seconds(time.monotonic() - start_s)}")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if not result.complete:
        print("note: the same command with --resume compiles what was left out", file=sys.stderr)
    return 0
