"""Collectives as XLA's partitioner leaves them, before the passes of a backend rewrite them."""

from __future__ import annotations

from pathlib import Path

import jax

from galvatron_jax.verify import HloCollective, collectives


def partitioned_collectives(lowered: jax.stages.Lowered, folder: Path) -> list[HloCollective]:
    """Compile a program; return its collectives right after partitioning.

    Args:
        lowered: The program.
        folder: An empty one, for XLA to write to.
    """
    lowered.compile({"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (text,) = [path.read_text() for path in folder.glob("*.after_spmd-partitioning*.txt")]
    return collectives(text)
