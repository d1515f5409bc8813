"""Check the cost model on one plan: what it says of each layer and stage, and what a clock says beside it.

The command is ``python -m galvatron_jax.cost PLAN``; its room stands above ``cost``, since measuring needs the runtime.
"""

from ._breakdown import RunPrice as RunPrice
from ._breakdown import stage_prices as stage_prices
from ._trace import trace_events as trace_events
