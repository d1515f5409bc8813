"""Small Flax NNX models as users write them, each with a loss and a batch: what analysis and runtime must handle.

All are float32 and small enough to run in seconds. B batch, S sequence, E embed, H heads, D head dim, F mlp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galvatron_jax.models import Llama, LlamaConfig, next_token_loss

BATCH, SEQ, WIDTH = 4, 16, 32


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A model that is built on demand, its loss and a batch."""

    build: Callable[[], nnx.Module]
    loss: Callable[[Any, Any], Any]
    batch: Any

    @property
    def abstract_batch(self) -> Any:
        """Shapes and dtypes of the batch."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.batch)


def small_llama(*, batch: int = BATCH, seq: int = SEQ, **changes: Any) -> SmallModel:
    """Return a Llama of two layers with grouped-query attention; ``changes`` are fields of its configuration."""
    sizes = {"vocab": 96, "embed": 32, "mlp": 48, "layers": 2, "heads": 4, "kv_heads": 2, "dtype": "float32", **changes}
    config = LlamaConfig(seq=seq, **sizes)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, seq + 1), dtype=np.int32)
    return SmallModel(
        lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    )


def regression(build: Callable[[], nnx.Module], *shape: int) -> SmallModel:
    """Return a model of arrays of ``shape`` (default: B, S, E), trained on the square of its result."""
    inputs = np.random.default_rng(0).normal(size=shape or (BATCH, SEQ, WIDTH)).astype(np.float32)
    return SmallModel(build, mean_square, inputs)


def mean_square(model: Any, batch: Any) -> jax.Array:
    """Return the mean square of the model's result: a scalar."""
    return jnp.mean(jnp.square(model(batch)))


class Perceptron(nnx.Module):
    """A residual block of two products."""

    def __init__(self, width: int, mlp: int, *, rngs: nnx.Rngs, dropout: float = 0.0) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, mlp, rngs=rngs)
        self.down = nnx.Linear(mlp, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.down(jax.nn.gelu(self.up(self.norm(x)))))


class Transformer(nnx.Module):
    """Pre-norm attention, as ``nnx.MultiHeadAttention`` does it, and a perceptron."""

    def __init__(self, width: int, heads: int, mlp: int, *, rngs: nnx.Rngs, dropout: float = 0.0) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, deterministic=not dropout, decode=False, rngs=rngs
        )
        self.perceptron = Perceptron(width, mlp, rngs=rngs, dropout=dropout)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.perceptron(x + self.attention(self.norm(x)))


class FusedAttention(nnx.Module):
    """Attention with queries, keys and values from one product (GPT-2)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in jnp.split(self.qkv(x), 3, axis=-1))
        return x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Stack(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: list[nnx.Module]) -> None:
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


def stack(count: int, block: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[], Stack]:
    """Return a function that builds a stack of ``count`` blocks."""

    def build() -> Stack:
        rngs = nnx.Rngs(0, dropout=1)
        return Stack([block(rngs) for _ in range(count)])

    return build


class Rematerialised(nnx.Module):
    """A stack whose author already wrote ``nnx.remat`` around each block."""

    def __init__(self, blocks: list[nnx.Module]) -> None:
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Scanned(nnx.Module):
    """A stack whose parameters have a leading layer dimension, run by ``nnx.scan``."""

    def __init__(self, count: int, block: Callable[[nnx.Rngs], nnx.Module]) -> None:
        self.blocks = nnx.vmap(block, in_axes=0, out_axes=0)(nnx.Rngs(0).split(count))

    def __call__(self, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, block: Any) -> jax.Array:
            return block(x)  # type: ignore[no-any-return]

        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Widening(nnx.Module):
    """Stages of rising width, each some residual blocks and a product to the next width."""

    def __init__(self, widths: tuple[int, ...], blocks: int, *, rngs: nnx.Rngs) -> None:
        self.stages = nnx.List([WideningStage(w, 2 * w, blocks, rngs=rngs) for w in widths])

    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in self.stages:
            x = stage(x)
        return x


class WideningStage(nnx.Module):
    """Residual blocks, then twice the width."""

    def __init__(self, width: int, next_width: int, blocks: int, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Perceptron(width, 2 * width, rngs=rngs) for _ in range(blocks)])
        self.widen = nnx.Linear(width, next_width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.widen(x)


class Convolutions(nnx.Module):
    """Convolutions with batch normalisation: statistics are state that the step changes."""

    def __init__(self, channels: int, count: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([ConvolutionBlock(channels, rngs=rngs) for _ in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class ConvolutionBlock(nnx.Module):
    """Convolution, batch normalisation, activation."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nnx.relu(self.norm(self.convolution(x)))


class EncoderDecoder(nnx.Module):
    """Two stacks; every decoder block reads the encoder's result."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.List([Transformer(width, 4, 2 * width, rngs=rngs) for _ in range(count)])
        self.decoder = nnx.List([CrossBlock(width, rngs=rngs) for _ in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        memory = x
        for block in self.encoder:
            memory = block(memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return x


class CrossBlock(nnx.Module):
    """Attention to another sequence, and a perceptron."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.perceptron = Perceptron(width, 2 * width, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        return self.perceptron(x + self.attention(x, memory))


class Plain(nnx.Module):
    """Nothing repeats."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(WIDTH, 24, rngs=rngs)
        self.second = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


def perceptrons(count: int = 3, width: int = WIDTH, mlp: int = 64, dropout: float = 0.0) -> SmallModel:
    """Return a stack of perceptrons."""
    return regression(stack(count, lambda rngs: Perceptron(width, mlp, rngs=rngs, dropout=dropout)), BATCH, SEQ, width)


def transformers(count: int = 2, width: int = WIDTH, heads: int = 4, mlp: int = 64, dropout: float = 0.0) -> SmallModel:
    """Return a stack of transformer blocks with ``nnx.MultiHeadAttention``."""
    return regression(
        stack(count, lambda rngs: Transformer(width, heads, mlp, rngs=rngs, dropout=dropout)), BATCH, SEQ, width
    )


SMALL_MODELS: dict[str, Callable[[], SmallModel]] = {
    "llama": small_llama,
    "llama tied": lambda: small_llama(tied=True),
    "perceptrons": perceptrons,
    "transformers": transformers,
    "dropout": lambda: transformers(dropout=0.25),
    "fused qkv": lambda: regression(stack(2, lambda rngs: FusedAttention(WIDTH, 4, rngs=rngs))),
    "remat": lambda: regression(lambda: Rematerialised([Perceptron(WIDTH, 64, rngs=nnx.Rngs(i)) for i in range(3)])),
    "scan": lambda: regression(lambda: Scanned(3, lambda rngs: Perceptron(WIDTH, 64, rngs=rngs))),
    "widening": lambda: regression(lambda: Widening((16, 32, 64), 3, rngs=nnx.Rngs(0)), BATCH, SEQ, 16),
    "convolutions": lambda: regression(lambda: Convolutions(8, 2, rngs=nnx.Rngs(0)), BATCH, 6, 6, 8),
    "encoder-decoder": lambda: regression(lambda: EncoderDecoder(WIDTH, 2, rngs=nnx.Rngs(0))),
    "plain": lambda: regression(lambda: Plain(rngs=nnx.Rngs(0))),
}
"""One of each kind, by name."""
