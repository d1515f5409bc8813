"""The plans of the ledger: each family of strategies on each model, and random ones that nobody looked at before.

``fitted`` plans are those whose compiled programs were read while the memory formulas were written; all others are held
out: they judge. Random plans come from a seed and the legality rules alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import jax

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, ScheduleName, Stage, Strategy, model_reference, strategy_violations
from galvatron_jax.profile import ModelProfile

from . import models

CLUSTER = Cluster(nodes=2, gpus_per_node=8, gpu="h100")
RANDOM_SEED, RANDOM_PLANS = 2026, 14
LARGEST_SAMPLES = 4
"""Samples per device of a random plan: every one compiles within a GPU's memory."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan of one model on ``CLUSTER``."""

    model: str
    """Function of ``models``."""
    global_batch: int
    blocks: tuple[tuple[Strategy, int], ...]
    """Strategies of the repeated layers in order, with the share of the layers that each takes (of the sum)."""
    edges: Strategy
    """Strategy of embedding and head."""
    microbatches: int = 1
    fitted: bool = False
    slices: int = 1
    """Device slices; several: a pipeline, layers cut evenly over ``slices * chunks`` stages."""
    schedule: ScheduleName = "1f1b"
    chunks: int = 1


def case(
    model: str,
    global_batch: int,
    *strategies: Strategy,
    edges: Strategy | None = None,
    m: int = 1,
    fitted: bool = False,
) -> Case:
    """Return a case; without ``edges`` embedding and head take the first strategy, unsharded along the sequence."""
    first = strategies[0]
    edges = edges or Strategy(tp=first.tp, sp=first.sp, ulysses=first.ulysses, dp=first.dp, zero=first.zero)
    return Case(model, global_batch, tuple((s, 1) for s in strategies), edges, m, fitted)


_7B, _70B, _100M = "llama_7b_four_layers", "llama_70b_three_layers", "llama_100m"
_GPT2, _BERT, _VIT = "gpt2_large_six_layers", "bert_large_eight_layers", "vit_huge_six_layers"
_13B, _8B = "llama_13b_ten_layers", "llama_8b_six_layers"
S = Strategy

