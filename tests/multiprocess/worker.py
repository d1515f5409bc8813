"""One process of a run: trains every case through ``auto_shard`` and writes what it has.

python -m tests.multiprocess.worker GROUP FOLDER [CASE ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from galvatron_jax import auto_shard, distributed
from galvatron_jax._sharded_model import ShardedModel
from tests.multiprocess.cases import GROUPS
from tests.runtime.pipeline.planned import BATCH, Case, batches, model_of, optimizer_of, plan_of


def main(group: str, folder: Path, names: Sequence[str]) -> None:
    """Join the others and run cases of a group, all by default."""
    place = distributed.initialize()
    assert place is not None
    assert place.processes == jax.process_count()
    jax.config.update("jax_disable_most_optimizations", True)
    for name in names or GROUPS[group].cases:
        case = GROUPS[group].cases[name]
        print(f"case {name}", flush=True)
        write(folder / f"{name}.{place.process}", *train(case))


def train(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Train; return what was reported and every shard of the parameters by path and place."""
    model, plan = model_of(case.model), plan_of(case, jax.device_count())
    trained = auto_shard(model.build, loss=model.loss, optimizer=optimizer_of(case.optimizer), plan=plan)
    trained.prepare(model.batch)
    rows = list(trained.process_rows)
    losses, norms = [], []
    for batch in batches(model):
        result = trained.step(jax.tree.map(lambda x: x[rows], batch))
        losses.append(float(result.loss))
        norms.append(float(result.gradient_norm))
    state = trained.neutral_state()
    evaluation = float(trained.eval(model.batch))  # the global batch is as good as the rows of it
    report = {"losses": losses, "norms": norms, "rows": rows, "evaluation": evaluation}
    report |= {"model": model_loss(trained, model), "again": restored(trained, state, model.batch)}
    assert len(rows) <= BATCH
    return report, shards(state.parameters)


def model_loss(trained: ShardedModel, model: Any) -> float:
    """Return the loss that the user's own module has, brought to one device."""
    graph, state = nnx.split(trained.model)
    whole = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), state)
    return float(jax.jit(lambda state, batch: model.loss(nnx.merge(graph, state), batch))(whole, model.batch))


def restored(trained: ShardedModel, state: Any, batch: Any) -> float:
    """Return the evaluation after a step away and back."""
    trained.step(batch)
    trained.restore_state(state)
    return float(trained.eval(batch))


def shards(parameters: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return every shard of this process's devices by path and first elements."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(parameters):
        for shard in leaf.addressable_shards:
            start = [part.start or 0 for part in shard.index]
            found[f"{jax.tree_util.keystr(path)}|{json.dumps(start)}"] = np.asarray(shard.data)
    return found


def write(path: Path, report: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write one case's results."""
    np.savez(f"{path}.npz", allow_pickle=False, **arrays)
    Path(f"{path}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
