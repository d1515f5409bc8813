"""Tensor-parallel candidates: the choices of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053) are derived."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from galvatron_jax._text import plain
from galvatron_jax.analysis import AnalysedKind, analyse_model, analysis_lines
from galvatron_jax.analysis._candidates import class_sets, sequence_parallel, tensor_parallel
from galvatron_jax.analysis._factored import undivided_fusions
from galvatron_jax.profile import Candidate, Collective
from tests.support.fused_models import CUTS, FusedBlock, fused, unequal
from tests.support.small_models import (
    BATCH,
    SEQ,
    WIDTH,
    SmallModel,
    perceptrons,
    regression,
    small_llama,
    stack,
    transformers,
)


def kind_of(model: SmallModel, name: str) -> AnalysedKind:
    return analyse_model(model.build, model.loss, model.abstract_batch).kinds[name]


def best(model: SmallModel, name: str) -> Candidate:
    return kind_of(model, name).profile.candidates[0]


def counted(collectives: tuple[Collective, ...] | None) -> Counter[tuple[str, str, tuple[str, ...]]]:
    """How many collectives of each (phase, kind, classes)."""
    assert collectives is not None
    counts: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    for item in collectives:
        counts[item.phase, item.kind, item.array.classes] += item.array.count
    return counts


STREAM = ("batch", "embed", "seq")

# --------------------------------------------------------------------------------------------------- Megatron's choices
# Reduced in the backward pass without merging: one cotangent of the stream for each product that reads it.
MEGATRON: dict[str, tuple[Callable[..., SmallModel], str, set[str], int, int]] = {
    "llama with groups": (functools.partial(small_llama, heads=8, kv_heads=4), "layers.*", {"heads", "mlp"}, 2, 5),
    "llama": (functools.partial(small_llama, heads=4, kv_heads=4), "layers.*", {"heads", "mlp"}, 2, 5),
    "transformer": (transformers, "blocks.*", {"heads", "mlp"}, 2, 4),
    "perceptron": (perceptrons, "blocks.*", {"mlp"}, 1, 1),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_best_candidate_of_a_block_is_megatrons(name: str) -> None:
    build, kind, classes, forward, backward = MEGATRON[name]
    found = best(build(), kind)
    assert set(found.classes) == classes
    assert found.flops_share == pytest.approx(1)
    assert counted(found.tensor) == {
        ("forward", "all-reduce", STREAM): forward,
        ("backward", "all-reduce", STREAM): backward,
    }


def test_one_kv_head_is_kept_whole_and_its_cotangents_are_reduced() -> None:
    """Multi-query attention: the query heads are sharded, every device has the only key and value."""
    found = best(small_llama(heads=4, kv_heads=1, embed=32, mlp=48), "layers.*")
    assert set(found.classes) == {"group", "mlp"}
    # Of 32 * (32 + 8 + 8 + 32) + 3 * 32 * 48 weights and 2 * 16 * 32 elements of products of scores, k and v are whole.
    total = 32 * (32 + 8 + 8 + 32) + 3 * 32 * 48 + 2 * SEQ * 32
    assert found.flops_share == pytest.approx(1 - 32 * (8 + 8) / total)
    counts = counted(found.tensor)
    assert counts["backward", "all-reduce", ("batch", "head_dim", "seq")] == 1
    assert counts["backward", "all-reduce", ("batch", "head_dim2", "seq")] == 1
    assert counts["backward", "all-reduce", STREAM] == 3


def test_kv_heads_spill_into_the_query_heads_of_a_group() -> None:
    """Grouped queries with tp > kv heads: keys and values are computed alike by the ranks that share a kv head."""
    found = best(small_llama(heads=8, kv_heads=4, mlp=48), "layers.*")
    sizes = {"heads": 4, "group": 2, "mlp": 48}
    assert found.spill == {"heads": "group"}
    assert found.max_degree == 8
    assert found.shards(4, sizes) == {"heads": 4, "mlp": 4}
    assert found.shards(8, sizes) == {"heads": 4, "group": 2, "mlp": 8}
    assert found.undivided(sizes, 8) == []
    assert found.undivided({**sizes, "heads": 6}, 4) == ["heads"], "three heads per rank cannot be cut further"
    per_group = [c for c in found.collectives(8, sizes, sp=False) if c.over == ("group",)]
    assert {c.array.classes for c in per_group} == {
        ("batch", "head_dim", "heads", "seq"),
        ("batch", "head_dim2", "heads", "seq"),
    }
    assert found.collectives(4, sizes, sp=False) == found.tensor


def test_heads_without_groups_do_not_spill() -> None:
    assert not best(small_llama(heads=4, kv_heads=4), "layers.*").spill
    assert not best(transformers(), "blocks.*").spill


def test_merged_sums_leave_megatrons_two_and_two() -> None:
    merged: Counter[str] = Counter()
    for item in best(small_llama(heads=4, kv_heads=4), "layers.*").tensor:
        merged[item.phase] += item.merged_count
    assert merged == {"forward": 2, "backward": 2}


def test_sequence_parallelism_scatters_what_it_reduced_and_gathers_before_products() -> None:
    found = best(transformers(), "blocks.*")
    counts = counted(found.sequence)
    assert counts["forward", "reduce-scatter", STREAM] == 2
    assert counts["forward", "all-gather", STREAM] == 2
    assert not any(kind == "all-reduce" and classes == STREAM for _, kind, classes in counts)


def test_gathers_and_exchanges_move_the_narrow_side_of_casts_and_sums_what_is_summed() -> None:
    """The table is read and its gradient added up in float32; rotary positions and scores are float32."""
    model = small_llama(dtype="bfloat16")
    embed = {(c.phase, c.kind): c.array.dtype for c in best(model, "embed").sequence or ()}
    assert embed == {("forward", "reduce-scatter"): "float32", ("backward", "all-gather"): "bfloat16"}
    ulysses = kind_of(model, "layers.*").profile.ulysses
    assert ulysses is not None
    assert {c.array.dtype for c in ulysses.collectives} == {"bfloat16"}


def test_degree_divides_all_classes() -> None:
    assert best(small_llama(heads=8, kv_heads=8, embed=64, mlp=36), "layers.*").max_degree == 4
    assert best(perceptrons(mlp=60), "blocks.*").max_degree == 60


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["embed", "head"])
def test_vocabulary_is_the_candidate_of_embed_and_head(kind: str, tied: bool) -> None:
    found = best(small_llama(tied=tied), kind)
    assert found.classes == ("vocab",)
    assert found.flops_share == 1


class Tables(nnx.Module):
    """Words and two types of them, as BERT has."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.words, self.types = nnx.Embed(64, WIDTH, rngs=rngs), nnx.Embed(2, WIDTH, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.words(ids) + self.types(ids % 2)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return jnp.mean(x)


