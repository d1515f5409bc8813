"""Llamas in Hugging Face's layout: the same logits, straight into shardings, and nothing but safetensors is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax import auto_shard
from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import DocumentError, DocumentNotFoundError, GalvatronError, ModelError, UnsupportedError
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.models.huggingface import read_llama, read_llama_config, write_llama
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from tests.models.huggingface_folder import SIZES, TOKENS, write_folder

CLUSTER = Cluster(nodes=1, gpus_per_node=8, gpu="cpu")
pytest.importorskip("safetensors")

GOLDEN = Path(__file__).parent / "huggingface_logits.json"
TOLERANCE = 1e-4
"""Both compute in float32 and add in another order; the logits are of order 1 to 10."""


def logits(config: LlamaConfig, weights: Any) -> Any:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(model))
    for path, variable in state:
        tensor = weights[".".join(map(str, path))]
        variable.set_value(jnp.asarray(np.asarray(tensor[(slice(None),) * len(tensor.shape)]), jnp.float32))
    nnx.update(model, nnx.from_flat_state(state))
    return np.asarray(model(jnp.asarray(TOKENS)))


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_that_transformers_gave(name: str, tmp_path: Path) -> None:
    config, weights = read_llama(write_folder(tmp_path / name, name))
    assert np.abs(logits(config, weights)[:, -1] - np.array(json.loads(GOLDEN.read_text())[name])).max() < TOLERANCE


@pytest.mark.parametrize("name", SIZES)
def test_transformers_gives_the_same_logits_and_loads_what_we_write(name: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write_folder(tmp_path / name, name)
    config, weights = read_llama(folder)
    written = tmp_path / "written"
    write_llama(written, config, weights, shard_bytes=4096)
    ours = logits(config, weights)
    for place in (folder, written):
        model = transformers.LlamaForCausalLM.from_pretrained(place).float().eval()
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS)).logits.numpy()
        print(f"{name} {place.name}: largest difference {np.abs(ours - theirs).max():.2e}")
        assert np.abs(ours - theirs).max() < TOLERANCE


def test_written_weights_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    config, weights = read_llama(write_folder(tmp_path / "gqa", "gqa"))
    files = write_llama(tmp_path / "out", config, weights, shard_bytes=4096)
    assert len(files) > 3
    assert read_llama_config(tmp_path / "out") == config
    again = read_llama(tmp_path / "out")[1]
    for path, tensor in weights.items():
        whole = (slice(None),) * len(tensor.shape)
        np.testing.assert_array_equal(tensor[whole], again[path][whole])


def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path: Path) -> None:
    tensor = read_llama(write_folder(tmp_path / "gqa", "gqa"))[1]["layers.1.mlp.up.kernel"]
    whole = tensor[:, :]
    np.testing.assert_array_equal(tensor[4:8, 12:], whole[4:8, 12:])


@pytest.mark.multidevice
@pytest.mark.parametrize("stages", [1, 2])
def test_weights_go_straight_into_the_shardings_of_a_plan(stages: int, tmp_path: Path) -> None:
    config, weights = read_llama(write_folder(tmp_path / "tied", "tied"))
    asked: dict[str, int] = {}
    watched = {path: Watched(tensor, path, asked) for path, tensor in weights.items()}
    sharded = auto_shard(
        lambda: Llama(config, rngs=nnx.Rngs(0)), optimizer=optax.sgd(0.0), weights=watched, plan=plan_of(config, stages)
    )
    tokens = np.tile(TOKENS, (4, 1))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    loss = float(sharded.step(batch).loss)
    shifted = jax.nn.log_softmax(logits(config, weights)[:, :-1])
    expected = float(-np.take_along_axis(np.asarray(shifted), TOKENS[:, 1:, None], -1).mean())
    assert loss == pytest.approx(expected, abs=1e-4)
    split = [path for path, largest in asked.items() if largest < np.prod(weights[path].shape)]
    assert "layers.0.mlp.up.kernel" in split, "a device asks for its own part only"


class Watched:
    """A tensor that notes the largest part that anybody asked for."""

    def __init__(self, tensor: Any, path: str, asked: dict[str, int]) -> None:
        self.tensor, self.shape, self.path, self.asked = tensor, tensor.shape, path, asked

    def __getitem__(self, index: Any) -> Any:
        part = self.tensor[index]
        self.asked[self.path] = max(self.asked.get(self.path, 0), part.size)
        return part


def plan_of(config: LlamaConfig, stages: int) -> Plan:
    """Tensor parallel over 2, zero 3 over the rest; layer by layer in two stages, or all in one."""
    tokens = jax.ShapeDtypeStruct((8 // stages, 16), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    profile = analyse_model(lambda: Llama(config, rngs=nnx.Rngs(0)), next_token_loss, batch).profile
    strategy = Strategy(tp=2, dp=4 // stages, zero=3)
    kinds = ["embed", "layers.*", "layers.*", "head"]
    return Plan(
        model=model_reference(profile),
        cluster=CLUSTER,
        global_batch=8,
        microbatches=stages,
        stages=tuple(
            Stage(devices=8 // stages, runs=tuple(PlanRun(kind=kind, count=1, strategy=strategy) for kind in stage))
            for stage in (kinds[: len(kinds) // stages], kinds[2:])[:stages]
        ),
    )


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    config, weights = read_llama(write_folder(tmp_path / "gqa", "gqa"))
    del weights["norm.scale"]
    weights["layers.7.norm.scale"] = weights["layers.0.mlp_norm.scale"]
    sharded = auto_shard(
        lambda: Llama(config, rngs=nnx.Rngs(0)),
        weights=weights,
        cluster=CLUSTER,
    )
    with pytest.raises(ModelError, match=r"(?s)norm.scale is missing.*layers.7.norm.scale is no parameter"):
        sharded.prepare({"inputs": np.zeros((8, 8), np.int32), "targets": np.zeros((8, 8), np.int32)})


# ------------------------------------------------------------------------------------------- a folder from a stranger
def change_json(folder: Path, name: str, **changes: Any) -> None:
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(table | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope of type 'llama3'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": 3}, "heads"),
        ({"vocab_size": 2**24, "num_hidden_layers": 10_000, "hidden_size": 2**24, "head_dim": None}, "parameters"),
    ],
)
def test_a_configuration_that_we_cannot_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "gqa", "gqa")
    change_json(folder, "config.json", **changes)
    with pytest.raises(GalvatronError, match=message):
        read_llama(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gqa", "gqa", files=0)
    (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsupportedError, match=r"run whatever code"):
        read_llama(folder)


@pytest.mark.parametrize(
    "name",
    ["../w.safetensors", "/etc/w.safetensors", "a/w.safetensors", "a\\w.safetensors", "w\0.safetensors", "x.bin", ".."],
)
def test_an_index_names_plain_safetensors_files_only(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gqa", "gqa", files=2)
    (tmp_path / "w.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    change_json(folder, "model.safetensors.index.json", weight_map=index | {"model.norm.weight": name})
    with pytest.raises((DocumentError, UnsupportedError), match=r"plain file name|safetensors"):
        read_llama(folder)


def test_a_link_leads_into_the_blobs_of_its_cache_and_nowhere_else(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models--me--tiny" / "snapshots" / "abc", "gqa")
    weights, blobs = folder / "model.safetensors", tmp_path / "models--me--tiny" / "blobs"
    blobs.mkdir()
    weights.rename(blobs / "0123")
    weights.symlink_to(Path("../../blobs/0123"))
    read_llama(folder)
    weights.unlink()
    (blobs / "0123").rename(tmp_path / "0123")
    weights.symlink_to(tmp_path / "0123")
    with pytest.raises(DocumentError, match="inside the folder"):
        read_llama(folder)


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "dtype", "cut", "header", "size"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_allocated(change: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gqa", "gqa", spoil=change)
    message = {
        "shape": "has shape",
        "missing": "model.norm.weight is missing",
        "extra": "no parameter of this Llama",
        "dtype": "dtype I32",
        "cut": "cannot be read",
        "header": "cannot be read",
        "size": "at most",
    }[change]
    with pytest.raises(DocumentError, match=message):
        read_llama(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gqa", "gqa", files=2)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(DocumentNotFoundError, match=r"model-1\.safetensors"):
        read_llama(folder)


def test_an_export_does_not_replace_weights_unasked(tmp_path: Path) -> None:
    config, weights = read_llama(write_folder(tmp_path / "gqa", "gqa"))
    with pytest.raises(DocumentError, match="holds"):
        write_llama(tmp_path / "gqa", config, weights)
