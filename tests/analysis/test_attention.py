"""Calls of attention that ask for cuDNN: seen through, remembered, and told from those that do not ask."""

from __future__ import annotations

import functools

import jax
import pytest

from galvatron_jax.analysis import Analysis, AttentionCall, analyse_model, analysis_lines, attention_call
from galvatron_jax.analysis._attention import attention_name
from tests.support.attention_models import HEADS, LAYERS, attention_model


def analysis_of(form: str, kernel: str | None, kv_heads: int = HEADS) -> Analysis:
    model = attention_model(form, kv_heads=kv_heads, kernel=kernel)
    return analyse_model(model.build, model.loss, model.abstract_batch)


@pytest.mark.parametrize("form", ["causal", "mask", "lengths", "learned bias"])  # a window's mask stays in the call
def test_profile_does_not_depend_on_what_is_asked_for(form: str) -> None:
    asked, plain = analysis_of(form, "cudnn", 4), analysis_of(form, "xla", 4)
    assert asked.profile == plain.profile
    assert (asked.asks_for_kernels, plain.asks_for_kernels) == (True, False)


def test_call_is_remembered_with_its_settings() -> None:
    analysis = analysis_of("window", "cudnn")
    (kind,) = {segment.kind for segment in analysis.cut.segments if segment.name.startswith("layers")}
    (call,) = analysis.kinds[kind].layer.forward.calls
    asked = AttentionCall(arrays=("query", "key", "value"), is_causal=True, scale=0.3, local_window_size=(4, 0))
    assert attention_call(call.name) == asked
    assert len(call.inputs) == len(asked.arrays)
    assert [layer.count for layer in analysis.profile.layers] == [1, LAYERS, 1]


@pytest.mark.parametrize(("kernel", "said"), [("cudnn", "by cuDNN's kernel on GPUs"), (None, "scores in memory")])
def test_report_says_how_attention_runs(kernel: str | None, said: str) -> None:
    lines = [
        "".join(str(getattr(piece, "text", piece)) for piece in line)
        for line in analysis_lines(analysis_of("causal", kernel))
    ]
    (line,) = [line for line in lines if "attends" in line]
    assert said in line


def test_other_calls_are_none() -> None:
    assert attention_name({"name": "silu"}) is None
    assert attention_name({}) is None


@pytest.mark.parametrize("form", ["causal", "window", "lengths", "mask"])
def test_function_that_was_imported_before_is_seen_too(form: str) -> None:
    """``from jax.nn import dot_product_attention``, and what Linen's ``attention_fn`` is given."""
    direct = attention_model(form, kv_heads=4)
    imported = attention_model(form, kv_heads=4, attention=functools.partial(jax.nn.dot_product_attention))
    found, expected = (analyse_model(m.build, m.loss, m.abstract_batch) for m in (imported, direct))
    assert found.asks_for_kernels
    assert found.profile == expected.profile


def test_one_call_that_does_not_ask_is_enough() -> None:
    """A plan must not count on a kernel in some of the layers."""
    model = attention_model("causal")
    both = attention_model("causal", kernels=("cudnn", "xla"))
    assert analyse_model(model.build, model.loss, model.abstract_batch).asks_for_kernels
    assert not analyse_model(both.build, both.loss, both.abstract_batch).asks_for_kernels
