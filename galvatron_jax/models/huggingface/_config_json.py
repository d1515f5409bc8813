"""``config.json`` of a Llama and our ``LlamaConfig``, both ways; what we cannot compute is refused, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec

from ...errors import DocumentError, UnsupportedError
from .._config import ComputeDtype, LlamaConfig
from ._folder import read_small

MAX_CONFIG_BYTES = 2**20
MAX_PARAMETERS = 2**42
"""4.4 trillion: a hostile file must not make us plan for more."""

CONFIG_NAME = "config.json"

Width = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Scale = Annotated[float, msgspec.Meta(gt=0, le=1e24)]


class ConfigJson(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that decide what a Llama computes; defaults are those of ``transformers.LlamaConfig``."""

    model_type: str
    vocab_size: Width = 32_000
    hidden_size: Width = 4096
    intermediate_size: Width = 11_008
    num_hidden_layers: Layers = 32
    num_attention_heads: Width = 32
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    max_position_embeddings: Width = 2048
    rms_norm_eps: Scale = 1e-6
    rope_theta: Scale | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Since transformers 5 in place of the two above."""
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    """Since transformers 5 in place of ``torch_dtype``."""


def read_llama_config(folder: str | Path) -> LlamaConfig:
    """Return the sizes of the Llama in a folder; compute dtype and ``seq`` as the file says.

    Raises:
        DocumentNotFoundError: there is no ``config.json``.
        DocumentError: it is damaged, or its sizes are out of range.
        UnsupportedError: it is another model, or computes something that ours does not.
        ModelError: its sizes contradict each other.
    """
    where = str(Path(folder) / CONFIG_NAME)
    text = read_small(Path(folder), CONFIG_NAME, MAX_CONFIG_BYTES)
    try:
        found = msgspec.json.decode(text, type=ConfigJson)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DocumentError(str(error), expected="the config.json of a Llama", where=where) from None
    rope = found.rope_parameters or found.rope_scaling or {}
    theta = rope.get("rope_theta") or found.rope_theta or 10_000.0
    if found_problems := _problems(found, rope, theta):
        raise UnsupportedError(
            "; ".join(found_problems), expected="a plain Llama (1, 2 or 3)", where=where, action="choose another model"
        )
    dtype = found.dtype or found.torch_dtype or "float32"
    config = LlamaConfig(
        vocab=found.vocab_size,
        embed=found.hidden_size,
        mlp=found.intermediate_size,
        layers=found.num_hidden_layers,
        heads=found.num_attention_heads,
        kv_heads=found.num_key_value_heads or found.num_attention_heads,
        seq=found.max_position_embeddings,
        rope_theta=float(theta),
        norm_eps=found.rms_norm_eps,
        tied=found.tie_word_embeddings,
        dtype=dtype,  # type: ignore[arg-type]  # checked above
    )
    if config.parameter_count > MAX_PARAMETERS:
        raise DocumentError(
            f"got {config.parameter_count} parameters", expected=f"at most {MAX_PARAMETERS}", where=where
        )
    return config


def config_text(config: LlamaConfig, *, dtype: str) -> str:
    """Return the ``config.json`` that makes ``transformers`` build this model.

    Args:
        config: The sizes.
        dtype: Of the stored weights.
    """
    table = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    return json.dumps(table, indent=2) + "\n"


def _problems(found: ConfigJson, rope: dict[str, Any], theta: Any) -> list[str]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    dtype = found.dtype or found.torch_dtype or "float32"
    width = found.hidden_size // found.num_attention_heads
    checks = {
        f"model_type is {found.model_type!r}, not 'llama'": found.model_type != "llama",
        f"rope of type {kind!r} (Llama 3.1 and later stretch the positions)": kind != "default",
        f"rope_theta is {theta!r}": not isinstance(theta, (int, float)) or not 0 < theta < 1e24,
        f"hidden_act is {found.hidden_act!r}, not 'silu'": found.hidden_act != "silu",
        "attention_bias or mlp_bias is set": found.attention_bias or found.mlp_bias,
        f"head_dim is {found.head_dim}, not hidden_size / heads = {width}": found.head_dim not in (None, width),
        "the weights are quantized": found.quantization_config is not None,
        f"the dtype is {dtype!r}, none of {', '.join(get_args(ComputeDtype))}": dtype not in get_args(ComputeDtype),
    }
    return [problem for problem, is_wrong in checks.items() if is_wrong]
