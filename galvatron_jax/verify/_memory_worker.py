"""The process that compiles the memory profiler's probes: ``python -m galvatron_jax.verify._memory_worker``.

It reads JSON lines, a ``ProbeSession`` and then one ``MemoryProbe`` after the other, and answers each probe with a
``MemoryReading``; the session too, with an empty one or the problem that stops all probes. One process for all of them,
since importing JAX and analysing a deep model take as long as compiling a probe. See ``_worker`` for ``JAX_PLATFORMS``.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import jax
import msgspec
from jax.experimental import topologies

from .._user_model import named_model
from ..analysis import Analysis, analyse_model, has_cudnn, shorten
from ..errors import GalvatronError
from ..profilers._memory_probe import MemoryProbe, MemoryReading, ProbeSession, kept_layers, probe_plan
from ..runtime import StagePrograms, plan_model, stage_mesh
from ..strategy import Strategy
from ._compile import CLONE, check_toolchain
from ._compiler import compile_lowered
from ._subject import stand_in_optimizer
from ._target import load_target


class Compiler:
    """Compiles the probes of one session."""

    def __init__(self, session: ProbeSession) -> None:
        """Describe the devices.

        Raises:
            GalvatronError: there is no compiler, no such target, or no such model.
        """
        check_toolchain()
        self._session = session
        fused = session.fused_attention and has_cudnn()
        self._model = named_model(session.model, seq=session.seq, dtype=session.dtype, fused_attention=fused)
        cluster = session.cluster
        self._devices = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"{cluster.nodes}x1x{cluster.gpus_per_node}",
            target_config=load_target(cluster.gpu),
        ).devices
        self._analysis = functools.cache(self._analysed)

    def read(self, probe: MemoryProbe) -> MemoryReading:
        """Return what the compiler says of a probe; whatever stops it is an answer too."""
        start = time.monotonic()
        try:
            compiled = self._compile(probe)
        except GalvatronError as error:
            return MemoryReading(probe=probe, problem=error.problem)
        except Exception as error:  # XLA and JAX may refuse any program; the next one may compile
            return MemoryReading(probe=probe, problem=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        memory = compiled.memory_analysis()
        assert memory is not None, "XLA:GPU analyses memory"
        return MemoryReading(
            probe=probe,
            peak_bytes=memory.peak_memory_in_bytes,
            rematerialised=len(CLONE.findall(compiled.as_text() or "")),
            seconds=round(time.monotonic() - start, 1),
        )

    def _compile(self, probe: MemoryProbe) -> jax.stages.Compiled:
        whole = self._analysis(probe.samples * probe.strategy.dp)
        plan = probe_plan(whole.profile, probe, self._session)
        analysis = shorten(whole, kept_layers(whole.profile, probe))
        planned = plan_model(analysis, plan, stage_mesh(plan.cluster, self._devices))
        programs = StagePrograms(planned, stand_in_optimizer(plan), plan.microbatches)
        leading = (plan.microbatches,) if plan.microbatches > 1 else ()
        leaves = jax.tree.leaves(analysis.trace.batch)
        batch = [jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype) for leaf in leaves]
        train: Any = programs.train  # a jitted function: ``Callable`` hides ``lower``
        return compile_lowered(train.lower(programs.abstract_state, batch), {})[0]

    def _analysed(self, microbatch: int) -> Analysis:
        subject = self._model.resized(microbatch)
        return analyse_model(subject.model, subject.loss, subject.batch, name="probed")


def serve(lines: IO[str], answer: Callable[[MemoryReading], None]) -> None:
    """Answer a session and its probes until there are no more."""
    nothing = MemoryProbe(layers=0, strategy=Strategy(), samples=1)
    try:
        compiler = Compiler(msgspec.json.decode(lines.readline(), type=ProbeSession))
    except GalvatronError as error:
        answer(MemoryReading(probe=nothing, problem=error.message))
        return
    answer(MemoryReading(probe=nothing))
    for line in lines:
        answer(compiler.read(msgspec.json.decode(line, type=MemoryProbe)))


def main() -> None:
    """Serve on standard input and output; what libraries print goes to standard error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reading: MemoryReading) -> None:
        output.write(msgspec.json.encode(reading).decode() + "\n")
        output.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    assert os.environ.get("JAX_PLATFORMS") == "cpu", "see the module docstring of _worker"
    main()
