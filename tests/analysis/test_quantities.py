"""Quantities of layer kinds against formulas, against what JAX really keeps, and against analyses at other shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import pytest
from flax import nnx

from galvatron_jax.analysis import AnalysedKind, Analysis, analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Remat, Strategy
from galvatron_jax.profile import SEQ as SEQ_CLASS
from galvatron_jax.profile import Array, Candidate, LayerKind, ModelProfile
from galvatron_jax.runtime import LayerLayout, stage_mesh
from galvatron_jax.runtime._segment import build_segment
from tests.support.small_models import BATCH, SEQ, SMALL_MODELS, SmallModel, perceptrons, small_llama, transformers

EMBED, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 96, 4, 2, 8
"""The sizes of ``small_llama()``."""
TOKENS = BATCH * SEQ


def analyse(model: SmallModel) -> Analysis:
    return analyse_model(model.build, model.loss, model.abstract_batch)


def kind_of(model: SmallModel, name: str) -> AnalysedKind:
    return analyse(model).kinds[name]


# ------------------------------------------------------------------------------------------------------- matmul FLOPs
def flops(kind: LayerKind, phase: str, *, attention: bool | None = None) -> float:
    return sum(
        dot.count * dot.flops(kind.classes, {})
        for dot in kind.dots
        if dot.phase == phase and attention in (None, dot.attention)
    )


def test_llama_block_forward_flops_equal_the_formula() -> None:
    kind = kind_of(small_llama(), "layers.*").profile
    weights = EMBED * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * EMBED * MLP
    assert flops(kind, "forward", attention=False) == 2 * TOKENS * weights
    assert flops(kind, "forward", attention=True) == 2 * (2 * BATCH * HEADS * SEQ * SEQ * HEAD_DIM)


@pytest.mark.parametrize("name", ["layers.*", "head"])
def test_llama_backward_flops_are_twice_the_forward(name: str) -> None:
    """Each product ``y = x @ w`` has ``dx = dy @ w.T`` and ``dw = x.T @ dy``."""
    kind = kind_of(small_llama(), name).profile
    assert flops(kind, "backward") == 2 * flops(kind, "forward") > 0


def test_llama_head_and_embed_flops() -> None:
    analysis = analyse(small_llama())
    assert flops(analysis.kinds["head"].profile, "forward") == 2 * TOKENS * EMBED * VOCAB
    assert not analysis.kinds["embed"].profile.dots, "a lookup multiplies nothing"


def test_first_layer_on_plain_data_counts_as_its_fellows() -> None:
    """No cotangent flows into the batch, but the kind stands for the later layers too."""
    kind = kind_of(perceptrons(3, mlp=64), "blocks.*")
    assert flops(kind.profile, "forward") == 2 * TOKENS * 2 * EMBED * 64
    assert flops(kind.profile, "backward") == 2 * flops(kind.profile, "forward")
    assert [boundary.gradient for boundary in kind.profile.inputs if boundary.array.classes] == [True]


def test_flops_divide_by_the_shards_of_their_classes() -> None:
    kind = kind_of(small_llama(), "layers.*").profile
    shards = {"batch": 2, "heads": 2, "mlp": 2}
    local = sum(dot.count * dot.flops(kind.classes, shards) for dot in kind.dots)
    assert local == (flops(kind, "forward") + flops(kind, "backward")) / 4


def test_only_the_last_product_is_not_recomputed() -> None:
    kind = kind_of(small_llama(), "layers.*").profile
    skipped = [dot for dot in kind.dots if not dot.recomputed]
    assert [(dot.phase, dot.count, set(dot.classes)) for dot in skipped] == [
        ("forward", 1, {"batch", "seq", "mlp", "embed"})
    ]


@pytest.mark.parametrize("name", ["convolutions", "transformers", "encoder-decoder"])
def test_dots_hold_all_flops_of_the_operations(name: str) -> None:
    for kind in analyse(SMALL_MODELS[name]()).kinds.values():
        expected = sum(op.flops * op.times for op in kind.layer.ops)
        assert flops(kind.profile, "forward") + flops(kind.profile, "backward") == expected


# --------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("name", sorted(set(SMALL_MODELS) - {"llama tied", "scan"}))
def test_parameter_count_is_the_models(name: str) -> None:
    model = SMALL_MODELS[name]()
    built = nnx.eval_shape(model.build)
    assert analyse(model).profile.parameter_count == sum(x.size for x in jax.tree.leaves(nnx.state(built, nnx.Param)))


def test_tied_table_is_a_parameter_of_embed_and_head() -> None:
    """Both read it; the profile has no way yet to say that it is one array."""
    kinds = analyse(small_llama(tied=True)).kinds
    assert [p.path for p in kinds["embed"].profile.parameters] == ["embedding"]
    assert ("vocab", "embed") in [tuple(f for dim in p.dims for f in dim) for p in kinds["head"].profile.parameters]


def test_parameters_are_read_in_the_dtype_of_their_cast() -> None:
    kinds = analyse(small_llama(dtype="bfloat16")).kinds
    dtypes = {p.path: (p.dtype, p.compute_dtype) for kind in kinds.values() for p in kind.profile.parameters}
    assert dtypes["mlp.up.kernel"] == dtypes["attention.query.kernel"] == ("float32", "bfloat16")
    assert dtypes["embedding"] == dtypes["mlp_norm.scale"] == ("float32", "float32")


# ---------------------------------------------------------------------------------------------------------- residuals
def _sizes(arrays: tuple[Array, ...], sizes: Mapping[str, int]) -> Counter[tuple[str, int]]:
    """How many arrays of each (dtype, elements)."""
    counts: Counter[tuple[str, int]] = Counter()
    for array in arrays:
        counts[array.dtype, array.factor * math.prod(sizes[name] for name in array.classes)] += array.count
    return counts


def _really_kept(kind: AnalysedKind, remat: Remat) -> Counter[tuple[str, int]]:
    """What ``jax.vjp`` of the runtime's own segment keeps besides its inputs."""
    stage = stage_mesh(Cluster(nodes=1, gpus_per_node=1, gpu="cpu"), jax.devices()[:1])
    segment = build_segment(LayerLayout(kind, Strategy(remat=remat), stage))

    def kept(inputs: list[Any]) -> list[Any]:
        def forward(*parts: Any) -> tuple[list[Any], list[Any]]:
            values = list(inputs)
            for index, part in zip(kind.layer.differentiated, parts, strict=True):
                values[index] = part
            outputs = segment(values)
            return [o for o in outputs if jnp.issubdtype(o.dtype, jnp.inexact)], outputs

        _, pullback, _ = jax.vjp(forward, *[inputs[i] for i in kind.layer.differentiated], has_aux=True)
        return jax.tree.leaves(pullback)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kind.layer.segment.inputs]
    for index, stored in zip(kind.layer.parameters, kind.stored_shapes, strict=True):
        shapes[index] = jax.ShapeDtypeStruct(stored, shapes[index].dtype)
    program = jax.make_jaxpr(kept)(shapes).jaxpr
    made = {variable for eqn in program.eqns for variable in eqn.outvars}
    found = {variable for variable in program.outvars if variable in made}
    return Counter((str(v.aval.dtype), math.prod(v.aval.shape)) for v in found)


