"""Reading XLA's reports: the excerpts are from dumps of jaxlib 0.10.2 for H100."""

from __future__ import annotations

from pathlib import Path

import pytest

from galvatron_jax.verify._peak import PeakUse, layer_of, read_peak, role_of

REPORT = """\
HloLiveRange (max 702):
  InstructionSequence:
    0:param.20
  Live ranges at 429 (peak):
    gemm_fusion_dot.210{}: 1024 bytes (cumulative: 1024 bytes)
    fusion.199{0}: 512 bytes (cumulative: 1536 bytes)
    fusion.199{1}: 256 bytes (cumulative: 1792 bytes)
    param.20{}: 64 bytes (cumulative: 1856 bytes)
    copy.1{}: 8 bytes (cumulative: 1864 bytes)
  Something else:
    param.21{}: 99 bytes (cumulative: 1963 bytes)
"""
PROGRAM = """\
HloModule jit__train, is_scheduled=true
ENTRY %main (param.20: f32[16]) -> f32[16] {
  %param.20 = f32[16]{0} parameter(3), metadata={op_name="state.parameters[\\'head\\'][\\'kernel\\'].value"}
  %gemm_fusion_dot.210 = bf16[512]{0} fusion(%param.20), metadata={op_name="jit(_train)/transpose(jvp(layers.1))/jvp(layers.1)/checkpoint/rematted_computation/dot_general"}
  %fusion.199 = (bf16[256]{0}, bf16[128]{0}) fusion(%param.20), metadata={op_name="jit(_train)/transpose(jvp(layers.1))/jvp(layers.1)/checkpoint/mul"}
  ROOT %copy.1 = f32[2]{0} copy(%param.20)
}
"""  # noqa: E501


def write_dump(folder: Path, report: str, program: str) -> None:
    (folder / "module_0001.jit__train.sm_9.0a_gpu_after_optimizations-live-range.txt").write_text(report)
    (folder / "module_0001.jit__train.sm_9.0a_gpu_after_optimizations.txt").write_text(program)


def test_peak_is_added_up_by_role_and_layer(tmp_path: Path) -> None:
    write_dump(tmp_path, REPORT, PROGRAM)
    assert read_peak(tmp_path, ("layers.0", "layers.1", "head")) == (
        PeakUse("recomputed", "layers.1", 1024, 1),
        PeakUse("backward", "layers.1", 768, 2),
        PeakUse("parameters", "", 64, 1),
        PeakUse("other", "", 8, 1),
    )


@pytest.mark.parametrize(("report", "program"), [("", ""), ("no peak here", PROGRAM)])
def test_peak_of_unreadable_reports_is_empty(tmp_path: Path, report: str, program: str) -> None:
    write_dump(tmp_path, report, program)
    assert read_peak(tmp_path, ()) == ()


def test_peak_without_reports_is_empty(tmp_path: Path) -> None:
    assert read_peak(tmp_path, ()) == ()


@pytest.mark.parametrize(
    ("op_name", "role", "layer"),
    [
        ("state.parameters['embed'].value", "parameters", ""),
        ("state.optimizer[0].mu['embed'].value", "optimizer", ""),
        ("batch[0]", "batch", ""),
        ("jit(_train)/jvp(layers.3)/dot_general", "forward", "layers.3"),
        ("jit(_train)/while/body/closed_call/jvp(layers.30)/mul", "forward", "layers.30"),
        ("jit(_train)/transpose(jvp(head))/jvp(head)/checkpoint/dot_general", "backward", "head"),
        ("jit(_train)/transpose(jvp(layers.1))/checkpoint/rematted_computation/add", "recomputed", "layers.1"),
        ("jit(_train)/transpose(jvp())/sharding_constraint", "backward", ""),
        ("jit(_train)/sqrt", "update", ""),
        ("", "other", ""),
    ],
)
def test_op_name_tells_role_and_layer(op_name: str, role: str, layer: str) -> None:
    assert role_of(op_name) == role
    assert layer_of(op_name, {"layers.1", "layers.3", "layers.30", "head"}) == layer
