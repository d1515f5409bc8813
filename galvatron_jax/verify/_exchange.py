"""What the command and its compiling subprocess tell each other, as two JSON files."""

from __future__ import annotations

from .._document import Value
from ..plan import Plan
from ..profile import Bytes, ModelProfile


class CompileRequest(Value, frozen=True, kw_only=True):
    """One program to compile: the whole train step of a one-stage plan."""

    plan: Plan
    model: str = ""
    """``MODULE:FUNCTION`` of a model of the user's own; empty: the preset that the plan names."""
    target: str
    """GpuTargetConfigProto text."""
    hlo_file: str
    """Where the text of the compiled program goes."""
    dump_folder: str = ""
    """Where XLA writes its own reports; empty: nowhere."""


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
        """Bytes that the allocator must hand out while the step runs; never below ``peak``.

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


class CompileAnswer(Value, frozen=True, kw_only=True):
    """What became of a request."""

    failure: Failure | None = None
    profile: ModelProfile | None = None
    """Of the model that was compiled, from the analysis of this very program."""
    segments: dict[str, str] = {}
    """Kind of each layer, by the name that compiled programs carry in ``op_name``."""
    memory: CompiledMemory | None = None
    compile_s: float = 0.0
    """Clock time of lowering and compiling."""
    options: dict[str, bool | int] = {}
    """What the runtime tells XLA for this program on GPUs; the subprocess told it the same."""
    versions: dict[str, str] = {}
    """Of jax, jaxlib and the compiler plugin."""
