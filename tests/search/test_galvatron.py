"""The peer's profile files: what they say arrives in our profiles, and on them its own plans are never better."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import collective_seconds, device_group
from galvatron_jax.errors import DocumentError, DocumentNotFoundError
from galvatron_jax.models import load_model_profile
from galvatron_jax.search import find_plan
from galvatron_jax.search._cli import main
from galvatron_jax.search._galvatron import import_galvatron
from galvatron_jax.units import MIB
from tests.search.peer import FOLDER, Reference, like_for_like, peer_plan, peer_problem, references

FASTER = 100
"""Times less CPU time than the peer's search, in about its space."""
GRACE_S = 1.0
"""The last effort of a search that is stopped, and baselines."""
ROWS = references()


@pytest.mark.parametrize(("samples", "per_sample_ms"), [(1, 4.396), (8, 3.937), (12, 3.918)])
def test_compute_of_a_layer_is_what_was_measured(samples: int, per_sample_ms: float) -> None:
    found = import_galvatron(FOLDER, parse_cluster("1x8"))
    measured = found.apply(load_model_profile("llama2-7b")).kind("layers.*").measured
    assert measured is not None
    assert measured.provenance.device == found.hardware.device
    seconds = {what: dict(zip(t.samples, t.times_s, strict=True)) for t in measured.passes for what in [t.what]}
    assert seconds["forward"][samples] == pytest.approx(samples * per_sample_ms * 1e-3, rel=1e-3)
    assert seconds["backward"][samples] == 2 * seconds["forward"][samples]
    assert seconds["recompute"] == seconds["forward"]


def test_fits_over_the_batch_are_those_of_the_peer() -> None:
    """Its README: 3.859 ms per sample and 0.833 ms for a layer, 2.680 and 2.355 for embedding and head."""
    forward_s = import_galvatron(FOLDER, parse_cluster("1x8")).forward_s
    for part, slope, offset in (("layer", 3.859, 0.833), ("other", 2.680, 2.355)):
        samples, times = np.array(list(forward_s[part])), np.array(list(forward_s[part].values()))
        assert np.polyfit(samples, times * 1e3, 1) == pytest.approx([slope, offset], abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "group", "size_mib", "expected_ms"),
    [
        ("all-reduce", 8, 8, 0.1827),
        ("all-gather", 8, 8, 0.1827 / 2),
        ("all-to-all", 4, 8, 0.1255),
        ("all-reduce", 8, 1024, 8.1409),
    ],
)
def test_collective_inside_a_node_takes_the_measured_time(
    kind: str, group: int, size_mib: int, expected_ms: float
) -> None:
    hardware = import_galvatron(FOLDER, parse_cluster("1x8")).hardware
    seconds = collective_seconds(kind, size_mib * MIB, device_group(group, 1, 8), hardware)  # type: ignore[arg-type]
    assert seconds == pytest.approx(expected_ms * 1e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("group", "stride", "bandwidth"), [(16, 1, 44.682), (8, 2, 20.7724), (4, 4, 16.22), (2, 8, 8.13007)]
)
def test_all_reduce_between_nodes_has_the_measured_bandwidth(group: int, stride: int, bandwidth: float) -> None:
    hardware = import_galvatron(FOLDER, parse_cluster("2x8")).hardware
    seconds = collective_seconds("all-reduce", 32 * MIB, device_group(group, stride, 8), hardware)
    assert 2 * (group - 1) / group * 32 / (seconds * 1e3) == pytest.approx(bandwidth, rel=1e-6)


def test_more_nodes_than_measured_use_groups_with_as_many_members_per_node() -> None:
    hardware = import_galvatron(FOLDER, parse_cluster("8x8")).hardware
    groups = {table.group: table.per_node for table in hardware.collectives if not table.inside_node}
    assert groups == {8: 1, 16: 2, 32: 4, 64: 8}


@pytest.mark.usefixtures("own_clock")
@pytest.mark.parametrize("row", ROWS, ids=[row.setting for row in ROWS])
def test_plan_is_never_worse_than_the_peers_and_found_a_hundred_times_sooner(row: Reference) -> None:
    """Both plans are priced by our cost model on the peer's tables, and both may use what the peer's plan needs.

    The search is stopped after a hundredth of the peer's CPU time, proof or not.
    """
    model, hardware = peer_problem(row)
    reference = peer_plan(row, model, hardware)
    assert reference.predicted is not None
    needed = max(stage.peak_bytes for stage in reference.predicted.stages)
    limit_s = time.thread_time() + row.search_cpu_s / FASTER
    found = find_plan(
        model,
        row.cluster,
        hardware,
        global_batches=(row.global_batch,),
        microbatches=None if row.microbatches is None else (row.microbatches,),
        max_stages=8 if row.pipeline else 1,
        schedules=("1f1b",),
        memory_bytes=max(row.usable_bytes, needed),
        rules=like_for_like(),
        watch=lambda best: best is not None and time.thread_time() > limit_s,
    ).plan
    assert found.predicted is not None
    assert found.predicted.step_time_s <= reference.predicted.step_time_s * (1 + 1e-9)
    assert time.thread_time() < limit_s + GRACE_S


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("overlap_coefficient.json", "{}", "has no 'overlap_coe'"),
        ("overlap_coefficient.json", "[1]", "a flat JSON object"),
        ("overlap_coefficient.json", '{"overlap_coe": NaN}', "a flat JSON object"),
        ("p2p_bandwidth_2nodes_8gpus_per_node.json", '{"pp_size_2": -1}', "positive numbers"),
        ("sp_time_1nodes_8gpus_per_node.json", "{", "a flat JSON object"),
        ("computation_profiling_bf16_llama2-7b_all.json", '{"layernum[2]_bsz1_seq2048": 15.0}', "layertype_0_"),
    ],
)
def test_damaged_file_of_the_peer_is_refused_by_name(tmp_path: Path, name: str, content: str, expected: str) -> None:
    folder = copied(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(DocumentError, match=r"json") as caught:
        import_galvatron(folder, parse_cluster("2x8"))
    assert name in caught.value.message
    assert expected in caught.value.message


def test_absent_file_of_the_peer_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "overlap_coefficient.json").unlink()
    with pytest.raises(DocumentNotFoundError, match="overlap_coefficient"):
        import_galvatron(folder, parse_cluster("1x8"))
    with pytest.raises(DocumentNotFoundError, match="1nodes_3gpus"):
        import_galvatron(FOLDER, parse_cluster("1x3"))


def test_command_plans_from_the_peers_files_and_says_what_is_whose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = ["--mesh", "1x8", "--profile-from", "galvatron", str(FOLDER), "--global-batch", "64", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for expected in ("llama2-7b", "seq 2048", "Hetu-Galvatron's measurements", "ours: bytes"):
        assert expected in shown
    assert json.loads(out.read_text())["hardware"]["measured"] is True
    assert main([*words, "--model", "llama3-8b"]) == 2
    assert "leave --model out" in capsys.readouterr().err
