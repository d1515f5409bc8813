"""A Llama of 1.1 B parameters on one GPU in bf16, through ``auto_shard``, beside the same step written by hand.

python benchmarks/one_stage/llama_1b.py             on the visible GPU: step times in turn, MFU, peak memory
python benchmarks/one_stage/llama_1b.py --toy       the same of a toy on one CPU device: does everything run?
python benchmarks/one_stage/llama_1b.py --compile   both programs compiled for one H100 that is not there: peaks

Both do the same work: full remat, AdamW, gradient norm, no update where it is not finite. Then ``auto_shard`` without a
plan: what the search chooses. One JSON object a line.

    MFU = (6 N + 12 L E S) * tokens / step time / peak FLOP/s

N parameters that take part in products (all but the embedding table), L layers of width E, sequence S: products of
forward and backward pass, whole scores (nothing is taken off for the causal mask), no recomputation (PaLM, appendix B).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if {"--toy", "--compile"} & set(sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hand_written import make_step, shapes
from jax.sharding import AxisType, Mesh

from galvatron_jax import auto_shard
from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.hardware import load_hardware
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.runtime import StagePrograms, compiler_options, plan_model, stage_mesh

LARGE = LlamaConfig(seq=2048, vocab=32000, embed=2048, mlp=5632, layers=22, heads=32, kv_heads=32, dtype="bfloat16")
TOY = dataclasses.replace(LARGE, seq=32, vocab=64, embed=32, mlp=64, layers=3, heads=2, kv_heads=2)
BATCH, PAIRS, WARM = 8, 20, 3


def plan_of(config: LlamaConfig, gpu: str) -> tuple[Any, Plan]:
    """Return the analysis, and the plan of one device that recomputes every layer."""
    tokens = jax.ShapeDtypeStruct((BATCH, config.seq), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    analysis = analyse_model(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, batch)
    runs = tuple(
        PlanRun(kind=segment.kind, count=1, strategy=Strategy(remat="full")) for segment in analysis.cut.segments
    )
    cluster = Cluster(nodes=1, gpus_per_node=1, gpu=gpu)
    stages = (Stage(devices=1, runs=runs),)
    return analysis, Plan(model=model_reference(analysis.profile), cluster=cluster, global_batch=BATCH, stages=stages)


def model_flops(config: LlamaConfig) -> float:
    """Return the FLOPs of a step that MFU counts (see the module docstring)."""
    leaves = jax.tree.leaves(shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    weights = sum(int(np.prod(shape)) for shape in leaves) - config.vocab * config.embed
    return (6 * weights + 12 * config.layers * config.embed * config.seq) * BATCH * config.seq


def by_hand(config: LlamaConfig, device: Any) -> Any:
    """Return the hand-written step, its abstract state and where its batch goes."""
    mesh = Mesh(np.array([device], dtype=object), ("d",), axis_types=(AxisType.Auto,))
    return make_step(config, mesh, optax.adamw(3e-4), sharded=False)


def compile_both() -> None:
    """Compile both programs for one H100."""
    from jax.experimental import topologies

    from galvatron_jax.verify._target import load_target

    target = load_target("h100")
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    analysis, plan = plan_of(LARGE, "h100")
    stage = plan_model(analysis, plan, stage_mesh(plan.cluster, topology.devices))
    programs = StagePrograms(stage, optax.adamw(3e-4), 1)
    tokens = jax.ShapeDtypeStruct((BATCH, LARGE.seq), jnp.int32)
    train: Any = programs.train
    mine = train.lower(programs.abstract_state, [tokens, tokens]).compile()
    step, abstract, _ = by_hand(LARGE, topology.devices[0])
    lowered = step.lower(abstract, {"inputs": tokens, "targets": tokens})
    theirs = lowered.compile(compiler_options=compiler_options(programs.model.mesh))
    peaks = [program.memory_analysis().peak_memory_in_bytes for program in (mine, theirs)]
    report(what="compiled for one H100", peak_bytes=peaks[0], hand_written_peak_bytes=peaks[1])


def measure(config: LlamaConfig) -> None:
    """Time the steps in turn."""
    device = jax.devices()[0]
    hardware = load_hardware(device.device_kind)
    _, plan = plan_of(config, hardware.name)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (BATCH, config.seq + 1), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def build() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0))

    steps = {"auto_shard": ours(build, batch, plan), "hand-written": theirs(config, device, batch)}
    flops, peak = model_flops(config), hardware.matmul_flops_per_s["bfloat16"]
    for name, seconds in timed(steps).items():
        report(what=name, step_s=seconds, mfu=flops / seconds / peak, memory=peak_memory(device))
    del steps
    (seconds,) = timed({"searched": ours(build, batch, None)}).values()
    report(what="auto_shard, searched plan", step_s=seconds, mfu=flops / seconds / peak, memory=peak_memory(device))


def ours(build: Callable[[], Llama], batch: Any, plan: Plan | None) -> Callable[[], Any]:
    """Return a step of ``auto_shard`` on one batch."""
    sharded = auto_shard(build, plan=plan, optimizer=optax.adamw(3e-4))
    return lambda: (sharded.step(batch).loss, sharded.state)


def theirs(config: LlamaConfig, device: Any, batch: Any) -> Callable[[], Any]:
    """Return a hand-written step on one batch."""
    step, abstract, place = by_hand(config, device)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(np.asarray(0.02 * rng.normal(size=x.shape), x.dtype), x.sharding), abstract
    )
    held, fed = [state], jax.device_put(batch, place)

    def run() -> Any:
        held[0], loss = step(held[0], fed)
        return held[0], loss

    return run


def timed(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each step; all are run in turn, in changing order."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(PAIRS + WARM):
        for name in sorted(steps, reverse=bool(turn % 2)):
            start = time.perf_counter()
            jax.block_until_ready(steps[name]())
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[WARM:]) for name, seconds in found.items()}


def peak_memory(device: Any) -> int | None:
    """Return the most bytes in use on the device so far; None where it does not count."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def report(**found: Any) -> None:
    """Print one result as a line of JSON."""
    print(json.dumps({**found, "batch": BATCH, "jax": jax.__version__, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    if "--compile" in sys.argv:
        compile_both()
    else:
        measure(TOY if "--toy" in sys.argv else LARGE)
