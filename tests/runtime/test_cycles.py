"""Runs that come again in the same order are one loop: how they are folded, and that nothing else changes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from galvatron_jax.analysis import analyse_model
from galvatron_jax.cost import plan_collectives
from galvatron_jax.plan import Strategy
from galvatron_jax.runtime._cycles import Cycle
from galvatron_jax.runtime._runs import Run
from galvatron_jax.verify import collectives
from tests.runtime.planned import BATCH, Planned, dp, planned, tp, ulysses
from tests.runtime.test_collectives import compiled_totals, on_cpu, predicted_totals
from tests.runtime.test_equivalence import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Arrays, by_path
from tests.support.small_models import SmallModel, small_llama

pytestmark = pytest.mark.multidevice

WORDS = {"a": dp(3), "A": dp(3, "full"), "t": tp(2), "s": tp(4, sp=True, zero=1), "u": ulysses(2, zero=2), "d": dp()}
"""Strategies by letter; ``a`` and ``A`` have the stream in one layout."""


@functools.cache
def model(layers: int) -> SmallModel:
    return small_llama(batch=BATCH, seq=16, layers=layers, vocab=64, embed=32, mlp=48, kv_heads=4)


def plan(word: str, microbatches: int = 1) -> Planned:
    """Return the programs of a plan with one letter for each layer."""
    return planned(tuple(WORDS[c] for c in word), model=model(len(word) - 2), microbatches=microbatches)


@pytest.mark.parametrize(
    ("word", "pieces"),
    [
        ("d" + "tA" * 4 + "t", "d (t A)x4 t"),
        ("d" + "tA" * 4 + "d", "d t (A t)x3 A d"),  # no turn t A is followed by what takes the stream as t does
        ("d" + "aA" * 4 + "t", "d (a A)x4 t"),  # one layout: nothing to keep
        ("d" + "atd" * 3 + "a", "d (a t d)x3 a"),
        ("d" + "aaaattt" * 3 + "d", "d (a4 t3)x3 d"),
        ("d" + "aatt" * 3 + "a", "d (a a t t)x3 a"),
        ("d" + "tata" + "t", "d t a t a t"),
        ("d" + "aats" + "d", "d a a t s d"),
        ("d" + "tatata" + "sAsAsA" + "s", "d t a t a t a (s A)x3 s"),
    ],
)
def test_runs_are_folded_where_it_makes_the_program_shorter(word: str, pieces: str) -> None:
    letters = {strategy: letter for letter, strategy in WORDS.items()}
    assert " ".join(spelled(piece, letters) for piece in plan(word).programs.model.pieces) == pieces


def spelled(piece: Run | Cycle, letters: dict[Strategy, str]) -> str:
    if isinstance(piece, Cycle):
        return f"({' '.join(spelled(run, letters) for run in piece.runs)})x{len(piece.turns)}"
    count = len(piece.segments)
    return letters[piece.layout.strategy] + (str(count) if count > 1 else "")


@pytest.mark.parametrize(
    ("word", "microbatches"),
    [
        ("d" + "tu" * 3 + "t", 1),
        ("a" + "sA" * 3 + "s", 2),
        ("t" + "dddAAA" * 3 + "d", 2),
    ],
)
def test_a_cycle_computes_and_communicates_as_its_layers_do(word: str, microbatches: int) -> None:
    sharded = plan(word, microbatches)
    assert any(isinstance(piece, Cycle) for piece in sharded.programs.model.pieces)
    state, batch = sharded.adopted(), sharded.placed(sharded.model.batch)
    program = sharded.programs.gradients
    compiled = program.lower(state, batch).compile()  # type: ignore[attr-defined]
    loss, gradients = compiled(state, batch)
    expected_loss, expected = reference(len(word) - 2)
    assert float(loss) == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
    for path, value in by_path(sharded.user_tree(gradients)).items():
        np.testing.assert_allclose(
            value, expected[path], rtol=0, atol=GRADIENT_TOLERANCE * np.abs(expected[path]).max()
        )
    predicted = on_cpu(sharded.plan, plan_collectives(sharded.plan, sharded.analysis.profile))
    once = [c for c in predicted if c.once or microbatches == 1]
    every = [c for c in predicted if c not in once]
    totals = predicted_totals([*once, *every * microbatches])
    assert compiled_totals(collectives(compiled.as_text())) == totals


@functools.cache
def reference(layers: int) -> tuple[float, Arrays]:
    """Loss and gradients on one device."""
    small = model(layers)
    analysis = analyse_model(small.build, small.loss, small.abstract_batch)
    parameters, rest = analysis.trace.rows.apart(*analysis.trace.model.build())

    def loss(parameters: object) -> jax.Array:
        value: jax.Array = analysis.trace.model.run(*analysis.trace.rows.together(parameters, rest), small.batch)[0]
        return value

    value, gradients = jax.jit(jax.value_and_grad(loss))(parameters)
    return float(value), by_path(gradients)
