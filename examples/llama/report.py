"""What the example prints: where it starts from, the plan in words, a line every few steps, the speed at the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from galvatron_jax import Plan
from galvatron_jax.units import format_count, format_gib, format_seconds

from .data import Corpus
from .options import Options


def describe_start(options: Options, corpus: Corpus, devices: str) -> str:
    """Return model, text and devices in a few lines.

    Args:
        options: The options.
        corpus: The text.
        devices: The devices in words.
    """
    config, windows = options.config, f"{len(corpus.train_NT)} windows of {options.seq + 1} bytes to train on"
    size = f"{config.layers} layers, {format_count(config.parameter_count)} parameters"
    origin = f"read from {options.plan_path}" if options.plan else "none given: searching one for these devices"
    return (
        f"model      {options.model}: {size}, computes in {config.dtype}\n"
        f"text       {corpus.files} files, bytes as tokens: {windows}, {len(corpus.held_out_NT)} held out\n"
        f"devices    {devices}\n"
        f"plan       {origin}; then the step is compiled, which takes a while ..."
    )


def describe_plan(plan: Plan) -> str:
    """Return the plan in a few lines: stages, and runs of layers with their strategy."""
    stages = f"{len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}"
    batch = f"batch {plan.global_batch} in {plan.microbatches} microbatch{'es' * (plan.microbatches > 1)}"
    lines = [f"plan       {plan.cluster.devices} devices ({plan.cluster.mesh}), {stages}, {batch}"]
    for number, stage in enumerate(plan.stages):
        if len(plan.stages) > 1:
            lines.append(f"  stage {number}, {stage.devices} devices")
        lines += [f"  {run.count:>3} x {run.kind:<12} {run.strategy}" for run in stage.runs]
    if plan.predicted:
        peak = max(stage.peak_bytes for stage in plan.predicted.stages)
        lines.append(
            f"predicted  {format_seconds(plan.predicted.step_time_s)} per step, peak {format_gib(peak)} per device"
        )
    return "\n".join(lines)


class StepLog:
    """Prints one line per call of ``record`` and remembers the step times."""

    def __init__(self, plan: Plan, *, tokens_per_step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Print the head of the table.

        Args:
            plan: Its prediction stands beside each measurement.
            tokens_per_step: Tokens of one global batch.
            clock: Seconds since some moment.
        """
        self._predicted = format_seconds(plan.predicted.step_time_s) if plan.predicted else "-"
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._step, self._time = 0, clock()
        self._step_times_s: list[float] = []
        print(f"{'step':>6} {'loss':>8} {'tokens/s':>10} {'s/step':>10} {'predicted':>10}")

    def record(self, step: int, loss: float) -> None:
        """Print the loss after ``step`` and the mean speed since the last call; the first call has no speed."""
        now = self._clock()
        speed, duration = "-", "-"
        if self._step:
            step_time_s = (now - self._time) / (step - self._step)
            self._step_times_s += [step_time_s] * (step - self._step)
            speed, duration = format_count(self._tokens_per_step / step_time_s), format_seconds(step_time_s)
        print(f"{step:>6} {loss:>8.4f} {speed:>10} {duration:>10} {self._predicted:>10}", flush=True)
        self._step, self._time = step, self._clock()

    @property
    def median_step_time_s(self) -> float:
        """Median over all steps but the first, which compiles; NaN when there are none."""
        times_s = sorted(self._step_times_s)
        return times_s[len(times_s) // 2] if times_s else float("nan")

    def summary(self) -> str:
        """One line: measured beside predicted."""
        if not self._step_times_s:
            return "speed      not measured: the only step compiled"
        median_s = self.median_step_time_s
        speed = format_count(self._tokens_per_step / median_s)
        return f"speed      {format_seconds(median_s)} per step measured, {self._predicted} predicted; {speed} tokens/s"
