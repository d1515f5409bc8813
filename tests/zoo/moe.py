# mypy: disable-error-code=no-any-return
"""Mixture of experts as in Mixtral: tokens dispatched by one-hot products, or sorted for ``ragged_dot``."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ._case import VOCAB, Case, Layers, language_model, tokens

EXPERTS, CHOSEN = 4, 2


class Router(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(width, EXPERTS, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights and indices of the chosen experts, (..., CHOSEN)."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(self.gate(x), axis=-1), CHOSEN)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), experts


class OneHotExperts(nnx.Module):
    """Each expert takes a fixed capacity of each sample's tokens (GShard)."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs) -> None:
        self.router = Router(width, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.up = nnx.Param(init(rngs.params(), (EXPERTS, width, inner)))
        self.down = nnx.Param(init(rngs.params(), (EXPERTS, inner, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        weights, experts = self.router(x)
        capacity = x.shape[1] * CHOSEN // EXPERTS + 2
        chosen = jax.nn.one_hot(experts, EXPERTS)  # (batch, seq, chosen, expert)
        taken = jnp.sum(chosen, axis=2)
        place = jax.nn.one_hot((jnp.cumsum(taken, axis=1) - taken).astype(jnp.int32), capacity)
        dispatch = taken[..., None] * place  # (batch, seq, expert, capacity)
        combine = jnp.einsum("bsk,bske->bse", weights, chosen)[..., None] * dispatch
        h = jax.nn.silu(jnp.einsum("becd,edf->becf", jnp.einsum("bsec,bsd->becd", dispatch, x), self.up[...]))
        return jnp.einsum("bsec,becd->bsd", combine, jnp.einsum("becf,efd->becd", h, self.down[...]))


class RaggedExperts(nnx.Module):
    """Tokens sorted by expert; no token is dropped (MegaBlocks)."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs) -> None:
        self.router = Router(width, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.up = nnx.Param(init(rngs.params(), (EXPERTS, width, inner)))
        self.down = nnx.Param(init(rngs.params(), (EXPERTS, inner, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(rows)
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS)
        h = jax.lax.ragged_dot(rows[order // CHOSEN], self.up[...], sizes)
        y = jax.lax.ragged_dot(jax.nn.silu(h), self.down[...], sizes)
        y = y[jnp.argsort(order)].reshape(-1, CHOSEN, x.shape[-1])
        return jnp.sum(y * weights[..., None], axis=1).reshape(x.shape)


class DenseMlp(nnx.Module):
    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(x)))


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.q = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(width, width // 2, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(width, width // 2, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        head = width // self.heads
        q = self.q(x).reshape(batch, seq, self.heads, head)
        k, v = (p(x).reshape(batch, seq, self.heads // 2, head) for p in (self.k, self.v))
        return self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, width: int, experts: Callable[..., nnx.Module], *, rngs: nnx.Rngs) -> None:
        self.norm_1, self.norm_2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, 4, rngs=rngs)
        self.mlp = experts(width, 48, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Mixtral(nnx.Module):
    def __init__(self, blocks: list[Callable[..., nnx.Module]], width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.layers = nnx.List([Block(width, experts, rngs=rngs) for experts in blocks])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _case(blocks: list[Callable[..., nnx.Module]], layers: Layers) -> Case:
    return Case(
        lambda: Mixtral(blocks, rngs=nnx.Rngs(0)), language_model, tokens(), (("embed", 1), *layers, ("head", 1))
    )


ALTERNATING = (("layers.*", 1), ("layers.*#2", 1), ("layers.*", 1), ("layers.*#2", 1))
CASES = {
    "moe one-hot": lambda: _case([OneHotExperts] * 2, (("layers.*", 2),)),
    "moe ragged": lambda: _case([RaggedExperts] * 2, (("layers.*", 2),)),
    "moe alternating": lambda: _case([DenseMlp, OneHotExperts] * 2, ALTERNATING),
}
