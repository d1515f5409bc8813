"""What the command and its compiling subprocess tell each other, as two JSON files."""

from __future__ import annotations

from .._document import Value
from ..plan import Plan
from ..profile import Bytes, Count, ModelProfile


class CompileRequest(Value, frozen=True, kw_only=True):
    """All programs of a plan: the train step of one stage, or those of each stage of a pipeline."""

    plan: Plan
    model: str = ""
    """``MODULE:FUNCTION`` of a model of the user's own; empty: the preset that the plan names."""
    fused_attention: bool = False
    """A preset asks for cuDNN's attention, if cuDNN is installed."""
    target: str
    """GpuTargetConfigProto text."""
    folder: str
    """Where the texts of compiled programs and XLA's own reports go (``text_file``, ``dump_folder``)."""


class CompiledMemory(Value, frozen=True, kw_only=True):
    """Bytes of the program on one device, from ``jax.stages.Compiled.memory_analysis()``."""

    arguments: Bytes
    """State and batch."""
    outputs: Bytes
    aliased: Bytes
    """Outputs that take the place of donated arguments."""
    temporaries: Bytes
    """The one block in which everything else lives."""
    peak: Bytes
    """Most bytes in use at one instant."""

    @property
    def allocated(self) -> int:
        """Bytes that the allocator must hand out while the program runs; never below ``peak``.

        Gaps inside the block of temporaries count: they are taken, though not in use.
        """
        return max(self.peak, self.arguments + self.outputs - self.aliased + self.temporaries)


class Failure(Value, frozen=True, kw_only=True):
    """An error of the subprocess, to be raised again by the command."""

    kind: str
    """Name of a class in ``galvatron_jax.errors``; empty for any other exception."""
    problem: str
    expected: str = ""
    where: str = ""
    action: str = ""
    details: str = ""
    """Traceback, for ``--debug``."""


class ProgramAnswer(Value, frozen=True, kw_only=True):
    """One compiled program."""

    memory: CompiledMemory
    narration: str
    """What the compiler said meanwhile."""
    triton: bool = True
    """XLA's own kernels do its matrix products; otherwise cuBLAS calls."""
    compile_s: float
    """Clock time of compiling."""


class CallAnswer(Value, frozen=True, kw_only=True):
    """One program of a stage, as often as a step runs it."""

    name: str
    """``train``, or ``forward``, ``backward``, ``gradients``, ``exports``, ``update`` of a pipeline stage."""
    program: int
    """Position in ``CompileAnswer.programs``; stages with equal programs share them."""
    times: Count = 1


class StageMemory(Value, frozen=True, kw_only=True):
    """Bytes of a device while a step runs: of a stage, or of a slice whose stages share it."""

    peak: Bytes
    """Most bytes in use at one instant."""
    allocated: Bytes
    """Most bytes that the allocator has handed out; never below ``peak``."""
    categories: dict[str, Bytes]
    """What there is at the peak (``_pipeline_memory``); of a plan of one stage, arguments and temporaries."""
    stage: int = 0
    """The stage that runs at the peak,"""
    call: str = "train"
    """and its program,"""
    microbatch: int | None = None
    """and the microbatch, in a pass."""


class StageAnswer(Value, frozen=True, kw_only=True):
    """One stage."""

    calls: tuple[CallAnswer, ...]
    memory: StageMemory


class CompileAnswer(Value, frozen=True, kw_only=True):
    """What became of a request."""

    failure: Failure | None = None
    profile: ModelProfile | None = None
    """Of the model that was compiled, from the analysis of this very program."""
    segments: dict[str, str] = {}
    """Kind of each layer, by the name that compiled programs carry in ``op_name``."""
    programs: tuple[ProgramAnswer, ...] = ()
    stages: tuple[StageAnswer, ...] = ()
    options: dict[str, bool | int] = {}
    """What the runtime tells XLA for these programs on GPUs; the subprocess told it the same."""
    versions: dict[str, str] = {}
    """Of jax, jaxlib and the compiler plugin."""


def text_file(folder: str, program: int) -> str:
    """Return where the text of a compiled program is."""
    return f"{folder}/{program}.hlo"


def dump_folder(folder: str, program: int) -> str:
    """Return where XLA's reports on a program are."""
    return f"{folder}/{program}"