def check_residuals(found: AnalysedKind) -> None:
    """Bytes for bytes, under each remat policy that keeps something."""
    sizes = found.profile.classes
    assert found.profile.residuals_dots is not None
    assert _sizes(found.profile.residuals, sizes) == _really_kept(found, "none")
    assert _sizes(found.profile.residuals_dots, sizes) == _really_kept(found, "dots")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["embed", "layers.*", "head"])
def test_llama_residuals_are_exactly_what_the_runtime_keeps(kind: str, dtype: str) -> None:
    check_residuals(kind_of(small_llama(dtype=dtype), kind))


@pytest.mark.parametrize("name", sorted(set(SMALL_MODELS) - {"llama", "llama tied", "scan", "widening"}))
def test_residuals_are_exactly_what_the_runtime_keeps(name: str) -> None:
    for found in analyse(SMALL_MODELS[name]()).kinds.values():
        check_residuals(found)


def test_remat_dots_keeps_products_with_weights_and_attention_runs_again() -> None:
    """Of a Llama block: queries, keys, values, their mixture projected, gate and up; not the scores."""
    kind = kind_of(small_llama(), "layers.*").profile
    heads, kv_heads, mlp = TOKENS * HEADS * HEAD_DIM, TOKENS * KV_HEADS * HEAD_DIM, TOKENS * MLP
    assert kind.residuals_dots is not None
    assert _sizes(kind.residuals_dots, kind.classes) == Counter(
        ("float32", size) for size in (heads, kv_heads, kv_heads, TOKENS * EMBED, mlp, mlp)
    )
    again = [dot for dot in kind.dots if dot.phase == "forward" and dot.batched and dot.recomputed]
    assert again == [dot for dot in kind.dots if dot.phase == "forward" and dot.attention]


