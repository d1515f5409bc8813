"""Trackers: where metrics go. JSON lines always, TensorBoard and Weights & Biases when asked for (extras)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from ._config import LogConfig

METRICS_NAME = "metrics.jsonl"

Metrics = Mapping[str, float | int | str | None]


class Tracker(Protocol):
    """Takes metrics."""

    def track(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step; may be buffered until ``flush``."""

    def flush(self) -> None:
        """Bring everything where it survives this process."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """One JSON object per line, flushed to the operating system at once: it survives a killed process."""

    def __init__(self, path: Path) -> None:
        """Append to ``path``; the half line of a killed process is ended first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def track(self, step: int, metrics: Metrics) -> None:
        """See ``Tracker``."""
        self._file.write(json.dumps({"step": step, **{k: _plain(v) for k, v in metrics.items()}}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """See ``Tracker``."""
        self._file.flush()

    def close(self) -> None:
        """See ``Tracker``."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Open a writer.

        Raises:
            ConfigError: the extra is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        # Two starts within a second would write one file, and the second would wipe out the first.
        self._writer: Any = SummaryWriter(str(folder), filename_suffix=f".{time.time_ns()}")

    def track(self, step: int, metrics: Metrics) -> None:
        """See ``Tracker``."""
        for name, value in _numbers(metrics):
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See ``Tracker``."""
        self._writer.flush()

    def close(self) -> None:
        """See ``Tracker``."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, known by the path of its folder; a resumed one goes on in the same run."""

    def __init__(self, project: str, folder: Path) -> None:
        """Start or resume the run of ``folder``.

        Raises:
            ConfigError: the extra is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        # Folders of equal names are other runs, and W&B refuses many characters in an id.
        own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(project=project, name=folder.name, id=own, dir=str(folder), resume="allow")
        # W&B's own steps only grow, and it drops what a run says that went back to a checkpoint; ours are a metric.
        self._run.define_metric("*", step_metric="step")

    def track(self, step: int, metrics: Metrics) -> None:
        """See ``Tracker``."""
        self._run.log({"step": step, **dict(_numbers(metrics))})

    def flush(self) -> None:
        """See ``Tracker``."""

    def close(self) -> None:
        """See ``Tracker``."""
        self._run.finish()


def open_trackers(config: LogConfig, folder: Path) -> list[Tracker]:
    """Return the trackers that ``config`` asks for.

    Raises:
        ConfigError: one needs an extra that is not installed.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if config.wandb:
        trackers.append(WeightsAndBiases(config.wandb, folder))
    return [JsonLines(folder / METRICS_NAME), *trackers]


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics in order; what a killed process left half written is passed over."""
    path = folder / METRICS_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _numbers(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _plain(value: float | int | str | None) -> float | int | str | None:
    """JSON knows neither NaN nor infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _missing(extra: str, package: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed", where=f"[log] {extra}", action=f"pip install 'galvatron-jax[{extra}]'"
    )
