"""Predicted beside compiled collectives: every model of the zoo under every family of plans.

    python -m benchmarks.zoo_collectives [--model NAME]... [--family NAME]... [--limit SECONDS] [--out FILE]

Compiles the gradient program of each pair for eight CPU devices (nothing runs) and compares bytes by kind and group
size, as ``tests/runtime/zoo_plans.py`` says. Writes one line of JSON a pair to FILE as it goes; pairs that FILE has
already are skipped, so a run that the limit ended is taken up by the next one. Prints what differs, and the matrix.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  (eight virtual devices, before jax is imported)
from tests.runtime.zoo_plans import (
    FAMILIES,
    analysed,
    compiled_gradients,
    compiled_totals,
    difference,
    plan_for,
    predicted_totals,
)
from tests.zoo import ZOO

Record = dict[str, Any]


def main() -> None:
    """Compare all pairs that are asked for."""
    options = parse()
    found = {(r["model"], r["family"]): r for r in map(json.loads, read_lines(options.out))}
    start = time.monotonic()
    for name in options.model or ZOO:
        for family in options.family or FAMILIES:
            if (name, family) in found or time.monotonic() - start > options.limit:
                continue
            record = found[name, family] = compare(name, family)
            print(f"{name}, {family}: {record['beyond'] or 'exact'}", flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(matrix(found))


def compare(name: str, family: str) -> Record:
    """Return one pair: its strategies, and bytes compiled beyond those predicted (none where all agree)."""
    plan = plan_for(analysed(name), FAMILIES[family])
    beyond = difference(compiled_totals(compiled_gradients(name, plan)), predicted_totals(plan, analysed(name)))
    return {
        "model": name,
        "family": family,
        "strategies": [str(strategy) for _, strategy in plan.layers()],
        "beyond": {f"{kind} over {group}": size for (kind, group), size in beyond.items()},
    }


_WORDS = {"tp": "tp", "sp": "+sp", "ulysses": "ulysses", "hsdp": "hsdp"}
"""What the strategies of a family have in their names."""


def matrix(found: dict[tuple[str, str], Record]) -> str:
    """Return a Markdown table: models by families, ``=`` where all bytes agree, in brackets where no layer may."""

    def cell(name: str, family: str) -> str:
        record = found.get((name, family))
        if record is None:
            return ""
        sign = "≠" if record["beyond"] else "="
        return sign if is_expressed(record) else f"({sign})"

    families = [family for family in FAMILIES if any(f == family for _, f in found)]
    lines = [f"| model | {' | '.join(families)} |", "|---" * (1 + len(families)) + "|"]
    for name in ZOO:
        if any(n == name for n, _ in found):
            lines.append(f"| `{name}` | {' | '.join(cell(name, family) for family in families)} |")
    return "\n".join(lines)


def is_expressed(record: Record) -> bool:
    """Tell whether any layer of the model has a strategy that the family is named after, not one it falls back on."""
    words = [word for part, word in _WORDS.items() if part in record["family"].split(", ")]
    return any(all(word in strategy for word in words) for strategy in record["strategies"])


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, none if there is no such file."""
    return path.read_text().splitlines() if path.exists() else []


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(ZOO), help="default: all")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="default: all")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which no new pair is begun")
    parser.add_argument("--out", type=Path, default=Path("zoo_collectives.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
