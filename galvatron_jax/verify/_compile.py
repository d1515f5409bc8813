"""Compile a plan's train step for GPUs that are not there, in a subprocess; read what the compiler says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import errors
from ..errors import GalvatronError, ToolchainError
from ..plan import Plan
from ..profile import ModelProfile
from ._exchange import CompileAnswer, CompiledMemory, CompileRequest, Failure
from ._peak import PeakUse, read_peak
from ._target import load_target

TIME_LIMIT_S = 900.0
"""For tracing, lowering and compiling together; 32 layers take about a minute on two idle cores."""

_PLUGINS = {"jax_plugins.xla_cuda12": "12", "jax_plugins.xla_cuda13": "13"}
_CANNOT_REDUCE = "Can't reduce memory use below"
_INVOLUNTARY = "Involuntary full rematerialization"
_CLONE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+\.remat[\w.]* = ", re.MULTILINE)
"""XLA's rematerialisation names its clones so; that of JAX, which the plan asked for, does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """The train step of a plan as XLA:GPU compiled it."""

    profile: ModelProfile
    segments: dict[str, str]
    """Kind of each layer by its name."""
    memory: CompiledMemory
    hlo_text: str
    peak: tuple[PeakUse, ...]
    """What is alive at the peak, largest first; empty when XLA's report could not be read."""
    rematerialised: int
    """Operations that XLA runs twice, unasked, to save memory."""
    warnings: tuple[str, ...]
    """Of the compiler, about memory and about changes of layout that go through the whole array."""
    compile_s: float
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


def compile_plan(plan: Plan, *, model: str = "", time_limit_s: float = TIME_LIMIT_S) -> CompiledStep:
    """Compile the train step of a one-stage plan for the plan's cluster; needs no GPU.

    Args:
        plan: The plan; its ``cluster.gpu`` is a bundled GPU (``target_names``).
        model: ``MODULE:FUNCTION``, see ``_subject.load_subject``; empty: the preset that the plan names.
        time_limit_s: The subprocess is ended after this many seconds.

    Raises:
        ToolchainError: the compiler is missing, failed or took too long.
        GalvatronError: whatever is wrong with the plan or the model.
    """
    check_toolchain()
    with tempfile.TemporaryDirectory(prefix="galvatron-verify-") as name:
        folder = Path(name)
        request = CompileRequest(
            plan=plan,
            model=model,
            target=load_target(plan.cluster.gpu),
            hlo_file=str(folder / "program.hlo"),
            dump_folder=str(folder / "dump"),
        )
        answer, narration = _run(request, folder, time_limit_s)
        if answer.failure is not None:
            raise _raised_again(answer.failure)
        assert answer.profile is not None, "no failure, so an answer"
        assert answer.memory is not None, "no failure, so an answer"
        hlo_text = Path(request.hlo_file).read_text()
        return CompiledStep(
            profile=answer.profile,
            segments=answer.segments,
            memory=answer.memory,
            hlo_text=hlo_text,
            peak=read_peak(Path(request.dump_folder), tuple(answer.segments)),
            rematerialised=len(_CLONE.findall(hlo_text)),
            warnings=_warnings(narration),
            compile_s=answer.compile_s,
            options=answer.options,
            versions=answer.versions,
        )


def _run(request: CompileRequest, folder: Path, time_limit_s: float) -> tuple[CompileAnswer, str]:
    """Return the answer to a request, and what the subprocess said."""
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
    narration = done.stderr.decode(errors="replace")
    if not answer_file.exists():
        ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with code {done.returncode}"
        raise ToolchainError(f"the compiling process ended {ended}\n{_tail(narration)}", action="see the lines above")
    return msgspec.json.decode(answer_file.read_bytes(), type=CompileAnswer), narration


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
