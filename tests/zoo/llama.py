"""Llama: the library's own preset, at toy size."""

from __future__ import annotations

from typing import Any

from flax import nnx

from galvatron_jax.models import Llama, LlamaConfig, next_token_loss

from ._case import SEQ, VOCAB, Case, tokens


def _case(**changes: Any) -> Case:
    config = LlamaConfig(
        vocab=VOCAB, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, seq=SEQ, dtype="float32", **changes
    )
    ids = tokens(seq=SEQ + 1)
    return Case(
        build=lambda: Llama(config, rngs=nnx.Rngs(0)),
        loss=next_token_loss,
        batch={"inputs": ids[:, :-1], "targets": ids[:, 1:]},
        layers=(("embed", 1), ("layers.*", 2), ("head", 1)),
    )


CASES = {"llama": _case, "llama tied": lambda: _case(tied=True)}
