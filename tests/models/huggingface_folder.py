"""Tiny Llamas as a stranger would send them: a folder made by safetensors alone, in Hugging Face's own names.

Run with ``transformers`` installed, this writes the logits that the tests compare with: ``python -m
tests.models.huggingface_folder``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "dtype": "float32",
}
SIZES: dict[str, dict[str, Any]] = {
    "gqa": {
        **COMMON,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-2,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
    },
    "tied": {**COMMON, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
}
TOKENS = (np.arange(2 * 17).reshape(2, 17) * 7 % 31).astype(np.int32)


def tensors_of(sizes: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights, large enough that every operation shows in the logits."""
    width, mlp, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    pairs = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(sizes["num_hidden_layers"]):
        block = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (pairs, width),
            "self_attn.v_proj": (pairs, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    if not sizes["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    random = np.random.default_rng(0)
    return {name: (0.4 * random.standard_normal(s) + (len(s) == 1)).astype(np.float32) for name, s in shapes.items()}


def write_folder(folder: Path, name: str, *, files: int = 1, spoil: str = "") -> Path:
    """Write a folder; in one file, in several with an index, or without weights; spoilt on request."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES[name]))
    tensors = _spoilt(tensors_of(SIZES[name]), spoil)
    homes = {tensor: f"model-{i % files}.safetensors" for i, tensor in enumerate(tensors)} if files else {}
    for file in set(homes.values()):
        path = folder / ("model.safetensors" if files == 1 else file)
        save_file({t: v for t, v in tensors.items() if homes[t] == file}, path, metadata={"format": "pt"})
        content = path.read_bytes()
        if spoil == "cut":
            path.write_bytes(content[:-1])
        if spoil == "header":
            path.write_bytes(b"\xff" * 7 + content[7:])
        if spoil == "size":
            with path.open("r+b") as opened:
                opened.truncate(2**28)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


def _spoilt(tensors: dict[str, Any], spoil: str) -> dict[str, Any]:
    if spoil == "shape":
        tensors["model.norm.weight"] = np.ones(17, np.float32)
    if spoil == "missing":
        del tensors["model.norm.weight"]
    if spoil == "extra":
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)
    if spoil == "dtype":
        tensors["model.norm.weight"] = np.ones(16, np.int32)
    return tensors


if __name__ == "__main__":
    import tempfile

    import torch  # type: ignore[import-not-found, unused-ignore]  # only here, where the golden is made
    import transformers  # type: ignore[import-not-found, unused-ignore]

    golden = {}
    for name in SIZES:
        with tempfile.TemporaryDirectory() as temporary:
            model = transformers.LlamaForCausalLM.from_pretrained(write_folder(Path(temporary) / name, name)).eval()
            with torch.no_grad():
                logits = model(torch.tensor(TOKENS)).logits[:, -1]
        golden[name] = [[round(value, 6) for value in row] for row in logits.tolist()]
    Path(__file__).with_name("huggingface_logits.json").write_text(json.dumps(golden) + "\n")
