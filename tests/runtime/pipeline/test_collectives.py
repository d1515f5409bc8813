"""The programs of a pipeline's stages hold the predicted collectives, to the last byte, and no others.

Of each stage: forward and backward program run in every microbatch, the end of the passes once a step. What crosses
between stages, the exchange of norms and the update are programs of their own.
"""

from __future__ import annotations

import jax
import pytest

from galvatron_jax.cost import plan_collectives
from galvatron_jax.runtime._planned_pipeline import plan_pipeline
from galvatron_jax.runtime._stage_calls import StageCalls
from galvatron_jax.verify import HloCollective, collectives
from tests.runtime.pipeline.planned import DEVICES, Case, analysis_of, optimizer_of, plan_of
from tests.runtime.planned import INVOLUNTARY
from tests.runtime.test_collectives import compiled_totals, predicted_totals

pytestmark = pytest.mark.multidevice

CASES = {
    "dp, tp and sp": Case("d.1 t2 s4 | d d.1r t2"),
    "zero levels": Case("d.3 d.3 t2.3r | d.2 s2.1r t2.2"),
    "tied embedding, interleaved": Case(
        "t2 d | s2 s2 | d.1r | t2", model="llama, tied", schedule="interleaved-1f1b", chunks=2
    ),
    "loops": Case("d.3 t2.1 t2.1 t2.1 | s4r s4"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_programs_of_stages_hold_the_predicted_collectives_only(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(case)
    analysis = analysis_of(case.model, plan.microbatch_size)
    pipeline = plan_pipeline(analysis, plan, optimizer_of(case.optimizer), jax.devices()[:DEVICES])
    predicted, first = plan_collectives(plan, analysis.profile), 0
    for number, stage in enumerate(plan.stages):
        layers = range(first, first + stage.layer_count)
        planned = [c for c in predicted if c.layer in layers]
        each, once = compiled(StageCalls(pipeline, number))
        assert compiled_totals(each) == predicted_totals(c for c in planned if not c.once), number
        assert compiled_totals(once) == predicted_totals(c for c in planned if c.once), number
        first = layers.stop
    assert INVOLUNTARY not in capfd.readouterr().err


def compiled(stage: StageCalls) -> tuple[list[HloCollective], list[HloCollective]]:
    """Collectives of a stage's passes over one microbatch, and of their end."""
    forward = stage.forward().lower().compile()
    backward = stage.backward(stage.residuals(forward)).lower().compile()
    return _read(forward, backward), _read(stage.gradients().lower().compile())


def _read(*programs: jax.stages.Compiled) -> list[HloCollective]:
    return [c for program in programs for c in collectives(program.as_text() or "")]
