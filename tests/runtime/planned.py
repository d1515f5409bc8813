"""Plans of a four-layer Llama on 8 virtual CPU devices, and their programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Remat, Stage, Strategy, check_plan, model_reference
from galvatron_jax.runtime import StagePrograms, TrainState, plan_model, stage_mesh
from galvatron_jax.runtime._slots import to_user
from tests.support.small_models import SmallModel, small_llama

DEVICES = 8
CLUSTER = Cluster(nodes=1, gpus_per_node=DEVICES, gpu="cpu")
BATCH = 16
INVOLUNTARY = "Involuntary full rematerialization"
"""What XLA's partitioner writes to standard error where it gathers a whole array to reshard it."""

Strategies = tuple[Strategy, ...]
"""Of the embedding, the four layers and the head."""


def dp(zero: int = 0, remat: Remat = "none") -> Strategy:
    """Data parallelism over all devices."""
    return Strategy(dp=DEVICES, zero=zero, remat=remat)


def tp(degree: int, *, zero: int = 0, sp: bool = False, remat: Remat = "none") -> Strategy:
    """Tensor parallelism, and data parallelism over the remaining devices."""
    return Strategy(tp=degree, dp=DEVICES // degree, zero=zero, sp=sp, remat=remat)


def hsdp(zero: int, replicas: int, remat: Remat = "none") -> Strategy:
    """ZeRO inside each of ``replicas`` groups of the devices, copies across them."""
    return Strategy(dp=DEVICES, zero=zero, replicas=replicas, remat=remat)


def tp_hsdp(degree: int, zero: int, replicas: int) -> Strategy:
    """The same over the data-parallel ranks that tensor parallelism leaves."""
    return Strategy(tp=degree, dp=DEVICES // degree, zero=zero, replicas=replicas)


def ulysses(degree: int, *, zero: int = 0, replicas: int = 1, remat: Remat = "none") -> Strategy:
    """Sequence parallelism with heads swapped in around attention, and data parallelism over the remaining devices."""
    return Strategy(ulysses=degree, dp=DEVICES // degree, zero=zero, replicas=replicas, remat=remat)


@functools.cache
def llama(kv_heads: int = 8) -> SmallModel:
    """A Llama of four layers; heads and head dim are equally large, and embed is their product."""
    return small_llama(batch=BATCH, seq=32, layers=4, vocab=128, embed=64, mlp=96, heads=8, kv_heads=kv_heads)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A model under a plan."""

    model: SmallModel
    analysis: Analysis
    plan: Plan
    programs: StagePrograms

    def parts(self) -> tuple[Any, Any]:
        """Fresh (parameters, other state) of the model, as a user has them: on one device."""
        trace = self.analysis.trace
        return trace.rows.apart(*trace.model.build())

    def adopted(self) -> TrainState:
        """The fresh model's state on all devices."""
        return self.programs.adopt(*self.parts())

    def placed(self, batch: Any) -> list[Any]:
        """A batch on all devices."""
        return self.programs.place_batch(jax.tree.leaves(batch))

    def user_tree(self, arrays: Sequence[Any]) -> Any:
        """Arrays of the slots as the tree of the user's parameters."""
        leaves = to_user(self.programs.model.slots, arrays)
        structure = jax.tree.structure(self.analysis.trace.parameters)
        return jax.tree.unflatten(structure, [leaves[i] for i in range(len(leaves))])

    def compiled_gradients(self) -> str:
        """HLO text of the compiled gradient program."""
        state = self.programs.abstract_state
        program: Any = self.programs.gradients
        text: str = program.lower(state, self.abstract_batch()).compile().as_text()
        return text

    def abstract_batch(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch as the programs take it."""
        return [self._abstract(leaf) for leaf in jax.tree.leaves(self.model.batch)]

    def _abstract(self, leaf: Any) -> jax.ShapeDtypeStruct:
        count = self.programs.microbatches
        shape = leaf.shape if count == 1 else (count, leaf.shape[0] // count, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)


def planned(
    strategies: Sequence[Strategy],
    *,
    model: SmallModel | None = None,
    microbatches: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    in_float32: bool = False,
) -> Planned:
    """Return ``model`` (default: ``llama()``) with one strategy for each of its layers.

    Raises:
        PlanError: a strategy is not legal.
    """
    model = model or llama()
    batch = jax.tree.leaves(model.batch)[0].shape[0]
    size = batch // microbatches
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), model.batch)
    analysis = analyse_model(model.build, model.loss, microbatch)
    kinds = [segment.kind for segment in analysis.cut.segments]
    runs = tuple(PlanRun(kind=k, count=1, strategy=s) for k, s in zip(kinds, strategies, strict=True))
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=CLUSTER,
        global_batch=batch,
        microbatches=microbatches,
        stages=(Stage(devices=DEVICES, runs=runs),),
    )
    check_plan(plan, analysis.profile)
    mesh = stage_mesh(CLUSTER, jax.devices()[:DEVICES])
    stage = dataclasses.replace(plan_model(analysis, plan, mesh), reduces_in_float32=in_float32)
    programs = StagePrograms(stage, optimizer or optax.adam(1e-3), microbatches)
    return Planned(model, analysis, plan, programs)
