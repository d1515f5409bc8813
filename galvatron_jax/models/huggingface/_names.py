"""Which tensor of Hugging Face's Llama is which parameter of ours.

Both turn the two halves of a head (``_llama.rotate``), so that no weight is permuted: a matrix of theirs
(``torch.nn.Linear``: outputs x inputs) is a kernel of ours (inputs x outputs) transposed, all else is equal.
"""

from __future__ import annotations

from typing import NamedTuple

from .._config import LlamaConfig


class Place(NamedTuple):
    """A parameter of ours in their layout."""

    tensor: str
    is_transposed: bool
    shape: tuple[int, ...]
    """As we hold it."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As they hold it."""
        return self.shape[::-1] if self.is_transposed else self.shape


def places(config: LlamaConfig) -> dict[str, Place]:
    """Return where each parameter is, by its dotted path in our model."""
    width, table = config.embed, (config.vocab, config.embed)
    found = {"embed.embedding": Place("model.embed_tokens.weight", False, table)}
    for layer in range(config.layers):
        for path, place in _block(config).items():
            found[f"layers.{layer}.{path}"] = place._replace(tensor=f"model.layers.{layer}.{place.tensor}")
    found["norm.scale"] = Place("model.norm.weight", False, (width,))
    if not config.tied:
        found["head.kernel"] = Place("lm_head.weight", True, table[::-1])
    return found


def is_redundant(tensor: str, config: LlamaConfig) -> bool:
    """Tell whether a tensor says nothing new: a tied head, or the wavelengths that old files hold."""
    return tensor.endswith(".self_attn.rotary_emb.inv_freq") or (config.tied and tensor == "lm_head.weight")


def _block(config: LlamaConfig) -> dict[str, Place]:
    """Places of the parameters of a layer, by paths inside it."""
    width, queries, pairs = config.embed, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention_norm.scale": Place("input_layernorm.weight", False, (width,)),
        "attention.query.kernel": Place("self_attn.q_proj.weight", True, (width, queries)),
        "attention.key.kernel": Place("self_attn.k_proj.weight", True, (width, pairs)),
        "attention.value.kernel": Place("self_attn.v_proj.weight", True, (width, pairs)),
        "attention.out.kernel": Place("self_attn.o_proj.weight", True, (queries, width)),
        "mlp_norm.scale": Place("post_attention_layernorm.weight", False, (width,)),
        "mlp.gate.kernel": Place("mlp.gate_proj.weight", True, (width, config.mlp)),
        "mlp.up.kernel": Place("mlp.up_proj.weight", True, (width, config.mlp)),
        "mlp.down.kernel": Place("mlp.down_proj.weight", True, (config.mlp, width)),
    }