def test_a_small_table_does_not_hold_the_vocabulary_to_its_size() -> None:
    ids = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    analysis = analyse_model(lambda: Tables(rngs=nnx.Rngs(0)), lambda model, ids: model(ids), ids)
    assert analysis.profile.kind("embed").candidates[0].max_degree == 64


class Balanced(nnx.Module):
    """A perceptron that adds to a loss, as a router does."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x + self.down(jnp.tanh(self.up(x)))
        return y, loss + jnp.mean(jnp.square(y))


def test_a_loss_that_is_handed_on_beside_the_stream_leaves_sequence_parallelism_legal() -> None:
    def build() -> nnx.List[Balanced]:
        return nnx.List([Balanced(rngs=nnx.Rngs(0)) for _ in range(3)])

    def loss(blocks: nnx.List[Balanced], x: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for block in blocks:
            x, total = block(x, total)
        return jnp.mean(x) + total

    analysis = analyse_model(build, loss, jax.ShapeDtypeStruct((BATCH, SEQ, WIDTH), jnp.float32))
    inner = [kind for kind in analysis.profile.kinds if len(kind.inputs) > 1 and kind.candidates]
    assert inner
    assert all(kind.candidates[0].sequence is not None for kind in inner)


def test_sharded_vocabulary_reduces_only_tokens_in_the_loss() -> None:
    counts = counted(best(small_llama(), "head").tensor)
    assert counts == {("forward", "all-reduce", ("batch", "seq")): 3, ("backward", "all-reduce", STREAM): 1}


# ---------------------------------------------------------------------------------------------------------- equal sizes
def test_equal_sizes_do_not_confuse_classes() -> None:
    equal = small_llama(batch=32, seq=32, embed=32, heads=4, kv_heads=4, mlp=32, vocab=32)
    profile = analyse_model(equal.build, equal.loss, equal.abstract_batch).profile
    other = small_llama(embed=64, heads=4, kv_heads=4, mlp=80, vocab=96)
    expected = analyse_model(other.build, other.loss, other.abstract_batch).profile
    for a, b in zip(profile.kinds, expected.kinds, strict=True):
        assert [p.dims for p in a.parameters] == [p.dims for p in b.parameters]
        assert [_without_share(c) for c in a.candidates] == [_without_share(c) for c in b.candidates]
        assert set(a.residuals) == set(b.residuals)


def _without_share(candidate: Candidate) -> tuple[object, ...]:
    return candidate.classes, candidate.tensor, candidate.sequence


def test_heads_equal_to_positions_stay_apart() -> None:
    found = kind_of(transformers(heads=SEQ, width=64), "blocks.*")
    sizes = found.profile.classes
    assert sizes["heads"] == sizes["seq"] == SEQ
    assert set(found.profile.candidates[0].classes) == {"heads", "mlp"}


# ------------------------------------------------------------------------------------------------------------ not legal
@pytest.mark.parametrize("cut", CUTS)
def test_fused_projections_are_stored_with_a_dimension_for_their_parts(cut: str) -> None:
    found = kind_of(fused(cut, layers=2, batch=4), "blocks.*")
    dims = {p.path: p.dims for p in found.profile.parameters}
    assert dims["qkv.kernel"] == (("embed",), (3,), ("heads", "group"))
    assert dims["qkv.bias"] == ((3,), ("heads", "group"))
    assert dims["gate_up.kernel"] == (("embed",), (2,), ("mlp",))
    assert dims["down.kernel"] == (("mlp",), ("embed",)), "what loses nothing is stored as it is"
    assert set(found.profile.candidates[0].classes) == {"heads", "mlp"}
    assert found.profile.candidates[0].flops_share == pytest.approx(1)
    assert found.profile.candidates[0].sequence is not None
    assert found.profile.ulysses is not None
    assert not undivided_fusions(found.layer)


def test_parts_of_unequal_width_are_named_and_the_rest_is_offered() -> None:
    """Grouped queries, keys and values in one product: tp divides the perceptron alone."""
    model = unequal(batch=4)
    analysis = analyse_model(model.build, model.loss, model.abstract_batch)
    found = analysis.kinds["blocks.*"]
    assert not found.is_factored
    assert found.profile.candidates[0].classes == ("mlp",)
    assert [found.profile.parameters[p].path for p in undivided_fusions(found.layer)] == ["qkv.kernel"]
    assert "qkv.kernel: projections fused in parts that cannot be sharded" in plain(analysis_lines(analysis))


def test_a_table_that_another_kind_reads_flat_is_stored_flat() -> None:
    """The second block reads the first one's fused kernel whole too: both must keep it in one shape."""

    class Reader(nnx.Module):
        def __init__(self, block: FusedBlock) -> None:
            self.block = block
            self.first = nnx.List([FusedBlock("split", rngs=nnx.Rngs(i)) for i in (1, 2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.block(x)
            for block in self.first:
                x = block(x)
            return x + jnp.mean(jnp.cumsum(self.block.qkv.kernel[...], axis=1))

    model = regression(lambda: Reader(FusedBlock("split", rngs=nnx.Rngs(0))), BATCH, SEQ, 32)
    analysis = analyse_model(model.build, model.loss, model.abstract_batch)
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for segment in analysis.cut.segments:
        kind = analysis.kinds[segment.kind]
        for index, shape in zip(kind.layer.parameters, kind.stored_shapes, strict=True):
            shapes.setdefault(id(segment.inputs[index]), set()).add(shape)
    assert all(len(found) == 1 for found in shapes.values())


def test_recurrent_width_is_not_offered() -> None:
    """The recurrent weight has the class twice; the result of its product has what the product sums over."""

    class Recurrent(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.into = nnx.Linear(WIDTH, 24, rngs=rngs)
            self.again = nnx.Linear(24, 24, rngs=rngs)
            self.out = nnx.Linear(24, WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            hidden = jnp.swapaxes(self.into(x), 0, 1)

            def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
                carry = jnp.tanh(self.again(carry) + row)
                return carry, carry

            _, rows = jax.lax.scan(step, jnp.zeros(hidden.shape[1:]), hidden)
            return x + self.out(jnp.swapaxes(rows, 0, 1))

    found = kind_of(regression(stack(2, lambda rngs: Recurrent(rngs=rngs))), "blocks.*")
    assert not found.profile.candidates
    assert {"scan"} <= {op.name for op in found.layer.ops}, "a scan over time stays a scan"
    assert sum(op.flops * op.times for op in found.layer.ops) == 3 * 2 * BATCH * SEQ * (2 * WIDTH * 24 + 24 * 24)


def test_class_that_something_needs_whole_is_not_offered() -> None:
    class Sorted(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(WIDTH, 64, rngs=rngs)
            self.down = nnx.Linear(64, WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.down(jnp.cumsum(self.up(x), axis=-1))

    assert not kind_of(regression(stack(2, lambda rngs: Sorted(rngs=rngs))), "blocks.*").profile.candidates


def test_class_sets_are_sorted_by_share_then_bytes() -> None:
    found = kind_of(small_llama(heads=4, kv_heads=4), "layers.*")
    sets = class_sets(found.layer)
    moved = [sum(c.value.bytes for c in tensor_parallel(found.layer, s)) for s in sets]
    assert moved == [s.collective_bytes for s in sets], "figures of a set are the sums of its classes' figures"
    figures = [(-round(s.flops_share, 3), size) for s, size in zip(sets, moved, strict=True)]
    assert len(sets) > 2
    assert figures == sorted(figures)
    assert all(sequence_parallel(found.layer, s, None) is None for s in sets)


def test_no_set_holds_two_classes_of_one_operation() -> None:
    found = kind_of(transformers(), "blocks.*")
    for chosen in class_sets(found.layer):
        for op in found.layer.ops:
            held = {f for v in [*op.inputs, *op.outputs] for f in found.layer.classes(v)}
            assert len(held & chosen.classes) <= 1
