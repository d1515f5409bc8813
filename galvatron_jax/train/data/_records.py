"""Damaged records: skipped, counted and named, until there are too many."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

from ...errors import DataError
from ._windows import CorruptRecordError, Tokens, Windows, is_tokens

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class SkippedRecords:
    """Which records were skipped so far."""

    total: int
    """Records in all."""
    max_share: float = 0.001
    """Above this share the run stops; see ``[data] max_skipped_share``."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """Reason by name of the record; a record met twice counts once."""
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, name: str, reason: str) -> None:
        """Note a damaged record.

        Raises:
            DataError: there are more than ``max_share`` of all records (one is always forgiven).
        """
        with self._lock:
            if name in self.names:
                return
            self.names[name] = reason
            count = len(self.names)
        _log.warning("skipped damaged record %s: %s (%d so far)", name, reason, count)
        if count > max(1.0, self.max_share * self.total):
            raise DataError(
                f"{count} of {self.total} records are damaged, the last one {name}: {reason}",
                expected=f"at most {self.max_share:.2%}",
                where="data",
                action="repair the files, or raise [data] max_skipped_share",
            )


@dataclasses.dataclass(frozen=True)
class CheckedWindows:
    """Windows of which each is whole: in the place of a damaged one stands the next whole one.

    Deterministic and local to an index, so that it is the same on every process and after every restart.
    """

    source: Windows
    vocab: int | None
    skipped: SkippedRecords

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Any:
        for probe in range(len(self)):
            at = (index + probe) % len(self)
            try:
                sample = self.source[at]
            except CorruptRecordError as error:
                self.skipped.add(self.source.name(at), str(error))
                continue
            if is_tokens(sample):
                self._check_range(sample, at)
            return sample
        raise DataError("no record is whole", where="data", action="repair the files")

    def name(self, index: int) -> str:
        return self.source.name(index)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def _check_range(self, tokens: Tokens, index: int) -> None:
        # Never skipped: JAX clamps the lookup of a wrong id in silence, and a wrong tokenizer spoils every record.
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self.vocab is not None and high >= self.vocab):
            raise DataError(
                f"got token id {low if low < 0 else high}",
                expected=f"0 to {self.vocab - 1}, the model's vocabulary" if self.vocab else "0 or more",
                where=self.source.name(index),
                action="is this the tokenizer, the dtype and the vocabulary that the data was made for?",
            )
