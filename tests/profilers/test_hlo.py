from __future__ import annotations

import pytest

from galvatron_jax.profilers._hlo import count_in_loop, kernels_in_loop

MODULE = """\
HloModule jit_program, is_scheduled=true

%fused_add (param_0: s32[]) -> s32[] {
  %param_0 = s32[] parameter(0)
  ROOT %add = s32[] add(%param_0, %param_0)
}

%wrapped (param_0.2: f32[8]) -> f32[8] {
  %param_0.2 = f32[8]{0} parameter(0)
  ROOT %all-to-all.2 = f32[8]{0} all-to-all(%param_0.2), replica_groups={{0,1}}
}

%body (param: (s32[], f32[8])) -> (s32[], f32[8]) {
  %param = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = f32[8]{0} get-tuple-element(%param), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  %ar-start = f32[8]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%sum
  %ar-done = f32[8]{0} all-reduce-done(%ar-start)
  %gather = ((f32[8]{0}), f32[16]{0}) all-gather-start(%ar-done), dimensions={0}
  %moved = f32[8]{0} call(%ar-done), to_apply=%wrapped
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%next, %moved)
}

%condition (param.1: (s32[], f32[8])) -> pred[] {
  %param.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (param.4: s32[], param.5: f32[8]) -> f32[8] {
  %param.4 = s32[] parameter(0)
  %param.5 = f32[8]{0} parameter(1)
  %before = f32[8]{0} reduce-scatter(%param.5), dimensions={0}, to_apply=%sum
  %start = (s32[], f32[8]{0}) tuple(%param.4, %before)
  %while.9 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%while.9), index=1
}
"""


@pytest.mark.parametrize(
    ("opcode", "count"),
    [
        ("all-reduce", 1),  # asynchronous, counted at its start only
        ("all-gather", 1),  # with a tuple as its result
        ("all-to-all", 1),  # in a computation that the body calls
        ("reduce-scatter", 0),  # before the loop
        ("collective-permute", 0),
    ],
)
def test_count_in_loop_finds_what_stands_in_the_body(opcode: str, count: int) -> None:
    assert count_in_loop(MODULE, opcode) == count


def test_kernels_in_loop_counts_launches_of_the_body() -> None:
    assert kernels_in_loop(MODULE) == 2


def test_count_in_loop_of_a_module_without_loops_is_zero() -> None:
    assert count_in_loop(MODULE.replace(" while(", " call("), "all-reduce") == 0
