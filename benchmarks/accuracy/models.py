"""Models of the accuracy ledger, at real widths and few layers; abstract, nothing is ever built.

Each function returns (builder, loss, batch), as ``--model benchmarks.accuracy.models:FUNCTION`` takes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from galvatron_jax.models import Llama, LlamaConfig, llama_config, next_token_loss

Kernel = Literal["xla", "cudnn"]
Subject = tuple[Callable[[], nnx.Module], Callable[[Any, Any], jax.Array], Any]

BF16 = jnp.bfloat16
_LLAMA_70B = LlamaConfig(vocab=32_000, embed=8192, mlp=28_672, layers=80, heads=64, kv_heads=8, seq=4096)


def llama_7b_two_layers() -> Subject:
    """Two blocks of Llama-2-7B with its embedding and head, 2048 positions."""
    return _llama(LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=2, heads=32, kv_heads=32, seq=2048))


def llama_7b_four_layers() -> Subject:
    """Four blocks of Llama-2-7B with its embedding and head, 2048 positions."""
    return _llama(LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=4, heads=32, kv_heads=32, seq=2048))


def llama_70b_three_layers() -> Subject:
    """Three blocks of Llama-2-70B (8 kv heads for 64 heads) with its embedding and head, 4096 positions."""
    return _llama(dataclasses.replace(_LLAMA_70B, layers=3))


def llama_70b_nine_layers() -> Subject:
    """The same with nine blocks: what the memory profiler reads slopes from."""
    return _llama(dataclasses.replace(_LLAMA_70B, layers=9))


def llama_100m() -> Subject:
    """The preset ``llama-100m``: a small vocabulary, so that the blocks are nearly all."""
    return _llama(llama_config("llama-100m"))


def llama_7b() -> Subject:
    """The whole preset ``llama2-7b`` at 2048 positions: 32 blocks."""
    return _llama(LlamaConfig(vocab=32_000, embed=4096, mlp=11_008, layers=32, heads=32, kv_heads=32, seq=2048))


def llama_13b_ten_layers() -> Subject:
    """Ten blocks of Llama-2-13B with its embedding and head, 2048 positions."""
    return _llama(LlamaConfig(vocab=32_000, embed=5120, mlp=13_824, layers=10, heads=40, kv_heads=40, seq=2048))


def llama_8b_six_layers() -> Subject:
    """Six blocks of Llama-3-8B (8 kv heads for 32 heads) with its large vocabulary, 2048 positions."""
    return _llama(LlamaConfig(vocab=128_256, embed=4096, mlp=14_336, layers=6, heads=32, kv_heads=8, seq=2048))


def gpt2_large_six_layers() -> Subject:
    """Six blocks of GPT-2 large: layer norms, biases, GELU, learned positions, a tied head, 1024 positions."""
    return _gpt2("xla")


def bert_large_eight_layers() -> Subject:
    """Eight blocks of BERT-large: post-norm, padding masks from the batch, a loss on unmasked positions, 512 in all."""
    return _bert("xla")


def vit_huge_six_layers() -> Subject:
    """Six blocks of ViT-H/14: a convolution stem, 256 patches and a class token's mean, 1000 classes."""
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    return (lambda: ViT(embed=1280, heads=16, layers=6, rngs=nnx.Rngs(0))), _classify, batch


def llama_7b_fused() -> Subject:
    """The preset ``llama2-7b``, 32 blocks at 4096 positions, its attention by cuDNN's kernel."""
    return _llama(dataclasses.replace(llama_config("llama2-7b"), attention="cudnn"))


def llama_70b_nine_layers_fused() -> Subject:
    """Nine blocks of Llama-2-70B, 4096 positions, attention by cuDNN's kernel."""
    return _llama(dataclasses.replace(_LLAMA_70B, layers=9, attention="cudnn"))


def gpt2_large_six_layers_fused() -> Subject:
    """The six blocks of GPT-2 large, attention by cuDNN's kernel."""
    return _gpt2("cudnn")


