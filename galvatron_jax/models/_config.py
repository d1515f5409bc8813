"""The hyper-parameters of a Llama; no jax in here, so that the planner can read them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import ModelError

ComputeDtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["xla", "cudnn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama and how it computes.

    Raises:
        ModelError: the sizes contradict each other.
    """

    vocab: int
    embed: int
    """Width of the residual stream."""
    mlp: int
    """Width inside the SwiGLU."""
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; each serves ``heads // kv_heads`` query heads."""
    seq: int
    """Tokens in the longest sequence that it is meant for; shorter and longer inputs run too."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    """Use the embedding table as the head."""
    dtype: ComputeDtype = "bfloat16"
    """Products and the residual stream; parameters, norm statistics and softmax are float32."""
    attention: Attention = "xla"
    """Implementation of ``jax.nn.dot_product_attention``; ``"cudnn"`` needs an NVIDIA GPU and a 16-bit ``dtype``."""

    def __post_init__(self) -> None:
        """Check that the sizes agree; every violation at once."""
        if found := self._violations():
            raise ModelError("; ".join(found), where="LlamaConfig", action="correct the sizes")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed // self.heads

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        attention = 2 * self.embed * self.head_dim * (self.heads + self.kv_heads)
        block = attention + 3 * self.embed * self.mlp + 2 * self.embed
        tables = self.vocab * self.embed * (1 if self.tied else 2)
        return self.layers * block + tables + self.embed

    def _violations(self) -> list[str]:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        positive = ("vocab", "embed", "mlp", "layers", "heads", "kv_heads", "seq", "rope_theta", "norm_eps")
        found = [f"{name}={sizes[name]} must be positive" for name in positive if sizes[name] <= 0]
        if found:
            return found
        if self.embed % (2 * self.heads):
            found.append(f"embed={self.embed} must be heads={self.heads} times an even head size (RoPE turns pairs)")
        if self.heads % self.kv_heads:
            found.append(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.attention == "cudnn" and self.dtype == "float32":
            found.append("attention='cudnn' needs dtype='bfloat16' or 'float16'")
        return found
