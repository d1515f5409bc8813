"""The user's model as one value, whatever it is written in: an NNX module, a Linen module, or a tree of parameters.

Every reader (``_read_nnx``, ``_read_linen``, ``_read_tree``) answers the same five questions: which arrays are trained,
which others does the model keep, what is the loss of a batch, how are fresh values made, and how does the user get
their own object back. Nothing after this file knows which API it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Loss = Callable[[Any, Any], Any]
"""``loss(model, batch) -> scalar`` (or a tuple whose first entry is the scalar)."""

Role = Literal["key", "count", "other"]
"""What a leaf of the state is: a random key, the number of keys drawn from it so far, or anything else."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PureModel:
    """A model and its loss as pure functions of two pytrees: trained parameters, and all other state."""

    name: str
    """Class name, for documents."""
    parameters: Any
    """Trained leaves, abstract."""
    state: Any
    """All other leaves (random keys, statistics), abstract."""
    paths: tuple[str, ...]
    """Dotted path of each trained leaf, in leaf order."""
    roles: tuple[Role, ...]
    """Role of each state leaf, in leaf order."""
    run: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(parameters, state, batch) to (what the loss returned, new state)."""
    build: Callable[[], tuple[Any, Any]]
    """Makes (parameters, state): fresh values, which may run under ``jax.jit``; the user's own when ``is_built``."""
    is_built: bool
    """The user passed an object that has values, not a recipe."""
    restore: Callable[[Any, Any], Any]
    """(parameters, state) to the user's own kind of object."""
    classes: frozenset[type] = frozenset()
    """Classes whose method calls must be marked while the model is traced (NNX has no interception hook)."""


def dotted(path: tuple[Any, ...]) -> str:
    """Return ``layers.0.attention.query.kernel`` for a key path (the final ``value`` of an NNX variable left out)."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(words[:-1] if len(words) > 1 and words[-1] == "value" else words)