@pytest.mark.parametrize("name", ["llama", "dropout", "convolutions"])
def test_full_remat_keeps_nothing_but_inputs(name: str) -> None:
    for found in analyse(SMALL_MODELS[name]()).kinds.values():
        assert not _really_kept(found, "full")


def test_perceptron_residuals_are_the_ones_expected() -> None:
    """By hand: mean and mean square of the norm, and the product before the activation."""
    kind = kind_of(perceptrons(mlp=64), "blocks.*").profile
    assert _sizes(kind.residuals, kind.classes) == {("float32", TOKENS): 2, ("float32", TOKENS * 64): 1}


# ------------------------------------------------------------------------------------------------- workspace, attention
def _arrays(kind: LayerKind) -> list[Array]:
    return [*kind.residuals, *kind.workspace, *(move.array for move in kind.traffic)]


@pytest.mark.parametrize("model", [small_llama, transformers])
def test_attention_scores_and_nothing_else_are_marked(model: Any) -> None:
    """Scores hold two positions; nothing outside attention does, so a fused kernel saves exactly the marked arrays."""
    for found in analyse(model()).kinds.values():
        for array in _arrays(found.profile):
            assert array.attention == (array.classes.count(SEQ_CLASS) == 2)


def test_logits_and_their_cotangent_are_workspace_or_residuals_of_the_head() -> None:
    kind = kind_of(small_llama(dtype="bfloat16"), "head").profile
    logits = ("batch", "seq", "vocab")
    kept, alive = ([a for a in arrays if a.classes == logits] for arrays in (kind.residuals, kind.workspace))
    assert [(a.dtype, a.count) for a in kept] == [("bfloat16", 1)]
    assert [(a.dtype, a.count) for a in alive] == [("bfloat16", 1)]


# -------------------------------------------------------------------------------------------------------- other shapes
def _without_shares(profile: ModelProfile) -> ModelProfile:
    """Leave out shares of FLOPs, which are figures at one shape (attention grows with the square of ``seq``)."""

    def without(candidate: Candidate) -> Candidate:
        return msgspec.structs.replace(candidate, flops_share=1.0)

    kinds = tuple(
        msgspec.structs.replace(kind, candidates=tuple(map(without, kind.candidates))) for kind in profile.kinds
    )
    return msgspec.structs.replace(profile, kinds=kinds)


def test_profile_at_another_length_equals_a_fresh_analysis() -> None:
    at_once = analyse(small_llama(seq=2 * SEQ)).profile
    assert _without_shares(analyse(small_llama()).profile.at_seq(2 * SEQ)) == _without_shares(at_once)


@pytest.mark.parametrize("model", [small_llama, transformers])
def test_profile_at_another_batch_differs_in_the_size_of_batch_only(model: Any) -> None:
    found, small = model(), analyse(model()).profile
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3 * x.shape[0], *x.shape[1:]), x.dtype), found.batch)
    large = analyse_model(found.build, found.loss, shapes).profile
    kinds = tuple(msgspec.structs.replace(kind, classes={**kind.classes, "batch": 3 * BATCH}) for kind in small.kinds)
    assert large == msgspec.structs.replace(small, kinds=kinds)


def test_profile_in_another_16_bit_dtype_equals_a_fresh_analysis() -> None:
    renamed = analyse(small_llama(dtype="bfloat16")).profile.at_dtype("float16")
    fresh = analyse(small_llama(dtype="float16")).profile
    assert renamed == fresh
