"""Hand-built profiles for tests: a Llama-like model and a device with round numbers.

``llama_like_profile`` writes down by hand what the analysis derives from a Flax Llama: the arrays of one pre-norm block
with grouped-query attention and SwiGLU, an embedding and a head with the loss. With ``kv_heads < heads`` the class
``heads`` counts the key/value heads and ``group`` the query heads of each, so that tensor parallelism keeps a query
head beside its key.
"""

from __future__ import annotations

import math

import msgspec

from galvatron_jax.profile import (
    Array,
    Boundary,
    Candidate,
    Collective,
    CollectiveKind,
    CurvePoint,
    Dot,
    HardwareProfile,
    LayerKind,
    LayerRun,
    Link,
    ModelProfile,
    Parameter,
    Phase,
    Traffic,
)

STREAM = ("batch", "seq", "embed")
TOKENS = ("batch", "seq")
QUERY = ("batch", "seq", "heads", "group", "head_dim")
KEY = ("batch", "seq", "heads", "head_dim")
SCORES = ("batch", "heads", "group", "seq", "seq")
INNER = ("batch", "seq", "mlp")
LOGITS = ("batch", "seq", "vocab")


def llama_like_profile(
    *,
    layers: int,
    embed: int,
    heads: int,
    head_dim: int,
    mlp: int,
    vocab: int,
    seq: int,
    dtype: str = "bfloat16",
    name: str = "toy",
    kv_heads: int | None = None,
) -> ModelProfile:
    """Return the profile of a Llama-like model: ``embed``, ``layers`` times ``layers.*``, ``head``."""
    pairs = kv_heads or heads
    sizes = {"batch": 1, "seq": seq, "embed": embed, "heads": pairs, "group": heads // pairs, "head_dim": head_dim}
    block = _block({**sizes, "mlp": mlp}, dtype)
    ends = {"batch": 1, "seq": seq, "embed": embed, "vocab": vocab}
    return ModelProfile(
        name=name,
        source="tests.support.toy_models",
        structure=f"{name}-{layers}x{embed}x{heads}x{pairs}x{head_dim}x{mlp}x{vocab}",
        dtype=dtype,
        seq=seq,
        layers=(
            LayerRun(kind="embed", count=1),
            LayerRun(kind="layers.*", count=layers),
            LayerRun(kind="head", count=1),
        ),
        kinds=(_embed(ends, dtype), block, _head(ends, dtype)),
        causal_attention=True,
    )


def toy_hardware(**changes: object) -> HardwareProfile:
    """Return a device with round numbers; ``changes`` replaces fields of ``HardwareProfile``."""
    profile = HardwareProfile(
        name="toy",
        description="round numbers for tests",
        measured=False,
        memory_bytes=16 * 2**30,
        reserved_bytes=2**30,
        memory_bandwidth_bytes_per_s=1e12,
        matmul_flops_per_s={"bfloat16": 1e14, "float16": 1e14, "float32": 1e13},
        matmul_efficiency=(CurvePoint(flops=1e8, efficiency=0.25), CurvePoint(flops=1e10, efficiency=0.75)),
        attention_efficiency={"forward": 0.5, "backward": 0.4},
        fused_attention=True,
        kernel_launch_s=1e-6,
        overlap_slowdown=1.1,
        intra_node=Link(bandwidth_bytes_per_s=1e11, latency_s=1e-6),
        inter_node=Link(bandwidth_bytes_per_s=1e10, latency_s=1e-5),
        sums_before_reducing=True,
    )
    return msgspec.structs.replace(profile, **changes)


def _block(sizes: dict[str, int], dtype: str) -> LayerKind:
    stream = Boundary(array=_array(dtype, STREAM), gradient=True, stream=True)
    parameters = (
        _parameter("attention_norm.scale", dtype, ("embed",)),
        _parameter("attention.query", dtype, ("embed",), ("heads", "group"), ("head_dim",)),
        _parameter("attention.key", dtype, ("embed",), ("heads",), ("head_dim",)),
        _parameter("attention.value", dtype, ("embed",), ("heads",), ("head_dim",)),
        _parameter("attention.output", dtype, ("heads", "group"), ("head_dim",), ("embed",)),
        _parameter("mlp_norm.scale", dtype, ("embed",)),
        _parameter("mlp.gate", dtype, ("embed",), ("mlp",)),
        _parameter("mlp.up", dtype, ("embed",), ("mlp",)),
        _parameter("mlp.down", dtype, ("mlp",), ("embed",)),
    )
    return LayerKind(
        name="layers.*",
        classes=sizes,
        parameters=parameters,
        dots=_block_dots(dtype),
        traffic=(*_block_traffic(dtype), *_casts(parameters, dtype)),
        inputs=(stream,),
        outputs=(stream,),
        residuals=(
            _array(dtype, STREAM, count=3),  # two norm outputs, the stream after attention
            _array("float32", TOKENS, count=2),  # norm statistics
            _array(dtype, QUERY, count=2),  # rotated query, mixed values
            _array(dtype, KEY, count=2),  # rotated key, value
            _array("float32", ("batch", "seq", "heads", "group")),  # logsumexp of the scores
            _array(dtype, SCORES, attention=True),
            _array(dtype, INNER, count=3),  # gate, up, their product
        ),
        workspace=(_array(dtype, INNER, count=3), _array(dtype, STREAM, count=2)),
        candidates=(
            Candidate(
                classes=("heads", "mlp"),
                max_degree=math.gcd(sizes["heads"], sizes["mlp"]),
                flops_share=1.0,
                tensor=(
                    _collective("forward", "all-reduce", dtype, recomputed=True),  # after attention
                    _collective("forward", "all-reduce", dtype),  # after the mlp: dead code in the recompute
                    _collective("backward", "all-reduce", dtype, count=5, merged=2),  # query, key, value; gate, up
                ),
                sequence=(
                    _collective("forward", "all-gather", dtype, count=2, recomputed=True),
                    _collective("forward", "reduce-scatter", dtype, recomputed=True),
                    _collective("forward", "reduce-scatter", dtype),
                    _collective("backward", "all-gather", dtype, count=2),
                    _collective("backward", "reduce-scatter", dtype, count=2),
                ),
            ),
        ),
    )


def _block_dots(dtype: str) -> tuple[Dot, ...]:
    products = (
        ("batch", "seq", "embed", "heads", "group", "head_dim"),  # query
        ("batch", "seq", "embed", "heads", "head_dim"),  # key
        ("batch", "seq", "embed", "heads", "head_dim"),  # value
        ("batch", "seq", "heads", "group", "head_dim", "embed"),  # output
        ("batch", "seq", "embed", "mlp"),  # gate
        ("batch", "seq", "embed", "mlp"),  # up
        ("batch", "seq", "mlp", "embed"),  # down
    )
    attention = ("batch", "heads", "group", "seq", "seq", "head_dim")
    forward = tuple(
        Dot(phase="forward", dtype=dtype, classes=classes, recomputed=classes != products[-1]) for classes in products
    )
    backward = tuple(Dot(phase="backward", dtype=dtype, classes=classes, count=2) for classes in products)
    return (
        *forward,
        Dot(phase="forward", dtype=dtype, classes=attention, count=2, attention=True),
        *backward,
        Dot(phase="backward", dtype=dtype, classes=attention, count=4, attention=True),
    )


def _block_traffic(dtype: str) -> tuple[Traffic, ...]:
    return (
        Traffic(phase="forward", array=_array(dtype, STREAM, count=10)),  # 2 norms (2 each), 2 adds (3 each)
        Traffic(phase="forward", array=_array(dtype, QUERY, count=2)),  # rotary embedding
        Traffic(phase="forward", array=_array(dtype, KEY, count=2)),
        Traffic(phase="forward", array=_array("float32", SCORES, count=2, attention=True)),  # softmax
        Traffic(phase="forward", array=_array(dtype, INNER, count=3)),  # silu(gate) * up
        Traffic(phase="backward", array=_array(dtype, STREAM, count=14)),
        Traffic(phase="backward", array=_array(dtype, QUERY, count=2)),
        Traffic(phase="backward", array=_array(dtype, KEY, count=2)),
        Traffic(phase="backward", array=_array("float32", SCORES, count=3, attention=True)),
        Traffic(phase="backward", array=_array(dtype, INNER, count=5)),
    )


def _casts(parameters: tuple[Parameter, ...], dtype: str) -> tuple[Traffic, ...]:
    """Weights to the compute dtype (forward), their gradients back to the storage dtype (backward)."""
    arrays = [parameter.array(cast) for parameter in parameters for cast in (parameter.dtype, dtype)]
    phases: tuple[Phase, ...] = ("forward", "backward")
    return tuple(Traffic(phase=phase, array=array) for phase in phases for array in arrays)


def _embed(sizes: dict[str, int], dtype: str) -> LayerKind:
    return LayerKind(
        name="embed",
        classes=sizes,
        parameters=(_parameter("table", dtype, ("vocab",), ("embed",)),),
        dots=(),
        traffic=(
            Traffic(phase="forward", array=_array(dtype, STREAM, count=2)),
            Traffic(phase="backward", array=_array(dtype, STREAM)),
            Traffic(phase="backward", array=_array(dtype, ("vocab", "embed"))),
        ),
        inputs=(Boundary(array=_array("int32", TOKENS), gradient=False),),
        outputs=(Boundary(array=_array(dtype, STREAM), gradient=True, stream=True),),
        residuals=(_array("int32", TOKENS),),
        workspace=(_array(dtype, STREAM),),
        candidates=(
            Candidate(
                classes=("vocab",),
                max_degree=sizes["vocab"],
                flops_share=1.0,
                tensor=(_collective("forward", "all-reduce", dtype),),
                sequence=(
                    _collective("forward", "reduce-scatter", dtype),
                    _collective("backward", "all-gather", dtype),
                ),
            ),
        ),
    )


def _head(sizes: dict[str, int], dtype: str) -> LayerKind:
    parameters = (_parameter("norm.scale", dtype, ("embed",)), _parameter("kernel", dtype, ("embed",), ("vocab",)))
    loss = Collective(phase="forward", kind="all-reduce", array=_array("float32", TOKENS, count=3), merged_count=3)
    return LayerKind(
        name="head",
        classes=sizes,
        parameters=parameters,
        dots=(
            Dot(phase="forward", dtype=dtype, classes=("batch", "seq", "embed", "vocab")),
            Dot(phase="backward", dtype=dtype, classes=("batch", "seq", "embed", "vocab"), count=2),
        ),
        traffic=(
            Traffic(phase="forward", array=_array(dtype, STREAM, count=2)),
            Traffic(phase="forward", array=_array(dtype, LOGITS, count=2)),
            Traffic(phase="backward", array=_array(dtype, STREAM, count=3)),
            Traffic(phase="backward", array=_array(dtype, LOGITS, count=2)),
            *_casts(parameters, dtype),
        ),
        inputs=(
            Boundary(array=_array(dtype, STREAM), gradient=True, stream=True),
            Boundary(array=_array("int32", TOKENS), gradient=False),
        ),
        outputs=(Boundary(array=Array(dtype="float32"), gradient=True),),
        residuals=(_array(dtype, STREAM), _array(dtype, LOGITS), _array("float32", TOKENS, count=2)),
        workspace=(_array(dtype, LOGITS), _array(dtype, STREAM)),
        candidates=(
            Candidate(
                classes=("vocab",),
                max_degree=sizes["vocab"],
                flops_share=1.0,
                tensor=(loss, _collective("backward", "all-reduce", dtype)),
                sequence=(
                    _collective("forward", "all-gather", dtype),
                    loss,
                    _collective("backward", "reduce-scatter", dtype),
                ),
            ),
        ),
        data=(Collective(phase="forward", kind="all-reduce", array=Array(dtype="float32"), merged_count=1),),
    )


def _array(dtype: str, classes: tuple[str, ...], *, count: int = 1, attention: bool = False) -> Array:
    return Array(dtype=dtype, classes=classes, count=count, attention=attention)


def _parameter(path: str, dtype: str, *dims: tuple[str | int, ...]) -> Parameter:
    return Parameter(path=path, dtype="float32", compute_dtype=dtype, dims=dims)


def _collective(
    phase: Phase,
    kind: CollectiveKind,
    dtype: str,
    *,
    count: int = 1,
    merged: int | None = None,
    recomputed: bool = False,
) -> Collective:
    """``count`` collectives of the stream, ``merged`` of which are left when sums are taken before reducing."""
    array = _array(dtype, STREAM, count=count)
    return Collective(phase=phase, kind=kind, array=array, merged_count=merged or count, recomputed=recomputed)
