"""Fold run records back into the profiles: which part of the model is off, and by how much.

Each record's plan is priced again with the profiles at hand. What is left between prediction and clock is explained by
three components, each a factor on the seconds of everything it stands for:

    compute          products and memory-bound kernels (measured layer passes too)
    inside a node    collectives and messages between devices of a node
    between nodes    the same across nodes

With x the logarithms of the factors, p_i(x) the step time that the cost model predicts for record i with the profiles
so scaled (the schedule is played again, overlap and all), and t_i the measured median, solve

    min over x   sum_i  huber(log p_i(x) - log t_i)  +  sum_c (x_c / PRIOR)^2

by Gauss-Newton with reweighting (Huber 1964). The prior keeps a component at what its own profiler said unless several
records agree that it is off: one record cannot tell compute from communication, and does not try (a component that
no record depends on stays where it is). Factors beyond ``MOST`` are refused: a profile that far off belongs to other
hardware, or the plan ran into something that the model does not know.

Guards: records of other devices are refused; unsteady ones, and those that ran beside other load, are left out by name;
what remains far off after the fit is named as an outlier (its weight in the fit is small).

Memory: where the backend counts peaks, the largest excess over the predicted peak is added to ``reserved_bytes``: the
next search keeps that much free. A lower peak changes nothing, since a budget must hold for every plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ..cost import estimate_plan
from ..errors import DocumentError
from ..profile import HardwareProfile, LayerKind, Link, ModelProfile
from ..record import RunRecord

COMPONENTS = ("compute", "inside a node", "between nodes")
PRIOR = 0.2
"""Standard deviation of a component's log factor before any record: profilers repeat within 20 % on a quiet machine."""
NOISE = 0.03
"""Of the logarithm of one record's step time."""
HUBER = 2.0
"""Residuals, in units of NOISE, beyond which a record's pull no longer grows."""
MOST = math.log(3.0)
UNSTEADY, LOADED = 0.1, 0.2
"""Spread of the steps, and share of the machine that others took, beyond which a record does not count."""
OUTLIER = 0.1
"""Relative error after the fit beyond which a record is named."""
_STEP = 1e-3
_ROUNDS = 12


class RecordFit(NamedTuple):
    """One record before and after."""

    name: str
    measured_s: float
    before_s: float
    after_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Profiles corrected by records."""

    model: ModelProfile
    hardware: HardwareProfile
    factors: dict[str, float]
    """By component: its seconds times this."""
    records: tuple[RecordFit, ...]
    notes: tuple[str, ...]


def calibrate(records: Sequence[RunRecord], model: ModelProfile, hardware: HardwareProfile) -> Calibration:
    """Return the profiles corrected by what runs took.

    Args:
        records: Of plans for ``model`` on devices of the kind of ``hardware``.
        model: The model's profile, measured or not.
        hardware: The hardware's profile.

    Raises:
        DocumentError: a record is of another device, or no record is fit to count.
        PlanError: a record's plan is for another model.
    """
    used, notes = _steady(records, hardware)
    measured = np.log([record.step_time_s for record in used])

    def predicted(x: np.ndarray) -> np.ndarray:
        scaled_model, scaled = scale_profiles(model, hardware, np.exp(x))
        return np.log([estimate_plan(record.plan, scaled_model, scaled).step_time_s for record in used])

    x = _fit(predicted, measured)
    before, after = np.exp(predicted(np.zeros(len(COMPONENTS)))), np.exp(predicted(x))
    fits = tuple(
        RecordFit(record_name(record), record.step_time_s, float(b), float(a))
        for record, b, a in zip(used, before, after, strict=True)
    )
    notes += [f"outlier: {f.name} is still {f.after_s / f.measured_s - 1:+.0%} off" for f in fits if _is_far(f)]
    new_model, new_hardware = scale_profiles(model, hardware, np.exp(x))
    excess = _memory_excess(used)
    if excess:
        notes.append(f"memory: peaks up to {excess} bytes above the prediction, kept free from now on")
    factors = {name: float(f) for name, f in zip(COMPONENTS, np.exp(x), strict=True)}
    how = ", ".join(f"{name} x {factor:.3f}" for name, factor in factors.items())
    new_hardware = msgspec.structs.replace(
        new_hardware,
        reserved_bytes=new_hardware.reserved_bytes + excess,
        sources={**new_hardware.sources, "calibration": f"{len(used)} run records: seconds of {how}"},
    )
    return Calibration(model=new_model, hardware=new_hardware, factors=factors, records=fits, notes=tuple(notes))


def scale_profiles(
    model: ModelProfile, hardware: HardwareProfile, factors: Sequence[float] | np.ndarray
) -> tuple[ModelProfile, HardwareProfile]:
    """Return both profiles with the seconds of each component (``COMPONENTS``) times its factor."""
    compute, inside, between = (float(f) for f in factors)
    tables = tuple(
        msgspec.structs.replace(t, times_s=tuple(s * (inside if t.inside_node else between) for s in t.times_s))
        for t in hardware.collectives
    )
    scaled = msgspec.structs.replace(
        hardware,
        matmul_flops_per_s={dtype: rate / compute for dtype, rate in hardware.matmul_flops_per_s.items()},
        memory_bandwidth_bytes_per_s=hardware.memory_bandwidth_bytes_per_s / compute,
        kernel_launch_s=hardware.kernel_launch_s * compute,
        intra_node=_scaled_link(hardware.intra_node, inside),
        inter_node=_scaled_link(hardware.inter_node, between),
        collectives=tables,
    )
    kinds = tuple(_scaled_kind(kind, compute) for kind in model.kinds)
    return msgspec.structs.replace(model, kinds=kinds), scaled


def record_name(record: RunRecord) -> str:
    """Return a few words that tell a record's plan from others."""
    plan = record.plan
    runs = {str(run.strategy) for stage in plan.stages for run in stage.runs}
    depth = f"{len(plan.stages)} stages, " if len(plan.stages) > 1 else ""
    return f"{depth}{' / '.join(sorted(runs))}, batch {plan.global_batch} in {plan.microbatches}"


