"""Overhead of the runtime's one-stage step against a hand-written one, and compile time against depth.

python benchmarks/one_stage/run.py time [N [FOURS [STARTS]]]  step time on 8 (or N) virtual CPU devices, in pairs, in
                                             processes of their own (``paired.py``)
python benchmarks/one_stage/run.py same [N [FOURS [STARTS]]]  the hand-written step against itself: what a ratio can say
python benchmarks/one_stage/run.py program   the same two programs as compiled: FLOP, bytes, kernels, collectives
python benchmarks/one_stage/run.py memory    the same two programs compiled for 8 H100 without a GPU: bytes at the peak
python benchmarks/one_stage/run.py depth     trace, lowering and compile time and program length for 8 to 128 layers
python benchmarks/one_stage/run.py mixed     the same for 32 layers under several strategies, against one strategy
python benchmarks/one_stage/run.py mixed h100     the same, 7B width, compiled for 8 H100 without a GPU
python benchmarks/one_stage/run.py dispatch  host time of one call of the compiled step, result not awaited

Each prints one JSON object a line. Timings need a machine that does nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from hand_written import make_step  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402
from paired import paired_times, pooled  # noqa: E402

from galvatron_jax.analysis import analyse_model  # noqa: E402
from galvatron_jax.cluster import Cluster  # noqa: E402
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss  # noqa: E402
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, check_plan, model_reference  # noqa: E402
from galvatron_jax.runtime import StagePrograms, compiler_options, plan_model, stage_mesh  # noqa: E402

DEVICES, LIMIT_S = 8, 600.0
KEPT_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps freed memory. Else the temporary arrays of each step on CPU devices are new pages, 17 000 faults in a
step of 0.25 s of either program, whose time wanders more than what is asked for. (On GPUs XLA keeps its memory.)"""
PLANS = {"fsdp": Strategy(dp=8, zero=3, remat="full"), "dp": Strategy(dp=8, remat="full")}
TENSOR, SUMMED = Strategy(tp=2, dp=4, remat="full"), Strategy(dp=8, zero=2)
MIXED = {
    "one strategy": [PLANS["fsdp"]] * 32,
    "two, a run each": [PLANS["fsdp"]] * 20 + [TENSOR] * 12,
    "three, a run each": [PLANS["fsdp"]] * 13 + [TENSOR] * 12 + [SUMMED] * 7,
    "two, eight runs in turn": ([PLANS["fsdp"]] * 4 + [TENSOR] * 4) * 4,
    "two, layer by layer": [PLANS["fsdp"], TENSOR] * 16,
}
"""Strategies of 32 layers."""
TOY = LlamaConfig(seq=64, vocab=256, embed=64, mlp=128, layers=8, heads=8, kv_heads=8, dtype="float32")
SMALL = LlamaConfig(seq=128, vocab=512, embed=256, mlp=512, layers=8, heads=8, kv_heads=8, dtype="float32")
LARGE = LlamaConfig(seq=4096, vocab=32000, embed=4096, mlp=11008, layers=8, heads=32, kv_heads=32, dtype="bfloat16")


def ours(
    config: LlamaConfig, strategies: list[Strategy], devices: Any, batch: int
) -> tuple[StagePrograms, dict[str, float]]:
    """Return the programs of a plan, and the seconds that the analysis took."""
    tokens = jax.ShapeDtypeStruct((batch, config.seq), jnp.int32)
    start = time.process_time()
    analysis = analyse_model(
        lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens, "targets": tokens}
    )
    analysed = time.process_time() - start
    kinds = [segment.kind for segment in analysis.cut.segments]
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=1, gpus_per_node=len(devices), gpu="h100"),
        global_batch=batch,
        stages=(
            Stage(
                devices=len(devices),
                runs=tuple(PlanRun(kind=k, count=1, strategy=s) for k, s in zip(kinds, strategies, strict=True)),
            ),
        ),
    )
    check_plan(plan, analysis.profile)
    stage = plan_model(analysis, plan, stage_mesh(plan.cluster, devices))
    return StagePrograms(stage, optax.adamw(1e-3), 1), {"analyse_s": analysed}


def hand(config: LlamaConfig, devices: Any, *, sharded: bool) -> Any:
    """Return the hand-written step, its abstract state and where its batch goes."""
    mesh = Mesh(np.array(devices, dtype=object), ("d",), axis_types=(AxisType.Auto,))
    return make_step(config, mesh, optax.adamw(1e-3), sharded=sharded)


