"""Presets of the space: families that practitioners know by name, as rules and stage limits."""

from __future__ import annotations

from typing import NamedTuple

from ..cluster import Cluster
from ._rules import Rule, pin

SPACES = ("dp", "fsdp", "megatron", "3d", "full")


class Space(NamedTuple):
    """A part of the whole space."""

    rules: tuple[Rule, ...] = ()
    max_stages: int | None = None


def named_space(name: str, cluster: Cluster) -> Space:
    """Return the space called ``name``, one of ``SPACES``.

    * ``dp``: data parallelism, whole states on every device; remat is free.
    * ``fsdp``: data parallelism with any ZeRO level, over all ranks or inside groups (hsdp).
    * ``megatron``: tensor parallelism inside a node with sequence parallelism, times data parallelism with ZeRO 0 or 1.
    * ``3d``: the same with pipeline stages.
    * ``full``: everything.
    """
    alone = pin("tp=1, ulysses=1", where=f"--space {name}")
    if name == "dp":
        return Space((alone, pin("zero=0")), 1)
    if name == "fsdp":
        return Space((alone,), 1)
    if name in ("megatron", "3d"):
        node = pin(f"tp<={cluster.gpus_per_node}, ulysses=1, zero<=1, replicas=1")
        with_sp = Rule(conditions=pin("tp>1, sp=no").conditions, forbids=True)
        return Space((node, with_sp), 1 if name == "megatron" else None)
    return Space()