CASES: dict[str, Case] = {
    "7B, dp, remat": case(_7B, 32, S(dp=16, remat="full"), fitted=True),
    "7B, zero 1": case(_7B, 32, S(dp=16, zero=1), fitted=True),
    "7B, zero 2": case(_7B, 32, S(dp=16, zero=2), fitted=True),
    "7B, zero 2, remat, 4 microbatches": case(_7B, 64, S(dp=16, zero=2, remat="full"), m=4, fitted=True),
    "7B, fsdp": case(_7B, 32, S(dp=16, zero=3), fitted=True),
    "7B, fsdp, remat": case(_7B, 32, S(dp=16, zero=3, remat="full"), fitted=True),
    "7B, fsdp, remat, 2 microbatches": case(_7B, 64, S(dp=16, zero=3, remat="full"), m=2, fitted=True),
    "7B, tp 8, sp, zero 1": case(_7B, 8, S(tp=8, sp=True, dp=2, zero=1), fitted=True),
    "7B, tp 8, sp, zero 1, remat": case(_7B, 32, S(tp=8, sp=True, dp=2, zero=1, remat="full"), fitted=True),
    "7B, tp 4, sp, zero 3": case(_7B, 16, S(tp=4, sp=True, dp=4, zero=3), fitted=True),
    "7B, fsdp, dots": case(_7B, 32, S(dp=16, zero=3, remat="dots")),
    "7B, hsdp 2, remat": case(_7B, 32, S(dp=16, zero=3, replicas=2, remat="full")),
    "7B, ulysses 4, fsdp": case(_7B, 16, S(ulysses=4, dp=4, zero=3)),
    "7B, tp 8, zero 1, remat": case(_7B, 8, S(tp=8, dp=2, zero=1, remat="full")),
    "7B, tp 4, zero 2, 2 microbatches": case(_7B, 16, S(tp=4, dp=4, zero=2), m=2),
    "7B, tp 2, zero 3, remat": case(_7B, 32, S(tp=2, dp=8, zero=3, remat="full")),
    "7B, fsdp without and with remat": case(_7B, 32, S(dp=16, zero=3), S(dp=16, zero=3, remat="full")),
    "7B, tp 2 then fsdp": case(_7B, 32, S(tp=2, sp=True, dp=8, zero=3), S(dp=16, zero=3), fitted=True),
    "7B whole, fsdp, remat": case("llama_7b", 64, S(dp=16, zero=3, remat="full"), m=2),
    "7B whole, fsdp": case("llama_7b", 32, S(dp=16, zero=3)),
    "7B whole, tp 8, sp, zero 1, remat": case("llama_7b", 32, S(tp=8, sp=True, dp=2, zero=1, remat="full"), m=2),
    "70B, fsdp, remat": case(_70B, 16, S(dp=16, zero=3, remat="full")),
    "70B, tp 8, sp, zero 3": case(_70B, 4, S(tp=8, sp=True, dp=2, zero=3)),
    "70B, tp 8, sp, zero 1, remat": case(_70B, 8, S(tp=8, sp=True, dp=2, zero=1, remat="full"), m=2),
    "70B, tp 4, sp, fsdp, dots": case(_70B, 8, S(tp=4, sp=True, dp=4, zero=3, remat="dots")),
    "70B, hsdp 2": case(_70B, 16, S(dp=16, zero=3, replicas=2, remat="full"), m=1),
    "100M, zero 1": case(_100M, 128, S(dp=16, zero=1), fitted=True),
    "100M, fsdp, remat": case(_100M, 256, S(dp=16, zero=3, remat="full"), fitted=True),
    "100M, tp 2, sp, zero 1": case(_100M, 128, S(tp=2, sp=True, dp=8, zero=1), fitted=True),
    "100M, dp, 4 microbatches": case(_100M, 256, S(dp=16), m=4),
    "100M, zero 1, 2 microbatches": case(_100M, 128, S(dp=16, zero=1), m=2),
    "7B, zero 1, 4 microbatches": case(_7B, 64, S(dp=16, zero=1), m=4),
    "7B, fsdp, 4 microbatches": case(_7B, 64, S(dp=16, zero=3), m=4),
    "7B, tp 4, sp, zero 1, dots, 4 microbatches": case(_7B, 32, S(tp=4, sp=True, dp=4, zero=1, remat="dots"), m=4),
    "GPT-2, zero 1, 8 microbatches": case(_GPT2, 256, S(dp=16, zero=1), m=8),
    "BERT, dp, 4 microbatches": case(_BERT, 1024, S(dp=16), m=4),
    "ViT, dp, 3 microbatches": case(_VIT, 384, S(dp=16), m=3),
    "GPT-2, dp": case(_GPT2, 64, S(dp=16)),
    "GPT-2, zero 2, dots": case(_GPT2, 128, S(dp=16, zero=2, remat="dots")),
    "GPT-2, fsdp, remat, 2 microbatches": case(_GPT2, 256, S(dp=16, zero=3, remat="full"), m=2),
    "GPT-2, tp 4, sp": case(_GPT2, 64, S(tp=4, sp=True, dp=4, zero=1)),
    "BERT, dp": case(_BERT, 256, S(dp=16)),
    "BERT, zero 1, 2 microbatches": case(_BERT, 512, S(dp=16, zero=1), m=2),
    "BERT, fsdp, remat": case(_BERT, 512, S(dp=16, zero=3, remat="full")),
    "BERT, tp 2, zero 2": case(_BERT, 256, S(tp=2, dp=8, zero=2)),
    "ViT, dp, remat": case(_VIT, 512, S(dp=16, remat="full")),
    "ViT, zero 3": case(_VIT, 256, S(dp=16, zero=3)),
    "ViT, tp 2, zero 1": case(_VIT, 256, S(tp=2, dp=8, zero=1), edges=S(dp=16, zero=1)),
    "7B whole, zero 1, remat, 4 microbatches": case("llama_7b", 64, S(dp=16, zero=1, remat="full"), m=4, fitted=True),
    "13B, fsdp, remat": case(_13B, 32, S(dp=16, zero=3, remat="full")),
    "13B, tp 4, sp, zero 1, 4 microbatches": case(_13B, 32, S(tp=4, sp=True, dp=4, zero=1), m=4),
    "13B, dp, remat, 2 microbatches": case(_13B, 32, S(dp=16, remat="full"), m=2),
    "8B, tp 8, sp, zero 3, remat": case(_8B, 8, S(tp=8, sp=True, dp=2, zero=3, remat="full")),
    "8B, zero 2, dots, 2 microbatches": case(_8B, 32, S(dp=16, zero=2, remat="dots"), m=2),
    "8B, fsdp, then tp 4, sp": case(_8B, 32, S(dp=16, zero=3), S(tp=4, sp=True, dp=4, zero=3)),
    "ViT, zero 3, none, dots, full": case(
        _VIT, 256, S(dp=16, zero=3), S(dp=16, zero=3, remat="dots"), S(dp=16, zero=3, remat="full")
    ),
}


