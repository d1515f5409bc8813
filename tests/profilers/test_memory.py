"""The memory profiler: which programs it asks for, what it reads from their peaks, and the process that compiles them.

A fake compiler that follows a known law stands for XLA where the law is to be found again; XLA itself, without a GPU,
where the program counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from galvatron_jax._document import load, save
from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_layer, estimate_plan, stage_setting
from galvatron_jax.errors import DocumentError, ToolchainError
from galvatron_jax.measured import Provenance
from galvatron_jax.plan import strategy_violations
from galvatron_jax.profilers._cli import main
from galvatron_jax.profilers._memory import _resumed
from galvatron_jax.profilers._memory_agenda import MOST_SHARE, MemoryAgenda, Wanted, usual_strategies
from galvatron_jax.profilers._memory_parts import assemble_memory
from galvatron_jax.profilers._memory_probe import (
    MemoryLog,
    MemoryProbe,
    MemoryReading,
    ProbeSession,
    probe_layers,
    probe_plan,
    short_profile,
)
from galvatron_jax.profilers._memory_process import ProbeProcess
from galvatron_jax.profilers._memory_readings import Probed, read_probes
from galvatron_jax.strategy import Strategy
from galvatron_jax.verify import check_toolchain
from tests.support.toy_models import llama_like_profile, toy_hardware

from .fakes import FakeClock

MODEL = llama_like_profile(layers=12, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32)
HARDWARE = toy_hardware(fused_attention=False)
SESSION = ProbeSession(model="toy", cluster=Cluster(nodes=1, gpus_per_node=8, gpu="toy"), state_bytes_per_parameter=8)
AGENDA = MemoryAgenda(model=MODEL, session=SESSION, hardware=HARDWARE)
HERE = Provenance(device="toy", device_kind="toy (compiled for)", jax_version="0.10.2", date="2026-11-25")
FSDP, ZERO_1 = Strategy(dp=8, zero=3), Strategy(dp=8, zero=1)
BLOCK = "layers.*"


@dataclasses.dataclass
class Law:
    """A compiler whose layers keep, and need, more than the formulas say: by a factor, and by copies of weights."""

    clock: FakeClock = dataclasses.field(default_factory=FakeClock)
    seconds: float = 5.0
    refuses: str = ""

    def ask(self, probe: MemoryProbe) -> MemoryReading:
        self.clock.time_s += self.seconds
        if self.refuses and self.refuses in probe.text:
            return MemoryReading(probe=probe, problem="does not compile")
        return MemoryReading(probe=probe, peak_bytes=round(self.peak(probe)))

    @staticmethod
    def peak(probe: MemoryProbe) -> float:
        short = short_profile(MODEL, probe)
        plan = probe_plan(short, probe, SESSION)
        setting = stage_setting(plan, plan.stages[0], short, HARDWARE)
        total, workspace = 0.0, 0.0
        for run, strategy in probe_layers(MODEL, probe):
            memory = estimate_layer(MODEL.kind(run.kind), strategy, setting).memory
            more = 1.5 * memory["residuals"] + 4096.0 if run.kind == BLOCK else memory["residuals"]
            total += run.count * (memory["parameters"] + memory["gradients"] + memory["optimizer"] + more)
            workspace = max(workspace, 1.25 * memory["live"] + 70_000.0 if run.kind == BLOCK else memory["live"])
        return total + workspace


def readings(*wanted: Wanted, law: Law | None = None) -> tuple[MemoryReading, ...]:
    law = law or Law()
    return read_probes(AGENDA.probes(wanted), law, law.clock, 1e9).readings


@pytest.mark.parametrize(
    ("strategy", "layers", "samples", "microbatches"),
    [
        (FSDP, 12, 2, 1),
        (FSDP, 5, 3, 1),
        (ZERO_1, 12, 8, 1),
        (Strategy(dp=8, zero=3, replicas=2), 7, 4, 1),
        (Strategy(tp=2, sp=True, dp=4, zero=3, remat="full"), 9, 4, 1),
        (FSDP, 12, 2, 4),
    ],
    ids=str,
)
def test_law_of_the_compiler_is_found_again_for_plans_that_it_never_saw(
    strategy: Strategy, layers: int, samples: int, microbatches: int
) -> None:
    sp = Strategy(tp=2, sp=True, dp=4, zero=3, remat="full")
    found = readings(Wanted(BLOCK, FSDP), Wanted(BLOCK, ZERO_1), Wanted(BLOCK, FSDP, True), Wanted(BLOCK, sp))
    model, _ = assemble_memory(MODEL, found, SESSION, HARDWARE, HERE)
    probe = MemoryProbe(layer=BLOCK, layers=layers, strategy=strategy, samples=samples, microbatches=microbatches)
    short = short_profile(model, probe)
    (stage,) = estimate_plan(probe_plan(short, probe, SESSION), short, HARDWARE).stages
    assert stage.peak_bytes == pytest.approx(Law.peak(probe), rel=0.01)
    memory = model.kind(BLOCK).memory
    assert memory is not None
    assert len(memory.tables[0].samples) == 3
    assert memory.interpolation_error < 1e-6, "the law is affine in the samples"
    plain = short_profile(MODEL, probe)
    (formula,) = estimate_plan(probe_plan(plain, probe, SESSION), plain, HARDWARE).stages
    assert formula.peak_bytes < 0.9 * Law.peak(probe), "the law differs from the formulas, else this shows nothing"


def test_probes_are_legal_fit_and_share_what_does_not_depend_on_zero() -> None:
    probes = AGENDA.probes([Wanted(BLOCK, FSDP), Wanted(BLOCK, ZERO_1), Wanted(BLOCK, Strategy(dp=8, zero=2))])
    by_zero = {zero: [p for p in probes if p.layers and p.strategy.zero == zero] for zero in range(4)}
    assert [len(by_zero[zero]) for zero in range(4)] == [0, 1, 0, 5]
    assert {p.layers % 2 for p in probes} == {0}, "loops of 12 layers are not peeled"
    for probe in probes:
        assert AGENDA.estimate(probe) <= MOST_SHARE * HARDWARE.memory_bytes
        microbatch = probe.samples * probe.strategy.dp
        for run, strategy in probe_layers(MODEL, probe):
            assert not strategy_violations(MODEL.kind(run.kind), strategy, microbatch)


def test_usual_strategies_begin_with_data_parallelism_and_name_each_once() -> None:
    wanted = usual_strategies(MODEL, 8, 8)
    assert wanted[0].strategy == Strategy(dp=8, zero=3, remat="full")
    assert len(set(wanted)) == len(wanted)
    assert {w.strategy.inner for w in wanted} == {1, 2, 4, 8}


def test_what_did_not_compile_is_named_and_left_out() -> None:
    law = Law(refuses="zero1")
    found = readings(Wanted(BLOCK, FSDP), Wanted(BLOCK, ZERO_1), law=law)
    spilled = [msgspec.structs.replace(r, rematerialised=3) if r.probe.samples > 1 else r for r in found]
    model, notes = assemble_memory(MODEL, spilled, SESSION, HARDWARE, HERE)
    memory = model.kind(BLOCK).memory
    assert memory is not None
    assert memory.interpolation_error == 0
    assert [(table.zero, table.samples) for table in memory.tables] == [(3, (1,))]
    assert any("does not compile" in note for note in notes)
    assert any("rematerialised on its own" in note for note in notes)


def test_budget_ends_the_work_and_what_is_known_is_not_compiled_again() -> None:
    law = Law()
    probes = AGENDA.probes([Wanted(BLOCK, FSDP)])
    first: Probed = read_probes(probes, law, law.clock, 12.0)
    assert len(first.readings) == 2
    assert first.left_out == probes[2:]
    recorded: list[Sequence[MemoryReading]] = []
    rest = read_probes(probes, law, law.clock, 1e9, known=first.readings, record=recorded.append)
    assert [r.probe for r in rest.readings] == list(probes)
    assert len(recorded) == len(probes) - 2


def test_partial_file_of_another_model_or_cluster_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.memory.partial.json"
    assert _resumed(path, "toy", SESSION.cluster) == ()
    save(MemoryLog(model="toy", cluster=SESSION.cluster, jax_version="0.0", readings=()), path)
    with pytest.raises(DocumentError, match="compiled for something else"):
        _resumed(path, "toy", SESSION.cluster)
    assert load(path, MemoryLog).cluster == SESSION.cluster


@pytest.fixture(scope="module")
def tiny_process() -> ProbeProcess:
    try:
        check_toolchain()
    except ToolchainError as error:
        pytest.skip(error.message)
    session = ProbeSession(
        model="llama-tiny", cluster=Cluster(nodes=1, gpus_per_node=4, gpu="h100"), state_bytes_per_parameter=8
    )
    return ProbeProcess(session, time_limit_s=300)


@pytest.mark.slow
def test_process_compiles_goes_on_after_a_refusal_and_ends(tiny_process: ProbeProcess) -> None:
    fsdp = Strategy(dp=4, zero=3)
    with tiny_process as process:
        impossible = MemoryProbe(layer=BLOCK, layers=4, strategy=Strategy(tp=3, dp=1), samples=1)
        assert process.ask(impossible).problem
        peaks = {
            n: process.ask(MemoryProbe(layer=BLOCK, layers=n, strategy=fsdp, samples=4)).peak_bytes for n in (0, 4)
        }
    assert 0 < peaks[0] < peaks[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama9-7b"], "llama9-7b"),
        (["--model", "llama-tiny", "--mesh", "2x"], "NODESxGPUS"),
        (["--model", "llama-tiny", "--gpu", "h101"], "h101"),
        (["--model", "llama-tiny", "--plan", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", *arguments, "--out", str(tmp_path / "model.json")]) == 2
    assert message in capsys.readouterr().err
