"""The processes of a run, as far as the trainer needs them: what each one says, read by all.

The words travel through the key-value store of JAX's coordination service (no device, no collective), so they can be
exchanged before the first program runs, with a time limit, and who is missing is known by name. The service is neither
authenticated nor encrypted: trusted networks only.
"""

from __future__ import annotations

import collections
import contextlib
from typing import Any, Protocol

import jax

EXCHANGE_TIMEOUT_S = 600.0
"""For ranks that do slow work of their own first, such as reading a checkpoint back to verify it."""


class Ranks(Protocol):
    """The processes of a run."""

    @property
    def index(self) -> int:
        """Which one this is; 0 writes what is written once."""

    @property
    def count(self) -> int:
        """How many there are."""

    def exchange(self, topic: str, text: str = "", *, timeout_s: float = EXCHANGE_TIMEOUT_S) -> tuple[str | None, ...]:
        """Say ``text``, wait, and return what every rank said; None for those that said nothing in time.

        All ranks must exchange the same topics in the same order. Without a text this is a barrier.
        """

    def report(self, text: str) -> None:
        """Say what this rank does, for whoever asks; waits for nobody."""

    def reports(self) -> dict[int, str]:
        """Return what each rank last reported."""


class OneRank:
    """A run in one process."""

    index = 0
    count = 1
    _report = ""

    def exchange(self, topic: str, text: str = "", *, timeout_s: float = EXCHANGE_TIMEOUT_S) -> tuple[str | None, ...]:
        """Return ``text`` alone."""
        return (text,)

    def report(self, text: str) -> None:
        """See ``Ranks``."""
        self._report = text

    def reports(self) -> dict[int, str]:
        """See ``Ranks``."""
        return {0: self._report}


class ServiceRanks:
    """The processes that ``jax.distributed`` joined."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        """Hold the client of the coordination service."""
        self._client, self.index, self.count = client, index, count
        self._rounds: collections.Counter[str] = collections.Counter()

    def exchange(self, topic: str, text: str = "", *, timeout_s: float = EXCHANGE_TIMEOUT_S) -> tuple[str | None, ...]:
        """See ``Ranks``."""
        self._rounds[topic] += 1
        number = self._rounds[topic]
        self._client.key_value_set(f"galvatron/{topic}/{number}/{self.index}", text)
        said = tuple(
            text if rank == self.index else self._read(f"galvatron/{topic}/{number}/{rank}", timeout_s)
            for rank in range(self.count)
        )
        if self.index == 0 and number > 1:  # all have said this round's word, so all have read the last round's
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_delete(f"galvatron/{topic}/{number - 1}/")
        return said

    def report(self, text: str) -> None:
        """See ``Ranks``."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service went down with rank 0
            self._client.key_value_set(f"galvatron/reports/{self.index}", text, allow_overwrite=True)

    def reports(self) -> dict[int, str]:
        """See ``Ranks``."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = self._client.key_value_dir_get("galvatron/reports/")
            return {int(key.rsplit("/", 1)[-1]): str(text) for key, text in found}
        return {}

    def _read(self, key: str, timeout_s: float) -> str | None:
        try:
            return str(self._client.blocking_key_value_get(key, int(timeout_s * 1000)))
        except jax.errors.JaxRuntimeError:  # nobody wrote it in time
            return None


def current_ranks() -> Ranks:
    """Return the processes of this run."""
    if jax.process_count() == 1:
        return OneRank()
    from jax._src import distributed  # the only door to the key-value store (jax 0.10)

    return ServiceRanks(distributed.global_state.client, jax.process_index(), jax.process_count())