def bert_large_eight_layers_fused() -> Subject:
    """The eight blocks of BERT-large, attention with its padding masks by cuDNN's kernel."""
    return _bert("cudnn")


def _llama(config: LlamaConfig) -> Subject:
    tokens = jax.ShapeDtypeStruct((1, config.seq), jnp.int32)
    return (lambda: Llama(config, rngs=nnx.Rngs(0))), next_token_loss, {"inputs": tokens, "targets": tokens}


def _gpt2(kernel: Kernel) -> Subject:
    sizes = Sizes(vocab=50_304, embed=1280, heads=20, layers=6, seq=1024, kernel=kernel)
    return (lambda: GPT2(sizes, rngs=nnx.Rngs(0))), _next_token, jax.ShapeDtypeStruct((1, sizes.seq), jnp.int32)


def _bert(kernel: Kernel) -> Subject:
    sizes = Sizes(vocab=30_592, embed=1024, heads=16, layers=8, seq=512, kernel=kernel)
    ids = jax.ShapeDtypeStruct((1, sizes.seq), jnp.int32)
    batch = {"ids": ids, "mask": jax.ShapeDtypeStruct((1, sizes.seq), jnp.bool_), "labels": ids}
    return (lambda: Bert(sizes, rngs=nnx.Rngs(0))), _masked, batch


# ---------------------------------------------------------------------------------------------------------------- parts
@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a language model, and what runs its attention."""

    vocab: int
    embed: int
    heads: int
    layers: int
    seq: int
    kernel: Kernel = "xla"


class Attention(nnx.Module):
    """Multi-head attention with biases, B: batch, S: sequence, H: heads, D: width of a head."""

    def __init__(self, embed: int, heads: int, kernel: Kernel = "xla", *, rngs: nnx.Rngs) -> None:
        """Make query, key, value and output projections."""
        head, self.kernel = embed // heads, kernel
        self.q, self.k, self.v = (nnx.LinearGeneral(embed, (heads, head), dtype=BF16, rngs=rngs) for _ in range(3))
        self.o = nnx.LinearGeneral((heads, head), embed, axis=(-2, -1), dtype=BF16, rngs=rngs)

    def __call__(self, x_BSE: jax.Array, *, causal: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """Attend over all positions, over those before, or over those that ``mask`` allows."""
        y_BSHD = jax.nn.dot_product_attention(
            self.q(x_BSE), self.k(x_BSE), self.v(x_BSE), mask=mask, is_causal=causal, implementation=self.kernel
        )
        out: jax.Array = self.o(y_BSHD)
        return out


class Mlp(nnx.Module):
    """Two layers with GELU between."""

    def __init__(self, embed: int, *, rngs: nnx.Rngs) -> None:
        """Make both layers; the inner one is four times as wide."""
        self.up = nnx.Linear(embed, 4 * embed, dtype=BF16, rngs=rngs)
        self.down = nnx.Linear(4 * embed, embed, dtype=BF16, rngs=rngs)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Apply both layers."""
        out: jax.Array = self.down(nnx.gelu(self.up(x_BSE)))
        return out


