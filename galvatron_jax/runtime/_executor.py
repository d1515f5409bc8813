"""Runs the events of a step on the devices of this process.

Python only dispatches: programs and transfers run when their inputs are there, and nothing here waits for a device.
What a microbatch needs is dropped at its last use, so a slice holds what its schedule promises and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._events import Compute, Event, Phase, Transfer
from ._guard import StepMetrics
from ._passes import Kept
from ._pipeline_stage import Gradients, StageState
from ._pipeline_state import States
from ._placing import is_here
from ._planned_pipeline import PlannedPipeline
from ._turns import in_turn
from ._wiring import Wiring

Arrays = list[Any]

Batch = list[Mapping[int, Any]]
"""By device slice: leaves of the batch by position, microbatches along dimension 0 (none on slices of others)."""


class Executor:
    """A pipeline's stages, their connections and the order of a step."""

    def __init__(self, planned: PlannedPipeline, wiring: Wiring) -> None:
        """Keep what concerns this process.

        Args:
            planned: All stages, in layer order, and the order of a step.
            wiring: All connections.

        Raises:
            PlanError: the order of the schedule can never finish.
        """
        self.stages, self.slices, self.wiring = list(planned.stages), len(planned.slices), wiring
        self.local = [is_here(stage.model.mesh.replicated) for stage in self.stages]
        self.training = [event for event in planned.training if self._concerns(event)]
        self.evaluation = [event for event in planned.evaluation if self._concerns(event)]
        self._lengths = planned.export_lengths
        self._exports = [stage.exports(planned.known) for stage in self.stages]
        self._updates = [stage.update(planned.known) for stage in self.stages]
        self._ties = [tie for stage in self.stages for tie in stage.owned_ties]
        count = self.stages[0].passes.microbatches
        self._numbers: list[Arrays | None] = [self._microbatch_numbers(s, count) for s in range(self.slices)]

    # ---------------------------------------------------------------------------------------------------------- steps
    def train(self, states: States, batch: Batch) -> tuple[States, StepMetrics]:
        """Take a step; return the new states and the metrics as they are on this process's devices."""
        flight = Flight(self, states, batch)
        for _ in flight.run(self.training):
            pass
        return self._finish(states, flight)

    def evaluate(self, states: States, batch: Batch) -> jax.Array:
        """Return the mean loss of a batch."""
        flight = Flight(self, states, batch)
        for _ in flight.run(self.evaluation, evaluate=True):
            pass
        vectors = [
            None if total is None else jnp.reshape(total / stage.passes.microbatches, (1, 1))
            for stage, total in zip(self.stages, flight.losses, strict=True)
        ]
        last = len(self.stages) - 1
        gathered = next(g for g in self.wiring.exchange.gather(vectors) if g is not None)
        loss: jax.Array = gathered[last // self.slices][last % self.slices, 0]
        return loss

    def _finish(self, states: States, flight: Flight) -> tuple[States, StepMetrics]:
        """From gradient sums to new states."""
        gradients = [in_turn(flight.take_means(k)) if local else None for k, local in enumerate(self.local)]
        tied = self._collect_tied(gradients)
        vectors: list[list[list[Any]] | None] = [[] if self.local[s] else None for s in range(self.slices)]
        for number in range(len(self._lengths)):
            given = [self._export(k, number, gradients[k], tied[k], states[k], vectors) for k in range(len(states))]
            for seen, gathered in zip(vectors, self.wiring.exchange.gather(given), strict=True):
                if seen is not None and gathered is not None:
                    seen.append(gathered)
        new: States = [None] * len(states)
        metrics: StepMetrics | None = None
        sent: list[Arrays] = [[] for _ in states]
        for k, state in enumerate(states):
            if state is not None:
                inputs = (gradients[k], tied[k], state, flight.model_states[k], vectors[k % self.slices])
                new[k], metrics, sent[k] = in_turn(self._updates[k](*inputs))
        self._send_tied(sent, new)
        assert metrics is not None, "every process has a device of some stage"
        return new, metrics

    def _export(
        self,
        k: int,
        number: int,
        gradients: Gradients | None,
        tied: Arrays,
        state: StageState | None,
        vectors: Sequence[list[list[Any]] | None],
    ) -> Any:
        if state is None:
            return None
        length = self._lengths[number][k // self.slices]
        return in_turn(self._exports[k](gradients, tied, state, vectors[k % self.slices], length))

    def _collect_tied(self, gradients: Sequence[Gradients | None]) -> list[Arrays]:
        """Send gradients of mirrored parameters to their owners; return what arrived, by stage."""
        arrived: list[Arrays] = [[] for _ in self.stages]
        for tie in self._ties:
            if self.local[tie.mirror] or self.local[tie.owner]:
                found = gradients[tie.mirror]
                sent = self.wiring.tied_gradients[tie].send(None if found is None else [found.slots[tie.mirror_slot]])
                arrived[tie.owner] += sent or []
        return arrived

    def _send_tied(self, sent: Sequence[Arrays], states: States) -> None:
        """Send new weights to the stages that mirror them, and put them into their states."""
        position = [0] * len(self.stages)
        for tie in self._ties:
            if self.local[tie.mirror] or self.local[tie.owner]:
                made = [sent[tie.owner][position[tie.owner]]] if self.local[tie.owner] else None
                position[tie.owner] += 1
                arrived, state = self.wiring.tied_weights[tie].send(made), states[tie.mirror]
                if arrived is not None and state is not None:
                    weights = [*state.parameters]
                    weights[tie.mirror_slot] = arrived[0]
                    states[tie.mirror] = state._replace(parameters=weights)

    # --------------------------------------------------------------------------------------------------------- pieces
    def numbers(self, stage: int) -> Arrays:
        """Return the microbatch numbers as scalars on the devices of a stage."""
        numbers = self._numbers[stage % self.slices]
        assert numbers is not None, "only stages of this process are run"
        return numbers

    def _concerns(self, event: Event) -> bool:
        if isinstance(event, Compute):
            return self.local[event.stage]
        return self.local[event.source] or self.local[event.target]

    def _microbatch_numbers(self, slice_: int, count: int) -> Arrays | None:
        place = self.stages[slice_].model.mesh.replicated
        if not is_here(place):
            return None
        numbers = jax.jit(lambda: [jnp.int32(m) for m in range(count)], out_shardings=place)()
        return list(numbers)


class Flight:
    """What the microbatches of one step hold on this process's devices."""

    def __init__(self, executor: Executor, states: States, batch: Batch) -> None:
        """Begin a step."""
        self._executor, self._states = executor, states
        self._batch: list[Arrays] = [
            [batch[k % executor.slices][i] for i in s.model.share.batch] if executor.local[k] else []
            for k, s in enumerate(executor.stages)
        ]
        fresh = [
            in_turn(s.passes.begin()) if here else (None, None)
            for s, here in zip(executor.stages, executor.local, strict=True)
        ]
        self.sums: list[Any] = [sums for sums, _ in fresh]
        """Gradient sums by stage."""
        self.losses: list[Any] = [loss for _, loss in fresh]
        """Loss sums by stage."""
        self.model_states: list[Any] = [None if state is None else state.model_state for state in states]
        """Model state by stage, as the last microbatch left it."""
        self.kept: dict[tuple[int, int], Kept] = {}
        """By (stage, microbatch): between forward and backward pass."""
        self._made: dict[tuple[int, Phase, int], Arrays] = {}
        """To be sent, by (stage that made it, phase, microbatch)."""
        self._arrived: dict[tuple[int, Phase, int], Arrays] = {}
        """To be used, by (stage that got it, phase, microbatch)."""

    def run(self, events: Sequence[Event], *, evaluate: bool = False) -> Iterator[Event]:
        """Run events; yield each one when it is dispatched."""
        for event in events:
            if isinstance(event, Transfer):
                self._transfer(event)
            elif evaluate:
                self._evaluate(event.stage, event.microbatch)
            elif event.phase == "forward":
                self._forward(event.stage, event.microbatch)
            else:
                self._backward(event.stage, event.microbatch)
            in_turn((self._made, self._arrived, self.kept, self.sums, self.losses))
            yield event

    def take_means(self, stage: int) -> Gradients:
        """Return the mean gradients of a stage; its sums are given away, so that none outlives them."""
        sums, self.sums[stage] = self.sums[stage], None
        means: Gradients = self._executor.stages[stage].gradients(self.losses[stage], *sums)
        return means

    def _transfer(self, transfer: Transfer) -> None:
        source, target, phase, m = transfer
        made = self._made.pop((source, phase, m), None)
        arrived = self._executor.wiring.boundaries[source, phase].send(made)
        if arrived is not None:
            self._arrived[target, phase, m] = arrived

    def _forward(self, stage: int, m: int) -> None:
        arriving = self._arrived.pop((stage, "forward", m), [])
        passes, state = self._executor.stages[stage].passes, self.model_states[stage]
        leaving, new_state, residuals, self.losses[stage] = passes.forward(
            self._weights(stage),
            self._batch[stage],
            self._executor.numbers(stage)[m],
            state,
            arriving,
            self.losses[stage],
        )
        self.kept[stage, m] = passes.kept(residuals, state, arriving)
        self.model_states[stage] = new_state
        self._made[stage, "forward", m] = leaving

    def _backward(self, stage: int, m: int) -> None:
        cotangents = self._arrived.pop((stage, "backward", m), [])
        kept = self.kept.pop((stage, m))
        self.sums[stage], self._made[stage, "backward", m] = self._executor.stages[stage].passes.backward(
            self._weights(stage),
            self._batch[stage],
            self._executor.numbers(stage)[m],
            kept,
            cotangents,
            self.sums[stage],
        )

    def _evaluate(self, stage: int, m: int) -> None:
        arriving = self._arrived.pop((stage, "forward", m), [])
        self._made[stage, "forward", m], self.losses[stage] = self._executor.stages[stage].passes.evaluate(
            self._weights(stage),
            self._batch[stage],
            self._executor.numbers(stage)[m],
            self.model_states[stage],
            arriving,
            self.losses[stage],
        )

    def _weights(self, stage: int) -> Arrays:
        state = self._states[stage]
        assert state is not None, "only stages of this process are run"
        return state.parameters
