"""Analysis: the user's loss function becomes layers, shardable dimensions, candidates and quantities. No devices."""

from . import _rules as _rules  # registers the dimension rules
from ._dimensions import Rule as Rule
from ._dimensions import register_rule as register_rule
from ._profile import Analysis as Analysis
from ._profile import analyse_model as analyse_model
from ._fusion import is_kept as is_kept
