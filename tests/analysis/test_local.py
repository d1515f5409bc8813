"""The program of one device's share, against the same model traced at that size and against XLA's own partitioner."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from galvatron_jax.analysis import Analysis, LocalLayer, Variable, _local, analyse_model, local_layer
from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import UnsupportedError
from galvatron_jax.plan import Strategy
from galvatron_jax.runtime import LayerLayout, stage_mesh
from tests.support.attention_models import attention_model
from tests.zoo import ZOO

MODELS = ("llama", "gru", "moe one-hot", "moe ragged", "hybrid")
"""Custom derivatives, scans over time, dispatch by one-hot products, convolutions with statistics over the batch."""


@cache
def analysed(name: str, samples: int) -> Analysis:
    case = ZOO[name]()
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype), case.spec)
    return analyse_model(case.build, case.loss, batch, name=name)


def filled(spec: jax.ShapeDtypeStruct, seed: int) -> Any:
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jax.random.key(seed)
    random = np.random.default_rng(seed)
    if jnp.issubdtype(spec.dtype, jnp.inexact):
        return jnp.asarray(random.normal(size=spec.shape), spec.dtype)
    return jnp.asarray(random.integers(0, 2, spec.shape), spec.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_fewer_samples_give_what_the_model_traced_with_them_gives(name: str) -> None:
    there, here = analysed(name, 4), analysed(name, 2)
    for kind in here.kinds:
        resized, original = local_layer(there.kinds[kind], 2), local_layer(here.kinds[kind], 2)
        program = here.kinds[kind].layer.forward
        read = {v for equation in program.equations for v in equation.inputs if isinstance(v, Variable)}
        inputs = [filled(spec, seed) for seed, spec in enumerate(original.inputs)]
        pairs = zip(resized.inputs, original.inputs, program.inputs, strict=True)
        assert all(a == b for a, b, variable in pairs if variable in read)
        for got, expected in zip(resized.run(inputs), original.run(inputs), strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            # a mean over the batch has the number of samples written in it: a loss, the statistics of BatchNorm
            if got.ndim and jnp.issubdtype(got.dtype, jnp.inexact) and name != "hybrid":
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("form", ["causal", "window"])
def test_attention_by_a_kernel_gives_the_same(form: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's XLA form stands in for cuDNN's kernel."""
    monkeypatch.setattr(_local, "KERNEL_DTYPES", ("float32",))
    model = attention_model(form, kv_heads=4)
    analysis = analyse_model(model.build, model.loss, model.abstract_batch)
    kind = next(kind for name, kind in analysis.kinds.items() if name.startswith("layers"))
    plain, kernel = local_layer(kind, 2, tp), local_layer(kind, 2, tp, kernel="xla")
    inputs = [filled(spec, seed) for seed, spec in enumerate(plain.inputs)]
    for got, expected in zip(kernel.run(inputs), plain.run(inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_shapes_of_what_they_belong_to(name: str) -> None:
    for kind in analysed(name, 4).kinds.values():
        layer = local_layer(kind, 3)

        def total(*inputs: Any, layer: LocalLayer = layer) -> Any:
            floats = [o for o in layer.run(inputs) if jnp.issubdtype(o.dtype, jnp.inexact)]
            return sum(jnp.sum(o.astype(jnp.float32)) for o in floats)

        found = jax.eval_shape(jax.grad(total, argnums=layer.differentiated), *layer.inputs)
        assert [g.shape for g in found] == [layer.inputs[i].shape for i in layer.differentiated]


@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["llama", "bert", "moe one-hot"])
def test_share_of_two_devices_has_the_flops_of_the_partitioned_program(name: str) -> None:
    analysis = analysed(name, 4)
    mesh = stage_mesh(Cluster(nodes=1, gpus_per_node=2), jax.devices()[:2])
    checked = 0
    for kind in analysis.kinds.values():
        candidate = kind.profile.best_candidate
        if candidate is None or candidate.undivided(kind.profile.classes, 2) or kind.layer.segment.kind == "embed":
            continue
        layout, whole, share = LayerLayout(kind, Strategy(tp=2), mesh), local_layer(kind, 4), local_layer(kind, 4, 2)
        places = [layout.value(value) for value in kind.layer.inputs]
        outputs = NamedSharding(mesh.mesh, PartitionSpec())
        partitioned = jax.jit(whole.run, in_shardings=(places,), out_shardings=outputs).lower(list(whole.inputs))
        alone = jax.jit(share.run).lower(list(share.inputs))
        got, expected = ((p.compile().cost_analysis() or {})["flops"] for p in (alone, partitioned))
        # the partitioner may share out elementwise work that plain tensor parallelism leaves whole
        assert got == pytest.approx(expected, rel=0.1)
        checked += 1
    assert checked


def test_shapes_are_those_of_the_sharded_classes() -> None:
    kind = analysed("llama", 4).kinds["layers.*"]
    whole, half = local_layer(kind, 4), local_layer(kind, 4, 2)
    for before, after, described in zip(whole.inputs, half.inputs, kind.layer.inputs, strict=True):
        is_sharded = kind.tensor_classes & set(kind.layer.dimensions.flat_classes(described))
        assert after.size == before.size // (2 if is_sharded else 1)


def test_analysis_is_left_as_it_was() -> None:
    kind = analysed("llama", 4).kinds["head"]
    before = [kind.layer.dimensions.classes(value) for value in kind.layer.inputs]
    layer = local_layer(kind, 3, 2)
    jax.eval_shape(layer.run, list(layer.inputs))
    assert [kind.layer.dimensions.classes(value) for value in kind.layer.inputs] == before


def test_operation_that_cannot_be_resized_is_refused() -> None:
    class Branching(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones((8, 8)))

        def __call__(self, x: jax.Array) -> jax.Array:
            h = x @ self.weight[...]
            result: jax.Array = jax.lax.cond(jnp.sum(h) > 0, jnp.sin, jnp.cos, h)
            return result

    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    analysis = analyse_model(Branching, lambda model, batch: jnp.mean(model(batch)), batch, name="cond")
    (kind,) = analysis.kinds.values()
    layer = local_layer(kind, 2)
    with pytest.raises(UnsupportedError, match="cond cannot run at another size"):
        jax.eval_shape(layer.run, list(layer.inputs))