def _fit(predicted, measured: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Gauss-Newton on the logarithms; the factors' prior is a row of its own for each."""
    x = np.zeros(len(COMPONENTS))
    for _ in range(_ROUNDS):
        base = predicted(x)
        columns = [(predicted(x + _STEP * unit) - base) / _STEP for unit in np.eye(len(x))]
        residual = (measured - base) / NOISE
        weight = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12)))
        rows = np.vstack([weight[:, None] * np.stack(columns, axis=1) / NOISE, np.eye(len(x)) / PRIOR])
        change = np.linalg.lstsq(rows, np.concatenate([weight * residual, -x / PRIOR]), rcond=None)[0]
        x = np.clip(x + change, -MOST, MOST)
        if np.max(np.abs(change)) < _STEP:
            break
    if np.max(np.abs(x)) >= MOST:
        worst = COMPONENTS[int(np.argmax(np.abs(x)))]
        raise DocumentError(
            f"the records would scale {worst} by more than {math.exp(MOST):.0f}",
            where="calibrate",
            action="measure the hardware and the model where they ran, or leave these records out",
        )
    return x


def _steady(records: Sequence[RunRecord], hardware: HardwareProfile) -> tuple[list[RunRecord], list[str]]:
    used, notes = [], []
    for record in records:
        if record.provenance.device != hardware.device:
            raise DocumentError(
                f"a record is of {record.provenance.device} ({record.provenance.device_kind})",
                expected=f"records of {hardware.device}",
                where=record_name(record),
                action="calibrate each kind of device on its own",
            )
        if record.spread > UNSTEADY:
            notes.append(f"left out: {record_name(record)}: its steps spread by {record.spread:.0%}")
        elif (record.machine_load or 0.0) > LOADED:
            notes.append(f"left out: {record_name(record)}: others took {record.machine_load:.0%} of the machine")
        else:
            used.append(record)
    if not used:
        raise DocumentError("no record is fit to count", where="calibrate", action="; ".join(notes) or "name some")
    return used, notes


def _memory_excess(records: Sequence[RunRecord]) -> int:
    excess = [
        record.peak_bytes - max(stage.peak_bytes for stage in record.plan.predicted.stages)
        for record in records
        if record.peak_bytes is not None and record.plan.predicted is not None
    ]
    return max([0, *excess])


def _is_far(fit: RecordFit) -> bool:
    return abs(fit.after_s / fit.measured_s - 1) > OUTLIER


def _scaled_link(link: Link, factor: float) -> Link:
    return Link(bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / factor, latency_s=link.latency_s * factor)


def _scaled_kind(kind: LayerKind, factor: float) -> LayerKind:
    if kind.measured is None:
        return kind
    passes = tuple(
        msgspec.structs.replace(table, times_s=tuple(s * factor for s in table.times_s))
        for table in kind.measured.passes
    )
    return msgspec.structs.replace(kind, measured=msgspec.structs.replace(kind.measured, passes=passes))
