from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.verify import HloCollective, collectives

# Lines of programs that jaxlib 0.10.2 compiled for 8 CPU devices and for 8 H100 (shortened where "..." stands).
COMBINED = """\
  %all-reduce.7 = (f32[], f32[64,64]{1,0}, /*index=2*/f32[64]{0}) all-reduce(%a, %b, %c), channel_id=1, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, to_apply=%region_1, \
metadata={op_name="jit(f)/transpose(jvp(layers.0))/dot_general" stack_frame_id=3}
"""
ASYNC_ALL_REDUCE = """\
  %all-reduce-start.3 = f32[2,32]{1,0} all-reduce-start(%bitcast.87.0), channel_id=38, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, to_apply=%region_18.18.clone, \
metadata={op_name="jit(f)/while/body/closed_call/jvp()/reduce_max" scheduling_name="all-reduce-start.3"}
  %all-reduce-done.3 = f32[2,32]{1,0} all-reduce-done(%all-reduce-start.3)
"""
ASYNC_ALL_GATHER = """\
  %all-gather-start.17 = ((f32[2,16,64]{2,0,1}, bf16[2,16,64]{2,0,1}), (f32[2,32,64]{2,0,1}, bf16[2,32,64]{2,0,1})) \
all-gather-start(%bitcast.3782.0, %bitcast.3804.0), channel_id=97, \
replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_1'}, dimensions={1}, use_global_device_ids=true
"""
ASYNC_ALL_GATHER_OF_ONE = """\
  %all-gather-start = (f32[2,16,64]{2,0,1}, f32[2,32,64]{2,0,1}) all-gather-start(%bitcast.3500.0), channel_id=7, \
replica_groups=[4,2]<=[8], dimensions={1}, use_global_device_ids=true
"""
ASYNC_REDUCE_SCATTER = """\
  %reduce-scatter-start.2 = ((f32[8,32,64]{2,0,1}), f32[8,4,64]{2,0,1}) reduce-scatter-start(%bitcast.3550.0), \
channel_id=157, replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}, dimensions={1}, \
to_apply=%add.4.clone, metadata={scheduling_name="reduce-scatter-start.2"}
"""
ASYNC_ALL_TO_ALL = """\
  %all-to-all-start.3 = ((f32[2,4,1,4,64]{4,3,2,1,0}), f32[2,4,1,4,64]{4,3,2,1,0}) all-to-all-start(%bitcast.65.0), \
channel_id=33, replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1,'axis_3'=1], device_ids=([4,2]T(1,0)) {'axis_0'}, \
dimensions={0}, metadata={op_name="jit(f)/jvp()/sharding_constraint"}
"""
ASYNC_PERMUTE = """\
  %collective-permute-start.1 = (f32[4,1,8,64]{3,0,2,1}, f32[4,1,8,64]{3,0,2,1}, u32[], u32[]) \
collective-permute-start(%bitcast.3562.0), channel_id=34, source_target_pairs={{0,0},{2,1},{1,2},{3,3}}
"""
WRAPPED = """\
%wrapped_all-reduce (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %all-reduce.1 = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  %start = ((f32[16]{0}), f32[16]{0}, u32[]) async-start(%q), calls=%wrapped_all-reduce
  ROOT %done = f32[16]{0} async-done(%start)
}
"""


def only(text: str) -> HloCollective:
    (found,) = collectives(text)
    return found


@pytest.mark.parametrize(
    ("line", "kind", "size", "dtypes", "group_size"),
    [
        pytest.param(COMBINED, "all-reduce", 4 + 4 * 64 * 64 + 4 * 64, ("f32",) * 3, 8, id="combined"),
        pytest.param(ASYNC_ALL_REDUCE, "all-reduce", 4 * 2 * 32, ("f32",), 2, id="all-reduce-start"),
        pytest.param(ASYNC_ALL_GATHER, "all-gather", 6 * 2 * 32 * 64, ("f32", "bf16"), 2, id="all-gather-start"),
        pytest.param(ASYNC_ALL_GATHER_OF_ONE, "all-gather", 4 * 2 * 32 * 64, ("f32",), 2, id="all-gather-start of one"),
        pytest.param(ASYNC_REDUCE_SCATTER, "reduce-scatter", 4 * 8 * 4 * 64, ("f32",), 8, id="reduce-scatter-start"),
        pytest.param(ASYNC_ALL_TO_ALL, "all-to-all", 4 * 2 * 4 * 4 * 64, ("f32",), 2, id="all-to-all-start"),
        pytest.param(ASYNC_PERMUTE, "collective-permute", 4 * 4 * 8 * 64, ("f32",), 2, id="collective-permute-start"),
        pytest.param(WRAPPED, "all-reduce", 4 * 16, ("f32",), 2, id="wrapped in async-start"),
    ],
)
def test_collectives_of_one_line_count_the_results_only(
    line: str, kind: str, size: int, dtypes: tuple[str, ...], group_size: int
) -> None:
    found = only(line)
    assert (found.kind, found.bytes, found.dtypes, found.group_size) == (kind, size, dtypes, group_size)
    assert found.arrays == len(dtypes)


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 12), ("s4", 6), ("u8", 12), ("bf16", 24), ("f8e4m3fn", 12), ("f64", 96), ("c64", 96)]
)
def test_bytes_follow_the_dtype(dtype: str, size: int) -> None:
    line = f"  %g = {dtype}[3,4]{{1,0:T(8,128)S(1)}} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={{0}}"
    assert only(line).bytes == size


