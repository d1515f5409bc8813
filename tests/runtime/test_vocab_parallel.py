"""A head whose vocabulary is sharded never holds the logits of a token whole, however the loss is spelled.

Read in the compiled gradient program: no collective makes an array that has the whole vocabulary for every token of a
device. (Weights and their gradients have it too, but not for every token.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.models import next_token_loss
from galvatron_jax.plan import Strategy
from tests.runtime.planned import DEVICES, dp, planned, tp
from tests.support.small_models import SmallModel, small_llama

pytestmark = pytest.mark.multidevice

BATCH, SEQ, VOCAB, EMBED = 16, 32, 136, 32
"""No other size is a multiple of 17, so dimensions that hold the vocabulary are known by it."""


def integer_labels(model: Any, batch: Any) -> jax.Array:
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(model(batch["inputs"]), batch["targets"])
    return jnp.mean(losses)


def taken_along_the_vocabulary(model: Any, batch: Any) -> jax.Array:
    logp_BSV = jax.nn.log_softmax(model(batch["inputs"]))
    return -jnp.mean(jnp.take_along_axis(logp_BSV, batch["targets"][..., None], axis=-1))


def one_hot(model: Any, batch: Any) -> jax.Array:
    return -jnp.mean(jnp.sum(jax.nn.one_hot(batch["targets"], VOCAB) * jax.nn.log_softmax(model(batch["inputs"])), -1))


LOSSES = [next_token_loss, integer_labels, taken_along_the_vocabulary, one_hot]
HEADS = {"tp 8": tp(8), "tp 2, zero 3": tp(2, zero=3), "tp 4, sp": tp(4, sp=True)}
CASES = [pytest.param(loss, HEADS["tp 8"], id=loss.__name__) for loss in LOSSES] + [
    pytest.param(next_token_loss, head, id=name) for name, head in HEADS.items() if name != "tp 8"
]


@pytest.mark.parametrize(("loss", "head"), CASES)
def test_no_collective_makes_the_logits_of_a_token_whole(loss: Callable[..., Any], head: Strategy) -> None:
    llama = small_llama(batch=BATCH, seq=SEQ, layers=2, vocab=VOCAB, embed=EMBED)
    sharded = planned((dp(), dp(), dp(), head), model=SmallModel(llama.build, loss, llama.batch))
    text = sharded.compiled_gradients()
    assert logits_shard(text, head), "the vocabulary is sharded"
    assert not whole_logits(text, head.dp)


def test_logits_that_are_gathered_would_be_found() -> None:
    mesh = Mesh(np.array(jax.devices()[:DEVICES], dtype=object), ("t",))
    shard, whole = (NamedSharding(mesh, PartitionSpec(None, None, *axes)) for axes in (("t",), ()))
    program = jax.jit(lambda logits_BSV: logits_BSV + 1, in_shardings=shard, out_shardings=whole)
    text = program.lower(jnp.zeros((BATCH, SEQ, VOCAB))).compile().as_text()
    assert whole_logits(text or "", data_ranks=1)


def whole_logits(text: str, data_ranks: int) -> list[str]:
    """Collectives of which a result has the whole vocabulary for every token of a data-parallel rank."""
    tokens = BATCH * SEQ // data_ranks
    lines = [line for line in text.splitlines() if re.search(r" (all|reduce|collective)-[a-z-]+\(", line)]
    return [line for line in lines if any(has(shape, VOCAB, tokens) for shape in shapes(line))]


def logits_shard(text: str, head: Strategy) -> bool:
    """Tell whether any array has a shard of the vocabulary for every token of a data-parallel rank."""
    tokens = BATCH * SEQ // head.dp
    return any(has(shape, VOCAB // head.tp, tokens) for line in text.splitlines() for shape in shapes(line))


def shapes(line: str) -> list[list[int]]:
    """Of the results of an instruction."""
    result = line.split(" = ", 1)[-1].split("(%", 1)[0]
    return [[int(size) for size in found.split(",")] for found in re.findall(r"[a-z]+[0-9]+\[([0-9,]+)\]", result)]


def has(shape: list[int], vocabulary: int, tokens: int) -> bool:
    return vocabulary in shape and math.prod(shape) >= vocabulary * tokens