def piped(found: Case, slices: int, schedule: ScheduleName = "1f1b", chunks: int = 1) -> Case:
    """Return a case as a pipeline: its strategies are those of a slice's devices."""
    return dataclasses.replace(found, slices=slices, schedule=schedule, chunks=chunks)


PIPELINES: dict[str, Case] = {
    "7B, pp 2, zero 1, remat": piped(case(_7B, 64, S(dp=8, zero=1, remat="full"), m=4, fitted=True), 2),
    "7B, pp 2, tp 4, sp, zero 1": piped(case(_7B, 16, S(tp=4, sp=True, dp=2, zero=1), m=4), 2),
    "7B, pp 4, fsdp, gpipe": piped(case(_7B, 64, S(dp=4, zero=3, remat="full"), m=4), 4, "gpipe"),
    "70B, pp 2, tp 8, sp": piped(case(_70B, 8, S(tp=8, sp=True, dp=1), m=4), 2),
    "100M, pp 2, dp, interleaved": piped(case(_100M, 256, S(dp=8), m=4), 2, "interleaved-1f1b", 2),
    "GPT-2, pp 2, zero 2, dots": piped(case(_GPT2, 128, S(dp=8, zero=2, remat="dots"), m=4), 2),
    "BERT, pp 4, zero 1": piped(case(_BERT, 256, S(dp=4, zero=1), m=4, fitted=True), 4),
    "7B whole, pp 2, dp, remat": piped(case("llama_7b", 64, S(dp=8, remat="full"), m=4, fitted=True), 2),
    "7B whole, pp 2, zero 1, remat": piped(case("llama_7b", 64, S(dp=8, zero=1, remat="full"), m=4, fitted=True), 2),
    "7B whole, pp 2, fsdp, remat": piped(case("llama_7b", 64, S(dp=8, zero=3, remat="full"), m=4), 2),
    "7B whole, pp 4, tp 4, sp": piped(case("llama_7b", 8, S(tp=4, sp=True, dp=1), m=4), 4),
    "13B, pp 2, zero 2, remat": piped(case(_13B, 64, S(dp=8, zero=2, remat="full"), m=4), 2),
    "13B, pp 4, zero 1": piped(case(_13B, 16, S(dp=4, zero=1), m=4), 4),
    "8B, pp 2, tp 4, sp, zero 1, remat": piped(case(_8B, 16, S(tp=4, sp=True, dp=2, zero=1, remat="full"), m=4), 2),
    "ViT, pp 4, zero 1, gpipe": piped(case(_VIT, 256, S(dp=4, zero=1), m=4), 4, "gpipe"),
    "7B, pp 2, fsdp, remat": piped(case(_7B, 64, S(dp=8, zero=3, remat="full"), m=4, fitted=True), 2),
    "7B, pp 4, fsdp": piped(case(_7B, 16, S(dp=4, zero=3), m=4), 4),
    "8B, pp 4, fsdp, remat": piped(case(_8B, 32, S(dp=4, zero=3, remat="full"), m=4, fitted=True), 4),
    "8B, pp 4, zero 1, dots": piped(case(_8B, 32, S(dp=4, zero=1, remat="dots"), m=4), 4),
    "13B, pp 4, fsdp, remat": piped(case(_13B, 32, S(dp=4, zero=3, remat="full"), m=4), 4),
    "13B, pp 4, tp 2, sp, zero 1, dots": piped(case(_13B, 16, S(tp=2, sp=True, dp=2, zero=1, remat="dots"), m=4), 4),
    "70B, pp 2, fsdp, remat": piped(case(_70B, 16, S(dp=8, zero=3, remat="full"), m=2), 2),
    "GPT-2, pp 4, fsdp, remat": piped(case(_GPT2, 64, S(dp=4, zero=3, remat="full"), m=4), 4),
    "GPT-2, pp 4, zero 2": piped(case(_GPT2, 128, S(dp=4, zero=2), m=4), 4),
}
"""Plans of several stages."""

