"""A user's own model for ``--model``; imported by the compiling subprocess."""

from __future__ import annotations

from typing import Any

from tests.runtime.pipeline.planned import model_of
from tests.support.small_models import small_llama
from tests.zoo import ZOO


def llama() -> tuple[Any, Any, Any]:
    """Its batch of four samples stands for any number of them."""
    model = small_llama(embed=64, mlp=128, vocab=128)
    return model.build, model.loss, model.batch


def wide_llama() -> tuple[Any, Any, Any]:
    """Four layers whose mlp outweighs everything else."""
    model = small_llama(embed=256, mlp=2048, vocab=128, heads=2, kv_heads=2, layers=4, seq=64)
    return model.build, model.loss, model.batch


def broad_llama() -> tuple[Any, Any, Any]:
    """Eight layers of the width of a 7B model, so that products outlast the gathers of their weights."""
    model = small_llama(embed=4096, mlp=11_008, vocab=512, heads=32, kv_heads=32, layers=8, seq=2048)
    return model.build, model.loss, model.batch


def bfloat16_llama() -> tuple[Any, Any, Any]:
    """Four layers computed in bfloat16: a loop, and casts beside its collectives."""
    model = small_llama(embed=256, mlp=512, vocab=512, heads=8, kv_heads=8, layers=4, seq=128, dtype="bfloat16")
    return model.build, model.loss, model.batch


def kernel_llama() -> tuple[Any, Any, Any]:
    """The same, and it asks for cuDNN's attention."""
    sizes: dict[str, Any] = {"embed": 256, "mlp": 512, "vocab": 512, "heads": 4, "kv_heads": 2, "layers": 4, "seq": 128}
    model = small_llama(**sizes, dtype="bfloat16", attention="cudnn")
    return model.build, model.loss, model.batch


def piped_llama() -> tuple[Any, Any, Any]:
    """Four layers at the width of ``tests.runtime.pipeline.planned``."""
    return _planned("llama")


def tied_llama() -> tuple[Any, Any, Any]:
    """The same, embedding and head tied."""
    return _planned("llama, tied")


def encoder_decoder() -> tuple[Any, Any, Any]:
    """T5: every layer of the decoder reads the encoder's output."""
    return _planned("t5")


def _planned(name: str) -> tuple[Any, Any, Any]:
    model = model_of(name)
    return model.build, model.loss, model.batch


def not_three_things() -> int:
    return 3


def post_norm() -> tuple[Any, Any, Any]:
    """BERT: queries, keys, values and the residual connection read one value."""
    case = ZOO["bert"]()
    return case.build, case.loss, case.spec
