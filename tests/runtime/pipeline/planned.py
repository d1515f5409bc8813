"""Pipelined plans written in one line, their programs, and what one device makes of the same model.

"d.3 t2 | s4r d.1 t2"     two stages: data parallel with zero 3, tp 2; tp 4 with sp and remat, zero 1, tp 2

d  data parallel        tN  tensor parallel        sN  the same with sequence parallelism        uN  Ulysses
.N zero level           /R  replicas (hsdp)        r   remat full             k   remat dots
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import optax

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, ScheduleName, Stage, Strategy, check_plan, model_reference
from galvatron_jax.runtime import PipelinePrograms
from tests.support.fused_models import fused, shared
from tests.support.small_models import SmallModel, small_llama, transformers
from tests.zoo import ZOO

DEVICES, BATCH, STEPS = 8, 16, 3
SGD_RATE, ADAM_RATE = 0.1, 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipelined plan of a model."""

    stages: str
    microbatches: int = 4
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    model: str = "llama"
    optimizer: str = "sgd"
    nodes: int = 1


@functools.cache
def model_of(name: str) -> SmallModel:
    """Return a small model by name: of the zoo, or one of ours."""
    llama = functools.partial(small_llama, batch=BATCH, seq=16, layers=4, vocab=64, embed=32, mlp=48, kv_heads=4)
    if name == "llama":
        return llama()
    if name == "llama, bf16":
        return llama(dtype="bfloat16")
    if name == "llama, tied":
        return llama(tied=True)
    if name == "fused":
        return fused(layers=3, batch=BATCH)
    if name == "fused, shared":
        return shared(layers=2, batch=BATCH)
    if name == "dropout":
        small = transformers(count=4, dropout=0.25)
        return SmallModel(small.build, small.loss, np.tile(small.batch, (4, 1, 1)))
    case = ZOO[name]()
    batch = jax.tree.map(lambda x: np.concatenate([np.roll(x, k, axis=-1) for k in range(BATCH // len(x))]), case.batch)
    return SmallModel(case.build, case.loss, batch)


@functools.cache
def analysis_of(name: str, samples: int) -> Analysis:
    """Return the analysis of a model at a microbatch of ``samples``."""
    model = model_of(name)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype), model.batch)
    return analyse_model(model.build, model.loss, spec, name=name)


def plan_of(case: Case, devices: int = DEVICES) -> Plan:
    """Return the checked plan of a case."""
    analysis = analysis_of(case.model, BATCH // case.microbatches)
    stages = [text.split() for text in case.stages.split("|")]
    count = devices // (len(stages) // case.chunks)
    kinds = iter([segment.kind for segment in analysis.cut.segments])
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=case.nodes, gpus_per_node=devices // case.nodes, gpu="cpu"),
        global_batch=BATCH,
        microbatches=case.microbatches,
        schedule=case.schedule,
        chunks=case.chunks,
        stages=tuple(
            Stage(
                devices=count,
                runs=tuple(PlanRun(kind=next(kinds), count=1, strategy=strategy(word, count)) for word in words),
            )
            for words in stages
        ),
    )
    check_plan(plan, analysis.profile)
    return plan


def strategy(word: str, devices: int) -> Strategy:
    """Return the strategy that a word names, on ``devices`` devices."""
    match = re.fullmatch(r"(d|[tsu][0-9]+)(?:\.([0-3]))?(?:/([0-9]+))?([rk]?)", word)
    assert match, word
    kind, degree = match[1][0], int(match[1][1:] or 1)
    return Strategy(
        tp=1 if kind == "u" else degree,
        sp=kind == "s",
        ulysses=degree if kind == "u" else 1,
        dp=devices // degree,
        zero=int(match[2] or 0),
        replicas=int(match[3] or 1),
        remat={"": "none", "r": "full", "k": "dots"}[match[4]],  # type: ignore[arg-type]
    )


def programs_of(case: Case) -> PipelinePrograms:
    """Return the programs of a case on the virtual devices."""
    analysis = analysis_of(case.model, BATCH // case.microbatches)
    return PipelinePrograms(analysis, plan_of(case), optimizer_of(case.optimizer), jax.devices()[:DEVICES])


def optimizer_of(name: str) -> optax.GradientTransformation:
    """Clip by the global norm, then SGD with momentum or AdamW with decayed matrices only."""
    rule = (
        optax.sgd(SGD_RATE, momentum=0.9)
        if name == "sgd"
        else optax.adamw(ADAM_RATE, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    )
    return optax.chain(optax.clip_by_global_norm(0.5), rule)


# --------------------------------------------------------------------------------------------------------------- runs
Arrays = dict[str, np.ndarray[Any, Any]]
"""By path."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What three steps gave."""

    losses: list[float]
    norms: list[float]
    parameters: Arrays
    """After the last step."""


def batches(model: SmallModel) -> list[Any]:
    """Three batches: the model's own, its samples in other orders and its sequences turned."""
    orders = [np.random.default_rng(k).permutation(BATCH) for k in range(STEPS)]
    return [jax.tree.map(lambda x, o=order: np.asarray(x)[o], model.batch) for order in orders]


@functools.cache
def reference(name: str, optimizer: str) -> Run:
    """Take the steps on one device, with the model as it is."""
    user, rule = analysis_of(name, BATCH).trace.model, optimizer_of(optimizer)
    parameters, rest = user.build()

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: user.run(p, rest, batch)[0])(parameters)
        updates, state = rule.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, optax.global_norm(gradients)

    state, losses, norms = rule.init(parameters), [], []
    for batch in batches(model_of(name)):
        parameters, state, loss, norm = step(parameters, state, batch)
        losses.append(float(loss))
        norms.append(float(norm))
    return Run(losses, norms, by_path(parameters))


def run(case: Case) -> Run:
    """Take the steps under the plan."""
    programs = programs_of(case)
    states, losses, norms = programs.adopt(*programs.analysis.trace.model.build()), [], []
    for batch in batches(model_of(case.model)):
        states, metrics = programs.train(states, programs.place_batch(jax.tree.leaves(batch)))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
        assert bool(metrics.finite)
    return Run(losses, norms, by_path(programs.to_user(states).parameters))


def by_path(tree: Any) -> Arrays:
    """Leaves by their path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
