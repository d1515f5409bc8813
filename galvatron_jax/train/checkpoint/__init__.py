"""Checkpoints: plan-neutral, written in the background, whole or not there, and checked before they are believed."""

from ._document import Checkpoint as Checkpoint
from ._document import Progress as Progress
from ._reader import CheckpointReader as CheckpointReader
from ._reader import SavedParameter as SavedParameter
from ._store import CheckpointStore as CheckpointStore
from ._store import Restored as Restored
from ._store import SaveEvent as SaveEvent