def test_other_instructions_are_no_collectives() -> None:
    text = """\
  %fusion = f32[8]{0} fusion(%all-reduce.7), kind=kLoop, calls=%c, metadata={op_name="a = f32[8] all-reduce(x)"}
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  %slice = f32[1]{0} dynamic-slice(%all-gather.1, %i), dynamic_slice_sizes={1}
"""
    assert collectives(text) == []


def test_op_name_says_where_it_comes_from_and_is_empty_without() -> None:
    assert only(COMBINED).op_name == "jit(f)/transpose(jvp(layers.0))/dot_general"
    assert only(ASYNC_REDUCE_SCATTER).op_name == ""


@pytest.mark.parametrize(
    "turns",
    [
        'x={"known_trip_count":{"n":"7"}}',
        'metadata={op_name="jit(_train)/microbatches_7/while"}',  # the compiler does not know (runtime._microbatches)
    ],
)
def test_in_loop_reaches_what_a_body_calls_and_nothing_else(turns: str) -> None:
    text = """\
%inner (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%body.2 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %call = f32[8]{0} call(%x), to_apply=%inner
  %all-gather.2 = f32[16]{0} all-gather(%call), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main.3 (p: f32[8]) -> f32[8] {
  %while = (s32[], f32[8]{0}) while(%tuple), condition=%cond, body=%body.2
  %all-to-all.3 = f32[8]{0} all-to-all(%y), replica_groups={{0,1}}, dimensions={0}
}
"""
    text = text.replace("condition=%cond, body=%body.2", f"condition=%cond, body=%body.2, {turns}")
    assert [c.times for c in collectives(text)] == [7, 7, 1]
    assert [(c.kind, c.in_loop) for c in collectives(text)] == [
        ("all-reduce", True),
        ("all-gather", True),
        ("all-to-all", False),
    ]


@pytest.fixture(name="mesh")
def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def compiled(
    mesh: Mesh, function: Callable[..., Any], *specs: PartitionSpec, out: PartitionSpec
) -> list[HloCollective]:
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    jitted = jax.jit(function, in_shardings=places, out_shardings=NamedSharding(mesh, out))
    text = jitted.lower(*[x] * len(specs)).compile().as_text()
    assert text is not None
    return collectives(text)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("spec", "groups"),
    [
        (PartitionSpec("model"), ((0, 1, 2, 3), (4, 5, 6, 7))),
        (PartitionSpec("data"), ((0, 4), (1, 5), (2, 6), (3, 7))),
        (PartitionSpec(("data", "model")), (tuple(range(8)),)),
    ],
)
def test_compiled_sum_is_one_all_reduce_over_its_axis(
    mesh: Mesh, spec: PartitionSpec, groups: tuple[tuple[int, ...], ...]
) -> None:
    (found,) = compiled(mesh, lambda x: x.sum(0), spec, out=PartitionSpec())
    assert (found.kind, found.bytes, found.groups, found.in_loop) == ("all-reduce", 4 * 16, groups, False)
    assert "reduce_sum" in found.op_name


@pytest.mark.multidevice
def test_compiled_gather_has_the_bytes_of_the_whole(mesh: Mesh) -> None:
    (found,) = compiled(mesh, lambda x: x, PartitionSpec("data", "model"), out=PartitionSpec("data"))
    assert (found.kind, found.bytes, found.group_size) == ("all-gather", 4 * 4 * 16, 4)


@pytest.mark.multidevice
def test_compiled_loop_is_seen_around_its_collective(mesh: Mesh) -> None:
    place = NamedSharding(mesh, PartitionSpec("data", "model"))

    def repeated(x: jax.Array, w: jax.Array) -> jax.Array:
        def turn(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.with_sharding_constraint(jnp.tanh(y @ (w.T @ y)), place), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    spec = PartitionSpec("data", "model")
    assert any(c.in_loop for c in compiled(mesh, repeated, spec, spec, out=spec))
