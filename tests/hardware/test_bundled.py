"""Bundled hardware: every number has a source, and the sources' own figures come out of the profiles."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from galvatron_jax import _document
from galvatron_jax.errors import DocumentError, DocumentNotFoundError
from galvatron_jax.hardware import hardware_names, load_hardware
from galvatron_jax.profile import HardwareProfile
from galvatron_jax.units import GIB, MIB

FOLDER = Path(_document.__file__).parent / "hardware"
GPUS = ("a100-40g", "a100-80g", "h100", "h200", "b200")
NOT_NUMBERS = {"provenance", "schema_version", "name", "description", "measured", "sources"}


def efficiency(hardware: HardwareProfile, flops: float) -> float:
    """Share of the peak, a power law between two points as in ``cost``, flat outside."""
    points = hardware.matmul_efficiency
    for low, high in pairwise(points):
        if low.flops <= flops <= high.flops:
            position = math.log(flops / low.flops) / math.log(high.flops / low.flops)
            return float(low.efficiency * (high.efficiency / low.efficiency) ** position)
    return points[0].efficiency if flops < points[0].flops else points[-1].efficiency


def matmul_s(hardware: HardwareProfile, flops: float) -> float:
    return flops / (efficiency(hardware, flops) * hardware.matmul_flops_per_s["bfloat16"])


def ring_all_reduce_s(hardware: HardwareProfile, group: int, size_bytes: float) -> float:
    link = hardware.intra_node
    return 2 * (group - 1) * (link.latency_s + size_bytes / group / link.bandwidth_bytes_per_s)


def test_hardware_names_are_the_files() -> None:
    assert set(hardware_names()) == {*GPUS, "cpu"}
    assert hardware_names() == tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


@pytest.mark.parametrize("name", hardware_names())
def test_bundled_file_is_canonical_and_unmeasured(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert not hardware.measured
    assert (FOLDER / f"{name}.json").read_text() == _document.encode(hardware)


@pytest.mark.parametrize("name", hardware_names())
def test_bundled_every_number_has_a_source(name: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(HardwareProfile)}
    sources = load_hardware(name).sources
    assert set(sources) == fields - NOT_NUMBERS
    assert all(len(text) > 15 for text in sources.values())


@pytest.mark.parametrize("name", hardware_names())
def test_bundled_numbers_are_ordered_as_physics_orders_them(name: str) -> None:
    hardware = load_hardware(name)
    shares = [point.efficiency for point in hardware.matmul_efficiency]
    assert shares == sorted(shares)
    assert hardware.inter_node.bandwidth_bytes_per_s < hardware.intra_node.bandwidth_bytes_per_s
    assert hardware.intra_node.bandwidth_bytes_per_s < hardware.memory_bandwidth_bytes_per_s
    assert hardware.intra_node.latency_s < hardware.inter_node.latency_s
    assert hardware.matmul_flops_per_s["float32"] <= hardware.matmul_flops_per_s["bfloat16"]
    assert hardware.attention_efficiency["backward"] <= hardware.attention_efficiency["forward"]
    assert 0.03 <= hardware.reserved_bytes / hardware.memory_bytes <= 0.15


@pytest.mark.parametrize("name", hardware_names())
def test_bundled_larger_product_never_finishes_sooner(name: str) -> None:
    hardware = load_hardware(name)
    times = [matmul_s(hardware, 10 ** (exponent / 8)) for exponent in range(8 * 6, 8 * 15)]
    assert times == sorted(times)


@pytest.mark.parametrize("name", GPUS)
def test_bundled_gpu_is_fused_and_merges_sums(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.fused_attention
    assert hardware.sums_before_reducing


def test_cpu_neither_fuses_attention_nor_merges_sums() -> None:
    hardware = load_hardware("cpu")
    assert not hardware.fused_attention
    assert not hardware.sums_before_reducing


def test_generations_rise_in_peak_memory_and_links() -> None:
    a100, h100, h200, b200 = (load_hardware(name) for name in ("a100-80g", "h100", "h200", "b200"))
    for older, newer in ((a100, h100), (h100, b200)):
        assert newer.matmul_flops_per_s["bfloat16"] > older.matmul_flops_per_s["bfloat16"]
        assert newer.intra_node.bandwidth_bytes_per_s > older.intra_node.bandwidth_bytes_per_s
        assert newer.memory_bandwidth_bytes_per_s > older.memory_bandwidth_bytes_per_s
    assert h200.matmul_flops_per_s == h100.matmul_flops_per_s
    assert h200.memory_bytes > h100.memory_bytes


# ------------------------------------------------------------------------------------------- anchors: published figures
def test_h100_all_reduce_equals_xla_table() -> None:
    """XLA's table for H100: 134 MB over 8 GPUs takes 670 us."""
    assert ring_all_reduce_s(load_hardware("h100"), 8, 128 * MIB) == pytest.approx(670e-6, rel=0.01)


