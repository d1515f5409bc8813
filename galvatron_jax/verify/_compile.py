"""Compile a plan's programs for GPUs that are not there, in a subprocess; read what the compiler says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from .. import errors
from ..errors import GalvatronError, ToolchainError
from ..plan import Plan
from ..profile import ModelProfile
from ._exchange import (
    CompileAnswer,
    CompiledMemory,
    CompileRequest,
    Failure,
    ProgramAnswer,
    StageMemory,
    dump_folder,
    text_file,
)
from ._peak import PeakUse, read_peak
from ._target import load_target

TIME_LIMIT_S = 900.0
"""For tracing, lowering and compiling together; 32 layers take about a minute on two idle cores."""

_PLUGINS = {"jax_plugins.xla_cuda12": "12", "jax_plugins.xla_cuda13": "13"}
_CANNOT_REDUCE = "Can't reduce memory use below"
_INVOLUNTARY = "Involuntary full rematerialization"
_CUBLAS = "XLA's Triton kernels have no tiles for one of the matrix products: all are compiled as cuBLAS calls"
CLONE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+\.remat[\w.]* = ", re.MULTILINE)
"""XLA's rematerialisation names its clones so; that of JAX, which the plan asked for, does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """A program as XLA:GPU compiled it."""

    memory: CompiledMemory
    hlo_text: str
    peak: tuple[PeakUse, ...]
    """What is alive at its peak, largest first; empty when XLA's report could not be read."""
    rematerialised: int
    """Operations that XLA runs twice, unasked, to save memory."""
    warnings: tuple[str, ...]
    """Of the compiler, about memory and about changes of layout that go through the whole array."""
    compile_s: float


