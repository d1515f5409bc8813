"""Random small problems: models of a few layers, odd clusters, hardware on which different strategies win.

The models know every choice of the space: remat dots, Ulysses, kv heads that tensor parallelism exceeds, tied
embeddings, side values that cross stages. Rules of the user (``_rules``) leave a few strategies of each, other ones in
every problem, so that trying all plans ends.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from galvatron_jax.cluster import Cluster, parse_cluster
from galvatron_jax.plan import Training
from galvatron_jax.profile import (
    Array,
    Boundary,
    Collective,
    HardwareProfile,
    LayerKind,
    LayerRun,
    Link,
    ModelProfile,
    Ulysses,
)
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._rules import Rule, forbid, pin
from galvatron_jax.search._space import Limits
from tests.search.brute_force import plan_count
from tests.support.toy_models import llama_like_profile, toy_hardware

KINDS = {"e": "embed", "l": "layers.*", "h": "head", "d": "decoder.*"}

SHAPES: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("1x1", "e1 l7 h1", (2, 4)),
    ("1x1", "l1", (1,)),
    ("1x2", "e1 l1 h1", (2, 4)),
    ("1x2", "l3", (4,)),
    ("1x2", "e1 l2 h1", (2,)),
    ("1x2", "l4", (4,)),
    ("2x1", "e1 l2", (4,)),
    ("1x3", "l2 h1", (3,)),
    ("1x3", "l3", (3,)),
    ("3x2", "l2", (6,)),
    ("3x1", "e1 l1 h1", (3,)),
    ("3x1", "l6", (6,)),
    ("2x2", "l2", (8,)),
    ("2x2", "l1 h1", (4,)),
    ("2x2", "l4", (2,)),
    ("2x2", "l5", (4,)),
    ("1x4", "l2", (4,)),
    ("1x4", "l5", (1,)),
    ("1x2", "l1 d1 l1", (4,)),
    ("2x1", "e1 l1 d2 h1", (2,)),
    ("1x2", "l1 d2 h1", (4,)),
    ("1x6", "l1 h1", (6,)),
    ("5x1", "l5", (5,)),
    ("4x1", "l7", (2,)),
)
"""(mesh, layers, global batches), each small enough to try everything."""

ZEROS = ("zero=0|1", "zero=0|2", "zero=0|3", "zero=0|1|2|3")
REMATS = ("remat=none", "remat=dots", "remat=full", "remat=none|dots", "remat=none|full", "remat=dots|full")
PROHIBITIONS = (
    "tp",
    "sp",
    "ulysses",
    "hsdp",
    "sp=no, tp>1",
    "replicas=1, zero=3",
    "remat=none, zero=0",
    "zero=0, dp>1",
)
MOST_PLANS = 1200
"""Of a problem: as many are tried one by one in about half a second."""


class Small(NamedTuple):
    """A problem before a memory budget is chosen."""

    model: ModelProfile
    cluster: Cluster
    hardware: HardwareProfile
    batches: tuple[int, ...]
    limits: Limits

    def problem(self, budget_bytes: float) -> Problem:
        """Return the problem under a memory budget."""
        return Problem(
            model=self.model,
            cluster=self.cluster,
            hardware=self.hardware,
            training=Training(),
            budget_bytes=budget_bytes,
            limits=self.limits,
        )


def small_problem(seed: int) -> Small:
    """Return problem number ``seed``; every shape comes in turn."""
    draw = random.Random(seed)
    mesh, layers, batches = SHAPES[seed % len(SHAPES)]
    model, cluster, hardware = model_of(layers, draw), parse_cluster(mesh), random_hardware(draw)
    for fewest in (*[MOST_PLANS // 20] * 30, *[1] * 100):
        limits = Limits(rules=random_rules(draw))
        if fewest <= plan_count(model, cluster, hardware, batches, limits) <= MOST_PLANS:
            return Small(model, cluster, hardware, batches, limits)
    raise AssertionError(f"no rules leave a problem of the right size: {mesh} {layers}")


def random_rules(draw: random.Random) -> tuple[Rule, ...]:
    """Return rules that leave a handful of strategies."""
    forbidden = draw.sample(PROHIBITIONS, draw.randint(1, 5))
    return (pin(draw.choice(ZEROS)), pin(draw.choice(REMATS)), *(forbid(text) for text in forbidden))


def model_of(layers: str, draw: random.Random) -> ModelProfile:
    """Return a model with the layers that ``layers`` names, for example ``"e1 l7 h1"``."""
    heads = draw.choice([4, 6, 12])
    model = llama_like_profile(
        layers=1,
        embed=draw.choice([64, 128, 512]),
        heads=heads,
        head_dim=draw.choice([32, 64]),
        mlp=draw.choice([192, 768, 1536]),
        vocab=draw.choice([384, 3000, 5001]),
        seq=draw.choice([1, 12, 128, 512, 1024]),
        kv_heads=draw.choice([heads, heads, 2, 1]),
    )
    kinds = tuple(with_every_choice(kind) for kind in model.kinds)
    decoder = with_side_value(kinds[1], recomputed=draw.random() < 0.3)
    if draw.random() < 0.3:
        kinds = (*kinds[:2], with_tied_parameters(kinds[2]))
    runs = tuple(LayerRun(kind=KINDS[word[0]], count=int(word[1:])) for word in layers.split())
    used = {run.kind for run in runs}
    kinds = tuple(kind for kind in (*kinds, decoder) if kind.name in used)
    return msgspec.structs.replace(model, layers=runs, kinds=kinds)


def with_every_choice(kind: LayerKind) -> LayerKind:
    """Return the kind with remat dots, Ulysses, and kv heads that spill into their groups; edges stand alone."""
    heads = ("heads",) if "heads" in kind.classes else ()
    swapped = Array(dtype="bfloat16", classes=("batch", "seq", "embed"), count=4)
    swaps = tuple(
        Collective(phase=phase, kind="all-to-all", array=swapped, merged_count=4, recomputed=phase == "forward")
        for phase in ("forward", "backward")
        if heads
    )
    kept = tuple(array for array in kind.residuals if "heads" not in array.classes or "group" in array.classes)
    candidates = tuple(
        msgspec.structs.replace(candidate, spill={"heads": "group"} if heads else {}) for candidate in kind.candidates
    )
    return msgspec.structs.replace(
        kind,
        dots=tuple(msgspec.structs.replace(dot, batched=dot.attention) for dot in kind.dots),
        residuals_dots=kept,
        ulysses=Ulysses(classes=heads, collectives=swaps),
        candidates=candidates,
        repeated=kind.name not in ("embed", "head"),
    )


def with_side_value(kind: LayerKind, *, recomputed: bool) -> LayerKind:
    """Return a decoder layer: it takes what an earlier layer left, besides the stream."""
    (stream,) = kind.inputs
    side = Boundary(array=stream.array, gradient=True, recomputed=recomputed)
    return msgspec.structs.replace(kind, name="decoder.*", inputs=(stream, side))


def with_tied_parameters(kind: LayerKind) -> LayerKind:
    """Return a head whose kernel an embedding keeps too."""
    norm, kernel = kind.parameters
    return msgspec.structs.replace(kind, parameters=(norm, msgspec.structs.replace(kernel, tied=True)))


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
        program_s=draw.choice([0.0, 10 ** draw.uniform(-5, -2)]),
        eager_bytes=draw.choice([0.0, 10 ** draw.uniform(3, 8)]),
    )


def quantile(values: Sequence[int], share: float) -> int:
    """Return the value below which ``share`` of the distinct ``values`` lie."""
    ordered = sorted(set(values))
    return ordered[int(share * (len(ordered) - 1))]
