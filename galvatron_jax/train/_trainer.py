"""AutoTrainer: model, loss, optimizer, data and cluster in; a trained model, checkpoints and metrics out.

    trainer = AutoTrainer(build, loss=loss, optimizer=optimizer, config=RunConfig(data=data, run=settings))
    outcome = trainer.run()

Analysis, search and the compiled step are those of ``auto_shard``. What the trainer adds is everything around the step:
data in one global order, checkpoints that any other plan can go on from, metrics, and what to do when something fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import optax
from flax import nnx

from .._auto_shard import auto_shard
from .._sharded_model import ShardedModel
from .._text import clean
from .._weights import Weights
from ..analysis import Loss
from ..errors import ConfigError, DeviceMemoryError, GalvatronError, ToolchainError
from ..models import next_token_loss
from ..plan import Plan, save_plan
from ..profile import HardwareProfile
from ._build import build_optimizer, build_subject
from ._compiles import CompileWatch, watch_compiles
from ._config import RunConfig
from ._dataset import DataSet, open_dataset
from ._failures import translate
from ._faults import FaultPlan, planned_faults
from ._goodput import Goodput
from ._identity import check_same_run, fingerprint, read_config, write_config
from ._judge import Judge
from ._loop import Loop, Outcome, free_state
from ._memory import is_out_of_memory, learn_margin
from ._next_plan import Limits, offer_plan, simpler_than
from ._plans import PLAN_NAME, Choice, choose_plan, describe_change, learnt_hardware, plan_text
from ._preflight import check_preflight, gather_facts
from ._profile_window import ProfileWindow
from ._ranks import Ranks, current_ranks
from ._record import write_record
from ._report import Reporter
from ._signals import StopRequest, watch_signals
from ._trackers import open_trackers, read_metrics
from ._watchdog import Watchdog
from .checkpoint import CheckpointStore, Progress
from .data import SampleWindows, Windows

_log = logging.getLogger(__name__)

DEFAULT_GLOBAL_BATCH = 32


class AutoTrainer:
    """Trains a model under the best plan for the devices at hand, and goes on where it was stopped."""

    def __init__(
        self,
        model: nnx.Module | Callable[[], nnx.Module],
        *,
        config: RunConfig,
        loss: Loss | None = None,
        optimizer: optax.GradientTransformation | None = None,
        learning_rate: optax.Schedule | None = None,
        data: Windows | Sequence[Any] | None = None,
        vocab: int | None = None,
        plan: Plan | None = None,
        hardware: HardwareProfile | None = None,
        override_config: bool = False,
        allow_mismatch: bool = False,
        retry_oom: int = 0,
        retry_failed: int = 0,
        weights: Weights | None = None,
    ) -> None:
        """Hold the parts; nothing happens before ``run``.

        Args:
            model: A ``flax.nnx.Module``, or a function that builds one (then no device ever holds the whole model).
            config: Data, folder, steps, checkpoints, policies; ``[model]`` is not looked at.
            loss: ``loss(model, batch)``, the mean over the batch; next-token cross-entropy by default.
            optimizer: Any optax transformation; by default what ``[optimizer]`` says.
            learning_rate: By step, to show it; known when the optimizer comes from ``[optimizer]``.
            data: Samples by index, the same on every process: arrays of ``seq + 1`` tokens (a batch is then ``inputs``
                and ``targets``), or any pytrees of arrays; by default what ``[data]`` says.
            vocab: Token ids at or above it are refused.
            plan: How to spread the model; by default ``[run] plan``, the plan in the run's folder, or a search.
            hardware: What the search prices with; the bundled profile of the cluster's GPU by default.
            override_config: Let a resumed run change the learning rate and the number of steps.
            allow_mismatch: Run a plan for another mesh or kind of GPU on equally many devices.
            retry_oom: How often to plan again, with more memory held back, when a device runs out of it.
            retry_failed: How often to take the next simpler plan when XLA fails on one.
            weights: What a new run begins with (``auto_shard``); by default fresh values.
        """
        steps = config.run.steps
        own, schedule = build_optimizer(config.optimizer, steps)
        self._model, self._config = model, config
        self._loss = loss or next_token_loss
        self._optimizer = optimizer or own
        self._learning_rate = learning_rate or (schedule if optimizer is None else None)
        self._data: Windows | None = None if data is None else _as_windows(data)
        self._vocab, self._plan, self._hardware, self._weights = vocab, plan, hardware, weights
        self._override, self._allow_mismatch = override_config, allow_mismatch
        self._retries: dict[type, int] = {DeviceMemoryError: retry_oom, ToolchainError: retry_failed}
        self._next: Plan | None = None
        self.sharded: ShardedModel | None = None
        """The model in training, once ``run`` has begun."""

    @classmethod
    def from_config(cls, config: RunConfig, **options: Any) -> AutoTrainer:
        """Return the trainer of a run file; ``options`` are those of the constructor.

        Raises:
            ConfigError: the model cannot be built from it.
        """
        subject = build_subject(config.model)
        seq = config.data.seq or subject.seq
        config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, seq=seq))
        return cls(
            subject.build,
            config=config,
            loss=subject.loss,
            vocab=subject.vocab,
            weights=subject.weights,
            **options,
        )

    @property
    def folder(self) -> Path:
        """Everything that the run writes."""
        return Path(self._config.run.folder)

    def run(self) -> Outcome:
        """Train to the end, or to the next checkpoint when somebody asks to stop.

        Raises:
            GalvatronError: bad input, nothing fits, the environment fails, or a numerical stop; see ``exit_code``.
        """
        ranks = current_ranks()
        faults = planned_faults(os.environ, rank=ranks.index)
        with watch_signals() as request, watch_compiles() as compiles:
            while True:
                try:
                    return self._attempt(ranks, faults, request, compiles)
                except (DeviceMemoryError, ToolchainError) as error:
                    if not self._may_retry(error, ranks):
                        raise
                    _log.warning("%s; going on under another plan", error.message)

    def _may_retry(self, error: DeviceMemoryError | ToolchainError, ranks: Ranks) -> bool:
        """Tell whether to plan again in this process, and prepare it."""
        self._retries[type(error)] -= 1
        # Of several processes the others are not at this point: all must start again.
        if self._retries[type(error)] < 0 or ranks.count > 1 or self._next is None:
            return False
        self._plan, self._next = self._next, None
        self._config = _without_plan(self._config)
        return True

    # --------------------------------------------------------------------------------------------------------- attempts
    def _attempt(self, ranks: Ranks, faults: FaultPlan, request: StopRequest, compiles: CompileWatch) -> Outcome:
        with contextlib.ExitStack() as stack:
            watchdog = Watchdog(ranks, dump=self.folder / f"stacks-rank{ranks.index}.txt")
            stack.callback(watchdog.close)
            watchdog.beat("start", self._config.policy.compile_s)
            loop = self._prepare(stack, ranks, faults, request, compiles, watchdog)
            try:
                outcome = loop.run()
            except jax.errors.JaxRuntimeError as error:
                raise self._translated(error, loop.sharded, f"step {loop.step + 1}") from error
            if ranks.index == 0:
                write_record(loop.sharded.plan, loop.reporter.step_times_s, self.folder)
            return outcome

    def _prepare(
        self,
        stack: contextlib.ExitStack,
        ranks: Ranks,
        faults: FaultPlan,
        request: StopRequest,
        compiles: CompileWatch,
        watchdog: Watchdog,
    ) -> Loop:
        """Open everything, and put the state in place: fresh, or from the newest checkpoint."""
        goodput = Goodput()
        with goodput.measure("setup"):
            config, choice = self._settle_config(ranks)
            data = open_dataset(config, self._data, self._vocab)
            store = CheckpointStore(self.folder / "checkpoints", config.checkpoint, ranks, hook=faults.at)
            stack.callback(store.close)
            sharded = self.sharded = self._shard(config, choice, data, ranks)
            loader = data.loader(config, sharded, faults)
            stack.callback(loader.close)
            judge = Judge(config.policy, loader.describe)
            restored = self._restore(store, sharded, data)
            goodput.lost_s = _lost_seconds(self.folder, restored.step if restored else 0)
            if restored is not None:
                loader.seek(restored.next_batch)
                judge.recall(restored.losses, skipped=restored.skipped_steps, rollbacks=restored.rollbacks)
        reporter = self._reporter(config, sharded.plan, ranks)
        stack.callback(reporter.close)
        profile = ProfileWindow(config.run.profile, self.folder / f"profile-rank{ranks.index}")
        stack.callback(profile.close)
        return Loop(
            config=config,
            ranks=ranks,
            sharded=sharded,
            loader=loader,
            held_out=data.held_out_batches(config.run.eval_batches, sharded),
            store=store,
            reporter=reporter,
            judge=judge,
            watchdog=watchdog,
            request=request,
            faults=faults,
            goodput=goodput,
            compiles=compiles,
            profile=profile,
            learning_rate=self._learning_rate,
            config_fingerprint=fingerprint(config),
            data_fingerprint=data.train.fingerprint,
            step=restored.step if restored else 0,
        )

    def _settle_config(self, ranks: Ranks) -> tuple[RunConfig, Choice]:
        """Fill in what the plan or the run so far decides, check that it is the same run, and keep it."""
        say = _speaker(ranks)
        config, before = self._config, read_config(self.folder)
        batch = config.data.global_batch or (before.data.global_batch if before else None)
        choice = choose_plan(
            config.run, self.folder, given=self._plan, global_batch=batch, allow_mismatch=self._allow_mismatch
        )
        for note in choice.notes:
            say(note)
        batch = batch or (choice.plan.global_batch if choice.plan else DEFAULT_GLOBAL_BATCH)
        seq = config.data.seq or (choice.plan.model.seq if choice.plan else None)
        if seq is None and self._data is None:
            raise ConfigError("seq is not given", expected="tokens per sample", where="[data]", action="set it")
        config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, seq=seq, global_batch=batch))
        if before is not None:
            for change in check_same_run(before, config, override=self._override, where=str(self.folder)):
                say(f"changed: {change}")
        check_preflight(
            ranks, gather_facts(config=fingerprint(config), plan=choice.plan.fingerprint if choice.plan else "")
        )
        if ranks.index == 0:
            write_config(config, self.folder)
        return config, choice

    def _shard(self, config: RunConfig, choice: Choice, data: DataSet, ranks: Ranks) -> ShardedModel:
        sharded = auto_shard(
            self._model,
            loss=self._loss,
            optimizer=self._optimizer,
            plan=choice.plan,
            cluster=choice.cluster,
            hardware=self._hardware or learnt_hardware(self.folder, choice.cluster.gpu),
            weights=self._weights,
        )
        if config.run.compile_cache:
            jax.config.update("jax_compilation_cache_dir", config.run.compile_cache)
        try:
            assert config.data.global_batch is not None, "filled in before"
            plan = sharded.prepare(data.abstract_batch(config.data.global_batch))
        except jax.errors.JaxRuntimeError as error:
            raise self._translated(error, sharded, "building the state") from error
        if ranks.index == 0:
            save_plan(plan, self.folder / PLAN_NAME)
        _speaker(ranks)(f"plan: {plan_text(plan)}")
        return sharded

    def _restore(self, store: CheckpointStore, sharded: ShardedModel, data: DataSet) -> Progress | None:
        if not store.steps:
            return None
        say, abstract = _speaker(current_ranks()), sharded.abstract_state()
        free_state(sharded)
        restored = store.restore(abstract)
        if restored is None:
            return None
        progress = restored.checkpoint.progress
        if progress.data != data.train.fingerprint:
            raise ConfigError(
                f"the data changed: fingerprint {progress.data} in the checkpoint, {data.train.fingerprint} now",
                expected="the same files, tokenizer, seq and share held out",
                where=str(store.folder),
                action="bring the old data back, or start in another folder",
            )
        sharded.restore_state(restored.state)
        say(f"resumed from step {progress.step}")
        if change := describe_change(restored.checkpoint.plan, sharded.plan):
            say(change)
        return progress

    def _reporter(self, config: RunConfig, plan: Plan, ranks: Ranks) -> Reporter:
        speaks = ranks.index == 0
        return Reporter(
            plan,
            steps=config.run.steps,
            every=config.log.every,
            devices=jax.device_count(),
            trackers=open_trackers(config.log, self.folder) if speaks else (),
            out=sys.stdout if speaks else None,
        )

    def _translated(self, error: jax.errors.JaxRuntimeError, sharded: ShardedModel, when: str) -> GalvatronError:
        """Return what an error of XLA means to the user, with the plan to take next; a lack of memory is learnt."""
        plan = sharded.plan
        hardware = self._hardware or learnt_hardware(self.folder, plan.cluster.gpu)
        if is_out_of_memory(error):
            hardware = self._hardware = learn_margin(hardware, self.folder)
            self._next, offer = offer_plan(sharded, hardware, Limits(), self.folder)
        elif jax.process_count() > 1:  # a process was lost: no other plan helps
            offer = ""
        else:
            self._next, offer = offer_plan(sharded, hardware, simpler_than(plan), self.folder)
        return translate(error, plan, when, offer)


def _as_windows(data: Windows | Sequence[Any]) -> Windows:
    return SampleWindows(data) if isinstance(data, Sequence) else data


def _without_plan(config: RunConfig) -> RunConfig:
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, plan=None))


def _lost_seconds(folder: Path, step: int) -> float:
    """Return how long the steps behind the checkpoint took that an earlier attempt had done already."""
    done = {r["step"]: r["step_time_s"] for r in read_metrics(folder) if isinstance(r.get("step_time_s"), float)}
    return float(sum(duration_s for number, duration_s in done.items() if number > step))


def _speaker(ranks: Ranks) -> Callable[[str], None]:
    """Return what prints a line on rank 0; names in plans come from strangers."""
    return (lambda text: print(clean(text), flush=True)) if ranks.index == 0 else (lambda _: None)
