"""Layers named by number become kinds of their own, so that layers of one kind stay alike; and back again in the plan.

The search counts layers of a kind and does not number them. A rule for "layers 0-3" therefore splits their kind: layers
under the same rules form one kind, with the same costs as before and fewer strategies. The plan found is written in the
model's own kinds and priced once more as such.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ..cost import estimate_plan
from ..errors import GalvatronError
from ..plan import Certificate, Plan, PlanRun, Stage
from ..profile import LayerRun, ModelProfile
from ._pricing import Problem
from ._rules import Rule, ranges_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A problem with the layers of each rule as kinds of their own."""

    problem: Problem
    """What the engine works on."""
    model: ModelProfile
    """The user's model."""
    kinds: dict[str, str]
    """New kind -> the model's own."""

    @property
    def given(self) -> Problem:
        """The problem in the model's own kinds, without its rules."""
        return replace(self.problem, model=self.model, limits=replace(self.problem.limits, rules=()))

    def restore(self, plan: Plan) -> Plan:
        """Return ``plan`` in the model's own kinds."""
        if not self.kinds:
            return plan
        stages = tuple(Stage(devices=s.devices, runs=_merged(self._renamed(s))) for s in plan.stages)
        plan = msgspec.structs.replace(plan, stages=stages)
        predicted = estimate_plan(plan, self.model, self.problem.hardware)
        # Sums over merged runs may differ in the last digit, and the certificate is about the time that is reported.
        certificate = plan.certificate and _certificate(plan.certificate, predicted.step_time_s)
        return msgspec.structs.replace(plan, predicted=predicted, certificate=certificate)

    def _renamed(self, stage: Stage) -> Iterator[PlanRun]:
        for run in stage.runs:
            yield msgspec.structs.replace(run, kind=self.kinds.get(run.kind, run.kind))


def split_layers(problem: Problem) -> Split:
    """Return the problem in which every rule is about kinds.

    Raises:
        GalvatronError: a rule names a layer or kind that the model does not have.
    """
    model, limits = problem.model, problem.limits
    for rule in limits.rules:
        _check_target(rule, model)
    numbered = [rule for rule in limits.rules if rule.layers is not None]
    if not numbered:
        return Split(problem=problem, model=model, kinds={})
    order = [run.kind for run in model.layers for _ in range(run.count)]
    groups: dict[tuple[str, tuple[Rule, ...]], list[int]] = {}
    for layer, kind in enumerate(order):
        groups.setdefault((kind, tuple(rule for rule in numbered if layer in (rule.layers or ()))), []).append(layer)
    names = {key: key[0] if not key[1] else f"{key[0]} ({ranges_text(tuple(at))})" for key, at in groups.items()}
    name_of = {layer: names[key] for key, layers in groups.items() for layer in layers}
    own = {name: key[0] for key, name in names.items() if key[1]}
    kinds = [msgspec.structs.replace(model.kind(key[0]), name=name) for key, name in names.items()]
    runs = tuple(
        LayerRun(kind=name, count=len(list(same)))
        for name, same in itertools.groupby(name_of[layer] for layer in range(len(order)))
    )
    rules = [
        replace(rule, kind=name, layers=None)
        for key, name in names.items()
        for rule in (*key[1], *(r for r in limits.rules if r.kind == key[0]))
    ]
    rules += [rule for rule in limits.rules if rule.layers is None and rule.kind is None]
    return Split(
        problem=replace(
            problem,
            model=msgspec.structs.replace(model, layers=runs, kinds=tuple(kinds)),
            limits=replace(limits, rules=tuple(rules)),
        ),
        model=model,
        kinds=own,
    )


def _certificate(proven: Certificate, step_time_s: float) -> Certificate:
    if proven.optimal:
        return msgspec.structs.replace(proven, lower_bound_s=step_time_s)
    bound_s = min(proven.lower_bound_s, step_time_s)
    return Certificate(optimal=False, lower_bound_s=bound_s, gap=(step_time_s - bound_s) / step_time_s)


def _merged(runs: Iterator[PlanRun]) -> tuple[PlanRun, ...]:
    merged: list[PlanRun] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is not None and (last.kind, last.strategy) == (run.kind, run.strategy):
            merged[-1] = msgspec.structs.replace(last, count=last.count + run.count)
        else:
            merged.append(run)
    return tuple(merged)


def _check_target(rule: Rule, model: ModelProfile) -> None:
    where = "--forbid" if rule.forbids else "--pin"
    names = [run.kind for run in model.layers]
    if rule.kind is not None and rule.kind not in names:
        close = difflib.get_close_matches(rule.kind, names, n=1, cutoff=0.5)
        raise GalvatronError(
            f"got kind {rule.kind!r} in {str(rule)!r}",
            expected=f"one of {', '.join(dict.fromkeys(names))}",
            where=where,
            action=f"did you mean {close[0]!r}?" if close else 'or layer numbers, for example "layers 0-3: tp=8"',
        )
    if rule.layers is not None and rule.layers[-1] >= model.layer_count:
        raise GalvatronError(
            f"got layer {rule.layers[-1]} in {str(rule)!r}",
            expected=f"layer numbers from 0 to {model.layer_count - 1}, as the plan table counts them",
            where=where,
            action=f'for example {"--forbid" if rule.forbids else "--pin"} "layers 0-{model.layer_count - 1}: zero=3"',
        )
