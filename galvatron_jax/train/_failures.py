"""What an error of XLA means to the user: out of memory, a lost process, or a program that it cannot run."""

from __future__ import annotations

import jax

from ..errors import DistributedError, GalvatronError, ToolchainError
from ..plan import Plan
from ._memory import is_out_of_memory, memory_error
from ._plans import HARDWARE_NAME


def translate(error: jax.errors.JaxRuntimeError, plan: Plan, when: str, offer: str) -> GalvatronError:
    """Return the error to raise in place of one of XLA.

    Args:
        error: What XLA raised.
        plan: What was run.
        when: During what.
        offer: Says which plan could be taken in its place.
    """
    if is_out_of_memory(error):
        return memory_error(
            error,
            plan,
            when,
            f"{offer}; start again without [run] plan: the search then leaves more memory free (what was learnt is in"
            f" {HARDWARE_NAME} of the run's folder); or add --retry-oom 1",
        )
    if jax.process_count() > 1:
        return DistributedError(
            f"a collective failed: {str(error).splitlines()[0][:300]}",
            expected="all processes alive",
            where=when,
            action="see what the others say; the supervisor (python -m galvatron_jax.train.launch) starts all again",
        )
    return ToolchainError(
        f"XLA failed: {str(error)[:500]}",
        where=when,
        action=f"{offer}; take it with --plan, or add --retry-failed 1; --debug shows more",
    )