@pytest.mark.parametrize(
    ("group", "size_mib", "measured_s"),
    [
        (2, 256, 1.3887e-3),
        (2, 1024, 5.1594e-3),
        (4, 128, 1.0725e-3),
        (4, 256, 2.0709e-3),
        (8, 128, 1.2826e-3),
        (8, 512, 4.6768e-3),
    ],
)
def test_a100_all_reduce_within_8_percent_of_measured(group: int, size_mib: int, measured_s: float) -> None:
    """Hetu-Galvatron's table (Apache-2.0, commit cea12ff), A100-class; below 128 MiB its 65 us per call dominate."""
    assert ring_all_reduce_s(load_hardware("a100-80g"), group, size_mib * MIB) == pytest.approx(measured_s, rel=0.08)


def test_a100_llama_layer_products_and_attention_fit_below_measured_forward() -> None:
    """Hetu-Galvatron measured 3.859 ms per 2048-token sample of a Llama-2-7B layer; norms and such need the rest."""
    hardware = load_hardware("a100-80g")
    samples, tokens, embed, mlp = 8, 2048, 4096, 11008
    products = 4 * matmul_s(hardware, 2 * samples * tokens * embed * embed)
    products += 3 * matmul_s(hardware, 2 * samples * tokens * embed * mlp)
    scores = 4 * samples * tokens**2 * embed / 2  # causal
    attention = scores / (hardware.attention_efficiency["forward"] * hardware.matmul_flops_per_s["bfloat16"])
    per_sample_s = (products + attention) / samples
    assert 0.85 * 3.859e-3 < per_sample_s < 3.859e-3


def test_h100_llama_products_leave_room_in_maxtext_step() -> None:
    """MaxText Llama-2-7B, 8 H100, FSDP: 0.721 s for 2 x 4096 tokens per GPU; products are the greater part, not all."""
    hardware = load_hardware("h100")
    tokens, embed, mlp, vocab, layers = 2 * 4096, 4096, 11008, 32000, 32
    layer = 4 * matmul_s(hardware, 2 * tokens * embed * embed) + 3 * matmul_s(hardware, 2 * tokens * embed * mlp)
    step_s = 3 * (layers * layer + matmul_s(hardware, 2 * tokens * embed * vocab))
    assert 0.55 * 0.721 < step_s < 0.80 * 0.721


@pytest.mark.parametrize(
    ("name", "usable_gib"), [("a100-40g", 36), ("a100-80g", 75), ("h100", 74), ("h200", 133), ("b200", 169)]
)
def test_usable_memory_is_what_the_sources_add_up_to(name: str, usable_gib: int) -> None:
    hardware = load_hardware(name)
    assert (hardware.memory_bytes - hardware.reserved_bytes) / GIB == pytest.approx(usable_gib, abs=0.5)


# ------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100"),
        ("H100", "h100"),
        ("a100", "a100-80g"),
        ("A100_40GB", "a100-40g"),
        ("a100 80gb", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        (" cpu ", "cpu"),
    ],
)
def test_load_hardware_knows_common_spellings(text: str, name: str) -> None:
    assert load_hardware(text).name == name


@pytest.mark.parametrize(("text", "nearest"), [("h1000", "h100"), ("a100-80", "a100-80g"), ("b20", "b200"), ("", "")])
def test_load_hardware_unknown_name_lists_names_and_nearest(text: str, nearest: str) -> None:
    with pytest.raises(DocumentNotFoundError) as caught:
        load_hardware(text)
    message = str(caught.value)
    assert message.startswith(f"--gpu: got {text!r}")
    assert "a100-40g, a100-80g, b200, cpu, h100, h200" in message
    assert f"did you mean {nearest}" in message


def test_load_hardware_path_reads_the_file(tmp_path: Path) -> None:
    ours = msgspec.structs.replace(load_hardware("h100"), name="ours", measured=True)
    path = _document.save(ours, tmp_path / "ours.json")
    assert load_hardware(path) == ours
    assert load_hardware(str(path)) == ours


def test_load_hardware_missing_path_raises(tmp_path: Path) -> None:
    with pytest.raises(DocumentNotFoundError, match="cannot read the hardware profile"):
        load_hardware(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"memory_bandwidth_bytes_per_s": 3020000000000.0', '"memory_bandwidth_bytes_per_s": 0'),
        ('"kernel_launch_s": 3e-06', '"kernel_launch_s": -1'),
        ('"kernel_launch_s": 3e-06', '"kernel_launch_s": NaN'),
        ('"efficiency": 0.73', '"efficiency": 1.73'),
        ('"flops": 6700000000.0', '"flops": 1.0'),
        ('"overlap_slowdown": 1.1256', '"overlap_slowdown": 0.5'),
        ('"collectives": []', '"collectives": [{"kind": "all-reduce", "group": 2, "inside_node": true,'
         ' "sizes_bytes": [1, 2], "times_s": [2, 1]}]'),
    ],
)  # fmt: skip
def test_load_hardware_impossible_value_raises(tmp_path: Path, old: str, new: str) -> None:
    text = (FOLDER / "h100.json").read_text()
    assert text.count(old) == 1
    path = tmp_path / "bad.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(DocumentError, match=r"bad\.json"):
        load_hardware(path)


def test_documentation_page_is_up_to_date() -> None:
    from scripts.write_hardware_table import PAGE, page

    assert PAGE.read_text() == page(), "run: python scripts/write_hardware_table.py"
