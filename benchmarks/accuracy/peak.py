"""What is alive at the memory peak of a compiled plan, buffer by buffer, and what the estimate says.

    python -m benchmarks.accuracy.peak PLAN-NAME [--keep FOLDER] [--rows N]     # compiles: needs the extra [verify]
    python -m benchmarks.accuracy.peak PLAN-NAME --dump FOLDER                  # reads what --keep left

XLA's own list of what is alive at the peak takes every value of a buffer that is updated in place for one of its own.
Here buffers are counted by their place: values alive at a moment (``*live-range.txt``) cover ranges of their allocation
(``*buffer-assignment.txt``), and the peak is the moment at which most bytes are covered.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: here it only traces

import msgspec

from galvatron_jax.cost import estimate_plan
from galvatron_jax.hardware import load_hardware
from galvatron_jax.units import GIB
from galvatron_jax.verify._exchange import CompileRequest, dump_folder
from galvatron_jax.verify._peak import layer_of, role_of
from galvatron_jax.verify._target import load_target
from galvatron_jax.verify._worker import compile_request

from .compile import record_path
from .plans import Case, all_cases, asks_for_kernels, plan_of, profile_of

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*)")
_VALUE = re.compile(r"^ value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_RANGE = re.compile(r"^\s+(\S+):(\d+)-(\d+)\s*$")
_SCHEDULED = re.compile(r"^\s+(\d+):(\S+)\s*$")
_NAMED = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*op_name="((?:[^"\\]|\\.)*)"')


class Buffer(NamedTuple):
    """One value in its place, alive from moment ``start`` to ``stop``."""

    value: str
    shape: str
    allocation: int
    offset: int
    bytes: int
    start: int
    stop: int


class Alive(NamedTuple):
    """A place that is taken at the peak, under the name of one of the values in it."""

    bytes: int
    role: str
    layer: str
    shape: str
    value: str
    op_name: str


class Peak(NamedTuple):
    """The moment at which most bytes are taken."""

    moment: str
    """The instruction that runs."""
    bytes: int
    alive: tuple[Alive, ...]
    """Largest first."""


def read_buffers(folder: Path) -> tuple[list[Buffer], list[str]]:
    """Return all buffers of a dumped train step, and its instructions in the order of the schedule."""
    ranges: dict[str, tuple[int, int]] = {}
    schedule: list[str] = []
    for line in _file(folder, "live-range.txt").read_text().splitlines():
        if match := _SCHEDULED.match(line):
            schedule.append(match[2])
        elif match := _RANGE.match(line):
            ranges[match[1].removesuffix("{}")] = int(match[2]), int(match[3])
        elif line.startswith("  Live ranges at"):
            break
    return list(_placed(_file(folder, "buffer-assignment.txt").read_text(), ranges, len(schedule))), schedule


def _placed(text: str, ranges: dict[str, tuple[int, int]], end: int) -> Iterator[Buffer]:
    allocation, lasting = -1, False
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            allocation, lasting = int(match[1]), "preallocated-temp" not in match[3]
            if lasting and "constant" not in match[3] and "thread-local" not in match[3]:
                yield Buffer(f"allocation {allocation}", "", allocation, 0, int(match[2]), 0, end)
        elif match := _VALUE.match(line):
            start, stop = (0, end) if lasting else ranges.get(match[1].removesuffix("{}"), (-1, -1))
            yield Buffer(match[1], match[4], allocation, int(match[3]), int(match[2]), start, stop)


def find_peak(folder: Path, layers: Iterable[str]) -> Peak:
    """Return what is alive at the peak of the program that was dumped into ``folder``."""
    buffers, schedule = read_buffers(folder)
    moment = max(range(len(schedule)), key=lambda t: _covered(b for b in buffers if b.start <= t <= b.stop))
    lines = _file(folder, "optimizations.txt").read_text().splitlines()
    names = {match[1]: match[2] for match in map(_NAMED.match, lines) if match}
    known, alive = set(layers), list[Alive]()
    for place in _places(b for b in buffers if b.start <= moment <= b.stop):
        # Of several values in one place the latest says what it is now; loop parameters say nothing.
        best = max(place, key=lambda b: (b.value.split("{")[0] in names, b.start))
        name = names.get(best.value.split("{")[0], "").replace("\\'", "'")
        alive.append(Alive(_covered(place), role_of(name), layer_of(name, known), best.shape, best.value, name))
    return Peak(schedule[moment], sum(a.bytes for a in alive), tuple(sorted(alive, reverse=True)))


def _places(buffers: Iterable[Buffer]) -> Iterator[list[Buffer]]:
    """Yield groups of buffers that overlap."""
    group: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (b.allocation, b.offset)):
        inside = group and buffer.allocation == group[0].allocation
        if inside and buffer.offset < max(b.offset + b.bytes for b in group):
            group.append(buffer)
        else:
            if group:
                yield group
            group = [buffer]
    if group:
        yield group


def _covered(buffers: Iterable[Buffer]) -> int:
    """Bytes that the buffers take, shared places once."""
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for b in buffers:
        spans[b.allocation].append((b.offset, b.offset + b.bytes))
    total = 0
    for pieces in spans.values():
        reached = 0
        for start, stop in sorted(pieces):
            total += max(0, stop - max(start, reached))
            reached = max(reached, stop)
    return total


def _file(folder: Path, end: str) -> Path:
    return sorted(folder.glob(f"*_train*{end}"))[-1]


# --------------------------------------------------------------------------------------------------------------- report
def compile_into(folder: Path, case: Case) -> Path:
    """Compile a one-stage plan; return the folder of XLA's reports on its train step, inside ``folder``."""
    plan = plan_of(case)
    folder.mkdir(parents=True, exist_ok=True)
    model, target = f"benchmarks.accuracy.models:{case.model}", load_target(plan.cluster.gpu)
    compile_request(CompileRequest(plan=plan, model=model, target=target, folder=str(folder)))
    return Path(dump_folder(str(folder), 0))


