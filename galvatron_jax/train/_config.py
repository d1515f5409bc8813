"""A run as one TOML file: what to train, on what, how long; strictly read, every default filled in, saved with the run.

    [model]
    preset = "llama-tiny"

    [data]
    paths = ["corpus/"]
    global_batch = 32

    [run]
    folder = "runs/first"
    steps = 200

Other sections: [optimizer], [checkpoint], [log], [policy]. TOML because it has one meaning for each text and runs no
code; the only code that a run file names is the user's own model and loss (``module:function``).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .._document import Count, NonNegative, Positive, Value
from ..errors import ConfigError

MAX_CONFIG_BYTES = 2**20

Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Setting = str | int | float | bool


class ModelConfig(Value, frozen=True, kw_only=True):
    """What to train: a preset, or a function of the user's."""

    preset: str | None = None
    """For example ``llama-tiny``; ``llama-tiny`` when ``function`` is not given either."""
    changes: dict[str, Setting] = {}
    """Fields of the preset's configuration to change, for example ``{layers = 2}``; with ``huggingface`` those that
    leave the weights as they are, for example ``{seq = 1024, dtype = "float32"}``."""
    huggingface: str | None = None
    """Folder with ``config.json`` and safetensors of a Llama: sizes and first weights, in place of ``preset``."""
    function: str | None = None
    """``module:function`` that builds the ``flax.nnx.Module``, called without arguments."""
    loss: str | None = None
    """``module:function`` of (model, batch); next-token cross-entropy by default."""
    vocab: Count | None = None
    """With ``function``: token ids at or above it are refused."""
    seed: Seed = 0
    """Of the initial weights of a preset."""


DataKind = Literal["text", "tokens", "synthetic", "huggingface"]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=0.5)]


class DataConfig(Value, frozen=True, kw_only=True):
    """What to train on.

    Documents are packed into windows of ``seq`` tokens; attention crosses their boundaries.
    """

    kind: DataKind = "text"
    paths: tuple[str, ...] = ()
    """Files or folders; for ``huggingface`` the dataset's name. Text without a path is what any machine has: Python's
    standard library."""
    seq: Size | None = None
    """Tokens per sample; the model's by default."""
    global_batch: Size | None = None
    """Samples per step, over all devices; the plan's by default, or 32."""
    tokenizer: str = "bytes"
    """Of text and Hugging Face data: ``bytes``, a ``tokenizer.json``, or a name on the hub."""
    dtype: str = "uint16"
    """Integers in ``.bin`` and ``.arrayrecord`` files."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    max_bytes: Size = 8 * 2**20
    """Text is read up to here; it is held in memory as tokens."""
    windows: Size = 2**20
    """Number of synthetic windows."""
    held_out: Share = 0.05
    """Share of the windows to judge by, never trained on."""
    epochs: Size | None = None
    """Rounds through the data; endless by default."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    """Decides the order, a new one each round."""
    max_skipped_share: Share = 0.001
    """Of all records; more damaged ones stop the run: one in a thousand is no accident of storage."""


class OptimizerConfig(Value, frozen=True, kw_only=True):
    """How the parameters move."""

    name: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    learning_rate: Positive = 3e-4
    """The peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """A tenth of all steps by default."""
    final_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """Of the peak, at the last step."""
    weight_decay: NonNegative = 0.1
    b1: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    b2: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.95
    clip_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never."""


class RunSettings(Value, frozen=True, kw_only=True):
    """How long, where, on which devices."""

    folder: str = "runs/default"
    """Everything that the run writes, on a file system that all processes share; a run that finds checkpoints there
    goes on from them."""
    steps: Count = 1000
    plan: str | None = None
    """A plan file; searched for by default."""
    mesh: str | None = None
    """``NODESxGPUS``; what JAX sees by default. Given, it overrules a plan for another mesh: the run plans again."""
    gpu: str | None = None
    """Kind of GPU that the search prices with, or a hardware profile; what JAX sees by default."""
    devices: Count | None = None
    """Virtual CPU devices per process, even where there are GPUs."""
    eval_every: Count | None = None
    """Steps between evaluations on held-out data; only at the end by default."""
    eval_batches: Count = 4
    compile_cache: str | None = None
    """Folder of compiled programs, so that a restart need not compile; it holds code: keep it private."""
    profile: str | None = None
    """``FIRST:LAST`` steps to trace with ``jax.profiler`` into the run's folder."""


