"""Plans that run in several processes, in groups that share the start of their processes."""

from __future__ import annotations

import dataclasses

from tests.runtime.pipeline.planned import Case


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one run."""

    processes: int
    devices: int
    """Of each process."""
    cases: dict[str, Case]


GROUPS = {
    "two processes": Group(
        processes=2,
        devices=4,
        cases={
            "one stage over both": Case("d.3 t2 d.1 s4 t2r d", microbatches=2, nodes=2),
            "a stage in each": Case("d.3 t2 s4 | d d.1r t2", nodes=2),
            "two stages in each": Case("t2 t2 | d.3 | d | s2 d", nodes=2, optimizer="adamw"),
            "tied embedding": Case("d.3 t2 d | t2.1 d t4", model="llama, tied", nodes=2),
            "encoder and decoder, interleaved": Case(
                "d t2 | d.1 d | t4 | d.3 s2",
                model="t5",
                schedule="interleaved-1f1b",
                chunks=2,
                microbatches=2,
                nodes=2,
            ),
        },
    ),
    "four processes": Group(
        processes=4,
        devices=2,
        cases={
            "one stage over all": Case("d.3 t2 d.1 s2 t2 d", microbatches=2, nodes=4),
            "a stage in each": Case("t2 t2 | d.3 | d.1r | s2 d", microbatches=8, nodes=4),
            "stages over two each": Case("d.3 t2 d.1 | d t2.1r d", schedule="gpipe", nodes=4),
            "encoder and decoder": Case("d t2 | d.1 d | t2r | d.3 d", model="t5", nodes=4, microbatches=2),
        },
    ),
}