class Call(NamedTuple):
    """A program as often as a step runs it."""

    name: str
    program: CompiledProgram
    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStage:
    """All programs of one stage."""

    calls: tuple[Call, ...]
    """``train`` alone, or what a pipeline runs, ``forward`` and ``backward`` once per microbatch."""
    memory: StageMemory
    """Of its devices, which other stages may share."""
    peak: tuple[PeakUse, ...]
    """What is alive at the peak of the program that runs when memory is fullest."""

    @property
    def rematerialised(self) -> int:
        """Operations that XLA runs twice, unasked, in any of the programs."""
        return sum(call.program.rematerialised for call in self.calls)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all programs, each once."""
        return tuple(dict.fromkeys(warning for call in self.calls for warning in call.program.warnings))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPlan:
    """All stages of a plan."""

    profile: ModelProfile
    segments: dict[str, str]
    """Kind of each layer by its name."""
    stages: tuple[CompiledStage, ...]
    programs: int
    """How many were compiled: stages share equal ones."""
    compile_s: float
    """Clock time of compiling all of them."""
    options: dict[str, bool | int]
    """Of XLA: those of the runtime on GPUs."""
    versions: dict[str, str]


def check_toolchain() -> None:
    """Check that the CUDA compiler plugin is installed and of jaxlib's version.

    Raises:
        ToolchainError: with the command that installs it.
    """
    jaxlib = importlib.metadata.version("jaxlib")
    major = next((version for name, version in _PLUGINS.items() if _is_importable(name)), None)
    command = f"pip install --no-deps jax-cuda{major or 12}-plugin=={jaxlib} jax-cuda{major or 12}-pjrt=={jaxlib}"
    if major is None:
        raise ToolchainError(
            "XLA's compiler for NVIDIA GPUs is not installed (it needs no GPU and no CUDA)", action=f"run: {command}"
        )
    found = importlib.metadata.version(f"jax-cuda{major}-pjrt")
    if found != jaxlib:
        raise ToolchainError(
            f"jax-cuda{major}-pjrt is {found}", expected=f"{jaxlib}, as jaxlib", action=f"run: {command}"
        )


def compile_plan(
    plan: Plan, *, model: str = "", fused_attention: bool = False, time_limit_s: float = TIME_LIMIT_S
) -> CompiledPlan:
    """Compile all programs of a plan for the plan's cluster; needs no GPU.

    Args:
        plan: The plan; its ``cluster.gpu`` is a bundled GPU (``target_names``).
        model: ``MODULE:FUNCTION``, see ``_subject.load_subject``; empty: the preset that the plan names.
        fused_attention: Whether a preset asks for cuDNN's attention; without the wheel of cuDNN it does not.
        time_limit_s: The subprocess is ended after this many seconds.

    Raises:
        ToolchainError: the compiler is missing, failed or took too long.
        GalvatronError: whatever is wrong with the plan or the model.
    """
    check_toolchain()
    with tempfile.TemporaryDirectory(prefix="galvatron-verify-") as name:
        target = load_target(plan.cluster.gpu)
        request = CompileRequest(plan=plan, model=model, fused_attention=fused_attention, target=target, folder=name)
        answer = _run(request, Path(name), time_limit_s)
        if answer.failure is not None:
            raise _raised_again(answer.failure)
        return _read(answer, name)


def _read(answer: CompileAnswer, folder: str) -> CompiledPlan:
    assert answer.profile is not None, "no failure, so an answer"
    programs = [_read_program(found, number, folder, answer.segments) for number, found in enumerate(answer.programs)]
    stages = []
    for stage in answer.stages:
        calls = tuple(Call(call.name, programs[call.program], call.times) for call in stage.calls)
        fullest = next(c.program for c in answer.stages[stage.memory.stage].calls if c.name == stage.memory.call)
        stages.append(CompiledStage(calls=calls, memory=stage.memory, peak=programs[fullest].peak))
    return CompiledPlan(
        profile=answer.profile,
        segments=answer.segments,
        stages=tuple(stages),
        programs=len(programs),
        compile_s=sum(program.compile_s for program in programs),
        options=answer.options,
        versions=answer.versions,
    )


def _read_program(found: ProgramAnswer, number: int, folder: str, segments: Iterable[str]) -> CompiledProgram:
    hlo_text = Path(text_file(folder, number)).read_text()
    return CompiledProgram(
        memory=found.memory,
        hlo_text=hlo_text,
        peak=read_peak(Path(dump_folder(folder, number)), segments),
        rematerialised=len(CLONE.findall(hlo_text)),
        warnings=(*_warnings(found.narration), *(() if found.triton else (_CUBLAS,))),
        compile_s=found.compile_s,
    )


def _run(request: CompileRequest, folder: Path, time_limit_s: float) -> CompileAnswer:
    """Return the answer to a request."""
    request_file, answer_file = folder / "request.json", folder / "answer.json"
    request_file.write_bytes(msgspec.json.encode(request))
    command = [sys.executable, "-m", f"{__package__}._worker", str(request_file), str(answer_file)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}  # 1: warnings, which we read
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=time_limit_s, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ToolchainError(
            f"the compilation took longer than {time_limit_s:g} s", action="give more time: --time-limit SECONDS"
        ) from None
    if not answer_file.exists():
        ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with code {done.returncode}"
        told = _tail(done.stderr.decode(errors="replace"))
        raise ToolchainError(f"the compiling process ended {ended}\n{told}", action="see the lines above")
    return msgspec.json.decode(answer_file.read_bytes(), type=CompileAnswer)


def _raised_again(failure: Failure) -> GalvatronError:
    kind = getattr(errors, failure.kind, None) if failure.kind else None
    if isinstance(kind, type) and issubclass(kind, GalvatronError):
        return kind(failure.problem, expected=failure.expected, where=failure.where, action=failure.action)
    error = ToolchainError(f"the plan could not be compiled: {failure.problem}", action="--debug shows where")
    error.add_note(failure.details)
    return error


def _warnings(narration: str) -> tuple[str, ...]:
    """Return the compiler's warnings that matter, each once, without time and place."""
    found = [line for line in narration.splitlines() if _CANNOT_REDUCE in line or _INVOLUNTARY in line]
    return tuple(dict.fromkeys(re.sub(r"^.*?\] ", "", line)[:400] for line in found))


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # no plugin at all: not even the package that would hold it
        return False
