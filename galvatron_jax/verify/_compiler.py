"""Compile lowered programs one by one inside the compiling subprocess; equal ones once.

Stages of a pipeline are mostly equal: their programs differ in the names of layers alone, which the lowered text does
not hold, and a program does not know on which slice of the cluster it runs. So the text is the key.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

from ._exchange import CompiledMemory, ProgramAnswer, dump_folder, text_file

_NO_TILES = "Couldn't find output tile sizes"


class Compiler:
    """Compiles programs into a folder."""

    def __init__(self, folder: str) -> None:
        """Begin with none."""
        self._folder = folder
        self._known: dict[str, int] = {}
        self._compiled: list[jax.stages.Compiled] = []
        self.programs: list[ProgramAnswer] = []
        """What was compiled, in order."""

    def add(self, lowered: jax.stages.Lowered) -> int:
        """Compile a program unless an equal one was; return its position in ``programs``."""
        text = lowered.as_text()
        if text not in self._known:
            self._known[text] = len(self.programs)
            self._compile(lowered)
        return self._known[text]

    def compiled(self, program: int) -> jax.stages.Compiled:
        """Return a program as jax has it."""
        return self._compiled[program]

    def memory(self, program: int) -> CompiledMemory:
        """Return the bytes of a program."""
        return self.programs[program].memory

    def _compile(self, lowered: jax.stages.Lowered) -> None:
        number, start_s = len(self.programs), time.monotonic()
        options: dict[str, str | bool] = {  # added to those of the runtime
            "xla_dump_to": dump_folder(self._folder, number),
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_module_re": ".*",
        }
        with tempfile.TemporaryFile() as told:
            with _standard_error_to(told):
                compiled, triton = compile_lowered(lowered, options)
            told.seek(0)
            narration = told.read().decode(errors="replace")
        Path(text_file(self._folder, number)).write_text(compiled.as_text() or "")
        self._compiled.append(compiled)
        answer = ProgramAnswer(
            memory=_memory(compiled), narration=narration, triton=triton, compile_s=time.monotonic() - start_s
        )
        self.programs.append(answer)


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, str | bool]) -> tuple[jax.stages.Compiled, bool]:
    """Compile; return the program, and whether XLA's own kernels do its matrix products.

    On GPUs the autotuner tries each product and leaves it to cuBLAS where Triton has no tiles for it; without a GPU
    nothing is tried and XLA gives up. Then all products are left to cuBLAS.
    """
    try:
        return lowered.compile(compiler_options=options), True
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES not in str(error):
            raise
    return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False}), False


@contextlib.contextmanager
def _standard_error_to(file: IO[bytes]) -> Iterator[None]:
    """Send what XLA's C++ code writes to file descriptor 2 into ``file``."""
    sys.stderr.flush()
    own = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


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
