"""What a checkpoint says of itself: ``galvatron.json`` beside the arrays, written last, inside the atomic rename.

A folder without it is no checkpoint. It lists every file with its SHA-256, every leaf with its shape, where the run
stands in its data, and carries a seal over its own contents. All this guards against damage, **not** against an
adversary: who can write the folder can write a matching seal.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar

import msgspec

from ..._document import Bytes, Document, Value, decode, encode
from ...plan import Plan

DOCUMENT_NAME = "galvatron.json"

Step = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class FileSum(Value, frozen=True, kw_only=True):
    """One file of the checkpoint."""

    size: Bytes
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Leaf(Value, frozen=True, kw_only=True):
    """One array of the state, in the user's own structure and shape."""

    shape: tuple[int, ...]
    dtype: str


class Progress(Value, frozen=True, kw_only=True):
    """Where a run stands besides its arrays."""

    step: Step
    """Steps done."""
    next_batch: Step
    """Number of the batch that comes next: skips and rollbacks let it differ from ``step``."""
    data: str
    """Fingerprint of the data."""
    config: str
    """Fingerprint of the settings that a resumed run must share."""
    losses: tuple[float, ...] = ()
    """The last ones, by which the next loss is judged."""
    skipped_steps: Step = 0
    """Of ``step``, those that left their update out because they were not finite."""
    rollbacks: Step = 0
    """How often the run went back to a checkpoint."""


class Checkpoint(Document, frozen=True, kw_only=True):
    """One checkpoint."""

    DOCUMENT: ClassVar[str] = "checkpoint"

    progress: Progress
    plan: Plan
    """Under which it was made; any other plan may go on from it."""
    versions: dict[str, str]
    """Of galvatron_jax, jax, orbax."""
    leaves: dict[str, Leaf]
    files: dict[str, FileSum]
    """By path inside the checkpoint."""
    seal: str = ""
    """SHA-256 of this document without its seal."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files.values())

    def sealed(self) -> Checkpoint:
        """The same with its seal."""
        return msgspec.structs.replace(self, seal=self._digest())

    @property
    def is_intact(self) -> bool:
        """Whether the seal fits."""
        return self.seal == self._digest()

    def _digest(self) -> str:
        text = encode(msgspec.structs.replace(self, seal=""))
        # As it will be read: a whole number in the place of a float is written 0, read 0.0 and would be written 0.0.
        text = encode(decode(text, Checkpoint, where=DOCUMENT_NAME))
        return hashlib.sha256(text.encode()).hexdigest()