_7B_FUSED, _70B_FUSED = "llama_7b_fused", "llama_70b_nine_layers_fused"
_GPT2_FUSED, _BERT_FUSED = "gpt2_large_six_layers_fused", "bert_large_eight_layers_fused"

FUSED: dict[str, Case] = {
    "7B whole, fused, fsdp, 8 microbatches": case(_7B_FUSED, 512, S(dp=16, zero=3), edges=S(dp=16, zero=1), m=8),
    "7B whole, fused, fsdp, remat": case(_7B_FUSED, 64, S(dp=16, zero=3, remat="full")),
    "7B whole, fused, hsdp 2, dots": case(_7B_FUSED, 32, S(dp=16, zero=3, replicas=2, remat="dots")),
    "7B whole, fused, tp 8, sp, zero 1": case(_7B_FUSED, 16, S(tp=8, sp=True, dp=2, zero=1)),
    "7B whole, fused, ulysses 4, fsdp": case(_7B_FUSED, 16, S(ulysses=4, dp=4, zero=3)),
    "7B whole, fused, pp 2, zero 1": piped(case(_7B_FUSED, 64, S(dp=8, zero=1), m=8), 2),
    "70B, fused, tp 8, sp, zero 3, remat": case(_70B_FUSED, 16, S(tp=8, sp=True, dp=2, zero=3, remat="full")),
    "70B, fused, fsdp, dots": case(_70B_FUSED, 16, S(dp=16, zero=3, remat="dots")),
    "GPT-2, fused, zero 1, 2 microbatches": case(_GPT2_FUSED, 256, S(dp=16, zero=1), m=2),
    "GPT-2, fused, fsdp, dots": case(_GPT2_FUSED, 256, S(dp=16, zero=3, remat="dots")),
    "BERT, fused, dp": case(_BERT_FUSED, 512, S(dp=16)),
    "BERT, fused, tp 2, zero 2, remat": case(_BERT_FUSED, 512, S(tp=2, dp=8, zero=2, remat="full")),
}
"""Plans of models that ask for cuDNN's attention; chosen before any of their programs was compiled."""


def all_cases() -> dict[str, Case]:
    """Return every plan of the ledger by name."""
    return {**CASES, **FUSED, **PIPELINES, **random_cases()}


def profile_of(model: str) -> ModelProfile:
    """Return the present profile of a model: estimates are made with the analysis as it is now."""
    return _analysis_of(model).profile


def asks_for_kernels(model: str) -> bool:
    """Tell whether a model's attention runs by a kernel where there is one."""
    return _analysis_of(model).asks_for_kernels


