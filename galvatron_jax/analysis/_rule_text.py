"""Dimension rules as text: ``"b s h d, b t h d, b t h e -> b s h e"`` for a kernel of your own.

One word for each dimension, the same word for the same index space. A word on both sides of the arrow may be sharded. A
word on the left alone is consumed inside (the positions ``t`` of attention): it must be whole. ``_`` stands for
a dimension that must not be sharded, ``(h d)`` for one made of two index spaces, which need a size where no other
dimension tells it: ``(h d=64)``. Words after ``sums`` are added up: a sharded one leaves partial results, which are
reduced: ``"m k, k n -> m n sums k"``.

``custom_partitioning`` calls carry such a rule for Shardy (``SdyShardingRule``, or a function that returns one): it is
read here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AnalysisError
from ._dimensions import Rule, RuleFunction, Value
from ._factors import Dim

Words = tuple[str, ...]
Pattern = tuple[Words, ...]
"""The words of each dimension of one array."""


@dataclasses.dataclass(frozen=True, slots=True)
class RuleText:
    """A parsed rule."""

    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]
    sums: frozenset[str]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    """Words that are needed whole though both sides have them."""


def parse_rule(text: str) -> RuleText:
    """Return the rule that ``text`` writes.

    Raises:
        AnalysisError: it has no arrow, or a bracket without its partner.
    """
    left, arrow, right = text.partition("->")
    right, _, sums = right.partition(" sums ")
    if not arrow or text.count("(") != text.count(")"):
        raise AnalysisError(
            f"got {text!r}",
            expected='operands and results with one word for each dimension, such as "m k, k n -> m n sums k"',
            where="register_rule",
            action="see galvatron_jax.analysis.register_rule",
        )
    sizes: dict[str, int] = {}
    operands, results = (tuple(_pattern(part, sizes) for part in side.split(",")) for side in (left, right))
    return RuleText(operands, results, frozenset(sums.split()), sizes)


def shardy_rule(rule: Any, call: Rule) -> RuleText | None:
    """Return the Shardy rule that a ``custom_partitioning`` call carries as ours, None when it is of another form.

    A function of the call's static arguments and shapes is asked; one that also wants a mesh says nothing here. A rule
    for any rank (cuDNN attention: it names query and value only) says too little to be one of ours.
    """
    if callable(rule):
        try:
            rule = rule(*call.params.get("static_args", ()), None, call.inputs, call.results)
        except Exception:  # the user's own code, which may want what only XLA knows
            return None
    if not hasattr(rule, "operand_mappings"):
        return None
    operands, results = (tuple(map(_mapped, maps)) for maps in (rule.operand_mappings, rule.result_mappings))
    if any(word.startswith("…") for pattern in (*operands, *results) for words in pattern for word in words):
        return None
    whole = {*rule.need_replication_factors, *rule.permutation_factors}
    return RuleText(operands, results, frozenset(rule.reduction_factors), dict(rule.factor_sizes), frozenset(whole))


def rule_function(rule: RuleText) -> RuleFunction:
    """Return ``rule`` as a function like those of ``_rules``."""

    def apply(call: Rule) -> list[list[Dim]]:
        known: dict[str, Dim] = {}
        for value, pattern in zip(call.inputs, rule.operands, strict=False):
            _bind(call, rule, value, pattern, known)
        _require_whole(call, rule)
        call.op.contracted = [f for word in sorted(rule.sums) for f in known.get(word, [])]
        return [
            _result(call, pattern, tuple(a.shape), known) for pattern, a in zip(rule.results, call.results, strict=True)
        ]

    return apply


def _bind(call: Rule, rule: RuleText, value: Value, pattern: Pattern, known: dict[str, Dim]) -> None:
    """Unify the dimensions of an operand with the words they stand for."""
    if len(pattern) != len(value.shape):
        raise AnalysisError(
            f"an operand of {call.op.name} has {len(value.shape)} dimensions, its rule says {len(pattern)}",
            expected="one word for each dimension",
            where=call.op.scope or "register_rule",
            action="register a rule for this rank",
        )
    for words, size, dim in zip(pattern, value.shape, value.dims, strict=True):
        if words == ("_",):
            call.op.needs_whole(value, dim)
            continue
        parts: Dim = []
        for word in words:
            known.setdefault(word, call.factors.new(_size(word, words, size, known, rule, call)))
            parts += known[word]
        call.factors.unify(dim, parts)


def _size(word: str, words: Words, size: int, known: Mapping[str, Dim], rule: RuleText, call: Rule) -> int:
    if word in rule.sizes or len(words) == 1:
        return rule.sizes.get(word, size)
    others = [w for w in words if w != word]
    sizes = [math.prod(map(call.factors.size, known[w])) if w in known else rule.sizes.get(w, 1) for w in others]
    return size // max(1, math.prod(sizes))


def _require_whole(call: Rule, rule: RuleText) -> None:
    made = {word for pattern in rule.results for words in pattern for word in words}
    for value, pattern in zip(call.inputs, rule.operands, strict=False):
        for words, dim in zip(pattern, value.dims, strict=True):
            if any(w in rule.whole or (w not in made and w not in rule.sums) for w in words):
                call.op.needs_whole(value, dim)


def _result(call: Rule, pattern: Pattern, shape: Sequence[int], known: Mapping[str, Dim]) -> list[Dim]:
    dims: list[Dim] = []
    for words, size in zip(pattern, shape, strict=True):
        parts = [f for word in words for f in known.get(word, [])]
        fits = math.prod(map(call.factors.size, call.factors.resolve(parts))) == size
        dims.append(parts if fits and words != ("_",) else call.factors.new(size, blocked=True))
    return dims


def _pattern(text: str, sizes: dict[str, int]) -> Pattern:
    dims: list[list[str]] = []
    inside = False
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            dims += [[]] if inside else []
            continue
        word, _, size = token.partition("=")
        if size:
            sizes[word] = int(size)
        if inside:
            dims[-1].append(word)
        else:
            dims.append([word])
    return tuple(tuple(words) for words in dims)


def _mapped(mapping: Sequence[Any]) -> Pattern:
    """The dimensions of one array of a Shardy rule: a name, or several in a compound factor."""
    return tuple((part,) if isinstance(part, str) else tuple(map(str, part)) for part in mapping)
