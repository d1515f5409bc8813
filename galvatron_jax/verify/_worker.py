"""The compiling subprocess: ``python -m galvatron_jax.verify._worker REQUEST ANSWER``.

A process of its own because the CUDA plugin registers itself when jax is imported, and XLA's flags hold for a whole
process. ``JAX_PLATFORMS=cpu`` must be set before: without it the plugin looks for a CUDA driver, finds none, and is not
registered.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec
from jax.experimental import topologies

from ..analysis import analyse_model, has_cudnn
from ..errors import GalvatronError
from ..plan import Plan, check_plan
from ..runtime import compiler_options, stage_mesh
from ._compiler import Compiler
from ._exchange import CompileAnswer, CompileRequest, Failure
from ._plan_programs import compile_stages
from ._subject import load_subject


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
    """Compile the programs of a plan for its own cluster.

    Raises:
        PlanError: the plan does not belong to the model.
        AnalysisError: the model cannot be traced.
    """
    plan, fused = request.plan, request.fused_attention and has_cudnn()
    subject = load_subject(plan, request.model, fused_attention=fused)
    analysis = analyse_model(subject.model, subject.loss, subject.batch, name=plan.model.name)
    check_plan(plan, analysis.profile)
    compiler, devices = Compiler(request.folder), _devices(plan, request.target)
    stages = compile_stages(compiler, analysis, plan, devices)
    return CompileAnswer(
        profile=analysis.profile,
        segments={segment.name: segment.kind for segment in analysis.cut.segments},
        programs=tuple(compiler.programs),
        stages=tuple(stages),
        options=compiler_options(stage_mesh(plan.cluster, devices)),
        versions=_versions(),
    )


def _devices(plan: Plan, target: str) -> list[Any]:
    """Return devices for one stage that are not there.

    Slices are equal, and a program does not know on which of them it runs: all stages are compiled for the first one.
    """
    nodes, gpus = plan.cluster.slice_shape(plan.stages[0].devices)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"{nodes}x1x{gpus}",  # NVLink domains x hosts each x GPUs each
        target_config=target,
    )
    return list(topology.devices)


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
