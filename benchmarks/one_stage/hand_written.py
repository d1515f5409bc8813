"""A Llama train step as an expert writes it by hand for one plan: stacked layers, ``lax.scan``, ``jax.checkpoint``.

Fully sharded (or plain) data parallelism over one mesh axis, full remat, AdamW, gradient norm, and the update left out
where it is not finite: what ``auto_shard`` does under the plan ``dp8 zero3 remat`` (or ``dp8 remat``). Only the loss of
logits and the rotary turn are shared with the package: they are arithmetic, not parallelism.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from galvatron_jax.models import LlamaConfig
from galvatron_jax.models._llama import rotate
from galvatron_jax.models._loss import cross_entropy

Tree = dict[str, Any]


def shapes(config: LlamaConfig) -> Tree:
    """Shapes of the parameters, layers stacked."""
    e, f, n, d = config.embed, config.mlp, config.layers, config.head_dim
    heads, kv = config.heads * d, config.kv_heads * d
    layers = {
        "query": (n, e, heads), "key": (n, e, kv), "value": (n, e, kv), "out": (n, heads, e),
        "gate": (n, e, f), "up": (n, e, f), "down": (n, f, e), "norm_1": (n, e), "norm_2": (n, e),
    }  # fmt: skip
    return {"embed": (config.vocab, e), "head": (e, config.vocab), "norm": (e,), "layers": layers}


def specs(config: LlamaConfig, *, sharded: bool) -> Tree:
    """Fully sharded: the first dimension of each array over the devices; otherwise whole."""

    def spec(shape: tuple[int, ...], skip: int) -> P:
        entries: list[str | None] = [None] * len(shape)
        if sharded:
            entries[skip] = "d"
        return P(*entries)

    tree = shapes(config)
    layers = {name: spec(shape, 1) for name, shape in tree.pop("layers").items()}
    return {**{name: spec(shape, 0) for name, shape in tree.items()}, "layers": layers}


def make_step(config: LlamaConfig, mesh: Mesh, optimizer: optax.GradientTransformation, *, sharded: bool) -> Any:
    """Return (jitted step, abstract state, abstract batch sharding)."""
    dtype = jnp.dtype(config.dtype)
    place = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs(config, sharded=sharded), is_leaf=lambda x: isinstance(x, P)
    )
    whole, data = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    constrain = jax.lax.with_sharding_constraint

    def use(weight: Any, spec: P) -> Any:
        stored = P(*spec[1:]) if weight.ndim < len(spec) else spec
        cast = constrain(weight.astype(dtype), NamedSharding(mesh, stored))
        return constrain(cast, whole)

    def norm(x: Any, scale: Any) -> Any:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_eps)
        return (constrain(scale, whole)[None, None, :] * (x32 * inverse)).astype(x.dtype)

    def block(x: Any, w: Tree) -> Any:
        layer_specs = specs(config, sharded=sharded)["layers"]
        w = {k: (v if k.startswith("norm") else use(v, layer_specs[k])) for k, v in w.items()}
        h = norm(x, w["norm_1"])
        split = lambda y: y.reshape(*y.shape[:2], -1, config.head_dim)  # noqa: E731
        q, k = (rotate(split(h @ w[name]), config.rope_theta) for name in ("query", "key"))
        y = jax.nn.dot_product_attention(q, k, split(h @ w["value"]), is_causal=True, implementation=config.attention)
        x = x + constrain(y.reshape(x.shape) @ w["out"], data)
        h = norm(x, w["norm_2"])
        return x + constrain((jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], data)

    def loss(p: Tree, batch: Any) -> Any:
        table = constrain(p["embed"], whole)
        x = constrain(table[batch["inputs"]].astype(dtype), data)
        body = jax.checkpoint(block, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, p["layers"])

        @jax.checkpoint
        def head(x: Any, scale: Any, weight: Any) -> Any:
            logits = norm(x, scale) @ use(weight, specs(config, sharded=sharded)["head"])
            return jnp.mean(cross_entropy(constrain(logits, data), batch["targets"]))

        return head(x, p["norm"], p["head"])

    def step(state: Any, batch: Any) -> Any:
        p, o = state
        value, gradients = jax.value_and_grad(loss)(p, batch)
        gradients = constrain(gradients, place)
        length = optax.global_norm(gradients)
        updates, new_o = optimizer.update(gradients, o, p)
        finite = jnp.isfinite(value) & jnp.isfinite(length)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (optax.apply_updates(p, updates), new_o), state)
        return new, value

    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    moments = optax.tree_map_params(
        optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, tree), place, transform_non_params=lambda _: whole
    )
    places = (place, moments)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        (tree, jax.eval_shape(optimizer.init, tree)), places,
    )  # fmt: skip
    fed = {"inputs": data, "targets": data}
    return jax.jit(step, in_shardings=(places, fed), out_shardings=(places, whole), donate_argnums=0), abstract, fed
