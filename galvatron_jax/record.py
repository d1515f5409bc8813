"""Run records: what a plan really took, beside what was predicted; the value that comes back to correct the profiles.

A record holds its plan whole, so it can be priced again by any later cost model, and every step time, so that a reader
can judge the median for himself. The reported step time is the median: a stray slow step (a checkpoint, a page fault, a
neighbour on the machine) moves it not at all, and the first steps (compilation, warming up) are not among them.
"""

from __future__ import annotations

import statistics
from typing import Annotated, ClassVar

import msgspec

from ._document import Bytes, Document, NonNegative, Positive, Value
from .measured import Provenance
from .plan import Plan

MFU_FORMULA = (
    "model FLOPs (products of forward and backward, causal attention counted half) / (step time x devices x peak)"
)
"""How ``RunRecord.mfu`` and ``Prediction.mfu`` are counted: no recomputation."""


class DeviceMemory(Value, frozen=True, kw_only=True):
    """Bytes of one device of this process."""

    device: Annotated[int, msgspec.Meta(ge=0)]
    peak_bytes: Bytes
    """Most that was in use since the process started, as the backend counts."""


class RunRecord(Document, frozen=True, kw_only=True):
    """What running one plan on real devices took."""

    DOCUMENT: ClassVar[str] = "run record"

    plan: Plan
    provenance: Provenance
    processes: Annotated[int, msgspec.Meta(ge=1)] = 1
    step_times_s: tuple[Positive, ...]
    """Every measured step, in order, each until all devices were done; the warm-up left out."""
    mfu: NonNegative
    """See ``MFU_FORMULA``; 0 when the peak is not known."""
    memory: tuple[DeviceMemory, ...] = ()
    """Of each device; empty where the backend does not tell (CPU)."""
    machine_load: NonNegative | None = None
    """Share of the machine that other processes took meanwhile, as far as known: beside others a clock lies."""
    compiler_options: dict[str, bool | int] = {}
    """What XLA was told for every program (``runtime.compiler_options``); empty on CPU, and where nobody wrote it."""
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a record without steps."""
        if not self.step_times_s:
            raise ValueError("step_times_s is empty")

    @property
    def step_time_s(self) -> float:
        """Median step time."""
        return statistics.median(self.step_times_s)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the step times, as a share of the median; 0 for one step."""
        if len(self.step_times_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.step_times_s, n=4, method="inclusive")
        return (high - low) / 2 / self.step_time_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all devices per second."""
        return self.plan.global_batch * self.plan.model.seq / self.step_time_s

    @property
    def peak_bytes(self) -> int | None:
        """Peak of the fullest device; None where the backend does not tell."""
        return max((device.peak_bytes for device in self.memory), default=None)

    @property
    def time_error(self) -> float | None:
        """Predicted over measured step time, less 1; None without a prediction."""
        predicted = self.plan.predicted
        return predicted.step_time_s / self.step_time_s - 1 if predicted else None
