"""The search: the fastest plan of the stated space, and the proof that it is. numpy only, never jax."""

from ._baselines import Baseline as Baseline
from ._find import SearchResult as SearchResult
from ._find import find_plan as find_plan
from ._space import default_batches as default_batches
from ._report import describe_plan as describe_plan
