"""Random small problems: models of a few layers, odd clusters, hardware on which different strategies win."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from galvatron_jax.cluster import Cluster, parse_cluster
from galvatron_jax.plan import Training
from galvatron_jax.profile import HardwareProfile, LayerRun, Link, ModelProfile
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._space import Limits
from tests.support.toy_models import llama_like_profile, toy_hardware

KINDS = {"e": "embed", "l": "layers.*", "h": "head"}

SHAPES: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("1x1", "e1 l7 h1", (2, 4)),
    ("1x1", "l1", (1,)),
    ("1x2", "e1 l1 h1", (2, 4)),
    ("1x2", "l3", (4,)),
    ("1x2", "l3", (2,)),
    ("1x2", "l2 h1", (2,)),
    ("2x1", "e1 l2", (4,)),
    ("1x3", "l2 h1", (3,)),
    ("1x3", "l3", (3,)),
    ("3x2", "l2", (6,)),
    ("3x1", "e1 l1 h1", (3,)),
    ("3x1", "l5", (2,)),
    ("2x2", "l2", (8,)),
    ("2x2", "l1 h1", (4,)),
    ("2x2", "l4", (1,)),
    ("1x4", "l2", (4,)),
    ("1x4", "l5", (1,)),
)
"""(mesh, layers, global batches), each small enough to try everything."""


class Small(NamedTuple):
    """A problem before a memory budget is chosen."""

    model: ModelProfile
    cluster: Cluster
    hardware: HardwareProfile
    batches: tuple[int, ...]

    def problem(self, budget_bytes: float, limits: Limits | None = None) -> Problem:
        """Return the problem under a memory budget."""
        return Problem(
            model=self.model,
            cluster=self.cluster,
            hardware=self.hardware,
            training=Training(),
            budget_bytes=budget_bytes,
            limits=limits or Limits(),
        )


def small_problem(seed: int) -> Small:
    """Return problem number ``seed``; every shape comes in turn."""
    draw = random.Random(seed)
    mesh, layers, batches = SHAPES[seed % len(SHAPES)]
    return Small(model_of(layers, draw), parse_cluster(mesh), random_hardware(draw), batches)


def model_of(layers: str, draw: random.Random) -> ModelProfile:
    """Return a model with the layers that ``layers`` names, for example ``"e1 l7 h1"``."""
    model = llama_like_profile(
        layers=1,
        embed=draw.choice([64, 128, 512]),
        heads=draw.choice([4, 6, 12]),
        head_dim=draw.choice([32, 64]),
        mlp=draw.choice([192, 768, 1536]),
        vocab=draw.choice([384, 3000, 5001]),
        seq=draw.choice([1, 12, 128, 512, 1024]),
    )
    runs = tuple(LayerRun(kind=KINDS[word[0]], count=int(word[1:])) for word in layers.split())
    return msgspec.structs.replace(model, layers=runs)


def random_hardware(draw: random.Random) -> HardwareProfile:
    """Return a device whose compute, memory and links stand in any proportion."""
    return toy_hardware(
        matmul_flops_per_s={"bfloat16": 10 ** draw.uniform(11, 14), "float32": 1e13},
        memory_bandwidth_bytes_per_s=10 ** draw.uniform(10, 12),
        kernel_launch_s=draw.choice([0.0, 1e-6, 1e-5]),
        intra_node=Link(bandwidth_bytes_per_s=10 ** draw.uniform(8.5, 11.5), latency_s=draw.choice([0.0, 1e-6, 1e-5])),
        inter_node=Link(bandwidth_bytes_per_s=10 ** draw.uniform(8, 11), latency_s=draw.choice([0.0, 1e-5, 1e-4])),
        overlap_slowdown=draw.choice([1.0, 1.3]),
        fused_attention=draw.random() < 0.7,
    )


def quantile(values: Sequence[int], share: float) -> int:
    """Return the value below which ``share`` of the distinct ``values`` lie."""
    ordered = sorted(set(values))
    return ordered[int(share * (len(ordered) - 1))]