def measure_time(devices: str = str(DEVICES), fours: str = "25", starts: str = "3", *, what: str = "ours") -> None:
    """Time both steps in turn in processes of their own: as many fours of steps of each plan and process."""
    pairs = [(what, "hand-written"), ("hand-written", what)]
    found = [_pair_in_process(devices, fours, *pairs[turn % 2]) for turn in range(int(starts))]
    for name in PLANS:
        # What was built first stands first; a is always ours.
        sides = [[pair[:: -1 if turn % 2 else 1] for pair in start[name]] for turn, start in enumerate(found)]
        report(what=f"time (a: {what}, b: hand-written)", plan=name, devices=int(devices), **pooled(sides))


def measure_same(devices: str = str(DEVICES), fours: str = "25", starts: str = "3") -> None:
    """Time the hand-written step against a second build of itself, as ``measure_time`` does."""
    measure_time(devices, fours, starts, what="hand-written")


def _pair_in_process(*arguments: str) -> dict[str, Any]:
    """Return what ``measure_pair`` says in a process of its own."""
    command = [sys.executable, __file__, "pair", *arguments]
    found: dict[str, Any] = json.loads(
        subprocess.check_output(command, env={**os.environ, **KEPT_HEAP}, timeout=LIMIT_S)
    )
    return found


def measure_pair(devices: str, fours: str, *sides: str) -> None:
    """Print the seconds of each four of two ``sides`` for each plan, built in their order; two samples a device."""
    count, found = int(devices), {}
    for name, strategy in PLANS.items():
        tokens = np.random.default_rng(0).integers(0, SMALL.vocab, (2 * count, SMALL.seq + 1), dtype=np.int32)
        given = msgspec.structs.replace(strategy, dp=count), jax.devices()[:count], [tokens[:, :-1], tokens[:, 1:]]
        steps = [_our_steps(*given) if side == "ours" else _hand_steps(*given) for side in sides]
        found[name] = paired_times(*steps, int(fours))
    print(json.dumps(found))


def _our_steps(strategy: Strategy, devices: Any, batch: list[Any]) -> Callable[[], None]:
    programs, _ = ours(SMALL, [strategy] * (SMALL.layers + 2), devices, len(batch[0]))
    state = programs.create(programs.model.share.analysis.trace.model.build)
    return _steps(programs.train, state, programs.place_batch(batch))


def _hand_steps(strategy: Strategy, devices: Any, batch: list[Any]) -> Callable[[], None]:
    step, abstract, place = hand(SMALL, devices, sharded=strategy.zero == 3)
    rng = np.random.default_rng(0)
    state = jax.device_put(
        jax.tree.map(lambda x: np.asarray(0.02 * rng.normal(size=x.shape), x.dtype), abstract),
        jax.tree.map(lambda x: x.sharding, abstract),
    )
    return _steps(step, state, jax.device_put(dict(zip(("inputs", "targets"), batch, strict=True)), place))


def _steps(train: Callable[..., Any], state: Any, batch: Any) -> Callable[[], None]:
    """Return a function that takes the next step and waits for it."""
    held = [state]

    def step() -> None:
        held[0], metrics = train(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return step


def measure_program() -> None:
    """Compile both for virtual CPU devices and count what is in them; nothing is timed."""
    for name, strategy in PLANS.items():
        programs, _ = ours(SMALL, [strategy] * (SMALL.layers + 2), jax.devices()[:DEVICES], 16)
        shape = jax.ShapeDtypeStruct((16, SMALL.seq), jnp.int32)
        step, abstract, _ = hand(SMALL, jax.devices()[:DEVICES], sharded=strategy.zero == 3)
        lowered = {
            "ours": cast(Any, programs.train).lower(programs.abstract_state, [shape, shape]),
            "hand_written": step.lower(abstract, {"inputs": shape, "targets": shape}),
        }
        for who, program in lowered.items():
            compiled = program.compile()
            cost, names = compiled.cost_analysis(), re.findall(r" = (?:\([^=]*?\)|\S+) ([a-z-]+)\(", compiled.as_text())
            kinds = ("all-gather", "all-reduce", "reduce-scatter", "fusion", "copy", "dot")
            report(
                what="program", plan=name, who=who, flops=cost["flops"], bytes_accessed=cost["bytes accessed"],
                temp_bytes=compiled.memory_analysis().temp_size_in_bytes, **{kind: names.count(kind) for kind in kinds},
            )  # fmt: skip


def measure_memory() -> None:
    """Compile both for 8 H100 and compare their peaks."""
    from jax.experimental import topologies

    from galvatron_jax.verify._target import load_target

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{DEVICES}", target_config=load_target("h100")
    )
    for name, strategy in PLANS.items():
        batch = 16
        programs, _ = ours(LARGE, [strategy] * (LARGE.layers + 2), topology.devices, batch)
        shape = jax.ShapeDtypeStruct((batch, LARGE.seq), jnp.int32)
        train: Any = programs.train
        mine = train.lower(programs.abstract_state, [shape, shape]).compile()
        step, abstract, _ = hand(LARGE, topology.devices, sharded=strategy.zero == 3)
        theirs = step.lower(abstract, {"inputs": shape, "targets": shape}).compile(
            compiler_options=compiler_options(programs.model.mesh)
        )
        found = [compiled.memory_analysis() for compiled in (mine, theirs)]
        report(
            what="memory", plan=name, ours_peak_bytes=found[0].peak_memory_in_bytes,
            hand_written_peak_bytes=found[1].peak_memory_in_bytes,
            ours_temp_bytes=found[0].temp_size_in_bytes, hand_written_temp_bytes=found[1].temp_size_in_bytes,
        )  # fmt: skip


