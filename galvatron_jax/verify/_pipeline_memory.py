"""The memory peak of a pipeline: what lives between programs, and what the running one adds.

A program of a stage is compiled by itself and sees its own arguments only. What else its devices hold follows from the
order of the step, so the step is walked through, event by event, as the executor runs it (``runtime._executor``):

    held    parameters, optimizer, model state (of the step before and of this one), the batch
            gradients     sums over microbatches, then means
            residuals     of every microbatch between its forward and its backward pass
            boundary      messages that arrived and wait, or were made and leave
    live    what a program adds to its arguments while it runs: peak - arguments

    peak = max over all calls of (held before the call + live of the program)

Arguments are held, so they count once; an output that takes the place of a donated argument is no addition
(``CompiledMemory``). GPUs run programs in the order in which they are given, and their allocator reuses memory in that
order, so a device never holds more than this. Left out: counters, and tied weights on their way to the stage that
mirrors them, after the last update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from ..runtime import Compute, Transfer
from ._exchange import CompiledMemory, StageMemory


class StageBytes(NamedTuple):
    """Bytes on one device of what a stage's programs hand to each other."""

    parameters: int
    optimizer: int
    model_state: int
    sums: int
    """Sums of gradients."""
    means: int
    """Mean gradients, those that arrive from mirrors among them."""
    residuals: int
    """Of one microbatch: made by its forward pass, or referred to."""
    arriving: int
    leaving: int
    """One message, forward."""
    cotangents: int
    """Of the leaving message."""
    returned: int
    """Cotangents of the arriving message."""


Programs = Mapping[str, CompiledMemory]
"""Of one stage, by the name of the call."""


def pipeline_memory(
    events: Iterable[Compute | Transfer],
    stages: Sequence[StageBytes],
    programs: Sequence[Programs],
    batches: Sequence[int],
) -> list[StageMemory]:
    """Return the peak of every device slice over a train step.

    Args:
        events: The global order of the passes.
        stages: Bytes by stage.
        programs: Compiled programs by stage: ``forward``, ``backward``, ``gradients``, ``update`` and any others, which
            run between these two.
        batches: Bytes of the batch by slice.
    """
    slices = begin_step(stages, batches)
    for event in events:
        if isinstance(event, Compute):
            here = slices[event.stage % len(slices)]
            here.run(programs[event.stage][event.phase], event.stage, event.phase, event.microbatch)
        go_on(slices, stages, event)
    for k, stage in enumerate(stages):
        slices[k % len(slices)].run(programs[k]["gradients"], k, "gradients")
        slices[k % len(slices)].held["gradients"] += stage.means - stage.sums
    for call in [*(name for name in programs[0] if name.startswith("exports")), "update"]:
        for k in range(len(stages)):
            slices[k % len(slices)].run(programs[k][call], k, call)
    return [here.peak for here in slices]


def begin_step(stages: Sequence[StageBytes], batches: Sequence[int]) -> list[DeviceSlice]:
    """Return every slice as it is before the first event."""
    slices = [DeviceSlice(batch) for batch in batches]
    for k, stage in enumerate(stages):
        slices[k % len(slices)].held.update(
            parameters=stage.parameters,
            optimizer=stage.optimizer,
            model_state=2 * stage.model_state,
            gradients=stage.sums,
        )
    return slices


def go_on(slices: Sequence[DeviceSlice], stages: Sequence[StageBytes], event: Compute | Transfer) -> None:
    """Change what is held as an event does."""
    if isinstance(event, Transfer):
        size = stages[event.source].leaving if event.phase == "forward" else stages[event.source].returned
        slices[event.source % len(slices)].held["boundary"] -= size
        slices[event.target % len(slices)].held["boundary"] += size
        return
    stage, held = stages[event.stage], slices[event.stage % len(slices)].held
    if event.phase == "forward":
        held["residuals"] += stage.residuals
        held["boundary"] += stage.leaving - stage.arriving
    else:
        held["residuals"] -= stage.residuals
        held["boundary"] += stage.returned - stage.cotangents


class DeviceSlice:
    """The devices of one slice, in a step."""

    def __init__(self, batch: int) -> None:
        """Begin with the batch."""
        self.held: Counter[str] = Counter(batch=batch)
        """Bytes by category between two events."""
        self.peak = StageMemory(peak=0, allocated=0, categories={})
        """The fullest moment so far."""

    def run(self, program: CompiledMemory, stage: int, call: str, microbatch: int | None = None) -> None:
        """Take note of the memory while a program runs."""
        held, live = self.held.total(), max(0, program.peak - program.arguments)
        allocated = max(self.peak.allocated, held + program.allocated - program.arguments)
        if held + live > self.peak.peak:
            categories = {name: size for name, size in {**self.held, "live": live}.items() if size}
            self.peak = StageMemory(
                peak=held + live,
                allocated=allocated,
                categories=categories,
                stage=stage,
                call=call,
                microbatch=microbatch,
            )
        elif allocated > self.peak.allocated:
            self.peak = msgspec.structs.replace(self.peak, allocated=allocated)
