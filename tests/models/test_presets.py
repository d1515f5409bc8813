"""Presets against the published parameter counts, and the stored profiles."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from galvatron_jax import models
from galvatron_jax.errors import DocumentError, DocumentNotFoundError

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}
"""Parameters of the released models, as transformers' ``num_parameters()`` reports them."""


def count_parameters(config: models.LlamaConfig) -> int:
    """Count without memory: the model stays abstract."""
    model = nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_preset_has_published_parameter_count(name: str, count: int) -> None:
    assert models.llama_config(name).parameter_count == count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", models.model_names())
def test_preset_formula_equals_count_of_the_model(name: str, tied: bool) -> None:
    # Two layers suffice: all are alike, and 80 abstract ones take 8 s.
    config = replace(models.llama_config(name), layers=2, tied=tied)
    assert count_parameters(config) == config.parameter_count


def test_preset_llama2_7b_whole_model_has_published_count() -> None:
    assert count_parameters(models.llama_config("llama2-7b")) == PUBLISHED["llama2-7b"]


def test_preset_small_ones_have_the_size_they_say() -> None:
    assert models.llama_config("llama-tiny").parameter_count < 1_000_000
    assert models.llama_config("llama-100m").parameter_count == pytest.approx(100e6, rel=0.02)


def test_preset_name_ignores_case() -> None:
    assert models.llama_config("LLaMA2-7B ") == models.llama_config("llama2-7b")


@pytest.mark.parametrize("look_up", [models.llama_config, models.load_model_profile])
def test_unknown_name_lists_names(look_up: object) -> None:
    assert callable(look_up)
    with pytest.raises(DocumentNotFoundError, match=r"'no-such-model'.*expected one of"):
        look_up("no-such-model")


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(DocumentNotFoundError, match="did you mean 'llama2-7b'"):
        models.llama_config("llama-2-7b")


def test_load_model_profile_reads_every_stored_one() -> None:
    for name in models.model_profile_names():
        profile = models.load_model_profile(name)
        assert profile.name == name
        assert profile.parameter_count == models.llama_config(name).parameter_count


def test_load_model_profile_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentNotFoundError, match=r"nothing\.json"):
        models.load_model_profile(tmp_path / "nothing.json")


def test_load_model_profile_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"schema_version": 1, "name":')
    with pytest.raises(DocumentError, match=r"broken\.json"):
        models.load_model_profile(str(tmp_path / "broken.json"))


def test_models_import_leaves_jax_alone() -> None:
    code = (
        "import sys, galvatron_jax.models as m; m.llama_config('llama2-7b'); m.model_profile_names(); dir(m);"
        "print(sorted({'jax', 'flax', 'optax'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_models_lazy_names_are_listed_and_others_refused() -> None:
    assert {"Llama", "next_token_loss", "load_model_profile"} <= set(dir(models))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = models.no_such_name