def measure_depth() -> None:
    """Trace, lower and compile programs of several depths: seconds of processor time."""
    for layers in (8, 32, 128):
        config = dataclasses.replace(TOY, layers=layers)
        measure_compile("depth", f"uniform {layers}", config, [PLANS["fsdp"]] * (layers + 2), jax.devices()[:DEVICES])


def measure_mixed(gpu: str = "") -> None:
    """Trace, lower and compile 32 layers under one strategy and under several: seconds of processor time."""
    config, devices = dataclasses.replace(LARGE if gpu else TOY, layers=32), jax.devices()[:DEVICES]
    if gpu:
        from jax.experimental import topologies

        from galvatron_jax.verify._target import load_target

        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{DEVICES}", target_config=load_target(gpu)
        )
        devices = topology.devices
    for name, layers in MIXED.items():
        measure_compile("mixed", name, config, [PLANS["fsdp"], *layers, PLANS["fsdp"]], devices)


def measure_compile(what: str, name: str, config: LlamaConfig, strategies: list[Strategy], devices: Any) -> None:
    """Trace, lower and compile one train step; report seconds of processor time, of compiling also on the wall."""
    programs, seconds = ours(config, strategies, devices, 16)
    shape = jax.ShapeDtypeStruct((16, config.seq), jnp.int32)
    train, state = cast(Any, programs.train), programs.abstract_state
    start = processor_s()
    traced = train.trace(state, [shape, shape])
    seconds["trace_s"], start = processor_s() - start, processor_s()
    lowered = traced.lower()
    seconds["lower_s"], start, began = processor_s() - start, processor_s(), time.perf_counter()
    compiled = lowered.compile()
    seconds["compile_s"], seconds["compile_wall_s"] = processor_s() - start, time.perf_counter() - began
    report(what=what, plan=name, layers=config.layers, **seconds, hlo_bytes=len(compiled.as_text() or ""))


def processor_s() -> float:
    """Return the processor time of this process and of those that it started and that ended (``ptxas``)."""
    return sum(os.times()[:4])


def measure_dispatch(calls: int = 50) -> None:
    """Time calls that return before the step is done."""
    programs, _ = ours(SMALL, [PLANS["fsdp"]] * (SMALL.layers + 2), jax.devices()[:DEVICES], 16)
    state = programs.create(programs.model.share.analysis.trace.model.build)
    tokens = np.zeros((16, SMALL.seq), np.int32)
    fed, host = programs.place_batch([tokens, tokens]), []
    for _ in range(calls):
        start = time.perf_counter()
        state, metrics = programs.train(state, fed)
        host.append(time.perf_counter() - start)
        jax.block_until_ready((state, metrics))
    arrays = len(jax.tree.leaves(state)) + len(fed)
    report(what="dispatch", arrays=arrays, median_s=statistics.median(host[5:]))


def report(**found: Any) -> None:
    """Print one result as a line of JSON."""
    print(json.dumps({**found, "jax": jax.__version__, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    measures: dict[str, Callable[..., None]] = {
        "time": measure_time, "same": measure_same, "pair": measure_pair, "program": measure_program,
        "memory": measure_memory, "depth": measure_depth, "mixed": measure_mixed, "dispatch": measure_dispatch,
    }  # fmt: skip
    measures[sys.argv[1]](*sys.argv[2:])
