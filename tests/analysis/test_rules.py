"""Dimension rules of single primitives, as text (see ``describe``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning

from galvatron_jax.analysis import Rule, register_rule, register_rule_text
from galvatron_jax.analysis._dimensions import RULES
from galvatron_jax.analysis._factors import Dim
from galvatron_jax.errors import AnalysisError
from tests.analysis.describe import analyse, describe


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


Case = tuple[str, Callable[..., Any], Sequence[Any], str]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolve_each_channel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", feature_group_count=4, dimension_numbers=numbers)


CONTRACTIONS: list[Case] = [
    ("matmul", jnp.dot, [(4, 6), (6, 8)], "ab,bc->ac sums b"),
    ("outer", jnp.outer, [(4,), (4,)], "a,b->ab"),
    ("gram", lambda x: x @ x.T, [(4, 6)], "ab->aa sums b"),
    ("square", lambda x: x @ x, [(4, 4)], "aa->aa sums a"),
    ("batched", lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(2, 4, 6), (2, 6, 8)], "abc,acd->abd sums c"),
    ("vmap", jax.vmap(jnp.dot), [(3, 4), (3, 4)], "ab,ab->a sums b"),
    ("scores", lambda q, k: jnp.einsum("bshd,bthd->bhst", q, k), [(2, 4, 3, 8)] * 2, "abcd,aecd->acbe sums d"),
    ("ragged", lax.ragged_dot, [(12, 6), (3, 6, 8), integers(3)], "ab,cbd,c->ad sums b whole ac"),
    ("convolution", convolve, [(2, 8, 8, 3), (3, 3, 3, 16)], "abcd,efdg->a8!8!g sums d whole bcef"),
    ("depthwise", convolve_each_channel, [(2, 8, 4), (3, 1, 4)], "abc,d14!->a8!4! whole bcd"),
]

ELEMENTWISE: list[Case] = [
    ("add", jnp.add, [(4, 6), (4, 6)], "ab,ab->ab"),
    ("implicit broadcast", lambda x, y: x + y, [(4, 6), (1, 6)], "ab,1b->ab"),
    ("scalar", lambda x: x + 1, [(4, 6)], "ab->ab"),
    ("select", lambda x, y: jnp.where(x > 0, x, y), [(4, 6), (4, 6)], "ab,ab->ab"),
    ("iota", lambda x: x + jnp.arange(6.0)[None], [(4, 6)], "ab->ab"),
    ("one hot", lambda i: jax.nn.one_hot(i, 6), [integers(4)], "a->ab"),
    ("random", lambda x: x * jax.random.normal(jax.random.key(0), x.shape), [(4, 6)], "ab->ab"),
    ("barrier", lambda x, y: lax.optimization_barrier((x, y)), [(4, 6), (4,)], "ab,c->ab,c"),
    ("sum", lambda x: x.sum(0), [(4, 6)], "ab->b sums a"),
    ("max kept", lambda x: x.max(1, keepdims=True), [(4, 6)], "ab->a1 sums b"),
    ("argmax", lambda x: jnp.argmax(x, 1), [(4, 6)], "ab->a sums b"),
    ("softmax", jax.nn.softmax, [(4, 6)], "ab->ab sums b"),
]

SHAPES: list[Case] = [
    ("merge", lambda x: x.reshape(24, 8), [(4, 6, 8)], "abc->(ab)c"),
    ("split", lambda x: x.reshape(4, 2, 3), [(4, 6)], "a(bc)->abc"),
    ("new boundary", lambda x: x.reshape(2, 12), [(4, 6)], "(ab)c->a(bc)"),
    ("boundary that does not nest", lambda x: x.reshape(6, 4), [(4, 6)], "4!6!->6!4! whole 4!6!"),
    ("6x50 and 4x75", lambda x: (x.reshape(6, 50), x.reshape(4, 75)), [(300,)], "(6!50!)->6!50!,4!75! whole 50!6!"),
    ("transpose", lambda x: x.T, [(4, 6)], "ab->ba"),
    ("broadcast", lambda x: jnp.broadcast_to(x, (3, 4, 6)), [(4, 6)], "ab->cab"),
    ("broadcast of 1", lambda x: jnp.broadcast_to(x, (4, 6)), [(1, 6)], "1a->ba"),
    ("squeeze", lambda x: x[:, 0], [(4, 1, 6)], "a1b->ab"),
    ("expand", lambda x: x[:, None], [(4, 6)], "ab->a1b"),
]

PARTS: list[Case] = [
    ("stack", lambda x, y: jnp.stack([x, y], 1), [(4, 6), (4, 6)], "ab,ab->a2!b"),
    ("unstack", lambda x: jnp.unstack(x, axis=1), [(4, 3)], "a3!->a,a,a whole 3!"),
    ("tile", lambda x: jnp.tile(x, (2, 2)), [(4, 6)], "ab->(ca)(db)"),
    ("aligned slice", lambda x: x[:, 2:4], [(4, 6)], "a(3!b)->ab"),
    ("other slice", lambda x: x[:, 1:4], [(4, 6)], "ab->ac whole b"),
    ("slice of one", lambda x: x[:, :1], [(4, 6)], "ab->a1 whole b"),
    ("strided slice", lambda x: x[:, ::2], [(4, 6)], "ab->ac whole b"),
    ("equal split", lambda x: jnp.split(x, 3, 1), [(4, 6)], "a(3!b)->ab,ab,ab"),
    ("unequal split", lambda x: jnp.split(x, [2], 1), [(4, 6)], "ab->ac,ad whole b"),
    ("halves of heads", lambda x: jnp.split(x.reshape(4, 3, 8), 2, -1), [(4, 24)], "a(b2!c)->abc,abc"),
    ("split inside a factor", lambda x: jnp.split(x.reshape(4, 24), 3, 1), [(4, 6, 4)], "a(3!b)c->a(bc),a(bc),a(bc)"),
    ("split across factors", lambda x: jnp.split(x.reshape(4, 24), 3, 1)[0], [(4, 4, 6)], "a4!6!->a8!"),
    ("concatenate", lambda x, y: jnp.concatenate([x, y], 1), [(4, 6), (4, 6)], "ab,ab->a(2!b)"),
    ("concatenate unequal", lambda x, y: jnp.concatenate([x, y], 1), [(4, 6), (4, 2)], "ab,ac->ad whole bc"),
    ("rotate halves", lambda x: jnp.concatenate([-x[:, 4:], x[:, :4]], 1), [(6, 8)], "a(2!b)->a(2!b)"),
    ("pad", lambda x: jnp.pad(x, ((0, 0), (2, 2))), [(4, 6)], "ab->ac whole b"),
    ("pad by parts", lambda x: jnp.pad(x, ((0, 0), (6, 0))), [(4, 6)], "ab->a(2!b)"),
    ("pad inside", lambda x: lax.pad(x, 0.0, [(0, -3, 1)]), [(4,)], "a->b whole a"),
    ("dynamic slice", lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), [(4, 6), integers()], "ab,->cb whole a"),
    (
        "dynamic update",
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 0)),
        [(4, 6), (2, 6), integers()],
        "ab,cb,->ab whole a",
    ),
]

ALONG: list[Case] = [
    ("cumsum", lambda x: jnp.cumsum(x, 1), [(4, 6)], "ab->ab whole b"),
    ("sort", lambda x: jnp.sort(x, 0), [(4, 6)], "ab->ab whole a"),
    ("argsort", lambda x: jnp.argsort(x, 1), [(4, 6)], "ab->ab whole b"),
    ("top k", lambda x: lax.top_k(x, 2), [(4, 6)], "ab->a2!,a2! whole b"),
    ("reverse", lambda x: jnp.flip(x, 1), [(4, 6)], "ab->ab whole b"),
]

LOOKUPS: list[Case] = [
    ("embedding", lambda t, i: jnp.take(t, i, axis=0), [(32, 8), integers(2, 4)], "ab,cd->cdb sums a"),
    ("per row", lambda t, i: jnp.take_along_axis(t, i, axis=1), [(4, 6), integers(4, 1)], "ab,a1->a1 sums b"),
    ("scatter add", lambda t, i, u: t.at[i].add(u), [(32, 8), integers(2, 4), (2, 4, 8)], "ab,cd,cdb->ab sums cd"),
    ("scatter", lambda t, i, u: t.at[i].set(u), [(32, 8), integers(4), (4, 8)], "ab,c,cb->ab whole c"),
]

CONTROL: list[Case] = [
    ("jit", jax.jit(jnp.dot), [(4, 6), (6, 8)], "ab,bc->ac sums b"),
    ("checkpoint", jax.checkpoint(jnp.dot), [(4, 6), (6, 8)], "ab,bc->ac sums b"),
    ("custom derivative", jax.nn.silu, [(4, 6)], "ab->ab"),
    (
        "recurrence",
        lambda c, xs, w: lax.scan(lambda c, x: (jnp.tanh(c @ w + x), c), c, xs),
        [(4, 6), (5, 4, 6), (6, 6)],
        "ab,5!ab,bb->ab,5!ab sums b whole 5!",
    ),
    ("fori loop", lambda x, y: lax.fori_loop(0, 3, lambda _, c: c + y, x), [(4, 6), (4, 6)], "ab,ab->ab"),
    ("while loop", lambda x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c + c.T, x), [(4, 4)], "aa->aa whole a"),
    (
        "cond",
        lambda p, x, y: lax.cond(p, lambda a, b: a @ b, lambda a, b: jnp.zeros((4, 8)), x, y),
        [jax.ShapeDtypeStruct((), bool), (4, 6), (6, 8)],
        ",ab,bc->ac sums b",
    ),
]

CASES = [*CONTRACTIONS, *ELEMENTWISE, *SHAPES, *PARTS, *ALONG, *LOOKUPS, *CONTROL]


@pytest.mark.parametrize(("function", "shapes", "expected"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_rule_of_primitive_finds_index_spaces(function: Callable[..., Any], shapes: list[Any], expected: str) -> None:
    assert describe(function, *shapes) == expected


# -------------------------------------------------------------------------------------------------------- whole layers
def test_fused_qkv_blocks_the_three() -> None:
    def qkv(x: jax.Array, w: jax.Array) -> jax.Array:
        q, k, v = jnp.split(x @ w, 3, axis=-1)
        q, k, v = (y.reshape(5, 4, 8) for y in (q, k, v))
        return jnp.einsum("hst,thd->shd", jax.nn.softmax(jnp.einsum("shd,thd->hst", q, k)), v)

    assert describe(qkv, (5, 16), (16, 96)) == "ab,b(3!cd)->acd sums abd"


def test_grouped_query_attention_splits_the_query_heads() -> None:
    attention = describe(jax.nn.dot_product_attention, (2, 5, 8, 16), (2, 5, 4, 16), (2, 5, 4, 16))
    assert attention == "ab(cd)e,afce,afcg->ab(cd)g sums ef"


def test_equal_sizes_stay_apart() -> None:
    def mlp(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w) @ v

    assert describe(mlp, (8, 8), (8, 8), (8, 8)) == "ab,bc,cd->ad sums bc"


# --------------------------------------------------------------------------------------------------------------- FLOPs
@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        pytest.param(jnp.dot, [(4, 6), (6, 8)], 2 * 4 * 6 * 8, id="matmul"),
        pytest.param(
            lambda q, k: jnp.einsum("bshd,bthd->bhst", q, k), [(2, 4, 3, 8)] * 2, 2 * 2 * 3 * 4 * 4 * 8, id="scores"
        ),
        pytest.param(convolve, [(2, 8, 8, 3), (3, 3, 3, 16)], 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3), id="convolution"),
        pytest.param(convolve_each_channel, [(2, 8, 4), (3, 1, 4)], 2 * (2 * 8 * 4) * 3, id="depthwise"),
        pytest.param(lax.ragged_dot, [(12, 6), (3, 6, 8), integers(3)], 2 * 12 * 6 * 8, id="ragged"),
        pytest.param(
            lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0],
            [(4, 6), (6, 6)],
            5 * 2 * 4 * 6 * 6,
            id="scan counts its trips",
        ),
    ],
)
def test_products_have_their_flops(function: Callable[..., Any], shapes: list[Any], flops: int) -> None:
    assert sum(op.flops * op.times for op in analyse(function, *shapes).ops) == flops


# --------------------------------------------------------------------------------------------------- unknown primitives
def call_back(x: jax.Array) -> Any:
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def call_kernel(x: jax.Array) -> Any:
    def double(source: Any, target: Any) -> None:
        target[...] = 2 * source[...]

    return pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.mark.parametrize(
    ("function", "primitive"),
    [pytest.param(call_back, "pure_callback", id="callback"), pytest.param(call_kernel, "pallas_call", id="pallas")],
)
def test_unknown_primitive_blocks_its_result_and_is_named(function: Callable[..., Any], primitive: str) -> None:
    found = analyse(lambda x: function(function(x)), (4, 6))
    assert found.unknown == {primitive: 2}
    assert describe(function, (4, 6)) == "ab->4!6! whole ab"


def test_registered_rule_replaces_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galvatron_jax.analysis._dimensions.RULES", RULES.copy())

    @register_rule("pure_callback")
    def same_layout(rule: Rule) -> list[list[Dim]]:
        return [[list(dim) for dim in rule.inputs[0].dims]]

    assert describe(call_back, (4, 6)) == "ab->ab"
    assert not analyse(call_back, (4, 6)).unknown


def call_kernel_of_two(x: jax.Array, y: jax.Array) -> Any:
    return jax.pure_callback(lambda x, y: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x, y)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a b, c b -> a b", "ab,cb->ab whole c", id="consumed inside"),
        pytest.param("a b, c d -> a b", "ab,cd->ab whole cd", id="apart"),
        pytest.param("a _, c d -> a _", "ab,cd->a6! whole bcd", id="not to be sharded"),
        pytest.param("a (b c=2), a d -> a (b c)", "a(bc),ad->a(bc) whole d", id="made of two"),
        pytest.param("a b, c d -> a b sums c", "ab,cd->ab sums c whole d", id="added up"),
    ],
)
def test_rule_written_as_text(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galvatron_jax.analysis._rules.RULES", rules := RULES.copy())
    monkeypatch.setattr("galvatron_jax.analysis._dimensions.RULES", rules)
    register_rule_text("pure_callback", text)
    assert describe(call_kernel_of_two, (4, 6), (4, 6)) == expected


def test_rule_without_an_arrow_says_what_is_expected() -> None:
    with pytest.raises(AnalysisError, match="one word for each dimension"):
        register_rule_text("mine", "a b c")


def custom_mix(rule: Any, **factors: Any) -> Callable[..., Any]:
    """Return a kernel of two matrices that carries ``rule``."""

    @custom_partitioning
    def mix(x: jax.Array, y: jax.Array) -> Any:
        return call_kernel_of_two(x, y)

    nothing = dict.fromkeys(("partition", "infer_sharding_from_operands"), lambda *_: None)
    mix.def_partition(**nothing, sharding_rule=rule, **factors)
    return mix


def mixing_rule(_mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
    assert [len(v.shape) for v in (*operands, *results)] == [2, 2, 2]
    row, other = ArrayMapping("a", "b"), ArrayMapping("c", "b")
    return SdyShardingRule((row, other), (row,), need_replication_factors=("c",))


def rule_that_needs_a_mesh(mesh: Any, _operands: Any, _results: Any) -> str:
    return " ".join(mesh.axis_names)


def test_rule_that_a_custom_partitioning_call_carries_is_read() -> None:
    mix = custom_mix("a b, c b -> a b", need_replication_factors=("c",))
    assert describe(mix, (4, 6), (4, 6)) == "ab,cb->ab whole c"


def test_rule_that_is_a_function_of_shapes_is_asked() -> None:
    assert describe(custom_mix(mixing_rule), (4, 6), (4, 6)) == "ab,cb->ab whole c"


@pytest.mark.parametrize("rule", [rule_that_needs_a_mesh, "...a, ...b -> ...a"])
def test_rule_that_says_too_little_blocks_as_an_unknown_kernel_does(rule: Any) -> None:
    assert describe(custom_mix(rule), (4, 6), (4, 6)) == describe(call_kernel_of_two, (4, 6), (4, 6))


def test_operations_that_need_a_class_whole_are_named() -> None:
    found = analyse(lambda x: call_back(jnp.cumsum(x, axis=1)), (4, 6))
    assert [(op.name, len(lost)) for op, lost in found.needed_whole()] == [("cumsum", 1), ("pure_callback", 2)]
