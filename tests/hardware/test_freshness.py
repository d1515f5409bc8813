"""Profiles as case 5 of the faults has them: stale, foreign, absurd; corrupt ones are refused by the schema."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from galvatron_jax._document import decode, encode
from galvatron_jax.errors import DocumentError
from galvatron_jax.hardware import freshness_notes, load_hardware
from galvatron_jax.measured import Provenance
from galvatron_jax.profile import HardwareProfile
from galvatron_jax.search._cli import main as search

H100 = load_hardware("h100")
HERE = Provenance(
    device="h100", device_kind="NVIDIA H100 80GB HBM3", jax_version=metadata.version("jax"), date="2026-11-24"
)


def measured(**changes: Any) -> HardwareProfile:
    provenance = msgspec.structs.replace(HERE, **{k: v for k, v in changes.items() if k in HERE.__struct_fields__})
    own = {k: v for k, v in changes.items() if k not in HERE.__struct_fields__}
    return msgspec.structs.replace(H100, name="h100-1x8-measured", measured=True, provenance=provenance, **own)


def test_bundled_and_fresh_profiles_leave_no_doubt() -> None:
    assert freshness_notes(H100) == []
    assert freshness_notes(measured(), visible_gpu="NVIDIA H100 80GB HBM3") == []


def test_profile_of_another_jax_is_stale_and_says_what_changed() -> None:
    (note,) = freshness_notes(measured(jax_version="0.4.1"))
    assert note.startswith("stale: measured 2026-11-24 with jax 0.4.1, now ")


def test_profile_of_another_driver_is_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul")
    monkeypatch.setattr("galvatron_jax.hardware._freshness._DRIVER_FILE", driver)
    (note,) = freshness_notes(measured(driver="570.86"))
    assert "driver 570.86, now 580.65.06" in note


def test_profile_of_another_device_than_those_in_sight_is_foreign() -> None:
    (note,) = freshness_notes(measured(), visible_gpu="NVIDIA A100-SXM4-80GB")
    assert note.startswith("foreign")


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bandwidth_bytes_per_s": 3.35e15},
        {"matmul_flops_per_s": {**H100.matmul_flops_per_s, "bfloat16": 9.89e11}},
        {"intra_node": msgspec.structs.replace(H100.intra_node, bandwidth_bytes_per_s=450.0)},
    ],
)
def test_figure_out_of_all_proportion_is_doubted_by_name(change: dict[str, Any]) -> None:
    (note,) = freshness_notes(measured(**change))
    assert note.startswith("doubtful: " + next(iter(change)).removesuffix("s")[:8])


TABLE = {
    "kind": "all-reduce", "group": 8, "inside_node": True, "sizes_bytes": [1e3, 1e6], "times_s": [1e-5, 1e-4],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bandwidth_bytes_per_s": 0},
        {"memory_bandwidth_bytes_per_s": -1},
        {"overlap_slowdown": 0.5},
        {"kernel_launch_s": "fast"},
        {"collectives": [{**TABLE, "times_s": [1e-4, 1e-5]}]},
        {"collectives": [{**TABLE, "sizes_bytes": [1e6, 1e3]}]},
        {"collectives": [{**TABLE, "times_s": [0, 1e-5]}]},
        {"collectives": [{**TABLE, "per_node": 0}]},
        {"provenance": {"device": "h100"}},
        {"surprise": 1},
    ],
)
def test_corrupt_profile_is_refused_with_the_place(change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads(encode(H100)), **change})
    with pytest.raises(DocumentError) as caught:
        decode(text, HardwareProfile, where="hw.json")
    assert "hw.json" in caught.value.message


@pytest.mark.parametrize("text", ['{"schema_version": 1, "name":', "", "NaN", '{"schema_version": 9}'])
def test_search_ends_with_code_2_on_a_corrupt_profile(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hw.json"
    path.write_text(text)
    assert search(["--mesh", "1x2", "--hardware", str(path), "--out", str(tmp_path / "plan.json")]) == 2
    assert "hw.json" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_search_says_that_a_profile_is_stale_and_the_plan_names_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "hw.json", tmp_path / "plan.json"
    stale = measured(jax_version="0.4.1")
    path.write_text(encode(stale))
    flags = ["--model", "llama-100m", "--global-batch", "8", "--no-pp"]
    assert search(["--mesh", "1x2", "--hardware", str(path), "--out", str(out), *flags]) == 0
    shown = capsys.readouterr()
    assert "stale: measured 2026-11-24 with jax 0.4.1" in shown.out + shown.err
    assert json.loads(out.read_text())["hardware"]["fingerprint"] == stale.fingerprint
