"""Several processes together train like one device: stages inside a process, across processes, and none at all.

One test for each group of cases: starting the processes is most of the work, and pytest-xdist would start them anew for
each of its workers.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multiprocess.cases import GROUPS
from tests.multiprocess.processes import run_processes
from tests.runtime.pipeline.planned import BATCH, Case, Run, reference
from tests.runtime.pipeline.test_equivalence import LOSS_TOLERANCE, assert_equal_runs
from tests.runtime.planned import INVOLUNTARY

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(1200)]

LIMIT_S = 900


@dataclasses.dataclass(frozen=True)
class Results:
    """What the processes of a group wrote."""

    folder: Path
    processes: int

    def reports(self, name: str) -> list[dict[str, Any]]:
        """Reports of all processes for a case."""
        paths = [self.folder / f"{name}.{k}.json" for k in range(self.processes)]
        return [json.loads(path.read_text()) for path in paths]

    def parameters(self, name: str, like: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Whole parameters put together from the shards of all processes."""
        whole = {path: np.full(value.shape, np.nan, value.dtype) for path, value in like.items()}
        for k in range(self.processes):
            with np.load(self.folder / f"{name}.{k}.npz") as arrays:
                for key, value in arrays.items():
                    path, _, start = key.rpartition("|")
                    place = tuple(slice(s, s + n) for s, n in zip(json.loads(start), value.shape, strict=True))
                    whole[path][place] = value
        return whole


@pytest.mark.parametrize("group", GROUPS)
def test_processes_train_like_one_device(group: str, tmp_path: Path) -> None:
    found = run_group(group, tmp_path)
    for name, case in GROUPS[group].cases.items():
        print(f"case {name}")  # pytest shows it when a check fails
        expected, reports = reference(case.model, case.optimizer), found.reports(name)
        check_reports(case, reports)
        for report in reports:
            run = Run(report["losses"], report["norms"], found.parameters(name, expected.parameters))
            assert_equal_runs(case, run, expected)
    logs = list(tmp_path.glob("*.log"))
    assert len(logs) >= GROUPS[group].processes
    assert not any(INVOLUNTARY in log.read_text(errors="replace") for log in logs)


def run_group(group: str, folder: Path) -> Results:
    """Run all cases of a group in its processes."""
    members = GROUPS[group]
    run_processes(
        "tests.multiprocess.worker",
        [group, str(folder)],
        processes=members.processes,
        devices=members.devices,
        folder=folder,
        limit_s=LIMIT_S,
    )
    return Results(folder, members.processes)


def check_reports(case: Case, reports: list[dict[str, Any]]) -> None:
    """Processes evaluate alike, hand the model back as it is evaluated, and go on from a state as from the start."""
    assert len({report["evaluation"] for report in reports}) == 1
    for report in reports:
        assert report["model"] == pytest.approx(report["evaluation"], rel=LOSS_TOLERANCE)
        assert report["again"] == report["evaluation"]
    rows = [set(report["rows"]) for report in reports]
    assert set().union(*rows) == set(range(BATCH))
    if "|" not in case.stages:  # one stage over all processes: each one needs rows of its own only
        assert sum(map(len, rows)) == BATCH