def report(case: Case, peak: Peak, rows: int) -> Iterator[str]:
    """Yield the lines of a report: the estimate, the peak by role and layer, and its largest buffers."""
    fused = asks_for_kernels(case.model)  # as the program is compiled
    hardware = msgspec.structs.replace(load_hardware("h100"), fused_attention=fused)
    (stage,) = estimate_plan(plan_of(case), profile_of(case.model), hardware).stages
    yield f"estimate {stage.peak_bytes / GIB:8.3f} GiB  " + "  ".join(
        f"{name} {size / GIB:.3f}" for name, size in stage.memory.items()
    )
    yield f"compiled {peak.bytes / GIB:8.3f} GiB  while {peak.moment} runs"
    groups: Counter[tuple[str, str]] = Counter()
    for alive in peak.alive:
        groups[alive.role, alive.layer] += alive.bytes
    for (role, layer), size in groups.most_common():
        yield f"  {size / GIB:8.3f}  {role:12} {layer}"
    for alive in peak.alive[:rows]:
        where = "/".join(alive.op_name.split("/")[-5:])
        yield f"  {alive.bytes / 2**20:9.1f} MiB  {alive.role:10} {alive.shape:42} {alive.value:44} {where}"


def main() -> None:
    """Compile or read, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.peak", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a plan in benchmarks/accuracy/plans.py")
    parser.add_argument("--dump", type=Path, help="read the reports in this folder in place of compiling")
    parser.add_argument("--keep", type=Path, help="leave the reports in this folder")
    parser.add_argument("--rows", type=int, default=25, help="buffers to list")
    options = parser.parse_args()
    case = all_cases()[options.name]
    profile = profile_of(case.model)
    layers = {f"layers.{i}" for i in range(profile.layer_count)} | {run.kind for run in profile.layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dump or compile_into(options.keep or Path(temporary), case)
        peak = find_peak(folder, layers)
    print(f"{options.name}  ({record_path(options.name).name})")
    print("\n".join(report(case, peak, options.rows)))


if __name__ == "__main__":
    main()
