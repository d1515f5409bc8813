"""Passes of layers: loops hold the whole pass, the agenda covers what is needed first, tables say what was timed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jax
import pytest

from galvatron_jax._document import load
from galvatron_jax._user_model import UserModel
from galvatron_jax.analysis import Analysis, analyse_model, local_layer
from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost._measured import is_measured
from galvatron_jax.hardware import load_hardware
from galvatron_jax.measured import PassTable, Provenance
from galvatron_jax.profile import ModelProfile
from galvatron_jax.profilers._cli import main
from galvatron_jax.profilers._layer_agenda import layer_agenda
from galvatron_jax.profilers._layer_loops import pass_loop
from galvatron_jax.profilers._layer_parts import assemble_layers, interpolation_error
from galvatron_jax.profilers._layer_passes import PASSES, PassName, pass_program
from galvatron_jax.profilers._model import ModelOrder, measure_model
from tests.support.small_models import perceptrons, small_llama

from .fakes import reading

HERE = Provenance(device="cpu", device_kind="cpu", jax_version=jax.__version__, date="2026-11-24")


@cache
def llama() -> Analysis:
    case = small_llama(batch=4)
    return analyse_model(case.build, case.loss, case.abstract_batch, name="llama")


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("layer", "what"), [("embed", "backward"), ("head", "backward"), *(("layers.*", what) for what in PASSES)]
)
def test_loop_holds_the_whole_pass(layer: str, what: PassName) -> None:
    """By the compiler's own count of FLOPs: nothing of it was dropped or taken out (feeding adds a little)."""
    kind = llama().kinds[layer]
    program = pass_program(local_layer(kind, 2, 2), what)
    alone = (jax.jit(program.run).lower(*program.inputs).compile().cost_analysis() or {})["flops"]
    loop = pass_loop(kind, what, 2, 2, jax.devices()[:1])
    assert 0.98 * alone <= loop.flops <= 1.25 * alone + 2000
    loop.run(2)


def test_agenda_covers_every_kind_and_degree_before_it_fills_in() -> None:
    subjects = [s for s in layer_agenda(llama().profile, (1, 2, 4), (1, 2, 4, 8)) if s.layer]
    first = subjects[: subjects.index(next(s for s in subjects if s.what == "backward-full"))]
    degrees = {"layers.*": (1, 2, 4), "embed": (1, 2, 4, 8), "head": (1, 2, 4, 8)}
    assert {(s.layer, s.group) for s in first} == {(kind, t) for kind, some in degrees.items() for t in some}
    assert {s.size for s in first} == {1, 4}
    assert first[0].layer == "layers.*"
    assert len(set(subjects)) == len(subjects)


def test_tables_hold_forward_backward_and_what_recomputation_adds() -> None:
    readings = [
        reading(seconds, what, layer="layers.*", size=size, group=1)
        for what, times in {"forward": (1.0, 2.0), "backward": (2.0, 4.0), "backward-full": (2.9, 5.8)}.items()
        for size, seconds in zip((1, 2), times, strict=True)
    ]
    profile = assemble_layers(llama().profile, readings, HERE).profile
    measured = profile.kind("layers.*").measured
    assert measured is not None
    found = {table.what: table.times_s for table in measured.passes}
    assert found["forward"] == pytest.approx((1.0, 2.0))
    assert found["backward"] == pytest.approx((2.0, 4.0))
    assert found["recompute"] == pytest.approx((0.9, 1.8))
    assert profile.kind("head").measured is None
    assert profile.structure == llama().profile.structure


@pytest.mark.parametrize("full_s", [1.9, 2.01, 4.0])
def test_recomputation_lost_in_noise_is_left_out_and_named(full_s: float) -> None:
    readings = [
        reading(seconds, what, layer="layers.*", size=1, group=1)
        for what, seconds in (("forward", 1.0), ("backward", 2.0), ("backward-full", full_s))
    ]
    result = assemble_layers(llama().profile, readings, HERE)
    measured = result.profile.kind("layers.*").measured
    assert measured is not None
    assert {table.what for table in measured.passes} == {"forward", "backward"}
    assert any("lost in the noise" in note for note in result.notes)


def test_interpolation_error_is_that_of_the_middle_points() -> None:
    table = PassTable(what="forward", tp=1, samples=(1, 2, 4), times_s=(1.0, 2.0, 3.0))
    assert interpolation_error(table) == pytest.approx(abs(1 + 2 / 3 - 2) / 2)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("samples", [2, 4])
def test_residuals_of_the_forward_pass_are_those_of_the_analysis(samples: int, tp: int) -> None:
    kind = llama().kinds["layers.*"]
    assert kind.profile.best_candidate is not None
    shards = kind.profile.best_candidate.shards(tp, kind.profile.classes)
    sizes = {**kind.profile.classes, "batch": samples}
    estimated = sum(array.local_bytes(sizes, shards) for array in kind.profile.residuals)
    assert pass_program(local_layer(kind, samples, tp), "forward").kept_bytes == pytest.approx(estimated, rel=0.02)


@pytest.mark.multidevice
def test_measured_model_prices_on_its_device_and_resumes(tmp_path: Path) -> None:
    case = perceptrons(count=3)
    order = ModelOrder(
        model=UserModel(case.build, case.loss, case.abstract_batch),
        name="perceptrons",
        cluster=parse_cluster("1x1"),
        out=tmp_path / "model.json",
        samples=(1, 2),
        degrees=(1, 2),
        budget_s=60.0,
    )
    result = measure_model(order)
    assert load(order.out, ModelProfile) == result.profile
    kinds = {kind.name: kind for kind in result.profile.kinds}
    assert all(is_measured(kind, load_hardware("cpu")) for kind in kinds.values())
    assert not any(is_measured(kind, load_hardware("h100")) for kind in kinds.values())
    block = max(result.profile.kinds, key=lambda kind: len(kind.parameters))
    assert block.measured is not None
    assert {table.what for table in block.measured.passes} >= {"forward", "backward"}
    assert block.measured.provenance.jax_version == jax.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama9-7b"], "llama9-7b"),
        (["--model", "nowhere:model"], "MODULE:FUNCTION"),
        (["--model", "llama-tiny", "--mesh", "2x"], "NODESxGPUS"),
    ],
)
def test_bad_input_ends_with_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.multidevice
def test_partial_file_of_another_model_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    arguments = ["model", "--model", "llama-tiny", "--out", str(out), "--tp", "1", "--samples", "1"]
    assert main([*arguments, "--budget-s", "0.1"]) == 0
    partial = tmp_path / "model.partial.json"
    document = json.loads(partial.read_text())
    partial.write_text(json.dumps({**document, "model": "another"}))
    assert main([*arguments, "--resume"]) == 2


@pytest.mark.multidevice
def test_output_that_cannot_be_read_ends_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.json"
    out.write_text("{}")
    assert main(["model", "--model", "llama-tiny", "--out", str(out), "--tp", "1", "--samples", "1"]) == 2
    assert str(out) in capsys.readouterr().err
    assert not (tmp_path / "model.partial.json").exists()
