"""The table of plans that equal one device (docs/design/0064) is that of the tests, and has at least 40 of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.multiprocess.cases import GROUPS
from tests.runtime import test_equivalence as one_stage
from tests.runtime.pipeline import test_equivalence as pipelines

PAGE = Path(__file__).parents[2] / "docs" / "design" / "0064-equal-to-one-device.md"
ROW = re.compile(r"^\| \d+ \| ([^|]+) \| [^|]+ \| [^|]+ \| (\d+) \| (\d) \| ", re.MULTILINE)


def test_table_of_equal_plans_lists_every_case() -> None:
    found = [(name, int(count), int(processes)) for name, count, processes in ROW.findall(PAGE.read_text())]
    alone = {**one_stage.EVERY_PLAN, **one_stage.SLOW_PLANS}.items(), pipelines.EVERY_CASE.items()
    expected = [(name, case.microbatches, 1) for cases in alone for name, case in cases]
    for group in GROUPS.values():
        expected += [(name, case.microbatches, group.processes) for name, case in group.cases.items()]
    assert Counter(found) == Counter(expected)
    assert len(found) >= 40
    assert {processes for *_, processes in found} == {1, 2, 4}
