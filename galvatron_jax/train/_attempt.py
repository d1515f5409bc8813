"""What the supervisor tells the processes that it starts."""

from __future__ import annotations

ATTEMPT_VARIABLE = "GALVATRON_ATTEMPT"
"""How often this process was started, from 1."""
