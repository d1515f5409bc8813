"""What a run tells: a line every few steps (a live table on a terminal), every step to the trackers."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from ..plan import Plan
from ..units import format_count, format_gib, format_seconds
from ._trackers import Tracker


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished step."""

    step: int
    batch: int
    """Number of its batch."""
    loss: float
    gradient_norm: float
    learning_rate: float
    finite: bool
    step_time_s: float
    """From the end of the step before to the end of this one, as the host sees them: where a call returns only when the
    step is done (CPU), a step's time may stand with its neighbour. Means and medians are right."""
    data_wait_s: float
    compiled: bool
    """The step was compiled in this time: it says nothing about speed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The figures of one line."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float | None
    devices: int
    mfu: float | None
    peak_bytes: int | None
    predicted_peak_bytes: int | None
    step_time_s: float | None
    predicted_step_time_s: float | None
    left_s: float | None

    def cells(self) -> dict[str, str]:
        """Return the figures as text, by heading."""
        tokens = self.tokens_per_s
        return {
            "step": f"{self.step}/{self.steps}",
            "loss": f"{self.loss:.4f}",
            "grad": f"{self.gradient_norm:.3g}",
            "lr": f"{self.learning_rate:.2e}",
            "tokens/s": format_count(tokens) if tokens else "-",
            "per device": format_count(tokens / self.devices) if tokens else "-",
            "MFU": f"{self.mfu:.1%}" if self.mfu else "-",
            "memory": _beside(self.peak_bytes, self.predicted_peak_bytes, format_gib),
            "s/step": _beside(self.step_time_s, self.predicted_step_time_s, format_seconds),
            "left": str(datetime.timedelta(seconds=round(self.left_s))) if self.left_s is not None else "-",
        }


LEAST_STEPS = 5
"""Of which the mean is shown."""
LEFT_OUT = ((122, ("lr", "per device")), (98, ("lr", "per device", "memory")))
"""What the live table leaves out on terminals of fewer columns: lines that wrap cannot be read."""

HEADINGS = ("step", "loss", "grad", "lr", "tokens/s", "per device", "MFU", "memory", "s/step", "left")
WIDTHS = (11, 8, 8, 9, 9, 10, 6, 19, 21, 9)


class Reporter:
    """Tells the user and the trackers about every step; only rank 0's is not silent."""

    def __init__(
        self,
        plan: Plan,
        *,
        steps: int,
        every: int,
        devices: int,
        trackers: Sequence[Tracker],
        out: TextIO | None = None,
    ) -> None:
        """Begin a table.

        Args:
            plan: Its prediction stands beside what is measured.
            steps: Of the whole run.
            every: Steps between two lines.
            devices: In all.
            trackers: Take every step.
            out: Where lines go; None: nowhere.
        """
        self._plan, self._steps, self._every, self._devices = plan, steps, every, devices
        self._trackers, self._out = trackers, out
        self._table = _LiveTable() if out is not None and out is sys.stdout and out.isatty() else None
        self._since: list[StepRecord] = []
        self._headed = False
        self.step_times_s: list[float] = []
        """Of all steps but those that compiled."""

    def record(self, record: StepRecord, *, peak_bytes: int | None) -> None:
        """Take a step; print a line when it is time."""
        self._since.append(record)
        if not record.compiled:
            self.step_times_s.append(record.step_time_s)
        metrics = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "step"}
        tokens = self._tokens / record.step_time_s
        extra = {"tokens_per_s": tokens, "mfu": self._mfu(record.step_time_s), "peak_bytes": peak_bytes}
        for tracker in self._trackers:
            tracker.track(record.step, {**metrics, **extra})
        if record.step % self._every == 0 or record.step == self._steps or self._since[0].compiled:
            self._print(self._line(record, peak_bytes))

    def note(self, step: int, **metrics: float | int | str | None) -> None:
        """Give the trackers something beside a step: an evaluation, a checkpoint, the goodput."""
        for tracker in self._trackers:
            tracker.track(step, metrics)

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self._table is not None:
            self._table.say(text)
        elif self._out is not None:
            print(text, file=self._out, flush=True)

    def flush(self) -> None:
        """Bring all metrics where they survive this process."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """End the table and the trackers."""
        if self._table is not None:
            self._table.close()
        for tracker in self._trackers:
            tracker.close()

    @property
    def median_step_time_s(self) -> float:
        """Median of the last hundred steps; NaN before there is one."""
        return statistics.median(self.step_times_s[-100:]) if self.step_times_s else math.nan

    @property
    def _tokens(self) -> int:
        return self._plan.global_batch * self._plan.model.seq

    def _mfu(self, step_time_s: float) -> float | None:
        """Measured MFU, from the predicted one: both have the same FLOPs and peak, only the time differs."""
        predicted = self._plan.predicted
        return predicted.mfu * predicted.step_time_s / step_time_s if predicted and predicted.mfu else None

    def _line(self, record: StepRecord, peak_bytes: int | None) -> Line:
        fresh = sum(not r.compiled for r in self._since)
        times = self.step_times_s[-max(fresh, LEAST_STEPS) :] if fresh else []
        self._since = []
        step_s = statistics.fmean(times) if times else None
        predicted = self._plan.predicted
        usual_s = self.median_step_time_s
        return Line(
            step=record.step,
            steps=self._steps,
            loss=record.loss,
            gradient_norm=record.gradient_norm,
            learning_rate=record.learning_rate,
            tokens_per_s=self._tokens / step_s if step_s else None,
            devices=self._devices,
            mfu=self._mfu(step_s) if step_s else None,
            peak_bytes=peak_bytes,
            predicted_peak_bytes=max(s.peak_bytes for s in predicted.stages) if predicted else None,
            step_time_s=step_s,
            predicted_step_time_s=predicted.step_time_s if predicted else None,
            left_s=(self._steps - record.step) * usual_s if math.isfinite(usual_s) else None,
        )

    def _print(self, line: Line) -> None:
        cells = line.cells()
        if self._table is not None:
            self._table.show(cells)
            return
        if self._out is None:
            return
        if not self._headed:
            print(_row({heading: _head(heading) for heading in HEADINGS}), file=self._out)
            self._headed = True
        print(_row(cells), file=self._out, flush=True)


class _LiveTable:
    """One table that is drawn again in place."""

    ROWS = 8

    def __init__(self) -> None:
        from rich.live import Live

        self._rows: list[dict[str, str]] = []
        self._live: Any = Live(self._draw(), refresh_per_second=4)
        self._live.start()

    def show(self, cells: dict[str, str]) -> None:
        self._rows = [*self._rows[1 - self.ROWS :], cells]
        self._live.update(self._draw())

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _draw(self) -> Any:
        return live_table(self._rows, shutil.get_terminal_size().columns)


def live_table(rows: Sequence[dict[str, str]], columns: int) -> Any:
    """Return the table (of ``rich``) of some lines' cells for a terminal of so many columns."""
    from rich.table import Table

    left_out = {name for least, names in LEFT_OUT if columns < least for name in names}
    headings = [heading for heading in HEADINGS if heading not in left_out]
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(_head(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    return table


def _head(heading: str) -> str:
    """Return the heading of a column; what is predicted stands in brackets."""
    return f"{heading} (plan)" if heading in ("memory", "s/step") else heading


def _row(cells: dict[str, str]) -> str:
    return " ".join(f"{cells[heading]:>{width}}" for heading, width in zip(HEADINGS, WIDTHS, strict=True))


def _beside(measured: float | None, predicted: float | None, form: Any) -> str:
    text = form(measured) if measured is not None else "-"
    return f"{text} ({form(predicted)})" if predicted is not None else text
