"""Rules: what the user takes out of the space of strategies, as values.

    rule       = [TARGET ":"] condition {"," condition}
    TARGET     = "layers" ranges | "layer" number | kind name | "all"       ranges: 0-3,7, as the plan table counts
    condition  = field operator value {"|" value} | flag
    field      = tp | ulysses | dp | zero | replicas | sp | remat
    operator   = "=" | "!=" | "<=" | ">=" | "<" | ">"
    flag       = tp | ulysses | dp | zero | hsdp | sp | remat                the field differs from doing without it

A *pin* lets a target's layers use only strategies that meet all its conditions; a *prohibition* takes these strategies
away. Both filter strategies of a layer kind, so the search stays exact: layers that a rule names by number become a
kind of their own (``_split``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import GalvatronError
from ..strategy import Strategy

Operator = Literal["=", "!=", "<=", ">=", "<", ">"]

NUMBERS = ("tp", "ulysses", "dp", "zero", "replicas")
WORDS = {"sp": ("no", "yes"), "remat": ("none", "dots", "full")}
ALIASES = {"hsdp": "replicas", "sp=true": "sp=yes", "sp=false": "sp=no"}
WITHOUT: dict[str, str | int] = {
    "tp": 1, "ulysses": 1, "dp": 1, "zero": 0, "replicas": 1, "sp": "no", "remat": "none"
}  # fmt: skip
"""What a field says when a strategy does without it."""

MAX_LAYER = 10_000
EXAMPLE = 'for example "layers 0-3: tp=8", "head: zero=3", "remat=full" or "ulysses"'

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """What one field of a strategy is to be."""

    field: str
    operator: Operator
    values: tuple[str | int, ...]
    """Alternatives of ``=`` and ``!=``; one number otherwise."""

    def holds(self, strategy: Strategy) -> bool:
        """Return whether ``strategy`` meets the condition."""
        got = _field(strategy, self.field)
        if self.operator in ("=", "!="):
            return (got in self.values) == (self.operator == "=")
        return _COMPARE[self.operator](int(got), int(self.values[0]))

    def __str__(self) -> str:
        """The condition as the user types it."""
        return f"{self.field}{self.operator}{'|'.join(map(str, self.values))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which strategies some layers may use."""

    conditions: tuple[Condition, ...]
    forbids: bool = False
    """The strategies that meet all conditions are taken away, instead of being the only ones."""
    kind: str | None = None
    """The layers of this kind; None: all layers, or those of ``layers``."""
    layers: tuple[int, ...] | None = None
    """The layers with these numbers, ascending; None: all layers, or those of ``kind``."""

    def allows(self, kind: str, strategy: Strategy) -> bool:
        """Return whether a layer of ``kind`` may use ``strategy`` (``layers`` are kinds by then, see ``_split``)."""
        if self.kind not in (None, kind):
            return True
        return all(condition.holds(strategy) for condition in self.conditions) != self.forbids

    def __str__(self) -> str:
        """The rule as the user types it."""
        target = "layers " + ranges_text(self.layers) + ": " if self.layers else f"{self.kind}: " if self.kind else ""
        return target + ", ".join(map(str, self.conditions))


def pin(text: str, *, where: str = "--pin") -> Rule:
    """Return the rule that holds the layers of ``text`` to strategies that meet all its conditions.

    >>> str(pin("layers 0-3: tp=8, sp"))
    'layers 0-3: tp=8, sp!=no'

    Raises:
        GalvatronError: ``text`` does not follow the grammar of this module.
    """
    return _parse(text, where, forbids=False)


def forbid(text: str, *, where: str = "--forbid") -> Rule:
    """Return the rule that takes the strategies that meet all conditions of ``text`` away.

    >>> str(forbid("ulysses"))
    'ulysses!=1'

    Raises:
        GalvatronError: ``text`` does not follow the grammar of this module.
    """
    return _parse(text, where, forbids=True)


def ranges_text(layers: tuple[int, ...]) -> str:
    """Return ascending numbers as ranges: ``(0, 1, 2, 5)`` as ``"0-2,5"``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def parse_ranges(text: str, where: str) -> tuple[int, ...]:
    """Return the numbers that ``text`` names, ascending: ``"0-2,5"`` as ``(0, 1, 2, 5)``.

    Raises:
        GalvatronError: not ranges of layer numbers.
    """
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_LAYER:
            raise GalvatronError(
                f"got layers {text!r}", expected="layer numbers such as 0-3,7", where=where, action=EXAMPLE
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _parse(text: str, where: str, *, forbids: bool) -> Rule:
    target, colon, rest = text.rpartition(":")
    kind, layers = None, None
    target = target.strip()
    if colon and target != "all":
        words = target.split(maxsplit=1)
        if words and words[0] in ("layer", "layers"):
            layers = parse_ranges(words[1] if len(words) > 1 else "", where)
        elif target:
            kind = target
        else:
            raise GalvatronError(f"got {text!r}", expected="a target before the colon", where=where, action=EXAMPLE)
    conditions = tuple(_condition(part.strip(), text, where) for part in rest.split(","))
    return Rule(conditions=conditions, forbids=forbids, kind=kind, layers=layers)


def _condition(part: str, text: str, where: str) -> Condition:
    part = ALIASES.get(part, part)
    match = re.fullmatch(r"([a-z]+)\s*(?:(<=|>=|!=|=|<|>)\s*([a-z0-9|]+))?", part, flags=re.ASCII)
    field = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or field not in WITHOUT:
        raise GalvatronError(
            f"got {part!r} in {text!r}",
            expected=f"a condition on one of {', '.join(WITHOUT)}",
            where=where,
            action=EXAMPLE,
        )
    if match[2] is None:
        return Condition(field, "!=", (WITHOUT[field],))
    operator: Operator = match[2]  # type: ignore[assignment]  # the pattern has these six
    values = tuple(_value(field, word, part, where) for word in match[3].split("|"))
    if operator not in ("=", "!=") and (field in WORDS or len(values) > 1):
        raise GalvatronError(
            f"got {part!r}", expected=f"{field}= or {field}!=" if field in WORDS else "one number after <, >, <=, >=",
            where=where, action=EXAMPLE,
        )  # fmt: skip
    return Condition(field, operator, values)


def _value(field: str, word: str, part: str, where: str) -> str | int:
    if field in WORDS and word in WORDS[field]:
        return word
    if field in NUMBERS and re.fullmatch(r"[0-9]{1,7}", word, flags=re.ASCII):
        return int(word)
    expected = "one of " + ", ".join(WORDS[field]) if field in WORDS else "a whole number"
    raise GalvatronError(f"got {part!r}", expected=f"{field} to be {expected}", where=where, action=EXAMPLE)


def _field(strategy: Strategy, name: str) -> str | int:
    if name == "sp":
        return "yes" if strategy.sp else "no"
    value: str | int = getattr(strategy, name)
    return value
