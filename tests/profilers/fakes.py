"""A clock that tests turn, and programs that take exactly the time they are told to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from galvatron_jax.profilers._readings import Machine, Reading, Subject


class FakeClock:
    """Time stands still until a program moves it."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def today(self) -> str:
        return "2026-11-22"


@dataclasses.dataclass
class FakeProgram:
    """One call takes ``call_s + trips * trip_s`` and the next of ``delays_s`` (0 when there are no more)."""

    clock: FakeClock
    trip_s: float
    call_s: float = 0.0
    operations: int = 1
    glue: int = 0
    products: int = 0
    flops: float = 0.0
    delays_s: Iterable[float] = ()

    def __post_init__(self) -> None:
        self._delays: Iterator[float] = itertools.chain(self.delays_s, itertools.repeat(0.0))
        self.calls: list[int] = []

    def run(self, trips: int, /) -> None:
        self.calls.append(trips)
        self.clock.time_s += self.call_s + trips * self.trip_s + next(self._delays)

    def timer(self, trips: int) -> float:
        start_s = self.clock.now_s()
        self.run(trips)
        return self.clock.now_s() - start_s


def reading(seconds: float, what: str, **fields: object) -> Reading:
    """A steady reading; ``operations``, ``glue`` and ``products`` go to it, the other fields to its subject."""
    own = {key: fields.pop(key) for key in ("operations", "glue", "products", "spread") if key in fields}
    subject = Subject(what=what, **fields)  # type: ignore[arg-type]  # names checked by the struct itself
    return Reading(subject=subject, seconds=seconds, **{"spread": 0.0, **own})  # type: ignore[arg-type]


MACHINE = Machine(
    platform="gpu",
    device_kind="NVIDIA H200",
    devices=8,
    processes=1,
    mesh="1x8",
    jax_version="0.10.2",
    driver="570.86",
)
