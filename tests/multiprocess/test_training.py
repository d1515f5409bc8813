"""Several processes together train like one device: stages inside a process, across processes, and none at all."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multiprocess.cases import GROUPS
from tests.multiprocess.processes import run_processes
from tests.runtime.pipeline.planned import BATCH, Run, reference
from tests.runtime.pipeline.test_equivalence import LOSS_TOLERANCE, assert_equal_runs
from tests.runtime.planned import INVOLUNTARY

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

LIMIT_S = 500
CASES = [(group, name) for group, members in GROUPS.items() for name in members.cases]


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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def of(group: str) -> Results:
        folder, members = tmp_path_factory.mktemp("processes"), GROUPS[group]
        run_processes(
            "tests.multiprocess.worker",
            [group, str(folder)],
            processes=members.processes,
            devices=members.devices,
            folder=folder,
            limit_s=LIMIT_S,
        )
        return Results(folder, members.processes)

    return of


@pytest.mark.parametrize(("group", "name"), CASES)
def test_processes_train_like_one_device(group: str, name: str, results: Any) -> None:
    case, found = GROUPS[group].cases[name], results(group)
    expected, reports = reference(case.model, case.optimizer), found.reports(name)
    for report in reports:
        run = Run(report["losses"], report["norms"], found.parameters(name, expected.parameters))
        assert_equal_runs(case, run, expected)


@pytest.mark.parametrize(("group", "name"), CASES)
def test_processes_evaluate_hand_back_and_restore_alike(group: str, name: str, results: Any) -> None:
    reports = results(group).reports(name)
    assert len({report["evaluation"] for report in reports}) == 1
    for report in reports:
        assert report["model"] == pytest.approx(report["evaluation"], rel=LOSS_TOLERANCE)
        assert report["again"] == report["evaluation"]


def test_each_process_needs_its_own_rows_only(results: Any) -> None:
    rows = [report["rows"] for report in results("two processes").reports("one stage over both")]
    assert sorted(rows[0] + rows[1]) == list(range(BATCH))
    assert len(rows[0]) == len(rows[1]) == BATCH // 2


@pytest.mark.parametrize("group", GROUPS)
def test_no_process_rematerialises_involuntarily(group: str, results: Any) -> None:
    logs = list(results(group).folder.glob("*.log"))
    assert len(logs) >= GROUPS[group].processes
    assert not any(INVOLUNTARY in log.read_text(errors="replace") for log in logs)