@functools.cache
def _analysis_of(model: str) -> Analysis:
    build, loss, batch = getattr(models, model)()
    # A batch of one sample has no batch dimension to shard.
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((CLUSTER.devices, *x.shape[1:]), x.dtype), batch)
    return analyse_model(build, loss, batch, name=model)


def plan_of(case: Case) -> Plan:
    """Return the plan of a case for the model as it is analysed now."""
    profile = profile_of(case.model)
    total = sum(run.count for run in profile.layers if _is_block(run.kind))
    blocks = _dealt(case.blocks, total)
    layers = [
        (run.kind, blocks.pop(0) if _is_block(run.kind) else case.edges)
        for run in profile.layers
        for _ in range(run.count)
    ]
    count = case.slices * case.chunks
    cuts = [round(s * len(layers) / count) for s in range(count + 1)]
    stages = tuple(
        Stage(devices=CLUSTER.devices // case.slices, runs=_runs(layers[start:stop]))
        for start, stop in itertools.pairwise(cuts)
    )
    return Plan(
        model=model_reference(profile),
        cluster=CLUSTER,
        global_batch=case.global_batch,
        microbatches=case.microbatches,
        schedule=case.schedule,
        chunks=case.chunks,
        stages=stages,
    )


def _runs(layers: list[tuple[str, Strategy]]) -> tuple[PlanRun, ...]:
    """Equal neighbours as one run."""
    return tuple(
        PlanRun(kind=kind, count=len(list(group)), strategy=strategy)
        for (kind, strategy), group in itertools.groupby(layers)
    )


def random_cases() -> dict[str, Case]:
    """Return legal plans drawn from a seed: never looked at, they only judge."""
    draw = random.Random(RANDOM_SEED)
    found: dict[str, Case] = {}
    while len(found) < RANDOM_PLANS:
        model = draw.choice([_7B, _70B, _100M, _GPT2, _BERT, _VIT])
        blocks, edges = _random_strategy(draw), _random_strategy(draw)
        m, samples = draw.choice([1, 1, 2, 4]), draw.choice([1, 2, LARGEST_SAMPLES])
        candidate = Case(model, samples * m * CLUSTER.devices // blocks.inner, ((blocks, 1),), edges, m)
        if _is_legal(candidate):
            found[f"random {len(found) + 1}: {model.split('_')[0]} {model.split('_')[1]}, {blocks}, edges {edges}"] = (
                candidate
            )
    return found


def _random_strategy(draw: random.Random) -> Strategy:
    inner = draw.choice([1, 1, 2, 4, 8])
    style = draw.choice(["tp", "sp", "ulysses"]) if inner > 1 else ""
    zero = draw.choice([0, 1, 2, 3, 3])
    return Strategy(
        tp=inner if style in ("tp", "sp") else 1,
        sp=style == "sp",
        ulysses=inner if style == "ulysses" else 1,
        dp=CLUSTER.devices // inner,
        zero=zero,
        replicas=draw.choice([1, 1, 2]) if zero and inner < 8 else 1,
        remat=draw.choice(["none", "dots", "full"]),
    )


def _is_legal(candidate: Case) -> bool:
    plan, profile = plan_of(candidate), profile_of(candidate.model)
    return not any(
        strategy_violations(profile.kind(run.kind), run.strategy, plan.microbatch_size)
        for stage in plan.stages
        for run in stage.runs
    )


def _is_block(kind: str) -> bool:
    return kind not in ("embed", "head")


def _dealt(blocks: tuple[tuple[Strategy, int], ...], layers: int) -> list[Strategy]:
    """Give each strategy its share of ``layers``, in order."""
    total, ahead, dealt = sum(share for _, share in blocks), 0, list[Strategy]()
    for strategy, share in blocks:
        ahead += share
        dealt += [strategy] * (layers * ahead // total - len(dealt))
    return dealt
