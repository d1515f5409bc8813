"""The compiling subprocess: ``python -m galvatron_jax.verify._worker REQUEST ANSWER``.

A process of its own because the CUDA plugin registers itself when jax is imported, and XLA's flags hold for a whole
process. ``JAX_PLATFORMS=cpu`` must be set before: without it the plugin looks for a CUDA driver, finds none, and is not
registered.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import msgspec
from jax.experimental import topologies

from ..analysis import Analysis, analyse_model
from ..errors import GalvatronError
from ..plan import Plan, check_plan
from ..runtime import StagePrograms, plan_model, stage_mesh
from ._exchange import CompileAnswer, CompiledMemory, CompileRequest, Failure
from ._subject import load_subject, stand_in_optimizer


def main(request_file: str, answer_file: str) -> None:
    """Read a request, compile, write the answer; errors are answers too."""
    request = msgspec.json.decode(Path(request_file).read_bytes(), type=CompileRequest)
    try:
        answer = compile_request(request)
    except GalvatronError as error:
        kind = type(error).__name__
        answer = CompileAnswer(
            failure=Failure(
                kind=kind, problem=error.problem, expected=error.expected, where=error.where, action=error.action
            )
        )
    except Exception as error:  # whatever XLA raises belongs to the user's plan, not to this process
        text = f"{type(error).__name__}: {error}".strip()
        answer = CompileAnswer(failure=Failure(kind="", problem=text, details=traceback.format_exc()))
    Path(answer_file).write_bytes(msgspec.json.encode(answer))


def compile_request(request: CompileRequest) -> CompileAnswer:
    """Compile the train step of a plan for its own cluster.

    Raises:
        PlanError: the plan does not belong to the model.
        AnalysisError: the model cannot be traced.
    """
    plan, subject = request.plan, load_subject(request.plan, request.model)
    analysis = analyse_model(subject.model, subject.loss, subject.batch, name=plan.model.name)
    check_plan(plan, analysis.profile)
    start = time.monotonic()
    programs = _programs(analysis, plan, request.target)
    lowered = _lower(programs, _batch(analysis, plan))
    compiled = lowered.compile(compiler_options=_options(request.dump_folder))  # added to those of the runtime
    compile_s = time.monotonic() - start
    Path(request.hlo_file).write_text(compiled.as_text() or "")
    return CompileAnswer(
        profile=analysis.profile,
        segments={segment.name: segment.kind for segment in analysis.cut.segments},
        memory=_memory(compiled),
        compile_s=compile_s,
        options=programs.compiler_options,
        versions=_versions(),
    )


def _programs(analysis: Analysis, plan: Plan, target: str) -> StagePrograms:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"{plan.cluster.nodes}x1x{plan.cluster.gpus_per_node}",  # NVLink domains x hosts each x GPUs each
        target_config=target,
    )
    planned = plan_model(analysis, plan, stage_mesh(plan.cluster, topology.devices))
    return StagePrograms(planned, stand_in_optimizer(plan), plan.microbatches)


def _lower(programs: StagePrograms, batch: list[jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
    train: Any = programs.train  # a jitted function: ``Callable`` hides ``lower``
    lowered: jax.stages.Lowered = train.lower(programs.abstract_state, batch)
    return lowered


def _batch(analysis: Analysis, plan: Plan) -> list[jax.ShapeDtypeStruct]:
    leading = (plan.microbatches,) if plan.microbatches > 1 else ()
    leaves = jax.tree.leaves(analysis.trace.batch)
    return [jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype) for leaf in leaves]


def _options(dump_folder: str) -> dict[str, str | bool] | None:
    if not dump_folder:
        return None
    return {"xla_dump_to": dump_folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*train.*"}


def _memory(compiled: jax.stages.Compiled) -> CompiledMemory:
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA:GPU analyses memory"
    return CompiledMemory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        peak=analysis.peak_memory_in_bytes,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    assert os.environ.get("JAX_PLATFORMS") == "cpu", "see the module docstring"
    main(*sys.argv[1:])
