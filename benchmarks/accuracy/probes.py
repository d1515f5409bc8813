"""Memory tables for the ledger: probes of its models, compiled as ``profilers memory`` compiles them.

    python -m benchmarks.accuracy.probes MODEL [--budget-s S]      # goes on where the last run ended; extra [verify]

Records (``benchmarks/records/memory_probes``) hold what the compiler said and nothing else, so a better formula reads
them anew. The strategies that are compiled are named here, a part of those in the ledger; estimates of all others are
held out: their strategy, samples, depth, mixture, microbatches or head was never compiled.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: here it only traces

import msgspec

from galvatron_jax._document import load, save
from galvatron_jax.errors import DocumentNotFoundError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.measured import Provenance
from galvatron_jax.plan import Strategy
from galvatron_jax.profile import HardwareProfile, ModelProfile
from galvatron_jax.profilers import SystemClock
from galvatron_jax.profilers._memory_agenda import MemoryAgenda, Wanted
from galvatron_jax.profilers._memory_parts import assemble_memory
from galvatron_jax.profilers._memory_probe import MemoryLog, MemoryReading, ProbeSession, repeated_kinds
from galvatron_jax.profilers._memory_process import ProbeProcess
from galvatron_jax.profilers._memory_readings import ProbeProgress, read_probes

from .plans import CLUSTER, profile_of

RECORDS = Path(__file__).parents[1] / "records" / "memory_probes"

S = Strategy
_SP8 = S(tp=8, sp=True, dp=2, zero=1)

COMPILED: dict[str, tuple[tuple[Strategy, bool], ...]] = {
    "llama_7b": (
        (S(dp=16, zero=3, remat="full"), False),
        (S(dp=16, zero=3), False),
        (msgspec.structs.replace(_SP8, remat="full"), False),
        (S(dp=16, zero=1), False),
        (S(dp=16, remat="full"), False),
        (_SP8, False),
        (S(dp=16, zero=3, remat="full"), True),
    ),
    "llama_70b_nine_layers": (
        (S(dp=16, zero=3, remat="full"), False),
        (S(tp=8, sp=True, dp=2, zero=3), False),
    ),
    "llama_100m": ((S(dp=16, zero=1), False), (S(dp=16, zero=3, remat="full"), False)),
    "gpt2_large_six_layers": ((S(dp=16, zero=1), False), (S(dp=16, zero=3, remat="full"), False)),
}
"""(Strategy, whether gradients accumulate) of the repeated layers, by model."""

PROBED = {
    "llama_7b_four_layers": "llama_7b",
    "llama_70b_three_layers": "llama_70b_nine_layers",
}
"""Models of the ledger whose tables come from one with more of the same layers."""


def hardware() -> HardwareProfile:
    """Return the GPU as the programs are compiled: attention without a fused kernel."""
    return msgspec.structs.replace(load_hardware("h100"), fused_attention=False)


def record_path(model: str) -> Path:
    """Return the file of a model's probes."""
    return RECORDS / f"{model}.json"


@functools.cache
def measured_profile(model: str) -> ModelProfile | None:
    """Return the profile of a model of the ledger with its memory tables, None where nothing was compiled."""
    probed = PROBED.get(model, model)
    try:
        log = load(record_path(probed), MemoryLog)
    except DocumentNotFoundError:
        return None
    provenance = Provenance(
        device="h100", device_kind="h100 (compiled for)", jax_version=log.jax_version, date="2026-11-25"
    )
    found = assemble_memory(profile_of(probed), log.readings, _session(probed), hardware(), provenance).profile
    return profile_of(model).with_memory({kind.name: kind.memory for kind in found.kinds if kind.memory})


def compile_probes(model: str, budget_s: float) -> None:
    """Compile the probes of a model that have no record yet."""
    profile, session = profile_of(model), _session(model)
    (kind,) = repeated_kinds(profile)
    wanted = [Wanted(kind, strategy, accumulates) for strategy, accumulates in COMPILED[model]]
    probes = MemoryAgenda(model=profile, session=session, hardware=hardware()).probes(wanted)
    try:
        known = load(record_path(model), MemoryLog).readings
    except DocumentNotFoundError:
        known = ()

    def record(readings: Sequence[MemoryReading]) -> None:
        version = importlib.metadata.version("jax")
        log = MemoryLog(model=profile.name, cluster=CLUSTER, jax_version=version, readings=tuple(readings))
        save(log, record_path(model))

    def show(progress: ProbeProgress) -> None:
        print(f"{progress.done + 1}/{progress.total}  {progress.probe.text}", flush=True)

    RECORDS.mkdir(parents=True, exist_ok=True)
    with ProbeProcess(session, time_limit_s=600.0) as process:
        read_probes(probes, process, SystemClock(), budget_s, known=known, record=record, show=show)


def _session(model: str) -> ProbeSession:
    return ProbeSession(model=f"benchmarks.accuracy.models:{model}", cluster=CLUSTER, state_bytes_per_parameter=8)


def main() -> None:
    """Compile the probes of one model."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy.probes")
    parser.add_argument("model", choices=list(COMPILED))
    parser.add_argument("--budget-s", type=float, default=180.0, metavar="S")
    options = parser.parse_args()
    compile_probes(options.model, options.budget_s)


if __name__ == "__main__":
    main()
