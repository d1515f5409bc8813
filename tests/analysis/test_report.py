"""What a user sees of the analysis: the text, the command, its exit statuses; one program in several forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from galvatron_jax._text import plain
from galvatron_jax._user_model import own_model
from galvatron_jax.analysis import analyse_model
from galvatron_jax.analysis._cli import main
from galvatron_jax.analysis._report import analysis_lines
from tests.support.small_models import SMALL_MODELS, Perceptron, regression, stack
from tests.zoo import ZOO


def load(name: str) -> tuple[Any, Any, Any]:
    case = ZOO[name]()
    return case.build, case.loss, case.batch


def text(name: str) -> str:
    case = ZOO[name]()
    return plain(analysis_lines(analyse_model(case.build, case.loss, case.spec)))


# ---------------------------------------------------------------------------------------------------------------- text
def test_text_names_layers_shapes_classes_and_collectives() -> None:
    found = text("moe one-hot")
    assert "model    Mixtral · 4 layers of 3 kinds" in found
    assert "layers   found as repeated module calls" in found
    assert "layers.* · layers.0, layers.1" in found
    assert "mlp.up                  [expert, embed, mlp]" in found
    assert "takes   float32 [batch embed seq] (stream)" in found
    assert "forward 2 all-reduce" in found
    assert all(len(line) < 160 for line in found.splitlines())


def test_text_says_what_is_tied_forwarded_and_remade() -> None:
    found = text("t5 linen")
    assert "tied: a layer before holds it" in found
    assert "(forwarded, gradient back)" in found
    assert "(remade)" in found


def test_text_of_a_model_that_is_not_cut_says_why_and_that_it_trains() -> None:
    model = SMALL_MODELS["plain"]()
    analysis = analyse_model(model.build, model.loss, model.abstract_batch)
    found = plain(analysis_lines(analysis))
    assert "not cut: no two calls of alike modules follow each other (called: first, second)" in found
    assert "trains as one segment" in found
    assert [s.kind for s in analysis.cut.segments] == ["model"]


def test_text_counts_primitives_without_a_rule() -> None:
    def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
        ordered = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))
        return jnp.mean(model(x) + ordered)

    model = regression(stack(2, lambda rngs: Perceptron(8, 16, rngs=rngs)), 4, 8, 8)
    found = plain(analysis_lines(analyse_model(model.build, loss, model.abstract_batch)))
    assert "pure_callback ×" in found


# ------------------------------------------------------------------------------------------------------------- command
def test_command_prints_the_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pure"], load) == 0
    out, err = capsys.readouterr()
    assert "layers   found as repeated equations" in out
    assert err == ""


def test_command_prints_the_profile_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama", "--json", "--batch", "2"], load) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "llama"
    assert document["kinds"][1]["classes"]["batch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--batch", "0"], "got '0', expected a positive number of samples"),
        (
            ["llama", "--layers", "blocks.*"],
            "layers='blocks.*' names no module that is called; expected one of embed, head",
        ),
        (["llama", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_command_refuses_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, load) == 2
    assert message in capsys.readouterr().err


def test_command_of_a_function_that_is_not_there_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_such_module:f"], lambda text: own_model(text, where="MODEL")) == 2
    assert "MODEL: got 'no_such_module:f': No module named 'no_such_module'" in capsys.readouterr().err


def test_command_names_module_and_loss_of_a_model_that_cannot_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ jnp.ones((3, 3)) if self.is_mutable_collection("params") else x @ jnp.ones((5, 3))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Wrong(name="inner")(nn.Dense(3)(x))

    def my_loss(model: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(model(x))

    assert main(["any"], lambda _: (Model(), my_loss, jnp.ones((4, 8)))) == 2
    message = capsys.readouterr().err
    assert "inner" in message
    assert "dot_general" in message


def test_preset_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from galvatron_jax._user_model import preset_model

    assert main(["llama-tiny"], preset_model) == 0
    assert "model    llama-tiny" in capsys.readouterr().out