class PreNormBlock(nnx.Module):
    """A block of GPT-2 and ViT."""

    def __init__(self, embed: int, heads: int, kernel: Kernel = "xla", *, causal: bool, rngs: nnx.Rngs) -> None:
        """Make norms, attention and MLP."""
        self.causal = causal
        self.norm_1, self.norm_2 = (nnx.LayerNorm(embed, dtype=BF16, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = Attention(embed, heads, kernel, rngs=rngs), Mlp(embed, rngs=rngs)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Add attention, then the MLP, each after a norm."""
        x_BSE = x_BSE + self.attention(self.norm_1(x_BSE), causal=self.causal)
        out: jax.Array = x_BSE + self.mlp(self.norm_2(x_BSE))
        return out


class PostNormBlock(nnx.Module):
    """A block of BERT."""

    def __init__(self, embed: int, heads: int, kernel: Kernel, *, rngs: nnx.Rngs) -> None:
        """Make norms, attention and MLP."""
        self.norm_1, self.norm_2 = (nnx.LayerNorm(embed, dtype=BF16, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = Attention(embed, heads, kernel, rngs=rngs), Mlp(embed, rngs=rngs)

    def __call__(self, x_BSE: jax.Array, mask: jax.Array) -> jax.Array:
        """Add attention, then the MLP, with a norm after each."""
        x_BSE = self.norm_1(x_BSE + self.attention(x_BSE, mask=mask))
        out: jax.Array = self.norm_2(x_BSE + self.mlp(x_BSE))
        return out


class GPT2(nnx.Module):
    """A language model with a tied head."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        """Make tables, blocks and the last norm."""
        embed, heads, kernel = sizes.embed, sizes.heads, sizes.kernel
        self.tokens = nnx.Embed(sizes.vocab, embed, dtype=BF16, rngs=rngs)
        self.positions = nnx.Embed(sizes.seq, embed, dtype=BF16, rngs=rngs)
        blocks = [PreNormBlock(embed, heads, kernel, causal=True, rngs=rngs) for _ in range(sizes.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(embed, dtype=BF16, rngs=rngs)

    def __call__(self, ids_BS: jax.Array) -> jax.Array:
        """Return logits."""
        x_BSE = self.tokens(ids_BS) + self.positions(jnp.arange(ids_BS.shape[1]))[None]
        for block in self.blocks:
            x_BSE = block(x_BSE)
        out: jax.Array = self.tokens.attend(self.norm(x_BSE))
        return out


class Bert(nnx.Module):
    """An encoder with a language-model head."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs) -> None:
        """Make tables, blocks and head."""
        embed, heads, kernel = sizes.embed, sizes.heads, sizes.kernel
        self.tokens = nnx.Embed(sizes.vocab, embed, dtype=BF16, rngs=rngs)
        self.positions = nnx.Embed(sizes.seq, embed, dtype=BF16, rngs=rngs)
        self.norm = nnx.LayerNorm(embed, dtype=BF16, rngs=rngs)
        self.blocks = nnx.List([PostNormBlock(embed, heads, kernel, rngs=rngs) for _ in range(sizes.layers)])
        self.kernel = kernel
        self.head = nnx.Linear(embed, sizes.vocab, dtype=BF16, rngs=rngs)

    def __call__(self, ids_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Return logits."""
        x_BSE = self.norm(self.tokens(ids_BS) + self.positions(jnp.arange(ids_BS.shape[1]))[None])
        mask_BHTS = mask_BS[:, None, None, :]
        if self.kernel == "cudnn":  # it takes no mask that is the same for all queries
            mask_BHTS = jnp.broadcast_to(mask_BHTS, (mask_BS.shape[0], 1, mask_BS.shape[1], mask_BS.shape[1]))
        for block in self.blocks:
            x_BSE = block(x_BSE, mask_BHTS)
        out: jax.Array = self.head(x_BSE)
        return out


class ViT(nnx.Module):
    """A classifier of images."""

    def __init__(self, *, embed: int, heads: int, layers: int, rngs: nnx.Rngs) -> None:
        """Make stem, positions, blocks and head."""
        self.stem = nnx.Conv(3, embed, (14, 14), strides=(14, 14), dtype=BF16, rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 256, embed)))
        self.blocks = nnx.List([PreNormBlock(embed, heads, causal=False, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(embed, dtype=BF16, rngs=rngs)
        self.head = nnx.Linear(embed, 1000, dtype=BF16, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits of the mean over patches."""
        patches = self.stem(images)
        x_BSE = patches.reshape(patches.shape[0], -1, patches.shape[-1]) + self.positions[...].astype(BF16)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        out: jax.Array = self.head(jnp.mean(self.norm(x_BSE), axis=1))
        return out


def _next_token(model: GPT2, ids: jax.Array) -> jax.Array:
    logits = model(ids).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]))


def _masked(model: Bert, batch: Any) -> jax.Array:
    logits = model(batch["ids"], batch["mask"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.mean(losses * batch["mask"])


def _classify(model: ViT, batch: Any) -> jax.Array:
    logits = model(batch["image"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