class CheckpointConfig(Value, frozen=True, kw_only=True):
    """When checkpoints are written, which are kept, and what happens when writing fails."""

    every: Count = 100
    """Steps between two; the last step always writes one."""
    keep: Count = 3
    """Newest ones that are kept; an older one goes only after a newer one is whole."""
    keep_every: Count | None = None
    """Steps that are multiples of this are kept for good."""
    verify: bool = True
    """Read all files of a checkpoint and compare their SHA-256 before restoring it."""
    max_failures: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    """Failed saves in a row after which the run ends; until then it goes on training and tries again."""
    timeout_s: Positive = 600.0
    """One save, over all processes."""


class LogConfig(Value, frozen=True, kw_only=True):
    """What is told, beside ``metrics.jsonl``, which holds every step."""

    every: Count = 10
    """Steps between two lines."""
    tensorboard: bool = False
    wandb: str | None = None
    """Project."""


class PolicyConfig(Value, frozen=True, kw_only=True):
    """What happens when something goes wrong."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """NaN or infinity in loss or gradients: stop (exit 5), leave the update out, or go back to the last checkpoint and
    go on behind the bad batch. Never is such an update applied."""
    max_skipped: Count = 10
    """Updates left out (or rollbacks) after which the run stops all the same, and spikes are only reported."""
    spike_sigma: Positive = 6.0
    """A loss so many standard deviations above the mean of the window is a spike; it is reported with its batch."""
    spike: Literal["warn", "rollback"] = "warn"
    """Keep the update of a spike, or leave it out: go back to the last checkpoint and on behind its batch."""
    spike_window: Annotated[int, msgspec.Meta(ge=8, le=10_000)] = 100
    stall_s: Positive = 120.0
    """Least time without progress after which all stacks are written; 20 times the usual step when that is longer.
    After twice the time the process ends (exit 4)."""
    compile_s: Positive = 3600.0
    """The same for compilation, the first step and checkpoints."""
    straggler_share: Positive = 0.2
    """A process that holds up the others by this share of the step, waiting for data or working on the host, is named;
    a slow GPU is where NVML can be read (``pynvml``)."""


class RunConfig(Value, frozen=True, kw_only=True):
    """One run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunSettings = RunSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    policy: PolicyConfig = PolicyConfig()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if sum(map(bool, (self.model.preset, self.model.huggingface, self.model.function))) > 1:
            raise ValueError("give preset, huggingface or function, only one of them")
        if self.model.changes and self.model.function:
            raise ValueError("changes belong to a preset, not to a function")
        if self.run.profile is not None and not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", self.run.profile):
            raise ValueError(f"profile is {self.run.profile!r}, expected FIRST:LAST such as 10:12")


def load_config(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: The TOML file.
        settings: ``section.key=value`` each, in place of what the file says; the value is TOML, or plain text.

    Raises:
        ConfigError: there is no such file, it is no TOML, or a key or value is none of ours; the message names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError("is too large", expected=f"at most {MAX_CONFIG_BYTES} bytes", where=str(path))
        table = tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), action="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is no TOML: {error}", where=str(path), action="see the head of train/_config.py") from None
    for setting in settings:
        _apply(table, setting)
    return parse_config(table, where=str(path))


def parse_config(table: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the configuration in a table.

    Raises:
        ConfigError: a key or value is none of ours.
    """
    try:
        return msgspec.convert(table, RunConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(str(error), where=where, action="correct this key") from None


def _apply(table: dict[str, Any], setting: str) -> None:
    match = re.fullmatch(r"([a-z_]+)\.([a-z_0-9]+)=(.*)", setting, flags=re.DOTALL)
    if match is None:
        raise ConfigError(f"got {setting!r}", expected="section.key=value", where="--set", action="see --help")
    section, key, text = match.groups()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table.setdefault(section, {})[key] = value
